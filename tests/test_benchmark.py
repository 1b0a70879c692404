"""The commands that measure: speed and the studies, values against something independent."""

import collections
import csv
import functools
import json
import math
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.utils.tensorboard import SummaryWriter

import benchmark
import meow_continuous_action as meow
import multigoal
import s2ac_continuous_action as s2ac
from benchmark import UserError, colors, read_csv, run_missing, script_of, speed, write_csv
from benchmark.studies import densities, entropy, fit, goal_map_optimum, s2ac_actions, value_estimators
from numerics import action_grid

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmark" / "results"


def test_csv(tmp_path):
    """What a row lacks is empty; nothing lies beside the file; there are no rows where there is no file."""
    path = tmp_path / "new" / "table.csv"
    assert read_csv(path) == []
    write_csv(path, [dict(a=1), dict(a=2, b="x, y")])
    assert read_csv(path) == [dict(a="1", b=""), dict(a="2", b="x, y")]
    assert [file.name for file in path.parent.iterdir()] == ["table.csv"]


def test_what_is_missing_is_run_and_what_fails_is_said(tmp_path, capfd):
    """In other processes; a second call runs what failed alone."""
    path = tmp_path / "rows.csv"
    jobs = {("a", i): (json.dumps(dict(name="a", seed=i, value=i / 2)),) for i in range(3)} | {("b", 0): ("{",)}
    for calls in (4, 1):
        assert run_missing(json.loads, jobs, path, ("name", "seed"), 2) == 1
        assert sorted(row["value"] for row in read_csv(path)) == ["0.0", "0.5", "1.0"]
        out, err = capfd.readouterr()
        assert "JSONDecodeError" in err and "failed: b, 0" in err and len(out.splitlines()) == calls - 1
    del jobs["b", 0]
    assert run_missing(json.loads, jobs, path, ("name", "seed"), 2) == 0


def test_colours_of_algorithms_stay_and_others_differ():
    assert colors(["SAC", "x", "y"])["SAC"] == colors(["MEow", "SAC"])["SAC"]
    assert len(set(colors(["MEow", "SAC", *"abcdef"]).values())) == 8


def test_committed_results_say_how_they_were_made():
    """Each row has a clean commit and a command."""
    for path in RESULTS.glob("*.csv"):
        rows = list(csv.DictReader(path.open()))
        if "commit" in rows[0]:
            assert all(row["commit"] and "dirty" not in row["commit"] and row["command"] for row in rows), path


SHORT = "--total-timesteps 200 --learning-starts 160 --buffer-size 1000 --batch-size 32 --eval-episodes 1 --device cpu"


PAGES, START = "-entropy -landscapes -wall", dict(start=np.float32([[0, 1], [0, 1], [1, 0]]))


