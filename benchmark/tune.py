"""Hyperparameters of one script on one task by Optuna, each trial the script's own command line.

    python -m benchmark.tune runs/tuning --script meow --env-id Hopper-v4 --flags="--total-timesteps 50000" \\
        --space learning_rate=log:1e-4:1e-2 tau=log:1e-4:1e-2 clipped_double_q=bool --trials 30

A trial's score is the mean of its last five evaluations. It is reported at every evaluation, and a trial below the
median of the complete ones at that step is stopped. The study is study.log in the folder, with a folder for each trial;
the same command continues it, and after Ctrl-C runs the interrupted trials again. Prints the best flags as a command
line. The best score of many is too high an estimate of what its flags reach: train them again with other seeds.

Exit code: 0, 1 if no trial is complete, 2 a mistake in the flags, 130 interrupted.
"""

import dataclasses
import functools
import os
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import optuna
import tyro
from optuna.trial import TrialState

from benchmark import UserError, exit_code, scalars, script_of
from benchmark.run import run_folders, tail

LAST = 5  # evaluations behind a score


@dataclasses.dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # folder of the study, its logs and runs
    env_id: str  # task
    space: tuple[str, ...]  # flags: NAME=log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH, choice:A,B,C or bool
    script: str = "meow"  # script, by path or word (meow-mixture, sb3:ppo)
    flags: str = ""  # flags of every trial, in quotes: `--flags="--total-timesteps 50000"`
    trials: int = 20  # trials of the study in all
    jobs: int = 2  # trials side by side, one thread each
    seed: int = 1  # seed of each trial, and of the sampler
    startup_trials: int = 5  # trials that run to their end before any is stopped early, and that are drawn at random


def suggest(trial: optuna.Trial, space: tuple[str, ...]) -> list[str]:
    """The trial's flags. Raises UserError for a space that cannot be read."""
    flags = []
    for entry in space:
        name, _, rest = entry.partition("=")
        kind, *bounds = rest.split(":")
        flag = name.replace("_", "-")
        try:
            if kind in ("log", "uniform"):
                flags.append(f"--{flag}={trial.suggest_float(name, *map(float, bounds), log=kind == 'log'):.4g}")
            elif kind == "int":
                flags.append(f"--{flag}={trial.suggest_int(name, *map(int, bounds))}")
            elif kind == "choice":
                flags.append(f"--{flag}={trial.suggest_categorical(name, bounds[0].split(','))}")
            else:
                flags.append(
                    f"--{'' if trial.suggest_categorical(name, {'bool': [True, False]}[kind]) else 'no-'}{flag}"
                )
        except (ValueError, TypeError, LookupError) as e:
            raise UserError(f"--space {entry}: expected log, uniform, int, choice or bool with its bounds; {e}") from e
    return flags


def open_study(args: Args) -> optuna.Study:
    """The study in the folder. Raises UserError if it is another."""
    backend = optuna.storages.journal.JournalFileBackend(str(args.folder / "study.log"))
    study = optuna.create_study(
        storage=optuna.storages.JournalStorage(backend),
        study_name="study",
        load_if_exists=True,
        direction="maximize",
        sampler=optuna.samplers.TPESampler(seed=args.seed, n_startup_trials=args.startup_trials),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=args.startup_trials),
    )
    asked = [args.script, args.env_id, args.flags, str(args.seed), *args.space]
    if (had := study.user_attrs.get("asked", asked)) != asked:
        raise UserError(f"{args.folder} has another study, of {' '.join(had)}")
    study.set_user_attr("asked", asked)
    return study


def run_trial(trial: optuna.Trial, args: Args, interrupted: threading.Event) -> float:
    """Start the script, report its scores, stop it where the pruner or the user says so. Returns the last score."""
    here = args.folder / f"trial-{trial.number}"
    here.mkdir()
    (path, own), flags = script_of(args.script), suggest(trial, args.space)
    trial.set_user_attr("flags", shlex.join(flags))
    command = [sys.executable, path, "--env-id", args.env_id, "--seed", str(args.seed), *own, *shlex.split(args.flags)]
    with open(here / "log.txt", "w") as log:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        files = dict(stdout=log, stderr=log, start_new_session=True)  # Ctrl-C reaches the script through this command
        process = subprocess.Popen([*command, *flags], cwd=here, env=environment, **files)
    curve, ended = {}, False
    try:
        while not ended:
            ended = interrupted.wait(0.5) or process.poll() is not None
            for event in [e for run in run_folders(here) for e in scalars(run, "eval/episodic_return")][len(curve) :]:
                curve[event.step] = event.value
                trial.report(float(np.mean([*curve.values()][-LAST:])), event.step)
                if trial.should_prune():
                    raise optuna.TrialPruned
    finally:
        process.terminate()
        code = process.wait()
    if interrupted.is_set():
        trial.study.enqueue_trial(trial.params)  # for the next call
        trial.study.stop()
    if code or not curve:
        raise RuntimeError(f"exit code {code}, end of {here}/log.txt:\n{tail(here / 'log.txt', 500)}")
    return float(np.mean([*curve.values()][-LAST:]))


def main(args: Args) -> int:
    """Returns the exit code. Raises UserError."""
    if min(args.trials, args.jobs) <= 0 or args.startup_trials < 0:
        raise UserError("--trials and --jobs must be positive, --startup-trials not negative")
    path, own = script_of(args.script)
    suggest(optuna.create_study().ask(), args.space)  # a mistake is found before anything is written
    args.folder = args.folder.resolve()
    args.folder.mkdir(parents=True, exist_ok=True)
    study, interrupted = open_study(args), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    left = args.trials - len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
    objective = functools.partial(run_trial, args=args, interrupted=interrupted)
    study.optimize(objective, max(left, 0), n_jobs=args.jobs, catch=(RuntimeError,))
    study.trials_dataframe().to_csv(args.folder / "trials.csv", index=False)
    if interrupted.is_set():
        print(f"interrupted; the same command continues {args.folder}")
        return 130
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    print(f"{len(complete)} trials are complete, of {len(study.trials)}; all are in {args.folder}/trials.csv")
    if not complete:
        return 1
    best = study.best_trial
    print(f"best: trial {best.number}, {best.value:.2f}. To be trained again with other seeds:")
    command = ["python", str(path), *own, "--env-id", args.env_id, *shlex.split(args.flags)]
    print(shlex.join(command + shlex.split(best.user_attrs["flags"])))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, Args, __doc__))
