"""Hyperparameters of one script on one task by Optuna, each trial the script's own command line, as a Ray task.

    python -m benchmark.tune runs/tuning --script meow --env-id Hopper-v4 --flags="--total-timesteps 50000" \\
        --space learning_rate=log:1e-4:1e-2 tau=log:1e-4:1e-2 clipped_double_q=bool --trials 30

A trial's score is the mean of its last five evaluations. It is reported at every evaluation, and a
trial below the median of the others at that step is stopped. The study is study.log in the folder; the same command
goes on with it, and with the trials that were interrupted from their checkpoints. Prints the best flags as a command
line. The best score of many is too high an estimate of what its flags reach: train them again with other seeds.

Runs on this machine's cores or on the cluster at RAY_ADDRESS, as benchmark.run does. Exit code: 0, 1 if no trial came
to its end, 2 a mistake in the flags, 130 or 143 interrupted.
"""

import dataclasses
import fcntl
import functools
import shlex
import signal
import sys
from pathlib import Path

import numpy as np
import optuna
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark.grids import UserError, exit_code, script_of
from benchmark.run import run_cell, run_folders, start_ray, stop_tasks, tail
from benchmark.scores import LAST


@dataclasses.dataclass
class Args:
    folder: tyro.conf.Positional[Path]
    """folder of the study, its logs and runs"""
    env_id: str
    """task"""
    space: tuple[str, ...]
    """NAME=log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH, choice:A,B,C or bool, for flags of the script"""
    script: str = "meow"
    """script, by path or by this project's word (meow-mixture)"""
    flags: str = ""
    """flags of every trial, in quotes: `--flags="--total-timesteps 50000"`"""
    trials: int = 20
    """trials of the study in all"""
    seed: int = 1
    """seed of each trial, and of the sampler"""
    startup_trials: int = 5
    """trials that come to their end before any is stopped early, and that are drawn at random"""
    cpus: float = 1.0
    """CPUs of a trial"""
    gpus: float = 0.0
    """share of a GPU for a trial; with 0 it sees none"""


def suggest(trial: optuna.Trial, space: tuple[str, ...]) -> list[str]:
    """The trial's flags. Raises UserError for a space that cannot be read."""
    flags = []
    for entry in space:
        name, _, rest = entry.partition("=")
        kind, *bounds = rest.split(":")
        flag = name.replace("_", "-")
        try:
            if kind in ("log", "uniform"):
                low, high = map(float, bounds)
                flags.append(f"--{flag}={trial.suggest_float(name, low, high, log=kind == 'log'):.4g}")
            elif kind == "int":
                flags.append(f"--{flag}={trial.suggest_int(name, *map(int, bounds))}")
            elif kind == "choice":
                flags.append(f"--{flag}={trial.suggest_categorical(name, ':'.join(bounds).split(','))}")
            elif kind == "bool":
                flags.append(f"--{flag}" if trial.suggest_categorical(name, [True, False]) else f"--no-{flag}")
            else:
                raise ValueError("neither log, uniform, int, choice nor bool")
        except (ValueError, TypeError) as e:
            raise UserError(f"--space {entry}: {e}") from e
    return flags


@functools.cache
def events_of(run: Path) -> EventAccumulator:
    return EventAccumulator(str(run))


def scores(run: Path) -> dict[int, float]:
    """Step -> mean of the last evaluations up to it."""
    events = events_of(run).Reload()
    has = "eval/episodic_return" in events.Tags()["scalars"]
    curve = {e.step: e.value for e in events.Scalars("eval/episodic_return")} if has else {}
    return {step: float(np.mean(list(curve.values())[: i + 1][-LAST:])) for i, step in enumerate(curve)}


def open_study(args: Args) -> optuna.Study:
    """The study in the folder, its interrupted trials queued again. Raises UserError if it is another."""
    backend = optuna.storages.journal.JournalFileBackend(str(args.folder / "study.log"))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="study",
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=args.seed, n_startup_trials=args.startup_trials),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=args.startup_trials),
    )
    what = {key: getattr(args, key) for key in ("script", "env_id", "flags", "seed")}
    what["space"] = list(args.space)
    for key, value in study.user_attrs.items():
        if what[key] != value:
            raise UserError(f"{args.folder} has a study with {key} {value}, not {what[key]}")
    for key, value in what.items():
        study.set_user_attr(key, value)
    for trial in study.get_trials(states=[optuna.trial.TrialState.RUNNING]):
        study.enqueue_trial(trial.params, user_attrs={"cell": trial.user_attrs.get("cell", f"trial-{trial.number}")})
        study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
    return study


