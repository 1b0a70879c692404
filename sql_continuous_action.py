"""SQL: soft Q-learning with a Stein sampler, in one file.

Haarnoja, Tang, Abbeel and Levine, "Reinforcement Learning with Deep Energy-Based Policies", ICML 2017,
https://arxiv.org/abs/1702.08165

    python sql_continuous_action.py --env-id Ant-v4

Two Q-functions, and a sampler that is trained to draw actions from pi(a|s) = exp((Q(s,a) - V(s)) / alpha), but has
no density. The soft value V(s) = alpha log int exp(Q(s,a) / alpha) da is that of Q itself; it is estimated by
importance sampling with uniform actions, so its cost grows with D. B: batch, O: obs, D: action, K: particles.

    equation                                                                    here
    (1)  a = tanh u,  u = f(s, xi),  xi ~ N(0, I)                               SQL.particles, SQL.sample
    (2)  Q_i(s,a), two nets                                                     TwinQ.forward, SQL.q
    (3)  V(s) = alpha [logsumexp_j min_i Q_i(s,a_j) / alpha - log M + D log 2]  importance_sampled_value, SQL.v
    (4)  y = r + gamma (1 - d) V'(s'),  L_Q = mean (Q_i(s,a) - y)^2             make_sql_update
    (5)  log p(u|s) = min_i Q_i(s, tanh u) / alpha + sum log(1 - tanh^2 u)      SQL.score
    (6)  phi(u_j) = mean_i [k(u_i,u_j) grad log p(u_i) + grad_{u_i} k(u_i,u_j)] stein_direction
    (7)  f moves along phi:  grad L_f = -mean_j (du_j / df)^T phi(u_j)          make_sql_update

Kernel and score live before the tanh, with its log-determinant in (5): in the space of the actions without that
term, as in public codes, the fixed point is not pi. The reward is not scaled: alpha is 1 / the paper's scale.
"""

import copy
import dataclasses
import importlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's folder"""
    env_id: str = "Hopper-v4"
    """gymnasium id; `module:Name-v0` imports the module first; `dm_control/...` goes through shimmy"""
    seed: int = 1
    """seed of the parameters, the environments, the replay samples and the action noise"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and replay buffer live; auto takes the GPU if there is one"""
    torch_deterministic: bool = True
    """use deterministic torch algorithms only: same machine and seed, same numbers"""
    track: bool = False
    """log to Weights & Biases too (`WANDB_MODE=offline` needs no account)"""
    wandb_project_name: str = "meow"
    """W&B project"""
    wandb_entity: str | None = None
    """W&B entity (team)"""
    capture_video: bool = False
    """write an mp4 of one episode at every evaluation, under the run's videos/"""
    evaluate: str | None = None
    """path of a checkpoint: replay its policy, print the returns and exit"""
    total_timesteps: int = 1_000_000
    """environment steps, summed over the environments"""
    num_envs: int = 1
    """environments stepped side by side"""
    utd: float = 1.0
    """gradient updates per environment step"""
    buffer_size: int = 1_000_000
    """transitions that the replay buffer holds"""
    batch_size: int = 256
    """transitions in an update"""
    learning_starts: int = 5_000
    """environment steps with uniformly random actions before the first update"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak step of the target"""
    eval_frequency: int = 10_000
    """environment steps between evaluations; the checkpoint is saved then, too"""
    eval_episodes: int = 10
    """episodes of an evaluation; their seeds are the same every time"""
    deterministic_eval: bool = True
    """evaluate the policy's deterministic action rather than samples"""
    # SQL's own; the deterministic action is the best by Q of the sampler's for 16 fixed draws of xi
    alpha: float = 0.1
    """temperature: the weight of the entropy"""
    learning_rate: float = 3e-4
    """Adam's step size"""
    value_samples: int = 16
    """uniform actions behind an estimate of V in the target"""
    particles: int = 16
    """particles of the sampler's update: so many fixed ones and so many updated ones"""


