"""What goes wrong: bad input, kill -9, Ctrl-C, damaged files, environments that die.

docs/bad-inputs.md is what test_bad_inputs saw; `python tests/test_faults.py`, with PYTHONPATH=.:tests, writes it anew.
"""

import dataclasses
import errno
import io
import json
import os
import pickle
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from lives import Life, attempt, until
from test_scripts import MODULES, QUICK, ROOT, SCRIPTS, meow, run, s2ac, sac, scalars, short_flags, sql

PENDULUM = dict(env_id="Pendulum-v1", eval_frequency=500, compile="off")


def flags_of(script: str, **more) -> list[str]:
    return short_flags(**{**PENDULUM, **QUICK.get(MODULES[script], {}), **more})


def folder_of(cwd: Path, pattern: str = "*") -> Path:
    (folder,) = cwd.glob(f"runs/{pattern}")
    return folder


def make_run(script: str, cwd: Path, steps: int, stop_at: int | None = None, **more) -> Path:
    """The folder of a run that is finished, or was stopped at the first end of an episode after a step."""
    cwd.mkdir(exist_ok=True)
    life = Life(script, *flags_of(script, total_timesteps=steps, **more), cwd=cwd)
    if stop_at is not None:
        until(lambda: steps_of(cwd) >= stop_at, life)
        life.signal(signal.SIGINT)
    assert life.wait().code == (0 if stop_at is None else 130), life.err
    return folder_of(cwd)


