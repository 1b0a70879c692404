"""The page about runs: what it reads, its statistics against computations of their own, and in Chromium."""

import csv
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats
from playwright.sync_api import sync_playwright
from rliable import metrics
from torch.utils.tensorboard import SummaryWriter

import meow_continuous_action as meow
import meow_isaacgym
from benchmark import export, report, run, scores

ROOT = Path(__file__).resolve().parent.parent
FAKE = str(ROOT / "tests" / "fake_script.py")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def rows_of(command: str, seed: int, last: int, level: float) -> list[dict]:
    """Evaluations every 10,000 steps; the return is level + seed^2 + step/1000."""
    about = dict(seed=seed, commit="abc", machine="here", command=f"{command} --seed {seed}")
    returns = {step: level + seed**2 + step / 1000 for step in range(10_000, last + 1, 10_000)}
    return [{"step": step, "return": value, "SPS": 50.0 + seed} | about for step, value in returns.items()]


def write(path: Path, *rows: list[dict]) -> Path:
    with open(path, "w", newline="") as f:
        writer = csv.DictWriter(f, scores.COLUMNS)
        writer.writeheader()
        writer.writerows(itertools.chain.from_iterable(rows))
    return path


@pytest.fixture
def curves(tmp_path) -> Path:
    """A CSV: MEow and SAC on two tasks, where a seed of MEow stops early; a variant; one seed on a goal map."""
    sac, meow = "sac_continuous_action.py --env-id", "/somewhere/meow_continuous_action.py --env-id"
    seeds = [rows_of(f"{sac} {task}", s, 60_000, 300) for task in ("Hopper-v4", "HalfCheetah-v5") for s in (1, 2, 3)]
    seeds += [rows_of(f"{meow} {t}", s, 60_000, 400) for t in ("Hopper-v4", "HalfCheetah-v5") for s in (1, 2)]
    seeds += [rows_of(f"{meow} Hopper-v4", 3, 40_000, 400), rows_of(f"{meow}=HalfCheetah-v5", 3, 60_000, 400)]
    seeds += [rows_of(f"{meow} Hopper-v4 --no-reward-shift --exp-name x", s, 60_000, 10) for s in (1, 2)]
    seeds += [rows_of("python -u s2ac_continuous_action.py --env-id multigoal:MultiGoal-v0", 1, 20_000, -150)]
    return write(tmp_path / "curves.csv", *seeds)


@pytest.fixture
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    flags = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-sync"
    with sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=CHROMIUM, args=[*flags.split(), "--disable-component-update"])
        yield chromium
        chromium.close()


def test_page_in_a_browser(browser, curves, tmp_path):
    """It opens from disk, asks for nothing else, has no errors and all figures; a click on a header sorts."""
    report.main(report.Args((curves,), tmp_path / "out", reps=20))
    shutil.copy(tmp_path / "out" / "index.html", tmp_path / "alone.html")
    page = browser.new_page()
    complaints, requests = [], []
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"file://{tmp_path}/alone.html")
    pictures = page.eval_on_selector_all("img", "all => all.map(i => [i.alt, i.naturalWidth, i.naturalHeight])")
    assert complaints == [] and requests == [f"file://{tmp_path}/alone.html"]
    assert len(pictures) == len(list((tmp_path / "out").glob("*.png"))) == 11
    assert all(alt and width > 800 and height > 100 for alt, width, height in pictures)

    table = page.locator("table", has=page.locator("th", has_text="difference")).nth(1)  # Hopper's

    def column(name: str) -> list[str]:
        i = table.locator("th").all_text_contents().index(name) + 1
        return table.locator(f"tbody td:nth-child({i})").all_text_contents()

    before = column("difference")
    table.locator("th", has_text="difference").click()
    assert column("difference") == sorted(before, key=float) != before
    table.locator("th", has_text="difference").press("Enter")
    assert column("difference") == sorted(before, key=float, reverse=True)
    table.locator("th", has_text="reference, of").click()
    placed = column("reference, of the interval")
    assert placed == sorted(placed) and len(set(placed)) > 1


