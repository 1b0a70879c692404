"""Grids: what crashes, is killed, interrupted or resumed, with a script that keeps the contracts and trains nothing."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import meow_continuous_action as meow
import meow_mixture_continuous_action as mixture
import sac_continuous_action as sac
import sql_continuous_action as sql
from benchmark import grids, run

ROOT = Path(__file__).resolve().parent.parent
FAKE = str(ROOT / "tests" / "fake_script.py")


def start(folder: Path, *flags: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "benchmark.run", str(folder), *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)


def wait(process: subprocess.Popen) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err


def cells(folder: Path) -> dict[str, dict]:
    return {cell["name"]: cell for cell in json.loads((folder / "grid.json").read_text())["cells"]}


def steps(folder: Path) -> dict[str, list[int]]:
    """Run folder's name -> the steps that it executed, in order."""
    return {p.parent.name: [int(x) for x in p.read_text().split()] for p in folder.glob("*/runs/*/steps.txt")}


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
    """Exit code 1; the crash is retried from its checkpoint, the user's mistake is not, and --resume repeats neither
    what is done nor more than it has to."""
    flags = ["--scripts", FAKE, "--env-ids", "Crash-v0", "Mistake-v0", "Good-v0", "--seeds", "1", "2"]
    code, out, err = wait(start(tmp_path / "g", *flags, "--flags=--level 3"))
    assert code == 1, err
    assert "to run: 6 runs, 6,000,000 environment steps, about 14 CPU hours" in out
    grid = cells(tmp_path / "g")
    assert {name: cell["state"] for name, cell in grid.items()} == {
        f"fake_script__{task}-v0__seed{seed}": state
        for task, state in (("Crash", "failed"), ("Mistake", "failed"), ("Good", "done"))
        for seed in (1, 2)
    }
    crash, mistake, good = (grid[f"fake_script__{task}-v0__seed2"] for task in ("Crash", "Mistake", "Good"))
    assert [a["exit"] for a in crash["attempts"]] == [1, 1] and "--resume runs/" in crash["attempts"][1]["command"]
    assert [a["exit"] for a in mistake["attempts"]] == [1] and [a["exit"] for a in good["attempts"]] == [0]
    assert "--env-id Good-v0 --seed 2 --level 3" in good["attempts"][0]["command"]
    assert "failed: fake_script__Crash-v0__seed2, exit code 1" in out
    assert "FloatingPointError: the loss is not finite at step 60" in out and "error: no task Mistake-v0" in out
    before = steps(tmp_path / "g")
    facts = json.loads((tmp_path / "g" / good["runs"][0] / "args.json").read_text())
    assert facts["machine"] == f"niceness {os.nice(0)}"  # no less than that of what else this machine does
    assert len(good["runs"]) == 1 and before[Path(good["runs"][0]).name] == list(range(10, 101, 10))

    code, out, err = wait(start(tmp_path / "g", "--scripts", FAKE, "--env-ids", "Good-v0"))
    assert (code, out, err.count("\n")) == (2, "", 1) and "has a grid: --resume" in err

    more = ["--resume", "--retries", "0", "--scripts", FAKE, "--env-ids", "Good-v0", "--seeds", "2", "3"]
    code, out, err = wait(start(tmp_path / "g", *more, "--flags=--level 3"))
    assert code == 1 and "to run: 5 runs," in out and "done before: 2" in out
    after, grid = steps(tmp_path / "g"), cells(tmp_path / "g")
    assert all(after[Path(c["runs"][0]).name] == list(range(10, 101, 10)) for c in grid.values() if "Good" in c["name"])
    assert len(grid["fake_script__Crash-v0__seed1"]["attempts"]) == 3
    assert [len(grid[f"fake_script__Good-v0__seed{seed}"]["attempts"]) for seed in (1, 2, 3)] == [1, 1, 1]


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
    assert code == 130 and "interrupted; waiting for the scripts to save" in out, err
    assert "interrupted" in {cell["state"] for cell in cells(folder).values()}
    stopped = steps(folder)
    time.sleep(0.5)
    assert stopped == steps(folder)  # nothing trains on

    code, out, err = wait(start(folder, "--resume"))
    assert code == 0 and "3 done, 0 failed" in out, out + err
    assert sorted(steps(folder).values()) == [list(range(10, 601, 10))] * 3
    assert any("--resume runs/" in log.read_text() for log in folder.glob("*/log.txt"))  # whichever start resumed it
    code, out, err = wait(start(folder, "--resume"))
    assert code == 0 and "to run: 0 runs" in out


@pytest.fixture
def cell(tmp_path):
    flags = ["--total-timesteps", "50"]
    return dict(name="c", script=FAKE, env_id="Good-v0", variant="fast", flags=flags, seed=4)


def test_cell_is_run_once_and_resumed_where_steps_are_left(tmp_path, cell):
    result = run.run_cell(tmp_path, cell, 1.0, 0.0)
    assert result["exit"] == 0 and "--seed 4 --exp-name fake_script.fast" in result["command"]
    assert run.run_cell(tmp_path, cell, 1.0, 0.0) == dict(command="", exit=0)
    (folder,) = run.run_folders(tmp_path / "c")
    (folder / "args.json").write_text((folder / "args.json").read_text().replace("50", "80"))
    result = run.run_cell(tmp_path, cell, 1.0, 0.0)
    assert result["exit"] == 0 and "--resume runs/Good-v0__fake_script.fast__4__" in result["command"]
    assert list(steps(tmp_path).values()) == [list(range(10, 81, 10))]


