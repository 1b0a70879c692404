"""MEow+'s densities, values, statistics and update against computations that share no code with them."""

import copy
import itertools

import numpy as np
import pytest
import torch

import meow_plus_continuous_action as plus
import numerics
from numerics import action_grid, over_grid, random_batch, randomize, update_of


def random_agent(obs_dim: int, action_dim: int, **flags) -> plus.MEowPlus:
    """An agent in float64 with every parameter and statistic drawn at random, none as it was initialised."""
    torch.manual_seed(0)
    args = plus.Args(log_sigma_min=-2.0, log_sigma_max=-1.0, **flags)
    agent = randomize(plus.MEowPlus(obs_dim, action_dim, args).double())
    agent.mean.normal_()
    agent.variance.uniform_(0.5, 3.0)
    agent.value.alpha.fill_(0.4)
    return agent


def standardized(agent: plus.MEowPlus, obs: torch.Tensor) -> torch.Tensor:
    return (obs - agent.mean[:-1]) / agent.variance[:-1].sqrt()


@pytest.mark.parametrize("action_dim, n", [(1, 4001), (2, 241)])
@torch.no_grad()
def test_soft_value_is_the_integral(action_dim, n):
    """V_i(s) = alpha log int exp(Q_i(s, a) / alpha) da, both heads, and int pi(a|s) da = 1."""
    agent = random_agent(4, action_dim)
    points, weights = action_grid(action_dim, n)
    for obs in torch.randn(3, 4, dtype=torch.float64):
        q = over_grid(agent.q, obs, points)  # (n^D, 2)
        integral = 0.4 * torch.logsumexp(q / 0.4 + weights.log()[:, None], 0)  # (2,)
        v = agent.v(obs[None])[0]
        assert abs(v[0] - v[1]) > 1e-3  # two different heads
        torch.testing.assert_close(v, integral, rtol=1e-4, atol=0)
        torch.testing.assert_close((q - v) / 0.4, over_grid(agent.log_prob, obs, points)[:, None].expand(-1, 2))
    numerics.check_density(agent, action_dim, n)


@pytest.mark.parametrize("action_dim", [1, 2, 3, 8, 17])
def test_log_prob_jacobian(action_dim):
    """log pi of a sample = log N(u) - log |det d a / d u|, with autograd's Jacobian; u = 0 is the mode's action."""
    agent = random_agent(5, action_dim)
    obs = torch.randn(16, 5, dtype=torch.float64)

    def flow(u, s):
        s = standardized(agent, s)
        z = agent.value.log_sigma(s).exp() * u
        for coupling in agent.couplings:
            z = z + (1 - coupling.mask) * coupling.net(torch.cat([coupling.mask * z, s], -1))
        return torch.tanh(z)

    torch.manual_seed(1)
    action = agent.sample(obs)
    torch.manual_seed(1)
    u = torch.randn(16, action_dim, dtype=torch.float64)
    torch.testing.assert_close(flow(u, obs), action)
    torch.testing.assert_close(flow(torch.zeros_like(u), obs), agent.sample(obs, deterministic=True))
    jacobian = torch.func.vmap(torch.func.jacrev(lambda u, s: flow(u[None], s[None])[0]))(u, obs)
    expected = torch.distributions.Normal(0, 1).log_prob(u).sum(-1) - torch.linalg.slogdet(jacobian).logabsdet
    inside = action.abs().amax(-1) < 1 - 1e-5  # beyond, actions are clamped
    assert inside.sum() > 8
    torch.testing.assert_close(agent.log_prob(obs, action)[inside], expected[inside], rtol=0, atol=1e-7)


def test_nets_of_the_state():
    """sigma: O-64-64-D, shifts: O-256-256-1, LayerNorm, orthogonal hidden weights, zero weights at the end."""
    value = plus.MEowPlus(11, 3, plus.Args()).value
    for net, hidden, out in [(value.sigma_net, 64, 3)] + [(b, 256, 1) for b in value.shift_nets]:
        shapes = [tuple(linear.weight.shape) for linear in net.linears]
        assert shapes == [(hidden, 11), (hidden, hidden), (out, hidden)]
        assert all(isinstance(norm, torch.nn.LayerNorm) for norm in net.norms)
        weight = net.linears[1].weight
        torch.testing.assert_close(weight @ weight.T, torch.eye(hidden), atol=1e-5, rtol=0)
        assert (net.linears[2].weight == 0).all()


