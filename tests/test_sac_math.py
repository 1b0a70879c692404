"""SAC's density, estimator, update and temperature against computations that share no code with them."""

import copy

import pytest
import torch

import numerics
import sac_continuous_action as sac
from numerics import action_grid, check_density, float64, over_grid, random_batch, randomize, update_of


def random_agent(obs_dim: int, action_dim: int, seed: int = 0, **flags) -> sac.SAC:
    """An agent in float64 with every parameter drawn at random, its Gaussian neither narrow nor wide."""
    torch.manual_seed(seed)
    agent = sac.SAC(obs_dim, action_dim, sac.Args(**flags)).double()
    randomize(agent.qf), randomize(agent.actor)
    with torch.no_grad():
        agent.actor.net[-1].weight.mul_(0.5)
        agent.actor.net[-1].bias[action_dim:] = 0.2  # log sigma about -0.8
    return agent


@pytest.mark.parametrize("action_dim, n", [(1, 4001), (2, 401)])
def test_density_integrates_to_one(action_dim, n):
    check_density(random_agent(4, action_dim), action_dim, n)


@pytest.mark.parametrize("action_dim", [1, 2, 3, 8, 17])
def test_log_prob_jacobian(action_dim):
    """log pi of a sample = log N(u) - log |det da/du|, with autograd's Jacobian of the map from the noise."""
    agent = random_agent(5, action_dim)
    obs = torch.randn(16, 5, dtype=torch.float64)
    torch.manual_seed(1)
    action, log_prob = agent.sample_with_log_prob(obs)
    torch.manual_seed(1)
    torch.testing.assert_close(agent.sample(obs), action)
    torch.manual_seed(1)
    noise = torch.randn(16, action_dim, dtype=torch.float64)
    output = agent.actor.net(obs)
    mean, std = output[:, :action_dim], (3.5 * (output[:, action_dim:].tanh() + 1) - 5).exp()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda u, m, s: torch.tanh(m + s * u)))(noise, mean, std)
    expected = torch.distributions.Normal(0, 1).log_prob(noise).sum(-1) - torch.linalg.slogdet(jacobian).logabsdet
    torch.testing.assert_close(log_prob, expected, rtol=0, atol=1e-7)
    inside = action.abs().amax(-1) < 1 - 1e-5  # beyond, log_prob(obs, action) cannot recover u
    assert inside.sum() > 8
    torch.testing.assert_close(agent.log_prob(obs, action)[inside], expected[inside], rtol=0, atol=1e-6)


def test_log_sigma_is_bounded_and_the_deterministic_action_is_the_mean():
    agent = random_agent(5, 3)
    obs = 100 * torch.randn(64, 5, dtype=torch.float64)
    mean, log_std = agent.actor.gaussian(obs)
    assert log_std.min() >= -5 and log_std.max() <= 2
    assert torch.equal(agent.sample(obs, deterministic=True), mean.tanh())


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_saturated_actions_are_finite(value):
    agent = random_agent(11, 3).float()
    assert agent.log_prob(torch.randn(8, 11), torch.full((8, 3), value)).isfinite().all()
    u = torch.tensor([-100.0, -20.0, 20.0, 100.0])
    torch.testing.assert_close(sac.log_one_minus_tanh2(u), 2 * (torch.log(torch.tensor(2.0)) - u.abs()))


@torch.no_grad()
def test_estimator_converges_to_quadrature_from_below_v():
    """E [Q - alpha log pi] by quadrature: the estimator's mean at every M, its limit for large M, and a bound on V."""
    agent, alpha = random_agent(4, 1), 0.4
    obs = torch.randn(4, dtype=torch.float64)
    points, weights = action_grid(1, 4001)
    log_prob, q = over_grid(agent.log_prob, obs, points), 3 * over_grid(agent.q, obs, points)[:, 0]
    exact = (weights * log_prob.exp() * (q - alpha * log_prob)).sum()
    soft_value = alpha * torch.logsumexp(q / alpha + weights.log(), 0)
    assert exact < soft_value - 0.01  # by alpha KL(pi | exp(Q / alpha) / Z)
    spread = []
    for m in (1, 16, 128):
        repeated = obs.expand(m, 500, -1)
        action, log_prob = agent.sample_with_log_prob(repeated)
        estimate = (3 * agent.q(repeated, action)[..., 0] - alpha * log_prob).mean(0)  # (500,), equation (4)
        assert abs(estimate.mean() - exact) < 4 * estimate.std() / 500**0.5  # no bias at any M
        spread.append(estimate.std().item())
    assert spread[1] == pytest.approx(spread[0] / 4, rel=0.2)
    assert spread[2] == pytest.approx(spread[1] / 8**0.5, rel=0.2)
    torch.manual_seed(0)
    agent.log_alpha.fill_(alpha).log_()
    q, log_prob = (over_grid(f, obs, points) for f in (agent.q, agent.log_prob))
    exact = (weights * log_prob.exp())[:, None] * (q - alpha * log_prob[:, None])
    torch.testing.assert_close(agent.v(obs[None], samples=10_000)[0], exact.sum(0), rtol=0, atol=0.02)