def test_goal_maps(tmp_path, monkeypatch, capsys):
    """Runs of two scripts are measured once each, against an optimum whose own row has no error; the page is drawn
    without the runs. What the density is, is read off the command."""
    map_id, mass = "multigoal:MultiGoalAsymmetric-v0", goal_map_optimum.mass
    monkeypatch.setattr(densities.mixture, "Agent", densities.mixture.Agent)  # to be restored
    commands = [script_of("meow")[0], script_of("densities")[0], "--density", "splines-2"]
    for command in (commands[:1], commands[1:]):
        flags = ["--env-id", map_id, "--seed", "2", "--alpha", "3", *SHORT.split()]
        done = subprocess.run([sys.executable, *command, *flags], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    paths = dict(csv=tmp_path / "new" / "optimum.csv", png=tmp_path / "page.png", episodes=5, jobs=2)
    monkeypatch.setattr(goal_map_optimum, "mass", lambda agent, states: mass(agent, states, 50))
    monkeypatch.setattr(goal_map_optimum, "POSITIONS", goal_map_optimum.POSITIONS[:4])
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", lambda *_, **__: ThreadPoolExecutor(1))  # with this mass
    assert goal_map_optimum.main(goal_map_optimum.Args((tmp_path / "runs",), **paths)) == 0
    rows = {row["algorithm"]: row for row in read_csv(paths["csv"])}
    (spline,) = (row for name, row in rows.items() if "density splines-2" in name)
    best = rows.pop("optimum")
    assert len(rows) == 2 and abs(float(spline["mass"]) - 1) < 0.01
    assert (best["seed"], best["q_rmse"], best["kl"], best["v_origin"]) == ("0", "0.0", "0.0", best["optimum_origin"])
    assert all(best[name] for name in ("commit", "machine", "command", "goals", "entropy"))
    for row in rows.values():
        assert int(row["reached_after_hit"]) <= int(row["hits"]) <= 5 and float(row["entropy"]) < math.log(4) + 0.05
        assert float(row["q_rmse"]) > 0 and float(row["q_maxima"]) > 0
        assert (row["env_id"], float(row["alpha"]), row["seed"], row["steps"]) == (map_id, 3.0, "2", "200")
        assert float(row["kl"]) > 0.1 and float(row["rmse"]) > 0 and int(row["reached"]) <= 5
    printed = capsys.readouterr().out
    (best,) = (line.split(" | ") for line in printed.splitlines() if "| optimum |" in line)
    page = "page-MultiGoalAsymmetric-v0"
    assert best[9:11] == ["0.0", "0.00"] and (tmp_path / f"{page}.png").stat().st_size > 20_000
    assert {file.name for file in tmp_path.glob("*.png")} == {f"{page}{x}.png" for x in ("", *PAGES.split())}

    for file in [*tmp_path.glob("*.png")]:
        file.unlink()
    for i, file in enumerate(tmp_path.glob("new/optimum/*_2.npz")):  # the arrays of two others, one with q^0, no wall
        np.savez(file, **{x: a for x, a in np.load(file).items() if x[:4] in ("v", "arr_")}, **[{}, START][i])
    assert goal_map_optimum.main(goal_map_optimum.Args(**paths)) == 0
    assert {file.name for file in tmp_path.glob("*.png")} == {f"{page}.png", f"{page}-start.png"}
    assert '"seconds"' not in capsys.readouterr().out


def test_measures_on_a_goal_map(tmp_path):
    """Entropies of uniform and of narrow draws, Q* plus a constant with the two maxima that it was made with, agents
    that walk into the wall; the start of S2AC is what was logged."""
    middles = (np.arange(33) + 0.5) * 2 / 33 - 1
    actions = np.stack(np.meshgrid(middles, middles, indexing="ij"), -1).reshape(-1, 2)
    peaks = np.square(actions[:, None] - [(0.5, 0.5), (-0.5, -0.2)]).sum(-1).min(-1)
    best = multigoal.SoftOptimum(middles, np.zeros((33, 33)), lambda obs: np.tile(-peaks, (len(obs), 1)), actions, 1.0)
    rng = np.random.default_rng(0)
    for policy, expected in (
        (lambda obs: rng.uniform(-1, 1, obs.shape), math.log(4)),
        (lambda obs: rng.normal(0.1, 0.08, obs.shape), 1 + math.log(2 * math.pi * 0.08**2)),
    ):
        entropies = np.array([multigoal.histogram(policy, best, np.zeros(2))[1]] * 4)
        rollouts = multigoal.rollout(gym.make(multigoal.MAPS[1]), policy, 5)
        row, q = dict(env_id=multigoal.MAPS[1], algorithm="a b", alpha=1.0, gamma=0.8, seed=1), best.q(np.zeros((6, 2)))
        record = functools.partial(goal_map_optimum.record, tmp_path / "a.csv", row, best)
        found = record(lambda obs: np.full(obs.shape, (-0.6, 0.6)), rollouts, best.values, q + 7, entropies, START)
        assert abs(found["entropy"] - expected) < 0.06 and found["q_rmse"] == 0 and found["q_maxima"] == 2
        assert (found["hits"], found["reached_after_hit"]) == (5, 0)
    assert np.isfinite(np.load(tmp_path / "a" / "a-b_MultiGoalAsymmetric-v0_1_1.npz")["hit"]).sum() == 5 * 2 * 31
    q = np.stack([actions.sum(-1), np.minimum(actions.sum(-1), 1.5), -abs(abs(actions[:, 0]) - 0.5)])
    counts = goal_map_optimum.maxima(q).sum((1, 2))  # a corner, a plateau there, two ridges
    assert counts.tolist() == [1, 1, 2] and goal_map_optimum.maxima(q)[0, 32, 32]
    assert goal_map_optimum.q_error(np.array([[1.0, 3], [0, 0]]), np.array([[0.0, 0], [5, 1]])) == 1.5

    with SummaryWriter(tmp_path / "run") as writer:
        for step, mean, log_sigma in ((100, 0.25, -1.0), (200, 0.5, -2.0)):
            writer.add_scalar("policy/mean_abs", mean, step)
            writer.add_scalar("policy/log_sigma", log_sigma, step)
    start = goal_map_optimum.start_of(tmp_path / "run")["start"]
    np.testing.assert_allclose(start, [[100, 200], [0.25, 0.5], [math.exp(-1), math.exp(-2)]], rtol=1e-6)


def test_labels_of_runs(tmp_path):
    """Temperature and batch are no part of the algorithm; S2AC's variant is, and a flag that makes another density."""
    for command, args, expected in (
        ("x/s2ac_continuous_action.py --variant phi --batch-size 32 --tau 0.01", dict(variant="phi"), "s2ac-phi"),
        ("sql_continuous_action.py --alpha 1 --batch-size 64 --total-timesteps 8000", {}, "sql"),
        ("meow_mixture_continuous_action.py --components 2", {}, "meow-mixture components 2"),
    ):
        args = dict(env_id="m", alpha=1, seed=3) | args
        (tmp_path / "args.json").write_text(json.dumps(dict(command=command, args=args)))
        assert goal_map_optimum.key_of(tmp_path) == (expected, "m", 1.0, 3)


@pytest.mark.parametrize("name", [name for name in densities.DENSITIES if "wide" not in name])
def test_densities_have_the_moments_of_their_samples(name):
    """pi integrates to 1, and mean and second moments by quadrature are those of the draws; V's parameters last."""
    torch.manual_seed(0)
    args = densities.mixture.parse_args(["--env-id", "multigoal:MultiGoal-v0", "--device", "cpu"])
    agent = densities.DENSITIES[name](2, 2, args)
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


def test_entropy_study(tmp_path, monkeypatch):
    """A row for each setting and number of steps, exact entropies by another way, and a page of pictures."""
    paper = entropy.targets()["paper"]
    assert abs(entropy.quadrature(paper) - paper.entropy()) < 1e-3
    monkeypatch.setattr(entropy, "STEPS", (10, 20))
    monkeypatch.setattr(entropy, "PARTICLES", (5, 10))
    monkeypatch.setattr(entropy, "PAPER", dict(particles=10, steps=20, sigma=5.0))
    entropy.main(entropy.Args(csv=tmp_path / "entropy.csv", png=tmp_path / "entropy.png", seeds=2))
    rows = read_csv(tmp_path / "entropy.csv")
    count = collections.Counter((row["target"], row["varied"]) for row in rows)
    assert count["paper", "grid"] == 4 == count["mixture of 8", "grid"] and count["paper", "sampler"] == 4
    assert count["variance 4", "sigma"] == 8 == count["paper", "sigma"] and (tmp_path / "entropy.png").stat().st_size
    exact = {row["target"]: float(row["exact"]) for row in rows}
    assert abs(exact["paper"] - 3.413) < 1e-3 and abs(exact["variance 1"] - 2.838) < 1e-3


@torch.no_grad()
def test_s2ac_actions(tmp_path, monkeypatch):
    """Each choice is what it says, and the Bellman error has the task's own reward and the particles' mean after it."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    agent = s2ac.S2AC(11, 3, args := s2ac.Args("Hopper-v4", variant="phi-theta-psi", eval_episodes=1, device="cpu"))
    obs, noise = torch.randn(6, 11), torch.randn(10, 6, 3)
    policy = agent.policy
    monkeypatch.setattr(agent, "policy", lambda obs, xi=None: policy(obs, noise[:, : len(obs)] if xi is None else xi))
    actions, log_prob = agent.policy(obs)
    chosen = {name: act(obs) for name, act in s2ac_actions.choices(agent).items()}
    q = agent.q(obs.expand(10, -1, -1), actions).amin(-1)
    torch.testing.assert_close(agent.q(obs, chosen["best"]).amin(-1), q.amax(0))
    fixed = agent.policy(obs, agent.fixed_xi[:, None].expand(-1, 6, -1))[0]
    torch.testing.assert_close(chosen["fixed"][4], max(fixed[:, 4], key=lambda a: agent.q(obs[4:5], a[None]).min()))
    assert torch.equal(chosen["likely"][2], actions[log_prob[:, 2].argmax(), 2])
    assert torch.equal(chosen["random"], actions[0]) and torch.equal(chosen["sampler"], agent.sample(obs, True))
    torch.testing.assert_close(chosen["mean"].atanh(), actions.atanh().mean(0), atol=1e-3, rtol=1e-3)
    state = s2ac_actions.visited_states(agent.sample, "Hopper-v4", 1)[0]
    env = s2ac.make_env("Hopper-v4")
    env.reset(), env.unwrapped.set_state(*state[1:])
    next_obs, reward, terminated, *_ = env.step(np.zeros(3, np.float32))
    zero, next_obs = torch.zeros(1, 3), torch.from_numpy(next_obs)[None]
    particles, log_prob = agent.policy(next_obs)
    v = np.mean([agent.q(next_obs, particles[i]).min() - args.alpha * log_prob[i] for i in range(args.svgd_particles)])
    expected = reward + args.gamma * (not terminated) * v - agent.q(torch.from_numpy(state[0])[None], zero).min().item()
    assert s2ac_actions.bellman_errors(agent, args, [state], zero)[0] == pytest.approx(expected, abs=1e-4)
    torch.save(
        dict(agent=agent.state_dict(), args=vars(args), algorithm=s2ac.__name__, sizes=(11, 3), run=(7,)), "a.pt"
    )
    monkeypatch.setattr(s2ac, "load_agent", lambda path: (agent, args))  # with the noise from above
    s2ac_actions.main(s2ac_actions.Args(("a.pt",), tmp_path / "a.csv", states=2))
    rows = read_csv(tmp_path / "a.csv")
    assert [*dict.fromkeys(row["choice"] for row in rows)] == [*chosen] and {row["step"] for row in rows} == {"7"}
    assert all(row["visited_by"] in ("random", row["choice"]) for row in rows) and len(rows) == 2 * len(chosen) - 1
    assert float(rows[0]["promised"]) == 0 and rows[0]["bellman"] == rows[0]["bellman_random"] != ""
    assert all(float(row["promised"]) >= 0 for row in rows if row["choice"] == "best")


def test_value_estimators(tmp_path, monkeypatch):
    """On an untrained agent: MEow's own policy has no error, SQL's bias is negative and shrinks, SAC's is negative."""
    monkeypatch.chdir(tmp_path)
    flags = dict(total_timesteps=200, learning_starts=100, batch_size=32, eval_frequency=1000, eval_episodes=1)
    flags |= dict(buffer_size=1000, alpha=0.5, device="cpu", compile="off")
    run = meow.train(meow.Args("Pendulum-v1", **flags))
    paths = dict(csv=tmp_path / "new" / "e.csv", png=tmp_path / "e.png")
    few = dict(states=2, repeats=8, initial_repeats=16, actor_steps=50)
    value_estimators.main(value_estimators.Args(run / "checkpoint.pt", **paths, **few))
    rows = read_csv(paths["csv"])
    assert len(rows) == 2 * 3 * 11 and paths["png"].stat().st_size > 10_000
    for row in rows:
        bias, spread = float(row["bias"]), float(row["spread"])
        if row["estimator"] == value_estimators.OWN:
            assert abs(bias) < 1e-3 and spread < 1e-3
        else:
            assert bias < 3 * spread / (8 * 2048 / int(row["M"])) ** 0.5
    uniform = [row for row in rows if row["estimator"] == value_estimators.UNIFORM]
    for states in ("initial", "visited"):
        bias = {int(row["M"]): float(row["bias"]) for row in uniform if row["states"] == states}
        assert bias[1] < -0.02 and abs(bias[1024]) < 0.1 * abs(bias[1])


def test_speed_command(tmp_path):
    """Every implementation in turn: a row a turn, in the CSV and in the table. An update is in each step of the loop,
    and of two processes the steps are added up."""
    command = [sys.executable, "-m", "benchmark.speed", "--env-ids=Hopper-v4", "--implementations", "MEow", "SB3 SAC"]
    command += ["--modes=eager", "--threads=1", "--turns=2", "--seconds=0.1", f"--csv={tmp_path / 'new' / 'speed.csv'}"]
    done = subprocess.run([*command, "--processes", "2"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = read_csv(tmp_path / "new" / "speed.csv")
    assert [(row["implementation"], row["processes"]) for row in rows] == [("MEow", "2"), ("SB3 SAC", "2")] * 2
    assert all(0 < float(row[part]) < 1e5 for row in rows for part in speed.PARTS)
    assert rows[0]["command"] == shlex.join(["python", *command[1:], "--processes", "2"]) and rows[0]["commit"]
    for row in rows:
        assert 1e3 * int(row["processes"]) / float(row["loop_sps"]) > 0.1 * float(row["update_ms"])
    assert len(re.findall(r"\| Hopper-v4 \| 1 \| .* \| 2 \| 2 \| ", done.stdout)) == 2


def test_speed_of_a_variant(monkeypatch):
    """The job's flags reach the script."""
    given = []
    monkeypatch.setattr(s2ac, "make_update", s2ac.make_update)  # to be restored
    monkeypatch.setattr(s2ac, "train", given.append)
    job = dict(env_id="Hopper-v4", device="cpu", mode="eager", batch_size=8, num_envs=4)
    speed.train_script(job | dict(implementation="S2AC phi"), None)
    assert (given[0].variant, given[0].batch_size, given[0].num_envs, given[0].compile) == ("phi", 8, 4, "off")


def test_speed_that_fails_says_why(capfd):
    job = dict(env_id="No-v0", threads=1, device="cpu", seconds=0.1, mode="eager", batch_size=8, num_envs=1)
    with pytest.raises(SystemExit, match="No-v0"):
        speed.measure([job | dict(implementation="SAC", processes=1)], 1)


@pytest.mark.parametrize("task", ["Hopper", "HalfCheetah", "Walker2d", "Ant", "Humanoid"])
def test_states_of_observations(task):
    """A state that is set from its observation, where no velocity is clipped, goes on as the one that was observed."""
    one, other = (meow.make_env(f"{task}-v4") for _ in range(2))
    obs, rng = one.reset(seed=1)[0], np.random.default_rng(0)
    for _ in range(15):
        obs = one.step(rng.uniform(-0.2, 0.2, one.action_space.shape).astype(np.float32))[0]
    fit.set_state(other, obs)
    model, action = one.unwrapped.model, np.full(one.action_space.shape, 0.3, np.float32)
    (mine, mine_reward), (theirs, their_reward) = other.step(action)[:2], one.step(action)[:2]
    known = model.nq + model.nv - 2
    np.testing.assert_allclose(mine[:known], theirs[:known], atol=1e-2)
    assert mine_reward == pytest.approx(their_reward, abs=1e-2)


def test_soft_returns():
    """Rewards of 2 until the end after 3 steps or the horizon, an entropy of 4 nats, in closed form."""

    class Task(gym.Env):
        observation_space = gym.spaces.Box(-1, 1, (2,))

        def __init__(self, end):
            self.left = end

        def step(self, action):
            self.left -= 1
            return np.zeros(2, np.float32), 2.0, self.left == 0, False, {}

    agent = SimpleNamespace(sample=lambda obs: torch.zeros(len(obs), 1), log_prob=lambda obs, a: torch.full((2,), -4.0))
    found = fit.soft_returns([Task(3), Task(99)], agent, 0.5, 0.9, torch.zeros(2, 1), 5)
    g = 0.9 ** np.arange(6)
    expected = [2 * g[:3].sum() + 2 * g[1:3].sum(), 2 * g[:5].sum() + 2 * g[1:6].sum()]
    np.testing.assert_allclose(found, expected)


def test_fit_of_a_finished_run_is_refused(tmp_path):
    with pytest.raises(UserError, match="no buffer.bin; expected a run that was stopped"):
        fit.main(fit.Args((tmp_path,), tmp_path / "fit.csv"))
    assert not any(tmp_path.iterdir())