def tables(printed: str) -> list[list[dict]]:
    """The Markdown tables."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", printed, re.M):
        lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in block.splitlines()]
        found.append([dict(zip(lines[0], line, strict=True)) for line in lines[2:]])
    return found


def test_comparison_and_final_scores(curves, tmp_path, capsys):
    """Per task and common step: this project's mean and interval, the paper's, the difference; early stops are said."""
    report.main(report.Args((curves,), tmp_path / "out", tmp_path / "copy.csv", reps=500))
    first = tables(capsys.readouterr().out)
    hopper = {(row["method"], row["step"], row["reference"]): row for row in first[1]}
    assert {task for table in first for row in table for task in [row.get("task")] if task} == {
        "Hopper-v4",
        "HalfCheetah-v5",
        "multigoal:MultiGoal-v0",
    }
    row = hopper["MEow", "30000", scores.PAPER]
    mean = 430 + (1 + 4 + 9) / 3
    assert (row["seeds"], row["ours"], row["95% interval"]) == ("3 of 3", f"{mean:.0f}", "431 to 439")
    assert (row["its return"], row["difference"]) == ("328", f"{mean - 327.8:.0f}")
    assert row["reference, of the interval"] == "below"
    row = hopper["MEow", "60000", scores.PAPER]  # without the seed that stopped
    assert (row["seeds"], row["ours"], row["95% interval"]) == ("2 of 3", "462", "461 to 464")
    assert row["reference, of the interval"] == "inside" and row["its return"] == "462"
    assert hopper["SAC", "50000", scores.TEN_SEEDS]["seeds"] == "3 of 3"
    assert {step for method, step, _ in hopper if method == "MEow"} == {"30000", "60000"}

    final = {(row["task"], row["method"]): row for row in first[2]}
    row = final["Hopper-v4", "MEow"]
    assert (row["step"], row["seeds"], row["median"]) == ("40000", "3", "429")  # 400 + 4 + mean of 10, 20, 30, 40
    assert row["each seed"] == "426 / 429 / 434" and row["paper's end"] == "3490 (1500000)"
    assert row["best evaluation"] == "449"  # seed 3's at step 40,000, not what the others have later
    row = final["multigoal:MultiGoal-v0", "S2AC"]
    assert row["95% interval"] == "one seed" and row["paper's end"] == ""
    variant = next(t for t in first if any("no-reward-shift" in r.get("method", "") for r in t))
    assert {r["reference"] for r in variant if "no-reward-shift" in r["method"]} == {scores.ABLATION}

    (one, *_), (two, *_) = scores.load((curves,)), scores.load((tmp_path / "copy.csv",))
    assert [dataclasses.replace(r, source="") for r in one] == [dataclasses.replace(r, source="") for r in two]


def test_aggregates(curves, tmp_path, capsys):
    """IQM, median, optimality gap and probability of improvement, each computed here by its definition."""
    report.main(report.Args((curves,), tmp_path / "out", reps=500))
    found = tables(capsys.readouterr().out)
    aggregate = {row["method"]: row for row in next(t for t in found if "IQM" in t[0])}
    end = {"Hopper-v4": 3490.2, "HalfCheetah-v5": 11391.7}  # the last points of the paper's MEow
    at = {"Hopper-v4": np.mean([0, 10, 20, 30, 40][1:]), "HalfCheetah-v5": np.mean([20, 30, 40, 50, 60])}
    for method, level in (("MEow", 400), ("SAC", 300)):
        x = np.array([[(level + seed**2 + at[task]) / end[task] for task in end] for seed in (1, 2, 3)])
        middle = np.sort(x.ravel())[1:-1].mean()  # of six the outer quarters, rounded down
        row = aggregate[method]
        assert row["IQM"].startswith(f"{middle:.3f} (") and row["median"].startswith(f"{x.mean(0).mean():.3f} (")
        assert row["optimality gap"].startswith(f"{1 - x.mean():.3f} (") and row["seeds"] == "3" and row["tasks"] == "2"
        low, high = map(float, re.findall(r"\((.*) to (.*)\)", row["IQM"])[0])
        assert x.min() - 1e-3 <= low <= middle <= high <= x.max() + 1e-3 and low < high
    (improvement,) = (t for t in found if t[0].get("of", "").startswith("P(MEow > SAC"))
    assert improvement == [{"of": "P(MEow > SAC)", "estimate": "1.000", "95% interval": "1.000 to 1.000"}]


@pytest.mark.parametrize("n, m, tasks", [(2, 2, 1), (5, 4, 3), (3, 10, 2)])
def test_own_estimators_are_rliables(n, m, tasks):
    """To the last bit, also of equal scores, and so are their intervals by the same resamples."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(n, tasks)).round(1), rng.normal(0.3, size=(m, tasks)).round(1)
    for data, own, theirs in (
        (x, lambda x: report.iqm(x.ravel()), metrics.aggregate_iqm),
        ([x, y], report.improvement, metrics.probability_of_improvement),
        ([x, x], report.improvement, metrics.probability_of_improvement),
    ):
        found, expected = (scores.interval(data, lambda *x: np.array([f(*x)]), 50) for f in (own, theirs))  # noqa: B023
        assert found[0] == expected[0] and (found[1] == expected[1]).all()
    curves = rng.normal(size=(n * tasks, 7))
    assert (report.iqm(curves) == scipy.stats.trim_mean(curves, 0.25)).all()