@torch.no_grad()
def test_statistics_are_those_of_all_batches():
    """Of the observations and of the rewards; later the weights of the batches fall by 1 / 1000."""
    agent = plus.MEowPlus(3, 2, plus.Args(alpha=0.5)).double()
    batches = [random_batch(plus, 16, 3, 2) for _ in range(30)]
    scales, middles = torch.tensor([1.0, 0.1, 30.0]), torch.tensor([0.0, 500.0, -20.0])
    batches = [b._replace(obs=b.obs * scales + middles, rewards=3 * b.rewards - 7) for b in batches]
    for batch in batches:
        agent.observe(batch)
    obs, rewards = (np.concatenate([getattr(b, name) for b in batches]) for name in ("obs", "rewards"))
    np.testing.assert_allclose(agent.mean, [*obs.mean(0), rewards.mean()])
    np.testing.assert_allclose(agent.variance, [*obs.var(0), rewards.var()])
    np.testing.assert_allclose(agent.value.alpha, 0.5 * np.sqrt((rewards**2).mean()))
    expected = (batches[0].obs.numpy() - obs.mean(0)) / obs.std(0)
    np.testing.assert_allclose(agent.standardize(batches[0].obs).numpy(), expected)
    assert agent.standardize(torch.full((1, 3), 1e9)).abs().max() == 10

    agent.batches.fill_(5_000)
    old = agent.mean.clone()
    agent.observe(batches[0])
    new = torch.cat([batches[0].obs, batches[0].rewards], -1).mean(0)
    torch.testing.assert_close(agent.mean, 0.999 * old + 0.001 * new)


@pytest.mark.parametrize("kappa", [2.0, 1e9])
def test_update_against_plain_pytorch(kappa):
    """Five updates equal a textbook loop that weighs transition by transition, from log pi and y."""
    args = plus.Args(alpha=0.4, kappa=kappa, gamma=0.9, tau=0.1, max_grad_norm=0.5, dropout=0.0, batch_size=64)
    agent = random_agent(6, 2, alpha=0.4, kappa=kappa)
    reference, target = copy.deepcopy(agent), copy.deepcopy(agent)
    policy = [*reference.couplings.parameters(), *reference.value.sigma_net.parameters()]
    groups = [(policy, 3e-4), (reference.value.shift_nets.parameters(), 1e-3)]
    optimizer = torch.optim.Adam([dict(params=[*params], lr=lr) for params, lr in groups])
    left_out, pulled = [], 0
    update, learner = update_of(plus, agent, args)
    for _ in range(5):
        batch = random_batch(plus, 64, 6, 2)
        stats = update(batch)
        for each in (reference, target):
            each.observe(batch)  # held by test_statistics
        with torch.no_grad():
            v, next_v = reference.v(batch.obs), target.v(batch.next_obs).min(-1).values
            y = batch.rewards[:, 0] + torch.where(batch.terminations[:, 0] == 1, 0.0, 0.9 * next_v)
            q, log_prob = reference.q(batch.obs, batch.actions), reference.log_prob(batch.obs, batch.actions)
            depth = kappa * agent.value.alpha
            weights = torch.ones(64, 2, dtype=torch.float64)
            for k, i in itertools.product(range(64), (0, 1)):
                if log_prob[k] < -kappa:
                    too_low = y[k] < v[k, i] - depth
                    weights[k, i] = 0.0 if too_low else min(1.0, depth / abs(q[k, i] - y[k]))
        q = reference.q(batch.obs, batch.actions)
        losses = [(weights[:, i] * (q[:, i] - y) ** 2).mean() for i in (0, 1)]
        optimizer.zero_grad()
        ((losses[0] + losses[1]) / 2).backward()
        norm = torch.nn.utils.clip_grad_norm_(reference.parameters(), 0.5)
        optimizer.step()
        numerics.polyak(reference.value, target.value, 0.1)
        left_out.append((weights == 0).double().mean())
        pulled += ((0 < weights) & (weights < 1)).sum()
        expected = [(losses[0] + losses[1]) / 2, *losses, *q.mean(0), y.mean(), left_out[-1], norm]
        torch.testing.assert_close(stats, torch.stack(expected).detach(), check_dtype=False, rtol=1e-6, atol=1e-7)
    assert plus.METRICS == (*numerics.CRITIC[:-1], "left_out", "grad_norm")
    assert (0.05 < min(left_out) and pulled > 10) if kappa == 2 else max(left_out) == pulled == 0
    numerics.assert_same_parameters((agent, reference), (learner["target"], target.value), rtol=1e-9, atol=1e-12)


def test_value_needs_neither_couplings_nor_actions():
    """The target holds the sigma-net and the two shift nets alone, takes alpha from the agent, and V is V'."""
    agent = random_agent(11, 3)
    target = update_of(plus, agent, plus.Args())[1]["target"]
    assert {name.split(".")[0] for name, _ in target.named_parameters()} == {"sigma_net", "shift_nets"}
    obs = torch.randn(8, 11, dtype=torch.float64)
    before = agent.v(obs)
    with torch.no_grad():
        for p in agent.couplings.parameters():
            p.normal_()
    assert torch.equal(agent.v(obs), before) and torch.equal(target(agent.standardize(obs)), before)
    agent.value.alpha.fill_(2.0)
    assert torch.equal(target(agent.standardize(obs)), agent.v(obs)) and not torch.equal(agent.v(obs), before)


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_saturated_actions_are_finite(value):
    agent = random_agent(11, 3).float()
    obs, action = torch.randn(8, 11), torch.full((8, 3), value, requires_grad=True)
    q = agent.q(obs, action)
    assert q.isfinite().all() and agent.log_prob(obs, action).isfinite().all()
    q.sum().backward()
    assert action.grad.isfinite().all() and all(p.grad.isfinite().all() for p in agent.parameters())
