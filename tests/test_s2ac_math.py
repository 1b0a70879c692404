"""Stein soft actor-critic's density, entropies, sampler and updates against computations that share no code."""

import copy
import math

import pytest
import torch

import s2ac_continuous_action as s2ac
import sac_continuous_action as sac
from numerics import action_grid, check_score, random_batch, update_of

VARIANTS = ("phi", "phi-theta", "phi-theta-psi")


def random_agent(obs_dim: int, action_dim: int, variant: str = "phi-theta", **flags) -> s2ac.S2AC:
    """An agent in float64 with every parameter drawn at random."""
    torch.manual_seed(0)
    agent = s2ac.S2AC(obs_dim, action_dim, s2ac.Args(variant=variant, **flags)).double()
    with torch.no_grad():
        for p in agent.parameters():
            p.normal_(0, 1 / max(p.shape[-1] if p.dim() > 1 else 4, 4) ** 0.5)
    return agent


def noise_of(*shape: int) -> torch.Tensor:
    return s2ac.truncated_normal(torch.empty(*shape, dtype=torch.float64))


# The entropy of section 4.1 of the paper

MEAN, COVARIANCE = torch.tensor([-0.69, 0.8]), torch.tensor([[1.13, 0.82], [0.82, 3.39]])
EXACT = 1 + math.log(2 * math.pi) + 0.5 * COVARIANCE.logdet().item()
INITIAL_VARIANCE, STEPS, EPS, PARTICLES = 6.0, 200, 0.5, 200


def log_normal(u: torch.Tensor) -> torch.Tensor:
    return torch.distributions.MultivariateNormal(MEAN, COVARIANCE).log_prob(u)


def gaussian_score(u: torch.Tensor) -> torch.Tensor:
    return (MEAN - u) @ COVARIANCE.inverse()


def estimated_entropies(sigma: float, seeds: int = 10) -> torch.Tensor:
    """-mean log q^L, (seeds,), for the paper's start, steps and particles; seeds take the place of states."""
    torch.manual_seed(0)
    u = INITIAL_VARIANCE**0.5 * torch.randn(PARTICLES, seeds, 2)
    log_q0 = (-0.5 * u.square() / INITIAL_VARIANCE - 0.5 * math.log(2 * math.pi * INITIAL_VARIANCE)).sum(-1)
    _, change = s2ac.svgd(gaussian_score, u, STEPS, EPS, torch.full((seeds,), sigma**2))
    return -(log_q0 + change).mean(0)


def test_score_of_the_gaussian_is_its_gradient():
    u = torch.randn(5, 3, 2)
    torch.testing.assert_close(gaussian_score(u), torch.func.grad(lambda u: log_normal(u).sum())(u))


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
    hessian = torch.func.vmap(torch.func.hessian(log_normal))(torch.randn(4, 2))
    traces = hessian.diagonal(dim1=-2, dim2=-1).sum(-1)  # (4,), everywhere the same
    assert traces.std() < 1e-5
    entropies = estimated_entropies(sigma=5.0, seeds=3) + STEPS * EPS / PARTICLES * traces.mean()
    assert (entropies - EXACT).abs().min() > 0.5 and entropies.mean() == pytest.approx(2.70, abs=0.05)


# Density, direction, score


def own_chain(agent, obs: torch.Tensor, noise: torch.Tensor, steps: int, eps: float, h2: float) -> torch.Tensor:
    """Particles (m, D) of one state by loops over (2), with autograd's gradients of kernel and log p."""
    mean, log_std = agent.initial(obs)
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


@pytest.mark.parametrize("action_dim", [1, 3])
def test_particles_against_loops(action_dim):
    agent = random_agent(4, action_dim, alpha=0.5)
    obs, noise = torch.randn(2, 4, dtype=torch.float64), noise_of(5, 2, action_dim)
    mean, log_std = agent.initial(obs)
    h2 = torch.tensor([0.4, 0.9], dtype=torch.float64)
    u, _ = s2ac.svgd(
        lambda u: s2ac.score(agent.qf, obs, u, agent.alpha), mean + log_std.exp() * noise, 2, 0.1, h2
    )  # (5, 2, D)
    for b in (0, 1):
        torch.testing.assert_close(u[:, b], own_chain(agent, obs[b], noise[:, b], 2, 0.1, h2[b]))


