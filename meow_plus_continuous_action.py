"""MEow+: MEow with a censored loss, normalized nets and one setting for five tasks. Its soft value is exact, too.

    python meow_plus_continuous_action.py --env-id Ant-v4

MEow (Chao et al., https://arxiv.org/abs/2405.13629) is meow_continuous_action.py; loss, nets and scales are this
project's. Q = V + alpha log pi has to fit every replayed action. Far below V it makes no difference to V how low Q is:
the loss (7) leaves out an action whose Q and y are both there. B: batch, O: observation, D: action.

    (1)  u = z / sigma(s),  z = couplings(atanh a),  u ~ N(0, I)                MEowPlus.energy
    (2)  Q_i(s,a) = alpha [-|u|^2 / 2 - sum log(1 - a^2)] + b_i(s)              MEowPlus.q
    (3)  V_i(s)   = alpha [D log(2 pi) / 2 + sum log sigma(s)] + b_i(s)         PlusValue.forward
    (4)  log pi(a|s) = (Q_i(s,a) - V_i(s)) / alpha,  the same for i = 1, 2      MEowPlus.log_prob
    (5)  a = tanh(couplings^-1(sigma(s) u)),  u ~ N(0, I), or u = 0             MEowPlus.sample
    (6)  y = r + gamma (1 - d) min_i V_i'(s')                                   make_update
    (7)  L = mean w_i (Q_i(s,a) - y)^2,  w_i = 1 where log pi(a|s) >= -kappa; elsewhere
         w_i = 0 if y < V_i(s) - kappa alpha, else min(1, kappa alpha / |Q_i(s,a) - y|); no gradient of w_i

The nets of s have LayerNorm, observations are standardized, alpha is --alpha times the root mean square of the replayed
rewards. b has a larger step size than couplings and sigma, the policy. (7) has dropout in the couplings.
"""

import collections
import copy
import dataclasses
import itertools
import json
import math
import os
import platform
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.func import functional_call
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    env_id: str = "Hopper-v4"  # gymnasium id; `module:Name-v0` imports the module first
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # seed of the parameters, environments, replay samples and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: if the run is long enough to pay for it
    torch_deterministic: bool = True  # deterministic algorithms: same machine, same seed, same numbers
    track: bool = False  # log to Weights & Biases, too; WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline as usual
    capture_video: bool = False  # record the first episode of every evaluation in the run's videos-from-STEP/
    evaluate: str | None = None  # path of a checkpoint: print the returns of its policy and exit
    resume: str | None = None  # folder of a run to continue from its last checkpoint
    total_timesteps: int = 1_000_000  # environment steps, summed over the environments
    num_envs: int = 1  # environments stepped together
    utd: float = 1.0  # gradient updates per environment step
    buffer_size: int = 1_000_000  # transitions in the replay buffer
    batch_size: int = 256  # transitions in an update
    learning_starts: int = 5_000  # steps with uniformly random actions before the first update
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak step of the target network
    eval_frequency: int = 10_000  # steps between evaluations
    eval_episodes: int = 10  # episodes of an evaluation, with the same seeds every time
    deterministic_eval: bool = True  # evaluate the deterministic action instead of samples
    checkpoint_frequency: int = 10_000  # steps between checkpoints
    # MEow+'s own
    alpha: float = 0.05  # temperature, the weight of the entropy, in root mean squares of the rewards
    kappa: float = 30.0  # the loss bounds or leaves out the errors of actions with log pi < -kappa
    learning_rate: float = 1e-3  # Adam's step size for the shift nets
    flow_learning_rate: float = 3e-4  # Adam's step size for the couplings and the sigma net, the policy
    max_grad_norm: float = 30.0  # the gradient is clipped to this norm
    log_sigma_min: float = -5.0  # lower bound of log sigma(s)
    log_sigma_max: float = -0.3  # upper bound of log sigma(s)
    dropout: float = 0.1  # in the coupling nets, in the loss only


