"""Grids: what crashes, is killed, interrupted or resumed, with a script that keeps the contracts and trains nothing;
and the scripts of Stable-Baselines3."""

import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stable_baselines3 import PPO

import meow_continuous_action as meow
import meow_mixture_continuous_action as mixture
import sac_continuous_action as sac
import sql_continuous_action as sql
from benchmark import UserError, report, run, scalars

ROOT = Path(__file__).resolve().parent.parent
FAKE = str(ROOT / "tests" / "fake_script.py")


def start(folder: Path, *flags: str, **env: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmark.run", str(folder), *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"} | env, **pipes)


def wait(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def cells(folder: Path) -> dict[str, dict]:
    return {cell["name"]: cell for cell in json.loads((folder / "grid.json").read_text())["cells"]}


def steps(folder: Path) -> dict[str, list[int]]:
    """Run folder's name -> the steps that it executed, in order."""
    return {p.parent.name: [int(x) for x in p.read_text().split()] for p in folder.glob("*/runs/*/steps.txt")}


def commands(folder: Path, name: str) -> list[str]:
    """What was run for a cell, by its log."""
    return re.findall(r"^# \S+ \S+ (.*)", (folder / name / "log.txt").read_text(), re.M)


def until(condition, seconds: float = 300.0) -> None:
    deadline = time.time() + seconds
    while not condition():
        assert time.time() < deadline
        time.sleep(0.05)


def settled(folder: Path) -> dict[str, list[int]]:
    """The steps once nothing trains on: Ray takes seconds to end the scripts of a grid that was killed."""
    before = None
    while (now := steps(folder)) != before:
        before = now
        time.sleep(1)
    return now


def test_a_crash_stops_nothing_else_and_is_reported(tmp_path):
    """Exit code 1; the crash is retried from its checkpoint, and --resume repeats neither what is done nor more than it
    has to."""
    flags = ["--scripts", FAKE, "--env-ids", "Crash-v0", "Mistake-v0", "Good-v0", "--seeds", "1", "2"]
    code, out, err = wait(start(tmp_path / "g", *flags, "--flags=--level 3"))
    assert code == 1, err
    grid = cells(tmp_path / "g")
    assert {name: cell["state"] for name, cell in grid.items()} == {
        f"fake_script__{task}-v0__seed{seed}": state
        for task, state in (("Crash", "failed"), ("Mistake", "failed"), ("Good", "done"))
        for seed in (1, 2)
    }
    crash, mistake, good = (f"fake_script__{task}-v0__seed2" for task in ("Crash", "Mistake", "Good"))
    first, second = commands(tmp_path / "g", crash)
    assert "--resume runs/" in second and "--resume" not in first and len(commands(tmp_path / "g", good)) == 1
    assert "--env-id Good-v0 --seed 2 --level 3" in commands(tmp_path / "g", good)[0]
    assert "the loss is not finite at step 60" in out and "error: no task Mistake-v0" in out
    before = steps(tmp_path / "g")
    (folder,) = run.run_folders(tmp_path / "g" / good)
    assert before[folder.name] == list(range(10, 101, 10))
    facts = json.loads((folder / "args.json").read_text())
    assert facts["machine"] == f"niceness {os.nice(0)}"  # no less than that of what else this machine does

    code, out, err = wait(start(tmp_path / "g", "--scripts", FAKE, "--env-ids", "Good-v0"))
    assert (code, out, err.count("\n")) == (2, "", 1) and "--resume" in err

    more = ["--resume", "--retries", "0", "--scripts", FAKE, "--env-ids", "Good-v0", "--seeds", "2", "3"]
    code, out, err = wait(start(tmp_path / "g", *more, "--flags=--level 3"))
    assert code == 1 and "to run: 5 runs" in out
    after = steps(tmp_path / "g")
    assert all(s[-1] == 100 or "Crash" in name for name, s in after.items()) and len(after) == 5
    assert after[folder.name] == before[folder.name]
    assert len(commands(tmp_path / "g", crash)) == 3
    assert [len(commands(tmp_path / "g", f"fake_script__Good-v0__seed{seed}")) for seed in (1, 2, 3)] == [1, 1, 1]


def test_killed_and_interrupted_grid_resumes(tmp_path):
    """SIGKILL, then Ctrl-C, then the end: every step of every seed is executed once, in one folder a seed."""
    folder = tmp_path / "g"
    flags = ["--scripts", FAKE, "--env-ids", "Good-v0", "--seeds", "1", "2", "3"]
    process = start(folder, *flags, "--flags=--total-timesteps 600 --seconds 0.1")
    until(lambda: any(len(s) > 5 for s in steps(folder).values()))
    process.kill()
    wait(process)
    killed = settled(folder)
    assert len(killed) < 3 and all(len(s) < 60 for s in killed.values())

    process = start(folder, "--resume")
    until(lambda: any(len(s) > len(killed.get(name, ())) + 5 for name, s in steps(folder).items()))
    process.send_signal(signal.SIGINT)
    code, out, err = wait(process)
    assert code == 130, err
    assert "interrupted" in {cell["state"] for cell in cells(folder).values()}
    stopped = steps(folder)
    time.sleep(0.5)
    assert stopped == steps(folder)  # nothing trains on

    code, out, err = wait(start(folder, "--resume"))
    assert code == 0, out + err
    assert sorted(steps(folder).values()) == [list(range(10, 601, 10))] * 3
    assert any("--resume runs/" in log.read_text() for log in folder.glob("*/log.txt"))  # whichever start resumed it
    code, out, err = wait(start(folder, "--resume"))
    assert code == 0 and "to run: 0 runs" in out


@pytest.fixture
def cell():
    return dict(name="c", script=FAKE, env_id="Good-v0", flags=["--total-timesteps", "50"], seed=4, state="waiting")


def longer(folder: Path, cell: dict) -> None:
    """The run was to have 80 steps, not 50."""
    (folder / "args.json").write_text((folder / "args.json").read_text().replace("50", "80"))
    cell["flags"] = ["--total-timesteps", "80"]


def test_cell_is_run_once_and_resumed_where_steps_are_left(tmp_path, cell):
    for _ in range(2):
        run.run_cell(tmp_path, cell, 1.0, 0.0)
        assert len(commands(tmp_path, "c")) == 1
    longer(run.run_folders(tmp_path / "c")[0], cell)
    run.run_cell(tmp_path, cell, 1.0, 0.0)
    assert "--resume runs/Good-v0__fake_script__4__" in (again := commands(tmp_path, "c")[1])
    assert again.endswith("--total-timesteps 80")  # with its flags: --device, say, is not kept by --resume alone
    assert list(steps(tmp_path).values()) == [list(range(10, 81, 10))]


def test_run_without_a_checkpoint_starts_anew(tmp_path, cell):
    run.run_cell(tmp_path, cell, 1.0, 0.0)
    (folder,) = run.run_folders(tmp_path / "c")
    longer(folder, cell)
    (folder / "checkpoint.pt").unlink()
    run.run_cell(tmp_path, cell, 1.0, 0.0)
    assert "--resume" not in commands(tmp_path, "c")[1]
    assert run.run_folders(tmp_path / "c") != [folder] and (tmp_path / "c" / "abandoned-1" / folder.name).is_dir()


def test_script_that_outlived_a_killed_grid_is_waited_for(tmp_path, cell):
    (tmp_path / "c").mkdir()
    with open(tmp_path / "c" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [*run.next_command(tmp_path / "c", cell), "--seconds", "0.1"]
        process = subprocess.Popen(command, cwd=tmp_path / "c", pass_fds=[lock.fileno()], stderr=subprocess.DEVNULL)
    run.run_cell(tmp_path, cell, 1.0, 0.0)
    assert process.wait() == 0 and commands(tmp_path, "c") == []
    assert list(steps(tmp_path).values()) == [[10, 20, 30, 40, 50]]


def test_one_grid_a_folder(tmp_path):
    with open(tmp_path / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another"):
            run.main(run.Args(tmp_path, scripts=(FAKE,), env_ids=("Good-v0",)))


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(), "nothing to run"),
        (dict(scripts=(FAKE,)), "--env-ids"),
        (dict(resume=True, flags="--tau 1"), "--flags"),
        (dict(scripts=("nothing",), env_ids=("A-v0",)), "nothing"),
        (dict(scripts=("sb3:dqn",), env_ids=("A-v0",)), "sb3:dqn"),
        (dict(preset="smoke", cpus=0), "--cpus"),
        (dict(preset="smoke", gpu_fraction=2), "--gpu-fraction"),
        (dict(preset="cpu", env_ids=("Hopper-v4",)), "sac_continuous_action__Hopper-v4__seed1"),
        (dict(preset="smoke", resume=True, seeds=(1,), flags="--tau 1"), "another flags"),
        (dict(scripts=("a/my.py", "b/my.py"), env_ids=("A-v0",)), "another script"),
    ],
)
def test_mistakes(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "my.py").touch()
    if "resume" in flags:
        run.save(tmp_path, run.grid(run.Args(tmp_path, "smoke")))
    with pytest.raises(UserError, match=re.escape(message)):
        run.main(run.Args(tmp_path, dry_run=True, **flags))


