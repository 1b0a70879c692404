"""The scripts, and runs of them as a user starts them.

They are forked from a process that has imported everything: one costs 0.3 s to start, not 4 s.
"""

import functools
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
import time
from multiprocessing import forkserver
from pathlib import Path

import gymnasium.envs.classic_control.pendulum  # noqa: F401
import numpy as np
import torch._dynamo  # noqa: F401
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import tasks  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*_continuous_action.py"))
MODULES = {script: importlib.import_module(script.removesuffix(".py")) for script in SCRIPTS}
SHORT = dict(env_id="tasks:Counting-v0", learning_starts=100, batch_size=32, buffer_size=10_000, eval_episodes=2)
SHORT |= dict(utd=0.1, device="cpu", compile="off", svgd_particles=2, svgd_steps=1, particles=4, value_samples=4)
CONTEXT = multiprocessing.get_context("forkserver")


def flags(script: str, **more) -> list[str]:
    """Of a short run."""
    known = {name: value for name, value in SHORT.items() if hasattr(MODULES[script].Args, name)} | more
    named = {name.replace("_", "-"): value for name, value in known.items()}
    switches = {True: "--{}", False: "--no-{}"}
    return [switches[x].format(n) if isinstance(x, bool) else f"--{n}={x}" for n, x in named.items()]


def perform(script: str, argv: list[str], cwd: Path, log: str, env: dict[str, str]) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ |= env
    for fd, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(f"{log}{suffix}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    sys.argv = [str(ROOT / script), *argv]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        sys.stdout.flush()


@functools.cache
def serve() -> None:
    """Start the process that forks; it ends with this one."""
    before = dict(os.environ)
    os.environ |= dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    CONTEXT.set_forkserver_preload(["lives"])
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


class Life:
    """A run of a script: `process`, and once it has ended its exit `code`, -9 if killed, and what it wrote."""

    def __init__(self, script: str, *argv, cwd: Path, **env: str):
        serve()
        if "--resume" in argv:
            time.sleep(1 - time.time() % 1)  # event files are ordered by the second in their names
        cwd.mkdir(exist_ok=True)
        self.log = f"{cwd}-{time.time_ns()}"
        self.process = CONTEXT.Process(target=perform, args=(script, [*map(str, argv)], cwd, self.log, env))
        self.process.start()

    def signal(self, number: int) -> "Life":
        os.kill(self.process.pid, number)
        return self

    def wait(self, timeout: float = 120) -> "Life":
        self.process.join(timeout)
        self.code = self.process.exitcode
        if self.code is None:
            self.signal(signal.SIGKILL).process.join()
        self.out, self.err = (Path(f"{self.log}{suffix}").read_text() for suffix in (".out", ".err"))
        assert self.code is not None, f"still there after {timeout} s: {self.out}{self.err}"
        return self

    def until(self, condition, timeout: float = 60):
        """Wait for the condition, while the life goes on, and return its value."""
        end = time.time() + timeout
        while not (value := condition()):
            assert time.time() < end and self.process.is_alive(), (self.wait(1).err, condition)
            time.sleep(0.002)
        return value


def run(script: str, *argv, cwd: Path, code: int = 0, **env: str) -> Life:
    """A life to its end, which is this exit code."""
    life = Life(script, *argv, cwd=cwd, **env).wait()
    assert life.code == code, life.out + life.err
    return life


def refused(script: str, *argv, cwd: Path, message: str) -> None:
    """The script ends with one line for the user, and with a failure."""
    life = run(script, *argv, cwd=cwd, code=1)
    line = life.err.strip().splitlines()[-1]
    assert line.startswith("error: ") and message in line and "Traceback" not in life.err, life.err


def folder_of(cwd: Path) -> Path:
    """The folder of the only run there."""
    (folder,) = cwd.glob("runs/*")
    return folder


def rows_of(path: Path) -> np.ndarray:
    """The transitions of Counting in a buffer.bin so far: episode, step, action, reward, episode', step', d."""
    rows = np.fromfile(path, np.float32).reshape(-1, 7) if path.exists() else np.zeros((0, 7))
    return rows[rows.any(1)]


def steps_of(cwd: Path) -> int:
    return sum(len(rows_of(path)) for path in cwd.glob("runs/*/buffer.bin"))


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def check_rows(rows: np.ndarray) -> None:
    """Each transition of Counting is one of an episode, with the true next_obs, and d = 1 where it terminates."""
    episode, step, _, reward, next_episode, next_step, d = rows.T
    assert (episode == next_episode).all() and (next_step == step + 1).all() and (reward == next_step).all()
    assert (d == ((episode % 2 == 1) & (next_step == 3))).all() and (next_step[episode % 2 == 1] <= 3).all()
    assert (next_step <= 5).all() and d.any() and (next_step == 5).any()
