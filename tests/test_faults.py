"""What goes wrong: tasks that fail, signals, kill -9, losses that are not finite, foreign and hostile checkpoints."""

import functools
import io
import itertools
import os
import pickle
import random
import re
import shlex
import signal
import time
import zipfile
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lives import MODULES, SCRIPTS, Life, check_rows, flags, folder_of, refused, rows_of, run, scalars, steps_of

MEOW = "meow_continuous_action.py"
meow = MODULES[MEOW]
OTHERS = [script for script in SCRIPTS if script != MEOW]  # what the scripts share is tested with MEow's, and once more


def step_of(script: str, cwd: Path) -> int:
    """The step of a checkpoint that loads."""
    folder = folder_of(cwd)
    MODULES[script].load_agent(folder / "checkpoint.pt")
    return MODULES[script].load_checkpoint(folder / "checkpoint.pt")["run"][0]


def keep_rows(cwd: Path) -> Path:
    """A second name of buffer.bin, which a run that is finished deletes."""
    if not (kept := cwd.with_suffix(".rows")).exists():
        os.link(folder_of(cwd) / "buffer.bin", kept)
    return kept


def check_finished(script: str, cwd: Path, kept: Path, total: int, learning_starts: int, eval_frequency: int) -> None:
    """Every transition is there, and every event once."""
    assert step_of(script, cwd) == total and not (folder_of(cwd) / "buffer.bin").exists()
    rows = rows_of(kept)
    assert len(rows) == total
    check_rows(rows)
    ends = [k + 1 for k, row in enumerate(rows) if row[6] or row[5] == 5]
    evaluations = sorted({*range(eval_frequency, total + 1, eval_frequency), total})
    logs = list(range(learning_starts // 100 * 100 + 100, total + 1, 100))
    logged = scalars(folder_of(cwd))
    assert {"losses/qf_loss", "charts/SPS", "charts/episodic_return", "eval/episodic_return"} <= logged.keys()
    for tag, points in logged.items():
        expected = evaluations if tag.startswith("eval/") else ends if "episodic" in tag else logs
        assert [step for step, _ in points] == expected, tag


# Tasks that fail


RAISE = dict(Raise="the joints\nhave come apart", RaiseReset="no ground\nunder the robot")
FAILING = [
    (MEOW, fault, place) for fault in ("Raise", "RaiseReset", "NaNObs", "InfObs", "NaNReward") for place in (0, 1)
]
FAILING += [(script, "Raise", 1) for script in OTHERS]


@pytest.mark.parametrize("script, fault, place", FAILING)
def test_task_that_fails(tmp_path, script, fault, place):
    """The state is saved and the task's own traceback shown; once the task is mended, --resume goes on."""
    cwd, place = tmp_path / "x", ("Training", "Evaluation")[place]
    more = dict(env_id=f"tasks:{fault}In{place}-v0", total_timesteps=220, eval_frequency=120)
    life = run(script, *flags(script, **more), cwd=cwd, code=1)
    assert "Traceback" in life.err and ("in step" in life.err or "in reset" in life.err), life.err
    assert RAISE.get(fault, "is not finite") in life.err
    failed_at = dict(Training=149, Evaluation=120)[place]
    failed_at = dict(Training=152, Evaluation=220)[place] if fault == "RaiseReset" else failed_at
    assert step_of(script, cwd) == failed_at
    assert f"stopped at step {failed_at}; " in life.out and steps_of(cwd) == failed_at
    kept = keep_rows(cwd)
    (cwd / "mended").touch()
    run(script, "--resume", folder_of(cwd), cwd=cwd)
    check_finished(script, cwd, kept, 220, 100, 120)


# Stops


PLACES = {  # task, step at which it is stopped, learning starts
    "before learning starts": ("SlowInTraining", 160, 2000),
    "training": ("SlowInTraining", 160, 100),
    "a step of 30 s": ("SleepInTraining", 149, 100),
    "a reset of 30 s at a step that is logged": ("SleepResetInTraining", 200, 100),
    "a step of 30 s of an evaluation": ("SleepInEvaluation", 150, 100),
    "an evaluation without end": ("EndlessInEvaluation", 150, 100),
}
STOPS = [(MEOW, place, number) for place, number in zip(PLACES, itertools.cycle((signal.SIGINT, signal.SIGTERM)))]
STOPS += [(script, "training", signal.SIGTERM) for script in OTHERS]


@pytest.mark.parametrize("script, place, number", STOPS)
def test_stopped_within_a_second_and_resumed(tmp_path, script, place, number):
    cwd, (task, step, starts) = tmp_path / "x", PLACES[place]
    total = starts + 130
    more = dict(env_id=f"tasks:{task}-v0", total_timesteps=total, eval_frequency=150, learning_starts=starts)
    life = Life(script, *flags(script, **more), cwd=cwd)
    life.until(lambda: steps_of(cwd) >= step)
    time.sleep(0.3)
    assert "Evaluation" not in task or step_of(script, cwd) == step  # what is due is saved before the evaluation
    before = time.time()
    life.signal(number).wait(20)
    assert life.code == 128 + number and "Traceback" not in life.err, life.err
    saved = (folder_of(cwd) / "checkpoint.pt").stat().st_mtime
    assert -0.1 < saved - before < 1  # a file's time is coarse
    stopped_at, command = re.search(r"stopped at step (\d+); continue with: python (.*)", life.out).groups()
    stopped_at = int(stopped_at)
    assert stopped_at == step_of(script, cwd) <= steps_of(cwd) <= stopped_at + 1 and step <= stopped_at < total
    kept = keep_rows(cwd)
    (cwd / "mended").touch()
    run(script, *shlex.split(command)[1:], cwd=cwd)
    check_finished(script, cwd, kept, total, starts, 150)


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_resumed_run_has_the_learner_that_was_saved(tmp_path, monkeypatch, script):
    """Stopped in its ninth update, and again in the first one after --resume: nets, target, Adam and best return."""
    module, calls, saved = MODULES[script], itertools.count(), []
    sample = module.ReplayBuffer.sample

    def stopping(self, n: int):
        if next(calls) in (8, 9):
            raise KeyboardInterrupt
        return sample(self, n)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.ReplayBuffer, "sample", stopping)
    argv = flags(script, utd=1, total_timesteps=200, eval_frequency=50)
    for _ in range(2):
        with pytest.raises(SystemExit):
            module.train(module.parse_args(argv))
        saved.append(torch.load(folder_of(tmp_path) / "checkpoint.pt", weights_only=True))
        argv = ["--resume", str(folder_of(tmp_path)), "--device=cpu", "--compile=off"]
    assert saved[0].pop("args").keys() == saved[1].pop("args").keys()
    assert saved[0]["run"] == saved[1]["run"] == (108, 15.0, {})
    for x, y in zip(*map(tree_leaves, saved), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


def test_stopped_while_it_compiles(tmp_path):
    life = Life(MEOW, *flags(MEOW, total_timesteps=5000, compile="on"), cwd=tmp_path / "x")
    life.until(lambda: steps_of(tmp_path / "x") >= 100)
    time.sleep(1)
    before = time.time()
    assert life.signal(signal.SIGTERM).wait(20).code == 143, life.err
    assert -0.1 < (folder_of(tmp_path / "x") / "checkpoint.pt").stat().st_mtime - before < 1
    assert step_of(MEOW, tmp_path / "x") >= 100


@pytest.mark.parametrize("name", ["checkpoint", "best"])
def test_stopped_while_it_saves(tmp_path, monkeypatch, name):
    """In the second checkpoint, which leaves the first, or in the first best.pt, which is written after the resume."""
    opened, stopped = [], []

    class File(io.FileIO):
        def write(self, data) -> int:
            written = super().write(data)
            if not stopped and [path.stem for path, _ in opened].count(name) == (2 if name == "checkpoint" else 1):
                stopped.append(len(opened))
                signal.raise_signal(signal.SIGTERM)
            return written

    monkeypatch.setattr(meow, "open", lambda *args: opened.append(args) or File(*args), raising=False)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        meow.train(meow.parse_args(flags(MEOW, total_timesteps=200, checkpoint_frequency=50, eval_frequency=150)))
    folder = folder_of(tmp_path)
    assert stop.value.code == 143 and len(opened) == stopped[0] + 1 and not (folder / "best.pt").exists()
    assert step_of(MEOW, tmp_path) == (50 if name == "checkpoint" else 150)
    meow.train(meow.parse_args(["--resume", str(folder), "--device=cpu", "--compile=off"]))
    assert meow.load_checkpoint(folder / "best.pt")["run"][0] in (150, 200)
    assert [step for step, _ in scalars(folder)["eval/episodic_return"]] == [150, 200]


@pytest.mark.parametrize("script", SCRIPTS)
def test_killed_again_and_again_at_random_moments(tmp_path, script):
    """Half of the times within a checkpoint, of which there is one every other step. One loads at every moment."""
    cwd, rng, kills, reached, within = tmp_path / "x", random.Random(script), 10 if script == MEOW else 2, 0, 0
    argv = flags(script, total_timesteps=10_000, checkpoint_frequency=2, eval_frequency=150)

    def stepping(n: int) -> bool:
        return steps_of(cwd) > n

    def writing() -> list[Path]:
        return list(cwd.glob("runs/*/*.tmp"))

    for k in range(kills):
        life = Life(script, *argv, cwd=cwd)
        life.until(functools.partial(stepping, steps_of(cwd) + rng.randrange(120 // kills, 400 // kills)))
        kept = keep_rows(cwd)
        time.sleep(rng.uniform(0, 0.01))
        if k % 2:
            life.until(writing)
        assert life.signal(signal.SIGKILL).wait().code == -9, life.err
        within += bool(writing())
        step, argv = step_of(script, cwd), ["--resume", folder_of(cwd)]
        assert step >= reached
        reached = step
    assert reached > 100 and within
    total = max(reached + 100, 250)
    run(script, *argv, f"--total-timesteps={total}", "--checkpoint-frequency=1000", cwd=cwd)
    check_finished(script, cwd, kept, total, 100, 150)


# Losses that are not finite


@pytest.mark.parametrize("script", SCRIPTS)
def test_loss_that_is_not_finite_stops_the_run(tmp_path, script):
    rate = "q_lr" if hasattr(MODULES[script].Args(), "q_lr") else "learning_rate"
    more = dict(total_timesteps=400, checkpoint_frequency=50) | {rate: 1e30}
    life = run(script, *flags(script, **more), cwd=tmp_path / "x", code=1)
    assert re.search("^error: .*not finite at step", life.err, re.M), life.err
    assert (folder_of(tmp_path / "x") / "failed.pt").exists() and step_of(script, tmp_path / "x") == 100
    agent, _ = MODULES[script].load_agent(folder_of(tmp_path / "x") / "checkpoint.pt")
    assert all(p.isfinite().all() for p in agent.parameters())


# Checkpoints that are damaged, foreign or hostile


class Crafted:
    """Pickled, a call of a function."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def content_of(value: object, as_zip: bool = True) -> bytes:
    torch.save(value, content := io.BytesIO(), _use_new_zipfile_serialization=as_zip)
    return content.getvalue()


def swap_pickle(content: bytes, pickled: bytes) -> bytes:
    """A torch file whose data.pkl is another."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return out.getvalue()


def small_checkpoint(module) -> dict:
    """As a run's, with little in it."""
    args = vars(module.Args(env_id="tasks:Counting-v0", device="cpu"))
    state = dict(algorithm=module.__name__, args=args, sizes=(2, 1), run=(120, 0.0, {}))
    return state | dict(agent=dict(weight=torch.arange(64.0), bias=torch.ones(3)))


@pytest.mark.parametrize("script", SCRIPTS)
def test_foreign_checkpoints_are_refused_in_one_line_and_nothing_is_executed(tmp_path, script):
    good, mark, path = small_checkpoint(MODULES[script]), tmp_path / "mark", tmp_path / "checkpoint.pt"
    content, crafted = content_of(good), Crafted(os.system, f"touch {mark}")
    other = dict(algorithm=OTHERS[script == OTHERS[0]].removesuffix(".py"))
    bad = dict(empty=b"", truncated=content[: len(content) // 2], text=b"not a checkpoint")
    bad |= dict(foreign=content_of({"a": 1}), list=content_of([good]), other=content_of(good | other))
    bad |= dict(weights=content_of(good["agent"]), version=content_of(good | dict(args=good["args"] | dict(new=1))))
    bad |= dict(executes=content_of(crafted), pickle=pickle.dumps(crafted), deep=content_of(good | dict(agent=crafted)))
    bad |= dict(old=content_of(good | dict(agent=crafted), as_zip=False))
    bad |= dict(swapped=swap_pickle(content, pickle.dumps(crafted, 2)))
    for name, value in bad.items():
        path.write_bytes(value)
        for flag, value in (("--evaluate", path), ("--resume", tmp_path)):
            with pytest.raises(SystemExit, match="^error: .*checkpoint"):
                MODULES[script].parse_args([flag, str(value)])
        if script == MEOW and name in ("truncated", "other", "deep"):
            refused(script, "--evaluate", path, cwd=tmp_path / "x", message="checkpoint.pt")
    assert not mark.exists()
    path.write_bytes(content)
    refused(script, "--resume", tmp_path, cwd=tmp_path / "x", message="buffer.bin")
    assert not list((tmp_path / "x").iterdir())


def test_fuzzed_checkpoints_are_refused_or_plain_values(tmp_path):
    content, path, rng, refusals = content_of(small_checkpoint(meow)), tmp_path / "checkpoint.pt", random.Random(0), 0
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 8, 64])):
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert isinstance(meow.load_checkpoint(path), dict)
        except SystemExit as e:
            refusals += str(e).startswith("error: ")
    assert refusals > 50