def steps_of(cwd: Path, pattern: str = "*") -> int:
    """How many rows of the replay buffer have been written."""
    buffers = list(cwd.glob(f"runs/{pattern}/buffer.bin"))
    if not buffers or not (args := buffers[0].with_name("args.json")).exists():
        return 0
    args, rows = json.loads(args.read_text())["args"], np.fromfile(buffers[0], np.float32)
    capacity = min(args["buffer_size"], args["total_timesteps"] + args["num_envs"])
    return np.count_nonzero(rows[: rows.size // capacity * capacity].reshape(capacity, -1).any(1))


def same(a, b) -> bool:
    """Equal, bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def flip(path: Path, position: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(position * len(content))] ^= 1
    path.write_bytes(content)


# Bad input: each flag, and then each of the rest; tried with every script


INTS, FLOATS = ("-1", "0", "nan", "1.5"), ("-1", "0", "nan", "inf")
NUMBERS = dict.fromkeys(("num_envs", "total_timesteps", "batch_size", "eval_frequency", "eval_episodes"), INTS)
NUMBERS |= dict(num_seeds=(*INTS, "5000000000"), seed=("-1", "nan", "4294967296"), checkpoint_frequency=INTS)
NUMBERS |= dict.fromkeys(("gamma", "tau"), ("-0.1", "1.1", "nan", "inf"))
NUMBERS |= dict.fromkeys(("utd", "checkpoint_minutes"), FLOATS)
NUMBERS |= dict(learning_starts=("-1", "0", "nan"), buffer_size=("-1", "31", "nan"))
SIGMAS = dict(sigma_min=("10", "-21", "nan", "-inf"), sigma_max=("-20", "11", "nan", "inf"))
OWN = {
    meow: dict(
        components=("-1", "0", "nan"),
        dropout=("-0.1", "1", "nan"),
        max_grad_norm=FLOATS,
        learning_rate=FLOATS,
        alpha=FLOATS,
    )
    | SIGMAS,
    sac: dict(policy_lr=FLOATS, q_lr=FLOATS, policy_frequency=INTS, alpha=FLOATS),
    sql: dict(value_samples=INTS, particles=INTS, learning_rate=FLOATS, alpha=FLOATS),
    s2ac: dict(svgd_particles=("-1", "1", "nan"), svgd_steps=("-1", "nan"), svgd_step_size=FLOATS, initial_std=FLOATS)
    | dict(learning_rate=FLOATS, alpha=FLOATS)
    | SIGMAS,
}
TASKS = [
    "Hoper-v4",
    "Hopper-v99",
    "Hopper-v2",
    "nowhere:Task-v0",
    "tasks:Absent-v0",
    ":Task-v0",
    "a b",
    "",
    "CartPole-v1",
]
TASKS += [f"tasks:{name}-v0" for name in ("Dict", "Image", "Discrete", "Unbounded")]
FAULTS = ["NaNObs", "InfObs", "NaNReward", "BadStep", "BadReset", "BadLaterReset"]
WORDS = ["--gama=0.9", "--device=gpu", "--compile=maybe", "--seed=one", "--seed", "--track=1", "Hopper-v4"]


def bad_inputs(script: str, folder: Path) -> list[tuple[str, list[str], int, Path, int]]:
    """(what is tried, flags, exit code expected, folder to try it in, limit on the size of a file)."""
    module, cases = MODULES[script], []

    def case(what: str, *flags, code: int = 2, cwd: Path = folder, max_bytes: int = -1) -> None:
        cases.append((what, [*map(str, flags)], code, cwd, max_bytes))

    numbers = NUMBERS | OWN[module]
    kinds = {field.name for field in dataclasses.fields(module.Args) if re.search("int|float", str(field.type))}
    assert kinds <= set(numbers)
    for name, values in ((name, numbers[name]) for name in numbers if name in kinds):
        for value in values:
            case(flag := f"--{name.replace('_', '-')}={value}", flag)
    for flags in [f"--env-id={task}" for task in TASKS] + WORDS + ["--num-envs=5001"]:
        case(flags, flags)
    case("--track with --num-seeds=2", "--track", "--num-seeds=2")
    if not torch.cuda.is_available():
        case("--device=cuda, no GPU", "--device=cuda")
    case("replay buffer larger than the memory", f"--buffer-size={10**13}", f"--total-timesteps={10**13}")
    case("video of a task that cannot draw", "--env-id=tasks:NoScreen-v0", "--capture-video")
    short = flags_of(script, total_timesteps=600)
    rate = "--q-lr=1e30" if module is sac else "--learning-rate=1e30"
    case(f"{rate}: the loss is not finite", *short, rate, code=1)
    for fault in FAULTS:
        case(f"--env-id=tasks:{fault}-v0", *short, f"--env-id=tasks:{fault}-v0", "--learning-starts=600", code=1)
        case(f"the same with --num-envs=3: {fault}", *cases[-1][1], "--num-envs=3", "--seed=3", code=1)

    # Files. `stopped` is a run that can be resumed, `done` one that is finished; the rest are damaged copies
    done, stopped = make_run(script, folder / "a", 120), make_run(script, folder / "b", 10**6, stop_at=20)
    path, good = stopped / "checkpoint.pt", torch.load(stopped / "checkpoint.pt", weights_only=True)
    content = path.read_bytes()
    (folder / "empty").mkdir()
    other = next(name for name in SCRIPTS if name != script).removesuffix(".py")
    damaged = dict(zero_length=b"", truncated=content[: len(content) // 2], text=b"not a checkpoint\n")
    damaged |= dict(bit_flipped=content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    for name, value in dict(
        foreign={"model": 1},
        list=[1, 2],
        other_algorithm=good | dict(algorithm=other),
        other_version=good | dict(args=good["args"] | dict(new_flag=1)),
        wrong_type=good | dict(global_step="many"),
        no_run={key: good[key] for key in good if key != "run"},
        other_shapes=good | dict(agent={name: x[..., None] for name, x in good["agent"].items()}),
    ).items():
        torch.save(value, buffer := io.BytesIO())
        damaged[name] = buffer.getvalue()
    for name, value in damaged.items():
        copy = folder / name
        shutil.copytree(stopped, copy)
        copy.joinpath("checkpoint.pt").write_bytes(value)
        copy.joinpath("previous-checkpoint.pt").unlink()
        if name != "bit_flipped":
            copy.joinpath("checksums.json").unlink()
        case(f"--evaluate, checkpoint.pt: {name}", "--evaluate", f"{name}/checkpoint.pt")
        case(f"--resume, checkpoint.pt: {name}", "--resume", name)
    cases = [c for c in cases if c[0] != "--evaluate, checkpoint.pt: no_run"]  # evaluation has no need of it
    case("--evaluate, no such file", "--evaluate=absent.pt")
    case("--evaluate, a folder", "--evaluate", stopped)
    case("--evaluate, another task", "--evaluate", path, "--env-id=tasks:Counting-v0")
    case("--evaluate with --resume", "--evaluate", path, "--resume", stopped)
    case("--resume, no such folder", "--resume=absent")
    case("--resume, a file", "--resume", path)
    case("--resume, folder without a checkpoint", "--resume=empty")
    case("--resume, a finished run", "--resume", done)
    for name, change in dict(
        without=lambda f: f.unlink(), half=lambda f: os.truncate(f, f.stat().st_size // 2), no=lambda f: f.mkdir()
    ).items():
        shutil.copytree(stopped, copy := folder / f"{name}-buffer")
        if name == "no":
            copy.joinpath("buffer.bin").unlink()
        change(copy / "buffer.bin")
        what = dict(without="without buffer.bin", half="buffer.bin truncated", no="buffer.bin is a folder")[name]
        case(f"--resume, {what}", "--resume", copy.name)
    for flag in ("--seed=2", "--gamma=0.5", "--total-timesteps=2000000", "--num-envs=2", "--env-id=Hopper-v4"):
        case(f"--resume with {flag}", "--resume", stopped, flag)
    case("name that is not UTF-8", *short, "--exp-name=" + os.fsdecode(b"a\xff"))
    case("name that is too long", *short, "--exp-name=" + 300 * "n")
    (folder / "file").mkdir()
    (folder / "file" / "runs").write_text("")
    case("runs is a file", *short, cwd=folder / "file")
    case(
        "disk full at the replay buffer",
        *short,
        "--buffer-size=100000",
        "--total-timesteps=100000",
        code=1,
        max_bytes=10**5,
    )
    case("disk full at a checkpoint", *short, "--seed=2", "--buffer-size=400", code=1, max_bytes=10**5)
    return cases


def line_of(err: str) -> str:
    """The error's line; of the flag parser's box, the sentences. What differs between machines and runs is masked."""
    if "error: " in err:
        line = err.rstrip().splitlines()[-1]
    else:
        line = " ".join(re.sub("-{9,}|[─-╿]", " ", err).split("For full helptext")[0].split())
    for pattern, mask in (
        (r"/tmp/[^ ]*?/(?=[ab]/runs/|\w+_continuous_action.py)", ""),
        (r"(a/|b/)?runs/[^/ ]*__\d{10}\b", "RUN"),
        (r"n{99,}", "n..."),
        (r"(\d+\.\d+ GB free|\d+\.\d+ GB are free)", "# GB free"),
        (r"at most \d+", "at most #"),
        (r"(?<==)-?(\d[\d.e+-]*|inf|nan)(?=,|\. )", "#"),
        (r"step \d+", "step #"),
        (r"\[\[.*?\]\]|(?<=rewards )\[.*?\]", "[...]"),
        (r"\w+_continuous_action.py has|by \w+_continuous_action", "by OTHER"),
    ):
        line = re.sub(pattern, mask, line)
    return line.encode("utf-8", "backslashreplace").decode()


def try_bad_inputs(script: str, folder: Path) -> tuple[list[tuple[str, int, str]], list[str]]:
    """(what was tried, exit code, message) of each, and what is wrong."""
    cases, rows, wrong = bad_inputs(script, folder), [], []
    answers = attempt(script, [(flags, cwd, limit) for _, flags, _, cwd, limit in cases], folder / "answers.json")
    for (what, _, expected, *_), (code, _, err) in zip(cases, answers, strict=True):
        rows.append((what, code, line_of(err).replace(script, "SCRIPT").replace(script[:-3], "SCRIPT")))
        flag = re.match(r"--([\w-]+)=", what) if expected == 2 else None
        parsed = "error: " not in err and "helptext" in err
        ok = parsed or (err.count("error: ") == 1 and err.rstrip().splitlines()[-1].startswith("error: "))
        if (
            code != expected
            or not ok
            or "Traceback" in err
            or (flag and not parsed and flag[1] not in err.replace("_", "-"))
        ):
            wrong.append(f"{what}: exit code {code}\n{err[-1000:]}")
    return rows, wrong


@pytest.mark.parametrize("script", SCRIPTS)
def test_bad_inputs(script, tmp_path):
    rows, wrong = try_bad_inputs(script, tmp_path)
    assert len({what for what, *_ in rows}) >= 40
    assert not wrong, f"{len(wrong)}:\n" + "\n".join(wrong)
    name, documented = script.split("_")[0], (ROOT / "docs" / "bad-inputs.md").read_text().splitlines()
    table = [row.split(" | ") for row in documented if row.startswith("| `")]
    found = [row for row in table if row[1] == "all" or name in row[1].split(", ")]
    expected = [row_of(*row, scripts="").split(" | ") for row in rows]
    assert sorted([what, *rest] for what, _, *rest in found) == sorted([what, *rest] for what, _, *rest in expected)


def row_of(what: str, code: int, line: str, scripts: str) -> str:
    return f"| `{what}` | {scripts} | {code} | {line.replace('|', '/')} |"


def write_bad_inputs() -> None:
    seen = {}
    for script in SCRIPTS:
        with tempfile.TemporaryDirectory() as folder:
            for row in try_bad_inputs(script, Path(folder))[0]:
                seen.setdefault(row, []).append(script.split("_")[0])
    head = (
        "# Bad inputs\n\nWhat each script answers, in one line. Written by tests/test_faults.py, which says how. Exit "
    )
    head += "code 2: a mistake of\nthe user's; 1: a failure. `#`, `[...]`, `RUN`: what differs from run to run.\n\n"
    head += "| tried | scripts | exit code | message |\n|-|-|-|-|\n"
    rows = [
        row_of(*row, scripts="all" if len(names) == len(SCRIPTS) else ", ".join(names)) for row, names in seen.items()
    ]
    (ROOT / "docs" / "bad-inputs.md").write_text(head + "\n".join(rows) + "\n")


def test_debug_shows_where(tmp_path):
    done = run("--env-id=Hoper-v4", "--debug", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr and "in make_env" in done.stderr


# Kills


@pytest.mark.parametrize("script, kills", [(script, 20 if script == SCRIPTS[0] else 4) for script in SCRIPTS])
def test_killed_at_any_moment_nothing_is_lost_or_twice(tmp_path, script, kills):
    """Every other kill is aimed at a checkpoint, of which there is one at every other step."""
    cwd, rng, total, reached, within = tmp_path / "x", random.Random(script), 200 + 50 * kills, 0, 0
    cwd.mkdir()
    life = Life(script, *flags_of(script, total_timesteps=total, checkpoint_frequency=2), cwd=cwd)
    until(lambda: list(cwd.glob("runs/*/checkpoint.pt")), life)
    run_dir = folder_of(cwd)

    def writing() -> bool:
        try:
            return any(path.stat().st_mtime > life.started for path in run_dir.glob("*.tmp"))
        except FileNotFoundError:  # renamed in between
            return False

    for i in range(kills):
        time.sleep(rng.uniform(0.1, 1) * (1 - reached / total))
        if i % 2:
            until(writing, life)
        assert life.signal(signal.SIGKILL).wait().code == -9, life.err
        within += writing()
        checkpoint, _ = MODULES[script].latest_checkpoint(run_dir)
        assert checkpoint["global_step"] >= reached
        reached = checkpoint["global_step"]
        life = Life(script, "--resume", run_dir, cwd=cwd)
    assert life.wait().code == 0, life.err
    assert within >= kills // 4
    end = MODULES[script].load_checkpoint(run_dir / "checkpoint.pt")
    assert (end["global_step"], end["run"]["size"], end["run"]["updates"]) == (total, total, total - 100)
    for tag, points in scalars(run_dir).items():
        steps = [step for step, _ in points]
        if tag.startswith(("losses/", "policy/", "charts/SPS")):
            assert steps == list(range(200, total + 1, 100)), tag
        elif tag.startswith("eval/"):
            assert steps == sorted({*range(500, total + 1, 500), total}), tag
        else:
            assert steps and steps == sorted(set(steps)), tag


def small_checkpoint(module, step: int) -> dict:
    """As a run's, with little in it."""
    agent = dict(weight=torch.arange(64.0), bias=torch.ones(3))
    checkpoint = dict(algorithm=module.__name__, args=dataclasses.asdict(module.Args()), agent=agent, global_step=step)
    return checkpoint | dict(
        obs_dim=3, action_dim=1, best_return=0.5, run=dict(updates=0, rng=torch.arange(9)), target={}
    )


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("kill_at", [1, 2, 3])
@pytest.mark.parametrize("damaged", [False, True])
def test_killed_again_and_again_within_a_checkpoint(tmp_path, script, kill_at, damaged):
    """At each of the renames that writing one makes; there is always a state to go on from."""
    module, path, replace, calls = MODULES[script], tmp_path / "checkpoint.pt", os.replace, []
    for step in range(3):
        module.save_checkpoint(path, small_checkpoint(module, step))
    if damaged:
        flip(path)

    def dying_replace(*paths):
        calls.append(paths)
        os._exit(9) if len(calls) == kill_at else replace(*paths)

    for step in range(3, 8):
        if (child := os.fork()) == 0:
            os.replace = dying_replace
            module.save_checkpoint(path, small_checkpoint(module, step))
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) in (0, 9)
        assert module.latest_checkpoint(tmp_path)[0]["global_step"] >= 1


# Clean stops


BOTH = (signal.SIGINT, signal.SIGTERM)
STOPS = [(script, "Pendulum-v1", number) for script, number in zip(SCRIPTS, 2 * BOTH, strict=True)]


@pytest.mark.parametrize("script, env_id, number", [*STOPS, (SCRIPTS[0], "Hopper-v4", signal.SIGINT)])
def test_stopped_and_resumed_is_the_same_run(tmp_path, script, env_id, number):
    cwd, steps = tmp_path / "x", 1350 if MODULES[script] is meow else 600
    whole = make_run(script, cwd, steps, env_id=env_id, exp_name="whole")
    life = Life(script, *flags_of(script, total_timesteps=steps, env_id=env_id, exp_name="stopped"), cwd=cwd)
    until(lambda: steps_of(cwd, "*__stopped__*") >= 110, life)
    assert life.signal(number).wait().code == 128 + number, life.err
    stopped_at, command = re.search(r"stopped at step (\d+); go on with: python (.*)", life.out).groups()
    assert 110 <= int(stopped_at) <= 400 and shlex.split(command)[0] == str(ROOT / script)  # MEow: 1,000 updates to go
    life = Life(script, *shlex.split(command)[1:], cwd=cwd).wait()
    assert life.code == 0, life.err
    stopped = folder_of(cwd, "*__stopped__*")
    a, b = (MODULES[script].load_checkpoint(folder / "checkpoint.pt") for folder in (whole, stopped))
    a["run"]["elapsed"] = b["run"]["elapsed"]
    assert all(same(a[key], b[key]) for key in a.keys() - {"args"}) and b["run"]["updates"] == steps - 100
    logs = [scalars(folder) for folder in (whole, stopped)]
    sps = [[step for step, _ in log.pop("charts/SPS")] for log in logs]
    assert logs[0] == logs[1] and sps[0] == sps[1] and len(logs[0]["losses/qf_loss"]) == (steps - 1) // 100


def test_command_that_a_stop_prints(tmp_path):
    """In processes of their own; --evaluate replays what a resumed run saved."""
    env = os.environ | dict(OMP_NUM_THREADS="1")
    command = [sys.executable, str(ROOT / SCRIPTS[0]), *flags_of(SCRIPTS[0], total_timesteps=10**6)]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True)
    until(lambda: steps_of(tmp_path) >= 10)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    printed = shlex.split(out.split("go on with: ")[1])
    step = meow.load_checkpoint(folder_of(tmp_path) / "checkpoint.pt")["global_step"]
    process = subprocess.Popen([sys.executable, *printed[1:]], cwd=tmp_path, env=env)
    until(lambda: steps_of(tmp_path) >= step + 10)
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    path = folder_of(tmp_path) / "checkpoint.pt"
    assert meow.load_checkpoint(path)["global_step"] > step
    replayed = Life(SCRIPTS[0], "--evaluate", path, cwd=tmp_path).wait()
    assert replayed.code == 0 and "2 episodes: return" in replayed.out, replayed.err


