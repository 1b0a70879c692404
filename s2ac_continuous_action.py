"""S2AC: Stein soft actor-critic, in one file.

Messaoud, Mokeddem, Xue, Pang, An, Chen and Chawla, "S2AC: Energy-Based Reinforcement Learning with Stein Soft Actor
Critic", ICLR 2024, https://arxiv.org/abs/2405.00987

    python s2ac_continuous_action.py --env-id Ant-v4 --variant phi-theta

Two Q-functions, and a policy without a density of its own: m particles are drawn from a Gaussian and moved towards
pi(a|s) ~ exp(Q(s,a) / alpha) by L steps of Stein variational gradient descent (SVGD). To the first order in the step
size the density of the result is known in closed form, and with it the entropy: that makes SVGD an actor. B: batch,
O: obs, D: action, m: particles; u is an action before its tanh, delta = u_i - u_j.

    equation                                                                    here
    (1)  u_i = mu(s) + sigma(s) xi_i,  xi_i ~ N(0, I):  density q^0(u|s)        InitialGaussian.forward
    (2)  L times  u_i <- u_i + eps phi(u_i),                                    svgd
         phi(u_i) = (1/m) sum_j [k(u_i,u_j) s_j + grad_{u_j} k(u_i,u_j)],       svgd_direction
         k(u_i,u_j) = exp(-|delta|^2 / (2 h^2)),  h^2 from the particles        svgd_direction, bandwidth
    (3)  log q^L(u_i) = log q^0(u_i) + eps / ((m - 1) h^2) sum_l sum_{j /= i}   svgd
                            k(u_i,u_j) [delta . s_j + |delta|^2 / h^2 - D],
         a = tanh u,  log pi(a|s) = log q^L(u) - sum log(1 - tanh^2 u)          stein_policy
    (4)  V(s) = (1/m) sum_i [min_i Q_i(s,a_i) - alpha log pi(a_i|s)]            monte_carlo_value, S2AC.v
    (5)  s_j = grad log p(u_j|s),                                               score
         log p(u|s) = min_i Q_i(s, tanh u) / alpha + sum log(1 - tanh^2 u)
    (6)  y = r + gamma (1 - d) V'(s'),  L_Q = mean (Q_i(s,a) - y)^2             make_s2ac_update
    (7)  L_theta = mean (alpha log pi(a|s) - min_i Q_i(s,a)),  through (1)-(3)  make_s2ac_update
    (8)  f(s, z), z ~ N(0, I), moves along phi of its own particles             make_s2ac_update

Variants: phi has a fixed N(0, 0.5^2) in (1) and no actor net; phi-theta learns mu and sigma by (7); phi-theta-psi
also learns a sampler by (8), which acts at evaluation in one pass of a net. Kernel and score live before the tanh,
with its log-determinant in (5). (3) is the change of variables: the particle's own term, which would need the
Hessian of Q, is left out of the sum. With L = 0 the actor is SAC's.
"""

import collections
import copy
import ctypes
import dataclasses
import fcntl
import functools
import hashlib
import importlib
import io
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Generator, Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import gymnasium as gym
import numpy as np
import psutil
import torch
import torch.nn as nn
import tyro
from torch.func import functional_call
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
    num_seeds: int = 1
    """train this many seeds side by side, from --seed on; each has its run, the same as if it were alone"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks and replay buffer live; auto takes the GPU if there is one"""
    compile: Literal["auto", "on", "off"] = "auto"
    """compile the update; auto does so if there is a compiler and the run is long enough to pay for it"""
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
    resume: str | None = None
    """folder of a run that was stopped or killed: go on with it, in place and with its flags"""
    debug: bool = False
    """show the traceback of an error"""
    total_timesteps: int = 1_000_000
    """environment steps, summed over the environments"""
    num_envs: int = 1
    """environments stepped side by side"""
    async_envs: bool = False
    """step each of them in a process of its own"""
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
    checkpoint_frequency: int = 10_000
    """environment steps between checkpoints; there is one at the end and at a stop, too"""
    checkpoint_minutes: float = 10.0
    """minutes after which a checkpoint is due in any case"""
    eval_frequency: int = 10_000
    """environment steps between evaluations"""
    eval_episodes: int = 10
    """episodes of an evaluation; their seeds are the same every time"""
    deterministic_eval: bool = True
    """evaluate the policy's deterministic action rather than samples"""
    # S2AC's own; the deterministic action is the best of the particles of fixed draws by Q, or f(s, 0) of phi-theta-psi
    alpha: float = 1.0
    """temperature: the weight of the entropy"""
    learning_rate: float = 3e-4
    """Adam's step size"""
    variant: Literal["phi", "phi-theta", "phi-theta-psi"] = "phi-theta"
    """what is learned beside Q: nothing, the Gaussian that the particles start from, a sampler for evaluation too"""
    svgd_particles: int = 10
    """particles of a state, m"""
    svgd_steps: int | None = None
    """steps of SVGD, L; by default 20 of variant phi, whose start is not learned, and 3 of the others"""
    svgd_step_size: float = 0.1
    """step size of SVGD, eps (the paper's multiplied by alpha); the kernel's h^2 is not below it"""
    initial_std: float = 0.5
    """standard deviation of the particles' start in variant phi"""
    sigma_min: float = math.log(0.1)
    """lower bound of log sigma(s)"""
    sigma_max: float = 0.0
    """upper bound of log sigma(s)"""


# The paper's settings: batches of 100 and eps = 0.1, here times alpha, since (5) divides Q by alpha where the paper
# multiplies the kernel's gradient; a v5 id takes the v4 preset. Steps as in MEow's paper. On the goal maps alpha and
# gamma are the map's, so that the soft value can be compared with the optimum.
GOAL_MAP = dict(gamma=0.9, svgd_steps=5, batch_size=64, utd=0.5, num_envs=8, learning_starts=1_000)
GOAL_MAP |= dict(total_timesteps=16_000, buffer_size=100_000, eval_frequency=2_000)
PRESETS = {
    "Hopper-v4": dict(batch_size=100, total_timesteps=1_500_000),
    "HalfCheetah-v4": dict(batch_size=100, total_timesteps=1_500_000),
    "Walker2d-v4": dict(batch_size=100, total_timesteps=4_000_000),
    "Ant-v4": dict(alpha=0.2, svgd_step_size=0.02, batch_size=100, total_timesteps=4_000_000),
    "Humanoid-v4": dict(batch_size=100, total_timesteps=5_000_000),
    "multigoal:MultiGoal-v0": GOAL_MAP | dict(alpha=2.5, svgd_step_size=0.025),
    "multigoal:MultiGoalAsymmetric-v0": GOAL_MAP | dict(alpha=10.0, gamma=0.8),
}
OWN_POSITIVE = ("alpha", "learning_rate", "svgd_step_size", "initial_std")  # for check_args: the algorithm's own flags
OWN_RANGES = {
    "svgd_particles": (lambda args: args.svgd_particles >= 2, "at least 2, the density needs another"),
    "svgd_steps": (lambda args: args.svgd_steps is None or args.svgd_steps >= 0, "at least 0"),
    "sigma_min": (lambda args: -20 <= args.sigma_min < args.sigma_max <= 10, "-20 <= sigma_min < sigma_max <= 10"),
}