def test_log_density_against_jacobians_for_small_steps():
    """log q^L of (3) and the log-determinant of each particle's map, the others held fixed: they differ by O(eps^2).

    By the sum of (2) over j /= i, with 1 / (m - 1) where (2) has 1 / m: the particle's own term is what (3) leaves out.
    """
    agent, action_dim, m = random_agent(4, 3, alpha=0.5), 3, 6
    obs, u = torch.randn(1, 4, dtype=torch.float64), torch.randn(m, 1, 3, dtype=torch.float64)
    h2 = torch.tensor([0.8], dtype=torch.float64)
    scores = s2ac.score(agent.qf, obs, u, agent.alpha)  # (m, 1, D)

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
    for b, h2 in enumerate(s2ac.bandwidth(u, 0.01)):
        total = sum((x - y).square().sum() for x in u[:, b] for y in u[:, b])
        torch.testing.assert_close(h2, total / (4 * 7**2 * math.log(8)))
    assert torch.equal(s2ac.bandwidth(0 * u, 0.1), torch.full((3,), 0.1))
    assert not s2ac.bandwidth(u.requires_grad_(), 0.01).requires_grad


def test_score_against_finite_differences():
    agent = random_agent(4, 2, alpha=0.5)
    check_score(s2ac, agent)


class KnownQ(torch.nn.Module):
    """Both heads are a given function of the action (..., D) -> (...)."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, obs, action):
        return self.function(action)[..., None].expand(*action.shape[:-1], 2)


@torch.no_grad()
def test_chain_samples_the_policy_of_a_known_q():
    """Variant phi, many particles and steps: moments of its actions against quadrature of exp(Q / alpha)."""
    agent = s2ac.S2AC(1, 2, s2ac.Args(variant="phi", alpha=0.5, svgd_particles=100, svgd_steps=300)).double()
    agent.qf = KnownQ(lambda a: -3 * (a[..., 0] - 0.4).square() - (a[..., 1] + 0.2 * a[..., 0]).square())
    torch.manual_seed(0)
    actions, _ = agent.policy(torch.zeros(4, 1, dtype=torch.float64), noise_of(100, 4, 2))
    points, weights = action_grid(2, 201)
    density = weights * (agent.q(torch.zeros(1, 1).double(), points)[:, 0] / 0.5).exp()
    density = density / density.sum()
    mean = density @ points
    deviation = (density @ (points - mean).square()).sqrt()
    torch.testing.assert_close(actions.mean((0, 1)), mean, rtol=0, atol=0.03)
    torch.testing.assert_close(actions.flatten(0, 1).std(0), deviation, rtol=0, atol=0.05)


@torch.no_grad()
def test_value_is_the_mean_over_particles():
    """Equation (4) for each head by hand, on the draws that v makes."""
    agent = random_agent(4, 2, alpha=0.3, svgd_particles=5)
    obs = torch.randn(3, 4, dtype=torch.float64)
    torch.manual_seed(1)
    v = agent.v(obs, samples=10)
    torch.manual_seed(1)
    total = torch.zeros(3, 2, dtype=torch.float64)
    for _ in range(2):
        actions, log_prob = agent.policy(obs, noise_of(5, 3, 2))
        for action, log_pi in zip(actions, log_prob, strict=True):
            total += (agent.q(obs, action) - 0.3 * log_pi[:, None]) / 10
    torch.testing.assert_close(v, total)


def test_narrow_starts_do_not_gain_entropy_that_particles_lack():
    """The bound of the bandwidth: with it the estimate of one step is of the order of the particles' own growth."""
    torch.manual_seed(0)
    u = 0.01 * torch.randn(200, 1, 3)
    log_det_error = []
    for h2 in (s2ac.bandwidth(u, 0.1), s2ac.bandwidth(u, 1e-9)):
        moved, change = s2ac.svgd(torch.zeros_like, u, 1, 0.1, h2)
        log_det_error.append((-change.mean() - (moved.std(0) / u.std(0)).log().sum()).item())
    assert 0 < log_det_error[0] < 3 * (1 - math.log(2)) + 0.1 and log_det_error[1] > 50