def test_many_seeds_stopped_and_each_resumed(tmp_path):
    cwd = tmp_path / "x"
    cwd.mkdir()
    life = Life(SCRIPTS[0], *flags_of(SCRIPTS[0], total_timesteps=600, num_seeds=2), cwd=cwd)
    until(lambda: min(steps_of(cwd, f"*__{seed}__*") for seed in (1, 2)) >= 150, life)
    assert life.signal(signal.SIGINT).wait().code == 130
    commands = re.findall(r"stopped at step (\d+); go on with: python \S+ (.*)", life.out)
    assert len(commands) == 2 and commands[0][0] == commands[1][0] and int(commands[0][0]) < 600
    for seed, (_, flags) in enumerate(commands, 1):
        assert Life(SCRIPTS[0], *shlex.split(flags), cwd=cwd).wait().code == 0
        folder = folder_of(cwd, f"*__{seed}__*")
        end = meow.load_checkpoint(folder / "checkpoint.pt")
        assert (end["global_step"], end["args"]["seed"], end["run"]["updates"]) == (600, seed, 500)
        assert [step for step, _ in scalars(folder)["losses/qf_loss"]] == list(range(200, 601, 100))


@pytest.mark.parametrize("script", SCRIPTS)
def test_run_that_is_not_over_is_not_resumed(tmp_path, script):
    """--resume beside the process that is at it, as after a Ctrl-C that it still acts on: refused, nothing written."""
    (cwd := tmp_path / "x").mkdir()
    life = Life(script, *flags_of(script, total_timesteps=10**6), cwd=cwd)
    until(lambda: steps_of(cwd) >= 10, life)
    again = Life(script, "--resume", folder_of(cwd), cwd=cwd).wait()
    assert again.code == 2 and "another process goes on with it; expected it to have ended" in again.err, again.err
    assert not list(folder_of(cwd).glob("args-from-*")) and len(list(folder_of(cwd).glob("events*"))) == 1
    assert life.signal(signal.SIGKILL).wait().code == -9, life.err
    again = Life(script, "--resume", folder_of(cwd), cwd=cwd)
    until(lambda: list(folder_of(cwd).glob("args-from-*")), again)  # a process that is gone holds nothing
    again.signal(signal.SIGKILL).wait()