# The paper's settings, with alpha = 1 / reward scale; a v5 id takes the v4 preset. Steps as in MEow's paper. On the
# goal maps alpha and gamma are the map's, so that the soft value can be compared with the optimum.
GOAL_MAP = dict(gamma=0.9, num_envs=8, learning_starts=1_000)
GOAL_MAP |= dict(total_timesteps=16_000, buffer_size=100_000, eval_frequency=2_000)
PRESETS = {
    "Hopper-v4": dict(alpha=1 / 30, total_timesteps=1_500_000),
    "HalfCheetah-v4": dict(alpha=1 / 30, total_timesteps=1_500_000),
    "Walker2d-v4": dict(alpha=1 / 10, total_timesteps=4_000_000),
    "Ant-v4": dict(alpha=1 / 300, total_timesteps=4_000_000),
    "Humanoid-v4": dict(alpha=1 / 100, total_timesteps=5_000_000),
    "multigoal:MultiGoal-v0": GOAL_MAP | dict(alpha=2.5),
    "multigoal:MultiGoalAsymmetric-v0": GOAL_MAP | dict(alpha=10.0, gamma=0.8),
}
OWN_POSITIVE = ("alpha", "learning_rate", "value_samples", "particles")  # for check_args: the algorithm's own flags
OWN_RANGES = {}


EVAL_SEED = 10_000  # evaluation episodes start from seeds 10000, 10001, ..., whatever --seed is


class UserError(Exception):
    """Something that the user can put right; printed as one line, without a traceback."""


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. Flags given win over the preset of --env-id, or over the args of --evaluate's file."""
    argv = sys.argv[1:] if argv is None else argv
    first = tyro.cli(Args, args=[a for a in argv if a not in ("-h", "--help")])
    if first.evaluate is not None:
        preset = load_checkpoint(first.evaluate)["args"] | dict(device="auto", track=False, capture_video=False)
    else:
        preset = PRESETS.get(re.sub(r"-v5$", "-v4", first.env_id), {})
    return tyro.cli(Args, args=argv, default=dataclasses.replace(Args(), **preset))


def check_args(args: Args) -> None:
    """Raise UserError, naming the flag, its value and its range, before anything is built."""
    positive = ("total_timesteps", "num_envs", "utd", "batch_size", "eval_frequency", "eval_episodes")
    ranges = {name: (0 < getattr(args, name) < math.inf, "above 0 and finite") for name in positive + OWN_POSITIVE}
    ranges |= {name: (0 <= getattr(args, name) <= 1, "in [0, 1]") for name in ("gamma", "tau")}
    ranges["seed"] = (0 <= args.seed < 2**32, "in [0, 2^32)")
    ranges |= {name: (holds(args), expected) for name, (holds, expected) in OWN_RANGES.items()}
    ranges["learning_starts"] = (args.learning_starts >= args.num_envs, "at least --num-envs")
    ranges["buffer_size"] = (args.buffer_size >= max(args.batch_size, args.num_envs), "at least --batch-size")
    ranges["device"] = (args.device != "cuda" or torch.cuda.is_available(), "cpu: torch sees no CUDA device")
    for name, (ok, expected) in ranges.items():
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}")


