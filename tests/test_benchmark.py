"""The measuring commands run as documented, and the docs have the tables that they print from the committed results."""

import csv
import dataclasses
import functools
import re
import shutil
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path

import gymnasium as gym
import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats
import torch

import benchmark
import meow_continuous_action as meow
import meow_mixture_continuous_action as mixture
from benchmark import acting, densities, entropy, estimation, export, sb3, speed, truth, write_csv
from numerics import action_grid

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
    run_dir = meow.train(meow.Args("Hopper-v4", buffer_size=1000, seed=3, device="cpu", compile="off", **flags))
    export.main(export.Args([run_dir], tmp_path / "new" / "curve.csv", tmp_path / "curve.png"))
    with open(tmp_path / "new" / "curve.csv", newline="") as f:
        rows = list(csv.DictReader(f))
    assert list(rows[0]) == COLUMNS
    assert [row["step"] for row in rows] == ["60", "120"] and {row["seed"] for row in rows} == {"3"}
    agent, args = meow.load_agent(run_dir / "checkpoint.pt")
    returns, _ = meow.evaluate(agent, [meow.make_env("Hopper-v4")], args)
    assert abs(float(rows[-1]["return"]) - returns.mean()) < 0.01
    assert (tmp_path / "curve.png").stat().st_size > 10_000


def test_paper_curve():
    curve = dict(export.reference("Hopper-v5"))
    assert curve[30_000] == 327.8 and len(curve) == 50


def test_committed_results_say_how_they_were_made():
    """Each row has a clean commit and a command."""
    for path in (ROOT / "benchmark" / "results").glob("*.csv"):
        rows = list(csv.DictReader(path.open()))
        if "commit" in rows[0]:
            assert all(row["commit"] and "dirty" not in row["commit"] and row["command"] for row in rows), path


def test_tables_in_the_docs_are_those_of_the_committed_results(monkeypatch):
    """A table of a page with the head of one that a command prints has no row that the command does not print."""
    best = dict(goals="0", length=0, v_origin=0, rmse=0, kl=0, hits="", seconds="") | {"return": 0}
    monkeypatch.setattr(truth, "optimum", lambda *args: (best, None))  # takes long to compute, and is not looked at
    results = ROOT / "benchmark" / "results"
    rows = {path.name: list(csv.DictReader(path.open())) for path in results.glob("*.csv")}
    tables = [truth.table(rows["truth.csv"], 400), truth.table(rows["truth_presets.csv"], 400)]
    tables += [densities.table(rows["densities.csv"], 400), entropy.table(rows["entropy.csv"])]
    tables += [speed.table(rows[name]) for name in rows if name.startswith("speed")]
    tables.append(acting.table(rows["acting.csv"]))
    printed = {}  # head -> rows
    for head, _, *lines in map(str.splitlines, tables):
        printed.setdefault(head, set()).update(lines)
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for head, _, *lines in map(str.splitlines, re.findall(r"(?:^\|.*\n)+", page.read_text(), re.M)):
            stale = set(lines) - printed.get(head, set(lines))
            assert not [line for line in stale if "| optimum |" not in line], page


@pytest.fixture
def here(monkeypatch) -> None:
    """Each job of a command runs at once and in this process."""

    class Here:
        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, *arguments) -> Future:
            future = Future()
            try:
                future.set_result(function(*arguments))
            except (Exception, SystemExit) as e:
                future.set_exception(e)
            return future

    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", Here)


@pytest.fixture
def measured(monkeypatch) -> list:
    """The agents that are measured, by seven steps and without the optimum."""
    agents = []

    def measure(agent, trained, env, episodes):
        agents.append(agent)
        short = gym.make(trained.env_id, max_episode_steps=7)
        rollouts = truth.multigoal.rollout(short, truth.multigoal.policy_of(agent), episodes)
        v, kl = np.zeros((57, 57)), np.ones(6)
        return truth.multigoal.Measured(rollouts, None, v, v, 1.0, 2.0, 3.0, kl)

    monkeypatch.setattr(truth.multigoal, "measure", measure)
    return agents


def test_goal_map_command(tmp_path, here, capsys):
    """Trains and measures what is not in the CSV yet, prints and draws; a second call only draws the same."""
    short = dict(alphas=(1.0,), seeds=(1,), total_timesteps=1040, episodes=5, jobs=2, folder=tmp_path / "runs")
    env_ids = truth.multigoal.MAPS[1:]
    args = truth.Args(("meow",), env_ids, csv=tmp_path / "truth.csv", png=tmp_path / "truth.png", **short)
    assert truth.main(args) == 0
    table = capsys.readouterr().out
    assert all(f"| MultiGoalAsymmetric-v0 | 1 | {row} |" in table for row in ("meow | 1", "optimum | "))
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


