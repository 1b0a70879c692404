"""MEow's densities, values and update against computations that share no code with them."""

import copy
import dataclasses

import numpy as np
import pytest
import scipy.stats
import torch

import meow_continuous_action as meow
import meow_mixture_continuous_action as mixture
import numerics
from numerics import action_grid, over_grid, random_batch, randomize, update_of

COUPLINGS = ("additive", "affine")


def random_agent(obs_dim: int, action_dim: int, coupling: str = "additive", seed: int = 0, **flags) -> meow.MEow:
    """An agent in float64 with every parameter drawn at random, none as it was initialised."""
    torch.manual_seed(seed)
    args = meow.Args(alpha=0.4, log_sigma_min=-2.0, log_sigma_max=-1.0, coupling=coupling, **flags)
    return randomize(meow.MEow(obs_dim, action_dim, args).double())


def flow(agent: meow.MEow, obs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Prior sample u -> action, the map behind agent.sample (checked against it in test_log_prob_jacobian)."""
    z = agent.value.log_sigma(obs).exp() * u
    for coupling in agent.couplings:
        z = coupling(z, obs)
    return torch.tanh(z)


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("action_dim, n", [(1, 4001), (2, 241)])
@torch.no_grad()
def test_soft_value_is_the_integral(action_dim, n, coupling):
    """V_i(s) = alpha log int exp(Q_i(s, a) / alpha) da, both heads, and int pi(a|s) da = 1."""
    agent = random_agent(4, action_dim, coupling)
    points, weights = action_grid(action_dim, n)
    for obs in torch.randn(2, 4, dtype=torch.float64):
        q = over_grid(agent.q, obs, points)  # (n^D, 2)
        integral = agent.alpha * torch.logsumexp(q / agent.alpha + weights.log()[:, None], 0)  # (2,)
        v = agent.v(obs[None])[0]
        assert abs(v[0] - v[1]) > 1e-3  # two different heads
        torch.testing.assert_close(v, integral, rtol=1e-4, atol=0)
        total = (over_grid(agent.log_prob, obs, points).exp() * weights).sum()
        assert abs(total - 1) < 1e-4


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("action_dim", [1, 2, 3, 8, 17])
def test_log_prob_jacobian(action_dim, coupling):
    """log pi of a sample = log N(u) - log |det d a / d u|, with autograd's Jacobian of the sampling map."""
    agent = random_agent(5, action_dim, coupling)
    obs = torch.randn(16, 5, dtype=torch.float64)
    torch.manual_seed(1)
    action = agent.sample(obs)
    torch.manual_seed(1)
    u = torch.randn(16, action_dim, dtype=torch.float64)
    torch.testing.assert_close(flow(agent, obs, u), action)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda u, s: flow(agent, s[None], u[None])[0]))(u, obs)
    expected = torch.distributions.Normal(0, 1).log_prob(u).sum(-1) - torch.linalg.slogdet(jacobian).logabsdet
    inside = action.abs().amax(-1) < 1 - 1e-5  # beyond, actions are clamped
    assert inside.sum() > 8
    torch.testing.assert_close(agent.log_prob(obs, action)[inside], expected[inside], rtol=0, atol=1e-7)


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_samples_follow_the_density(coupling):
    """Shares of 40,000 samples in the four quadrants of the box against the integral of exp(log_prob)."""
    agent = random_agent(3, 2, coupling)
    obs = torch.randn(3, dtype=torch.float64)
    points, weights = action_grid(2, 402)  # none lies on an axis
    with torch.no_grad():
        mass = over_grid(agent.log_prob, obs, points).exp() * weights
        samples = agent.sample(obs.expand(40_000, -1))
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        share = mass[((points[:, 0] > 0) == i) & ((points[:, 1] > 0) == j)].sum()
        drawn = ((samples[:, 0] > 0) == i) & ((samples[:, 1] > 0) == j)
        assert abs(drawn.double().mean() - share) < 0.02


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("action_dim", [1, 2, 3, 8, 17])
def test_couplings_invert(action_dim, coupling):
    agent = random_agent(5, action_dim, coupling)
    obs, z = torch.randn(32, 5, dtype=torch.float64), torch.randn(32, action_dim, dtype=torch.float64)
    for layer in agent.couplings:
        back, log_det = layer.inverse(layer(z, obs), obs, None)
        torch.testing.assert_close(back, z, rtol=1e-9, atol=1e-9)
        assert coupling == "affine" or (log_det == 0.0).all()
        passed = layer.mask.bool()
        torch.testing.assert_close(layer(z, obs)[:, passed], z[:, passed])


