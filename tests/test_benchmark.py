"""The measuring commands run as documented, and the committed results have what the README and docs/ quote."""

import csv
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
import torch

import meow_continuous_action as meow
from benchmark import acting, densities, entropy, estimation, export, sb3, soak, speed, truth, write_csv

ROOT = Path(__file__).resolve().parent.parent
COLUMNS = ["step", "return", "SPS", "seed", "commit", "machine", "command"]


def test_write_csv(tmp_path):
    """Columns of the last row; what fails leaves the old file as it was, and nothing beside it."""
    path = tmp_path / "new" / "table.csv"
    write_csv(path, [dict(a=1), dict(a=2, b="x, y")])
    assert list(csv.DictReader(path.open())) == [dict(a="1", b=""), dict(a="2", b="x, y")]
    with pytest.raises(ValueError, match="fields not in fieldnames: 'c'"):
        write_csv(path, [dict(a=1, c=2), dict(a=2)])
    assert len(path.read_text().splitlines()) == 3 and [file.name for file in path.parent.iterdir()] == ["table.csv"]


def test_export_of_a_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = dict(total_timesteps=120, learning_starts=50, batch_size=32, eval_frequency=60, eval_episodes=1)
    (run_dir,) = meow.train(meow.Args(env_id="Hopper-v4", buffer_size=1000, seed=3, **flags))
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


def results(pattern: str) -> dict[str, list[dict]]:
    """The committed CSVs of that name, each with rows of a clean commit and with a command."""
    files = {path: list(csv.DictReader(path.open())) for path in (ROOT / "benchmark" / "results").glob(pattern)}
    assert files
    for rows in files.values():
        if "commit" in rows[0]:
            assert all(row["commit"] and "dirty" not in row["commit"] and row["command"] for row in rows)
    return files


def test_committed_curves_back_the_pages():
    """Each committed curve has a row in the table of docs/results.md with its own numbers."""
    page = (ROOT / "docs" / "results.md").read_text()
    files = results("hopper_*.csv") | results("halfcheetah_*.csv")
    assert len(files) == 4
    for path, rows in files.items():
        assert list(rows[0]) == COLUMNS
        script = path.stem.partition("_")[2]
        for seed in {row["seed"] for row in rows}:
            runs = [row for row in rows if row["seed"] == seed]
            task, returns = runs[0]["command"].split()[2], [float(row["return"]) for row in runs]
            numbers = f"{max(returns):.0f} | {sum(returns[-5:]) / 5:.0f} | {returns[-1]:.0f}"
            facts = f"{runs[-1]['step']} | {runs[-1]['SPS']} | {runs[-1]['commit']}"
            assert f"| {task} | {script} | {seed} | {numbers} | {facts} |" in page, path


def test_committed_goal_maps_back_the_pages():
    """The table of docs/results.md is the one that the command prints from the committed runs, of S2AC but one."""
    ((_, rows),) = results("truth_presets.csv").items()
    assert len(rows) == 2 * 4 * 3 + 1 + 3 * 2
    table = truth.table(rows, 400)
    assert table in (ROOT / "docs" / "results.md").read_text()
    best = re.search(r"^\| MultiGoal-v0 \| 2.5 \| optimum \| +\| \d+ \| [\d /]+ \| (\d+) \|", table, re.M)[1]
    four = [row for row in rows if row["env_id"] == "multigoal:MultiGoal-v0"]
    errors, least = [], []
    names = {"meow": "MEow with its mixture", "sac": "SAC", "sql": "SQL", "meow-flow": "the paper's flow"}
    for algorithm, name in names.items():
        own = [row for row in four if row["algorithm"] == algorithm]
        errors.append(f"{name} {sum(float(row['rmse']) for row in own) / len(own):.1f}")
        least.append(f"{name} {min(int(g) for row in own for g in row['goals'].split(' / ')) / 4:.0f}%")
    readme = (ROOT / "README.md").read_text()
    assert f"| {', '.join(errors)} |" in readme and f"| {', '.join(least)}; the optimum {best}% |" in readme
    assert all(row["reached"] == "400" for row in four if row["algorithm"] == "sql")