def search(study: optuna.Study, args: Args, script: Path) -> None:
    """Run trials until there are as many as asked for. Whatever stops it, their scripts are stopped first."""
    ray = start_ray()
    states, running, failed = optuna.trial.TrialState, {}, []
    task = ray.remote(run_cell).options(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=0)
    has, needs = ray.cluster_resources(), {"CPU": args.cpus, "GPU": args.gpus}
    places = min(int(has.get(kind, 0) / share) for kind, share in needs.items() if share)
    if not places:
        raise UserError(f"--cpus {args.cpus} --gpus {args.gpus}: more than Ray has")

    def wanted() -> int:
        ended = study.get_trials(deepcopy=False, states=[states.COMPLETE, states.PRUNED])
        return args.trials - len(ended) - len(failed) - len(running)

    def begin() -> None:
        trial = study.ask()
        trial.set_user_attr("cell", trial.user_attrs.get("cell", f"trial-{trial.number}"))
        trial.set_user_attr("flags", shlex.join(suggest(trial, args.space)))
        cell = dict(name=trial.user_attrs["cell"], script=str(script), env_id=args.env_id, variant="", seed=args.seed)
        cell |= dict(flags=shlex.split(f"{args.flags} {trial.user_attrs['flags']}"))
        running[task.remote(args.folder, cell, args.cpus, args.gpus)] = trial

    def report(trial: optuna.Trial) -> dict[int, float]:
        runs = run_folders(args.folder / trial.user_attrs["cell"])
        found = scores(runs[0]) if runs else {}
        for step in sorted(found.keys() - study.trials[trial.number].intermediate_values.keys()):
            trial.report(found[step], step)
        return found

    def end(trial: optuna.Trial, found: dict[int, float], state: optuna.trial.TrialState, code: int | str = 0) -> None:
        study.tell(trial, found[max(found)] if state == states.COMPLETE else None, state)
        at = f"{found[max(found)]:.2f} at step {max(found)}" if found else "no evaluation"
        print(f"trial {trial.number} {state.name.lower()}: {at}, {trial.user_attrs['flags']}", flush=True)
        if state == states.FAIL:
            failed.append(trial)
            log = args.folder / trial.user_attrs["cell"] / "log.txt"
            print("\n".join([f"    exit code {code}, end of {log}:", *tail(log).splitlines()[-5:]]), flush=True)

    try:
        while running or wanted() > 0:
            while len(running) < places and wanted() > 0:
                begin()
            for done in ray.wait(list(running), timeout=1.0)[0]:
                trial = running.pop(done)
                try:
                    code = ray.get(done)["exit"]
                except ray.exceptions.RayError as e:  # the worker died, or could not write
                    code = str(e).strip().splitlines()[-1]
                found = report(trial)
                end(trial, found, states.COMPLETE if code == 0 and found else states.FAIL, code)
            for ref, trial in list(running.items()):
                found = report(trial)
                if found and trial.should_prune():
                    stop_tasks(ray, [ref])
                    end(running.pop(ref), found, states.PRUNED)
    finally:
        stop_tasks(ray, list(running))
        ray.shutdown()


def main(args: Args) -> int:
    """Returns the exit code. Raises UserError."""
    script = script_of(args.script)
    if min(args.trials, args.cpus) <= 0 or min(args.gpus, args.startup_trials) < 0:
        raise UserError("--trials and --cpus must be positive, --gpus and --startup-trials not negative")
    suggest(optuna.create_study().ask(), args.space)  # a mistake is found before anything is written
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    with open(args.folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            study = open_study(args)
            search(study, args, script)
        except BlockingIOError as e:
            raise UserError(f"another benchmark.tune works on {args.folder}") from e
        except KeyboardInterrupt as e:
            print(f"interrupted; the same command goes on with {args.folder}")
            return 128 + (e.args[0] if e.args else signal.SIGINT)
    study.trials_dataframe().to_csv(args.folder / "trials.csv", index=False)
    complete = study.get_trials(states=[optuna.trial.TrialState.COMPLETE])
    print(f"{len(complete)} trials came to their end, of {len(study.trials)}; all are in {args.folder}/trials.csv")
    if not complete:
        return 1
    best = study.best_trial
    print(f"best: trial {best.number}, {best.value:.2f}. To be trained again with other seeds:")
    command = ["python", str(script), "--env-id", args.env_id, *shlex.split(args.flags)]
    print(shlex.join(command + shlex.split(best.user_attrs["flags"])))
    return 0


if __name__ == "__main__":
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sys.exit(exit_code(main, Args, __doc__))