@pytest.mark.parametrize("coupling", COUPLINGS)
def test_heads_share_one_policy(coupling):
    """(Q_i - V_i) / alpha is log pi, the same for both heads, though Q_1 and Q_2 differ."""
    agent = random_agent(11, 3, coupling)
    obs, action = torch.randn(64, 11, dtype=torch.float64), torch.rand(64, 3, dtype=torch.float64) * 2 - 1
    q, v, log_prob = agent.q(obs, action), agent.v(obs), agent.log_prob(obs, action)
    assert (q[:, 0] - q[:, 1]).abs().min() > 1e-6
    torch.testing.assert_close((q - v) / agent.alpha, log_prob[:, None].expand(-1, 2), rtol=0, atol=1e-9)


def test_without_reward_shift_the_heads_are_one():
    agent = random_agent(11, 3, reward_shift=False)
    obs, action = torch.randn(8, 11, dtype=torch.float64), torch.rand(8, 3, dtype=torch.float64)
    assert torch.equal(agent.v(obs)[:, 0], agent.v(obs)[:, 1])
    torch.testing.assert_close((agent.q(obs, action) - agent.v(obs))[:, 0] / agent.alpha, agent.log_prob(obs, action))
    assert not any("shift" in name for name, _ in agent.named_parameters())


@torch.no_grad()
def test_deterministic_action_is_the_flow_of_the_mode():
    """Proposition 2, with additive couplings: no other point has a higher density before the tanh."""
    agent = random_agent(5, 3)
    obs = torch.randn(4, 5, dtype=torch.float64)
    action = agent.sample(obs, deterministic=True)
    torch.testing.assert_close(action, flow(agent, obs, torch.zeros(4, 3, dtype=torch.float64)))
    torch.manual_seed(7)
    assert torch.equal(action, agent.sample(obs, deterministic=True))  # whatever the generator's state

    def density_before_tanh(obs, action):
        return agent.log_prob(obs, action) + torch.log1p(-action.square()).sum(-1)

    best = density_before_tanh(obs, action)
    for scale in (0.01, 0.1, 1.0):
        other = torch.tanh(torch.atanh(action) + scale * torch.randn(200, 4, 3, dtype=torch.float64))
        there = density_before_tanh(obs.expand(200, -1, -1).reshape(-1, 5), other.reshape(-1, 3)).reshape(200, 4)
        assert (there < best).all()


@pytest.mark.parametrize("coupling", COUPLINGS)
@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_saturated_actions_are_finite(coupling, value):
    agent = random_agent(11, 3, coupling).float()
    obs, action = torch.randn(8, 11), torch.full((8, 3), value, requires_grad=True)
    q = agent.q(obs, action)
    assert q.isfinite().all() and agent.log_prob(obs, action).isfinite().all()
    q.sum().backward()
    assert action.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in agent.parameters())


def test_value_needs_neither_couplings_nor_actions():
    """The target holds the sigma-net and the two shift nets alone, and V does not move with the couplings."""
    agent = random_agent(11, 3)
    target = update_of(meow, agent, meow.Args())[1]["target"]
    names = {name.split(".")[0] for name, _ in target.named_parameters()}
    assert names == {"sigma_net", "shift_nets"} and len(target.shift_nets) == 2
    obs = torch.randn(8, 11, dtype=torch.float64)
    before = agent.v(obs)
    with torch.no_grad():
        for p in agent.couplings.parameters():
            p.normal_()
    assert torch.equal(agent.v(obs), before) and torch.equal(target(obs), before)