def test_committed_temperatures_back_the_pages(monkeypatch):
    """Each algorithm's rows in docs/results.md are those of the committed runs; the optimum's take long to compute."""
    ((_, rows),) = results("truth.csv").items()
    best = dict(goals="0", length=0, v_origin=0, rmse=0, kl=0, hits="", seconds="") | {"return": 0}
    monkeypatch.setattr(truth, "optimum", lambda *args: (best, None))
    page = (ROOT / "docs" / "results.md").read_text()
    lines = [line for line in truth.table(rows, 400).splitlines() if "| optimum |" not in line]
    assert len(lines) == 2 + 2 * 4 * 7 and len(rows) == 3 * 2 * 4 * 7
    assert not [line for line in lines if line not in page]
    cells, warm = truth.cells_of(rows), (2.5, 10.0, 20.0)
    four, three = ({a: runs for (name, a), runs in cells.items() if name == env_id} for env_id in truth.multigoal.MAPS)

    def column(cell, key):  # algorithm -> a value a seed
        return {name: np.array([float(row[key]) for row in runs]) for name, runs in cell.items()}

    least = []  # KL of MEow and of the next best, means over the seeds, in each cell but those of alpha 1
    for cell in [*(four[a] for a in warm), *(three[a] for a in warm)]:
        kl = column(cell, "kl")
        ours = kl.pop("meow")
        assert all(ours.max() < other.min() for other in kl.values())  # every seed before every seed
        least.append((ours.mean(), min(other.mean() for other in kl.values())))
    ours, others = zip(*least, strict=True)
    assert f"KL {min(ours):.2f} to {max(ours):.2f}, the next best of each" in page
    assert f"cell {min(others):.2f} to {max(others):.2f}." in page
    text = f"MEow with its mixture {min(ours):.2f} to {max(ours):.2f}, the next best of SAC, SQL, S²AC and the flow in"
    text += f" each cell {min(others):.2f} to {max(others):.2f}; at α 1 SAC or S²AC is closest"
    assert text in (ROOT / "README.md").read_text()
    for key, digits in (("rmse", 1), ("kl", 2)):
        means = [{name: x.mean() for name, x in column(four[a], key).items()} for a in warm]
        assert all(min(of, key=of.get) == "meow" for of in means)
        ours, sac_s = ([of[name] for of in means] for name in ("meow", "sac"))
        ours, sac_s = (f"{min(x):.{digits}f} to {max(x):.{digits}f}" for x in (ours, sac_s))
        assert f"{ours}, SAC {sac_s})" in page
    assert all(min((x.mean(), n) for n, x in column(three[a], "rmse").items())[1] == "meow" for a in warm)
    cold = [min((x.mean(), n) for n, x in column(cell[1.0], "kl").items())[1] for cell in (four, three)]
    assert cold == ["s2ac-phi-theta", "sac"]
    offs = {name: [] for name in ("s2ac-phi-theta", "sac")}  # of V at the origin, a mean a cell
    for cell in cells.values():
        v, best = column(cell, "v_origin"), column(cell, "optimum_origin")
        for name, off in offs.items():
            off.append(np.abs(v[name] - best[name]).mean())
    text = (f"{min(x):.1f} to {max(x):.1f}" for x in offs.values())
    assert "off by {}, SAC by {})".format(*text) in page
    assert sum(x < y for x, y in zip(*offs.values(), strict=True)) == 8
    hot = {
        name: sorted(float(row["kl"]) for row in rows if row["algorithm"] == name and float(row["alpha"]) >= 10)
        for name in offs
    }
    theirs, sac_s = hot["s2ac-phi-theta"], hot["sac"]
    text = f"(KL {theirs[0]:.2f}\n  to {theirs[-3]:.2f}, SAC {sac_s[0]:.2f} to {sac_s[-1]:.2f}, of single runs)"
    assert f"{text} but for seed 3 at α 20 ({theirs[-1]:.2f} and {theirs[-2]:.2f})" in page