STEPS = {"Hopper": 1.5, "HalfCheetah": 1.5, "Walker2d": 4, "Ant": 4, "Humanoid": 5}  # millions, as in MEow's paper
PRESETS = {f"{task}-v4": dict(total_timesteps=int(n * 1e6)) for task, n in STEPS.items()}  # or -v5
LIMITS = dict(gamma=(0, 1), tau=(0, 1), seed=(0, 2**31), learning_starts=(1, 1e12), log_sigma_min=(-20, 10))
LIMITS |= dict(log_sigma_max=(-20, 10), dropout=(0, 0.99))  # every other number must be above 0
EVAL_SEED = 10_000  # evaluation episodes start from seeds 10000, 10001, ..., whatever --seed is
Batch = collections.namedtuple("Batch", "obs actions rewards next_obs terminations")  # (B, O), D, 1, O, 1
MAY_CHANGE = ("resume", "device", "compile", "total_timesteps", "checkpoint_frequency", "capture_video", "track")


def require(ok: object, message: str) -> None:  # for what the user can put right: no traceback
    if not ok:
        sys.exit(f"error: {message}")


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags given win over those of the run (--resume, --evaluate) or the task's preset, these over the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    first = tyro.cli(Args, args=[a for a in argv if a not in ("-h", "--help")])
    base = PRESETS.get(first.env_id.replace("-v5", "-v4"), {})
    if first.evaluate or first.resume:
        saved = load_checkpoint(Path(first.evaluate or f"{first.resume}/checkpoint.pt"))["args"]
        base = saved | dict(device="auto", compile="auto", capture_video=False)
    args = tyro.cli(Args, args=argv, default=Args(**base))
    for name, value in vars(args).items():
        flag, (low, high) = f"--{name.replace('_', '-')} {value}", LIMITS.get(name, (1e-30, 1e30))
        require(type(value) not in (int, float) or low <= value <= high, f"{flag}: expected {low:g} to {high:g}")
        same = not first.resume or name in MAY_CHANGE or value == base[name]
        require(same, f"{flag}: expected {base.get(name)}, as in {first.resume}; leave it out or start a new run")
    require(args.learning_starts < args.total_timesteps, "--learning-starts: expected less than --total-timesteps")
    require(getattr(args, "log_sigma_min", 0) < getattr(args, "log_sigma_max", 1), "--log-sigma-min: above the maximum")
    require(args.num_envs <= args.buffer_size, "--num-envs: expected at most --buffer-size")
    require(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: PyTorch sees no GPU; use --device cpu")
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    compiler = args.device == "cuda" or shutil.which(os.environ.get("CXX", "g++"))
    require(args.compile != "on" or compiler, "--compile on: no C++ compiler is found; install g++ or set CXX")
    pays = compiler and args.utd * (args.total_timesteps - args.learning_starts) > 5_000  # for a minute of compilation
    args.compile = ("on" if pays else "off") if args.compile == "auto" else args.compile
    return args


def make_env(env_id: str, video_folder: Path | None = None) -> gym.Env:
    """The task with actions (D,) in [-1, 1] and observations (O,), both finite. Ends the program for other tasks."""
    try:
        env = gym.make(env_id, **(dict(render_mode="rgb_array") if video_folder else {}))
    except (gym.error.Error, ImportError) as e:
        sys.exit(f"error: --env-id {env_id}: {e}")
    box, obs = env.action_space, env.observation_space
    ok = isinstance(box, gym.spaces.Box) and len(box.shape) == 1 and np.isfinite([box.low, box.high]).all()
    require(ok, f"--env-id {env_id}: actions are {box}; expected a Box of one dimension with finite bounds")
    require(len(obs.shape or ()) <= 1, f"--env-id {env_id}: observations are {obs}; expected vectors, not images")
    low, high = box.low.astype(np.float64), box.high.astype(np.float64)

    def to_bounds(action: np.ndarray) -> np.ndarray:
        action = np.clip(low + 0.5 * (action + 1.0) * (high - low), low, high)
        return (np.rint(action) if box.dtype.kind in "iu" else action).astype(box.dtype)

    def finite(x: object) -> np.ndarray:  # in an array of our own
        if not np.isfinite(x := np.array(x, np.float32)).all():
            raise ValueError(f"{env_id}: an observation or a reward is not finite: {x}")
        return x

    env = gym.wrappers.TransformAction(env, to_bounds, gym.spaces.Box(-1, 1, box.shape))
    env = gym.wrappers.FlattenObservation(env)
    env = gym.wrappers.TransformObservation(env, finite, gym.spaces.Box(-np.inf, np.inf, env.observation_space.shape))
    env = gym.wrappers.TransformReward(env, lambda reward: finite(reward).item())
    if video_folder:
        env.reset()
        require(isinstance(env.render(), np.ndarray), f"--capture-video: {env_id} draws no picture (render is None)")
        env = gym.wrappers.RecordVideo(env, str(video_folder), lambda episode: True, disable_logger=True)
    return env


class ReplayBuffer:
    """Ring of transitions in a file mapped into memory, so that --resume finds them: 4 (2 O + D + 2) bytes each. On a
    GPU they live in its memory, and `flush` copies what is new to the file."""

    def __init__(self, path: Path, capacity: int, obs_dim: int, action_dim: int, device: str, added: int = 0):
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)  # of the fields of Batch
        self.capacity, self.added, self.flushed, floats = capacity, added, added, capacity * sum(self.widths)
        free = shutil.disk_usage(path.parent).free + (path.stat().st_size if path.exists() else 0)
        require(4 * floats < free, f"{path} needs {4e-9 * floats:.2f} GB of disk; lower --buffer-size")
        self.file = torch.from_file(str(path), shared=True, size=floats).view(capacity, -1)
        self.rows = self.file.to(device)  # the file itself on a CPU
        self.size = torch.tensor(float(min(added, capacity)), device=device)  # in a tensor, for CUDA graphs

    def add(self, *fields: np.ndarray) -> None:
        """One step of N environments: the fields of Batch, (N, ...) each. N divides the capacity."""
        rows = np.concatenate([x.reshape(len(x), -1) for x in fields], 1, dtype=np.float32)
        i = self.added % self.capacity
        self.rows[i : i + len(rows)] = torch.from_numpy(rows)
        self.added += len(rows)
        self.size.fill_(min(self.added, self.capacity))

    def flush(self) -> None:
        if self.rows is not self.file:
            new = torch.arange(max(self.flushed, self.added - self.capacity), self.added) % self.capacity
            self.file[new] = self.rows[new.to(self.rows.device)].cpu()
        self.flushed = self.added

    def sample(self, batch_size: int) -> Batch:
        """Transitions drawn uniformly with replacement; terminations are 1 where the task ended, 0 at a time limit."""
        index = (torch.rand(batch_size, device=self.rows.device, dtype=torch.float64) * self.size).long()
        return Batch(*self.rows.index_select(0, index).split(self.widths, -1))