EVAL_SEED = 10_000  # evaluation episodes start from seeds 10000, 10001, ..., whatever --seed is
COMPILE_PAYS = 1_500  # updates from which on compiling, two minutes without a cache, saves more than it costs


# What --resume lets a flag change: nothing that would make it another run
MAY_CHANGE = {"resume", "debug", "device", "compile", "track", "wandb_project_name", "wandb_entity", "capture_video"}
MAY_CHANGE |= {"async_envs", "checkpoint_frequency", "checkpoint_minutes"}


class UserError(Exception):
    """Something that the user can put right; printed as one line, exit code 2."""


class RunError(Exception):
    """A run that cannot go on, whose state is saved; printed as one line, exit code 1."""


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. Flags given win over the preset of --env-id, or over the args of --evaluate's file.

    With --resume the args are those of the run. Raises UserError if a flag that makes the run what it is differs.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = tyro.cli(Args, args=[a for a in argv if a not in ("-h", "--help")])
    if first.evaluate is not None:
        preset = load_checkpoint(first.evaluate)["args"]
        preset |= dict(resume=None, device="auto", track=False, capture_video=False)
    elif first.resume is not None:
        preset = latest_checkpoint(first.resume)[0]["args"]
    else:
        preset = PRESETS.get(re.sub(r"-v5$", "-v4", first.env_id), {})
    args = tyro.cli(Args, args=argv, default=dataclasses.replace(Args(), **preset))
    for name in preset.keys() - MAY_CHANGE if first.resume is not None else ():
        if getattr(args, name) != preset[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"{flag} {getattr(args, name)}: expected {preset[name]}, as in {first.resume}; leave it out"
            )
    return args


def check_args(args: Args) -> None:
    """Raise UserError, naming the flag, its value and its range, before anything is built."""
    positive = ("total_timesteps", "num_seeds", "num_envs", "utd", "batch_size", "eval_frequency", "eval_episodes")
    positive += ("checkpoint_frequency", "checkpoint_minutes")
    ranges = {name: (0 < getattr(args, name) < math.inf, "above 0 and finite") for name in positive + OWN_POSITIVE}
    ranges |= {name: (0 <= getattr(args, name) <= 1, "in [0, 1]") for name in ("gamma", "tau")}
    ranges["seed"] = (0 <= args.seed <= 2**32 - args.num_seeds, "--num-seeds of them in [0, 2^32)")
    ranges["exp_name"] = (not re.search("[\ud800-\udfff]", args.exp_name), "text")
    ranges["track"] = (not args.track or args.num_seeds == 1, "one seed a process: W&B follows one run at a time")
    ranges |= {name: (holds(args), expected) for name, (holds, expected) in OWN_RANGES.items()}
    ranges["learning_starts"] = (args.learning_starts >= args.num_envs, "at least --num-envs")
    ranges["buffer_size"] = (args.buffer_size >= max(args.batch_size, args.num_envs), "at least --batch-size")
    ranges["evaluate"] = (not (args.evaluate and args.resume), "no --resume beside it")
    ranges["device"] = (args.device != "cuda" or torch.cuda.is_available(), "cpu: torch sees no CUDA device")
    for name, (ok, expected) in ranges.items():
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}")


class EpisodeStart(gym.Wrapper):
    """Keeps the state of the random generator from which the episode was drawn, for --resume to draw it again."""

    rng_state: dict | None = None  # numpy's bit_generator.state
    again: dict | None = None  # of the episode that the next reset is to draw again

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        if self.again is not None:
            self.unwrapped.np_random.bit_generator.state, self.again = self.again, None
        rng = self.unwrapped.np_random if seed is None else gym.utils.seeding.np_random(seed)[0]
        self.rng_state = getattr(getattr(rng, "bit_generator", None), "state", None)  # dm_control's has none
        return self.env.reset(seed=seed, options=options)


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
    except (gym.error.Error, ImportError, ValueError, AttributeError) as e:  # the last: dm_control, unknown mujoco
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
    return gym.wrappers.RecordEpisodeStatistics(EpisodeStart(env))


def make_envs(env_id: str, num_envs: int, in_processes: bool = False) -> gym.vector.VectorEnv:
    """`num_envs` environments that reset within the step that ends an episode, the last observation in infos."""
    makers, mode = [lambda: make_env(env_id)] * num_envs, gym.vector.AutoresetMode.SAME_STEP
    if not in_processes:
        return gym.vector.SyncVectorEnv(makers, autoreset_mode=mode)
    if "--debug" not in sys.argv:  # a worker's error becomes that of this process; gymnasium warns with its traceback
        warnings.filterwarnings("ignore", module="gymnasium.vector")
    # Inherited by the processes: Ctrl-C, which a terminal sends to all of them, is for this one alone to act on
    handlers = signal.signal(signal.SIGINT, signal.SIG_IGN), signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        return gym.vector.AsyncVectorEnv(makers, autoreset_mode=mode)
    finally:
        signal.signal(signal.SIGINT, handlers[0]), signal.signal(signal.SIGTERM, handlers[1])


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, O)
    actions: torch.Tensor  # (B, D), in [-1, 1]
    rewards: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, O), the true last observation where an episode ended
    terminations: torch.Tensor  # (B,), 1 where the task ended, 0 at time-outs


class ReplayBuffer:
    """Ring of transitions, each a row of one preallocated float32 tensor: 4 (2 O + D + 2) bytes.

    1e6 transitions take 3.1 GB on Humanoid (O 376, D 17), 0.26 GB on Ant (O 27, D 8) and 0.11 GB on Hopper.
    With a path the tensor is that file, mapped into memory (on a GPU, copied to it), so that a checkpoint has to
    keep only position and size. Raises UserError if the memory, of machine or GPU, or the disk has no room for it.
    """

    def __init__(self, capacity, num_envs, obs_dim, action_dim, device: torch.device, path: Path | None = None):
        capacity -= capacity % num_envs  # so that one step's transitions never wrap around the end
        need = torch.get_default_dtype().itemsize * capacity * (2 * obs_dim + action_dim + 2)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if need > free:
            raise UserError(
                f"--buffer-size {capacity} needs {need / 1e9:.2f} GB, {device} has {free / 1e9:.2f} GB free; "
                f"expected at most {int(capacity * free / need)}"
            )
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)  # of the fields of Batch
        self.capacity, self.position, self.size, self.path, self.mirror = capacity, 0, 0, path, None
        if path is None:
            self.rows = torch.zeros(capacity, sum(self.widths), device=device)
            return
        if path.exists() and path.stat().st_size != need:
            raise UserError(f"{path} has {path.stat().st_size} bytes; expected {need}, the replay buffer of the run")
        free = shutil.disk_usage(path.parent).free
        if not path.exists() and need > free:
            raise UserError(f"{path} needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on disk")
        with open(path, "ab") as f:
            os.posix_fallocate(f.fileno(), 0, need)  # or a disk that is full kills the process later
        mapped = torch.from_file(str(path), True, capacity * sum(self.widths)).view(capacity, -1)
        self.rows, self.mirror = (mapped, None) if device.type == "cpu" else (mapped.to(device), mapped)

    def add(self, rows: torch.Tensor, on_host: torch.Tensor | None = None) -> None:
        """Store one step of every environment, (num_envs, 2 O + D + 2), the fields of Batch side by side.

        on_host: the same rows where the file is mapped, if the buffer is on a GPU.
        """
        self.rows[self.position : self.position + len(rows)] = rows
        if self.mirror is not None:
            self.mirror[self.position : self.position + len(rows)] = on_host
        self.position = (self.position + len(rows)) % self.capacity
        self.size = min(self.size + len(rows), self.capacity)

    def flush(self) -> None:
        """Wait until the file is on disk."""
        with open(self.path, "rb") as f:
            os.fsync(f.fileno())

    def fields(self, rows: torch.Tensor) -> Batch:
        """Rows (B, 2 O + D + 2) as the fields of Batch, which are views of them."""
        obs, actions, rewards, next_obs, terminations = rows.split(self.widths, -1)
        return Batch(obs, actions, rewards.squeeze(-1), next_obs, terminations.squeeze(-1))

    def sample(self, batch_size: int, rng: torch.Generator | None) -> Batch:
        """Transitions drawn uniformly with replacement, by torch's own generator if rng is None."""
        index = torch.randint(self.size, (batch_size,), generator=rng, device=self.rows.device)
        return self.fields(self.rows.index_select(0, index))


