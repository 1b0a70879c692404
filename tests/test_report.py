"""The page about runs: what it reads, its statistics against computations of their own, and in Chromium."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from playwright.sync_api import sync_playwright
from torch.utils.tensorboard import SummaryWriter

import meow_continuous_action as meow
import meow_isaacgym
from benchmark import UserError, report, run, write_csv

ROOT = Path(__file__).resolve().parent.parent
FAKE = str(ROOT / "tests" / "fake_script.py")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rows_of(command: str, seed: int, last: int, level: float) -> list[dict]:
    """Evaluations every 10,000 steps; the return is level + seed^2 + step/1000."""
    about = dict(seed=seed, commit="abc", machine="here", command=f"{command} --seed {seed}")
    returns = {step: level + seed**2 + step / 1000 for step in range(10_000, last + 1, 10_000)}
    return [{"step": step, "return": value, "SPS": 50.0 + seed} | about for step, value in returns.items()]


def write(path: Path, *rows: list[dict]) -> Path:
    write_csv(path, list(itertools.chain.from_iterable(rows)))
    return path


@pytest.fixture
def curves(tmp_path) -> Path:
    """A CSV: MEow, SAC and SB3's PPO on two tasks, where a seed of MEow stops early; a variant; one seed on a map."""
    sac, meow = "sac_continuous_action.py --env-id", "/somewhere/meow_continuous_action.py --env-id"
    both, ppo = ("Hopper-v4", "HalfCheetah-v5"), "/there/benchmark/sb3.py --algo ppo --env-id"
    seeds = [rows_of(f"{sac} {task}", s, 60_000, 300) for task in both for s in (1, 2, 3)]
    seeds += [rows_of(f"{ppo} {task}", s, 60_000, 200) for task in both for s in (1, 2, 3)]
    seeds += [rows_of(f"{meow} {task}", s, 60_000, 400) for task in both for s in (1, 2)]
    seeds += [rows_of(f"{meow} Hopper-v4", 3, 40_000, 400), rows_of(f"{meow}=HalfCheetah-v5", 3, 60_000, 400)]
    seeds += [rows_of(f"{meow} Hopper-v4 --no-reward-shift --exp-name x", s, 60_000, 10) for s in (1, 2)]
    seeds += [rows_of("python -u s2ac_continuous_action.py --env-id multigoal:MultiGoal-v0", 1, 20_000, -150)]
    return write(tmp_path / "curves.csv", *seeds)


def tables(printed: str) -> list[list[dict]]:
    """The Markdown tables."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", printed, re.M):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


def test_page_in_a_browser(curves, tmp_path):
    """It opens from disk, asks for nothing else, has no errors and all figures; a click on a header sorts."""
    report.main(report.Args((curves,), tmp_path / "out", reps=20))
    files = {path.stem for path in (tmp_path / "out").glob("*.png")}
    maps = {f"algorithms_{task}" for task in ("Hopper-v4", "HalfCheetah-v5", "multigoal_MultiGoal-v0", "aggregates")}
    assert files == maps | {f"variants_of_meow_{task}" for task in ("Hopper-v4", "aggregates")}
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    shutil.copy(tmp_path / "out" / "index.html", tmp_path / "alone.html")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    complaints, requests = [], []
    with sync_playwright() as p:
        page = p.chromium.launch(executable_path=CHROMIUM, args=[*flags.split()]).new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(f"file://{tmp_path}/alone.html")
        pictures = page.eval_on_selector_all("img", "all => all.map(i => [i.alt, i.naturalWidth, i.naturalHeight])")
        table = page.locator("table", has=page.locator("th", has_text="median")).first
        i = table.locator("th").all_text_contents().index("mean") + 1

        def column() -> list[str]:
            return table.locator(f"tbody td:nth-child({i})").all_text_contents()

        before = column()
        table.locator("th").nth(i - 1).click()
        assert column() == sorted(before, key=float) != before
        table.locator("th").nth(i - 1).press("Enter")
        assert column() == sorted(before, key=float, reverse=True)
    assert complaints == [] and requests == [f"file://{tmp_path}/alone.html"]
    assert len(pictures) == len(files)
    assert all(alt and width > 800 and height > 100 for alt, width, height in pictures)


def test_final_scores(curves, tmp_path, capsys):
    """Of each task at the step that all runs have; beside the paper's return there, between two points a line."""
    report.main(report.Args((curves,), tmp_path / "out", tmp_path / "copy.csv", reps=500))
    found = tables(capsys.readouterr().out)
    final = {(row["task"], row["method"]): row for row in found[0]}
    row = final["Hopper-v4", "MEow"]
    assert (row["step"], row["seeds"], row["median"]) == ("40000", "3", "429")  # 400 + 4 + mean of 10, 20, 30, 40
    assert row["each seed"] == "426 / 429 / 434" and row["95% interval"] == "426 to 434"
    assert row["paper there"] == f"{327.8 + (462.1 - 327.8) / 3:.0f}" and row["paper's end"] == "3490 (1500000)"
    assert float(final["Hopper-v4", "SB3 PPO"]["paper's end"].split()[0]) > 0
    row = final["multigoal:MultiGoal-v0", "S2AC"]
    assert row["95% interval"] == "one seed" and row["paper's end"] == ""
    variants = next(t for t in found[1:] if any("no-reward-shift" in row["method"] for row in t))
    ablation = next(row for row in variants if "no-reward-shift" in row["method"])
    assert ablation["paper's end"] != row["paper's end"] and float(ablation["paper's end"].split()[0]) < 1000

    (one, *_), (two, *_) = report.load((curves,)), report.load((tmp_path / "copy.csv",))
    pd.testing.assert_frame_equal(one.drop(columns="source"), two.drop(columns="source"))
    assert list(pd.read_csv(tmp_path / "copy.csv")) == report.COLUMNS


