"""The goal maps, their optimum against the reference table, and the pictures."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import meow_continuous_action as meow
import multigoal
import s2ac_continuous_action as s2ac

ROOT = Path(__file__).resolve().parent.parent
FOUR, THREE = multigoal.MAPS


@pytest.mark.parametrize("env_id", multigoal.MAPS)
@pytest.mark.parametrize("flags", [{}, dict(obstacle=True, render_mode="rgb_array")])
def test_gymnasium_accepts_the_maps(env_id, flags):
    check_env(gym.make(env_id, **flags).unwrapped)


@pytest.mark.parametrize("env_id, horizon", [(FOUR, 1000), (THREE, 30)])
def test_horizon_is_an_argument_of_make(env_id, horizon):
    for env, length in ((gym.make(env_id), horizon), (gym.make(env_id, max_episode_steps=7), 7)):
        env.reset(seed=0)
        for t in range(1, length + 1):
            _, _, terminated, truncated, info = env.step(np.zeros(2))
            assert not terminated and truncated == (t == length) and info["goal"] == -1


def test_starts_and_seeds():
    env = gym.make(FOUR)
    starts = np.array([env.reset(seed=seed)[0] for seed in range(500)])
    assert (env.reset(seed=3)[0] == starts[3]).all() and starts.dtype == np.float32
    assert starts.std() == pytest.approx(0.1, rel=0.1) and abs(starts.mean()) < 0.02
    assert (gym.make(THREE).reset(seed=5)[0] == 0).all()


def test_transitions_by_hand():
    env = gym.make(FOUR).unwrapped
    env.reset(seed=0)
    for x, action, next_x, reward, goal in (
        ((0, 0), (0.5, 0), (0.5, 0), -30 * 0.25 - 4.5**2, -1),
        ((0, 3.5), (0, 1), (0, 4.5), -30 - 0.25 + 10, 2),
        ((-3.5, 0.1), (-0.6, -0.1), (-4.1, 0.0), -30 * 0.37 - 0.81 + 10, 1),
        ((6.8, 6.8), (1, 1), (7, 7), -60 - (4 + 49), -1),  # stopped by the edge; the effort counts in full
        ((0, -4), (0, 0), (0, -4), -1, -1),  # at the radius is not yet inside
        ((0, 0), (5, 0), (1, 0), -30 - 16, -1),  # an action out of the box counts as its nearest inside
    ):
        env.x = np.array(x, dtype=np.float64)
        obs, r, terminated, truncated, info = env.step(np.array(action))
        np.testing.assert_allclose(obs, next_x, atol=1e-6)
        assert r == pytest.approx(reward) and info["goal"] == goal and terminated == (goal >= 0) and not truncated
    env = gym.make(THREE).unwrapped
    assert env.transition(np.array([-3.6, 2.5]), np.array([0, 0.2]))[2] == 1  # 0.5 is its radius
    assert env.transition(np.array([-3.6, 2.0]), np.array([0, 0.2]))[2] == -1


@pytest.mark.parametrize(
    "env_id, x, action, hit",
    [
        (FOUR, (0, 2.5), (0, 1), True),
        (FOUR, (0, 2.5), (0, 0.4), False),
        (FOUR, (1.6, 2.5), (0, 1), False),
        (FOUR, (1.4, 2.5), (0.3, 1), False),  # passes the end of the wall
        (FOUR, (0, 3.5), (0, -1), True),  # from above
        (THREE, (-0.5, 0.5), (-1, 1), True),
        (THREE, (-0.5, 0.5), (1, -1), False),
        (THREE, (-2.5, 0), (0, 1), False),
    ],
)
def test_wall(env_id, x, action, hit):
    env = gym.make(env_id, obstacle=True).unwrapped
    env.reset(seed=0)
    env.x = np.array(x, dtype=np.float64)
    obs, reward, _, _, info = env.step(np.array(action, dtype=np.float64))
    assert info["hit"] == hit
    np.testing.assert_allclose(obs, x if hit else np.add(x, action), atol=1e-6)
    without, _, _, hit_without = gym.make(env_id).unwrapped.transition(np.array(x), np.array(action))
    assert not hit_without and (without == np.add(x, action)).all()


# V*(0, 0), goals' shares (one standard error of the table's 400 rollouts is 0.025), return, length: the table of
# reference values in the project's notes; its rollouts start from N(0, 0.1^2) on both maps, without a horizon
TABLE = [
    (FOUR, 2.5, 0.9, -114.6, (107, 93, 98, 102), -130, 8.1, 1000),
    (THREE, 1.0, 0.8, -88.8, (165, 125, 110), -137, 12.8, 1000),
    (THREE, 10.0, 0.8, -74.8, (134, 132, 134), -324, 19.8, 400),
]


@pytest.mark.parametrize("env_id, alpha, gamma, v, goals, mean_return, length, episodes", TABLE)
def test_soft_value_iteration_against_the_table(env_id, alpha, gamma, v, goals, mean_return, length, episodes):
    """Within 1%, and within three standard errors where the rollouts themselves are less exact than that."""
    env = gym.make(env_id, max_episode_steps=1000, start_std=0.1)
    optimum = multigoal.soft_value_iteration(env, alpha, gamma)
    assert optimum.v(np.zeros((1, 2)))[0] == pytest.approx(v, rel=0.01)
    rng = np.random.default_rng(0)
    rollouts = multigoal.rollout(env, lambda obs: optimum.policy(obs, rng), episodes)
    assert (rollouts.goals >= 0).all()
    for values, expected in ((rollouts.returns, mean_return), (rollouts.lengths, length)):
        error = 3 * values.std() * (1 / episodes + 1 / 400) ** 0.5
        assert values.mean() == pytest.approx(expected, abs=max(0.01 * abs(expected), error))
    for goal, count in enumerate(goals):
        assert abs((rollouts.goals == goal).mean() - count / 400) < 3 * 0.025 * (1 + 400 / episodes) ** 0.5
    if env_id == FOUR:
        assert optimum.v(np.array([[2.5, 0.0]]))[0] == pytest.approx(-32.1, rel=0.01)


def test_optimum_is_symmetric_and_satisfies_the_soft_bellman_equation():
    """V(s) = alpha log int exp((r + gamma (1 - d) V(s')) / alpha) da with 200,000 random actions, off the grid."""
    env = gym.make(FOUR).unwrapped
    optimum = multigoal.optimum_of(FOUR, 2.5, 0.9)
    for image in (optimum.values[::-1], optimum.values[:, ::-1], optimum.values.T):
        np.testing.assert_allclose(optimum.values, image, atol=1e-2)
    rng = np.random.default_rng(0)
    actions = rng.uniform(-1, 1, (200_000, 2))
    for x in (np.array([0.1, -0.3]), np.array([2.4, 1.1]), np.array([-4.9, 6.0])):
        next_x, reward, goal, _ = env.transition(x, actions)
        q = reward + 0.9 * (goal < 0) * optimum.v(next_x)
        v = 2.5 * (np.log(np.exp((q - q.max()) / 2.5).mean() * 4) + q.max() / 2.5)
        assert optimum.v(x[None])[0] == pytest.approx(v, abs=0.5)


@pytest.mark.parametrize("env_id, alpha, gamma", [(FOUR, 2.5, 0.9), (THREE, 10.0, 0.8)])
def test_kl_divergence(env_id, alpha, gamma):
    """Of the optimal policy 0; of uniform actions E[-log 4 - (Q* - V*) / alpha], by other actions and no histogram."""
    env = gym.make(env_id).unwrapped
    optimum = multigoal.soft_value_iteration(env, alpha, gamma, states=29)
    rng = np.random.default_rng(0)
    states = np.array(multigoal.STATES[env_id][::3], dtype=float)
    assert np.abs(multigoal.kl_divergence(lambda obs: optimum.policy(obs, rng), optimum, states)).max() < 0.04
    kl = multigoal.kl_divergence(lambda obs: rng.uniform(-1, 1, obs.shape), optimum, states)
    actions = rng.uniform(-1, 1, (50_000, 2))
    for state, value in zip(states, kl, strict=True):
        next_x, reward, goal, _ = env.transition(state, actions)
        q = reward + gamma * (goal < 0) * optimum.v(next_x)
        expected = -np.log(4) - (q.mean() - optimum.v(state[None])[0]) / alpha
        assert abs(value - expected) < 4 * q.std() / alpha / 5_000**0.5 + 0.04


@pytest.mark.parametrize("variant", ["phi-theta", "phi-theta-psi"])
def test_repeats_have_the_law_of_the_policy(variant):
    """S2AC's many actions in one state from few draws: the moments of the actions that it samples one at a time."""
    torch.manual_seed(0)
    args = s2ac.Args(FOUR, alpha=0.05, svgd_step_size=0.02, variant=variant)
    agent = s2ac.S2AC(2, 2, args)
    policy = multigoal.policy_of(agent)
    repeats, obs = multigoal.repeats_of(agent, policy), np.tile(np.array([[1.0, -2.0]], np.float32), (2_003, 1))
    assert (repeats is policy) == (variant == "phi-theta-psi")
    one, many = policy(obs), repeats(obs)
    assert one.shape == many.shape == (2_003, 2) and len(np.unique(many, axis=0)) > 1_990
    for moment in (lambda a: a, np.square, lambda a: a.prod(1, keepdims=True)):
        a, b = moment(one), moment(many)
        assert (np.abs(a.mean(0) - b.mean(0)) < 5 * a.std(0) / 1_000**0.5).all()


def test_rollout_agrees_with_the_environment():
    """A fixed policy through gymnasium's step gives the same paths, returns and goals as the vectorised rollout."""
    env = gym.make(THREE, obstacle=True, max_episode_steps=12)

    def policy(obs):
        return np.stack([np.full(len(obs), -0.7), 0.6 - 0.1 * obs[:, 0]], -1)

    rollouts = multigoal.rollout(env, policy, 3)
    obs, _ = env.reset(seed=0)
    path, total, hits, done = [obs], 0.0, False, False
    while not done:
        obs, reward, terminated, truncated, info = env.step(policy(obs[None].astype(np.float32))[0])
        path, total, hits = [*path, obs], total + reward, hits or info["hit"]
        done = terminated or truncated
    np.testing.assert_allclose(rollouts.paths[0], path, atol=1e-5)
    assert rollouts.returns[0] == pytest.approx(total, rel=1e-6) and rollouts.lengths[0] == len(path) - 1
    assert rollouts.goals[0] == info["goal"] and rollouts.hits[0] == hits and hits


def test_measure_is_the_distance_to_the_optimum(monkeypatch):
    """Of the optimum itself with a constant error, and far off where it must not count: in goals and at the edge."""
    env, rng = gym.make(THREE), np.random.default_rng(0)
    best = multigoal.soft_value_iteration(env, 10.0, 0.8, states=29)
    monkeypatch.setattr(multigoal, "optimum_of", lambda *_: best)
    monkeypatch.setitem(multigoal.STATES, THREE, multigoal.STATES[THREE][:1])  # of the KL: one is enough

    def v(obs: torch.Tensor) -> torch.Tensor:
        x = obs.numpy().astype(float)
        away = (np.linalg.norm(x[:, None] - env.unwrapped.goals, axis=-1).min(-1) < 0.5) | (np.abs(x).max(-1) > 5.5)
        return torch.from_numpy((best.v(x) + 1e3 * away)[:, None] + [3.0, 5.0])

    agent = SimpleNamespace(v=v, sample=lambda obs: torch.from_numpy(best.policy(obs.numpy(), rng)))
    for flag, off in (({}, 3.0), (dict(clipped_double_q=False), 4.0)):
        trained = SimpleNamespace(env_id=THREE, alpha=10.0, gamma=0.8, **flag)
        found = multigoal.measure(agent, trained, env, 20)
        assert found.rmse == pytest.approx(off, abs=1e-3) and found.kl.mean() < 0.05
        assert found.v_origin - found.optimum_origin == pytest.approx(off, abs=1e-3)


def test_picture_of_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = dict(total_timesteps=240, learning_starts=104, batch_size=32, num_envs=8, eval_frequency=1000, alpha=10.0)
    flags |= dict(device="cpu", compile="off", eval_episodes=1)
    run_dir = meow.train(meow.Args(env_id=THREE, gamma=0.8, **flags))
    command = [sys.executable, str(ROOT / "multigoal.py"), "--checkpoint", str(run_dir / "checkpoint.pt")]
    done = subprocess.run([*command, "--episodes=40", "--obstacle"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "of 40" in done.stdout and "wall hit by" in done.stdout and "RMSE of V against V*" in done.stdout
    assert "optimum -74.8" in done.stdout
    assert (run_dir / "multigoal.png").stat().st_size > 20_000
    other = meow.train(meow.Args(env_id="Pendulum-v1", exp_name="other", **flags))
    for path, message in (
        (other / "checkpoint.pt", "was trained on Pendulum-v1; expected one of multigoal:MultiGoal-v0"),
        ("absent.pt", "absent.pt is not a checkpoint ([Errno 2]"),
        (run_dir / "args.json", "is not a checkpoint"),
    ):
        with pytest.raises(SystemExit) as e:
            multigoal.main(multigoal.Args(Path(path)))
        assert message in str(e.value)