def test_run_that_another_process_went_on_with(tmp_path):
    """Between reading the checkpoint and the lock: refused, or the newer one would be written over."""
    meow.save_checkpoint(tmp_path / "checkpoint.pt", small_checkpoint(meow, 7))
    with pytest.raises(meow.UserError, match="another process went on with it; expected to be alone"):
        meow.start_run(meow.Args(resume=str(tmp_path)), small_checkpoint(meow, 5))
    assert not list(tmp_path.glob("*.json.tmp")) and not list(tmp_path.glob("args*"))


def test_video_of_a_resumed_run_fails_at_once(tmp_path):
    (cwd := tmp_path / "x").mkdir()
    life = Life(SCRIPTS[0], *flags_of(SCRIPTS[0], env_id="tasks:NoScreen-v0", total_timesteps=10**6), cwd=cwd)
    until(lambda: steps_of(cwd) >= 10, life)
    life.signal(signal.SIGKILL).wait()
    before = meow.load_checkpoint(folder_of(cwd) / "checkpoint.pt")["global_step"]
    again = Life(SCRIPTS[0], "--resume", folder_of(cwd), "--capture-video", cwd=cwd).wait()
    assert again.code == 2 and "tasks:NoScreen-v0 cannot draw here (no GL context)" in again.err
    assert meow.load_checkpoint(folder_of(cwd) / "checkpoint.pt")["global_step"] == before