def make_env(env_id: str, render_mode: str | None = None) -> gym.Env:
    """One environment with observations (O,), actions (D,) in [-1, 1] and episode statistics.

    Any task with a flat Box of observations and a bounded flat Box of actions; the actions are rescaled to the
    task's own bounds. dm_control's dictionaries of vectors are flattened. Raises UserError for anything else.
    """
    dm_control = env_id.startswith("dm_control/")
    try:
        if dm_control:
            gym.register_envs(importlib.import_module("shimmy"))
        env = gym.make(env_id, **({} if render_mode is None else {"render_mode": render_mode}))
    except (gym.error.Error, ImportError, AttributeError) as e:  # the last: dm_control with a mujoco it does not know
        hint = " (dm_control needs: pip install 'shimmy[dm-control]' 'mujoco<4')" if dm_control else ""
        raise UserError(f"--env-id {env_id}: {e}{hint}") from e
    if dm_control:
        env = gym.wrappers.FlattenObservation(env)
    obs_space, action_space, problem = env.observation_space, env.action_space, ""
    if not isinstance(obs_space, gym.spaces.Box) or len(obs_space.shape) != 1:
        problem = f"observations are {obs_space}; expected a Box of one dimension (no Dict, no images)"
    elif not isinstance(action_space, gym.spaces.Box) or len(action_space.shape) != 1:
        problem = f"actions are {action_space}; expected a Box of one dimension (continuous actions)"
    elif not np.isfinite([action_space.low, action_space.high]).all():
        problem = f"actions are {action_space}; expected finite bounds (give the task some with a wrapper)"
    if problem:
        raise UserError(f"--env-id {env_id}: {problem}")
    env = gym.wrappers.RescaleAction(env, np.float32(-1), np.float32(1))
    return gym.wrappers.RecordEpisodeStatistics(env)


def make_envs(env_id: str, num_envs: int) -> gym.vector.VectorEnv:
    """`num_envs` environments that reset within the step that ends an episode, the last observation in infos."""
    mode = gym.vector.AutoresetMode.SAME_STEP
    return gym.vector.SyncVectorEnv([lambda: make_env(env_id)] * num_envs, autoreset_mode=mode)


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, O)
    actions: torch.Tensor  # (B, D), in [-1, 1]
    rewards: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, O), the true last observation where an episode ended
    terminations: torch.Tensor  # (B,), 1 where the task ended, 0 at time-outs


class ReplayBuffer:
    """Ring of transitions in preallocated float32 tensors: 4 (2 O + D + 2) bytes each.

    1e6 transitions take 3.1 GB on Humanoid (O 376, D 17), 0.26 GB on Ant (O 27, D 8) and 0.11 GB on Hopper.
    Raises UserError if that exceeds the free memory of the machine or the GPU.
    """

    def __init__(self, capacity: int, num_envs: int, obs_dim: int, action_dim: int, device: torch.device):
        capacity -= capacity % num_envs  # so that one step's transitions never wrap around the end
        need = 4 * capacity * (2 * obs_dim + action_dim + 2)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if need > free:
            raise UserError(
                f"--buffer-size {capacity} needs {need / 1e9:.2f} GB, {device} has {free / 1e9:.2f} GB free; "
                f"expected at most {int(capacity * free / need)}"
            )
        shapes = [(capacity, obs_dim), (capacity, action_dim), (capacity,), (capacity, obs_dim), (capacity,)]
        self.data = Batch(*[torch.zeros(shape, device=device) for shape in shapes])
        self.capacity, self.position, self.size = capacity, 0, 0

    def add(self, *transitions) -> None:
        """Store one step of every environment: the fields of Batch in order, first dimension num_envs."""
        n = len(transitions[0])
        for field, value in zip(self.data, transitions, strict=True):
            field[self.position : self.position + n] = torch.as_tensor(value)
        self.position = (self.position + n) % self.capacity
        self.size = min(self.size + n, self.capacity)

    def sample(self, batch_size: int) -> Batch:
        """Transitions drawn uniformly with replacement."""
        index = torch.randint(self.size, (batch_size,), device=self.data.obs.device)
        return Batch(*[field.index_select(0, index) for field in self.data])


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """in -> hidden -> hidden -> out with ReLU."""
    layers = (nn.Linear(in_dim, hidden_dim), nn.ReLU(True), nn.Linear(hidden_dim, hidden_dim), nn.ReLU(True))
    return nn.Sequential(*layers, nn.Linear(hidden_dim, out_dim))


