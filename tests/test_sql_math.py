"""Soft Q-learning's estimator, Stein direction, sampler and update against computations that share no code."""

import copy

import numpy as np
import pytest
import torch

import numerics
import sql_continuous_action as sql
from numerics import action_grid, check_score, float64, random_batch, update_of


def with_known_q(agent: sql.SQL, function) -> sql.SQL:
    """The agent with Q_1 = Q_2 = a given function of the action, (..., D) -> (...)."""

    def q(obs, action):
        return function(action)[..., None].expand(*action.shape[:-1], 2)

    agent.q = q
    return agent


def train_sampler(function, action_dim: int, steps: int = 3000, batch: int = 8) -> torch.Tensor:
    """Actions (20000, D) of a sampler trained by the script's own direction and chain rule, alpha = 1."""
    torch.manual_seed(0)
    agent = with_known_q(sql.SQL(1, action_dim, sql.Args(alpha=1.0)), function)
    optimizer = torch.optim.Adam(agent.sampler.parameters(), lr=1e-3)
    obs = torch.zeros(batch, 1)
    for _ in range(steps):
        with torch.no_grad():
            fixed = agent.particles(obs, torch.randn(16, batch, action_dim))
        updated = agent.particles(obs, torch.randn(16, batch, action_dim))
        phi = sql.stein_direction(fixed, sql.score(agent.q, obs, fixed, 1.0), updated.detach())
        optimizer.zero_grad()
        updated.backward(-phi / phi[..., 0].numel())
        optimizer.step()
    with torch.no_grad():
        return agent.sample(torch.zeros(20_000, 1))


@pytest.mark.parametrize("action_dim", [1, 2, 3, 6])
def test_sampler_of_a_flat_q_is_uniform(action_dim):
    """E [a^2] is 1/3; without the tanh's log-determinant before the squash it would be 0.20 or 0.57 and more."""
    actions = train_sampler(lambda action: 0 * action.sum(-1), action_dim, steps=1500)
    second = actions.square().mean(0)
    assert 0.31 < second.mean() < 0.36, second
    assert actions.mean(0).abs().max() < 0.1


def test_sampler_of_a_bimodal_q_has_both_modes():
    """Histogram of the samples against exp(Q / alpha) / Z: total variation under 0.15."""

    def bimodal(action):
        return torch.logaddexp(-40 * (action[..., 0] - 0.5) ** 2, -40 * (action[..., 0] + 0.5) ** 2)

    actions = train_sampler(bimodal, 1)[:, 0].numpy()
    edges = np.linspace(-1, 1, 41)
    middles = np.linspace(-1, 1, 4001)
    density = np.exp(-40 * (middles - 0.5) ** 2) + np.exp(-40 * (middles + 0.5) ** 2)
    truth = np.histogram(middles, edges, weights=density)[0]
    drawn = np.histogram(actions, edges)[0] / len(actions)
    assert 0.5 * np.abs(drawn - truth / truth.sum()).sum() < 0.15
    assert 0.4 < (actions > 0).mean() < 0.6