def test_goal_map_command(tmp_path, capsys):
    """Trains and measures what is not in the CSV yet, prints and draws; a second call only draws the same."""
    short = dict(alphas=(1.0,), seeds=(1,), total_timesteps=1040, episodes=5, jobs=2, folder=tmp_path / "runs")
    env_ids = truth.multigoal.MAPS[1:]
    args = truth.Args(("meow-flow",), env_ids, csv=tmp_path / "truth.csv", png=tmp_path / "truth.png", **short)
    assert truth.main(args) == 0
    table = capsys.readouterr().out
    assert all(f"| MultiGoalAsymmetric-v0 | 1 | {row} |" in table for row in ("meow-flow | 1", "optimum | "))
    assert (tmp_path / "truth.png").stat().st_size > 20_000
    written = (tmp_path / "truth.csv").read_text()
    for row in csv.DictReader(written.splitlines()):
        assert row["alpha"] == "1.0" and float(row["kl"]) > 0.1 and int(row["reached_after_hit"]) <= int(row["hits"])
    picture = (tmp_path / "truth.png").read_bytes()
    shutil.rmtree(args.folder)
    assert truth.main(args) == 0 and (tmp_path / "truth.png").read_bytes() == picture
    assert (tmp_path / "truth.csv").read_text() == written and "to go" not in capsys.readouterr().out
    assert truth.main(dataclasses.replace(args, total_timesteps=2000)) == 2
    assert "has a run of 1040 steps and 5 rollouts; expected 2000 and 5: give another --csv" in capsys.readouterr().err


def test_goal_map_run_of_two_of_s2acs_variants(tmp_path, monkeypatch):
    """One run, measured by particles and by the sampler: two rows, with the same training and other actions."""
    policies = []

    def measure(agent, trained, env, episodes):
        policies.append(agent)
        rollouts = truth.multigoal.rollout(env, truth.multigoal.policy_of(agent), episodes)
        v, kl = np.zeros((57, 57)), np.ones(6)
        return truth.multigoal.Measured(rollouts, None, v, v, 1.0, 2.0, 3.0, kl)

    monkeypatch.setattr(truth.multigoal, "measure", measure)
    (tmp_path / "runs").mkdir()
    args = truth.Args(total_timesteps=1040, episodes=5, folder=tmp_path / "runs", csv=tmp_path / "truth.csv")
    names, map_id = ["s2ac-phi-theta", "s2ac-phi-theta-psi"], truth.multigoal.MAPS[1]
    rows = truth.run(args, names, map_id, 10.0, 1)
    assert [row["algorithm"] for row in rows] == names and rows[0]["command"] == rows[1]["command"]
    assert "--variant phi-theta-psi" in rows[0]["command"]
    by_particles, by_sampler = policies
    obs = torch.zeros(400, 2)
    assert by_particles.sampler is None and by_sampler.sampler is not None
    for p, q in zip(by_particles.parameters(), by_sampler.parameters(), strict=False):
        assert torch.equal(p, q)
    assert all(truth.saved(args, name, map_id, 10.0, 1).is_file() for name in names)
    torch.manual_seed(0)
    particles, sampled = (agent.sample(obs).std(0).mean() for agent in policies)
    assert abs(particles - sampled) > 0.05  # after 20 updates the two are not alike yet


def test_goal_map_command_reports_what_fails(tmp_path, capsys):
    """A temperature that the script refuses: said with the script's own line, exit code 1, nothing in the CSV."""
    cell = dict(env_ids=truth.multigoal.MAPS[:1], alphas=(-1.0,), seeds=(1,), folder=tmp_path / "runs")
    assert truth.main(truth.Args(("sac",), csv=tmp_path / "truth.csv", **cell)) == 1
    printed = capsys.readouterr().err
    assert "alpha" in printed and "failed: sac multigoal:MultiGoal-v0 alpha -1 seed 1" in printed
    assert not (tmp_path / "truth.csv").exists()


