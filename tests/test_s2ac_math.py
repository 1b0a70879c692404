"""Stein soft actor-critic's density, entropies, sampler and updates against computations that share no code."""

import copy
import math

import pytest
import torch

import numerics
import s2ac_continuous_action as s2ac
import sac_continuous_action as sac
from benchmark.studies import entropy
from numerics import action_grid, check_score, float64, random_batch, randomize, update_of

VARIANTS = ("phi", "phi-theta", "phi-theta-psi")


def random_agent(obs_dim: int, action_dim: int, variant: str = "phi-theta", **flags) -> s2ac.S2AC:
    """An agent with every parameter drawn at random."""
    torch.manual_seed(0)
    agent = s2ac.S2AC(obs_dim, action_dim, s2ac.Args(variant=variant, **flags))
    return randomize(agent)


def bandwidth(u: torch.Tensor, eps: float) -> torch.Tensor:
    """h^2, (B,), that the script takes for the particles u (m, B, D)."""
    return s2ac.svgd_direction(u, u, torch.zeros_like(u), eps, None)[-1]


# The entropy of section 4.1 of the paper

TARGET, PAPER = entropy.targets()["paper"], entropy.PAPER
EXACT = 1 + math.log(2 * math.pi) + 0.5 * torch.tensor([[1.13, 0.82], [0.82, 3.39]]).logdet().item()


def estimated_entropies(sigma: float, seeds: int = 10) -> torch.Tensor:
    """-mean log q^L, (seeds,), for the paper's start, steps and particles; seeds take the place of states."""
    torch.manual_seed(0)
    return next(entropy.run(TARGET, seeds, PAPER["particles"], [PAPER["steps"]], sigma=sigma))[2]


def test_entropy_of_the_papers_gaussian():
    """3.4129; the mean over ten seeds and each of them."""
    assert EXACT == pytest.approx(3.413, abs=1e-3)
    entropies = estimated_entropies(sigma=5.0)
    assert abs(entropies.mean() - EXACT) < 0.02 and (entropies - EXACT).abs().max() < 0.1


@pytest.mark.parametrize("sigma, expected", [(0.1, -0.8), (100.0, 4.55)])
def test_entropy_misses_with_a_bandwidth_far_off(sigma, expected):
    entropies = estimated_entropies(sigma, seeds=3)
    assert (entropies - EXACT).abs().min() > 0.5 and entropies.mean() == pytest.approx(expected, abs=0.2)


def test_entropy_misses_with_the_particles_own_hessian():
    """What j = i would add to (3): -eps / m tr grad grad log p(u_i) in every step, the kernel's gradient being 0."""
    hessian = torch.func.vmap(torch.func.hessian(TARGET.log_prob))(torch.randn(4, 2))
    traces = hessian.diagonal(dim1=-2, dim2=-1).sum(-1)  # (4,), everywhere the same
    assert traces.std() < 1e-5
    entropies = (
        estimated_entropies(sigma=5.0, seeds=3) + PAPER["steps"] * entropy.EPS / PAPER["particles"] * traces.mean()
    )
    assert (entropies - EXACT).abs().min() > 0.5 and entropies.mean() == pytest.approx(2.70, abs=0.05)


@pytest.mark.parametrize("sampler", ["SGLD", "DLD", "HMC"])
def test_entropy_misses_with_other_samplers(sampler):
    """Proposition 3.4. On a Gaussian the trace is the same everywhere, so that the estimate is known."""
    torch.manual_seed(0)
    n, trace = 200, -TARGET.precision_matrix.trace().item()
    _, u, estimates = next(entropy.run(TARGET, 3, 200, [n], sampler=sampler))
    first = entropy.EPS**2 / 2 if sampler == "HMC" else entropy.EPS
    start = entropy.START.entropy().item() * 2  # in two dimensions
    assert estimates.mean() == pytest.approx(start + n * first * trace, abs=0.1)
    assert (estimates - EXACT).abs().min() > 0.3
    spread = {"SGLD": 4.52, "DLD": 0.0, "HMC": 0.0}[sampler]  # the target's variances are 1.13 and 3.39
    assert sampler == "HMC" or u.var(0).sum(-1).mean() == pytest.approx(spread, rel=0.5, abs=1e-3)


# Density, direction, score