def test_file_system_without_locks(tmp_path, monkeypatch, capsys):
    """As Lustre without its option flock: a warning, and the run goes on."""

    def flock(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(meow.fcntl, "flock", flock)
    meow.lock_run(tmp_path).close()
    assert f"warning: {tmp_path}: no lock (Function not implemented)" in capsys.readouterr().err


def test_many_environments_stopped_and_resumed(tmp_path):
    folder = make_run(SCRIPTS[0], cwd := tmp_path / "x", 900, stop_at=150, num_envs=3)
    stopped = meow.load_checkpoint(folder / "checkpoint.pt")
    assert Life(SCRIPTS[0], "--resume", folder, cwd=cwd).wait().code == 0
    end = meow.load_checkpoint(folder / "checkpoint.pt")
    assert stopped["global_step"] < 900 == end["global_step"] == end["run"]["size"]
    assert end["run"]["updates"] == 3 * 266 and len(stopped["run"]["episodes"]) == 3  # 102 steps before the first


# Checkpoints that are damaged or hostile


class Crafted:
    """Pickled, a call of a function, of many ways to leave a mark."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def hostile_pickles(mark: Path) -> list[bytes]:
    touch = f"touch {mark}"
    calls = [Crafted(os.system, touch), Crafted(subprocess.Popen, ["touch", str(mark)]), Crafted(Path.touch, mark)]
    calls += [Crafted(eval, f"open({str(mark)!r}, 'w')"), Crafted(exec, f"open({str(mark)!r}, 'w')")]
    calls += [Crafted(os.mkdir, str(mark)), Crafted(shutil.copy, __file__, str(mark)), Crafted(open, str(mark), "w")]
    good = dict(algorithm="meow_continuous_action", args=dataclasses.asdict(meow.Args()))
    found = []
    for call in calls:
        for value in (call, [call], {"algorithm": call}, good | {"agent": call}, good | {call.call[0].__name__: call}):
            found += [pickle.dumps(value, protocol) for protocol in (0, 2, 4)]
            for as_zip in (True, False):
                torch.save(value, content := io.BytesIO(), _use_new_zipfile_serialization=as_zip)
                found.append(content.getvalue())
    return found


def swap_pickle(content: bytes, pickled: bytes) -> bytes:
    """A torch file whose data.pkl is another."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as source, zipfile.ZipFile(out, "w") as target:
        for name in source.namelist():
            target.writestr(name, pickled if name.endswith("data.pkl") else source.read(name))
    return out.getvalue()


def damages(content: bytes, mark: Path, rng: random.Random) -> list[bytes]:
    found = hostile_pickles(mark)
    found += [swap_pickle(content, pickled) for pickled in found if not zipfile.is_zipfile(io.BytesIO(pickled))]
    found += [b"", b"\0" * 1000, b"PK\3\4", b"{}", b"\x80\x02}.", rng.randbytes(5000), Path(__file__).read_bytes()]
    found += [content[: rng.randrange(len(content))] for _ in range(100)]
    found += [content + rng.randbytes(100), content[100:], content * 2]
    for _ in range(900 - len(found) % 100):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 1, 1, 8, 64])):
            damaged[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        found.append(bytes(damaged))
    return found


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder like a run's: checkpoint.pt, previous-checkpoint.pt and checksums.json, small; and its steps 1 and 0."""
    folder = tmp_path_factory.mktemp("small")
    for step in (0, 1):
        meow.save_checkpoint(folder / "checkpoint.pt", small_checkpoint(meow, step))
    return folder


def test_fuzzed_checkpoints_are_refused_and_execute_nothing(small, tmp_path):
    """With checksums, what loads is what was saved. Without, as in a copy of one file, what loads is plain values."""
    path, rng, outcomes = small / "checkpoint.pt", random.Random(0), []
    content, mark = path.read_bytes(), tmp_path / "mark"
    good = [meow.load_checkpoint(small / name) for name in ("previous-checkpoint.pt", "checkpoint.pt")]
    alone, bare = tmp_path / "alone", tmp_path / "bare"  # without a previous one; without checksums either
    alone.mkdir(), bare.mkdir()
    shutil.copy(small / "checksums.json", alone)
    cases = damages(content, mark, rng)
    assert len(cases) >= 1000
    warnings.simplefilter("ignore")
    for damaged in cases:
        for folder in (small, alone, bare):
            (folder / "checkpoint.pt").write_bytes(damaged)
            try:
                checkpoint, problem = meow.latest_checkpoint(folder)
            except meow.UserError:
                outcomes.append((folder, "refused"))
                continue
            outcomes.append((folder, "fallback" if problem else "loaded"))
            if folder is small:
                assert problem and same(checkpoint, good[0]) and "goes on from previous-checkpoint.pt" in problem
            assert isinstance(checkpoint, dict) and checkpoint["algorithm"] == "meow_continuous_action"
        assert not mark.exists()
    path.write_bytes(content)
    assert same(meow.latest_checkpoint(small)[0], good[1])
    assert {o for f, o in outcomes if f is small} == {"fallback"} and {o for f, o in outcomes if f is alone} == {
        "refused"
    }
    assert {o for f, o in outcomes if f is bare} == {"refused", "loaded"}  # a bit of a weight


def test_fuzzed_checksums(small, tmp_path):
    """Damaged sums never let a damaged checkpoint pass for a good one, nor raise another error."""
    folder, rng = tmp_path / "x", random.Random(1)
    shutil.copytree(small, folder)
    text = (folder / "checksums.json").read_bytes()
    values = ["{}", "[]", "null", "", "1", '{"checkpoint.pt": 1}', '{"checkpoint.pt": [1]}', '{"checkpoint.pt": [{}]}']
    values += ['{"checkpoint.pt": {}}', '{"checkpoint.pt": 0}', '{"checkpoint.pt": null}', "[" * 10**5]
    values = [value.encode() for value in values] + [b"\xff\xfe", rng.randbytes(100)]
    values += [text[: rng.randrange(len(text))] for _ in range(50)]
    for _ in range(150):
        damaged = bytearray(text)
        damaged[rng.randrange(len(text))] ^= 1 << rng.randrange(8)
        values.append(bytes(damaged))
    good, seen = meow.load_checkpoint(folder / "checkpoint.pt"), set()
    for value in values:
        (folder / "checksums.json").write_bytes(value)
        try:
            checkpoint, problem = meow.latest_checkpoint(folder)
            seen.add("fallback" if problem else "loaded")
            assert same(checkpoint, good if not problem else good | dict(global_step=0))
            meow.save_checkpoint(tmp_path / "x" / "best.pt", good)  # which reads the sums, too
        except meow.UserError:
            seen.add("refused")
    assert seen == {"fallback", "loaded", "refused"}


HOSTILE = [None, -1, 2.5, float("nan"), "x", b"x", [], {}, {"x": 1}, (1,), torch.zeros(2), True]


@pytest.mark.parametrize("script", SCRIPTS)
def test_hostile_types_of_every_key(script, tmp_path):
    """A whole file of another making, without checksums: refused, or as good as the original."""
    module = MODULES[script]
    args = dataclasses.replace(module.Args(), env_id="Pendulum-v1", device="cpu", resume=str(tmp_path), compile="off")
    env = module.make_env(args.env_id)
    agent = module.Agent(env.observation_space.shape[0], env.action_space.shape[0], args)
    _, learner = module.make_update([agent], args)
    run_state = dict(updates=0, updates_due=0.0, position=0, size=0, rng=torch.Generator().get_state(), device="cpu")
    run_state |= dict(stats=[], episodes=[None], eval_return=0.0, episodic_return=0.0, elapsed=0.0)
    good = dict(algorithm=module.__name__, args=dataclasses.asdict(args), obs_dim=3, action_dim=1, global_step=0)
    good |= dict(best_return=0.0, run=run_state, agent=agent.state_dict()) | module.seed_state(learner, 0)
    wrong, count = [], 0
    cases = [(key, good | {key: value}) for key in good for value in HOSTILE if type(value) is not type(good[key])]
    cases += [(key, {k: v for k, v in good.items() if k != key}) for key in good]
    for key, checkpoint in cases:
        torch.save(checkpoint, tmp_path / "checkpoint.pt")
        count += 1
        try:
            module.parse_args(["--resume", str(tmp_path)]) if key == "args" else module.make_runs(args)
            module.load_agent(tmp_path / "checkpoint.pt")
        except module.UserError:
            continue
        except Exception as e:
            wrong.append(f"{key} {str(checkpoint.get(key))[:30]}: {type(e).__name__}: {str(e)[:90]}")
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong)


