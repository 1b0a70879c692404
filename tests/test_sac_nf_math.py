"""SAC-NF's actor against computations that share no code with it. Its update is SAC's text (test_parity.py)."""

import math

import pytest
import torch

import meow_continuous_action as meow
import sac_continuous_action as sac
import sac_nf_continuous_action as sac_nf
from numerics import action_grid, check_density, over_grid, randomize


def random_agent(obs_dim: int, action_dim: int) -> sac_nf.SACNF:
    """An agent in float64 with every parameter drawn at random, its Gaussian neither narrow nor wide."""
    torch.manual_seed(0)
    agent = sac_nf.SACNF(obs_dim, action_dim, sac_nf.Args()).double()
    randomize(agent.qf), randomize(agent.actor)
    with torch.no_grad():
        [net.linears[-1].weight.mul_(0.3) for net in agent.actor.nets]  # actions stay on the grid of the quadrature
        agent.actor.gaussian_net[-1].weight.mul_(0.2)
        agent.actor.gaussian_net[-1].bias[action_dim:] = 0.0  # log sigma about -1.5
    return agent


@pytest.mark.parametrize("action_dim, n", [(1, 4001), (2, 401)])
def test_density_integrates_to_one(action_dim, n):
    check_density(random_agent(4, action_dim), action_dim, n)


@pytest.mark.parametrize("action_dim", [1, 2, 3, 8, 17])
def test_log_prob_jacobian(action_dim):
    """log pi of a sample = log N(noise) - log |det da/dnoise|, with autograd's Jacobian of the whole map."""
    agent = random_agent(5, action_dim)
    obs, noise = torch.randn(16, 5, dtype=torch.float64), torch.randn(16, action_dim, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda x, o: agent.actor(o[None], x[None])[0][0]))(noise, obs)
    expected = torch.distributions.Normal(0, 1).log_prob(noise).sum(-1) - torch.linalg.slogdet(jacobian).logabsdet
    action, log_prob = agent.actor(obs, noise)
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-7)
    inside = action.abs().amax(-1) < 1 - 1e-5  # beyond, log_prob(obs, action) cannot recover z
    assert inside.sum() > 8
    torch.testing.assert_close(agent.log_prob(obs, action)[inside], expected[inside], rtol=0, atol=1e-6)


def test_with_identity_couplings_it_is_sacs_actor():
    agent, gaussian = random_agent(5, 3).float(), sac.GaussianActor(5, 3)
    for net in agent.actor.nets:
        torch.nn.init.zeros_(net.linears[-1].weight), torch.nn.init.zeros_(net.linears[-1].bias)
    gaussian.net.load_state_dict(agent.actor.gaussian_net.state_dict())
    obs, noise = torch.randn(64, 5), torch.randn(64, 3)
    for mine, theirs in zip(agent.actor(obs, noise), gaussian(obs, noise), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6)


def test_v_and_q_by_hand():
    """V_i of M actions: mean of Q_i - alpha log pi, Q of two nets; entropy: mean of -log pi; names of metrics."""
    agent = random_agent(4, 2)
    agent.log_alpha.data.fill_(-1.0)
    obs, total = torch.randn(3, 4, dtype=torch.float64), 0
    torch.manual_seed(1)
    v = agent.v(obs, samples=5)
    torch.manual_seed(1)
    for action, log_prob in zip(*agent.sample_with_log_prob(obs.expand(5, -1, -1)), strict=True):
        q = torch.stack([net(torch.cat([obs, action], -1))[:, 0] for net in agent.qf.nets], -1)
        total = total + (q - math.exp(-1) * log_prob[:, None]) / 5
    torch.testing.assert_close(v, total)
    torch.manual_seed(1)
    entropy = agent.policy_metrics(obs)["entropy"]
    torch.manual_seed(1)
    assert entropy == -agent.sample_with_log_prob(obs)[1].mean() and sac_nf.METRICS == sac.METRICS


@pytest.mark.parametrize("action_dim", [1, 2, 3])
def test_the_couplings_are_meows(action_dim):
    agent = random_agent(5, action_dim)
    theirs = meow.MEow(5, action_dim, meow.Args()).double()
    for mine, coupling in zip(agent.actor.nets, theirs.couplings, strict=True):
        coupling.net.load_state_dict(mine.state_dict())
    obs = torch.randn(64, 5, dtype=torch.float64)
    z = agent.actor.gaussian(obs)[0]
    for coupling in theirs.couplings:
        z = coupling(z, obs)
    torch.testing.assert_close(agent.sample(obs, deterministic=True), torch.tanh(z))


def test_samples_are_of_the_density():
    """Mean and spread of samples, and E [-log pi], against quadrature on the box."""
    agent, obs = random_agent(4, 2), torch.randn(4, dtype=torch.float64)
    points, weights = action_grid(2, 401)
    with torch.no_grad():
        log_prob = over_grid(agent.log_prob, obs, points)
        p = log_prob.exp() * weights
        action, sampled = agent.sample_with_log_prob(obs.expand(200_000, -1))
    mean = p @ points
    torch.testing.assert_close(action.mean(0), mean, rtol=0, atol=0.01)
    torch.testing.assert_close(action.var(0), p @ (points - mean).square(), rtol=0.02, atol=0)
    assert abs(sampled.mean() - p @ log_prob) < 0.02
    one = agent.sample(obs.expand(2, -1), deterministic=True)
    assert torch.equal(one[0], one[1])