def test_aggregates(curves, tmp_path, capsys):
    """The interquartile mean by its definition."""
    report.main(report.Args((curves,), tmp_path / "out", reps=500))
    found = tables(capsys.readouterr().out)
    aggregate = {row["method"]: row for row in next(t for t in found if "IQM" in t[0])}
    end = {"Hopper-v4": 3490.2, "HalfCheetah-v5": 11391.7}  # the last points of the paper's MEow
    at = {"Hopper-v4": np.mean([10, 20, 30, 40]), "HalfCheetah-v5": np.mean([20, 30, 40, 50, 60])}
    assert set(aggregate) == {"MEow", "SAC", "SB3 PPO"}
    for method, level in (("MEow", 400), ("SAC", 300)):
        x = np.array([[(level + seed**2 + at[task]) / end[task] for task in end] for seed in (1, 2, 3)])
        middle = np.sort(x.ravel())[1:-1].mean()  # of six the outer quarters, rounded down
        row = aggregate[method]
        assert row["IQM"].startswith(f"{middle:.3f} (")
        low, high = map(float, re.findall(r"\((.*) to (.*)\)", row["IQM"])[0])
        assert x.min() - 1e-3 <= low <= middle <= high <= x.max() + 1e-3 and low < high


def test_interval_is_that_of_all_resamples():
    """Of four seeds all 256 resamples can be listed; two tasks are resampled apart."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 1))
    _, (low, high) = report.interval(x, lambda x: np.array([x.mean()]), 20_000)
    means = [np.mean(x[list(i), 0]) for i in itertools.product(range(4), repeat=4)]
    np.testing.assert_allclose([low[0], high[0]], np.percentile(means, [2.5, 97.5]), atol=0.06)
    pair = np.concatenate([x, -x], axis=1)  # in step, their sum would always be 0
    _, (low, high) = report.interval(pair, lambda x: np.array([x.sum()]), 500)
    assert high[0] - low[0] > 1
    point, ends = report.interval(x[:1], lambda x: np.array([x.mean()]), 100)
    assert point[0] == x[0, 0] and np.isnan(ends).all()


def test_coverage_that_the_page_states():
    rng, page = np.random.default_rng(0), (ROOT / "benchmark" / "report.html").read_text()
    for percent, n in (map(int, pair) for pair in re.findall(r"(\d+)%\s+with\s+(\d+)\s+seeds", page)):
        x = rng.normal(size=(1500, n))
        means = np.take_along_axis(x[:, None], rng.integers(n, size=(1500, 500, n)), axis=2).mean(2)
        low, high = np.percentile(means, [2.5, 97.5], axis=1)
        assert abs(100 * np.mean((low <= 0) & (0 <= high)) - percent) < 3


@pytest.mark.parametrize(
    "command, expected",
    [
        ("meow_continuous_action.py", ("MEow", "Hopper-v4", set())),
        ("python -u x/sql_continuous_action.py --env-id=Ant-v4 --seed 3 --num_seeds 5", ("SQL", "Ant-v4", set())),
        ("sac_continuous_action.py --no-autotune --alpha=.1", ("SAC", "Hopper-v4", {"no-autotune", "alpha .1"})),
        ("a/meow_mixture_continuous_action.py --env-id A-v0", ("MEow mixture", "A-v0", set())),
        ("meow_continuous_action.py --no-capture-video --async-envs --debug", ("MEow", "Hopper-v4", set())),
        ("meow_isaacgym.py --total-steps=9 --checkpoint-minutes 1 --env-id Ant", ("MEow", "Ant", set())),
        ("/x/sb3.py --algo td3 --env-id A-v0 --action-noise 0.1", ("SB3 TD3", "A-v0", {"action-noise 0.1"})),
        ("python -m benchmark.sb3 --env-id A-v0", ("SB3 SAC", "A-v0", set())),  # of older commits
    ],
)
def test_what_a_command_says(command, expected):
    assert report.describe(command) == expected


def test_what_changes_no_run_makes_no_variant():
    """Whatever --resume may change."""
    assert {*meow.MAY_CHANGE, *meow_isaacgym.MAY_CHANGE} <= {name.replace("-", "_") for name in report.PLAIN}


def test_references_are_of_the_same_flags(tmp_path):
    """Of runs that all are an ablation too, whose flag is then not in their name; of other flags there are none."""
    for flag, expected in (
        ("no-reward-shift", {report.ABLATION}),
        ("tau 0.01", set()),
        ("debug", {report.PAPER}),
    ):
        rows = rows_of(f"meow_continuous_action.py --env-id Hopper-v4 --{flag}", 1, 60_000, 10)
        runs, shared, _ = report.load((write(tmp_path / "one.csv", rows),))
        assert set(runs["method"]) == {"MEow"} and shared == [flag] * (flag != "debug")
        assert set(report.references_of(runs.iloc[0], report.references())) == expected


def test_grid_folder(tmp_path):
    """What was set aside does not count; flags that all share make no variant; of two equal runs the longer one
    counts; a run without an evaluation is no obstacle."""
    cells = {}
    for seed, total in ((1, 50), (2, 100)):
        cell = dict(name=f"c{seed}", script=FAKE, env_id="Hopper-v4", seed=seed, state="running")
        cell["flags"] = ["--level", "7", "--total-timesteps", str(total)]
        run.run_cell(tmp_path, cell, 1.0, 0.0)
        cells[cell["name"]] = cell
    shutil.copytree(tmp_path / "c1" / "runs", tmp_path / "c1" / "abandoned-1")
    run.save(tmp_path, cells)
    rows, shared, left_out = report.load((tmp_path,))
    assert set(rows["method"]) == {"fake-script"} and shared == ["level 7"] and left_out == []
    assert rows.groupby("seed")["step"].max().to_dict() == {1: 50, 2: 100}
    assert rows["return"].iloc[-1] == 10.0 and rows["command"].iloc[0].startswith("fake_script.py --env-id Hopper-v4")
    assert set(report.load((tmp_path / "c1",))[0]["seed"]) == {1}

    (young := tmp_path / "c3" / "runs" / "young").mkdir(parents=True)
    (folder,) = run.run_folders(tmp_path / "c1")
    shutil.copy(folder / "args.json", young)
    with SummaryWriter(young) as writer:
        writer.add_scalar("charts/SPS", 50.0, 10)
    longer = tmp_path / "c4" / "runs" / "longer"
    shutil.copytree(run.run_folders(tmp_path / "c2")[0], longer)
    facts = json.loads((longer / "args.json").read_text())
    facts["args"]["seed"] = 1
    (longer / "args.json").write_text(json.dumps(facts))
    run.save(tmp_path, cells | {name: cells["c1"] | dict(name=name) for name in ("c3", "c4")})
    rows, _, left_out = report.load((tmp_path,))
    assert rows.groupby("seed")["step"].max().to_dict() == {1: 100, 2: 100} and len(left_out) == 1


def test_of_two_equally_long_runs_one_is_left_out(tmp_path):
    one = write(tmp_path / "one.csv", rows_of("sac_continuous_action.py", 1, 40_000, 100))
    other = write(tmp_path / "other.csv", rows_of("sac_continuous_action.py", 1, 40_000, 900)[1::2])
    rows, _, left_out = report.load((other, one))
    assert rows["source"].nunique() == 1 and len(left_out) == 1
    late = write(tmp_path / "late.csv", rows_of("meow_continuous_action.py", 1, 90_000, 100)[-1:])
    with pytest.raises(UserError, match="MEow, seed 1: no evaluation up to step 40000"):
        report.main(report.Args((one, late), tmp_path / "out"))


def test_committed_results_can_be_read():
    results = (ROOT / "benchmark" / "results").glob("*.csv")
    files = tuple(path for path in results if {*report.COLUMNS} <= {*pd.read_csv(path, nrows=1)})
    rows, _, left_out = report.load(files)
    assert {"MEow", "SAC", "S2AC", "SB3 SAC"} <= set(rows["algorithm"]) and rows["return"].notna().all()


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    strange = write(tmp_path / "strange.csv", rows_of("python -m something", 1, 20_000, 0))
    for path, message in (("empty", "no run"), ("other.csv", "columns"), (strange, "something")):
        with pytest.raises(UserError, match=message):
            report.main(report.Args((tmp_path / path,), tmp_path / "out"))
    with pytest.raises(UserError, match="--export"):
        report.main(report.Args((strange,)))
    command = [sys.executable, "-m", "benchmark.report", str(tmp_path / "missing"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
