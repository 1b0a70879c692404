"""Quadrature over the action box, random transitions and updates of one agent, for the tests of the mathematics."""

import torch


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


def random_batch(n: int, obs_dim: int, action_dim: int) -> tuple[torch.Tensor, ...]:
    """obs, actions, rewards, next_obs, terminations in float64: the fields of a script's Batch."""
    obs, next_obs = torch.randn(2, n, obs_dim, dtype=torch.float64)
    actions = torch.rand(n, action_dim, dtype=torch.float64) * 2 - 1
    return (obs, actions, torch.randn(n, 1).double(), next_obs, (torch.rand(n, 1) < 0.3).double())


class OneBatch:
    """In the place of a script's replay buffer: what it draws is given."""

    def __init__(self, obs_dim: int, action_dim: int):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)

    def sample(self, batch_size: int):
        assert len(self.batch.obs) == batch_size
        return self.batch


def update_of(module, agent, args, obs_dim: int = 6):
    """A script's update as update(batch) -> metrics, and the target that it moves. Noise is of torch's generator."""
    buffer = OneBatch(obs_dim, agent.action_dim)
    update, metrics, learner = module.make_update(agent, buffer, args)

    def update_with(batch) -> torch.Tensor:
        buffer.batch = batch
        update()
        return metrics.clone()

    return update_with, learner["target"]


def check_score(module, agent) -> None:
    """A script's `score` is the gradient of min Q / alpha + log |da/du| by finite differences; O 4, D 2, alpha 0.5."""
    obs, u = torch.randn(3, 4, dtype=torch.float64), torch.randn(5, 3, 2, dtype=torch.float64)

    def log_p(u):
        q = agent.q(obs.expand(5, -1, -1), u.tanh())
        return torch.minimum(q[..., 0], q[..., 1]) / 0.5 + (1 - u.tanh() ** 2).log().sum(-1)

    score = module.score(agent.qf, obs, u, 0.5)
    for d in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[d] = 1e-6
        torch.testing.assert_close(score[..., d], (log_p(u + step) - log_p(u - step)) / 2e-6, rtol=1e-4, atol=1e-6)
    assert module.score(agent.qf, obs, torch.full_like(u, 50.0), 0.5).isfinite().all()