class MLP(nn.Module):
    """Two hidden layers with Swish, x sigmoid(beta x). norm: LayerNorm and orthogonal weights, else zero weights."""

    def __init__(self, in_dim: int, hidden_dim: int, out_dim: int, norm: bool = False):
        super().__init__()
        dims = (in_dim, hidden_dim, hidden_dim, out_dim)
        self.linears = nn.ModuleList([nn.Linear(dims[k], dims[k + 1]) for k in range(3)])
        self.norms = nn.ModuleList([nn.LayerNorm(hidden_dim) if norm else nn.Identity() for _ in range(2)])
        self.betas = nn.ParameterList([torch.ones(hidden_dim) for _ in range(2)])
        for linear in self.linears:
            nn.init.orthogonal_(linear.weight) if norm else nn.init.zeros_(linear.weight)

    def forward(self, x: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """keep: dropout masks (2, B, hidden), 0 or 1 / (1 - p), in the loss only."""
        for k in range(2):
            x = self.norms[k](self.linears[k](x))
            x = x * torch.sigmoid(self.betas[k] * x)
            x = x if keep is None else x * keep[k]
        last = self.linears[2]  # one column as a sum: on a CPU the gradient of such a product is slow
        return (x * last.weight).sum(-1, keepdim=True) + last.bias if last.out_features == 1 else last(x)


class AdditiveCoupling(nn.Module):
    """Additive coupling layer: z <- z + (1 - b) t, where t = net(b z, obs). Its log-determinant is 0."""

    def __init__(self, obs_dim: int, action_dim: int, mask: torch.Tensor):
        super().__init__()
        self.register_buffer("mask", mask)  # (D,), b: 1 for what passes unchanged and conditions the rest
        self.net = MLP(action_dim + obs_dim, 64, action_dim, norm=True)

    def forward(self, z: torch.Tensor, obs: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """(1 - b) t of z (B, D): added it samples, subtracted it gives the density."""
        return (1 - self.mask) * self.net(torch.cat([self.mask * z, obs], -1), keep)


class PlusValue(nn.Module):
    """The sigma net and the shift nets b_1, b_2. The target has copies of these and shares alpha with the agent."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.low, self.high = args.log_sigma_min, args.log_sigma_max
        self.register_buffer("alpha", torch.tensor(args.alpha))
        self.log_normalizer = 0.5 * action_dim * math.log(2 * math.pi)  # of the prior N(0, I)
        self.sigma_net = MLP(obs_dim, 64, action_dim, norm=True)
        self.shift_nets = nn.ModuleList([MLP(obs_dim, 256, 1, norm=True) for _ in range(2)])
        for net in (self.sigma_net, *self.shift_nets):
            nn.init.zeros_(net.linears[2].weight)

    def log_sigma(self, obs: torch.Tensor) -> torch.Tensor:
        """log sigma(s), (B, D), in [log_sigma_min, log_sigma_max]."""
        return self.low + 0.5 * (self.high - self.low) * (torch.tanh(self.sigma_net(obs)) + 1)

    def shifts(self, obs: torch.Tensor) -> torch.Tensor:
        """b_1(s), b_2(s): (B, 2)."""
        return torch.cat([net(obs) for net in self.shift_nets], -1)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """V_1(s), V_2(s): (B, 2), exactly alpha log int exp(Q_i / alpha) da, of standardized observations: (3)."""
        return self.alpha * (self.log_normalizer + self.log_sigma(obs).sum(-1, keepdim=True)) + self.shifts(obs)


class MEowPlus(nn.Module):
    """Policy, soft Q-functions and soft values of one flow. Observations (B, O), actions (B, D) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.scale, self.action_dim = args.alpha, action_dim
        b = (torch.arange(action_dim) + 1) % 2 * 1.0  # 1, 0, 1, 0, ...
        masks = (b, 1 - b, b, 1 - b)
        self.couplings = nn.ModuleList([AdditiveCoupling(obs_dim, action_dim, mask) for mask in masks])
        self.value = PlusValue(obs_dim, action_dim, args)
        self.register_buffer("batches", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(obs_dim + 1))  # of s and r
        self.register_buffer("variance", torch.ones(obs_dim + 1))

    def observe(self, batch: Batch) -> None:
        """Mean and variance of all batches, later of about the last thousand; alpha, of a root mean square >= 0.01."""
        variance, mean = torch.var_mean(torch.cat([batch.obs, batch.rewards], -1), 0, correction=0)  # (O + 1,)
        rate, difference = (1 / self.batches.add_(1)).clamp(min=1e-3), mean - self.mean
        self.mean += rate * difference
        self.variance.lerp_(variance + (1 - rate) * difference.square(), rate)
        self.value.alpha.copy_(self.scale * (self.variance[-1] + self.mean[-1].square()).clamp(min=1e-4).sqrt())

    def standardize(self, obs: torch.Tensor) -> torch.Tensor:
        """Observations (B, O) less their mean, by their standard deviation, clipped to [-10, 10]."""
        return ((obs - self.mean[:-1]) * self.variance[:-1].clamp(min=1e-4).rsqrt()).clamp(-10, 10)

    def sample(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        """Actions (B, D), equation (5), of u ~ N(0, I) or, if deterministic, of its mode u = 0 (Proposition 2)."""
        obs = self.standardize(obs)
        sigma = self.value.log_sigma(obs).exp()  # (B, D)
        z = sigma * (torch.zeros_like if deterministic else torch.randn_like)(sigma)  # sigma(s) u
        for coupling in self.couplings:
            z = z + coupling(z, obs)
        return torch.tanh(z)

    def energy(self, obs: torch.Tensor, action: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """The bracket of equation (2), (B,): log pi up to a function of s. obs: standardized. keep: (4, 2, B, 64)."""
        action = action.clamp(-1 + 1e-5, 1 - 1e-5)  # V is exact up to the probability beyond: actions_clamped
        log_plus, log_minus = torch.log1p(action), torch.log1p(-action)  # exact near |a| = 1, unlike log(1 - a^2)
        z, log_det = 0.5 * (log_plus - log_minus), -(log_plus + log_minus).sum(-1)  # atanh a, -sum log(1 - a^2)
        for k in (3, 2, 1, 0):
            z = z - self.couplings[k](z, obs, None if keep is None else keep[k])
        u = z * (-self.value.log_sigma(obs)).exp()  # (B, D)
        return log_det - 0.5 * u.square().sum(-1)

    def q(self, obs: torch.Tensor, action: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2), equation (2). One pass of the flow serves both. keep: dropout masks."""
        obs = self.standardize(obs)
        return self.value.alpha * self.energy(obs, action, keep)[..., None] + self.value.shifts(obs)

    def v(self, obs: torch.Tensor) -> torch.Tensor:
        """V_1(s), V_2(s): (B, 2), equation (3)."""
        return self.value(self.standardize(obs))

    def forward(self, obs: torch.Tensor, action: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Q and V, (B, 2) each: what functional_call calls."""
        return self.q(obs, action, keep), self.v(obs)

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """log pi(a|s): (B,), equation (4)."""
        obs = self.standardize(obs)
        return self.energy(obs, action) - self.value.log_sigma(obs).sum(-1) - self.value.log_normalizer

    def policy_metrics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means over the batch: entropy in nats, log sigma, share of coordinates beyond the clamp; alpha."""
        action, log_sigma = self.sample(obs), self.value.log_sigma(self.standardize(obs)).mean()
        clamped, entropy = (action.abs() > 1 - 1e-5).float().mean(), -self.log_prob(obs, action).mean()
        return dict(entropy=entropy, log_sigma=log_sigma, actions_clamped=clamped, alpha=self.value.alpha)


Agent = MEowPlus  # its name in what the scripts share
METRICS = ("qf_loss", "qf1_loss", "qf2_loss", "qf1_values", "qf2_values", "target_values", "left_out", "grad_norm")


def concatenate(tensors) -> torch.Tensor:
    """One vector (P,), in which each tensor begins at a multiple of 16 bytes."""
    return torch.cat([part for x in tensors for part in (x.flatten(), x.new_zeros(-x.numel() % 4))])


def unflatten(flat: torch.Tensor, module: nn.Module) -> dict[str, torch.Tensor]:
    """The vector (P,) as the parameters of `module` by name, for functional_call."""
    parts = iter(flat.split([p.numel() + -p.numel() % 4 for p in module.parameters()]))
    return {name: next(parts)[: p.numel()].view_as(p) for name, p in module.named_parameters()}


def flatten(module: nn.Module) -> torch.Tensor:
    """Move all parameters into one vector (P,), of which they become views: one Adam, one norm, one Polyak step."""
    flat = concatenate(p.detach() for p in module.parameters())
    views = unflatten(flat, module)
    for name, p in module.named_parameters():
        p.data = views[name]
    return flat


def compiled(args: Args):
    """Decorator: torch.compile, if --compile is on. What a CPU's loops need twice is kept, not computed again."""
    options = {} if args.device == "cuda" else {"cpp_wrapper": True, "realize_reads_threshold": 0}
    options["guard_filter_fn"] = getattr(torch.compiler, "keep_tensor_guards_unsafe", None)  # check shapes alone
    return torch.compile(fullgraph=True, options=options) if args.compile == "on" else lambda function: function


def recorded(args: Args):
    """Decorator of function(), which needs no gradients and works on tensors that stay where they are: on a GPU it
    becomes a CUDA graph after three calls that compile and allocate. Every replay draws fresh random numbers."""

    def decorate(function):
        graph, stream, calls = torch.cuda.CUDAGraph(), torch.cuda.Stream(), itertools.count(1)

        @torch.no_grad()
        def call() -> None:
            if (n := next(calls)) == 4:
                with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                    function()
            if n >= 4:
                return graph.replay()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                function()
            torch.cuda.current_stream().wait_stream(stream)

        return call

    return decorate if args.device == "cuda" else torch.no_grad()


def make_update(agent: MEowPlus, buffer: ReplayBuffer, args: Args):
    """update(), a gradient step of equation (7); its METRICS (8,), which it overwrites; and what it moves, by name."""
    target = copy.deepcopy(agent.value).requires_grad_(False)  # V'
    target.alpha = agent.value.alpha  # one tensor
    params, target_params = flatten(agent), flatten(target)
    metrics, device = torch.zeros(len(METRICS), device=params.device), params.device
    size = len(concatenate(agent.value.shift_nets.parameters()))
    flow, shifts, value_params = params[:-size], params[-size:], params[-len(target_params) :]  # in their order
    slow, fast = dict(params=[flow], lr=args.flow_learning_rate), dict(params=[shifts], lr=args.learning_rate)
    optimizer = torch.optim.Adam([slow, fast], fused=True, capturable=True)

    @compiled(args)
    def gradient(params: torch.Tensor, target_params: torch.Tensor, batch: Batch, bits: torch.Tensor):
        next_obs = agent.standardize(batch.next_obs)
        next_v = functional_call(target, unflatten(target_params, target), next_obs)  # (B, 2)
        y = batch.rewards + args.gamma * (1 - batch.terminations) * next_v.amin(-1, keepdim=True)  # (B, 1)
        bits = torch.cat([bits, bits << 16], -1)  # a unit takes the upper 16 of each: (4, 2, B, 64)
        keep = (bits >= (round(args.dropout * 2**16) << 16) - 2**31).to(y) / (1 - args.dropout)

        def loss(params: dict[str, torch.Tensor]):
            q, v = functional_call(agent, params, (batch.obs, batch.actions, keep))  # (B, 2) each
            drop = args.kappa * agent.value.alpha  # kappa alpha
            weight = torch.where(y < v - drop, 0.0, (drop / (q - y).abs()).clamp(max=1))
            weight = torch.where(q < v - drop, weight, 1.0).detach()  # (B, 2)
            qf_loss, left_out = (weight * (q - y).square()).mean(0), (weight == 0).to(y).mean()  # (2,), ()
            return qf_loss.mean(), torch.stack([qf_loss.mean(), *qf_loss, *q.mean(0), y.mean(), left_out])

        grads, values = torch.func.grad(loss, has_aux=True)(unflatten(params, agent))
        grad = concatenate(grads.values())  # (P,)
        norm = grad.norm()
        return grad * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), torch.cat([values, norm[None]])

    @recorded(args)
    def update() -> None:
        batch = buffer.sample(args.batch_size)
        agent.observe(batch)
        bits = torch.empty(4, 2, args.batch_size, 16, dtype=torch.int64, device=device).random_(-(2**63), None)
        grad, values = gradient(params, target_params, batch, bits.view(torch.int32))
        flow.grad, shifts.grad = grad[:-size], grad[-size:]
        optimizer.step()
        target_params.lerp_(value_params, args.tau)  # V' <- V' + tau (V - V')
        metrics.copy_(values)

    return update, metrics, dict(agent=agent, target=target, optimizer=optimizer)


@torch.random.fork_rng()
@torch.no_grad()
def evaluate(agent: nn.Module, envs: list[gym.Env], args: Args) -> tuple[np.ndarray, np.ndarray]:
    """Returns (E,) and lengths (E,) of one episode in each of `envs`, the same ones every time."""
    states = random.getstate(), np.random.get_state()  # a task may draw from these
    random.seed(EVAL_SEED), np.random.seed(EVAL_SEED), torch.manual_seed(EVAL_SEED)
    obs = np.stack([env.reset(seed=EVAL_SEED + i)[0] for i, env in enumerate(envs)])  # (E, O)
    returns, lengths, active = np.zeros(len(envs)), np.zeros(len(envs)), np.ones(len(envs), dtype=bool)
    while active.any():
        actions = agent.sample(torch.as_tensor(obs[active], device=args.device), args.deterministic_eval).cpu().numpy()
        for i, action in zip(np.flatnonzero(active), actions, strict=True):
            obs[i], reward, terminated, truncated, _ = envs[i].step(action)
            returns[i], lengths[i], active[i] = returns[i] + reward, lengths[i] + 1, not (terminated or truncated)
        if lengths.max() == 10_000 and envs[0].spec.max_episode_steps is None:
            tqdm.write(f"warning: {args.env_id} is at 10000 steps of an evaluation; has it max_episode_steps?")
    random.setstate(states[0]), np.random.set_state(states[1])
    return returns, lengths


def load_checkpoint(path: Path, device: str = "cpu") -> dict:
    """Tensors and plain values; nothing in the file is executed. Ends the program for any other file."""
    try:
        checkpoint = torch.load(path, map_location=device, weights_only=True)
        algorithm, args = checkpoint["algorithm"], checkpoint["args"]
    except Exception as e:  # whatever a missing, damaged or foreign file leads to
        sys.exit(f"error: {path} is not a checkpoint ({e if isinstance(e, OSError) else type(e).__name__})")
    ok = algorithm == Path(__file__).stem and args.keys() == vars(Args()).keys()
    require(ok, f"{path} was written by {algorithm}.py, or by another version of it")
    return checkpoint


def load_agent(path: str | Path, device: str = "cpu") -> tuple[nn.Module, Args]:
    """The agent of a checkpoint and the args that it was trained with."""
    checkpoint = load_checkpoint(Path(path), device)
    args = dataclasses.replace(Args(**checkpoint["args"]), device=device)
    agent = Agent(*checkpoint["sizes"], args).to(device)
    agent.load_state_dict(checkpoint["agent"])
    return agent, args


def train(args: Args) -> Path:
    """Train, log, evaluate and save; returns the run's folder. Ctrl-C and SIGTERM save a checkpoint and stop."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    torch.set_num_threads(min(torch.get_num_threads(), 4))  # more do not help nets of this size
    torch.empty(2**23 - 2**12)  # glibc then keeps what an update frees: its pages are not faulted in anew each time
    torch.compiler.reset()  # code that another run in this process compiled has that run's flags in it
    saved = load_checkpoint(Path(args.resume, "checkpoint.pt"), args.device) if args.resume else {}
    global_step, best_return, events = saved.get("run", (0, -math.inf, {}))
    require(not saved or Path(args.resume, "buffer.bin").exists(), f"--resume {args.resume}: no buffer.bin; finished?")
    seed = args.seed + global_step
    random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
    envs = [make_env(args.env_id) for _ in range(args.num_envs)]
    obs_dim, action_dim = envs[0].observation_space.shape[0], envs[0].action_space.shape[0]
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 1_000_000}"
    run_dir = Path(args.resume or "runs/" + "".join(c if c.isalnum() or c in "-_." else "_" for c in name))
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    device = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {device}"
    versions = {"python": platform.python_version()} | {m.__name__: m.__version__ for m in (torch, gym, np)}
    facts = dict(args=vars(args), command=shlex.join(sys.argv), commit=commit, machine=machine, versions=versions)
    (run_dir / (f"args-from-{global_step}.json" if saved else "args.json")).write_text(json.dumps(facts, indent=2))
    print(f"run: {run_dir}\n{args}", flush=True)
    videos = run_dir / f"videos-from-{global_step}" if args.capture_video else None
    eval_envs = [make_env(args.env_id, None if i else videos) for i in range(args.eval_episodes)]
    if args.track:
        import wandb

        wandb.init(name=run_dir.name, id=run_dir.name[-128:], resume="allow", config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(str(run_dir), purge_step=global_step if saved else None)
    capacity = min(args.buffer_size, args.total_timesteps + args.num_envs) // args.num_envs * args.num_envs
    buffer = ReplayBuffer(run_dir / "buffer.bin", capacity, obs_dim, action_dim, args.device, global_step)
    agent = Agent(obs_dim, action_dim, args).to(args.device)
    update, metrics, learner = make_update(agent, buffer, args)
    for name, part in learner.items() if saved else ():  # all but the episodes under way: new ones begin
        part.load_state_dict(saved[name])

    obs_in, actions_out = (torch.zeros(args.num_envs, n, device=args.device) for n in (obs_dim, action_dim))  # of act()
    sample = compiled(args)(agent.sample)
    act = recorded(args)(lambda: actions_out.copy_(sample(obs_in)))

    def save(name: str) -> None:
        """The state that --resume continues from; where it is not finite, in failed.pt."""
        buffer.flush(), writer.flush()
        path = run_dir / (name if np.isfinite([*metrics.tolist(), *actions.flat]).all() else "failed.pt")
        state = dict(algorithm=Path(__file__).stem, args=vars(args) | dict(resume=None), sizes=(obs_dim, action_dim))
        state |= dict(run=(global_step, best_return, events))
        with open(path.with_suffix(".tmp"), "wb") as f:
            torch.save(state | {name: part.state_dict() for name, part in learner.items()}, f)
            os.fsync(f.fileno())
        os.replace(path.with_suffix(".tmp"), path)  # at every moment the old file or the new one, whole

    obs = np.stack([env.reset(seed=seed + i)[0] for i, env in enumerate(envs)])  # (N, O)
    next_obs, actions, rewards = obs.copy(), np.zeros((args.num_envs, action_dim), np.float32), np.zeros(args.num_envs)
    terminations, truncations, episode_return, episode_length = np.zeros((4, args.num_envs))
    start_step, start_time, updates_due, last_return, eval_return = global_step, time.time(), 0.0, math.nan, math.nan
    bar = tqdm(total=args.total_timesteps, initial=global_step, mininterval=0.5 if sys.stderr.isatty() else 30)
    stop = []  # a SIGTERM ends the run where it arrives, as Ctrl-C, or at the next step where code ignores exceptions
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(stop.append(number) or 128 + number))
    try:
        while True:
            # Checkpoint, evaluation and logs of the step that was made; a resumed run begins here and logs it again
            require(not stop, "stopped by SIGTERM")
            end = global_step >= args.total_timesteps
            eval_due = end or global_step % args.eval_frequency < args.num_envs
            if eval_due or global_step % args.checkpoint_frequency < args.num_envs:
                save("checkpoint.pt")  # before an evaluation, in which the task may fail
            if eval_due and global_step and "eval/episodic_return" not in events:
                returns, lengths = evaluate(agent, eval_envs, args)
                eval_return = float(returns.mean())
                if eval_return > best_return:
                    save("best.pt")
                    best_return = eval_return
                events |= {"eval/episodic_return": eval_return, "eval/episodic_length": float(lengths.mean())}
                start_step, start_time = global_step, time.time()  # of SPS, which leaves evaluations out
            for name, value in events.items():
                writer.add_scalar(name, value, global_step)
            if end:
                break

            if global_step < args.learning_starts:
                actions = np.random.uniform(-1, 1, actions.shape).astype(np.float32)
            else:
                obs_in.copy_(torch.from_numpy(obs))
                act()
                actions = actions_out.cpu().numpy()
                updates_due += args.utd * args.num_envs
                while updates_due >= 1:  # before the step, so that a GPU computes while the task simulates
                    update()
                    updates_due -= 1
            require(np.isfinite(actions).all(), f"the actions are not finite at step {global_step}: training diverged")
            for i, env in enumerate(envs):
                next_obs[i], rewards[i], terminations[i], truncations[i], _ = env.step(actions[i])
            buffer.add(obs, actions, rewards, next_obs, terminations)
            global_step, events = global_step + args.num_envs, {}
            bar.update(args.num_envs)
            obs, episode_return, episode_length = next_obs.copy(), episode_return + rewards, episode_length + 1
            if global_step % 100 < args.num_envs and global_step > args.learning_starts:
                losses = {f"losses/{name}": value for name, value in zip(METRICS, metrics.tolist(), strict=True)}
                with torch.no_grad():
                    policy = agent.policy_metrics(buffer.sample(args.batch_size).obs)
                sps = (global_step - start_step) / (time.time() - start_time)
                events |= losses | {f"policy/{name}": x.item() for name, x in policy.items()} | {"charts/SPS": sps}
                bar.set_postfix(episode=last_return, evaluation=eval_return, SPS=sps, refresh=False)
            for i in np.flatnonzero(terminations + truncations):
                last_return = float(episode_return[i])
                events |= {"charts/episodic_return": last_return, "charts/episodic_length": float(episode_length[i])}
                episode_return[i], episode_length[i], obs[i] = 0, 0, envs[i].reset()[0]
    except BaseException as e:  # Ctrl-C, SIGTERM, an error of the task, a loss that is not finite
        e = e.__context__ if isinstance(e.__context__, (KeyboardInterrupt, SystemExit)) else e  # torch.save hides it
        save("checkpoint.pt")
        bar.close()
        print(f"stopped at step {global_step}; continue with: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(130) if isinstance(e, KeyboardInterrupt) else e from e.__cause__
    save("checkpoint.pt")
    (run_dir / "buffer.bin").unlink()
    [each.close() for each in (bar, writer, *envs, *eval_envs)]
    if args.track:
        wandb.finish()
    print(f"best evaluation return {best_return:.1f}; checkpoints in {run_dir}")
    return run_dir


if __name__ == "__main__":
    sys.path.append(os.getcwd())  # --env-id mytask:My-v0 finds a mytask.py here, wherever this script lies
    args = parse_args()
    if args.evaluate:
        videos = Path(args.evaluate).parent / "videos-of-evaluate" if args.capture_video else None
        envs = [make_env(args.env_id, None if i else videos) for i in range(args.eval_episodes)]
        sizes = envs[0].observation_space.shape + envs[0].action_space.shape
        require(load_checkpoint(Path(args.evaluate))["sizes"] == sizes, f"{args.evaluate} is not of {args.env_id}")
        returns, _ = evaluate(load_agent(args.evaluate, args.device)[0], envs, args)
        print(f"{args.env_id}: return {returns.mean():.2f} +- {returns.std():.2f}, of {returns.round(1).tolist()}")
        envs[0].close()  # which writes the video
    else:
        train(args)