@pytest.mark.parametrize("shift", [False, True])
def test_reward_shift_adds_b_to_each_head(shift):
    agent = random_agent(6, 2, reward_shift=shift)
    obs, action = torch.randn(8, 6, dtype=torch.float64), torch.rand(8, 2, dtype=torch.float64)
    nets = torch.cat([net(torch.cat([obs, action], -1)) for net in agent.qf.nets], -1)
    expected = nets + torch.cat([net(obs) for net in agent.qf.shift_nets], -1) if shift else nets
    assert torch.equal(agent.q(obs, action), expected) and len(agent.qf.shift_nets) == 2 * shift


@pytest.mark.parametrize("autotune, shift", [(True, False), (False, True)])
@float64()
def test_update_against_plain_pytorch(autotune, shift):
    """Five updates equal a textbook loop that delays the actor, on copies of the nets and with the same noise."""
    args = sac.Args(alpha=0.3, gamma=0.9, tau=0.1, autotune=autotune, reward_shift=shift, batch_size=32)
    agent = random_agent(6, 2, alpha=0.3, reward_shift=shift)
    reference = copy.deepcopy(agent)
    target = copy.deepcopy(reference.qf)
    q_optimizer = torch.optim.Adam(reference.qf.parameters(), lr=args.q_lr)
    actor_optimizer = torch.optim.Adam(reference.actor.parameters(), lr=args.policy_lr)
    alpha_optimizer = torch.optim.Adam([reference.log_alpha], lr=args.q_lr)
    update, learner = update_of(sac, agent, args, obs_dim=6)

    def sample(obs, noise):
        mean, output = reference.actor.net(obs).chunk(2, -1)
        normal = torch.distributions.Normal(mean, (3.5 * (output.tanh() + 1) - 5).exp())
        u = mean + normal.stddev * noise
        return u.tanh(), (normal.log_prob(u) - (1 - u.tanh() ** 2).log()).sum(-1)

    for n in range(5):
        batch = random_batch(sac, 32, 6, 2)
        torch.manual_seed(n)
        stats = update(batch)
        torch.manual_seed(n)
        noise = [torch.randn(32, 2) for _ in range(3)]  # for the next actions and two steps of the actor
        alpha = reference.log_alpha.exp().item()
        with torch.no_grad():
            next_action, log_prob = sample(batch.next_obs, noise[0])
            q1, q2 = target(batch.next_obs, next_action).unbind(-1)
            next_v = torch.minimum(q1, q2) - alpha * log_prob
            y = batch.rewards[:, 0] + torch.where(batch.terminations[:, 0] == 1, 0.0, 0.9 * next_v)
        expected = numerics.critic_step(reference, q_optimizer, batch, y)
        for k in range(2 if n % 2 == 0 else 0):
            action, log_prob = sample(batch.obs, noise[1 + k])
            q1, q2 = reference.q(batch.obs, action).unbind(-1)
            actor_loss = (alpha * log_prob - torch.minimum(q1, q2)).mean()
            actor_optimizer.zero_grad()
            actor_loss.backward()
            actor_optimizer.step()
            before = alpha
            alpha_loss = (-reference.log_alpha.exp() * (log_prob.detach() - 2)).mean()  # target entropy -D = -2
            if autotune:
                alpha_optimizer.zero_grad()
                alpha_loss.backward()
                alpha_optimizer.step()
                alpha = reference.log_alpha.exp().item()
        numerics.polyak(reference.qf, target, 0.1)
        if n % 2 == 0:
            actor_part = [actor_loss.detach(), alpha_loss.detach(), torch.tensor(before)]
        torch.testing.assert_close(stats, torch.stack([*expected, *actor_part]), rtol=1e-9, atol=1e-10)
    assert sac.METRICS == (*numerics.CRITIC, "actor_loss", "alpha_loss", "alpha")
    torch.manual_seed(0)
    entropy = agent.policy_metrics(batch.obs)["entropy"]
    torch.manual_seed(0)
    torch.testing.assert_close(entropy, -agent.sample_with_log_prob(batch.obs)[1].mean())
    assert agent.log_alpha.item() == pytest.approx(reference.log_alpha.item(), rel=1e-9)
    assert (abs(agent.log_alpha.exp().item() - 0.3) > 1e-4) == autotune
    numerics.assert_same_parameters((agent, reference), (learner["target"], target))


@pytest.mark.parametrize("start", [0.03, 3.0])
def test_automatic_alpha_moves_the_entropy_to_its_target(start):
    """On a bandit with reward -20 |a - 0.3|^2, from an alpha far too small or too large: the entropy ends at -D."""
    torch.manual_seed(0)
    args = sac.Args(alpha=start, q_lr=1e-2, policy_lr=1e-3, batch_size=128)
    agent = sac.SAC(1, 2, args)
    update, _ = update_of(sac, agent, args, obs_dim=1)
    one = torch.ones(128, 1)
    for _ in range(700):
        actions = torch.rand(128, 2) * 2 - 1
        update(sac.Batch(one, actions, -20 * (actions - 0.3).square().sum(-1, keepdim=True), one, one))
    entropy = -agent.sample_with_log_prob(torch.ones(4096, 1))[1].mean().item()
    assert entropy == pytest.approx(-2.0, abs=0.35)
    mean = agent.sample(torch.ones(1, 1), deterministic=True)
    assert (mean - 0.3).abs().max() < 0.1