@pytest.mark.parametrize("name", [name for name, (_, make) in densities.TRIALS.items() if make])
def test_densities_have_the_moments_of_their_samples(name):
    """pi integrates to 1, and mean and second moments by quadrature are those of act's draws; V's parameters last."""
    flags, make = densities.TRIALS[name]
    torch.manual_seed(0)
    agent = make(2, 2, meow.parse_args(["--env-id", densities.MAP, *flags.split()]))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    value, own = list(agent.value.parameters()), list(agent.parameters())
    assert all(a is b for a, b in zip(value, own[-len(value) :], strict=True))
    state = torch.tensor([1.0, -2.0])
    assert abs(densities.mass(agent, [state.tolist()], 300) - 1) < 5e-3
    with torch.no_grad():
        draws = agent.act(state.repeat(20_000, 1), agent.act_noise(20_000, torch.Generator().manual_seed(0)))
        middles = (torch.arange(300) + 0.5) / 150 - 1
        actions = torch.cartesian_prod(middles, middles)
        density = agent.log_prob(state.expand(len(actions), -1), actions).exp() * 4 / len(actions)
    for moment in (lambda a: a, lambda a: a**2, lambda a: a[:, :1] * a[:, 1:]):
        torch.testing.assert_close(density @ moment(actions), moment(draws).mean(0), atol=0.02, rtol=0)
    assert agent.sample(state[None], deterministic=True).abs().max() <= 1


def test_densities_command(tmp_path, capfd):
    """Trains a flag's trial and another density's, draws; runs nothing twice; names what fails or is not there."""
    short = "--total-timesteps 320 --learning-starts 160 --buffer-size 1000 --batch-size 32 --eval-episodes 1"
    trials = ("mixture of 2", "splines, 2 transforms")
    args = densities.Args(trials, (1,), short, 5, folder=tmp_path / "runs", csv=tmp_path / "densities.csv")
    assert densities.main(args) == 0
    rows = list(csv.DictReader(args.csv.open()))
    assert {row["trial"] for row in rows} == set(trials) and all(abs(float(row["mass"]) - 1) < 0.01 for row in rows)
    assert int(rows[0]["parameters"]) != int(rows[1]["parameters"])
    capfd.readouterr()
    assert densities.main(dataclasses.replace(args, png=tmp_path / "densities.png")) == 0
    assert "to go" not in capfd.readouterr().out and (tmp_path / "densities.png").stat().st_size > 10_000
    assert densities.main(dataclasses.replace(args, seeds=(2,), trials=trials[:1], flags="--alpha -1")) == 1
    printed = capfd.readouterr().err
    assert "--alpha -1" in printed and "failed: mixture of 2, seed 2" in printed
    assert len(args.csv.read_text().splitlines()) == 3
    assert densities.main(densities.Args(("mixture of 3",))) == 2 and "mixture of 3" in capfd.readouterr().err


def test_committed_densities_back_the_pages():
    """The table is the one that the command prints; no trial's seed 1 has a smaller error than the preset's; and the
    claims about hidden weights from zero."""
    ((_, rows),) = results("densities.csv").items()
    assert densities.table(rows, 400) in (ROOT / "docs" / "results.md").read_text()
    rmse = {(row["trial"], row["seed"]): float(row["rmse"]) for row in rows}
    first = {trial: x for (trial, seed), x in rmse.items() if seed == "1"}
    assert set(first) == set(densities.TRIALS) and min(first, key=first.get) == "mixture of 8, the preset"
    goals = {(row["trial"], row["seed"]): [int(n) / 4 for n in row["goals"].split(" / ")] for row in rows}  # %
    ((_, presets),) = results("truth_presets.csv").items()
    presets = [row for row in presets if (row["env_id"], row["algorithm"]) == ("multigoal:MultiGoal-v0", "meow")]
    assert max(float(row["rmse"]) for row in presets) == 4.1 and len(presets) == 5
    zeros = [key for key in goals if key[0] == "mixture, hidden weights from zero"]
    assert len(zeros) == 5 and all(4.7 <= rmse[key] <= 9.6 for key in zeros)
    assert sum(min(goals[key]) <= 3 for key in zeros) == 2
    flows = [key for key in goals if key[0] == "flow, hidden weights not from zero"]
    assert len(flows) == 5 and all(min(goals[key]) > 0 and 18 <= rmse[key] <= 22 for key in flows)
    assert sum(min(goals[key]) < 6 for key in flows) == 4
    assert [min(goals["flow, the paper's", seed]) for seed in "123"] == [0, 0, 0]


