"""The measuring commands run as documented, and the committed results have what the README quotes."""

import csv
import re
import subprocess
import sys
from pathlib import Path

import meow_continuous_action as meow
from benchmark import export

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["step", "return", "SPS", "seed", "commit", "machine", "command"]


def test_export_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = dict(total_timesteps=120, learning_starts=50, batch_size=32, eval_frequency=60, eval_episodes=1)
    run_dir = meow.train(meow.Args(env_id="Hopper-v4", buffer_size=1000, seed=3, **flags))
    export.main(export.Args([run_dir], tmp_path / "new" / "curve.csv", tmp_path / "curve.png"))
    with open(tmp_path / "new" / "curve.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == COLUMNS
    assert [row["step"] for row in rows] == ["60", "120"] and {row["seed"] for row in rows} == {"3"}
    agent, args = meow.load_agent(run_dir / "checkpoint.pt")
    returns, _ = meow.evaluate(agent, meow.make_envs("Hopper-v4", 1), True, meow.choose_device(args))
    assert abs(float(rows[-1]["return"]) - returns.mean()) < 0.01
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_paper_curve():
    curve = dict(export.reference("Hopper-v5"))
    assert curve[30_000] == 327.8 and len(curve) == 50


def test_speed_command():
    command = [sys.executable, "-m", "benchmark.speed", "--repeats", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert re.search(r"update: best [\d.]+ ms, median [\d.]+ ms\nact: best [\d.]+ ms", done.stdout)


def test_committed_curves_back_the_readme():
    """Each committed run has a commit, a command and a row in the README's table with its own numbers."""
    readme = (ROOT / "README.md").read_text()
    files = sorted((ROOT / "benchmark" / "results").glob("*.csv"))
    assert files
    for path in files:
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        assert list(rows[0]) == COLUMNS
        assert all(row["commit"] and "dirty" not in row["commit"] and row["command"] for row in rows)
        for seed in {row["seed"] for row in rows}:
            returns = [float(row["return"]) for row in rows if row["seed"] == seed]
            assert f"| {seed} | {max(returns):.0f} | {sum(returns[-5:]) / 5:.0f} | {returns[-1]:.0f} |" in readme, path
