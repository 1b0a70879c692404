"""SAC: soft actor-critic with an automatic temperature, in one file.

Haarnoja, Zhou, Hartikainen, Tucker, Ha, Tan, Kumar, Zhu, Gupta, Abbeel and Levine, "Soft Actor-Critic Algorithms
and Applications", 2018, https://arxiv.org/abs/1812.05905, with the hyperparameters of CleanRL's script

    python sac_continuous_action.py --env-id Ant-v4

Three networks beside each other: an actor, a Gaussian before its tanh, and two Q-functions. The soft value
V(s) = E [Q(s,a) - alpha log pi(a|s)] has no network; it is estimated from actions sampled from pi, one in the
target, and holds for the actor, not for Q: the two agree where training ends. B: batch, O: obs, D: action.

    equation                                                                    here
    (1)  u ~ N(mu(s), sigma(s)^2),  a = tanh(u)                                 GaussianActor.forward
    (2)  log pi(a|s) = log N(u) - sum log(1 - a^2)                              GaussianActor.forward
    (3)  Q_i(s,a), two nets                                                     ShiftedTwinQ.forward, SAC.q
    (4)  V(s) = (1/M) sum_j [min_i Q_i(s,a_j) - alpha log pi(a_j|s)],  a_j ~ pi monte_carlo_value, SAC.v
    (5)  y = r + gamma (1 - d) V'(s'),  M = 1,  L_Q = mean (Q_i(s,a) - y)^2     make_sac_update
    (6)  L_pi = mean (alpha log pi(a|s) - min_i Q_i(s,a)),  a ~ pi              make_sac_update
    (7)  L_alpha = -alpha mean (log pi(a|s) + H),  H = -D                       make_sac_update
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
    # SAC's own; the deterministic action is tanh(mu(s))
    alpha: float = 1.0
    """temperature: the weight of the entropy"""
    autotune: bool = True
    """automatic temperature: from alpha on, it moves until the entropy is -D"""
    policy_lr: float = 3e-4
    """Adam's step size for the actor"""
    q_lr: float = 1e-3
    """Adam's step size for the Q-functions and alpha"""
    policy_frequency: int = 2
    """updates between those of the actor, which then makes as many steps"""
    reward_shift: bool = False
    """learnable reward shifts b_1(s), b_2(s) in the Q-functions"""


# CleanRL's settings are the defaults; a v5 id takes the v4 preset. Steps as in MEow's paper. On the goal maps alpha
# and gamma are the map's, so that the soft value can be compared with the optimum.
GOAL_MAP = dict(gamma=0.9, autotune=False, num_envs=8, learning_starts=1_000)
GOAL_MAP |= dict(total_timesteps=16_000, buffer_size=100_000, eval_frequency=2_000)
PRESETS = {
    "Hopper-v4": dict(total_timesteps=1_500_000),
    "HalfCheetah-v4": dict(total_timesteps=1_500_000),
    "Walker2d-v4": dict(total_timesteps=4_000_000),
    "Ant-v4": dict(total_timesteps=4_000_000),
    "Humanoid-v4": dict(total_timesteps=5_000_000),
    "multigoal:MultiGoal-v0": GOAL_MAP | dict(alpha=2.5),
    "multigoal:MultiGoalAsymmetric-v0": GOAL_MAP | dict(alpha=10.0, gamma=0.8),
}
OWN_POSITIVE = (
    "alpha",
    "policy_lr",
    "q_lr",
    "policy_frequency",
)  # for check_args: what the algorithm's own flags must be
OWN_RANGES = {}


EVAL_SEED = 10_000  # evaluation episodes start from seeds 10000, 10001, ..., whatever --seed is
COMPILE_PAYS = 20_000  # updates from which on compiling, about a minute without a cache, saves more than it costs


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