@pytest.mark.parametrize("module", [meow, mixture], ids=["flow", "mixture"])
@pytest.mark.parametrize("clipped", [True, False])
def test_update_against_plain_pytorch(module, clipped):
    """Five updates equal a textbook loop: whole target agent, torch's Adam and clipping per parameter, Polyak."""
    args = module.Args(alpha=0.4, gamma=0.9, tau=0.1, max_grad_norm=0.5, clipped_double_q=clipped, batch_size=32)
    args = dataclasses.replace(args, **(dict(dropout=0.0) if module is meow else {}))
    agent = random_agent(6, 2) if module is meow else random_mixture(6, 2)
    reference, reference_target = copy.deepcopy(agent), copy.deepcopy(agent)
    optimizer = torch.optim.Adam(reference.parameters(), lr=args.learning_rate)
    update, learner = update_of(module, agent, args)
    for _ in range(5):
        batch = random_batch(module, 32, 6, 2)
        stats = update(batch)
        with torch.no_grad():
            v = reference_target.v(batch.next_obs)
            v = torch.minimum(v[:, 0], v[:, 1]) if clipped else (v[:, 0] + v[:, 1]) / 2
            y = batch.rewards[:, 0] + torch.where(batch.terminations[:, 0] == 1, 0.0, 0.9 * v)
        expected = numerics.critic_step(reference, optimizer, batch, y, max_norm=0.5)
        assert expected[-1] > 0.5  # clipping is in force
        numerics.polyak(reference, reference_target, 0.1)
        torch.testing.assert_close(stats, torch.stack(expected), check_dtype=False, rtol=1e-6, atol=1e-7)
    assert module.METRICS == numerics.CRITIC
    pairs = (agent, reference), (learner["target"], reference_target.value)
    numerics.assert_same_parameters(*pairs, rtol=1e-9, atol=1e-12)


def test_gradient_against_finite_differences():
    agent = random_agent(4, 2, "affine")
    obs, action = torch.randn(8, 4, dtype=torch.float64), torch.rand(8, 2, dtype=torch.float64) * 1.8 - 0.9
    agent.q(obs, action).square().mean().backward()
    rng = np.random.default_rng(0)
    for p in agent.parameters():
        index = tuple(rng.integers(n) for n in p.shape)
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                p[index] += step
                values.append(agent.q(obs, action).square().mean().item())
                p[index] -= step
        assert p.grad[index].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-4, abs=1e-7)


def test_dropout_masks(monkeypatch):
    """Of an update: the right share of zeros, the mean kept, independent units, fresh ones at every call."""
    seen, args = [], meow.Args(dropout=0.1)
    agent = random_agent(6, 2).float()
    inverse = meow.Coupling.inverse
    spy = lambda self, z, obs, keep=None: seen.append(keep) or inverse(self, z, obs, keep)  # noqa: E731
    monkeypatch.setattr(meow.Coupling, "inverse", spy)
    update, _ = update_of(meow, agent, args)
    batch = meow.Batch(*(x.float() for x in random_batch(meow, 256, 6, 2)))
    for seed in (0, 1, 0):
        torch.manual_seed(seed)
        update(batch)
    first, second, again = (torch.stack(seen[k : k + 4]) for k in (0, 4, 8))  # (4, 2, 256, 64)
    assert first.shape == (4, 2, 256, 64) and torch.equal(first, again) and not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.9).item()}
    assert not any(torch.equal(first[i], first[j]) for i in range(4) for j in range(i))  # of each coupling its own
    share = (first == 0).double().mean().item()
    assert abs(share - 0.1) < 4 * (0.1 * 0.9 / first.numel()) ** 0.5
    for k in (1, 2, 32):  # two units share 32 drawn bits
        both = ((first[..., k:] == 0) & (first[..., :-k] == 0)).double().mean().item()
        assert abs(both - 0.01) < 0.001
    assert abs((first * second).mean() - 1) < 0.01

    obs, action = torch.randn(256, 6), torch.rand(256, 2) * 2 - 1
    assert torch.equal(agent.q(obs, action), agent.q(obs, action))
    assert not torch.allclose(agent.q(obs, action, first), agent.q(obs, action))
    assert torch.equal(agent.q(obs, action, torch.ones_like(first)), agent.q(obs, action))