def own_chain(agent, obs: torch.Tensor, noise: torch.Tensor, steps: int, eps: float, h2: float) -> torch.Tensor:
    """Particles (m, D) of one state by loops over (2), with autograd's gradients of kernel and log p."""
    mean, log_std = agent.gaussian(obs)
    u = mean + log_std.exp() * noise

    def log_p(x):
        a = torch.tanh(x)
        return agent.q(obs, a).min() / agent.alpha + torch.log(1 - a**2).sum()

    def k(x, y):
        return torch.exp(-((x - y) ** 2).sum() / (2 * h2))

    for _ in range(steps):
        scores = [torch.func.grad(log_p)(x) for x in u]
        moved = []
        for x in u:
            phi = sum(k(x, y) * s + torch.func.grad(k, argnums=1)(x, y) for y, s in zip(u, scores, strict=True))
            moved.append(x + eps * phi / len(u))
        u = torch.stack(moved)
    return u


@float64()
@pytest.mark.parametrize("action_dim", [1, 3])
def test_particles_against_loops(action_dim):
    agent = random_agent(4, action_dim, alpha=0.5)
    obs, noise = torch.randn(2, 4), s2ac.truncated_normal(5, 2, action_dim)
    mean, log_std = agent.gaussian(obs)
    h2 = torch.tensor([0.4, 0.9])
    start = mean + log_std.exp() * noise
    u, _ = s2ac.svgd(lambda u: s2ac.score(agent.q, obs, u, agent.alpha), start, 2, 0.1, h2)  # (5, 2, D)
    for b in (0, 1):
        torch.testing.assert_close(u[:, b], own_chain(agent, obs[b], noise[:, b], 2, 0.1, h2[b]))


@float64()
def test_log_density_against_jacobians_for_small_steps():
    """log q^L of (3) and the log-determinant of each particle's map, the others held fixed: they differ by O(eps^2).

    By the sum of (2) over j /= i, with 1 / (m - 1) where (2) has 1 / m: the particle's own term is what (3) leaves out.
    """
    agent, action_dim, m = random_agent(4, 3, alpha=0.5), 3, 6
    obs, u = torch.randn(1, 4), torch.randn(m, 1, 3)
    h2 = torch.tensor([0.8])
    scores = s2ac.score(agent.q, obs, u, agent.alpha)  # (m, 1, D)

    def moved(x, others, scores, eps):
        delta = x - others
        k = torch.exp(-delta.square().sum(-1, keepdim=True) / (2 * h2))
        return x + eps * (k * (scores + delta / h2)).sum(0) / (m - 1)

    errors = []
    for eps in (0.08, 0.04, 0.02, 0.01):
        _, change = s2ac.svgd(lambda _: scores, u, 1, eps, h2)  # (m, 1)
        exact = []
        for i in range(m):
            rest = [j for j in range(m) if j != i]
            jacobian = torch.func.jacrev(moved)(u[i, 0], u[rest, 0], scores[rest, 0], eps)  # (D, D)
            assert jacobian.shape == (action_dim, action_dim)
            exact.append(-torch.linalg.slogdet(jacobian).logabsdet)
        errors.append((change[:, 0] - torch.stack(exact)).abs().max().item())
    ratios = [a / b for a, b in zip(errors, errors[1:], strict=False)]
    assert errors[-1] < 1e-3 and all(3.5 < ratio < 4.5 for ratio in ratios), (errors, ratios)


def test_bandwidth_against_pairs():
    u = torch.randn(7, 3, 2)
    for b, h2 in enumerate(bandwidth(u, 0.01)):
        total = sum((x - y).square().sum() for x in u[:, b] for y in u[:, b])
        torch.testing.assert_close(h2, total / (4 * 7**2 * math.log(8)))
    assert torch.equal(bandwidth(0 * u, 0.1), torch.full((3,), 0.1))
    assert not bandwidth(u.requires_grad_(), 0.01).requires_grad


@float64()
def test_score_against_finite_differences():
    check_score(s2ac, random_agent(4, 2, alpha=0.5))


