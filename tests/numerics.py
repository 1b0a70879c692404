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
    return (obs, actions, torch.randn(n).double(), next_obs, (torch.rand(n) < 0.3).double())


def update_of(module, agent, args):
    """A script's update of one agent as update(batch, noise, n) -> statistics (L,), and the target that it moves."""
    update, learner = module.make_update([agent], args)
    return lambda batch, noise, n: update(*(x[None] for x in (*batch, *noise)), n=n)[0], learner["target"][0]