def test_mlp_by_hand():
    """Linear, LayerNorm, Swish x / (1 + exp(-beta x)), dropout mask, twice; then linear."""
    torch.manual_seed(0)
    net = randomize(meow.MLP(5, 64, 3, norm=True).double())
    x, keep = torch.randn(7, 5, dtype=torch.float64), (torch.rand(2, 7, 64) > 0.3).double() / 0.7
    h = x
    for k in (0, 1):
        h = torch.nn.functional.layer_norm(net.linears[k](h), (64,), net.norms[k].weight, net.norms[k].bias)
        h = h / (1 + (-net.betas[k] * h).exp()) * keep[k]
    torch.testing.assert_close(net(x, keep), net.linears[2](h))


@pytest.mark.parametrize("sign", [-1, 1])
def test_clamp_is_where_the_pages_say(sign):
    a = sign * torch.tensor([[1.0], [1 - 9e-6], [1 - 1.1e-5]], dtype=torch.float64)
    p = random_agent(3, 1).log_prob(torch.ones(3, 3, dtype=torch.float64), a)
    assert p[0] == p[1] != p[2]


def test_nets_are_the_papers():
    """t_k: (D+O)-64-64-D with LayerNorm, orthogonal; sigma: O-64-64-D and shifts: O-256-256-1, of zero weights."""
    agent = meow.MEow(11, 3, meow.Args(log_sigma_min=-5.0, log_sigma_max=-0.3))
    assert len(agent.couplings) == 4
    for k, layer in enumerate(agent.couplings):
        assert [tuple(linear.weight.shape) for linear in layer.net.linears] == [(64, 14), (64, 64), (3, 64)]
        assert all(isinstance(norm, torch.nn.LayerNorm) for norm in layer.net.norms)
        assert layer.mask.tolist() == ([1, 0, 1] if k % 2 == 0 else [0, 1, 0])
        hidden = layer.net.linears[1].weight
        torch.testing.assert_close(hidden @ hidden.T, torch.eye(64), atol=1e-5, rtol=0)
    for net, hidden, out in [(agent.value.sigma_net, 64, 3)] + [(b, 256, 1) for b in agent.value.shift_nets]:
        shapes = [tuple(linear.weight.shape) for linear in net.linears]
        assert shapes == [(hidden, 11), (hidden, hidden), (out, hidden)]
        assert all((linear.weight == 0).all() for linear in net.linears)
        bounds = [11**-0.5, hidden**-0.5, hidden**-0.5]
        assert all(0 < x.bias.abs().max() <= bound for x, bound in zip(net.linears, bounds, strict=True))
    obs = torch.randn(100, 11)
    assert (agent.value.log_sigma(obs) >= -5.0).all() and (agent.value.log_sigma(obs) <= -0.3).all()


@torch.no_grad()
def test_share_of_actions_beyond_the_clamp():
    """It is 0 for a narrow policy, and near 1 for one whose z is far out; entropy is that of log_prob."""
    agent = random_agent(4, 2)
    obs = torch.randn(512, 4, dtype=torch.float64)
    metrics = agent.policy_metrics(obs)
    assert metrics["actions_clamped"] == 0
    for each in (agent, random_mixture(4, 2)):
        torch.manual_seed(0)
        found = each.policy_metrics(obs)["entropy"]
        torch.manual_seed(0)
        torch.testing.assert_close(found, -each.log_prob(obs, each.sample(obs)).mean())
    agent.couplings[3].net.linears[2].bias.fill_(30.0), agent.couplings[2].net.linears[2].bias.fill_(30.0)
    assert agent.policy_metrics(obs)["actions_clamped"] > 0.9


# The mixture


def random_mixture(obs_dim: int, action_dim: int, components: int = 5, seed: int = 0) -> mixture.MixtureMEow:
    torch.manual_seed(seed)
    args = mixture.Args(alpha=0.4, log_sigma_min=-2.0, log_sigma_max=1.0, components=components)
    agent = mixture.MixtureMEow(obs_dim, action_dim, args).double()
    with torch.no_grad():
        for p in agent.parameters():
            p.normal_(0, 2 / max(p.shape[0] if p.dim() > 1 else 4, 4) ** 0.5)
    return agent