class TwinQ(nn.Module):
    """Q_1 and Q_2. The target is a copy of this."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.nets = nn.ModuleList([mlp(obs_dim + action_dim, 128, 1) for _ in range(2)])

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2), equation (2)."""
        x = torch.cat([obs, action], -1)  # (B, O + D)
        return torch.cat([net(x) for net in self.nets], -1)  # (B, 2)


def log_one_minus_tanh2(u: torch.Tensor) -> torch.Tensor:
    """log(1 - tanh(u)^2), exact where tanh rounds to 1."""
    return 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))


def importance_sampled_value(q: torch.Tensor, alpha: float, action_dim: int) -> torch.Tensor:
    """Estimate of V(s), (B,), from M actions drawn uniformly from [-1, 1]^D: equation (3). q: (M, B)."""
    return alpha * (torch.logsumexp(q / alpha, 0) - math.log(len(q)) + action_dim * math.log(2))


def stein_direction(fixed: torch.Tensor, score: torch.Tensor, updated: torch.Tensor) -> torch.Tensor:
    """phi at the particles `updated` (K', B, D), equation (6); score: grad log p at the particles `fixed` (K, B, D).

    k(x,y) = exp(-|x-y|^2 / h) with h = median |x-y|^2 / log(K + 1) over the pairs of a state, at least 0.001.
    """
    delta = fixed[:, None] - updated  # (K, K', B, D)
    distance = delta.square().sum(-1)  # (K, K', B)
    h = (distance.flatten(0, 1).median(0).values / math.log(len(fixed) + 1)).clamp(min=1e-3)  # (B,)
    k = (-distance / h).exp()[..., None]  # (K, K', B, 1)
    return (k * (score[:, None] - 2 * delta / h[:, None])).mean(0)


