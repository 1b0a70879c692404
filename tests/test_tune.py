"""The search for hyperparameters: what is stopped early, interrupted, resumed, refused."""

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from benchmark import tune

ROOT = Path(__file__).resolve().parent.parent
FAKE = str(ROOT / "tests" / "fake_script.py")


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmark.tune", str(folder), "--script", FAKE, "--env-id", "A-v0", *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def test_search_is_interrupted_goes_on_and_finds(tmp_path):
    """The return is --level + step/100 + seed: the best trial has the largest level, and bad ones are stopped early.
    What Ctrl-C interrupts goes on from its checkpoint: no step of a trial is executed twice."""
    flags = ["--space", "level=uniform:0:10", "--trials", "7", "--startup-trials", "2", "--num-seeds", "2"]
    flags += ["--flags=--total-timesteps 150 --seconds 0.6 --hold 24"]
    process = start(tmp_path, *flags)
    deadline = time.time() + 300
    while not any(len(path.read_text().split()) > 3 for path in tmp_path.glob("*/runs/*/steps.txt")):
        assert time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command goes on" in out, err
    begun = sorted(path.parent for path in tmp_path.glob("*/runs/*/steps.txt"))

    process = start(tmp_path, *flags)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    with open(tmp_path / "trials.csv", newline="") as f:
        trials = list(csv.DictReader(f))
    ended = [trial for trial in trials if trial["state"] != "FAIL"]
    assert len(ended) == 7 and {trial["state"] for trial in ended} == {"COMPLETE", "PRUNED"}
    complete = [trial for trial in ended if trial["state"] == "COMPLETE"]
    for trial in complete:  # mean of steps 110 to 150, of seeds 1 and 2
        assert abs(float(trial["value"]) - (float(trial["params_level"]) + 1.3 + 1.5)) < 0.01
    best = max(complete, key=lambda trial: float(trial["value"]))
    expected = f"{FAKE} --env-id A-v0 --total-timesteps 150 --seconds 0.6 --hold 24 {best['user_attrs_flags']}"
    assert out.splitlines()[-1] == f"python {expected}" and f"best: trial {best['number']}" in out
    steps = {path.parent: list(map(int, path.read_text().split())) for path in tmp_path.glob("*/runs/*/steps.txt")}
    assert all(executed == list(range(10, executed[-1] + 1, 10)) for executed in steps.values())
    assert set(begun) <= set(steps) and any(steps[run][-1] == 150 for run in begun)
    stopped = [trial["user_attrs_cell"] for trial in ended if trial["state"] == "PRUNED"]
    ends = [executed[-1] for run, executed in steps.items() if run.parts[-3] in stopped]
    assert min(ends) < 150  # not all: one can become a bad trial after the wait at half of its steps

    process = start(tmp_path, *flags[2:], "--space", "level=uniform:0:1")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and err.startswith("error: ") and "has a study with space" in err


def test_failed_trials_are_reported(tmp_path):
    process = start(tmp_path, "--space", "total_timesteps=int:60:60", "--trials", "1", "--env-id", "Crash-v0")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "trial 0 fail" in out and "FloatingPointError" in out, err


def test_flags_of_a_trial():
    space = ("tau=log:1e-4:1e-2", "gamma=uniform:0.9:1", "batch_size=int:64:256", "coupling=choice:additive,affine")
    fixed = dict(tau=0.00123456, gamma=0.95, batch_size=128, coupling="affine", reward_shift=False)
    trial = optuna.trial.FixedTrial(fixed)
    assert tune.suggest(trial, (*space, "reward_shift=bool")) == (
        "--tau=0.001235 --gamma=0.95 --batch-size=128 --coupling=affine --no-reward-shift".split()
    )


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(space=("tau",)), "--space tau: neither log"),
        (dict(space=("tau=log:0:1",)), "--space tau=log:0:1: "),
        (dict(space=("tau=log:1",)), "--space tau=log:1: not enough"),
        (dict(space=("tau=int:a:b",)), "invalid literal"),
        (dict(script="nothing"), "nothing: no such script"),
        (dict(trials=0), "--trials"),
    ],
)
def test_mistakes(tmp_path, flags, message):
    with pytest.raises(tune.UserError) as e:
        tune.main(
            tune.Args(**dict(folder=tmp_path / "t", env_id="A-v0", space=("tau=uniform:0:1",), script=FAKE) | flags)
        )
    assert message in str(e.value) and not (tmp_path / "t").exists()