@pytest.mark.parametrize("action_dim, n", [(1, 4000), (2, 200)])
@torch.no_grad()
def test_soft_value_of_the_mixture_is_the_integral(action_dim, n):
    """As for the flow, with narrow and wide Gaussians, in the middle and at the sides."""
    agent = random_mixture(4, action_dim)
    middles = (torch.arange(n, dtype=torch.float64) + 0.5) * 2 / n - 1  # of n cells: the density does not end in zeros
    points, cell = torch.cartesian_prod(*[middles] * action_dim).view(-1, action_dim), (2 / n) ** action_dim
    for obs in 2 * torch.randn(2, 4, dtype=torch.float64):
        q = over_grid(agent.q, obs, points)  # (n^D, 2)
        integral = agent.alpha * (torch.logsumexp(q / agent.alpha, 0) + np.log(cell))  # (2,)
        v = agent.v(obs[None])[0]
        assert abs(v[0] - v[1]) > 1e-3
        torch.testing.assert_close(v, integral, rtol=0, atol=1e-4)
        assert abs(over_grid(agent.log_prob, obs, points).exp().sum() * cell - 1) < 1e-4


@torch.no_grad()
def test_mixture_against_scipy():
    """log pi by scipy's truncated normal distribution, and samples against its distribution function."""
    agent = random_mixture(3, 1)
    obs = torch.randn(1, 3, dtype=torch.float64)
    log_w, mu, log_sigma = (x[0].numpy() for x in agent.components(obs))
    mu, sigma = mu[:, 0], np.exp(log_sigma[:, 0])
    parts = scipy.stats.truncnorm((-1 - mu) / sigma, (1 - mu) / sigma, mu, sigma)
    a = np.linspace(-0.99, 0.99, 50)[:, None]
    expected = np.log((np.exp(log_w) * parts.pdf(a)).sum(-1))
    found = agent.log_prob(obs.expand(50, 3), torch.from_numpy(a))
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    samples = agent.sample(obs.expand(20_000, 3))[:, 0].numpy()
    assert scipy.stats.kstest(samples, lambda x: (np.exp(log_w) * parts.cdf(x[:, None])).sum(-1)).pvalue > 0.01
    assert (np.abs(samples) <= 1).all() and len(np.unique(np.sign(samples))) == 2


@torch.no_grad()
def test_deterministic_action_of_the_mixture_is_not_a_spike():
    """A narrow Gaussian that is drawn once in 50 times reaches higher than the wide one that is drawn otherwise."""
    agent = random_mixture(3, 2, components=2)
    agent.mixture.linears[2].weight.zero_()
    agent.mixture.linears[2].bias.copy_(torch.tensor([[-3.0, 0.9, 0.9, -9, -9], [1.0, -0.5, -0.5, 9, 9]]).flatten())
    obs, spike = torch.zeros(1, 3, dtype=torch.float64), torch.full((1, 2), 0.9, dtype=torch.float64).tanh()
    action = agent.sample(obs, deterministic=True)
    assert torch.allclose(action, torch.full_like(action, np.tanh(-0.5)))
    assert agent.log_prob(obs, spike) > agent.log_prob(obs, action)
    assert (agent.sample(obs.expand(2000, 3)) - spike).norm(dim=-1).lt(0.4).float().mean() < 0.15


@torch.no_grad()
def test_mixture_finds_modes_that_are_there():
    """Fitted to Q of four equal modes, it samples all of them, and its deterministic action is at one."""
    torch.manual_seed(0)
    centres = torch.tensor([[0.6, 0.6], [0.6, -0.6], [-0.6, 0.6], [-0.6, -0.6]])
    agent = mixture.MixtureMEow(1, 2, mixture.Args(alpha=1.0, log_sigma_min=-3.0, log_sigma_max=0.0))
    optimizer = torch.optim.Adam(agent.parameters(), lr=6e-3)
    for _ in range(600):
        action = torch.rand(256, 2) * 2 - 1
        q = torch.logsumexp(-20 * (action[:, None] - centres).square().sum(-1), -1)  # (B,)
        with torch.enable_grad():
            loss = (agent.q(torch.zeros(256, 1), action) - q[:, None]).square().mean()
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
    samples = agent.sample(torch.zeros(4000, 1))
    nearest = (samples[:, None] - centres).square().sum(-1).min(-1)
    shares = nearest.indices.bincount(minlength=4) / 4000
    assert (shares - 0.25).abs().max() < 0.08 and (nearest.values < 0.25).float().mean() > 0.9
    assert (agent.sample(torch.zeros(1, 1), deterministic=True) - centres).norm(dim=-1).min() < 0.15