def test_goal_map_run_of_two_of_s2acs_variants(tmp_path, measured):
    """One run, measured by particles and by the sampler: two rows, with the same training and other actions."""
    (tmp_path / "runs").mkdir()
    args = truth.Args(total_timesteps=1040, episodes=5, folder=tmp_path / "runs", csv=tmp_path / "truth.csv")
    names, map_id = ["s2ac-phi-theta", "s2ac-phi-theta-psi"], truth.multigoal.MAPS[1]
    rows = truth.run(args, names, map_id, 10.0, 1)
    assert [row["algorithm"] for row in rows] == names and rows[0]["command"] == rows[1]["command"]
    assert "--variant phi-theta-psi" in rows[0]["command"]
    by_particles, by_sampler = measured
    assert by_particles.sampler is None and by_sampler.sampler is not None
    for p, q in zip(by_particles.parameters(), by_sampler.parameters(), strict=False):
        assert torch.equal(p, q)
    assert all(truth.saved(args, name, map_id, 10.0, 1).is_file() for name in names)
    actions = [truth.multigoal.policy_of(agent)(np.zeros((5, 2), np.float32)) for agent in measured]
    torch.manual_seed(0)
    sampled = by_sampler.sampler(torch.cat([torch.zeros(5, 2), torch.randn(5, 2)], -1)).tanh()
    assert np.array_equal(actions[1], sampled.detach().numpy()) and np.abs(actions[0] - actions[1]).max() > 0.05


def test_goal_map_command_reports_what_fails(tmp_path, here, capsys):
    """A temperature that the script refuses: said with the script's own line, exit code 1, nothing in the CSV."""
    cell = dict(env_ids=truth.multigoal.MAPS[:1], alphas=(-1.0,), seeds=(1,), folder=tmp_path / "runs")
    assert truth.main(truth.Args(("sac",), csv=tmp_path / "truth.csv", **cell)) == 1
    printed = capsys.readouterr().err
    assert "alpha" in printed and "failed: sac multigoal:MultiGoal-v0 alpha -1 seed 1" in printed
    assert not (tmp_path / "truth.csv").exists()


OWN = [name for name, (script, _, make) in densities.TRIALS.items() if make is not script.Agent and "wide" not in name]


@pytest.mark.parametrize("name", OWN)
def test_densities_have_the_moments_of_their_samples(name):
    """pi integrates to 1, and mean and second moments by quadrature are those of the draws; V's parameters last."""
    script, flags, make = densities.TRIALS[name]
    torch.manual_seed(0)
    agent = make(2, 2, script.parse_args(["--env-id", densities.MAP, *flags.split()]))
    with torch.no_grad():
        for parameter in agent.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    value, own = list(agent.value.parameters()), list(agent.parameters())
    assert all(a is b for a, b in zip(value, own[-len(value) :], strict=True))
    state = torch.tensor([1.0, -2.0])
    actions, weights = (x.float() for x in action_grid(2, 301))  # sees the mass of a flow near |a| = 1
    with torch.no_grad():
        draws = agent.sample(state.repeat(20_000, 1))
        density = weights * agent.log_prob(state.expand(len(actions), -1), actions).exp()
    assert abs(density.sum() - 1) < 5e-3
    for moment in (lambda a: a, lambda a: a**2, lambda a: a[:, :1] * a[:, 1:]):
        torch.testing.assert_close(density @ moment(actions), moment(draws).mean(0), atol=0.02, rtol=0)
    assert agent.sample(state[None], deterministic=True).abs().max() <= 1


def test_densities_command(tmp_path, monkeypatch, here, measured, capsys):
    """Trains a flag's trial and another density's, draws; runs nothing twice; names what fails or is not there."""
    monkeypatch.setattr(densities, "mass", functools.partial(densities.mass, cells=50))
    monkeypatch.setattr(mixture, "Agent", mixture.Agent)  # to be restored
    monkeypatch.chdir(tmp_path)
    short = "--total-timesteps 200 --learning-starts 160 --buffer-size 1000 --batch-size 32 --eval-episodes 1"
    trials = ("mixture of 2", "splines, 2 transforms")
    args = densities.Args(trials, (1,), short, 5, folder=tmp_path / "runs", csv=tmp_path / "densities.csv")
    assert densities.main(args) == 0
    rows = list(csv.DictReader(args.csv.open()))
    assert {row["trial"] for row in rows} == set(trials) and all(abs(float(row["mass"]) - 1) < 0.01 for row in rows)
    assert int(rows[0]["parameters"]) != int(rows[1]["parameters"])
    capsys.readouterr()
    assert densities.main(dataclasses.replace(args, png=tmp_path / "densities.png")) == 0
    assert "to go" not in capsys.readouterr().out and (tmp_path / "densities.png").stat().st_size > 10_000
    assert densities.main(dataclasses.replace(args, seeds=(2,), trials=trials[:1], flags="--alpha -1")) == 1
    printed = capsys.readouterr().err
    assert "--alpha -1" in printed and "failed: mixture of 2, seed 2" in printed
    assert len(args.csv.read_text().splitlines()) == 3
    assert densities.main(densities.Args(("mixture of 3",))) == 2 and "mixture of 3" in capsys.readouterr().err


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