class SQL(nn.Module):
    """Sampler and soft Q-functions. Observations (B, O), actions (B, D) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.alpha, self.obs_dim, self.action_dim = args.alpha, obs_dim, action_dim
        self.sampler = mlp(obs_dim + action_dim, 128, action_dim)
        self.qf = TwinQ(obs_dim, action_dim)
        fixed_xi = torch.randn(16, action_dim, generator=torch.Generator().manual_seed(0))
        self.register_buffer("fixed_xi", fixed_xi)  # (16, D)

    def particles(self, obs: torch.Tensor, xi: torch.Tensor) -> torch.Tensor:
        """u = f(s, xi), (K, B, D), for obs (B, O) and xi (K, B, D): equation (1) before the tanh."""
        return self.sampler(torch.cat([obs.expand(len(xi), *obs.shape), xi], -1))

    def sample(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        """Actions (B, D): a draw from the sampler or, if deterministic, the best by Q for the 16 fixed xi."""
        if not deterministic:
            return torch.tanh(self.particles(obs, torch.randn(1, len(obs), self.action_dim, device=obs.device))[0])
        xi = self.fixed_xi[:, None].expand(-1, len(obs), -1)  # (16, B, D)
        actions = torch.tanh(self.particles(obs, xi))  # (16, B, D)
        best = self.q(obs.expand(len(xi), *obs.shape), actions).amin(-1).argmax(0)  # (B,)
        return actions[best, torch.arange(len(obs), device=obs.device)]

    def q(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2)."""
        return self.qf(obs, action)

    def v(self, obs: torch.Tensor, samples: int = 1024) -> torch.Tensor:
        """V_1(s), V_2(s): (B, 2), equation (3) for each head, from `samples` actions a state."""
        action = torch.rand(samples, len(obs), self.action_dim, device=obs.device) * 2 - 1  # (M, B, D)
        return importance_sampled_value(self.q(obs.expand(samples, *obs.shape), action), self.alpha, self.action_dim)

    def score(self, obs: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        """grad_u log p(u|s), (K, B, D), for obs (B, O) and u (K, B, D): the gradient of equation (5)."""
        u = u.detach().requires_grad_()
        q = self.q(obs.expand(len(u), *obs.shape), torch.tanh(u)).amin(-1)  # (K, B)
        log_p = q / self.alpha + log_one_minus_tanh2(u).sum(-1)  # (K, B)
        return torch.autograd.grad(log_p.sum(), u)[0]

    @torch.no_grad()
    def statistics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is logged of the policy: the spread of its actions in a state, mean over the batch."""
        xi = torch.randn(16, len(obs), self.action_dim, device=obs.device)
        return dict(action_std=torch.tanh(self.particles(obs, xi)).std(0).mean())


LOSSES = ("qf_loss", "qf1_loss", "qf2_loss", "q1", "q2", "target", "grad_norm", "stein_norm")


def flatten_parameters(module: nn.Module) -> nn.Parameter:
    """Move the parameters and gradients of `module` into one vector, of which they become views, and return it.

    Gradient norm, Adam and Polyak averaging are then one operation each instead of one a parameter.
    """
    params = list(module.parameters())
    flat = nn.Parameter(torch.cat([p.detach().flatten() for p in params]))
    flat.grad = torch.zeros_like(flat)
    start = 0
    for p in params:
        part = slice(start, start + p.numel())
        p.data, p.grad = flat.data[part].view_as(p), flat.grad[part].view_as(p)
        start = part.stop
    return flat


def make_sql_update(agent: SQL, args: Args):
    """Returns update(batch, n) -> statistics (8,), named in LOSSES: one gradient step of equations (4) and (7).

    n counts the updates (nothing here depends on it). Also returns, by name, what an update changes besides the
    agent: the targets Q' and the optimisers.
    """
    target = copy.deepcopy(agent.qf).requires_grad_(False)
    q_params, sampler_params = flatten_parameters(agent.qf), flatten_parameters(agent.sampler)
    target_params = flatten_parameters(target).detach()
    q_optimizer = torch.optim.Adam([q_params], lr=args.learning_rate, fused=True)
    sampler_optimizer = torch.optim.Adam([sampler_params], lr=args.learning_rate, fused=True)
    q_leaves, sampler_leaves = list(agent.qf.parameters()), list(agent.sampler.parameters())

    def update(batch: Batch, n: int) -> torch.Tensor:
        with torch.no_grad():
            shape = (args.value_samples, *batch.actions.shape)  # (M, B, D)
            next_actions = torch.rand(shape, device=batch.obs.device) * 2 - 1  # (M, B, D)
            next_q = target(batch.next_obs.expand(len(next_actions), -1, -1), next_actions).amin(-1)  # (M, B)
            next_v = importance_sampled_value(next_q, agent.alpha, agent.action_dim)  # (B,)
            y = batch.rewards + args.gamma * (1 - batch.terminations) * next_v  # (B,)
        q = agent.q(batch.obs, batch.actions)  # (B, 2)
        qf_loss = (q - y[:, None]).square().mean(0)  # (2,)
        loss = qf_loss.mean()

        q_optimizer.zero_grad(set_to_none=False)
        loss.backward(inputs=q_leaves)
        q_optimizer.step()
        xi = torch.randn(2 * args.particles, *batch.actions.shape, device=batch.obs.device)  # (2 K, B, D)
        with torch.no_grad():
            fixed = agent.particles(batch.obs, xi[: args.particles])  # (K, B, D)
        updated = agent.particles(batch.obs, xi[args.particles :])  # (K, B, D)
        phi = stein_direction(fixed, agent.score(batch.obs, fixed), updated.detach())  # (K, B, D)
        sampler_optimizer.zero_grad(set_to_none=False)
        updated.backward(-phi / phi[..., 0].numel(), inputs=sampler_leaves)
        sampler_optimizer.step()
        target_params.lerp_(q_params, args.tau)  # Q' <- Q' + tau (Q - Q')
        stats = [loss, *qf_loss, *q.mean(0), y.mean(), q_params.grad.norm(), phi.norm(dim=-1).mean()]
        return torch.stack(stats).detach()

    return update, dict(target=target, q_optimizer=q_optimizer, sampler_optimizer=sampler_optimizer)


Agent, make_update = SQL, make_sql_update  # what the code from here on, the same in every script, calls


@torch.random.fork_rng()  # sampled evaluations, too, leave the random numbers of training alone
@torch.no_grad()
def evaluate(agent: Agent, envs: gym.vector.VectorEnv, deterministic: bool, device: torch.device):
    """One episode in each of `envs`, the same ones every time. Returns their returns (E,) and lengths (E,)."""
    obs, _ = envs.reset(seed=EVAL_SEED)
    returns, lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=np.int64)
    active = np.ones(envs.num_envs, dtype=bool)  # an environment that is done goes on, but no longer counts
    while active.any():
        actions = agent.sample(torch.as_tensor(obs, dtype=torch.float32, device=device), deterministic)
        obs, rewards, terminations, truncations, _ = envs.step(actions.cpu().numpy())
        returns += rewards * active
        lengths += active
        active &= ~(terminations | truncations)
    return returns, lengths


def record_video(agent: Agent, args: Args, folder: Path, name: str, device: torch.device) -> None:
    """Write the first evaluation episode to folder/name-episode-0.mp4. Raises UserError without a GL backend."""
    env = make_env(args.env_id, render_mode="rgb_array")
    try:
        env.reset()
        env.render()
    except Exception as e:  # each renderer raises its own: mujoco.FatalError, ImportError, AttributeError, ...
        hint = "apt-get install libegl1 and set MUJOCO_GL=egl, or libosmesa6 and MUJOCO_GL=osmesa"
        raise UserError(f"--capture-video: {args.env_id} cannot draw here ({e}); without a screen, {hint}") from e
    video = dict(name_prefix=name, disable_logger=True, episode_trigger=lambda episode: episode == 0)
    env = gym.wrappers.RecordVideo(env, str(folder), **video)
    envs = gym.vector.SyncVectorEnv([lambda: env], autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
    evaluate(agent, envs, args.deterministic_eval, device)
    envs.close()


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write tensors and plain values so that `path` is, at every moment, the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        torch.save(checkpoint, f)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint; nothing in it is executed. Raises UserError if it is missing, damaged or another file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such checkpoint; expected a run's checkpoint.pt or best.pt")
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        algorithm = checkpoint["algorithm"]
    except Exception as e:  # torch.load raises whatever the damage leads to: pickle, zip, runtime, key errors
        raise UserError(f"{path} is not a readable checkpoint ({type(e).__name__})") from e
    if algorithm != Path(__file__).stem:
        raise UserError(f"{path} was written by {algorithm}.py; load it with that script")
    return checkpoint


def load_agent(path: str | Path, device: torch.device | str = "cpu", args: Args | None = None) -> tuple[Agent, Args]:
    """The agent of a checkpoint and its args (or the ones given). Raises UserError if they do not fit together."""
    checkpoint = load_checkpoint(path, device)
    args = args or Args(**checkpoint["args"])
    agent = Agent(checkpoint["obs_dim"], checkpoint["action_dim"], args).to(device)
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError as e:
        raise UserError(f"{path} does not fit the flags: {' '.join(str(e).split())[:300]}") from e
    return agent, args


def replay(args: Args) -> None:
    """--evaluate: print the return of each episode, their mean and standard deviation."""
    check_args(args)
    torch.manual_seed(args.seed)
    device = choose_device(args)
    agent, _ = load_agent(args.evaluate, device, args)
    envs = make_envs(args.env_id, args.eval_episodes)
    env_dims = (envs.single_observation_space.shape[0], envs.single_action_space.shape[0])
    if (agent.obs_dim, agent.action_dim) != env_dims:
        raise UserError(f"{args.evaluate}: (O, D) = {agent.obs_dim, agent.action_dim}, {args.env_id} has {env_dims}")
    returns, lengths = evaluate(agent, envs, args.deterministic_eval, device)
    for i, (episodic_return, length) in enumerate(zip(returns, lengths, strict=True)):
        print(f"episode {i}: return {episodic_return:.2f}, length {length}")
    print(f"{args.env_id}, {len(returns)} episodes: return {returns.mean():.2f} +- {returns.std():.2f}")
    if args.capture_video:
        path = Path(args.evaluate)
        record_video(agent, args, path.parent / "videos", f"evaluate-{path.stem}", device)
        print(f"video: {path.parent}/videos/evaluate-{path.stem}-episode-0.mp4")


def choose_device(args: Args) -> torch.device:
    cuda = args.device == "cuda" or (args.device == "auto" and torch.cuda.is_available())
    return torch.device("cuda" if cuda else "cpu")


def commit() -> str:
    """What `git describe` says of this file's folder; empty outside a checkout or without git."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""


def start_run(args: Args) -> tuple[Path, SummaryWriter]:
    """Create the run's folder with args.json and the writer, start W&B if asked, print the values in force."""
    name = re.sub(r"[^\w.-]", "_", f"{args.env_id}__{args.exp_name}__{args.seed}__{int(time.time())}")
    run_dir = Path("runs") / name
    run_dir.mkdir(parents=True)
    values = dataclasses.asdict(args)
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, gym, np)}
    device = torch.cuda.get_device_name() if choose_device(args).type == "cuda" else "no GPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {device}"
    facts = dict(args=values, command=shlex.join(sys.argv), commit=commit(), machine=machine, versions=versions)
    (run_dir / "args.json").write_text(json.dumps(facts, indent=2))
    if args.track:
        import wandb

        project, entity = args.wandb_project_name, args.wandb_entity
        wandb.init(project=project, entity=entity, name=name, config=values, sync_tensorboard=True, save_code=True)
    writer = SummaryWriter(str(run_dir))
    rows = "\n".join(f"|{key}|{value}|" for key, value in values.items())
    writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
    print(f"run: {run_dir}\n" + "  ".join(f"{key}={value}" for key, value in values.items()))
    return run_dir, writer