def swish(x: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """x sigmoid(beta x), with one learnable beta a unit."""
    return x * (beta * x).sigmoid_()


class StateNet(nn.Module):
    """O -> hidden -> hidden -> out, for sigma and the shifts; zero weights, so the start depends on no state.

    Weights are (in, out): the gradient of a narrow first layer takes a CPU a quarter of the time of nn.Linear's.
    """

    def __init__(self, obs_dim: int, hidden_dim: int, out_dim: int):
        super().__init__()
        sizes = ((obs_dim, hidden_dim), (hidden_dim, hidden_dim), (hidden_dim, out_dim))
        self.weight1, self.weight2, self.weight3 = (nn.Parameter(torch.zeros(n, m)) for n, m in sizes)
        biases = (torch.empty(m).uniform_(-1, 1) / math.sqrt(n) for n, m in sizes)  # as nn.Linear draws them
        self.bias1, self.bias2, self.bias3 = (nn.Parameter(bias) for bias in biases)
        self.beta1, self.beta2 = nn.Parameter(torch.ones(hidden_dim)), nn.Parameter(torch.ones(hidden_dim))

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        h = swish(nn.functional.linear(obs, self.weight1.t(), self.bias1), self.beta1)  # (B, hidden)
        h = swish(nn.functional.linear(h, self.weight2.t(), self.bias2), self.beta2)  # (B, hidden)
        if self.bias3.shape[0] == 1:  # as a sum: the gradient of a product with one column is slow on a CPU
            return (h * self.weight3.t()).sum(-1, keepdim=True) + self.bias3  # (B, 1)
        return nn.functional.linear(h, self.weight3.t(), self.bias3)  # (B, out)


def mlp(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """in -> hidden -> hidden -> out with ReLU."""
    layers = (nn.Linear(in_dim, hidden_dim), nn.ReLU(True), nn.Linear(hidden_dim, hidden_dim), nn.ReLU(True))
    return nn.Sequential(*layers, nn.Linear(hidden_dim, out_dim))


class ShiftedTwinQ(nn.Module):
    """Q_1 and Q_2; with the reward shift Q_i(s,a) = net_i(s,a) + b_i(s). The target is a copy of this."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.nets = nn.ModuleList([mlp(obs_dim + action_dim, 256, 1) for _ in range(2)])
        self.shift_nets = nn.ModuleList([StateNet(obs_dim, 256, 1) for _ in range(2 * args.reward_shift)])

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2), equation (3)."""
        x = torch.cat([obs, action], -1)  # (B, O + D)
        q = torch.cat([net(x) for net in self.nets], -1)  # (B, 2)
        return q + torch.cat([net(obs) for net in self.shift_nets], -1) if len(self.shift_nets) else q


def log_one_minus_tanh2(u: torch.Tensor) -> torch.Tensor:
    """log(1 - tanh(u)^2), exact where tanh rounds to 1."""
    return 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))