def test_acting_command(tmp_path, capsys):
    """A row an agent with both ways of choosing; the relative times are to SAC's."""
    acting.main(acting.Args(("Hopper-v4",), calls=2, repeats=1, csv=tmp_path / "acting.csv"))
    rows = list(csv.DictReader((tmp_path / "acting.csv").open()))
    assert [row["algorithm"] for row in rows][:2] == ["SAC", "SQL"] and len(rows) == 5
    assert all(float(row["draw_ms"]) > 0 and float(row["evaluation_ms"]) > 0 for row in rows)
    sac_row = rows[0]
    expected = f"| Hopper-v4 | SAC | {sac_row['draw_ms']} | 1.00 | {sac_row['evaluation_ms']} | 1.00 | 1 |"
    assert expected in capsys.readouterr().out


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
def sb3_runs(monkeypatch, here) -> list:
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
    return started


def test_sb3_command_reports_what_fails(tmp_path, sb3_runs, capsys):
    """The others are kept and compared, and only what failed is run again; exit code 1."""
    args = sb3.Args(total_timesteps=10_000, seeds=(1, 2, 3), csv=tmp_path / "sb3.csv")
    assert sb3.main(args) == 1 and len(sb3_runs) == 6
    out, err = capsys.readouterr()
    assert "seed 2 failed: RuntimeError: no memory" in err and "failed: Stable-Baselines3, seed 2\n" in err
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
    flags |= dict(buffer_size=1000, alpha=0.5, device="cpu", compile="off")
    run_dir = meow.train(meow.Args("Pendulum-v1", **flags))
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
        assert bias[1] < -0.02 and abs(bias[1024]) < 0.1 * abs(bias[1])


def test_speed_command(tmp_path):
    """Every implementation in turn: a row a turn, in the CSV and in the table. An update is in each step of the loop,
    and of two processes the steps are added up."""
    command = [sys.executable, "-m", "benchmark.speed", "--env-ids=Hopper-v4", "--implementations", "MEow", "SB3 SAC"]
    command += ["--modes=eager", "--threads=1", "--turns=2", "--seconds=0.1", "--processes", "2"]
    command += [f"--csv={tmp_path / 'new' / 'speed.csv'}", f"--png={tmp_path / 'speed.png'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader((tmp_path / "new" / "speed.csv").open()))
    assert [(row["implementation"], row["processes"]) for row in rows] == [("MEow", "2"), ("SB3 SAC", "1")] * 2
    assert all(0 < float(row[part]) < 1e5 for row in rows for part in speed.PARTS)
    for row in rows:
        assert 1e3 * int(row["processes"]) / float(row["loop_sps"]) > 0.1 * float(row["update_ms"])
    assert len(re.findall(r"\| Hopper-v4 \| 1 \| ", done.stdout)) == 2
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_speed_table():
    """Medians and ratios of known numbers."""
    rows = [
        dict(env_id="T", threads=1, implementation=name, mode="compiled", batch_size=256, num_envs=1, processes=1)
        | dict(turn=k, update_ms=2.0 + k, act_ms=0.5, loop_sps=sps + k)
        for k in range(3)
        for name, sps in (("MEow", 300.0), ("SAC", 200.0))
    ]
    lines = speed.table(rows).splitlines()[2:]
    assert lines[0] == "| T | 1 | MEow | compiled | 3.00 (2.00–4.00) | 0.500 (0.500–0.500) | 301 (300–302) | 1.00 |"
    assert lines[1].endswith(f"| 201 (200–202) | {301 / 201:.2f} |")


def test_speed_chart(tmp_path):
    """A bar for each line of the table, also where only batch, environments or processes differ, of its turns."""
    plain = dict(env_id="T", threads=1, implementation="MEow", mode="compiled", batch_size=256, num_envs=1, processes=1)
    changes = [dict(batch_size=4096), dict(num_envs=4), dict(processes=5), dict(threads=2, processes=5)]
    rows = [plain | x | dict(loop_sps=100 * k + n) for n in range(3) for k, x in enumerate(changes)]
    speed.chart(rows, tmp_path / "chart.png")
    axis = plt.gcf().axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == [
        f"MEow, {change}, compiled" for change in ("batch 4096", "envs 4", "processes 5")
    ]
    bars = {round(bar.get_y() + bar.get_height() / 2, 1): bar.get_width() for bar in axis.patches}
    assert bars == {0.0: 1, 1.0: 101, 2.0: 201, 2.4: 301} and (tmp_path / "chart.png").stat().st_size > 10_000
    plt.close()