def train(args: Args) -> Path:
    """Train, evaluate, log and save. Returns the run's folder."""
    check_args(args)
    torch.manual_seed(args.seed)  # the only global generator in use; environments have their own
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    device = choose_device(args)

    envs = make_envs(args.env_id, args.num_envs)
    eval_envs = make_envs(args.env_id, args.eval_episodes)
    obs_dim, action_dim = envs.single_observation_space.shape[0], envs.single_action_space.shape[0]
    buffer = ReplayBuffer(args.buffer_size, args.num_envs, obs_dim, action_dim, device)

    agent = Agent(obs_dim, action_dim, args).to(device)
    update, learner = make_update(agent, args)

    run_dir, writer = start_run(args)
    if args.capture_video:
        record_video(agent, args, run_dir / "videos", "step-0", device)  # fails now if it is going to
    best_return, eval_return, episodic_return = -math.inf, math.nan, math.nan

    def save(name: str) -> None:
        writer.flush()
        facts = dict(algorithm=Path(__file__).stem, args=dataclasses.asdict(args), obs_dim=obs_dim)
        facts |= dict(action_dim=action_dim, global_step=global_step, best_return=best_return)
        state = {k: v.state_dict() for k, v in dict(agent=agent, **learner).items()}
        save_checkpoint(run_dir / name, facts | state)

    def check_losses() -> torch.Tensor:
        """Statistics of the updates since the last log, (updates, L). Stops the run if one is not finite."""
        losses = torch.stack([s for _, s in stats]).cpu()
        for i in losses.isfinite().all(-1).logical_not().nonzero().flatten().tolist():
            row = ", ".join(f"{k}={v:.4g}" for k, v in zip(LOSSES, losses[i].tolist(), strict=True))
            stop(f"the loss is not finite: at step {stats[i][0]}, {row}")
        return losses

    def stop(message: str) -> None:
        save("failed.pt")
        raise FloatingPointError(f"{message}. The state at step {global_step} is in {run_dir}/failed.pt")

    global_step, updates, updates_due = 0, 0, 0.0
    save("checkpoint.pt")  # from here on, a run that is killed leaves a file that loads
    stats = []  # (global_step, statistics (L,)) of the updates since the last log
    start_time = time.time()
    obs, _ = envs.reset(seed=args.seed)
    interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file needs fewer lines
    bar = tqdm(total=args.total_timesteps, unit="step", mininterval=interval, maxinterval=interval)
    while global_step < args.total_timesteps:
        obs_tensor = torch.as_tensor(obs, dtype=torch.float32, device=device)  # (N, O)
        if global_step < args.learning_starts:
            actions = torch.rand(args.num_envs, action_dim, device=device) * 2 - 1  # (N, D)
        else:
            with torch.inference_mode():
                actions = agent.sample(obs_tensor)
        env_actions = actions.cpu().numpy()
        if not np.isfinite(env_actions).all():  # never reaches the task
            if stats:
                check_losses()
            stop(f"the actions are not finite at step {global_step}, for the observations {obs}")
        next_obs, rewards, terminations, truncations, infos = envs.step(env_actions)
        global_step += args.num_envs
        bar.update(args.num_envs)

        # next_obs already belongs to the next episode where one ended; the transition needs the true last one
        last_obs = next_obs.copy()
        for i in np.flatnonzero(terminations | truncations):
            last_obs[i] = infos["final_obs"][i]
            episodic_return = float(infos["final_info"]["episode"]["r"][i])
            writer.add_scalar("charts/episodic_return", episodic_return, global_step)
            writer.add_scalar("charts/episodic_length", float(infos["final_info"]["episode"]["l"][i]), global_step)
        buffer.add(obs_tensor, actions, rewards, last_obs, terminations)
        obs = next_obs

        if global_step > args.learning_starts:
            updates_due += args.num_envs * args.utd
            while updates_due >= 1:
                updates_due -= 1
                stats.append((global_step, update(buffer.sample(args.batch_size), updates)))
                updates += 1

        eval_due = global_step % args.eval_frequency < args.num_envs or global_step >= args.total_timesteps
        if stats and (eval_due or global_step % 100 < args.num_envs):
            for name, value in zip(LOSSES, check_losses().mean(0).tolist(), strict=True):
                writer.add_scalar(f"losses/{name}", value, global_step)
            stats.clear()
            for name, value in agent.statistics(buffer.sample(args.batch_size).obs).items():
                writer.add_scalar(f"policy/{name}", value.item(), global_step)
            sps = global_step / (time.time() - start_time)
            writer.add_scalar("charts/SPS", sps, global_step)
            bar.set_postfix_str(f"SPS {sps:.0f}, return {episodic_return:.1f}, eval {eval_return:.1f}", refresh=False)

        if eval_due:
            returns, lengths = evaluate(agent, eval_envs, args.deterministic_eval, device)
            eval_return = float(returns.mean())
            writer.add_scalar("eval/episodic_return", eval_return, global_step)
            writer.add_scalar("eval/episodic_length", float(lengths.mean()), global_step)
            if args.capture_video:
                record_video(agent, args, run_dir / "videos", f"step-{global_step}", device)
            if eval_return > best_return:
                best_return = eval_return
                save("best.pt")
            save("checkpoint.pt")
    bar.close()
    writer.close()
    envs.close()
    eval_envs.close()
    print(f"evaluation return {eval_return:.1f} (best {best_return:.1f}); checkpoints in {run_dir}")
    return run_dir


if __name__ == "__main__":
    try:
        args = parse_args()
        replay(args) if args.evaluate else train(args)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except FloatingPointError as e:
        sys.exit(f"error: {e}")