@float64()
@torch.no_grad()
def test_chain_samples_the_policy_of_a_known_q():
    """Variant phi, many particles and steps: moments of its actions against quadrature of exp(Q / alpha)."""
    agent = s2ac.S2AC(1, 2, s2ac.Args(variant="phi", alpha=0.5, svgd_particles=100, svgd_steps=300))

    def q(obs, a):
        known = -3 * (a[..., 0] - 0.4).square() - (a[..., 1] + 0.2 * a[..., 0]).square()
        return known[..., None].expand(*a.shape[:-1], 2)

    agent.q = q
    torch.manual_seed(0)
    actions, _ = agent.policy(torch.zeros(4, 1))
    points, weights = action_grid(2, 201)
    density = weights * (q(None, points)[:, 0] / 0.5).exp()
    density = density / density.sum()
    mean = density @ points
    deviation = (density @ (points - mean).square()).sqrt()
    torch.testing.assert_close(actions.mean((0, 1)), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(actions.flatten(0, 1).std(0), deviation, rtol=0, atol=0.05)


@float64()
@torch.no_grad()
def test_value_is_the_mean_over_particles():
    """Equation (6) for each of the two by hand, on the draws that v makes."""
    agent = random_agent(4, 2, alpha=0.3, svgd_particles=5)
    obs = torch.randn(3, 4)
    torch.manual_seed(1)
    v = agent.v(obs, samples=10)
    torch.manual_seed(1)
    total = torch.zeros(3, 2)
    for _ in range(2):
        actions, log_prob = agent.policy(obs, s2ac.truncated_normal(5, 3, 2))
        for action, log_pi in zip(actions, log_prob, strict=True):
            total += (agent.q(obs, action) - 0.3 * log_pi[:, None]) / 10
    torch.testing.assert_close(v, total)


def test_narrow_starts_do_not_gain_entropy_that_particles_lack():
    """The bound of the bandwidth: with it the estimate of one step is of the order of the particles' own growth."""
    torch.manual_seed(0)
    u = 0.01 * torch.randn(200, 1, 3)
    log_det_error = []
    for h2 in (bandwidth(u, 0.1), bandwidth(u, 1e-9)):
        moved, change = s2ac.svgd(torch.zeros_like, u, 1, 0.1, h2)
        log_det_error.append((-change.mean() - (moved.std(0) / u.std(0)).log().sum()).item())
    assert 0 < log_det_error[0] < 3 * (1 - math.log(2)) + 0.1 and log_det_error[1] > 50


# Limits, actions, updates


def elu_sac(agent: s2ac.S2AC, obs_dim: int) -> sac.SAC:
    """SAC with the nets of an S2AC agent: its own, ReLU replaced by ELU, and the agent's parameters."""
    other = sac.SAC(obs_dim, agent.action_dim, sac.Args(alpha=agent.alpha))
    for net in (other.actor.net, *other.qf.nets):
        net[1], net[3] = torch.nn.ELU(), torch.nn.ELU()
    other.actor.net.load_state_dict(agent.initial.state_dict())
    other.qf.nets.load_state_dict(agent.qf.state_dict())
    return other


SAC_RANGE = dict(svgd_steps=0, log_sigma_min=-5.0, log_sigma_max=2.0)


@float64()
def test_without_steps_the_actor_is_sacs():
    agent = random_agent(5, 3, alpha=0.4, **SAC_RANGE)
    other = elu_sac(agent, 5)
    obs, noise = torch.randn(16, 5), s2ac.truncated_normal(10, 16, 3)
    actions, log_prob = agent.policy(obs, noise)
    sac_actions, sac_log_prob = other.actor(obs.expand(10, -1, -1), noise)
    torch.testing.assert_close(actions, sac_actions, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_prob, sac_log_prob, rtol=0, atol=1e-12)
    torch.manual_seed(2)
    drawn = agent.sample(obs)
    torch.manual_seed(2)
    sac_actions, _ = other.actor(obs, s2ac.truncated_normal(10, 16, 3)[0])
    torch.testing.assert_close(drawn, sac_actions, rtol=0, atol=1e-12)


@float64()
def test_without_steps_the_update_is_sacs(monkeypatch):
    """Five updates of both, on the same nets and draws, leave the same parameters and metrics."""
    flags = dict(alpha=0.4, gamma=0.9, tau=0.1, batch_size=16, device="cpu", compile="off")
    args = s2ac.Args(svgd_particles=2, **SAC_RANGE, **flags)
    agent = random_agent(5, 3, svgd_particles=2, alpha=0.4, **SAC_RANGE)
    sac_args = sac.Args(policy_frequency=1, q_lr=3e-4, autotune=False, **flags)
    other = elu_sac(agent, 5)
    step, learner = update_of(s2ac, agent, args)
    sac_step, sac_learner = update_of(sac, other, sac_args, obs_dim=5)
    for _ in range(5):
        batch, noise = random_batch(s2ac, 16, 5, 3), torch.randn(2, 16, 3)  # of the target and of the actor
        draws = list(noise)
        with monkeypatch.context() as patch:
            patch.setattr(s2ac, "truncated_normal", lambda *_, **__: noise[:, None].expand(-1, 2, -1, -1))  # noqa: B023
            metrics = step(batch)  # with both particles alike, as SAC has one
            patch.setattr(torch, "randn", lambda *_, **__: draws.pop(0))  # noqa: B023
            sac_metrics = sac_step(sac.Batch(*batch))
        assert not draws
        torch.testing.assert_close(metrics[:8], sac_metrics[:8], rtol=1e-10, atol=1e-10)
    pairs = (agent.initial, other.actor.net), (agent.qf, other.qf.nets)
    numerics.assert_same_parameters(*pairs, (learner["target"], sac_learner["target"].nets), rtol=0, atol=1e-10)


@float64()
@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_actions(variant):
    """Deterministic: tanh mu(s), f(s, 0), of phi the best by Q of fixed draws. Otherwise particles, inside the box."""
    agent = random_agent(4, 2, variant)
    obs = torch.randn(6, 4)
    action = agent.sample(obs, deterministic=True)
    assert torch.equal(action, agent.sample(obs, deterministic=True))
    if variant == "phi-theta-psi":
        assert torch.equal(action, agent.sampler(torch.cat([obs, torch.zeros(6, 2)], -1)).tanh())
    elif variant == "phi-theta":
        torch.testing.assert_close(action, agent.initial(obs)[:, :2].tanh())
    else:
        for s, a in zip(obs, action, strict=True):
            candidates, _ = agent.policy(s[None], agent.fixed_xi[:, None])  # (m, 1, D)
            q = agent.q(s.expand(10, -1), candidates[:, 0]).amin(-1)
            torch.testing.assert_close(a, candidates[q.argmax(), 0])
    torch.manual_seed(3)
    drawn = agent.sample(obs)
    torch.manual_seed(3)
    particles, _ = agent.policy(obs, s2ac.truncated_normal(10, 6, 2))
    assert torch.equal(drawn, particles[0])
    draws = agent.sample(obs[:1].expand(100, -1))
    assert draws.shape == (100, 2) and draws.std(0).min() > 1e-3 and draws.abs().max() <= 1


@float64()
def test_initial_gaussian():
    agent = random_agent(4, 2, log_sigma_min=-1.0, log_sigma_max=0.5)
    _, log_std = agent.gaussian(100 * torch.randn(50, 4))
    assert log_std.min() >= -1 and log_std.max() <= 0.5 and log_std.std() > 0.1
    mean, log_std = random_agent(4, 2, "phi", initial_std=0.3).gaussian(torch.randn(3, 4))
    assert (mean == 0).all() and log_std.shape == (3, 2) and torch.allclose(log_std.exp(), torch.tensor(0.3))


def test_truncated_normal():
    torch.manual_seed(0)
    noise = s2ac.truncated_normal(10, 20_000, 2)
    assert noise.shape == (10, 20_000, 2) and noise.abs().max() <= 3
    whole = torch.erf(torch.tensor(3 / 2**0.5))
    for limit in (0.1, 1.0, 2.0, 2.9):  # of the law cut at 3
        share = torch.erf(torch.tensor(limit / 2**0.5)) / whole
        assert (noise.abs() < limit).float().mean() == pytest.approx(share.item(), abs=0.004)
    assert abs(noise.mean()) < 0.01
    assert torch.equal(noise, noise.nan_to_num())


@float64()
@pytest.mark.parametrize("variant", VARIANTS)
def test_update_against_plain_pytorch(variant):
    """Five updates equal a textbook loop with autograd through its own SVGD, on copies of the nets."""
    flags = dict(alpha=0.3, gamma=0.9, tau=0.1, svgd_steps=2, svgd_particles=4)
    agent = random_agent(6, 2, variant, **flags)
    args = s2ac.Args(variant=variant, batch_size=16, device="cpu", compile="off", **flags)
    reference, target = copy.deepcopy(agent), copy.deepcopy(agent.qf)
    nets = dict(qf=reference.qf, initial=reference.initial, sampler=reference.sampler)
    nets = {name: net for name, net in nets.items() if net is not None}
    assert len(nets) == 1 + VARIANTS.index(variant)
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=args.learning_rate) for name, net in nets.items()}
    update, learner = update_of(s2ac, agent, args)

    def scores_at(obs, u, create_graph):
        """Gradient of log p at u (m, B, D); u's history is kept."""
        u = u if u.requires_grad else u.clone().requires_grad_()
        a = u.tanh()
        q = reference.q(obs.expand(len(u), -1, -1), a).min(-1).values
        log_p = q / 0.3 + (2 * (math.log(2) - u - torch.nn.functional.softplus(-2 * u))).sum(-1)
        return torch.autograd.grad(log_p.sum(), u, create_graph=create_graph)[0]

    def kernel(u, others):
        pairs = torch.cdist(others.detach().transpose(0, 1), others.detach().transpose(0, 1)).square()  # (B, m, m)
        h2 = (pairs.sum((1, 2)) / (4 * len(others) ** 2 * math.log(len(others) + 1))).clamp(min=0.1)  # (B,)
        delta = u.unsqueeze(1) - others.unsqueeze(0)
        return delta, (-(delta**2).sum(-1) / (2 * h2)).exp(), h2

    def particles(obs, noise, create_graph):
        if variant == "phi":
            mean, std = torch.zeros(len(obs), 2), torch.full((len(obs), 2), 0.5)
        else:
            mean, log_std = reference.initial(obs).chunk(2, -1)
            low, high = math.log(0.1), 0.0
            std = (low + 0.5 * (high - low) * (log_std.tanh() + 1)).exp()
        u = mean + std * noise
        log_q = torch.distributions.Normal(mean, std).log_prob(u).sum(-1)  # (m, B)
        for _ in range(2):
            s = scores_at(obs, u, create_graph)
            delta, k, h2 = kernel(u, u)
            other = 1 - torch.eye(len(u))[..., None]  # (m, m, 1), without j = i
            bracket = torch.einsum("ijbd,jbd->ijb", delta, s) + (delta**2).sum(-1) / h2 - 2
            log_q = log_q + 0.1 / ((len(u) - 1) * h2) * (other * k * bracket).sum(1)
            phi = torch.einsum("ijb,jbd->ibd", k, s) + torch.einsum("ijb,ijbd->ibd", k, delta) / h2[:, None]
            u = u + 0.1 * phi / len(u)
        return u.tanh(), log_q - (1 - u.tanh() ** 2).log().sum(-1)

    def step(name, loss):
        optimizers[name].zero_grad()
        loss.backward(inputs=list(nets[name].parameters()))
        optimizers[name].step()

    for n in range(5):
        batch = random_batch(s2ac, 16, 6, 2)
        torch.manual_seed(n)
        metrics = update(batch)
        torch.manual_seed(n)
        noise, z = s2ac.truncated_normal(2, 4, 16, 2), torch.randn(8, 16, 2)
        next_actions, log_prob = (x.detach() for x in particles(batch.next_obs, noise[0], False))
        with torch.no_grad():
            inputs = [torch.cat([batch.next_obs, a], -1) for a in next_actions]
            q = torch.stack([torch.minimum(*(net(x)[:, 0] for net in target)) for x in inputs])  # (4, B)
            next_v = q.mean(0) - 0.3 * log_prob.mean(0)
            y = torch.where(batch.terminations[:, 0] == 1, batch.rewards[:, 0], batch.rewards[:, 0] + 0.9 * next_v)
        expected = numerics.critic_step(reference, optimizers["qf"], batch, y)
        actor_loss = stein_norm = torch.tensor(0.0)
        if "initial" in nets:
            actions, log_prob = particles(batch.obs, noise[1], True)
            actor_loss = (0.3 * log_prob - reference.q(batch.obs.expand(4, -1, -1), actions).min(-1).values).mean()
            step("initial", actor_loss)
        if "sampler" in nets:
            u = reference.sampler(torch.cat([batch.obs.expand(8, -1, -1), z], -1))
            updated, fixed = u[:4], u[4:].detach()
            delta, k, h2 = kernel(updated.detach(), fixed)
            s = scores_at(batch.obs, fixed, False)
            phi = (k[..., None] * (s + delta / h2[:, None])).mean(1)
            step("sampler", -(phi * updated).sum(-1).mean())
            stein_norm = phi.norm(dim=-1).mean()
        numerics.polyak(reference.qf, target, 0.1)
        expected = torch.stack([*expected, actor_loss.detach(), stein_norm])
        torch.testing.assert_close(metrics, expected, rtol=1e-8, atol=1e-10)
    assert s2ac.METRICS == (*numerics.CRITIC, "actor_loss", "stein_norm")
    torch.manual_seed(0)
    entropy_logged = agent.policy_metrics(batch.obs)["entropy"]
    torch.manual_seed(0)
    assert entropy_logged == -agent.policy(batch.obs)[1].mean()
    assert s2ac.S2AC(6, 2, s2ac.Args(variant=variant)).steps == (20 if variant == "phi" else 3)  # L, the paper's
    numerics.assert_same_parameters((agent, reference), (learner["target"], target), atol=1e-10)