def elu_mlp(in_dim: int, out_dim: int) -> nn.Sequential:
    """in -> 256 -> 256 -> out with ELU: (2) follows the gradient of Q, and (7) differentiates it once more."""
    layers = (nn.Linear(in_dim, 256), nn.ELU(), nn.Linear(256, 256), nn.ELU())
    return nn.Sequential(*layers, nn.Linear(256, out_dim))


class SmoothTwinQ(nn.Module):
    """Q_1 and Q_2. The target is a copy of this."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.nets = nn.ModuleList([elu_mlp(obs_dim + action_dim, 1) for _ in range(2)])

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2)."""
        x = torch.cat([obs, action], -1)  # (B, O + D)
        return torch.cat([net(x) for net in self.nets], -1)  # (B, 2)


class InitialGaussian(nn.Module):
    """q^0(.|s), where the particles start. In variant phi it has no parameters."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.action_dim, self.initial_std = action_dim, args.initial_std
        self.sigma_min, self.sigma_max = args.sigma_min, args.sigma_max
        self.net = None if args.variant == "phi" else elu_mlp(obs_dim, 2 * action_dim)

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mu(s) and log sigma(s) of equation (1), (B, D) each, the latter squashed into [sigma_min, sigma_max]."""
        if self.net is None:
            mean = obs.new_zeros(*obs.shape[:-1], self.action_dim)
            return mean, mean + math.log(self.initial_std)
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, self.sigma_min + 0.5 * (self.sigma_max - self.sigma_min) * (torch.tanh(log_std) + 1)


def log_one_minus_tanh2(u: torch.Tensor) -> torch.Tensor:
    """log(1 - tanh(u)^2), exact where tanh rounds to 1."""
    return 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))


def score(qf: Callable, obs: torch.Tensor, u: torch.Tensor, alpha: float) -> torch.Tensor:
    """grad_u log p(u|s), (K, B, D), for obs (B, O) and u (K, B, D): the gradient of equation (5)."""

    def log_p(u):
        q = qf(obs.expand(len(u), *obs.shape), torch.tanh(u)).amin(-1)  # (K, B)
        return (q / alpha + log_one_minus_tanh2(u).sum(-1)).sum()

    return torch.func.grad(log_p)(u)


def bandwidth(u: torch.Tensor, minimum: torch.Tensor | float) -> torch.Tensor:
    """h^2 = sum_ij |u_i - u_j|^2 / (4 m^2 log(m + 1)), (B,), of particles (m, B, D); a constant to gradients.

    It is at least `minimum`, the step size: (3) is of the first order in eps / h^2. Without that bound (7) finds
    Gaussians so narrow that (3) is wrong by any amount, as an entropy that the particles do not have.
    """
    variance = (u - u.mean(0)).square().mean(0).sum(-1)  # (B,), sum_ij |u_i - u_j|^2 / (2 m^2)
    return (variance / (2 * math.log(len(u) + 1))).clamp(min=minimum).detach()


def svgd_direction(u: torch.Tensor, others: torch.Tensor, scores: torch.Tensor, h2: torch.Tensor):
    """phi(u_i), (m', B, D), of equation (2) for u (m', B, D) and u_j, s_j (m, B, D), the kernel's h^2 being h2 (B,).

    Also returns delta (m', m, B, D) and k (m', m, B).
    """
    delta = u[:, None] - others  # (m', m, B, D)
    k = (-delta.square().sum(-1) / (2 * h2)).exp()  # (m', m, B)
    phi = (k[..., None] * (scores + delta / h2[:, None])).mean(1)  # (m', B, D); grad_{u_j} k = k delta / h^2
    return phi, delta, k


def svgd(score_of: Callable, u: torch.Tensor, steps: int, eps: float, h2: torch.Tensor | None = None):
    """`steps` steps of (2) from the particles u (m, B, D), with score_of(u) -> (m, B, D) and h^2 of `bandwidth` or h2.

    Returns the particles where they end, (m, B, D), and log q^L - log q^0 of each, (m, B), equation (3). The latter
    is a change of variables to the first order in eps; u is to be independent draws, one state's beside another's.
    """
    m, _, action_dim = u.shape
    change = torch.zeros_like(u[..., 0])  # (m, B)
    for _ in range(steps):
        scores, width = score_of(u), bandwidth(u, eps) if h2 is None else h2
        phi, delta, k = svgd_direction(u, u, scores, width)
        terms = k * ((delta * scores).sum(-1) + delta.square().sum(-1) / width - action_dim)  # (m, m, B)
        change = change + eps / ((m - 1) * width) * (terms.sum(1) + action_dim)  # the term of j = i is -D
        u = u + eps * phi
    return u, change


def truncated_normal(out: torch.Tensor, rng: torch.Generator | None = None) -> torch.Tensor:
    """Fill `out` with N(0, 1), what is outside of 3 standard deviations drawn anew: the paper's start of particles.

    log q^0 in (3) is that of N(mu, sigma^2) all the same, which is too low by 0.0027 a dimension at every point.
    """
    return nn.init.trunc_normal_(out, a=-3.0, b=3.0, generator=rng)


