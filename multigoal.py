"""Goal maps on which the optimum of the maximum-entropy objective can be computed, and pictures of what was learned.

    python meow_mixture_continuous_action.py --env-id multigoal:MultiGoal-v0
    python multigoal.py --checkpoint runs/RUN/checkpoint.pt

An agent at x in the plane moves by its action a: x' = clip(x + a, -7, 7), without noise. The reward is
-30 |a|^2 - min_g |x' - g|^2, plus 10 on the step that ends within a goal's radius. Two maps are registered:

    multigoal:MultiGoal-v0            four goals, Haarnoja et al. 2017 (soft Q-learning), horizon 1000 as in MEow
    multigoal:MultiGoalAsymmetric-v0  three goals, Messaoud et al. 2024 (Stein soft actor-critic), horizon 30

gymnasium.make takes obstacle=True (a wall, for tests of a trained policy) and max_episode_steps (the horizon).
"""

import contextlib
import dataclasses
import functools
import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import scipy.sparse
import scipy.special
import tyro

BOUND = 7.0  # of the map, on each axis


class MultiGoalEnv(gym.Env):
    """Observation: the position, (2,) float32 in [-7, 7]. Action: the move, (2,) in [-1, 1].

    `goals` (G, 2), `radius` of a goal, `start_std` of the start around the origin, `wall` (2, 2): the segment's
    ends. info has "goal", the index of the goal reached or -1, and "hit", whether the wall stopped the move.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(self, goals, radius: float, start_std: float, wall, obstacle: bool = False, render_mode=None):
        self.goals, self.radius, self.start_std = np.asarray(goals, dtype=np.float64), radius, start_std
        self.wall, self.obstacle, self.render_mode = np.asarray(wall, dtype=np.float64), obstacle, render_mode
        self.observation_space = gym.spaces.Box(-BOUND, BOUND, (2,), np.float32)
        self.action_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)

    def start(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """n starting positions, (n, 2)."""
        return np.clip(rng.normal(0.0, self.start_std, (n, 2)), -BOUND, BOUND)

    def transition(self, x: np.ndarray, action: np.ndarray):
        """Move from x (..., 2) by action (..., 2).

        Returns x' (..., 2), reward (...), goal reached or -1 (...), wall hit (...).
        """
        action = np.clip(action, -1.0, 1.0)
        next_x = np.clip(x + action, -BOUND, BOUND)
        hit = self.crosses_wall(x, next_x) if self.obstacle else np.zeros(next_x.shape[:-1], dtype=bool)
        next_x = np.where(hit[..., None], x, next_x)
        dx, dy = (np.subtract.outer(self.goals[:, i], next_x[..., i]) for i in (0, 1))  # (G, ...)
        squared = np.square(dx) + np.square(dy)
        least = np.sqrt(squared.min(0))
        goal = np.where(least < self.radius, squared.argmin(0), -1)
        reward = -30.0 * np.square(action).sum(-1) - np.square(least) + 10.0 * (goal >= 0)
        return next_x, reward, goal, hit

    def crosses_wall(self, x: np.ndarray, next_x: np.ndarray) -> np.ndarray:
        """Whether the segment from x to next_x meets the wall: each one's ends lie on both sides of the other."""

        def side(a, b, c):
            return (b[..., 0] - a[..., 0]) * (c[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (c[..., 0] - a[..., 0])

        w0, w1 = self.wall
        return (side(w0, w1, x) * side(w0, w1, next_x) <= 0) & (side(x, next_x, w0) * side(x, next_x, w1) < 0)

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.x = self.start(self.np_random, 1)[0]
        if self.render_mode is not None:
            self.canvas = np.full((280, 280, 3), 255, dtype=np.uint8)
            for goal in self.goals:
                self.dot(self.canvas, goal, self.radius, (130, 200, 130))
            for t in np.linspace(0, 1, 100) if self.obstacle else ():
                self.dot(self.canvas, self.wall[0] + t * (self.wall[1] - self.wall[0]), 0.08, (200, 60, 60))
        return self.x.astype(np.float32), {}

    def step(self, action):
        if self.render_mode is not None:
            self.dot(self.canvas, self.x, 0.08, (0, 0, 0))
        self.x, reward, goal, hit = self.transition(self.x, np.asarray(action, dtype=np.float64))
        info = {"goal": int(goal), "hit": bool(hit)}
        return self.x.astype(np.float32), float(reward), bool(goal >= 0), False, info

    def render(self) -> np.ndarray | None:
        """The map from above, (280, 280, 3) uint8: goals green, the wall red, the path black, the agent blue."""
        if self.render_mode is None:
            return None
        image = self.canvas.copy()
        self.dot(image, self.x, 0.2, (40, 80, 220))
        return image

    @staticmethod
    def dot(image: np.ndarray, centre: np.ndarray, radius: float, colour: tuple[int, int, int]) -> None:
        """Paint a disc; 20 pixels a unit, y upwards."""
        axis = (np.arange(280) + 0.5) / 20 - BOUND
        image[np.hypot(axis[None, :] - centre[0], -axis[:, None] - centre[1]) < radius] = colour


FOUR = dict(goals=[(5, 0), (-5, 0), (0, 5), (0, -5)], radius=1.0, start_std=0.1, wall=[(-1.5, 3), (1.5, 3)])
THREE = dict(goals=[(5, 0), (-4, 3), (-4, -3)], radius=0.5, start_std=0.0, wall=[(-2, 0), (0, 2)])
if __name__ != "__main__":  # as a program, this file reaches the maps as a user does, by importing itself
    gym.register("MultiGoal-v0", "multigoal:MultiGoalEnv", max_episode_steps=1000, kwargs=FOUR)
    gym.register("MultiGoalAsymmetric-v0", "multigoal:MultiGoalEnv", max_episode_steps=30, kwargs=THREE)
MAPS = ("multigoal:MultiGoal-v0", "multigoal:MultiGoalAsymmetric-v0")
STATES = {  # where policies are compared with the optimal one; on the second map those of the paper's figure
    MAPS[0]: ((0, 0), (2.5, 0), (0, 2.5), (-2.5, 0), (0, -2.5), (2.5, 2.5), (-2.5, 2.5), (-2.5, -2.5), (2.5, -2.5)),
    MAPS[1]: ((-3.5, -2.5), (-2.5, 0.5), (-1, 0), (0, 0), (1, 0), (4, 0)),
}


@dataclasses.dataclass
class SoftOptimum:
    """The optimal soft value and policy of a map, from soft_value_iteration."""

    axis: np.ndarray  # (S,), the grid on both axes
    values: np.ndarray  # (S, S), V* at (axis[i], axis[j])
    q: Callable[[np.ndarray], np.ndarray]  # (B, 2) -> (B, A * A), Q* at the action grid
    actions: np.ndarray  # (A * A, 2), middles of the action cells
    alpha: float

    def v(self, obs: np.ndarray) -> np.ndarray:
        """V* at obs (B, 2), interpolated: (B,)."""
        return interpolation(self.axis, obs) @ self.values.ravel()

    def log_shares(self, obs: np.ndarray) -> np.ndarray:
        """log of pi* in each action cell at obs (B, 2), (B, A * A)."""
        return scipy.special.log_softmax(self.q(obs) / self.alpha, axis=-1)

    def policy(self, obs: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Actions (B, 2) for obs (B, 2), drawn from the action grid in proportion to exp(Q* / alpha)."""
        gumbel = self.q(obs) / self.alpha + rng.gumbel(size=(len(obs), len(self.actions)))
        return self.actions[gumbel.argmax(-1)]


def interpolation(axis: np.ndarray, points: np.ndarray) -> scipy.sparse.csr_array:
    """The bilinear interpolation at points (N, 2) on the grid axis x axis, as a matrix (N, S * S)."""
    n, step = len(axis), axis[1] - axis[0]
    position = (points - axis[0]) / step
    cell = np.clip(np.floor(position).astype(np.int32), 0, n - 2)  # (N, 2)
    weight = np.stack([1 - (position - cell), position - cell])  # (2, N, 2): of the lower and the upper corner
    columns = np.stack([(cell[:, 0] + i) * n + cell[:, 1] + j for i in (0, 1) for j in (0, 1)], -1)  # (N, 4)
    weights = np.stack([weight[i, :, 0] * weight[j, :, 1] for i in (0, 1) for j in (0, 1)], -1)  # (N, 4)
    rows = np.arange(len(points) + 1, dtype=np.int32) * 4
    return scipy.sparse.csr_array((weights.ravel(), columns.ravel(), rows), shape=(len(points), n * n))


def soft_value_iteration(
    env: gym.Env, alpha: float, gamma: float, states: int = 57, actions: int = 33, tolerance: float = 1e-3
) -> SoftOptimum:
    """Optimum of E sum gamma^t (r + alpha H) without a horizon, by dynamic programming, without a neural net.

    V <- alpha log int exp((r + gamma (1 - d) V(x')) / alpha) da on a grid of states^2 positions; the integral is
    a midpoint sum over actions^2 cells of [-1, 1]^2, V is interpolated bilinearly (Haarnoja et al. 2017, eq. 3-5).
    About 3 s and 600 MB. Iterates until V moves by less than `tolerance` at every grid point.
    """
    env = env.unwrapped
    axis = np.linspace(-BOUND, BOUND, states)
    middles = (np.arange(actions) + 0.5) * 2 / actions - 1
    moves = np.stack(np.meshgrid(middles, middles, indexing="ij"), -1).reshape(-1, 2)  # (A * A, 2)
    log_cell = 2 * np.log(2 / actions)

    def model(obs: np.ndarray):
        """Reward (B, A * A) and the matrix (B * A * A, S * S) that takes V to gamma (1 - d) V(x')."""
        next_x, reward, goal, _ = env.transition(obs[:, None], moves)
        matrix = interpolation(axis, next_x.reshape(-1, 2))
        matrix.data *= np.repeat(gamma * (goal.ravel() < 0), 4)
        return reward, matrix

    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)  # (S * S, 2)
    reward, matrix = model(grid)
    values, change = np.zeros(len(grid)), np.inf
    while change > tolerance:
        q = (reward + (matrix @ values).reshape(reward.shape)) / alpha
        best = q.max(-1)
        mass = np.exp(np.subtract(q, best[:, None], out=q), out=q).sum(-1)
        new_values = alpha * (np.log(mass) + best + log_cell)
        change, values = np.abs(new_values - values).max(), new_values

    def q_at(obs: np.ndarray) -> np.ndarray:
        reward, matrix = model(obs)
        return reward + (matrix @ values).reshape(reward.shape)

    return SoftOptimum(axis, values.reshape(states, states), q_at, moves, alpha)


class Rollouts(NamedTuple):
    paths: list[np.ndarray]  # N arrays (length + 1, 2)
    returns: np.ndarray  # (N,)
    lengths: np.ndarray  # (N,)
    goals: np.ndarray  # (N,), the goal reached or -1
    hits: np.ndarray  # (N,), whether the wall was hit


def rollout(env: gym.Env, policy: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int = 0) -> Rollouts:
    """Run policy (N, 2) -> (N, 2) for `episodes` episodes side by side, up to the environment's horizon."""
    horizon, env = env.spec.max_episode_steps, env.unwrapped
    x = env.start(np.random.default_rng(seed), episodes)
    positions = [x]
    returns, lengths = np.zeros(episodes), np.zeros(episodes, dtype=int)
    goals, hits = np.full(episodes, -1), np.zeros(episodes, dtype=bool)
    while (goals < 0).any() and len(positions) <= horizon:
        active = goals < 0
        actions = np.zeros_like(x)
        actions[active] = policy(x[active].astype(np.float32))
        next_x, reward, goal, hit = env.transition(x, actions)
        returns += reward * active
        lengths += active
        hits |= hit & active
        goals = np.where(active, goal, goals)
        x = np.where(active[:, None], next_x, x)
        positions.append(x)
    paths = [path[: length + 1] for path, length in zip(np.stack(positions, 1), lengths, strict=True)]
    return Rollouts(paths, returns, lengths, goals, hits)


def histogram(policy: Callable[[np.ndarray], np.ndarray], optimum: SoftOptimum, state: np.ndarray, draws: int = 5_000):
    """Shares (A * A,) of `draws` actions at state (2,) in the optimum's action cells, and their entropy in nats.

    The entropy has what that of a histogram of few draws lacks added to it (Miller and Madow 1955).
    """
    n = round(len(optimum.actions) ** 0.5)
    actions = policy(np.repeat(state[None], draws, 0).astype(np.float32))  # (draws, 2)
    share = np.histogram2d(*actions.T, bins=n, range=[(-1, 1), (-1, 1)])[0].ravel() / draws
    return share, scipy.special.entr(share).sum() + ((share > 0).sum() - 1) / (2 * draws)


def kl_divergence(policy: Callable[[np.ndarray], np.ndarray], optimum: SoftOptimum, states, draws: int = 5_000):
    """KL(pi || pi*) in nats at each of `states` (N, 2): (N,). alpha times it is what V loses if pi chooses once there.

    By a histogram of `draws` actions, the same for every policy, with or without a density. The other direction,
    KL(pi* || pi), would be infinite where pi has no draw.
    """
    states = np.asarray(states, dtype=np.float64)
    found = [histogram(policy, optimum, state, draws) for state in states]
    each = zip(found, optimum.log_shares(states), strict=True)
    return np.array([-share @ log_best - entropy for (share, entropy), log_best in each])


@dataclasses.dataclass
class Args:
    checkpoint: Path
    """checkpoint of a run on one of the maps"""
    output: Path | None = None
    """the picture; by default multigoal.png beside the checkpoint"""
    episodes: int = 400
    """sampled rollouts behind the printed figures"""
    obstacle: bool = False
    """put up the wall"""
    seed: int = 0
    """seed of the starts and of the sampled actions"""


def load_policy(path: Path):
    """The agent and the args of a checkpoint, through the script that wrote it. Ends the program for another file."""
    import torch

    algorithm = "meow_continuous_action"
    with contextlib.suppress(Exception):  # a file that is not a checkpoint is for the script to describe
        algorithm = torch.load(path, map_location="cpu", weights_only=True)["algorithm"]
    if algorithm not in {file.stem for file in Path(__file__).parent.glob("*_continuous_action.py")}:
        sys.exit(f"error: {path} was written by {algorithm}.py, which is not one of this project's scripts")
    return importlib.import_module(algorithm).load_agent(path)


def draw(env, rollouts: Rollouts, axis: np.ndarray, v: np.ndarray, difference: np.ndarray, titles, output: Path):
    """Write the picture: reward contours, V and 20 paths; V - V*. v, difference: (S, S)."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    env = env.unwrapped
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.5, 5), layout="constrained")
    x, y = np.meshgrid(axis, axis, indexing="ij")
    state_reward = env.transition(np.stack([x, y], -1), np.zeros(2))[1]
    image = left.pcolormesh(x, y, v, cmap="viridis", shading="gouraud", rasterized=True)
    figure.colorbar(image, ax=left, label="V(s)")
    left.contour(x, y, state_reward, levels=12, colors="white", linewidths=0.5, linestyles="solid", alpha=0.6)
    for path in rollouts.paths[:20]:
        left.plot(*path.T, color="black", linewidth=1)
    limit = np.abs(difference).max()
    image = right.pcolormesh(x, y, difference, cmap="RdBu", vmin=-limit, vmax=limit, shading="gouraud", rasterized=True)
    figure.colorbar(image, ax=right, label="V(s) - V*(s)")
    for ax, title in zip((left, right), titles, strict=True):
        for goal in env.goals:
            ax.add_patch(plt.Circle(goal, env.radius, fill=False, color="tab:red", linewidth=1.5))
        if env.obstacle:
            ax.plot(*env.wall.T, color="tab:red", linewidth=3)
        ax.set(title=title, xlim=(-BOUND, BOUND), ylim=(-BOUND, BOUND), aspect="equal", xlabel="x", ylabel="y")
    figure.savefig(output, dpi=130)
    plt.close(figure)


class Measured(NamedTuple):
    rollouts: Rollouts  # of sampled actions
    optimum: SoftOptimum
    v: np.ndarray  # (S, S), the learned V on the optimum's grid, as in the update's target
    difference: np.ndarray  # (S, S), V - V*, 0 in the goals
    rmse: float  # of V against V*, over the grid within 5.5 of the origin on each axis, outside the goals
    v_origin: float  # learned V at the origin
    optimum_origin: float  # V* there
    kl: np.ndarray  # (N,), KL(pi || pi*) at the map's STATES, nats


@functools.cache
def optimum_of(env_id: str, alpha: float, gamma: float) -> SoftOptimum:
    return soft_value_iteration(gym.make(env_id), alpha, gamma)


def policy_of(agent, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """The agent's sampled actions as a function of arrays, (B, 2) -> (B, 2). Seeds torch's generator.

    S2AC's sampler f(s, z), if there is one, acts in place of the particles that it learns from.
    """
    import torch

    torch.manual_seed(seed)
    sampler = agent.sampler if type(agent).__name__ == "S2AC" else None

    @torch.no_grad()
    def policy(obs: np.ndarray) -> np.ndarray:
        obs = torch.as_tensor(obs, dtype=torch.float32)
        if sampler is None:
            return agent.sample(obs).numpy()
        return torch.tanh(sampler(torch.cat([obs, torch.randn(len(obs), 2)], -1))).numpy()

    return policy


def repeats_of(agent, policy: Callable[[np.ndarray], np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """`policy` for one state n times, (n, 2) -> (n, 2): of S2AC's particles, one of m each, all m of n / m draws.

    They have the law of its actions, and one does not say less of it than another, at a tenth of the time.
    """
    import torch

    if type(agent).__name__ != "S2AC" or agent.sampler is not None:
        return policy

    @torch.no_grad()
    def repeats(obs: np.ndarray) -> np.ndarray:
        few = torch.as_tensor(obs[: -(-len(obs) // agent.m)], dtype=torch.float32)  # (n / m, 2)
        actions, _ = agent.policy(few)  # (m, n / m, 2)
        return actions.flatten(0, 1)[: len(obs)].numpy()

    return repeats


def measure(agent, trained, env: gym.Env, episodes: int, seed: int = 0) -> Measured:
    """A trained agent against the optimum of its map, temperature and discount. trained: the args of its run."""
    import torch

    policy = policy_of(agent, seed)

    @torch.no_grad()
    def v(obs: np.ndarray) -> np.ndarray:
        both = agent.v(torch.as_tensor(obs, dtype=torch.float32))  # (n, 2)
        clipped = getattr(trained, "clipped_double_q", True)  # the V of the target
        return (both.amin(-1) if clipped else both.mean(-1)).numpy()

    rollouts = rollout(env, policy, episodes, seed)
    optimum = optimum_of(trained.env_id, trained.alpha, trained.gamma)
    axis, n = optimum.axis, len(optimum.axis)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    learned = v(grid)
    difference = learned - optimum.values.ravel()
    distance = np.linalg.norm(grid[:, None] - env.unwrapped.goals, axis=-1).min(-1)
    outside = distance >= env.unwrapped.radius
    rmse = np.sqrt(np.square(difference[outside & (np.abs(grid).max(-1) <= 5.5)]).mean())
    difference = np.where(outside, difference, 0).reshape(n, n)
    origin = np.zeros((1, 2))
    v_origin, optimum_origin = float(v(origin)[0]), optimum.v(origin)[0]
    kl = kl_divergence(repeats_of(agent, policy), optimum, STATES[trained.env_id])
    return Measured(rollouts, optimum, learned.reshape(n, n), difference, float(rmse), v_origin, optimum_origin, kl)


def main(args: Args) -> None:
    agent, trained = load_policy(args.checkpoint)
    if trained.env_id not in MAPS:
        sys.exit(f"error: {args.checkpoint} was trained on {trained.env_id}; expected one of {', '.join(MAPS)}")
    env = gym.make(trained.env_id, obstacle=args.obstacle)
    measured = measure(agent, trained, env, args.episodes, args.seed)
    rollouts, rmse = measured.rollouts, measured.rmse
    counts = [int((rollouts.goals == g).sum()) for g in range(len(env.unwrapped.goals))]
    print(f"goals reached: {' / '.join(map(str, counts))}, {sum(counts)} of {args.episodes}")
    print(f"return: {rollouts.returns.mean():.1f} +- {rollouts.returns.std():.1f}")
    print(f"length: {rollouts.lengths.mean():.1f}")
    if args.obstacle:
        hit = rollouts.hits
        print(f"wall hit by {hit.sum()}, of which {((rollouts.goals >= 0) & hit).sum()} reached a goal")
    print(f"V(0,0): {measured.v_origin:.1f}, optimum {measured.optimum_origin:.1f}")
    print(f"RMSE of V against V*: {rmse:.1f} (grid within 5.5 of the origin on each axis, outside the goals)")
    each = ", ".join(f"({x:g}, {y:g}) {kl:.2f}" for (x, y), kl in zip(STATES[trained.env_id], measured.kl, strict=True))
    print(f"KL(pi || pi*), nats: mean {measured.kl.mean():.2f}; {each}")

    output = args.output or args.checkpoint.with_name("multigoal.png")
    titles = (f"V and 20 sampled paths, {sum(counts)} of {args.episodes} reach a goal", f"V - V*, RMSE {rmse:.1f}")
    draw(env, rollouts, measured.optimum.axis, measured.v, measured.difference, titles, output)
    print(f"picture: {output}")


if __name__ == "__main__":
    main(tyro.cli(Args))