def test_presets_and_their_steps():
    """The numbers of steps are those of the scripts' own presets, and the scripts accept the flags."""
    modules = {module.__name__: module for module in (meow, mixture, sac, sql)}
    for module in modules.values():
        for env_id, total in run.STEPS.items():
            assert module.PRESETS[env_id]["total_timesteps"] == total
    paper = run.grid(run.Args(Path("g"), "paper-meow", flags="--alpha 1")).values()
    assert len(paper) == 25 and sum(map(run.steps, paper)) == 80_000_000
    assert all(cell["flags"] == ["--alpha", "1"] and "meow" in cell["script"] for cell in paper)
    for preset in run.PRESETS:
        for cell in run.grid(run.Args(Path("g"), preset)).values():
            if module := modules.get(Path(cell["script"]).stem):
                assert module.parse_args(["--env-id", cell["env_id"], *cell["flags"]]).env_id == cell["env_id"]


def test_cost_and_mps(tmp_path, monkeypatch, capsys):
    """Core hours are steps by the committed speeds; five processes on a GPU between one and 15. MPS is asked for."""
    monkeypatch.setattr(run, "measured", lambda: {("MEow", "Hopper-v4"): 200.0, ("SAC", "Hopper-v4"): 100.0})
    monkeypatch.setattr(run, "gpu_rates", lambda: {1: 500.0, 15: 4000.0})
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path))
    flags = dict(scripts=("meow", "sac"), env_ids=("Hopper-v4",), flags="--total-timesteps 720000", dry_run=True)
    run.main(run.Args(tmp_path / "g", **flags, gpu_fraction=0.2))
    printed = capsys.readouterr().out
    assert "2 runs, 1,440,000 environment steps" in printed and "CPU: 3.0 hours of a core" in printed  # 1 + 2
    assert (
        "GPU: 16 minutes of one H200, 5 processes with MPS, 1,500 steps/s" in printed
        and "nvidia-cuda-mps-control -d" in printed
    )
    (tmp_path / "control").touch()
    for fraction in (0.2, 0.0):
        run.main(run.Args(tmp_path / "g", **flags, gpu_fraction=fraction))
        assert "nvidia-cuda-mps-control" not in capsys.readouterr().out


