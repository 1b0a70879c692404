"""The search for hyperparameters: what is stopped early, interrupted, resumed, refused."""

import csv
import os
import signal
import statistics
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
    """The return is --level + step/100 + seed: the best trial has the largest level. Trials run one by one, and with
    --hold one below the median of those before waits at half of its steps until it is stopped. What Ctrl-C interrupts
    goes on from its checkpoint: no step of a trial is executed twice."""
    flags = ["--space", "level=uniform:0:10", "--trials", "6", "--startup-trials", "1", f"--cpus={os.cpu_count()}"]
    fixed = "--total-timesteps 100 --seconds 0.3 --hold"
    process = start(tmp_path, *flags, f"--flags={fixed}")
    deadline = time.time() + 300
    while not any(len(path.read_text().split()) > 3 for path in tmp_path.glob("*/runs/*/steps.txt")):
        assert time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130 and "the same command goes on" in out, err
    begun = {path.parent for path in tmp_path.glob("*/runs/*/steps.txt")}

    process = start(tmp_path, *flags, f"--flags={fixed}")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    with open(tmp_path / "trials.csv", newline="") as f:
        ended = [trial for trial in csv.DictReader(f) if trial["state"] != "FAIL"]
    assert len(ended) == 6
    levels = []  # of the trials before that came to their end
    for trial in ended:
        level = float(trial["params_level"])
        stopped = bool(levels) and level < statistics.median(levels)
        assert trial["state"] == ("PRUNED" if stopped else "COMPLETE")
        if not stopped:  # mean of steps 60 to 100, of seed 1
            assert abs(float(trial["value"]) - (level + 0.8 + 1)) < 0.01
            levels.append(level)
    assert 1 < len(levels) < 6
    best = max(ended, key=lambda trial: float(trial["params_level"]))
    assert out.splitlines()[-1] == f"python {FAKE} --env-id A-v0 {fixed} {best['user_attrs_flags']}"
    assert f"best: trial {best['number']}" in out
    steps = {path.parent: list(map(int, path.read_text().split())) for path in tmp_path.glob("*/runs/*/steps.txt")}
    assert all(executed == list(range(10, executed[-1] + 1, 10)) for executed in steps.values())
    assert len(steps) == 6 and begun <= set(steps)
    cells = {trial["user_attrs_cell"]: trial["state"] for trial in ended}
    assert all((executed[-1] == 100) == (cells[run.parts[-3]] == "COMPLETE") for run, executed in steps.items())

    process = start(tmp_path, *flags[2:], "--space", "level=uniform:0:1")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 2 and err.startswith("error: ") and "has a study with" in err


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