def test_entropy_study(tmp_path, monkeypatch, capsys):
    """The paper's Gaussian is found with the paper's bandwidth, not with 0.1; quadrature agrees with closed forms."""
    paper = entropy.targets()[0]
    assert abs(entropy.quadrature(paper.log_p) - paper.entropy()) < 1e-3
    monkeypatch.setattr(entropy, "targets", lambda: [paper])
    monkeypatch.setattr(entropy, "SWEEPS", {"sigma": (0.1, 5.0)})
    monkeypatch.setattr(entropy, "PAPER", entropy.PAPER | dict(steps=100))
    monkeypatch.chdir(tmp_path)
    entropy.main(entropy.Args(csv=tmp_path / "entropy.csv", png=None, seeds=3))
    narrow, paper = csv.DictReader((tmp_path / "entropy.csv").open())
    assert abs(float(paper["estimate"]) - float(paper["exact"])) < 0.1 and abs(float(paper["exact"]) - 3.413) < 1e-3
    assert abs(float(narrow["estimate"]) - float(narrow["exact"])) > 0.5
    assert "| paper | 3.413 |" in capsys.readouterr().out


def test_committed_entropy_study_backs_the_pages():
    ((_, rows),) = results("entropy.csv").items()
    assert entropy.table(rows) in (ROOT / "docs" / "results.md").read_text()
    (paper,) = [r for r in rows if (r["target"], r["varied"], r["sigma"]) == ("paper", "sigma", "5.0")]
    assert paper["seeds"] == "10" and abs(float(paper["estimate"]) - 3.413) < 0.1


def test_acting_command(tmp_path, capsys):
    """A row an agent with both ways of choosing; the relative times are to SAC's."""
    acting.main(acting.Args(("Hopper-v4",), calls=2, repeats=1, csv=tmp_path / "acting.csv"))
    rows = list(csv.DictReader((tmp_path / "acting.csv").open()))
    assert [row["algorithm"] for row in rows][:2] == ["SAC", "SQL"] and len(rows) == 5
    assert all(float(row["draw_ms"]) > 0 and float(row["evaluation_ms"]) > 0 for row in rows)
    sac_row = rows[0]
    expected = f"| Hopper-v4 | SAC | {sac_row['draw_ms']} | 1.00 | {sac_row['evaluation_ms']} | 1.00 | 1 |"
    assert expected in capsys.readouterr().out


def test_committed_acting_times_back_the_pages():
    ((_, rows),) = results("acting.csv").items()
    assert acting.table(rows) in (ROOT / "docs" / "results.md").read_text()
    times = {(row["env_id"], row["algorithm"]): float(row["evaluation_ms"]) for row in rows}
    assert all(times[env_id, "S2AC phi-theta-psi"] < 1.3 * times[env_id, "SAC"] for env_id in acting.SIZES)


def test_committed_comparison_with_sb3_backs_the_pages(capsys):
    page = (ROOT / "docs" / "results.md").read_text()
    for _, rows in results("sb3_*.csv").items():
        sb3.report(rows, (1, 2, 3))
        printed = capsys.readouterr().out
        assert all(line in page for line in printed.splitlines()), printed