def test_measured_speeds_are_those_of_committed_tables():
    rates = run.measured()
    assert 4_000 < run.gpu_rates()[15] < 6_000
    assert all(1 < rate < 1000 for rate in rates.values()) and {("MEow", "Hopper-v4"), ("SAC", "Ant-v4")} <= set(rates)


def test_stable_baselines3_in_a_grid(tmp_path):
    """The same evaluations at the same steps as ours, beside ours in the report; a second grid runs nothing; what was
    cut off starts anew; the last policy has the last return."""
    folder, algos = tmp_path / "g", ("ppo", "td3")
    scripts = ["sac", *(f"sb3:{algo}" for algo in algos)]
    short = "--total-timesteps 300 --learning-starts 250 --eval-frequency 150 --eval-episodes 2 --device cpu"
    flags = ["--scripts", *scripts, "--env-ids", "Pendulum-v1", f"--flags={short}"]
    code, out, err = wait(start(folder, *flags))
    assert code == 0, out + err
    rows, shared, _ = report.load((folder,))
    assert set(rows["method"]) == {"SAC", *(f"SB3 {algo.upper()}" for algo in algos)}
    assert all(list(own["step"]) == [150, 300] for _, own in rows.groupby("method"))
    before = sorted(folder.glob("*/runs/*"))
    ours, *theirs = sorted(before, key=lambda path: "sb3" in path.name)
    for path in theirs:
        assert re.fullmatch(r"Pendulum-v1__sb3_\w+__1__\d+", path.name)
        tags = ("eval/episodic_return", "eval/episodic_length", "charts/SPS", "charts/episodic_return")
        assert all(scalars(path, tag) for tag in tags)
        facts, own = (json.loads((each / "args.json").read_text()) for each in (path, ours))
        assert facts.keys() == own.keys() and facts["args"]["total_timesteps"] == 300
        assert facts["command"].startswith(f"{ROOT}/benchmark/sb3.py --env-id ")
    (ppo,) = (path for path in theirs if "ppo" in path.name)
    agent = PPO.load(ppo / "model.zip", device="cpu")
    env, total, over = sac.make_env("Pendulum-v1"), 0.0, False
    for i in range(2):
        obs, over = env.reset(seed=sac.EVAL_SEED + i)[0], False
        while not over:
            obs, reward, terminated, truncated, _ = env.step(agent.predict(obs, deterministic=True)[0])
            total, over = total + reward, terminated or truncated
    assert abs(scalars(ppo, "eval/episodic_return")[-1].value - total / 2) < 0.01

    grid = cells(folder)
    cut = grid["sb3_ppo__Pendulum-v1__seed1"]
    run.save(folder, grid | {cut["name"]: cut | dict(state="interrupted")})
    shutil.rmtree(ppo)
    ppo.mkdir()
    shutil.copy(theirs[1] / "args.json", ppo)  # as if it had had no evaluation
    code, out, err = wait(start(folder, "--resume"))
    assert code == 0 and "to run: 1 runs" in out, err
    after = sorted(folder.glob("*/runs/*"))
    assert len(after) == 3 and set(before) - set(after) == {ppo}
    assert (folder / cut["name"] / "abandoned-1").is_dir()