# Limits, actions, updates


def elu_sac(agent: s2ac.S2AC, **flags) -> sac.SAC:
    """SAC with the nets of an S2AC agent: its own, ReLU replaced by ELU, and the agent's parameters."""
    other = sac.SAC(agent.obs_dim, agent.action_dim, sac.Args(alpha=agent.alpha, autotune=False, **flags)).double()
    for net in (other.actor.net, *other.qf.nets):
        net[1], net[3] = torch.nn.ELU(), torch.nn.ELU()
    other.actor.net.load_state_dict(agent.initial.net.state_dict())
    other.qf.nets.load_state_dict(agent.qf.nets.state_dict())
    return other


def test_without_steps_the_actor_is_sacs():
    agent = random_agent(5, 3, alpha=0.4, svgd_steps=0, sigma_min=-5.0, sigma_max=2.0)
    other = elu_sac(agent)
    obs, noise = torch.randn(16, 5, dtype=torch.float64), noise_of(10, 16, 3)
    actions, log_prob = agent.policy(obs, noise)
    sac_actions, sac_log_prob = other.actor(obs.expand(10, -1, -1), noise)
    torch.testing.assert_close(actions, sac_actions, rtol=0, atol=1e-12)
    torch.testing.assert_close(log_prob, sac_log_prob, rtol=0, atol=1e-6)
    torch.testing.assert_close(agent.act(obs, noise), other.act(obs, noise[0]), rtol=0, atol=1e-12)