def test_sb3_report(capsys):
    """Means of the last five evaluations and Welch's interval, by its formula."""
    scores = {sb3.LIBRARIES[0]: [10.0, 12.0, 14.0], sb3.LIBRARIES[1]: [9.0, 12.0, 18.0]}
    curves = [(library, seed, x) for library, xs in scores.items() for seed, x in enumerate(xs, 1)]
    rows = [
        {"library": library, "seed": str(seed), "step": k, "return": x if k else -1000.0, "SPS": "nan" if k else "7"}
        for library, seed, x in curves
        for k in range(6)
    ]
    sb3.report(rows, (1, 2, 3))
    printed = capsys.readouterr().out
    assert "this project: 12.0 +- 2.0 over 3 seeds (10.0 / 12.0 / 14.0), 7 SPS" in printed
    a, b = 2.0**2 / 3, 21.0 / 3  # squared standard errors
    dof = (a + b) ** 2 / (a**2 / 2 + b**2 / 2)
    half = scipy.stats.t.ppf(0.975, dof) * (a + b) ** 0.5
    assert f"difference -1.0, 95% interval {-1 - half:.1f} to {-1 + half:.1f}" in printed


@pytest.fixture
def sb3_runs(monkeypatch) -> list:
    """In place of the runs of the comparison with Stable-Baselines3, which take minutes: what they would return."""
    started = []

    def run(args: sb3.Args, library: str, seed: int) -> list[dict]:
        started.append((library, seed))
        if seed == 2 and library == sb3.LIBRARIES[1]:
            raise RuntimeError("no memory")
        steps = [*range(args.eval_frequency, args.total_timesteps, args.eval_frequency), args.total_timesteps]
        command = f"run {len(started)} --total-timesteps {args.total_timesteps}"
        about = dict(library=library, SPS=50.0, seed=seed, command=command)
        return [{"step": step, "return": step / 100 + seed} | about for step in steps]

    monkeypatch.setattr(sb3, "run", run)
    monkeypatch.setattr(sb3, "ProcessPoolExecutor", lambda jobs, context: ThreadPoolExecutor(1))
    return started


def test_sb3_command_reports_what_fails(tmp_path, sb3_runs, capsys):
    """The others are kept and compared, and only what failed is run again; exit code 1."""
    args = sb3.Args(total_timesteps=10_000, seeds=(1, 2, 3), csv=tmp_path / "sb3.csv")
    assert sb3.main(args) == 1 and len(sb3_runs) == 6
    out, err = capsys.readouterr()
    assert "Stable-Baselines3, seed 2 failed: no memory" in err and "failed: Stable-Baselines3, seed 2\n" in err
    assert out.count("over 2 seeds") == 2 and len(list(csv.DictReader(args.csv.open()))) == 10
    assert sb3.main(args) == 1 and sb3_runs[6:] == [(sb3.LIBRARIES[1], 2)]
    assert sb3.main(dataclasses.replace(args, seeds=(1, 3))) == 0 and len(sb3_runs) == 7


def test_sb3_command_compares_runs_of_the_wanted_length(tmp_path, sb3_runs, capsys):
    """Shorter and longer runs in the same CSV answer nothing and count for nothing."""
    args = sb3.Args(seeds=(1, 3), eval_frequency=1_000, csv=tmp_path / "sb3.csv")
    for total, mean in 2 * ((10_000, "82.0"), (5_500, "41.0"), (20_000, "182.0")):
        assert sb3.main(dataclasses.replace(args, total_timesteps=total)) == 0
        assert capsys.readouterr().out.count(f"{mean} +- 1.4 over 2 seeds") == 2
    assert len(sb3_runs) == 12


