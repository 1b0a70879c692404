"""Hyperparameters of one script on one task by Optuna, each trial the script's own command line.

    python -m benchmark.tune runs/tuning --script meow --env-id Hopper-v4 --flags="--total-timesteps 50000" \\
        --space learning_rate=log:1e-4:1e-2 tau=log:1e-4:1e-2 clipped_double_q=bool --trials 30

A trial's score is the mean of its last five evaluations; one below the median of the complete trials at the same step
is stopped. The study is study.log in the folder, with a folder for each trial; the same command continues it, and runs
trials that Ctrl-C interrupted again. Prints the best flags as a command line. The best score of many is too high an
estimate of what its flags reach: train them again with other seeds.
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
from optuna.storages.journal import JournalFileBackend, JournalStorage
from optuna.trial import TrialState

from benchmark import UserError, exit_code, scalars, script_of
from benchmark.run import run_folders, tail

LAST = 5  # evaluations behind a score
KINDS = {
    "log": lambda trial, name, low, high: f"{trial.suggest_float(name, float(low), float(high), log=True):.4g}",
    "uniform": lambda trial, name, low, high: f"{trial.suggest_float(name, float(low), float(high)):.4g}",
    "int": lambda trial, name, low, high: trial.suggest_int(name, int(low), int(high)),
    "choice": lambda trial, name, values: trial.suggest_categorical(name, values.split(",")),
    "bool": lambda trial, name: trial.suggest_categorical(name, [True, False]),
}


@dataclasses.dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # folder of the study, its logs and runs
    env_id: str  # task
    space: tuple[str, ...]  # flags: NAME=log:LOW:HIGH, uniform:LOW:HIGH, int:LOW:HIGH, choice:A,B,C or bool
    script: str = "meow"  # script, by path or word (meow-mixture, sb3:ppo)
    flags: str = ""  # flags of every trial, in quotes: `--flags="--total-timesteps 50000"`
    trials: int = 20  # trials of the study in all
    jobs: int = 2  # trials side by side, one thread each
    seed: int = 1  # seed of each trial, and with --jobs 1 of the sampler
    startup_trials: int = 5  # trials that run to their end before any is stopped early, and that are drawn at random


def suggest(trial: optuna.Trial, space: tuple[str, ...]) -> list[str]:
    """The trial's flags. Raises UserError for a space that cannot be read."""
    flags = []
    for entry in space:
        name, _, rest = entry.partition("=")
        kind, *bounds = rest.split(":")
        try:
            value = KINDS[kind](trial, name, *bounds)
        except (ValueError, TypeError, LookupError) as e:
            raise UserError(f"--space {entry}: expected {', '.join(KINDS)} with its bounds; {e}") from e
        flag = name.replace("_", "-")
        flags.append({True: f"--{flag}", False: f"--no-{flag}"}[value] if kind == "bool" else f"--{flag}={value}")
    return flags


def open_study(args: Args) -> optuna.Study:
    """The study in the folder. Raises UserError if it is another."""
    where = dict(storage=JournalStorage(JournalFileBackend(str(args.folder / "study.log"))), load_if_exists=True)
    pruner = optuna.pruners.MedianPruner(n_startup_trials=args.startup_trials)
    study = optuna.create_study(direction="maximize", study_name="study", pruner=pruner, **where)
    seed = args.seed + len(study.trials)  # a study that is continued draws others
    study.sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=args.startup_trials)
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
        options = dict(stdout=log, stderr=log, start_new_session=True)  # Ctrl-C reaches it through this process alone
        process = subprocess.Popen([*command, *flags], cwd=here, env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)
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
    (path, own), args.folder = script_of(args.script), args.folder.resolve()
    suggest(optuna.create_study().ask(), args.space)  # a mistake is found before anything is written
    args.folder.mkdir(parents=True, exist_ok=True)
    study, interrupted = open_study(args), threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: interrupted.set())
    left = args.trials - len(study.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED)))
    objective = functools.partial(run_trial, args=args, interrupted=interrupted)
    study.optimize(objective, max(left, 0), n_jobs=args.jobs, catch=(RuntimeError,))
    study.trials_dataframe().to_csv(args.folder / "trials.csv", index=False)
    if interrupted.is_set():
        return 130
    if complete := study.get_trials(states=(TrialState.COMPLETE,)):
        best = study.best_trial
        print(f"best of {len(complete)} complete trials: {best.number}, {best.value:.2f}. Train it with other seeds:")
        command = ["python", str(path), *own, "--env-id", args.env_id, *shlex.split(args.flags)]
        print(shlex.join(command + shlex.split(best.user_attrs["flags"])))
    return int(not complete)


if __name__ == "__main__":
    sys.exit(exit_code(main, Args, __doc__))