def test_without_steps_the_update_is_sacs():
    """Five updates of both, on the same nets and draws, leave the same parameters and statistics."""
    flags = dict(alpha=1.0, gamma=0.9, tau=0.1)  # 1, as SAC keeps log alpha in float32
    agent = random_agent(5, 3, svgd_steps=0, sigma_min=-5.0, sigma_max=2.0, svgd_particles=2, **flags)
    other = elu_sac(agent)
    update, target = update_of(s2ac, agent, s2ac.Args(svgd_steps=0, svgd_particles=2, **flags))
    sac_args = sac.Args(policy_frequency=1, q_lr=3e-4, autotune=False, **flags)
    sac_update, sac_target = update_of(sac, other, sac_args)
    for n in range(5):
        batch = s2ac.Batch(*random_batch(16, 5, 3))
        next_noise, noise = noise_of(2, 1, 16, 3).expand(-1, 2, -1, -1)  # both particles alike, as SAC has one
        stats = update(batch, (torch.stack([next_noise, noise]), torch.empty(0)), n)
        sac_stats = sac_update(batch, (torch.stack([next_noise[0], noise[0]]),), n)
        torch.testing.assert_close(stats[:-1], sac_stats[:-1], rtol=1e-6, atol=1e-6, check_dtype=False)
    for mine, theirs in ((agent.initial.net, other.actor.net), (agent.qf.nets, other.qf.nets)):
        for p, q in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)
    for p, q in zip(target.nets.parameters(), sac_target.nets.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_actions(variant):
    """Deterministic: the best by Q of the particles of fixed draws, or f(s, 0). Otherwise draws, inside the box."""
    agent = random_agent(4, 2, variant)
    obs = torch.randn(6, 4, dtype=torch.float64)
    action = agent.sample(obs, deterministic=True)
    assert torch.equal(action, agent.sample(obs, deterministic=True))
    if variant == "phi-theta-psi":
        zeros = torch.zeros(6, 2, dtype=torch.float64)
        assert torch.equal(action, agent.sampler(torch.cat([obs, zeros], -1)).tanh())
    else:
        for s, a in zip(obs, action, strict=True):
            candidates, _ = agent.policy(s[None], agent.fixed_xi[:, None])  # (m, 1, D)
            q = agent.q(s.expand(10, -1), candidates[:, 0]).amin(-1)
            torch.testing.assert_close(a, candidates[q.argmax(), 0])
    draws = agent.sample(obs[:1].expand(100, -1))
    assert draws.shape == (100, 2) and draws.std(0).min() > 1e-3 and draws.abs().max() <= 1


def test_initial_gaussian():
    agent = random_agent(4, 2, sigma_min=-1.0, sigma_max=0.5)
    _, log_std = agent.initial(100 * torch.randn(50, 4, dtype=torch.float64))
    assert log_std.min() >= -1 and log_std.max() <= 0.5 and log_std.std() > 0.1
    mean, log_std = random_agent(4, 2, "phi", initial_std=0.3).initial(torch.randn(3, 4).double())
    assert (mean == 0).all() and log_std.shape == (3, 2) and torch.allclose(log_std.exp(), torch.tensor(0.3).double())
    noise = agent.act_noise(20_000, torch.Generator().manual_seed(0))
    assert noise.shape == (10, 20_000, 2) and noise.abs().max() <= 3
    share = torch.erf(torch.tensor(0.5**0.5)) / torch.erf(torch.tensor(3 / 2**0.5))  # of |xi| < 1 in the law cut at 3
    assert (noise.abs() < 1).float().mean() == pytest.approx(share.item(), abs=0.003)


@pytest.mark.parametrize("variant", VARIANTS)
def test_update_against_plain_pytorch(variant):
    """Five updates equal a textbook loop with autograd through its own SVGD, on copies of the nets."""
    flags = dict(alpha=0.3, gamma=0.9, tau=0.1, svgd_steps=2, svgd_particles=4)
    agent = random_agent(6, 2, variant, **flags)
    args = s2ac.Args(variant=variant, **flags)
    reference, target = copy.deepcopy(agent), copy.deepcopy(agent.qf)
    nets = dict(qf=reference.qf, initial=reference.initial, sampler=reference.sampler)
    nets = {name: net for name, net in nets.items() if net is not None and list(net.parameters())}
    assert len(nets) == 1 + VARIANTS.index(variant)
    optimizers = {name: torch.optim.Adam(net.parameters(), lr=args.learning_rate) for name, net in nets.items()}
    update, updated_target = update_of(s2ac, agent, args)

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
            mean, std = torch.zeros(len(obs), 2).double(), torch.full((len(obs), 2), 0.5).double()
        else:
            mean, log_std = reference.initial.net(obs).chunk(2, -1)
            low, high = math.log(0.1), 0.0
            std = (low + 0.5 * (high - low) * (log_std.tanh() + 1)).exp()
        u = mean + std * noise
        log_q = torch.distributions.Normal(mean, std).log_prob(u).sum(-1)  # (m, B)
        for _ in range(2):
            s = scores_at(obs, u, create_graph)
            delta, k, h2 = kernel(u, u)
            other = 1 - torch.eye(len(u)).double()[..., None]  # (m, m, 1), without j = i
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
        batch = s2ac.Batch(*random_batch(16, 6, 2))
        noise, z = noise_of(2, 4, 16, 2), torch.randn(8, 16, 2).double()
        stats = update(batch, (noise, z), n)
        next_actions, log_prob = (x.detach() for x in particles(batch.next_obs, noise[0], False))
        with torch.no_grad():
            q = target(batch.next_obs.expand(4, -1, -1), next_actions).min(-1).values
            next_v = q.mean(0) - 0.3 * log_prob.mean(0)
            y = torch.where(batch.terminations == 1, batch.rewards, batch.rewards + 0.9 * next_v)
        q = reference.q(batch.obs, batch.actions)
        loss = torch.nn.functional.mse_loss(torch.cat([q[:, 0], q[:, 1]]), torch.cat([y, y]))
        heads = [(q[:, i] - y).square().mean().item() for i in (0, 1)]
        expected = [loss.item(), *heads, *q.mean(0).tolist(), y.mean().item()]
        step("qf", loss)
        norm = torch.cat([p.grad.flatten() for p in reference.qf.parameters()]).norm().item()
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
        with torch.no_grad():
            for p, p_target in zip(reference.qf.parameters(), target.parameters(), strict=True):
                p_target += 0.1 * (p - p_target)
        expected = torch.tensor([*expected, norm, actor_loss.item(), stein_norm.item()])
        torch.testing.assert_close(stats, expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    for p, p_reference in zip(agent.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, p_reference, rtol=1e-8, atol=1e-10)
    for p, p_reference in zip(updated_target.parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(p, p_reference, rtol=1e-8, atol=1e-10)


def trained_together(variant: str, seeds: int, **more) -> tuple[list[s2ac.S2AC], torch.Tensor]:
    """Agents of `seeds` seeds after three updates at once, and the statistics of the last (seeds, 9).

    Each update draws from a generator of its own, so that it has the same batch and noise whatever the last one drew.
    """
    flags = dict(variant=variant, alpha=0.3, svgd_particles=3, **{"svgd_steps": 2, **more})
    agents = []
    for seed in range(seeds):
        torch.manual_seed(seed)
        agents.append(s2ac.S2AC(3, 2, s2ac.Args(**flags)).double())
    update, _ = s2ac.make_update(agents, s2ac.Args(num_seeds=seeds, **flags))
    for n in range(3):
        inputs = []
        for rng in (torch.Generator().manual_seed(100 * n + seed) for seed in range(seeds)):
            draw = [torch.randn(*shape, generator=rng).double() for shape in ((8, 3), (8, 2), (8,), (8, 3), (8,))]
            batch = s2ac.Batch(draw[0], draw[1].tanh(), draw[2], draw[3], (draw[4] > 1).double())
            noise = s2ac.draw_noise(2, s2ac.Args(batch_size=8, **flags), rng)
            inputs.append([*batch, *(x.double() for x in noise)])
        stats = update(*(torch.stack(x) for x in zip(*inputs, strict=True)), n=n)
    return agents, stats


@pytest.mark.parametrize("variant", VARIANTS)
def test_seeds_at_once_are_the_seeds_alone(variant):
    together, stats = trained_together(variant, 2)
    alone, first = trained_together(variant, 1)
    torch.testing.assert_close(stats[:1], first, rtol=0, atol=1e-10)
    assert (stats[0] - stats[1]).abs().max() > 1e-3
    for p, q in zip(together[0].parameters(), alone[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-10)


def test_sampler_changes_nothing_in_the_rest():
    """phi-theta-psi is phi-theta with a net more: from the same batches and noise the same Q and Gaussian."""
    (without,), first = trained_together("phi-theta", 1)
    (sampler,), second = trained_together("phi-theta-psi", 1)
    for name in ("qf", "initial"):
        pairs = zip(getattr(without, name).parameters(), getattr(sampler, name).parameters(), strict=True)
        assert all(torch.equal(p, q) for p, q in pairs)
    assert torch.equal(first[0, :-1], second[0, :-1]) and second[0, -1] > first[0, -1] == 0


def test_compiled_update_is_the_eager_one(capsys):
    """With one step of SVGD, so that compiling takes seconds."""
    compiled, stats = trained_together("phi-theta-psi", 1, svgd_steps=1, compile="on")
    assert "goes on without" not in capsys.readouterr().out
    eager, expected = trained_together("phi-theta-psi", 1, svgd_steps=1, compile="off")
    torch.testing.assert_close(stats, expected, rtol=0, atol=1e-8)
    for p, q in zip(compiled[0].parameters(), eager[0].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-8)