def test_estimation_command(tmp_path, monkeypatch):
    """On an untrained agent: MEow's own policy has no error, SQL's bias is negative and shrinks, SAC's is negative."""
    monkeypatch.chdir(tmp_path)
    flags = dict(total_timesteps=200, learning_starts=100, batch_size=32, eval_frequency=1000, eval_episodes=1)
    (run_dir,) = meow.train(meow.Args(env_id="Pendulum-v1", buffer_size=1000, alpha=0.5, **flags))
    paths = dict(csv=tmp_path / "new" / "e.csv", png=tmp_path / "e.png")
    estimation.main(
        estimation.Args(run_dir / "checkpoint.pt", **paths, states=2, repeats=8, initial_repeats=16, actor_steps=50)
    )
    rows = list(csv.DictReader(paths["csv"].open()))
    assert len(rows) == 2 * 3 * 11 and paths["png"].stat().st_size > 10_000
    for row in rows:
        bias, spread, checked = float(row["bias"]), float(row["spread"]), float(row["quadrature_bias"])
        assert abs(bias - checked) < 1e-3  # the closed form is the integral
        if row["estimator"] == estimation.OWN:
            assert abs(bias) < 1e-3 and spread < 1e-3
        else:
            assert bias < 3 * spread / (8 * 2048 / int(row["M"])) ** 0.5
    uniform = [row for row in rows if row["estimator"] == estimation.UNIFORM]
    for states in ("initial", "visited"):
        bias = {int(row["M"]): float(row["bias"]) for row in uniform if row["states"] == states}
        assert bias[1] < -0.1 and abs(bias[1024]) < 0.1 * abs(bias[1])


def test_committed_estimation_backs_the_pages():
    """Each quoted pair `bias / spread` is in the CSV of its task."""
    page = (ROOT / "docs" / "results.md").read_text()
    for _, rows in results("estimation_*.csv").items():
        for states in ("initial", "visited"):
            for name in (estimation.UNIFORM, estimation.GAUSSIAN, estimation.OWN):
                chosen = {int(r["M"]): r for r in rows if (r["states"], r["estimator"]) == (states, name)}
                cells = (f"{float(chosen[m]['bias']):.2f} / {float(chosen[m]['spread']):.2f}" for m in (1, 16, 1024))
                env_id = rows[0]["env_id"].partition(":")[2] or rows[0]["env_id"]
                assert f"| {env_id} | {states} | {name} | {' | '.join(cells)} |" in page


def test_pages_say_how_much_the_scripts_differ():
    page = (ROOT / "docs" / "algorithms.md").read_text()
    for other in ("sac", "sql"):
        command = [
            sys.executable,
            "-m",
            "benchmark.compare",
            f"{other}_continuous_action.py",
            "meow_continuous_action.py",
        ]
        printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout
        (total,) = (line for line in printed.splitlines() if line.startswith("total"))
        assert total in page


def test_committed_rates_back_the_pages():
    page = (ROOT / "docs" / "parallel.md").read_text()
    for _, rows in results("brax_rates.csv").items():
        for r in rows:
            assert f"| {r['algo']} | {r['num_envs']} | {r['robot_steps_per_s']} | {r['updates_per_s']} |" in page
        assert {(r["algo"], r["num_envs"]) for r in rows} == {
            (a, n) for a in ("meow", "sac") for n in "16 64 256 512".split()
        }


def test_committed_robots_on_a_gpu_back_the_page():
    page = (ROOT / "docs" / "parallel.md").read_text()
    (curves,) = results("brax_ant_gpu.csv").values()
    runs = sorted({(r["algo"], r["seed"]) for r in curves})
    assert runs == [(algo, seed) for algo in ("meow", "sac") for seed in "12"]
    for algo, seed in runs:
        rows = [r for r in curves if (r["algo"], r["seed"]) == (algo, seed)]
        first, last = (r for r in rows if r["curve"] == "evaluation")
        cells = [first["return"], first["length"], last["return"], last["length"]]
        cells.append([r["return"] for r in rows if r["curve"] == "training"][-1])
        assert "| ".join(["", algo + " ", seed + " ", *(f"{float(x):.0f} " for x in cells)]) in page
        assert last["robot_step"] == str(6000 * 1024) and "dirty" not in last["commit"]
    (rates,) = results("brax_rates_gpu.csv").values()
    for r in rates:
        shares = " | ".join(f"{float(r[f'{part}_share']):.1%}" for part in ("simulator", "policy", "update", "buffer"))
        row = f"| {r['algo']} | {r['num_envs']} | {r['robot_steps_per_s']} | {r['updates_per_s']} | {shares} |"
        assert row in page and "H100" in r["machine"]


