"""The search for hyperparameters: what is stopped early, interrupted, continued, refused. Nothing depends on timing:
the fake script's return is --level + step/100 + seed, and the median rule looks at every evaluation in turn."""

import csv
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest

from benchmark import UserError, tune

ROOT = Path(__file__).resolve().parent.parent
FAKE = str(ROOT / "tests" / "fake_script.py")


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmark.tune", str(folder), "--script", FAKE, *flags]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def trials(folder: Path) -> list[dict]:
    return list(csv.DictReader((folder / "trials.csv").open()))


def test_search_stops_what_is_below_the_median_and_finds_the_best(tmp_path):
    flags = ["--env-id", "A-v0", "--space", "level=uniform:0:10", "--startup-trials", "1", "--jobs", "1"]
    for asked in (4, 7):  # the second call continues the study
        out, err = (process := start(tmp_path, *flags, "--trials", str(asked))).communicate(timeout=300)
        assert process.returncode == 0, err
        assert len(trials(tmp_path)) == asked
    levels = []  # of the trials before that came to their end
    for trial in trials(tmp_path):
        level = float(trial["params_level"])
        stopped = bool(levels) and level < statistics.median(levels)
        assert trial["state"] == ("PRUNED" if stopped else "COMPLETE")
        if not stopped:  # mean of steps 60 to 100, of seed 1
            assert abs(float(trial["value"]) - (level + 0.8 + 1)) < 0.01
            levels.append(level)
    assert 1 < len(levels) < 7
    best = max(trials(tmp_path), key=lambda trial: float(trial["params_level"]))
    assert out.splitlines()[-1] == f"python {FAKE} --env-id A-v0 {best['user_attrs_flags']}"

    process = start(tmp_path, "--env-id", "B-v0", *flags[2:])
    assert "another study" in process.communicate(timeout=300)[1] and process.returncode == 2


def test_interrupted_trials_are_run_again(tmp_path):
    """Two side by side wait until they are stopped; the next call begins with their flags."""
    flags = ["--space", "level=uniform:0:10", "--trials", "2", "--env-id", "A-v0", "--flags=--total-timesteps 20"]
    process = start(tmp_path, *flags[:-1], "--flags=--total-timesteps 20 --seconds 1000")
    deadline = time.time() + 300
    while len(begun := list(tmp_path.glob("trial-*/runs/*/args.json"))) < 2:
        assert time.time() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130, err
    assert {trial["state"] for trial in trials(tmp_path)} == {"FAIL", "WAITING"}
    alive = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert len(begun) == 2 and not any(FAKE in line and "--seconds 1000" in line for line in alive.splitlines())
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.log"))
    study = optuna.load_study(study_name="study", storage=optuna.storages.JournalStorage(backend))
    waiting = study.get_trials()[2:]
    failed = [trial["params_level"] for trial in trials(tmp_path) if trial["state"] == "FAIL"]
    assert sorted(str(trial.system_attrs["fixed_params"]["level"]) for trial in waiting) == sorted(failed)


def test_failed_trials_are_reported(tmp_path):
    process = start(tmp_path, "--space", "total_timesteps=int:60:60", "--trials", "1", "--env-id", "Crash-v0")
    out, err = process.communicate(timeout=300)
    assert process.returncode == 1 and "FloatingPointError" in err, out + err


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
        (dict(space=("tau",)), "--space tau:"),
        (dict(space=("tau=log:0:1",)), "--space tau=log:0:1:"),
        (dict(space=("tau=log:1",)), "--space tau=log:1:"),
        (dict(space=("tau=int:a:b",)), "--space tau=int:a:b:"),
        (dict(script="nothing"), "nothing"),
        (dict(trials=0), "--trials"),
    ],
)
def test_mistakes(tmp_path, flags, message):
    given = dict(folder=tmp_path / "t", env_id="A-v0", space=("tau=uniform:0:1",), script=FAKE) | flags
    with pytest.raises(UserError, match=message):
        tune.main(tune.Args(**given))
    assert not (tmp_path / "t").exists()
