"""The pages have the tables that benchmark.tables writes from the committed CSVs, and these are right."""

import re

import numpy as np
import pandas as pd
import pytest

from benchmark import table, tables


def test_pages_are_what_the_command_writes():
    for path, text in tables.pages().items():
        assert path.read_text() == text, f"{path.name} is stale: run python -m benchmark.tables"


def test_every_table_and_picture_stands_in_a_page():
    text = "".join(path.read_text() for path in tables.pages())
    named = set(re.findall(r"<!-- table: (\w+) -->", text))
    assert named == set(tables.tables()) and text.count("<!-- table: ") == text.count("<!-- end -->")
    assert not [name for name in tables.CURVES if f"{name}.png)" not in text]


def test_scores_are_of_the_last_five_evaluations_that_all_runs_have(monkeypatch):
    points = [(1, 10 * k, float(k)) for k in range(1, 9)] + [(2, 10 * k, 2.0 * k) for k in range(1, 11)]
    rows = pd.DataFrame(points, columns=["seed", "step", "return"]).assign(task="T", method="M")  # to steps 80 and 100
    monkeypatch.setattr(tables, "curves", lambda name: rows)
    monkeypatch.setattr(tables, "paper_of", lambda run: {"paper": pd.Series({0: 0.0, 100: 200.0})})
    (row,) = tables.scores("any")
    assert row["steps"] == "80" and row["each seed"] == "6 / 12" and row["paper"] == "120"  # means at steps 40 to 80


def test_plus_aggregates_are_those_of_scipy_and_of_counting_pairs(monkeypatch):
    """Of the seeds that have all tasks; one seed has no interval; the interval holds the estimate."""
    rng = np.random.default_rng(0)
    runs = [("MEow+", seed, task) for seed in (1, 2, 3) for task in "ABCDE"]
    runs += [("SAC", seed, task) for seed in (1, 2) for task in "ABCDE"] + [("SAC", 3, "A")]
    runs += [("MEow", 1, task) for task in "ABCDE"]
    rows = pd.DataFrame(runs, columns=["method", "seed", "task"]).assign(step=100_000)
    rows["return"] = rng.uniform(1_000, 5_000, len(rows))
    keys = [("SAC", task, 100_000) for task in "ABCDE"] + [("CrossQ", task, 100_000) for task in "ABCDE"]
    known = pd.Series([2_000.0] * 5 + [4_000.0] * 5, pd.MultiIndex.from_tuples(keys))
    monkeypatch.setattr(tables, "curves", lambda name: rows)
    monkeypatch.setattr(tables, "references", lambda: {tables.TEN_SEEDS: known})
    x, sac = rows["return"].to_numpy()[:15].reshape(3, 5), rows["return"].to_numpy()[15:25].reshape(2, 5)
    meow = rows["return"].to_numpy()[-5:]
    found = {line.split(" | ")[3]: line.strip("| ").split(" | ") for line in tables.plus_aggregates().splitlines()[2:]}
    assert [*found] == ["SAC here", "MEow here", "SAC, 10 seeds", "CrossQ, 10 seeds"]
    means = {"SAC here": sac.mean(0), "MEow here": meow, "SAC, 10 seeds": 2_000.0, "CrossQ, 10 seeds": 4_000.0}
    for name, mean in means.items():
        iqm, above = np.sort((x / mean).ravel())[3:12].mean(), (x.mean(0) > mean).sum()  # 3 of 15 cut off on each side
        assert found[name][5].split(" (")[0] == f"{iqm:.2f}" and found[name][6] == f"{above}"
    pairs = np.mean([x[i] > sac[j] for i in range(3) for j in range(2)])
    assert found["SAC here"][7].split(" (")[0] == f"{pairs:.2f}" and "one seed" in found["MEow here"][7]
    low, high = map(float, re.findall(r"[\d.]+", found["SAC here"][5])[1:])
    assert low < float(found["SAC here"][5].split(" (")[0]) < high and [found["SAC here"][k] for k in (2, 4)] == [
        "3",
        "2",
    ]


def test_goals_by_alpha():
    """Of all seeds together, of the rollouts that reach a goal; an algorithm without rows at a temperature is blank."""
    lines = [("1", "a", "1 / 0 / 1"), ("1", "a", "3 / 3 / 0"), ("2", "b", "0 / 5 / 0"), ("2", "optimum", "0 / 0 / 0")]
    rows = pd.DataFrame(lines, columns=["alpha", "algorithm", "goals"])
    found = tables.goals_by_alpha(rows).splitlines()
    assert found[0] == "| alpha | optimum | a | b |" and found[2] == "| 1 |  | 50 / 38 / 12 |  |"
    assert found[3] == "| 2 | 0 / 0 / 0 |  | 0 / 100 / 0 |"


def test_table():
    """Means and ranges of texts, empty cells and columns, medians of turns, a column across; none of no rows."""
    rows = pd.DataFrame(dict(a=["y", "y", "x", "y"], b=list("qpqq"), c=["1", "2", "", "6"]))
    assert table(rows, "a", "c:1 d:2").splitlines()[2:] == ["| y | 3 | 3.0 (1.0 to 6.0) |  |", "| x | 1 |  |  |"]
    assert "| y | 3 | 2 (1 to 6) |" in table(rows.assign(turn=0), "a", "c:0")
    assert table(rows, "a", "c:1", "b") == "| a | b q | b p |\n| --- | --- | --- |\n| y | 3.5 | 2.0 |\n| x |  |  |"
    assert table(rows[:0], "a", "c:1") == ""


def test_interval_is_students():
    assert tables.interval([1.0]) == "1 (one seed)"
    draws = np.random.default_rng(0).normal(1000, 100, (2000, 3))
    ends = [re.findall(r"-?\d+", tables.interval(list(x)).split("(")[1]) for x in draws]
    assert np.mean([int(low) <= 1000 <= int(high) for low, high in ends]) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize("log_sigma, error", [(1.0, 0.013), (2.0, 0.463)])
def test_clamp_is_the_integral_of_the_density(log_sigma, error):
    """-log of a sum over the box, not in the closed form of the table."""
    a = np.linspace(-1, 1, 4_000_001)[:-1] + 2.5e-7  # middles of cells narrower than what the clamp cuts off
    clamped = np.clip(a, -1 + 1e-5, 1 - 1e-5)
    z, sigma = np.arctanh(clamped), np.exp(log_sigma)
    density = np.exp(-0.5 * (z / sigma) ** 2) / (sigma * np.sqrt(2 * np.pi)) / (1 - clamped**2)
    assert -np.log(density.sum() * 5e-7) == pytest.approx(error, abs=1e-3)
    assert f"| {log_sigma} | {error:.3f} α |" in tables.clamp()