def test_soak(tmp_path):
    """A row a checkpoint of a short run; memory that grows, files left open and slow checkpoints are found."""
    flags = (
        "--env-id Pendulum-v1 --total-timesteps 400 --learning-starts 100 --batch-size 32 --checkpoint-frequency 100"
    )
    command = [sys.executable, "-m", "benchmark.soak", "--settled=200", f"--csv={tmp_path / 'soak.csv'}"]
    done = subprocess.run([*command, f"--flags={flags} --device cpu"], cwd=ROOT, capture_output=True, text=True)
    assert "memory" in done.stdout and done.returncode in (0, 1), done.stderr  # so short a run may well fail the shares
    rows = list(csv.DictReader((tmp_path / "soak.csv").open()))
    assert [int(row["step"]) for row in rows if row["file"] == "checkpoint.pt"] == [0, 100, 200, 300, 400]
    assert all(0 < float(row["checkpoint_s"]) < float(row["wall_s"]) for row in rows)
    good = [
        dict(step=s, rss_mb=500.0, open_files=20, checkpoint_s=0.005, wall_s=s / 100 + 0.1) for s in range(0, 900, 100)
    ]
    assert soak.verdict(good, 200)[1]
    for fault in (dict(rss_mb=510.0), dict(open_files=21), dict(checkpoint_s=0.2)):
        assert not soak.verdict([*good, good[-1] | fault], 200)[1]
    assert soak.verdict([good[0] | dict(rss_mb=400.0, open_files=19), *good], 200)[1]  # before it has settled


def test_speed_chart(tmp_path):
    """A bar for each line of the table, also where only batch, environments or seeds differ, of that line's turns."""
    plain = dict(env_id="T", threads=1, implementation="MEow", mode="compiled", batch_size=256, num_envs=1, num_seeds=1)
    changes = [dict(batch_size=4096), dict(num_envs=4), dict(num_seeds=5), dict(threads=2, num_seeds=5)]
    rows = [plain | x | dict(loop_sps=100 * k + n) for n in range(3) for k, x in enumerate(changes)]
    speed.chart(rows, tmp_path / "chart.png")
    axis = plt.gcf().axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        f"MEow, {change}, compiled" for change in ("batch 4096", "envs 4", "seeds 5")
    ]
    bars = {round(bar.get_y() + bar.get_height() / 2, 1): bar.get_width() for bar in axis.patches}
    assert bars == {0.0: 1, 1.0: 101, 2.0: 201, 2.4: 301} and (tmp_path / "chart.png").stat().st_size > 10_000
    plt.close()


def test_committed_soak_backs_the_pages():
    (_, rows) = next(iter(results("soak.csv").items()))
    rows = [{k: x if k in ("file", "commit", "command") else json.loads(x) for k, x in row.items()} for row in rows]
    assert rows[-1]["step"] == 200_000 and len({row["step"] for row in rows if row["file"] == "checkpoint.pt"}) == 41
    line, well = soak.verdict(rows, 20_000)
    page = " ".join((ROOT / "docs" / "running.md").read_text().replace(",", "").split())
    numbers = re.findall(r"[\d.]+", line)  # checkpoints, seconds, memory, step, growth, files, files, share, longest
    assert well and len(numbers) == 9
    for text in (f"{numbers[0]} checkpoints in {numbers[1]} s: resident memory {numbers[2]} MB", f"{numbers[4]}% more"):
        assert text in page
    assert f"{numbers[5]} open files throughout {numbers[7]}% of the time for checkpoints" in page
    assert f"the longest {numbers[8]} s" in page
