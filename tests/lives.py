"""Runs of the scripts, forked from a process that has imported everything: one costs 0.2 s to start, not 5 s."""

import contextlib
import faulthandler
import functools
import io
import json
import multiprocessing
import os
import resource
import runpy
import signal
import sys
import time
import traceback
from multiprocessing import forkserver
from pathlib import Path

import gymnasium.envs.classic_control.pendulum
import gymnasium.envs.mujoco.hopper_v4  # noqa: F401
import torch._dynamo  # noqa: F401

import meow_continuous_action  # noqa: F401, for what it imports; each life runs its script anew
import multigoal  # noqa: F401
import tasks  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def serve() -> None:
    """Start the process that forks; it ends with this one."""
    before = dict(os.environ)
    os.environ |= dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
    CONTEXT.set_forkserver_preload(["lives"])
    forkserver.ensure_running()
    os.environ.clear()
    os.environ.update(before)


def perform(script: str, flags: list[str]) -> None:
    multiprocessing.set_start_method("fork", force=True)  # what a process of its own begins with
    sys.argv = [str(ROOT / script), *flags]
    runpy.run_path(sys.argv[0], run_name="__main__")


def live(script: str, flags: list[str], cwd: Path, log: Path, env: dict[str, str]) -> None:
    os.setsid()  # the group that Ctrl-C reaches: the run and the processes it starts
    os.chdir(cwd)
    os.environ |= env
    for fd, suffix in ((1, ".out"), (2, ".err")):
        os.dup2(os.open(log.with_suffix(suffix), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    try:
        perform(script, flags)
    finally:
        sys.stdout.flush()


class Life:
    """A run of a script: `process`, and once it has ended its exit `code`, -9 if killed, what it wrote, `out`, `err`.

    Started in another second than the life before: event files are ordered by the second in their names.
    """

    started = 0.0

    def __init__(self, script: str, *flags, cwd: Path, **env: str):
        serve()
        time.sleep(max(0.0, int(Life.started) + 1 - time.time()))
        Life.started = self.started = time.time()
        self.log = cwd.parent / f"{cwd.name}-{time.time_ns()}"
        self.process = CONTEXT.Process(target=live, args=(script, [*map(str, flags)], cwd, self.log, env))
        self.process.start()

    def signal(self, number: int, group: bool = False) -> "Life":
        (os.killpg if group else os.kill)(self.process.pid, number)
        return self

    def wait(self, timeout: float = 120) -> "Life":
        self.process.join(timeout)
        if hangs := self.process.exitcode is None:
            self.signal(signal.SIGKILL, group=True)
            self.process.join()
        self.out, self.err = (self.log.with_suffix(suffix).read_text() for suffix in (".out", ".err"))
        assert not hangs, f"still there after {timeout} s: {self.out}{self.err}"
        self.code = self.process.exitcode
        return self


def until(condition, life: Life | None = None, timeout: float = 60):
    """Wait for the condition, while the life goes on, and return its value."""
    end = time.time() + timeout
    while not (value := condition()):
        assert time.time() < end and (life is None or life.process.is_alive()), (life and life.wait().err, condition)
        time.sleep(0.002)
    return value


def attempts(script: str, cases: list[tuple[list[str], Path, int]], path: Path) -> None:
    """Try flags, in a folder, with a limit on the size of files (-1: none), one after the other in this process.

    Writes a list of exit code, standard output and standard error as JSON.
    """
    faulthandler.dump_traceback_later(240, exit=True)
    seen = []
    for flags, cwd, max_bytes in cases:
        os.chdir(cwd)
        out, err, code = io.StringIO(), io.StringIO(), 0
        resource.setrlimit(resource.RLIMIT_FSIZE, (max_bytes, resource.RLIM_INFINITY))
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                perform(script, flags)
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
        seen.append((code, out.getvalue(), err.getvalue()))
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    path.write_text(json.dumps(seen))
    os._exit(0)  # without waiting for the threads of runs that failed


def attempt(script: str, cases: list[tuple[list[str], Path, int]], path: Path) -> list[tuple[int, str, str]]:
    """`attempts` in a life of its own."""
    serve()
    process = CONTEXT.Process(target=attempts, args=(script, cases, path))
    process.start()
    process.join(300)
    process.kill()
    return json.loads(path.read_text())