def test_stein_direction_against_loops():
    """Equation (6) state by state and pair by pair, with autograd's gradient of the kernel."""
    torch.manual_seed(0)
    fixed, score, updated = torch.randn(5, 3, 2), torch.randn(5, 3, 2), torch.randn(7, 3, 2)
    phi = sql.stein_direction(fixed, score, updated)
    for b in range(3):
        pairs = sorted(float((x - y).square().sum()) for x in fixed[:, b] for y in updated[:, b])
        h = max(pairs[(len(pairs) - 1) // 2] / np.log(6), 1e-3)
        for j in range(7):
            expected = torch.zeros(2)
            for i in range(5):
                x = fixed[i, b].clone().requires_grad_()
                k = torch.exp(-(x - updated[j, b]).square().sum() / h)
                (gradient,) = torch.autograd.grad(k, x)
                expected += (k.detach() * score[i, b] + gradient) / 5
            torch.testing.assert_close(phi[j, b], expected, rtol=1e-4, atol=1e-5)


def test_equal_particles_have_a_finite_direction():
    zero = torch.zeros(4, 2, 3)
    assert torch.equal(sql.stein_direction(zero, zero + 1, zero), zero + 1)


def test_score_against_finite_differences():
    torch.manual_seed(0)
    agent = sql.SQL(4, 2, sql.Args(alpha=0.5)).double()
    check_score(sql, agent)


@pytest.mark.parametrize("action_dim, n", [(1, 4001), (2, 401)])
@torch.no_grad()
def test_estimator_converges_to_quadrature_from_below(action_dim, n):
    """Its mean is under V by Jensen's inequality, less so as M grows, and its limit is the integral."""
    torch.manual_seed(0)
    alpha = 0.2

    def q(action):
        return torch.sin(3 * action).sum(-1) + action.prod(-1)

    points, weights = action_grid(action_dim, n)
    soft_value = alpha * torch.logsumexp(q(points) / alpha + weights.log(), 0)
    bias, spread = [], []
    for m in (1, 4, 16, 64, 256, 1024):
        actions = torch.rand(m, 4000, action_dim, dtype=torch.float64) * 2 - 1
        estimate = sql.importance_sampled_value(q(actions), alpha, action_dim)  # (4000,)
        bias.append((estimate.mean() - soft_value).item())
        spread.append(estimate.std().item())
    assert all(b < 0 for b in bias) and bias == sorted(bias) and spread == sorted(spread, reverse=True)
    assert bias[0] < -0.1 and abs(bias[-1]) < 0.003 and spread[-1] < 0.03
    agent = with_known_q(sql.SQL(3, action_dim, sql.Args(alpha=alpha)), q)
    estimate = agent.v(torch.randn(50, 3, dtype=torch.float64), samples=4096)
    torch.testing.assert_close(estimate.mean().double(), soft_value, rtol=0, atol=0.005)
    assert estimate.shape == (50, 2)


def test_deterministic_action_is_the_best_of_the_samplers():
    torch.manual_seed(0)
    agent = sql.SQL(4, 2, sql.Args())
    obs = torch.randn(6, 4)
    action = agent.sample(obs, deterministic=True)
    torch.manual_seed(5)
    assert torch.equal(action, agent.sample(obs, deterministic=True))
    for s, a in zip(obs, action, strict=True):
        candidates = torch.stack([agent.sampler(torch.cat([s, xi])).tanh() for xi in agent.fixed_xi])
        q = agent.q(s.expand(16, -1), candidates).min(-1).values
        torch.testing.assert_close(a, candidates[q.argmax()])
    draws = agent.sample(obs[:1].expand(100, -1))
    assert draws.shape == (100, 2) and draws.std(0).min() > 1e-3


@float64()
def test_update_against_plain_pytorch():
    """Five updates equal a textbook loop, on copies of the nets and with the same noise."""
    flags = dict(value_samples=5, particles=4, batch_size=32, device="cpu", compile="off")
    args = sql.Args(alpha=0.3, gamma=0.9, tau=0.1, **flags)
    torch.manual_seed(0)
    agent = sql.SQL(6, 2, args)
    reference, target = copy.deepcopy(agent), copy.deepcopy(agent.qf)
    q_optimizer = torch.optim.Adam(reference.qf.parameters(), lr=args.learning_rate)
    sampler_optimizer = torch.optim.Adam(reference.sampler.parameters(), lr=args.learning_rate)
    step, learner = update_of(sql, agent, args)
    for n in range(5):
        batch = random_batch(sql, 32, 6, 2)
        torch.manual_seed(n)
        metrics = step(batch)
        torch.manual_seed(n)
        actions, xis = torch.rand(5, 32, 2) * 2 - 1, torch.randn(8, 32, 2)
        with torch.no_grad():
            next_q = [[net(torch.cat([batch.next_obs, a], 1))[:, 0] for net in target] for a in actions]
            q = torch.stack([torch.minimum(*heads) for heads in next_q])  # (5, B)
            next_v = 0.3 * ((q / 0.3).exp().mean(0).log() + 2 * np.log(2))
            y = torch.where(batch.terminations[:, 0] == 1, batch.rewards[:, 0], batch.rewards[:, 0] + 0.9 * next_v)
        expected = numerics.critic_step(reference, q_optimizer, batch, y)
        u = torch.stack([reference.sampler(torch.cat([batch.obs, xi], -1)) for xi in xis])
        fixed, updated = u[:4].detach(), u[4:]
        phi = sql.stein_direction(fixed, sql.score(reference.q, batch.obs, fixed, 0.3), updated.detach())
        sampler_optimizer.zero_grad()
        (-(phi * updated).sum(-1).mean()).backward()
        sampler_optimizer.step()
        numerics.polyak(reference.qf, target, 0.1)
        torch.testing.assert_close(metrics, torch.stack([*expected, phi.norm(dim=-1).mean()]))
    assert sql.METRICS == (*numerics.CRITIC, "stein_norm")
    numerics.assert_same_parameters((agent, reference), (learner["target"], target))