class GaussianActor(nn.Module):
    """pi(.|s): tanh of a Gaussian."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.net = mlp(obs_dim, 256, 2 * action_dim)

    def gaussian(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mu(s) and log sigma(s), (B, D) each, the latter squashed into [-5, 2]."""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, -5 + 0.5 * (2 + 5) * (torch.tanh(log_std) + 1)

    def forward(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, D), equation (1), of noise (B, D) from N(0, I), and log pi(a|s), (B,), equation (2)."""
        mean, log_std = self.gaussian(obs)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - log_one_minus_tanh2(u)
        return torch.tanh(u), log_prob.sum(-1)


def monte_carlo_value(q: torch.Tensor, log_prob: torch.Tensor, alpha: torch.Tensor | float) -> torch.Tensor:
    """Estimate of V(s), (B,), from M actions of the policy: equation (4). q, log_prob: (M, B)."""
    return (q - alpha * log_prob).mean(0)


class SAC(nn.Module):
    """Policy and soft Q-functions. Observations (B, O), actions (B, D) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.obs_dim, self.action_dim = obs_dim, action_dim
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)), requires_grad=args.autotune)
        self.actor = GaussianActor(obs_dim, action_dim)
        self.qf = ShiftedTwinQ(obs_dim, action_dim, args)

    def act_noise(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """What `act` takes for n observations: draws (n, D) from N(0, I)."""
        return torch.randn(n, self.action_dim, generator=rng, device=rng.device)

    def act(self, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Actions (B, D), equation (1), of the draws `noise` (B, D) from N(0, I)."""
        mean, log_std = self.actor.gaussian(obs)
        return torch.tanh(mean + log_std.exp() * noise)

    def sample(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        """Actions (B, D): a draw from the policy, or tanh(mu(s)) if deterministic."""
        noise = obs.new_zeros(len(obs), self.action_dim)
        return self.act(obs, noise if deterministic else noise.normal_())

    def sample_with_log_prob(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, D) and log pi(a|s), (B,), both differentiable in the actor's parameters."""
        noise = torch.randn(*obs.shape[:-1], self.action_dim, dtype=obs.dtype, device=obs.device)
        return self.actor(obs, noise)

    def q(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2)."""
        return self.qf(obs, action)

    def v(self, obs: torch.Tensor, samples: int = 256) -> torch.Tensor:
        """V_1(s), V_2(s): (B, 2), equation (4) for each head, from `samples` actions a state."""
        obs = obs.expand(samples, *obs.shape)  # (M, B, O)
        action, log_prob = self.sample_with_log_prob(obs)
        return monte_carlo_value(self.q(obs, action), log_prob[..., None], self.log_alpha.exp())

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """log pi(a|s): (B,), equation (2)."""
        mean, log_std = self.actor.gaussian(obs)
        u = torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))
        log_normal = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
        return (log_normal - log_one_minus_tanh2(u)).sum(-1)

    @torch.no_grad()
    def statistics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is logged of the policy: its entropy (nats) and log sigma, means over the batch, and alpha."""
        entropy = -self.sample_with_log_prob(obs)[1].mean()
        return dict(entropy=entropy, log_sigma=self.actor.gaussian(obs)[1].mean(), alpha=self.log_alpha.exp())


LOSSES = ("qf_loss", "qf1_loss", "qf2_loss", "q1", "q2", "target", "grad_norm", "actor_loss", "alpha_loss")


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


def draw_sac_noise(action_dim: int, args: Args, rng: torch.Generator) -> tuple[torch.Tensor]:
    """The random numbers of an update, for the next actions and each step of the actor: (1 + K, B, D) from N(0, I).

    They are drawn outside of what is compiled, so that a recorded update never repeats them.
    """
    shape = (1 + args.policy_frequency, args.batch_size, action_dim)
    return (torch.randn(shape, generator=rng, device=rng.device),)


def make_sac_update(agents: list[SAC], args: Args):
    """Returns update(*batch, *noise, n=n) -> statistics (S, 9), named in LOSSES: a gradient step of equation (5).

    Of S agents at once, batch and noise with a leading axis S. Where n, the count of updates, is a multiple of
    policy_frequency, that many steps of (6) and (7) follow, on the same batch. Also returns, by name, what an update
    changes besides the agents: the targets Q' and the optimisers.
    """
    agent = agents[0]  # for its structure; the parameters are in the rows of what follows
    targets = [copy.deepcopy(each.qf).requires_grad_(False) for each in agents]
    q_params, target_params = flatten_parameters([each.qf for each in agents]), flatten_parameters(targets)  # (S, P)
    actor_params = flatten_parameters([each.actor for each in agents])  # (S, P')
    log_alpha = torch.stack([each.log_alpha.detach() for each in agents])  # (S,)
    for each, row in zip(agents, log_alpha, strict=True):
        each.log_alpha.data = row
    q_optimizer = torch.optim.Adam([q_params], lr=args.q_lr, fused=True)
    actor_optimizer = torch.optim.Adam([actor_params], lr=args.policy_lr, fused=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], lr=args.q_lr, fused=True)
    actor_losses = torch.zeros(len(agents), 2, device=q_params.device)  # of (6) and (7), as last computed

    def q_gradient(
        q_params, target_params, actor_params, log_alpha, obs, actions, rewards, next_obs, terminations, noise
    ):
        actor, target = unflatten(actor_params, agent.actor), unflatten(target_params, agent.qf)
        next_actions, next_log_prob = functional_call(agent.actor, actor, (next_obs, noise))
        next_q = functional_call(agent.qf, target, (next_obs, next_actions)).amin(-1)  # (B,)
        next_v = monte_carlo_value(next_q[None], next_log_prob[None], log_alpha.exp())  # (B,), M = 1
        y = rewards + args.gamma * (1 - terminations) * next_v  # (B,)

        def loss(params):
            q = functional_call(agent.qf, params, (obs, actions))  # (B, 2)
            qf_loss = (q - y[:, None]).square().mean(0)  # (2,)
            return qf_loss.mean(), torch.cat([qf_loss.mean()[None], qf_loss, q.mean(0), y.mean()[None]])

        grad, stats = gradient_of(loss, unflatten(q_params, agent.qf), args)  # (P,), (6,)
        return grad, torch.cat([stats, grad.norm()[None]]).detach()

    def actor_gradient(actor_params, q_params, log_alpha, obs, noise):
        qf, alpha = unflatten(q_params, agent.qf), log_alpha.exp()

        def loss(params):
            actions, log_prob = functional_call(agent.actor, params, (obs, noise))
            q = functional_call(agent.qf, qf, (obs, actions)).amin(-1)  # (B,)
            return (alpha * log_prob - q).mean(), ((alpha * log_prob - q).mean(), log_prob.mean())

        grad, (actor_loss, log_prob) = gradient_of(loss, unflatten(actor_params, agent.actor), args)
        alpha_loss = -alpha * (log_prob - agent.action_dim)  # its gradient in log alpha is the loss itself
        return grad, alpha_loss.detach(), torch.stack([actor_loss, alpha_loss]).detach()

    q_gradient, actor_gradient = (compiled(over_seeds(f, args), args) for f in (q_gradient, actor_gradient))

    @torch.no_grad()
    def update(*batch_and_noise: torch.Tensor, n: int) -> torch.Tensor:
        *batch, noise = batch_and_noise  # noise: (S, 1 + K, B, D)
        q_params.grad, stats = q_gradient(q_params, target_params, actor_params, log_alpha, *batch, noise[:, 0])
        stats = stats.clone()  # on a GPU the next recorded call reuses its memory
        q_optimizer.step()
        for k in range(args.policy_frequency if n % args.policy_frequency == 0 else 0):
            inputs = (actor_params, q_params, log_alpha, batch[0], noise[:, 1 + k])
            actor_params.grad, log_alpha.grad, losses = actor_gradient(*inputs)
            actor_optimizer.step()
            if args.autotune:
                alpha_optimizer.step()
            actor_losses.copy_(losses)
        target_params.lerp_(q_params, args.tau)  # Q' <- Q' + tau (Q - Q')
        return torch.cat([stats, actor_losses], -1)

    learner = dict(target=targets, q_optimizer=q_optimizer, actor_optimizer=actor_optimizer)
    return update, learner | dict(alpha_optimizer=alpha_optimizer)


# What the code from here on, the same in every script, calls
Agent, draw_noise, make_update = SAC, draw_sac_noise, make_sac_update


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
