"""Quadrature over the action box, random transitions and updates of an agent, for the tests of the mathematics."""

import contextlib
from types import SimpleNamespace

import torch


@contextlib.contextmanager
def float64():
    """Also a decorator: within it new tensors and nets are in float64."""
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def action_grid(action_dim: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Points (n^D, D) of the box and their weights for int da: a = tanh z with z evenly spaced, da = (1 - a^2) dz."""
    z = torch.linspace(-6.0, 6.0, n, dtype=torch.float64)
    a, w = torch.tanh(z), (1 - torch.tanh(z) ** 2) * (z[1] - z[0])
    points = torch.cartesian_prod(*[a] * action_dim).reshape(-1, action_dim)
    weights = torch.cartesian_prod(*[w] * action_dim).reshape(-1, action_dim).prod(-1)
    return points, weights


def over_grid(function, obs: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """function(obs, action) for one obs (O,) at all points, in pieces that fit into memory."""
    return torch.cat([function(obs.expand(len(part), -1), part) for part in points.split(20_000)])


@torch.no_grad()
def check_density(agent, action_dim: int, n: int) -> None:
    """pi(.|s) of an agent in float64 with O 4 integrates to one at three states, on n^D points."""
    points, weights = action_grid(action_dim, n)
    for obs in torch.randn(3, 4, dtype=torch.float64):
        assert abs((over_grid(agent.log_prob, obs, points).exp() * weights).sum() - 1) < 1e-4


def random_batch(module, n: int, obs_dim: int, action_dim: int):
    """A script's Batch of n transitions in float64; three in ten terminate."""
    obs, next_obs = torch.randn(2, n, obs_dim, dtype=torch.float64)
    actions = torch.rand(n, action_dim, dtype=torch.float64) * 2 - 1
    return module.Batch(obs, actions, torch.randn(n, 1).double(), next_obs, (torch.rand(n, 1) < 0.3).double())


@torch.no_grad()
def randomize(net):
    """The net, with every parameter drawn at random, none as it was initialised."""
    for p in net.parameters():
        p.normal_(0, 1 / max(p.shape[-1] if p.dim() > 1 else 4, 4) ** 0.5)
    return net


def update_of(module, agent, args, obs_dim: int = 0):
    """A script's update as step(batch) -> metrics (L,), and what it moves by name. `args.batch_size` is the batch's.

    The batch is not drawn, so the noise of a step is what torch's generator gives first: seed it before the step, and
    again before the same draws. obs_dim: of the replay buffer that stands in, for a script that asks for it.
    """
    batches = []
    buffer = SimpleNamespace(sample=lambda n: batches.pop(), widths=(obs_dim, agent.action_dim, 1, obs_dim, 1))
    update, metrics, learner = module.make_update(agent, buffer, args)

    def step(batch) -> torch.Tensor:
        assert len(batch.obs) == args.batch_size
        batches.append(batch)
        update()
        return metrics.clone()

    return step, learner


CRITIC = ("qf_loss", "qf1_loss", "qf2_loss", "qf1_values", "qf2_values", "target_values", "grad_norm")


def critic_step(reference, optimizer, batch, y: torch.Tensor, max_norm: float = 1e9) -> list[torch.Tensor]:
    """A textbook step of both Q on the targets y (B,). Returns its metrics, CRITIC."""
    q, parameters = reference.q(batch.obs, batch.actions), optimizer.param_groups[0]["params"]
    loss = torch.nn.functional.mse_loss(torch.cat([q[:, 0], q[:, 1]]), torch.cat([y, y]))
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    norm = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    optimizer.step()
    heads = [(q[:, i] - y).square().mean() for i in (0, 1)]
    return [x.detach() for x in (loss, *heads, *q.mean(0), y.mean(), norm)]


@torch.no_grad()
def polyak(net, target, tau: float) -> None:
    for p, p_target in zip(net.parameters(), target.parameters(), strict=True):
        p_target += tau * (p - p_target)


def assert_same_parameters(*pairs, rtol: float = 1e-8, atol: float = 1e-11) -> None:
    for mine, theirs in pairs:
        for p, p_reference in zip(mine.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(p, p_reference, rtol=rtol, atol=atol)


def check_score(module, agent) -> None:
    """A script's `score` is the gradient of min Q / alpha + log |da/du| by finite differences; O 4, D 2, alpha 0.5."""
    obs, u = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)

    def log_p(u):
        q = agent.q(obs.expand(5, -1, -1), u.tanh())
        return torch.minimum(q[..., 0], q[..., 1]) / 0.5 + (1 - u.tanh() ** 2).log().sum(-1)

    score = module.score(agent.q, obs, u, 0.5)
    for d in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[d] = 1e-6
        torch.testing.assert_close(score[..., d], (log_p(u + step) - log_p(u - step)) / 2e-6, rtol=1e-4, atol=1e-6)
    assert module.score(agent.q, obs, torch.full_like(u, 50.0), 0.5).isfinite().all()