def test_damaged_checkpoint_goes_on_from_the_one_before(tmp_path):
    for script in SCRIPTS:
        folder = make_run(script, cwd := tmp_path / script, 220, stop_at=20)
        flip(folder / "checkpoint.pt")
        life = Life(script, "--resume", folder, cwd=cwd).wait()
        warning = (
            r"warning: \S*checkpoint.pt is not a readable checkpoint \(not as in checksums.json\); goes on from prev"
        )
        assert life.code == 0 and re.search(warning, life.err), life.err
        assert MODULES[script].load_checkpoint(folder / "checkpoint.pt")["global_step"] == 220


# Environments in processes of their own


def workers_of(life: Life) -> list[psutil.Process]:
    """The processes that the life has started and that are still there, whether it is or not."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == life.process.pid != process.pid and process.status() != "zombie":
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            pass
    return found


def begin_async(cwd: Path, **more) -> Life:
    cwd.mkdir()
    return Life(SCRIPTS[0], *flags_of(SCRIPTS[0], total_timesteps=900, num_envs=3, **more), "--async-envs", cwd=cwd)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_worker_that_is_killed_and_ctrl_c_to_the_whole_group(tmp_path, number):
    life = begin_async(cwd := tmp_path / "x")
    until(lambda: steps_of(cwd) >= 150, life)
    assert len(workers := workers_of(life)) == 3
    if number == signal.SIGKILL:
        workers[1].kill()
        assert life.wait(20).code == 1 and len(re.findall("^error: ", life.err, re.M)) == 1, life.err
        message = (
            r"^error: Pendulum-v1 failed in step: .*\(a process of --async-envs died, exit code -9\)\. The state at"
        )
        assert re.search(message, life.err, re.M) and "Traceback" not in life.err, life.err
    else:
        assert life.signal(number, group=True).wait(20).code == 130, life.err
        assert "Traceback" not in life.err
    until(lambda: not workers_of(life), timeout=5)
    step = meow.load_checkpoint(folder_of(cwd) / "checkpoint.pt")["global_step"]
    again = Life(SCRIPTS[0], "--resume", folder_of(cwd), cwd=cwd).wait()
    assert again.code == 0, again.err
    assert 150 <= step < 900 == meow.load_checkpoint(folder_of(cwd) / "checkpoint.pt")["global_step"]


@pytest.mark.parametrize("task, message", [("BadStep", "the joints have come apart"), ("BadReset", "no ground")])
def test_worker_whose_task_raises(tmp_path, task, message):
    life = begin_async(cwd := tmp_path / "x", env_id=f"tasks:{task}-v0")
    assert life.wait(20).code == 1, life.err
    until(lambda: not workers_of(life), timeout=5)
    assert re.search(rf"^error: .*RuntimeError: {message}", life.err, re.M), life.err
    assert "Traceback" not in life.err, life.err
    if task == "BadStep":  # a new task, that breaks as late
        step = meow.load_checkpoint(folder_of(cwd) / "checkpoint.pt")["global_step"]
        again = Life(SCRIPTS[0], "--resume", folder_of(cwd), cwd=cwd).wait()
        assert again.code == 1 and message in again.err
        assert meow.load_checkpoint(folder_of(cwd) / "checkpoint.pt")["global_step"] == 2 * step == 2 * 447


def test_workers_do_not_outlive_a_killed_run(tmp_path):
    life = begin_async(cwd := tmp_path / "x")
    until(lambda: steps_of(cwd) >= 10 and len(workers_of(life)) == 3, life)
    assert life.signal(signal.SIGKILL).wait().code == -9
    until(lambda: not workers_of(life), timeout=5)


# Secrets and paths


def test_key_in_the_environment_reaches_no_file(tmp_path):
    cwd, key = tmp_path / "x", "0123456789abcdef" * 2 + "secret01"
    cwd.mkdir()
    life = Life(SCRIPTS[0], *flags_of(SCRIPTS[0], total_timesteps=120), cwd=cwd, WANDB_API_KEY=key).wait()
    files = [path for path in cwd.rglob("*") if path.is_file()]
    assert life.code == 0 and len(files) >= 4 and key not in life.out + life.err
    assert not [path for path in files if key.encode() in path.read_bytes()]


@pytest.mark.parametrize("name", ["../../x", "a/b", "..", "a b", "ünï", "~", "-", "", "a\nb"])
def test_names_of_experiments_stay_within_runs(tmp_path, name):
    cwd = tmp_path / "x" / "y" / "z"
    cwd.mkdir(parents=True)
    life = Life(SCRIPTS[0], *flags_of(SCRIPTS[0], total_timesteps=100, eval_episodes=1), f"--exp-name={name}", cwd=cwd)
    assert life.wait().code == 0, life.err
    folder = folder_of(cwd)
    assert (folder / "checkpoint.pt").is_file() and [path.name for path in cwd.iterdir()] == ["runs"]
    logs = {life.log.with_suffix(suffix).name for suffix in (".out", ".err")}
    assert {path.name for path in cwd.parent.iterdir()} == {"z"} | logs
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["y"]
    assert scalars(folder)["eval/episodic_return"]


if __name__ == "__main__":
    write_bad_inputs()