def test_interval_is_that_of_all_resamples():
    """Of four seeds all 256 resamples can be listed; two tasks are resampled apart."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 1))
    _, (low, high) = scores.interval(x, lambda x: np.array([x.mean()]), 20_000)
    means = [np.mean(x[list(i), 0]) for i in itertools.product(range(4), repeat=4)]
    np.testing.assert_allclose([low[0], high[0]], np.percentile(means, [2.5, 97.5]), atol=0.06)
    pair = np.concatenate([x, -x], axis=1)  # in step, their sum would always be 0
    _, (low, high) = scores.interval(pair, lambda x: np.array([x.sum()]), 500)
    assert high[0] - low[0] > 1
    point, ends = scores.interval(x[:1], lambda x: np.array([x.mean()]), 100)
    assert point[0] == x[0, 0] and ends is None


def test_coverage_that_the_page_states():
    rng = np.random.default_rng(0)
    for n, percent in report.COVERAGE.items():
        x = rng.normal(size=(1500, n))
        means = np.take_along_axis(x[:, None], rng.integers(n, size=(1500, 500, n)), axis=2).mean(2)
        low, high = np.percentile(means, [2.5, 97.5], axis=1)
        assert abs(100 * np.mean((low <= 0) & (0 <= high)) - percent) < 3


@pytest.mark.parametrize(
    "command, expected",
    [
        ("meow_continuous_action.py", ("MEow", "Hopper-v4", set())),
        ("python -u x/sql_continuous_action.py --env-id=Ant-v4 --seed 3 --num_seeds 5", ("SQL", "Ant-v4", set())),
        (
            "sac_continuous_action.py --env-id A-v0 --no-autotune --alpha=.1",
            ("SAC", "A-v0", {"no-autotune", "alpha .1"}),
        ),
        ("meow_continuous_action.py --no-capture-video --coupling affine", ("MEow", "Hopper-v4", {"coupling affine"})),
        ("a/meow_mixture_continuous_action.py --env-id A-v0", ("MEow mixture", "A-v0", set())),
        (
            "meow_continuous_action.py --density mixture --sigma-max -0.3 --async-envs",
            ("MEow", "Hopper-v4", {"density mixture", "sigma-max -0.3"}),
        ),
        (
            "meow_isaacgym.py --total-steps=9 --checkpoint-minutes 1 --checkpoint-frequency=5 --debug --env-id Ant",
            ("MEow", "Ant", set()),
        ),
    ],
)
def test_what_a_command_says(command, expected):
    assert scores.describe(command) == expected


def test_what_changes_no_run_makes_no_variant():
    """Whatever --resume may change."""
    assert {*meow.MAY_CHANGE, *meow_isaacgym.MAY_CHANGE} <= {name.replace("-", "_") for name in scores.PLAIN}


def test_references_are_of_the_same_flags(tmp_path, capsys):
    """Of runs that all are an ablation too, whose flag is then not in their name; of other flags there are none."""
    for flag, expected in (("no-reward-shift", {scores.ABLATION}), ("tau 0.01", set()), ("debug", {scores.PAPER})):
        rows = rows_of(f"meow_continuous_action.py --env-id Hopper-v4 --{flag}", 1, 60_000, 10)
        ((one,), shared, _) = scores.load((path := write(tmp_path / "one.csv", rows),))
        assert one.method == "MEow" and shared == [flag] * (flag != "debug")
        assert set(scores.references_of(one, scores.references())) - {scores.TEN_SEEDS} == expected
    rows = rows_of("meow_continuous_action.py --no-clipped-double-q", 1, 60_000, 10)
    report.main(report.Args((write(path, rows),), tmp_path / "out"))
    comparison, final, aggregate = tables(capsys.readouterr().out)[:3]
    assert {row["reference"] for row in comparison} == {scores.ABLATION} and aggregate[0]["tasks"] == "1"
    (figure_6,) = (c for k, c in scores.references().items() if k == (scores.ABLATION, "MEow LRS only", "Hopper-v4"))
    assert final[0]["paper's end"] == f"{figure_6[max(figure_6)]:.0f} ({max(figure_6)})"


def test_grid_folder(tmp_path):
    """Runs of the manifest count, what was set aside does not; flags that all share make no variant; a shorter copy of
    a run and one that has no evaluation yet are left out and named."""
    cells = {}
    for seed, total in ((1, 50), (2, 100)):
        cell = dict(name=f"c{seed}", script=FAKE, env_id="Hopper-v4", variant="", seed=seed, state="done")
        cell["flags"] = ["--level", "7", "--total-timesteps", str(total)]
        assert run.run_cell(tmp_path, cell, 1.0, 0.0)["exit"] == 0
        cells[cell["name"]] = cell | dict(
            runs=[str(f.relative_to(tmp_path)) for f in run.run_folders(tmp_path / cell["name"])]
        )
    shutil.copytree(tmp_path / "c1" / "runs", tmp_path / "c1" / "abandoned-1")
    run.save(tmp_path, cells)
    runs, shared, left_out = scores.load((tmp_path,))
    assert [(r.method, r.env_id, r.seed, list(r.returns)[-1]) for r in runs] == [
        ("fake-script", "Hopper-v4", 1, 50),
        ("fake-script", "Hopper-v4", 2, 100),
    ]
    assert shared == ["level 7"] and left_out == []
    assert len(scores.load((tmp_path / "c1",))[0]) == 1 and scores.load((tmp_path / "c1",))[2] == []
    assert runs[1].returns[100] == 10.0 and runs[0].rows[0]["command"].startswith("fake_script.py --env-id Hopper-v4")
    run.save(tmp_path, {name: cell | dict(state="running", runs=[]) for name, cell in cells.items()})  # still at it
    assert [max(r.returns) for r in scores.load((tmp_path,))[0]] == [50, 100]
    (folder,) = run.run_folders(tmp_path / "c1")
    for name in ("without-log", "SPS-only"):
        (young := tmp_path / name / "runs" / "young").mkdir(parents=True)
        shutil.copy(folder / "args.json", young)
        cells[name] = cells["c1"] | dict(name=name, state="running", runs=[])
    with SummaryWriter(young) as writer:
        writer.add_scalar("charts/SPS", 50.0, 10)
    run.save(tmp_path, cells)
    runs, _, left_out = scores.load((tmp_path,))
    assert [max(r.returns) for r in runs] == [50, 100] and len(left_out) == 2
    for name, line in zip(("without-log", "SPS-only"), left_out, strict=True):
        assert line == f"{tmp_path / name / 'runs' / 'young'} (no evaluation yet)"
    with pytest.raises(scores.UserError, match="no run has an evaluation yet"):
        export.main(export.Args([young], tmp_path / "young.csv"))
    with pytest.raises(scores.UserError, match="c1 is not the folder of a run: it has no args.json"):
        export.main(export.Args([tmp_path / "c1"], tmp_path / "young.csv"))
    (young / "args.json").write_text((folder / "args.json").read_text().replace("Hopper-v4", "Ant-v4"))
    with pytest.raises(scores.UserError, match="on Hopper-v4, Ant-v4; expected one task"):
        export.main(export.Args([folder, young], tmp_path / "young.csv"))
    run.save(tmp_path, {name: cells[name] for name in ("c1", "c2")})
    shorter = write(tmp_path / "s.csv", [row for row in runs[1].rows if int(row["step"]) <= 30])
    runs, _, left_out = scores.load((shorter, tmp_path))
    assert [max(r.returns) for r in runs] == [50, 100] and len(left_out) == 1 and "s.csv" in left_out[0].split("(")[0]


def test_committed_curves_are_read():
    """Those of older commits, too, with flags that are gone."""
    files = [path for path in (ROOT / "benchmark" / "results").glob("*.csv") if "SPS" in path.read_text()[:40]]
    runs, _, left_out = scores.load(tuple(path for path in files if not path.name.startswith("sb3")))
    assert {run.algorithm for run in runs} >= {"MEow", "SAC", "S2AC"} and len(runs) >= 20
    assert all("same run as" in line for line in left_out)


def test_mistakes_are_one_line(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    strange = write(tmp_path / "strange.csv", rows_of("python -m something", 1, 20_000, 0))
    for path, message in (
        ("empty", "no CSV, no grid and no run"),
        ("other.csv", "not a CSV of"),
        (strange, "not the command"),
    ):
        with pytest.raises(scores.UserError, match=message):
            report.main(report.Args((tmp_path / path,), tmp_path / "out"))
    command = [sys.executable, "-m", "benchmark.report", str(tmp_path / "missing"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=ROOT, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == f"error: {tmp_path / 'missing'}: no CSV, no grid and no run in it\n"
    assert not (tmp_path / "out").exists()