def test_run_without_a_checkpoint_or_of_a_script_without_resume_starts_anew(tmp_path, cell):
    cell["script"] = str(tmp_path / "old_script.py")
    Path(cell["script"]).write_text(
        Path(FAKE).read_text().replace('parser.add_argument("--resume")', "").replace("args.resume", "0")
    )
    run.run_cell(tmp_path, cell, 1.0, 0.0)
    (folder,) = run.run_folders(tmp_path / "c")
    (folder / "args.json").write_text((folder / "args.json").read_text().replace("50", "80"))
    result = run.run_cell(tmp_path, cell, 1.0, 0.0)
    assert result["exit"] == 0 and "--resume" not in result["command"]
    assert run.run_folders(tmp_path / "c") != [folder] and (tmp_path / "c" / "abandoned-1" / folder.name).is_dir()


def test_script_that_outlived_a_killed_grid_is_waited_for(tmp_path, cell):
    (tmp_path / "c").mkdir()
    with open(tmp_path / "c" / "lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        command = [*run.next_command(tmp_path / "c", cell), "--seconds", "0.1"]
        process = subprocess.Popen(command, cwd=tmp_path / "c", pass_fds=[lock.fileno()], stderr=subprocess.DEVNULL)
    assert run.run_cell(tmp_path, cell, 1.0, 0.0) == dict(command="", exit=0)
    assert process.wait() == 0 and list(steps(tmp_path).values()) == [[10, 20, 30, 40, 50]]


def test_one_grid_a_folder(tmp_path):
    (tmp_path / "g").mkdir()
    with open(tmp_path / "g" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        code, out, err = wait(start(tmp_path / "g", "--scripts", FAKE, "--env-ids", "Good-v0"))
    assert code == 2 and err == f"error: another benchmark.run works on {tmp_path / 'g'}\n"


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(), "nothing to run"),
        (dict(scripts=(FAKE,)), "needs --preset, or --scripts and --env-ids"),
        (dict(resume=True, flags="--tau 1"), "--flags is for cells of --preset or --scripts"),
        (dict(scripts=("nothing",), env_ids=("A-v0",)), "nothing: no such script"),
        (dict(preset="smoke", rate=("meow",)), "meow=120"),
        (dict(preset="smoke", rate=("meow=0",)), "meow=120"),
        (dict(preset="smoke", cpus=0), "must be positive"),
        (
            dict(preset="cpu", env_ids=("Hopper-v4",)),
            "sac_continuous_action__Hopper-v4__seed1 is in the grid with other",
        ),
        (dict(preset="smoke", resume=True, seeds=(1,), flags="--tau 1"), "with other flags"),
    ],
)
def test_mistakes(tmp_path, flags, message):
    if "resume" in flags:
        run.save(tmp_path, grids.grid(run.Args(tmp_path, "smoke")))
    with pytest.raises(run.UserError) as e:
        run.main(run.Args(tmp_path, dry_run=True, **flags))
    assert message in str(e.value)


def test_scripts_of_one_file_name(tmp_path):
    """Two in different folders would be one cell, of which only the first would run."""
    scripts = [str(tmp_path / folder / "my_script.py") for folder in ("a", "b")]
    for script in scripts:
        Path(script).parent.mkdir()
        Path(script).touch()
    with pytest.raises(run.UserError, match=f"would be of {scripts[0]} and of {scripts[1]}; expected one script"):
        grids.grid(run.Args(tmp_path, scripts=tuple(scripts), env_ids=("A-v0",)))
    assert len(grids.grid(run.Args(tmp_path, scripts=(scripts[0], scripts[0]), env_ids=("A-v0",)))) == 1


def test_presets_and_their_cost(capsys):
    """The numbers of steps are those of the scripts' own presets."""
    for module in (meow, mixture, sac, sql):
        for env_id, total in grids.STEPS.items():
            assert module.PRESETS[env_id]["total_timesteps"] == total
    paper = grids.grid(run.Args(Path("g"), "paper", flags="--alpha 1")).values()
    assert len(paper) == 75 and all(cell["flags"] == ["--alpha", "1"] for cell in paper)
    assert grids.estimate(list(paper), ("meow=100", "sac=100", "sql=50")) == (
        "75 runs, 240,000,000 environment steps, about 889 CPU hours "
        "(steps a second and core: meow 100, sac 100, sql 50)"
    )
    run.main(run.Args(Path("g"), "ablation", dry_run=True))
    out = capsys.readouterr().out
    assert "15 runs, 2,250,000 environment steps" in out
    assert "meow_continuous_action__Hopper-v4__coupling-affine__seed3 --total-timesteps 150000 --coupling affine" in out
    for preset in grids.PRESETS:  # flags that the scripts know, with values that they accept
        for cell in grids.grid(run.Args(Path("g"), preset)).values():
            module = {m.__name__: m for m in (meow, mixture, sac, sql)}[Path(cell["script"]).stem]
            assert module.parse_args(["--env-id", cell["env_id"], *cell["flags"]]).env_id == cell["env_id"]