def stein_policy(
    initial: Callable, qf: Callable, obs: torch.Tensor, noise: torch.Tensor, alpha: float, steps: int, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Actions (m, B, D) for obs (B, O) and noise xi (m, B, D), and log pi(a|s), (m, B): equations (1) to (3)."""
    mean, log_std = initial(obs)  # (B, D) each
    log_q0 = (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)  # (m, B)
    u, change = svgd(lambda u: score(qf, obs, u, alpha), mean + log_std.exp() * noise, steps, eps)
    return torch.tanh(u), log_q0 + change - log_one_minus_tanh2(u).sum(-1)


def monte_carlo_value(q: torch.Tensor, log_prob: torch.Tensor, alpha: torch.Tensor | float) -> torch.Tensor:
    """Estimate of V(s), (B,), from M actions of the policy: equation (4). q, log_prob: (M, B)."""
    return (q - alpha * log_prob).mean(0)


class S2AC(nn.Module):
    """Policy and soft Q-functions. Observations (B, O), actions (B, D) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.alpha, self.obs_dim, self.action_dim = args.alpha, obs_dim, action_dim
        self.particles, self.eps = args.svgd_particles, args.svgd_step_size
        self.steps = (20 if args.variant == "phi" else 3) if args.svgd_steps is None else args.svgd_steps
        self.initial = InitialGaussian(obs_dim, action_dim, args)
        self.qf = SmoothTwinQ(obs_dim, action_dim)
        self.sampler = elu_mlp(obs_dim + action_dim, action_dim) if args.variant == "phi-theta-psi" else None
        fixed_xi = truncated_normal(torch.empty(self.particles, action_dim), torch.Generator().manual_seed(0))
        self.register_buffer("fixed_xi", fixed_xi)  # (m, D)

    def act_noise(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """What `act` takes for n observations: draws (m, n, D) from N(0, I) within three standard deviations."""
        return truncated_normal(torch.empty(self.particles, n, self.action_dim, device=rng.device), rng)

    def act(self, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Actions (B, D): a particle of those of `noise` (m, B, D). All of them have one law, so the first will do."""
        return self.policy(obs, noise)[0][0]

    def policy(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (m, B, D) of noise (m, B, D) and log pi(a|s), (m, B): equations (1) to (3)."""
        return stein_policy(self.initial, self.qf, obs, noise, self.alpha, self.steps, self.eps)

    def sample(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        """Actions (B, D): a draw from the policy or, if deterministic, the best by Q of the particles of fixed draws.

        With a sampler (variant phi-theta-psi) f(s, z) of a draw z or, if deterministic, of z = 0.
        """
        if self.sampler is not None:
            z = obs.new_zeros(len(obs), self.action_dim)
            return torch.tanh(self.sampler(torch.cat([obs, z if deterministic else z.normal_()], -1)))
        if not deterministic:
            return self.act(obs, truncated_normal(obs.new_empty(self.particles, len(obs), self.action_dim)))
        actions, _ = self.policy(obs, self.fixed_xi[:, None].expand(-1, len(obs), -1))  # (m, B, D)
        best = self.q(obs.expand(self.particles, *obs.shape), actions).amin(-1).argmax(0)  # (B,)
        return actions[best, torch.arange(len(obs), device=obs.device)]

    def q(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2)."""
        return self.qf(obs, action)

    def v(self, obs: torch.Tensor, samples: int = 40) -> torch.Tensor:
        """V_1(s), V_2(s): (B, 2), equation (4) for each head, from `samples` actions a state, m at a time."""
        values = []
        for _ in range(math.ceil(samples / self.particles)):
            noise = truncated_normal(obs.new_empty(self.particles, len(obs), self.action_dim))
            actions, log_prob = self.policy(obs, noise)
            q = self.q(obs.expand(self.particles, *obs.shape), actions)  # (m, B, 2)
            values.append(monte_carlo_value(q, log_prob[..., None], self.alpha))
        return torch.stack(values).mean(0)

    @torch.no_grad()
    def statistics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is logged of the policy: entropy (nats), spread of the actions in a state, log sigma; batch means."""
        noise = truncated_normal(obs.new_empty(self.particles, len(obs), self.action_dim))
        actions, log_prob = self.policy(obs, noise)
        log_sigma = self.initial(obs)[1].mean()
        return dict(entropy=-log_prob.mean(), action_std=actions.std(0).mean(), log_sigma=log_sigma)


LOSSES = ("qf_loss", "qf1_loss", "qf2_loss", "q1", "q2", "target", "grad_norm", "actor_loss", "stein_norm")


def flatten_parameters(modules: list[nn.Module]) -> torch.Tensor:
    """Move the parameters of S equal nets into the rows of one tensor (S, P), of which they become views.

    Gradient norm, Adam and Polyak averaging are then one operation each instead of one a parameter.
    """
    flat = torch.stack([flattened(m.parameters()).detach() for m in modules])
    for module, row in zip(modules, flat, strict=True):
        for p, view in zip(module.parameters(), unflatten(row, module).values(), strict=True):
            p.data = view
    return flat


def flattened(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """One vector (P,) of them all, each from a multiple of 16 bytes on, as CUDA's batched products need; 0 between."""
    return torch.cat([part for x in tensors for part in (x.flatten(), x.new_zeros(-x.numel() % 4))])


def unflatten(vector: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of `module` by name, as views of a row (P,) of flatten_parameters."""
    sizes = [p.numel() + -p.numel() % 4 for p in module.parameters()]
    parts = zip(module.named_parameters(), vector.split(sizes), strict=True)
    return {name: part[: p.numel()].view(p.shape) for (name, p), part in parts}


def gradient_of(loss: Callable, params: dict[str, torch.Tensor], args: Args) -> tuple[torch.Tensor, tuple]:
    """d loss / d params as one vector (P,), and what else loss(params) -> (loss, others) returns.

    By torch.func, which compiles and vectorises, or, where neither is asked for, by autograd in less time.
    """
    if args.num_seeds > 1 or torch.compiler.is_compiling():
        grads, others = torch.func.grad(loss, has_aux=True)(params)
        return flattened(grads.values()), others
    params = {name: p.detach().requires_grad_() for name, p in params.items()}
    with torch.enable_grad():
        value, others = loss(params)
        grads = torch.autograd.grad(value, list(params.values()))
    return flattened(grads), others


def compiled(function: Callable, args: Args) -> Callable:
    """`function`, pure and of tensors, compiled if --compile is on. A compiler that fails is reported and left out."""
    if args.compile != "on":
        return function
    cuda = choose_device(args).type == "cuda"
    # Launched without Python in between; a CPU's loops read what they need twice instead of computing it in each
    options = {"triton.cudagraphs": True} if cuda else {"cpp_wrapper": True, "realize_reads_threshold": 0}
    options["guard_filter_fn"] = torch.compiler.keep_tensor_guards_unsafe  # check shapes, not every module, each time
    fast, chosen = torch.compile(function, fullgraph=True, options=options), None

    def first(*inputs):
        nonlocal chosen
        if chosen is not None:
            return chosen(*inputs)
        start = time.time()
        try:
            outputs, chosen = fast(*inputs), fast
        except Exception as e:  # whatever a missing header or a full disk leads to; the function itself runs below
            tqdm.write(f"--compile: {type(e).__name__}: {str(e).strip().splitlines()[0]}; goes on without")
            outputs, chosen = function(*inputs), function
        else:
            tqdm.write(f"compiled {function.__name__} in {time.time() - start:.0f} s")
        return outputs

    return first


def over_seeds(function: Callable, args: Args) -> Callable:
    """`function` of one seed's tensors, to be called with a leading axis of seeds on each of them."""
    if args.num_seeds > 1:
        return torch.vmap(function)

    @functools.wraps(function)
    def alone(*inputs):
        return tuple(output[None] for output in function(*(x[0] for x in inputs)))

    return alone


def draw_s2ac_noise(action_dim: int, args: Args, rng: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """The random numbers of an update: xi for (6) and for (7), (2, m, B, D), and z for (8), (2 m, B, D).

    They are drawn outside of what is compiled, so that a recorded update never repeats them.
    """
    shape = (args.svgd_particles, args.batch_size, action_dim)
    noise = truncated_normal(torch.empty(2, *shape, device=rng.device), rng)
    n = 2 * args.svgd_particles if args.variant == "phi-theta-psi" else 0
    return noise, torch.randn(n, *shape[1:], generator=rng, device=rng.device)


def make_s2ac_update(agents: list[S2AC], args: Args):
    """Returns update(*batch, *noise, n=n) -> statistics (S, 9), named in LOSSES: a step of (6), (7) and (8).

    Of S agents at once, batch and noise with a leading axis S; n counts the updates (nothing here depends on it).
    The statistics of a net that the variant does not have are 0. Also returns, by name, what an update changes
    besides the agents: the targets Q' and the optimisers.
    """
    agent = agents[0]  # for its structure; the parameters are in the rows of what follows
    targets = [copy.deepcopy(each.qf).requires_grad_(False) for each in agents]
    q_params, target_params = flatten_parameters([each.qf for each in agents]), flatten_parameters(targets)  # (S, P)
    initial_params = q_params.new_zeros(len(agents), 0)  # (S, P'), none in variant phi
    alpha, eps = q_params.new_tensor([args.alpha, args.svgd_step_size])  # tensors: compiled once for all values
    learner = dict(target=targets, q_optimizer=torch.optim.Adam([q_params], lr=args.learning_rate, fused=True))
    if args.variant != "phi":
        initial_params = flatten_parameters([each.initial for each in agents])
        learner["initial_optimizer"] = torch.optim.Adam([initial_params], lr=args.learning_rate, fused=True)
    if args.variant == "phi-theta-psi":
        sampler_params = flatten_parameters([each.sampler for each in agents])  # (S, P'')
        learner["sampler_optimizer"] = torch.optim.Adam([sampler_params], lr=args.learning_rate, fused=True)

    def call(net, params, *inputs):
        return functional_call(net, params, inputs)

    def policy(initial, qf, obs, noise):
        functions = (functools.partial(call, agent.initial, initial), functools.partial(call, agent.qf, qf))
        return stein_policy(*functions, obs, noise, alpha, agent.steps, eps)

    def q_gradient(q_params, target_params, initial_params, obs, actions, rewards, next_obs, terminations, noise):
        initial, target = unflatten(initial_params, agent.initial), unflatten(target_params, agent.qf)
        next_actions, next_log_prob = policy(initial, unflatten(q_params, agent.qf), next_obs, noise)  # (m, B, D)
        next_q = call(agent.qf, target, next_obs.expand(len(noise), *next_obs.shape), next_actions).amin(-1)  # (m, B)
        next_v = monte_carlo_value(next_q, next_log_prob, alpha)  # (B,)
        y = rewards + args.gamma * (1 - terminations) * next_v  # (B,)

        def loss(params):
            q = functional_call(agent.qf, params, (obs, actions))  # (B, 2)
            qf_loss = (q - y[:, None]).square().mean(0)  # (2,)
            return qf_loss.mean(), torch.cat([qf_loss.mean()[None], qf_loss, q.mean(0), y.mean()[None]])

        grad, stats = gradient_of(loss, unflatten(q_params, agent.qf), args)  # (P,), (6,)
        return grad, torch.cat([stats, grad.norm()[None]]).detach()

    def initial_gradient(initial_params, q_params, obs, noise):
        qf = unflatten(q_params, agent.qf)

        def loss(params):
            actions, log_prob = policy(params, qf, obs, noise)
            q = call(agent.qf, qf, obs.expand(len(noise), *obs.shape), actions).amin(-1)  # (m, B)
            actor_loss = (alpha * log_prob - q).mean()
            return actor_loss, actor_loss

        grad, actor_loss = gradient_of(loss, unflatten(initial_params, agent.initial), args)
        return grad, actor_loss.detach()

    def sampler_gradient(sampler_params, q_params, obs, z):
        sampler, qf = unflatten(sampler_params, agent.sampler), unflatten(q_params, agent.qf)
        x = torch.cat([obs.expand(len(z), *obs.shape), z], -1)  # (2 m, B, O + D)
        x, x_fixed = x.chunk(2)
        fixed = call(agent.sampler, sampler, x_fixed)  # (m, B, D)
        scores = score(functools.partial(call, agent.qf, qf), obs, fixed, alpha)  # (m, B, D)
        h2 = bandwidth(fixed, eps)  # (B,)

        def loss(params):
            u = call(agent.sampler, params, x)  # (m, B, D)
            phi, _, _ = svgd_direction(u.detach(), fixed, scores, h2)
            return -(phi * u).sum(-1).mean(), phi.norm(dim=-1).mean()  # its gradient moves u along phi

        grad, stein_norm = gradient_of(loss, sampler, args)
        return grad, stein_norm.detach()

    gradients = (q_gradient, initial_gradient, sampler_gradient)
    q_gradient, initial_gradient, sampler_gradient = (compiled(over_seeds(f, args), args) for f in gradients)

    @torch.no_grad()
    def update(*batch_and_noise: torch.Tensor, n: int) -> torch.Tensor:
        *batch, noise, z = batch_and_noise  # noise: (S, 2, m, B, D)
        actor_loss = stein_norm = q_params.new_zeros(len(agents))  # (S,)
        q_params.grad, stats = q_gradient(q_params, target_params, initial_params, *batch, noise[:, 0])
        stats = stats.clone()  # on a GPU the next recorded call reuses its memory
        learner["q_optimizer"].step()
        if args.variant != "phi":
            initial_params.grad, actor_loss = initial_gradient(initial_params, q_params, batch[0], noise[:, 1])
            actor_loss = actor_loss.clone()
            learner["initial_optimizer"].step()
        if args.variant == "phi-theta-psi":
            sampler_params.grad, stein_norm = sampler_gradient(sampler_params, q_params, batch[0], z)
            learner["sampler_optimizer"].step()
        target_params.lerp_(q_params, args.tau)  # Q' <- Q' + tau (Q - Q')
        return torch.cat([stats, actor_loss[:, None], stein_norm[:, None]], -1)

    return update, learner


# What the code from here on, the same in every script, calls
Agent, draw_noise, make_update = S2AC, draw_s2ac_noise, make_s2ac_update


@torch.random.fork_rng()
@torch.no_grad()
def evaluate(agent: Agent, envs: gym.vector.VectorEnv, deterministic: bool, device: torch.device):
    """One episode in each of `envs`, the same ones every time. Returns their returns (E,) and lengths (E,)."""
    obs, _ = envs.reset(seed=EVAL_SEED)
    torch.manual_seed(EVAL_SEED)  # of sampled actions
    returns, lengths = np.zeros(envs.num_envs), np.zeros(envs.num_envs, dtype=np.int64)
    active = np.ones(envs.num_envs, dtype=bool)  # an environment that is done goes on, but no longer counts
    while active.any():
        actions = agent.sample(torch.as_tensor(obs, dtype=torch.get_default_dtype(), device=device), deterministic)
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


def write_file(path: Path, content: bytes) -> None:
    """Write so that `path` is, at every moment, the old file or the new one, whole."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def save_checkpoint(path: Path, checkpoint: dict) -> None:
    """Write tensors and plain values, their size and SHA-256 to checksums.json, and keep the one before if it is sound.

    checksums.json is first, with the sums of the files that are there, so that at every moment it knows them.
    """
    content = io.BytesIO()
    torch.save(checkpoint, content)
    sums_path, previous = path.with_name("checksums.json"), path.with_name("previous-" + path.name)
    sums = json.loads(sums_path.read_text()) if sums_path.exists() else {}
    known = dict(size=content.tell(), sha256=hashlib.sha256(content.getbuffer()).hexdigest())
    there = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (path, previous) if p.exists()}
    sound = [each for each in sums.get(path.name, []) if each["sha256"] in there.values()]
    sums[path.name] = [known, *sound]
    write_file(sums_path, json.dumps(sums, indent=2).encode())
    if path.name == "checkpoint.pt" and there.get(path) in [each["sha256"] for each in sound]:
        os.replace(path, previous)
    write_file(path, content.getbuffer())


def load_checkpoint(path: str | Path, device: torch.device | str = "cpu") -> dict:
    """Read a checkpoint; nothing in it is executed. Raises UserError if it is missing, damaged or another file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such checkpoint; expected a run's checkpoint.pt or best.pt")
    try:
        sums_path, content = path.with_name("checksums.json"), path.read_bytes()
        if sums_path.exists():  # a file that was copied elsewhere has none beside it
            known = json.loads(sums_path.read_text()).get(re.sub(r"^previous-", "", path.name), [])
            if known and hashlib.sha256(content).hexdigest() not in [each["sha256"] for each in known]:
                raise ValueError("not as in checksums.json")
        checkpoint = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
        algorithm, saved_args = checkpoint["algorithm"], set(checkpoint.get("args", ()))
        kinds = dict(args=dict, agent=dict, run=dict, obs_dim=int, action_dim=int, global_step=int, best_return=float)
        wrong = [key for key, kind in kinds.items() if not isinstance(checkpoint.get(key), kind)]
    except Exception as e:  # torch.load raises whatever the damage leads to: pickle, zip, runtime, key errors
        reason = str(e) if type(e) is ValueError else type(e).__name__
        raise UserError(f"{path} is not a readable checkpoint ({reason})") from e
    if type(algorithm) is not str or algorithm != Path(__file__).stem:
        raise UserError(f"{path} was written by {algorithm}.py; load it with that script")
    if differ := saved_args ^ {field.name for field in dataclasses.fields(Args)}:
        differ = ", ".join(sorted(map(str, differ)))
        raise UserError(f"{path} was written by another version of this script: {differ}")
    if wrong:
        raise UserError(f"{path} is not a readable checkpoint (without a proper {', '.join(wrong)})")
    return checkpoint


def latest_checkpoint(run_dir: str | Path) -> tuple[dict, str]:
    """The run's last checkpoint, or the one before if the last is damaged, and what to warn of. Raises UserError."""
    problems = []
    for name in ("checkpoint.pt", "previous-checkpoint.pt"):
        try:
            checkpoint = load_checkpoint(Path(run_dir) / name)
            return checkpoint, f"{problems[0]}; goes on from {name}" if problems else ""
        except UserError as e:
            problems.append(str(e))
    raise UserError(f"--resume {run_dir}: nothing to go on from: {problems[0]}")


def load_agent(path: str | Path, device: torch.device | str = "cpu", args: Args | None = None) -> tuple[Agent, Args]:
    """The agent of a checkpoint and its args (or the ones given). Raises UserError if they do not fit together."""
    checkpoint = load_checkpoint(path, device)
    args = args or Args(**checkpoint["args"])
    try:
        agent = Agent(checkpoint["obs_dim"], checkpoint["action_dim"], args).to(device)
        agent.load_state_dict(checkpoint["agent"])
    except Exception as e:  # whatever a file of another making leads to
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


def lock_run(run_dir: Path) -> io.BufferedWriter:
    """The run's lock, held until it is closed or the process ends. Raises UserError if another process has it."""
    lock = open(run_dir / "lock", "ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
        raise UserError(f"--resume {run_dir}: another process goes on with it; expected it to have ended") from e
    except OSError as e:  # a file system without locks
        print(f"warning: {run_dir}: no lock ({e.strerror}); let no second process go on with it", file=sys.stderr)
    return lock


def new_folder(path: Path) -> Path:
    """Make NAME__SECOND, or that of a later second if another run of this name has it."""
    name, _, second = path.name.rpartition("__")
    while True:
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            second = int(second) + 1
            path = path.with_name(f"{name}__{second}")


def start_run(args: Args, checkpoint: dict | None) -> tuple[Path, SummaryWriter, io.BufferedWriter]:
    """Create the run's folder with args.json, or go on with the checkpoint's; lock it, start logs, print the args."""
    name = re.sub(r"[^\w.-]", "_", f"{args.env_id}__{args.exp_name}__{args.seed}")
    run_dir = Path("runs") / f"{name}__{int(time.time())}" if checkpoint is None else Path(args.resume)
    values = dataclasses.asdict(args)
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, gym, np)}
    device = torch.cuda.get_device_name() if choose_device(args).type == "cuda" else "no GPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {device}"
    facts = dict(args=values, command=shlex.join(sys.argv), commit=commit(), machine=machine, versions=versions)
    try:
        run_dir = new_folder(run_dir) if checkpoint is None else run_dir
        lock, file, void = lock_run(run_dir), "args.json", None
        if checkpoint is not None:
            if (step := checkpoint["global_step"]) != latest_checkpoint(run_dir)[0]["global_step"]:
                raise UserError(f"--resume {run_dir}: another process went on with it; expected to be alone")
            file, void = f"args-from-{step}.json", step + 1  # what a killed run logged from there on
        write_file(run_dir / file, json.dumps(facts, indent=2).encode())
    except OSError as e:
        raise UserError(f"{run_dir}: cannot be written ({e.strerror}); expected a folder runs/ with space") from e
    if args.track:
        import wandb

        names = dict(project=args.wandb_project_name, entity=args.wandb_entity, name=run_dir.name)
        once = dict(id=run_dir.name[-128:], resume="allow")  # a resumed run goes on under its id
        wandb.init(**names, **once, config=values, sync_tensorboard=True, save_code=True)
    writer = SummaryWriter(str(run_dir), purge_step=void)
    if checkpoint is None:
        rows = "\n".join(f"|{key}|{value}|" for key, value in values.items())
        writer.add_text("hyperparameters", f"|param|value|\n|-|-|\n{rows}")
    print(f"run: {run_dir}\n" + "  ".join(f"{key}={value}" for key, value in values.items()))
    return run_dir, writer, lock


def choose_compile(args: Args) -> bool:
    """--compile: whether to, and one line if that is not what the flag says or why auto leaves it."""
    updates = int(args.utd * (args.total_timesteps - args.learning_starts))
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    why = ""
    if args.compile == "auto" and updates < COMPILE_PAYS:
        why = f"{updates} updates do not pay for it (--compile on to do it all the same)"
    elif compiler is None:
        why = "no C++ compiler is found (apt-get install g++, or name one in CXX)"
    if why and args.compile != "off":
        print(f"not compiled: {why}")
    return args.compile != "off" and not why


def seed_state(learner: dict, s: int) -> dict:
    """What a checkpoint keeps of seed s beside its agent: the target's parameters and the state of the optimisers."""
    state = {}
    for name, part in learner.items():
        if isinstance(part, torch.optim.Optimizer):
            (moments,) = part.state.values() or ({},)  # one parameter (S, P); nothing before the first step
            state[name] = {key: x[s].clone() if x.dim() else x for key, x in moments.items()}
        else:
            state[name] = {key: x.clone() for key, x in part[s].state_dict().items()}
    return state


def load_seed_state(learner: dict, state: dict) -> None:
    """Put back what seed_state took, of a learner of one seed."""
    for name, part in learner.items():
        if isinstance(part, torch.optim.Optimizer):
            (params,) = part.param_groups[0]["params"]  # (1, P)
            moments = {key: (x if key == "step" else x[None]).to(params.device) for key, x in state[name].items()}
            if any(x.dim() and x.shape != params.shape for x in moments.values()):  # Adam itself would not look
                raise ValueError(f"{name}: not the moments of {params.shape[1]} parameters, of this version's layout")
            part.state = collections.defaultdict(dict, {params: moments} if moments else {})
        else:
            part[0].load_state_dict(state[name])


def make_runs(args: Args) -> tuple[Callable, list[Generator], dict]:
    """The update of --num-seeds agents at once, and the run of each, not begun. Raises UserError.

    Also what the runs look at: `stop`, a signal's number once they are to stop, and `updates`, how many there were.
    """
    check_args(args)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), 4))  # more do not help nets of this size
    if hasattr(libc := ctypes.CDLL(None), "mallopt"):  # glibc would give freed tensors back to the system, ...
        libc.mallopt(-1, 2**30), libc.mallopt(-3, 2**25)  # ... and fault their pages in anew at every update
    device = choose_device(args)

    env = make_env(args.env_id)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    args = dataclasses.replace(args, compile="on" if choose_compile(args) else "off")
    seeds = [dataclasses.replace(args, seed=args.seed + s, num_seeds=1) for s in range(args.num_seeds)]
    agents = []
    for seed in seeds:
        torch.manual_seed(seed.seed)
        agents.append(Agent(obs_dim, action_dim, args).to(device))
    if args.compile == "on":
        torch.compiler.reset()  # what a run before in this process compiled has the numbers of its flags in it
    update, learner = make_update(agents, args)
    control, checkpoint = dict(stop=0, updates=0, at_episode_end=args.num_seeds == args.num_envs == 1), None
    if args.resume is not None:
        checkpoint, problem = latest_checkpoint(args.resume)
        if problem:
            print(f"warning: {problem}", file=sys.stderr)
        if checkpoint["global_step"] >= args.total_timesteps:
            raise UserError(f"--resume {args.resume}: finished, at step {checkpoint['global_step']}")
        try:
            agents[0].load_state_dict(checkpoint["agent"])
            load_seed_state(learner, checkpoint)
            control["updates"] = checkpoint["run"]["updates"]
        except Exception as e:  # whatever a file of another making leads to
            raise UserError(
                f"--resume {args.resume} does not fit {args.env_id}: {' '.join(str(e).split())[:300]}"
            ) from e
    runs = []
    for s, (seed, agent) in enumerate(zip(seeds, agents, strict=True)):
        state = functools.partial(seed_state, learner, s)
        runs.append(run_seed(seed, agent, state, checkpoint, control, s == 0, device))
    return update, runs, control


def advance(runs: list[Generator], stats: Sequence[torch.Tensor | None]) -> tuple[list[torch.Tensor], list[Path]]:
    """Each run on to its next update or step: the inputs of all updates, with a leading axis S, none at a step
    without; the folders at the end."""
    inputs, folders = [], []
    for run, row in zip(runs, stats, strict=True):
        try:
            inputs.append(run.send(row))
        except StopIteration as end:
            folders.append(end.value)
    stacked = [torch.stack(x) if len(x) > 1 else x[0][None] for x in zip(*inputs, strict=True)]  # one is not copied
    return stacked, folders


def train(args: Args) -> list[Path]:
    """Train, evaluate, log and save --num-seeds runs in lock step, their updates as one. Returns their folders.

    On SIGINT or SIGTERM the runs save themselves, and SystemExit has the shell's code for the signal, 130 or 143.
    """
    update, runs, control = make_runs(args)
    received = []

    def on_signal(number: int, frame: object) -> None:
        received.append(number)
        if len(received) > 1:
            raise KeyboardInterrupt  # now

    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        inputs, folders = advance(runs, [None] * len(runs))  # sending None begins a generator
        while not folders:
            control["stop"] = sum(received)  # all runs see it at the same step
            stats = update(*inputs, n=control["updates"]) if inputs else [None] * len(runs)
            control["updates"] += bool(inputs)
            inputs, folders = advance(runs, stats)
    except KeyboardInterrupt:
        sys.exit(128 + received[0])
    finally:
        if "bar" in control:
            control["bar"].close()  # what is printed next has a line of its own
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if control["stop"]:
        sys.exit(128 + control["stop"])
    return folders


def run_seed(
    args: Args, agent: Agent, learner_state: Callable, checkpoint: dict | None, control: dict, show: bool, device
) -> Generator[tuple[torch.Tensor, ...], torch.Tensor, Path]:
    """The run of one seed, from its start or from a checkpoint of --resume.

    Yields the batch and the noise of each update, is sent its statistics (L,) when it is done; yields () at a step
    without an update. Returns the run's folder. Whoever drives it changes the parameters of `agent` and, in make_runs'
    `control`, asks it to stop; learner_state() is the rest of what a checkpoint keeps. Draws a progress bar if `show`.
    """
    rng = torch.Generator(device).manual_seed(args.seed)  # of everything that training draws
    envs = make_envs(args.env_id, args.num_envs, args.async_envs)
    eval_envs = make_envs(args.env_id, args.eval_episodes)
    obs_dim, action_dim = agent.obs_dim, agent.action_dim
    act = compiled(agent.act, args)

    run_dir, writer, lock = start_run(args, checkpoint)
    buffer_path = run_dir / "buffer.bin"
    if checkpoint is not None and not buffer_path.exists():
        raise UserError(f"{buffer_path}: no such file; expected the replay buffer of the run")
    capacity = min(args.buffer_size, args.total_timesteps + args.num_envs)
    buffer = ReplayBuffer(capacity, args.num_envs, obs_dim, action_dim, device, buffer_path)
    print(f"disk: {buffer_path} takes {buffer_path.stat().st_size / 1e9:.3f} GB until the run is finished")
    global_step, updates_due, start_time = 0, 0.0, time.time()
    best_return, eval_return, episodic_return = -math.inf, math.nan, math.nan
    stats = []  # (global_step, statistics (L,)) of the updates since the last log
    if checkpoint is None:
        obs, _ = envs.reset(seed=args.seed)
    else:  # with the episodes under way drawn again
        global_step, best_return, run = checkpoint["global_step"], checkpoint["best_return"], checkpoint["run"]
        updates_due, eval_return, episodic_return = run["updates_due"], run["eval_return"], run["episodic_return"]
        buffer.position, buffer.size, start_time = run["position"], run["size"], start_time - run["elapsed"]
        rng.set_state(run["rng"]) if run["device"] == device.type else rng.manual_seed(args.seed + global_step)
        stats = [(step, row.to(device)) for step, row in run["stats"]]
        known = not args.async_envs and None not in run["episodes"]
        if known:
            envs.set_attr("again", run["episodes"])
        obs, _ = envs.reset(seed=None if known else args.seed + global_step)
    obs_tensor = torch.as_tensor(obs).to(buffer.rows)  # (N, O)
    if args.capture_video:
        record_video(agent, args, run_dir / "videos", f"step-{global_step}", device)  # fails now if it is going to

    def save(name: str) -> None:
        if stats and name == "checkpoint.pt":
            check_losses()  # it keeps nothing that is not finite
        writer.flush()
        buffer.flush()
        episodes = [None] if args.async_envs else list(envs.get_attr("rng_state"))
        run = dict(updates=control["updates"], updates_due=updates_due, position=buffer.position, size=buffer.size)
        run |= dict(rng=rng.get_state(), device=device.type, stats=[(step, row.cpu()) for step, row in stats])
        run |= dict(episodes=episodes, eval_return=eval_return, episodic_return=episodic_return)
        facts = dict(algorithm=Path(__file__).stem, args=dataclasses.asdict(args), obs_dim=obs_dim)
        facts |= dict(action_dim=action_dim, global_step=global_step, best_return=best_return)
        facts |= dict(run=run | dict(elapsed=time.time() - start_time))
        agent_state = {name: x.clone() for name, x in agent.state_dict().items()}
        save_checkpoint(run_dir / name, facts | dict(agent=agent_state) | learner_state())

    def check_losses() -> torch.Tensor:
        """Statistics of the updates since the last log, (updates, L). Stops the run if one is not finite."""
        losses = torch.stack([s for _, s in stats]).cpu()
        for i in losses.isfinite().all(-1).logical_not().nonzero().flatten().tolist():
            row = ", ".join(f"{k}={v:.4g}" for k, v in zip(LOSSES, losses[i].tolist(), strict=True))
            fail(f"the loss is not finite: at step {stats[i][0]}, {row}", "failed.pt")
        return losses

    def fail(message: str, name: str) -> None:
        save(name)
        if args.async_envs:  # their own close() would wait for one that died
            envs.closed = True
            for process in envs.processes:
                process.kill()
        raise RunError(f"{message}. The state at step {global_step} is in {run_dir}/{name}")

    if checkpoint is None:
        save("checkpoint.pt")  # from here on, a run that is killed leaves a file that loads
    saved_at, stopping, ended = time.time(), False, True
    interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file needs fewer lines
    bar = dict(total=args.total_timesteps, initial=global_step, mininterval=interval, maxinterval=interval)
    bar = tqdm(**bar, unit="step", disable=not show)
    control.setdefault("bar", bar)
    while global_step < args.total_timesteps:
        if control["stop"] and not stopping:
            stopping = True
            save("checkpoint.pt")  # in case that the process is not given the time
        if stopping and (ended or not control["at_episode_end"]):
            break
        if global_step < args.learning_starts:
            actions = torch.rand(args.num_envs, action_dim, generator=rng, device=device) * 2 - 1  # (N, D)
        else:
            with torch.no_grad():
                actions = act(obs_tensor, agent.act_noise(args.num_envs, rng))
        env_actions = actions.cpu().numpy()
        if not np.isfinite(env_actions).all():  # never reaches the task
            if stats:
                check_losses()
            fail(f"the actions are not finite at step {global_step}, for the observations {obs}", "failed.pt")

        # The updates of the steps so far come before this step, which a GPU then computes while the task simulates
        updates_due += args.num_envs * args.utd * (global_step >= args.learning_starts)
        if updates_due < 1:
            yield ()
        while updates_due >= 1:
            updates_due -= 1
            batch, noise = buffer.sample(args.batch_size, rng), draw_noise(action_dim, args, rng)
            stats.append((global_step, (yield *batch, *noise)))
        try:
            next_obs, rewards, terminations, truncations, infos = envs.step(env_actions)
        except Exception as e:  # the task's own, or that of a pipe to a process that died, or is about to
            wait = 0.1 if isinstance(e, EOFError | OSError) else 0
            died = [p.exitcode for p in getattr(envs, "processes", []) if p.join(wait) or p.exitcode]
            died = f" (a process of --async-envs died, exit code {died[0]})" if died else ""
            fail(f"{args.env_id} failed in step: {type(e).__name__}: {e}{died}", "checkpoint.pt")

        # next_obs already belongs to the next episode where one ended; the transition needs the true last one
        last_obs = next_obs.copy()
        for i in np.flatnonzero(terminations | truncations):
            last_obs[i] = infos["final_obs"][i]
        columns = (obs, env_actions, rewards[:, None], last_obs, terminations[:, None], next_obs)
        step = np.concatenate(columns, 1, dtype=np.float32)
        if not np.isfinite(step).all():
            fail(f"{args.env_id} returned rewards {rewards}, observations {last_obs}: not finite", "checkpoint.pt")
        global_step += args.num_envs
        bar.update(args.num_envs)
        for i in np.flatnonzero(terminations | truncations):
            episodic_return = float(infos["final_info"]["episode"]["r"][i])
            writer.add_scalar("charts/episodic_return", episodic_return, global_step)
            writer.add_scalar("charts/episodic_length", float(infos["final_info"]["episode"]["l"][i]), global_step)
        on_host = torch.from_numpy(step)
        step = on_host.to(buffer.rows)  # one transfer
        buffer.add(step[:, :-obs_dim], on_host[:, :-obs_dim])
        obs, obs_tensor, ended = next_obs, step[:, -obs_dim:], bool((terminations | truncations).all())

        eval_due = global_step % args.eval_frequency < args.num_envs or global_step >= args.total_timesteps
        if stats and (eval_due or global_step % 100 < args.num_envs):
            for name, value in zip(LOSSES, check_losses().mean(0).tolist(), strict=True):
                writer.add_scalar(f"losses/{name}", value, global_step)
            stats.clear()
            torch.manual_seed(global_step)  # of the states and of what statistics samples; training draws from rng
            for name, value in agent.statistics(buffer.sample(args.batch_size, None).obs).items():
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
        due = global_step % args.checkpoint_frequency < args.num_envs and global_step < args.total_timesteps
        if due or time.time() - saved_at > 60 * args.checkpoint_minutes:
            save("checkpoint.pt")
            saved_at = time.time()
    save("checkpoint.pt")
    bar.close()
    writer.close()
    lock.close()
    envs.close()
    eval_envs.close()
    if global_step < args.total_timesteps:
        command = shlex.join(["python", sys.argv[0], "--resume", str(run_dir)])
        print(f"stopped at step {global_step}; go on with: {command}")
    else:
        buffer_path.unlink()
        print(f"evaluation return {eval_return:.1f} (best {best_return:.1f}); checkpoints in {run_dir}")
    return run_dir


if __name__ == "__main__":
    try:
        args = parse_args()
        replay(args) if args.evaluate else train(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        if "--debug" in sys.argv:
            raise
        known, message = isinstance(e, UserError | RunError), " ".join(str(e).split())  # arrays have many lines
        message = message if known else f"{type(e).__name__}: {message} (--debug shows where)"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(e, UserError) else 1)
