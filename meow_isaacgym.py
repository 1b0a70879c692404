"""MEow on thousands of environments that are simulated in parallel on one device: Isaac Gym, Isaac Lab, brax.

Chao, Feng, Sun, Lee, See and Lee, "Maximum Entropy Reinforcement Learning via Energy-Based Normalizing Flow",
NeurIPS 2024, https://arxiv.org/abs/2405.13629

    python meow_isaacgym.py --sim brax --env-id ant                 # CPU or GPU
    python meow_isaacgym.py --sim isaacgymenvs --env-id Ant         # Python 3.8, GPU; never met the simulator
    python meow_isaacgym.py --sim isaaclab --env-id Isaac-Ant-v0    # Python 3.12, GPU; never met the simulator

Networks and update are the same text as in meow_continuous_action.py. Observations, actions and replay buffer stay on
the device, and observations are standardized. N: environments, B: batch, O: observation, D: action.

    (1)  u = z / sigma(s),  z = couplings(atanh a),  u ~ N(0, I)                MEow.energy
    (2)  Q_i(s,a) = alpha [-|u|^2 / 2 - sum log(1 - a^2) + b_i(s)]              MEow.q
    (3)  V_i(s)   = alpha [D log(2 pi) / 2 + sum log sigma(s) + b_i(s)]         SoftValue.forward
    (4)  log pi(a|s) = (Q_i(s,a) - V_i(s)) / alpha,  the same for i = 1, 2      MEow.log_prob
    (5)  a = tanh(couplings^-1(sigma(s) u)),  u ~ N(0, I), or u = 0             MEow.sample
    (6)  y = r + gamma (1 - d) min_i V_i'(s'),  L = mean (Q_i(s,a) - y)^2       make_update
"""

from __future__ import annotations  # Isaac Gym needs Python 3.8

import simulators  # isort: skip  before torch, as Isaac Gym demands it

import collections
import copy
import dataclasses
import itertools
import json
import math
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn as nn
import tyro
from torch.func import functional_call
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    sim: Literal["brax", "isaacgymenvs", "isaaclab"] = "brax"  # simulator; each has its own requirements file
    env_id: str = "ant"  # task of the simulator: ant (brax), Ant (isaacgymenvs), Isaac-Ant-v0 (isaaclab)
    brax_backend: Literal["mjx", "spring", "positional", "generalized"] = "mjx"  # physics of brax
    exp_name: str = Path(__file__).stem  # part of the run folder's name
    seed: int = 1  # seed of the parameters, environments, replay samples and actions
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto takes the GPU if there is one
    compile: Literal["auto", "on", "off"] = "auto"  # torch.compile; auto: if the run is long enough to pay for it
    track: bool = False  # log to Weights & Biases, too; WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE=offline as usual
    capture_video: bool = False  # record the first environment in every evaluation, in the run's video-STEP.mp4
    evaluate: str = ""  # path of a checkpoint: print the returns of its policy and exit
    resume: str = ""  # folder of a run to continue from its last checkpoint
    total_timesteps: int = 128_000_000  # environment steps, summed over the environments
    num_envs: int = 128  # environments stepped together
    updates_per_step: int = 1  # gradient updates for each step of all environments
    buffer_size: int = 1_920_000  # transitions in the replay buffer
    batch_size: int = 1_024  # transitions in an update
    learning_starts: int = 12_800  # steps with uniformly random actions before the first update
    gamma: float = 0.99  # discount factor
    tau: float = 0.005  # Polyak step of the target network
    eval_frequency: int = 1_280_000  # steps between evaluations, one episode of every environment, and checkpoints
    deterministic_eval: bool = True  # evaluate the deterministic action instead of samples
    # MEow's own
    alpha: float = 0.2  # temperature: the weight of the entropy
    learning_rate: float = 1e-3  # Adam's step size
    max_grad_norm: float = 30.0  # the gradient is clipped to this norm
    log_sigma_min: float = -5.0  # lower bound of log sigma(s)
    log_sigma_max: float = -0.3  # upper bound of log sigma(s)
    dropout: float = 0.1  # in the coupling nets, in the loss only
    coupling: Literal["additive", "affine"] = "additive"  # form of the four coupling layers
    reward_shift: bool = True  # LRS: learnable reward shifts b_1(s), b_2(s)
    clipped_double_q: bool = True  # SCDQ: min of V_1', V_2' in the target (off: their mean)


WIDE = dict(num_envs=512, batch_size=256, total_timesteps=512_000_000, learning_starts=51_200, buffer_size=7_680_000)
PRESETS = {  # the paper's, for Isaac Gym; Isaac Lab's Isaac-Ant-v0 takes Ant's
    "Ant": dict(alpha=0.075, tau=0.0005, log_sigma_max=2.0),
    "Humanoid": dict(alpha=0.25, tau=0.00025),
    "Ingenuity": dict(alpha=0.025, tau=0.0025, log_sigma_min=-4.0, total_timesteps=64_000_000),
    "Anymal": dict(alpha=0.00075, tau=0.025, log_sigma_max=-1.0),
    "AllegroHand": dict(WIDE, alpha=0.1, tau=0.001, log_sigma_min=-4.0),
    "FrankaCabinet": dict(WIDE, alpha=0.075, tau=0.01),
}
ANT = dict(num_envs=64, batch_size=256, updates_per_step=4, gamma=0.97, total_timesteps=1_536_000, alpha=0.05)
ANT.update(learning_starts=6_400, buffer_size=1_000_000, eval_frequency=128_000)  # for brax, found on its ant
FALLS = dict(ANT, gamma=0.997, batch_size=128, updates_per_step=32, total_timesteps=512_000, eval_frequency=64_000)
BRAX = dict(hopper=dict(FALLS, alpha=0.1), walker2d=dict(FALLS, alpha=0.1))  # all others take ANT
LIMITS = dict(gamma=(0, 1), tau=(0, 1), seed=(0, 2**31), learning_starts=(1, 1e12), log_sigma_min=(-20, 10))
LIMITS.update(log_sigma_max=(-20, 10), dropout=(0, 0.99))  # every other number must be above 0
EVAL_SEED = 10_000  # of every evaluation: on brax its episodes start from the same states
Batch = collections.namedtuple("Batch", "obs actions rewards next_obs terminations")  # (B, O), D, 1, O, 1
MAY_CHANGE = ("resume", "device", "compile", "total_timesteps", "capture_video", "track")


def require(ok: object, message: str) -> None:  # for what the user can put right: no traceback
    if not ok:
        sys.exit(f"error: {message}")


def parse_args(argv: list[str] | None = None) -> Args:
    """Flags given win over those of the run (--resume, --evaluate) or the task's preset, these over the defaults."""
    argv = sys.argv[1:] if argv is None else argv
    first = tyro.cli(Args, args=[a for a in argv if a not in ("-h", "--help")])
    task = first.env_id.replace("Isaac-", "").replace("-Direct", "").replace("-v0", "")
    base = BRAX.get(task, ANT) if first.sim == "brax" else PRESETS.get(task, {})
    if first.evaluate or first.resume:
        saved = load_checkpoint(Path(first.evaluate or f"{first.resume}/checkpoint.pt"))["args"]
        base = dict(saved, device="auto", compile="auto", capture_video=False)
    args = tyro.cli(Args, args=argv, default=Args(**base))
    for name, value in vars(args).items():
        flag, (low, high) = f"--{name.replace('_', '-')} {value}", LIMITS.get(name, (1e-30, 1e30))
        require(type(value) not in (int, float) or low <= value <= high, f"{flag}: expected {low:g} to {high:g}")
        same = not first.resume or name in MAY_CHANGE or value == base[name]
        require(same, f"{flag}: expected {base.get(name)}, as in {first.resume}; leave it out or start a new run")
    require(
        args.evaluate or args.learning_starts < args.total_timesteps,
        "--learning-starts: expected less than --total-timesteps",
    )
    require(getattr(args, "log_sigma_min", 0) < getattr(args, "log_sigma_max", 1), "--log-sigma-min: above the maximum")
    require(args.evaluate or args.num_envs <= args.buffer_size, "--num-envs: expected at most --buffer-size")
    require(args.device != "cuda" or torch.cuda.is_available(), "--device cuda: PyTorch sees no GPU; use --device cpu")
    args.device = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    compiler = sys.version_info >= (3, 10) and (args.device == "cuda" or shutil.which(os.environ.get("CXX", "g++")))
    require(args.compile != "on" or compiler, "--compile on: needs Python 3.10 and, on a CPU, g++ or CXX set")
    updates = args.updates_per_step * (args.total_timesteps - args.learning_starts) / args.num_envs
    args.compile = ("on" if compiler and updates > 5_000 else "off") if args.compile == "auto" else args.compile
    return args


class Standardizer(nn.Module):
    """(obs - mean) / std, clipped to [-5, 5]; mean and std are those of the observations acted on so far."""

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("sums", torch.zeros(3, obs_dim, dtype=torch.float64))  # of 1, x and x^2

    def update(self, obs: torch.Tensor) -> None:
        x = obs.double()  # (N, O)
        self.sums += torch.stack([torch.ones_like(x), x, x.square()]).sum(1)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        mean, mean_square = self.sums[1:] / self.sums[0].clamp(min=1)  # (O,) each
        std = (mean_square - mean.square()).clamp(min=1e-8).sqrt()
        return ((obs - mean.to(obs)) / std.to(obs)).clamp(-5, 5)


class ReplayBuffer:
    """Ring of transitions, 4 (2 O + D + 2) bytes each, on the device and in a file, for --resume. On a CPU both are the
    same memory; from a GPU `flush` copies what is new. `sample` standardizes, so that old and new are on one scale."""

    def __init__(self, path: Path, capacity: int, agent: nn.Module, sizes: tuple, device: str, added: int = 0):
        self.widths = (*sizes, 1, sizes[0], 1)  # of the fields of Batch
        self.capacity, self.flushed, self.standardizer = capacity, added, agent.standardizer
        floats = (capacity + 1) * sum(self.widths)  # a row behind the ring takes what is not valid
        free = shutil.disk_usage(path.parent).free + (path.stat().st_size if path.exists() else 0)
        free = min(free, torch.cuda.mem_get_info()[0]) if device == "cuda" else free
        require(4 * floats < free, f"{path} needs {4e-9 * floats:.2f} GB of disk and device; lower --buffer-size")
        self.file = torch.from_file(str(path), shared=True, size=floats).view(capacity + 1, -1)
        self.rows = self.file.to(device)  # the file itself on a CPU
        self.added = torch.tensor(added, device=device)  # transitions so far: the device alone knows which are valid

    def add(self, valid: torch.Tensor, *fields: torch.Tensor) -> None:
        """The valid ones (N,) of a step of all environments: the fields of Batch, (N, ...) each."""
        index = torch.where(valid, (self.added + valid.cumsum(0) - 1) % self.capacity, self.capacity)
        self.rows.index_copy_(0, index, torch.cat([x.reshape(len(valid), -1).float() for x in fields], 1))
        self.added += valid.sum()

    def flush(self) -> None:
        added = int(self.added)
        new = torch.arange(max(self.flushed, added - self.capacity), added) % self.capacity
        for rows in new.split(2**20) if self.rows is not self.file else ():
            self.file[rows] = self.rows[rows.to(self.rows.device)].cpu()
        self.flushed = added

    def sample(self, batch_size: int) -> Batch:
        """Transitions drawn uniformly with replacement; terminations are 1 where the task ended, 0 at a time limit."""
        size = self.added.clamp(1, self.capacity)
        index = (torch.rand(batch_size, device=self.rows.device, dtype=torch.float64) * size).long()
        obs, actions, rewards, next_obs, terminations = self.rows.index_select(0, index).split(self.widths, -1)
        return Batch(self.standardizer(obs), actions, rewards, self.standardizer(next_obs), terminations)


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


class Coupling(nn.Module):
    """Coupling layer: z <- b z + (1 - b) (z exp(s) + t), where t, s = net(b z, obs); s = 0 if it is additive."""

    def __init__(self, obs_dim: int, action_dim: int, mask: torch.Tensor, args: Args):
        super().__init__()
        self.affine = args.coupling == "affine"
        self.register_buffer("mask", mask)  # (D,), b: 1 for what passes unchanged and conditions the rest
        self.net = MLP(action_dim + obs_dim, 64, (1 + self.affine) * action_dim, norm=True)

    def shift_and_log_scale(self, z: torch.Tensor, obs: torch.Tensor, keep: torch.Tensor | None = None):
        """t and s, (B, D) each, zero where b = 1; exp(s) is in [1/e, e]."""
        h = self.net(torch.cat([self.mask * z, obs], -1), keep)  # (B, D), or (B, 2 D) if affine
        t, s = h.chunk(2, -1) if self.affine else (h, torch.zeros_like(h))
        return (1 - self.mask) * t, (1 - self.mask) * torch.tanh(s)

    def forward(self, z: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """Sampling direction, z (B, D)."""
        t, s = self.shift_and_log_scale(z, obs)
        return z * s.exp() + t

    def inverse(self, z: torch.Tensor, obs: torch.Tensor, keep: torch.Tensor | None = None):
        """Density direction: z (B, D) and the log-determinant (B,)."""
        t, s = self.shift_and_log_scale(z, obs, keep)
        return (z - t) * (-s).exp(), -s.sum(-1)


class SoftValue(nn.Module):
    """All that V depends on: the sigma net and the shift nets b_1, b_2. The target network is a copy of this."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.alpha, self.low, self.high = args.alpha, args.log_sigma_min, args.log_sigma_max
        self.log_normalizer = 0.5 * action_dim * math.log(2 * math.pi)  # of the prior N(0, I)
        self.sigma_net = MLP(obs_dim, 64, action_dim)
        self.shift_nets = nn.ModuleList([MLP(obs_dim, 256, 1) for _ in range(2 * args.reward_shift)])

    def log_sigma(self, obs: torch.Tensor) -> torch.Tensor:
        """log sigma(s), (B, D), in [log_sigma_min, log_sigma_max]."""
        return self.low + 0.5 * (self.high - self.low) * (torch.tanh(self.sigma_net(obs)) + 1)

    def shifts(self, obs: torch.Tensor) -> torch.Tensor:
        """b_1(s), b_2(s): (B, 2); zeros without the reward shifts."""
        return torch.cat([net(obs) for net in self.shift_nets] or [obs.new_zeros(*obs.shape[:-1], 2)], -1)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """V_1(s), V_2(s): (B, 2), exactly alpha log int exp(Q_i / alpha) da: equation (3)."""
        return self.alpha * (self.log_normalizer + self.log_sigma(obs).sum(-1, keepdim=True) + self.shifts(obs))


class MEow(nn.Module):
    """Policy, soft Q-functions and soft values of one flow. Observations (B, O), actions (B, D) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.alpha, self.action_dim = args.alpha, action_dim
        b = (torch.arange(action_dim) + 1) % 2 * 1.0  # 1, 0, 1, 0, ...
        self.couplings = nn.ModuleList([Coupling(obs_dim, action_dim, mask, args) for mask in (b, 1 - b, b, 1 - b)])
        self.value = SoftValue(obs_dim, action_dim, args)

    def sample(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        """Actions (B, D), equation (5), of u ~ N(0, I) or, if deterministic, of its mode u = 0 (Proposition 2)."""
        sigma = self.value.log_sigma(obs).exp()  # (B, D)
        z = sigma * (torch.zeros_like if deterministic else torch.randn_like)(sigma)  # sigma(s) u
        for coupling in self.couplings:
            z = coupling(z, obs)
        return torch.tanh(z)

    def energy(self, obs: torch.Tensor, action: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """The part of log pi(a|s) that depends on a, (B,): equation (1). keep: dropout masks (4, 2, B, 64)."""
        action = action.clamp(-1 + 1e-5, 1 - 1e-5)  # V is exact up to the probability beyond: actions_clamped
        log_plus, log_minus = torch.log1p(action), torch.log1p(-action)  # exact near |a| = 1, unlike log(1 - a^2)
        z, log_det = 0.5 * (log_plus - log_minus), -(log_plus + log_minus).sum(-1)  # atanh a, -sum log(1 - a^2)
        for k in (3, 2, 1, 0):
            z, coupling_log_det = self.couplings[k].inverse(z, obs, None if keep is None else keep[k])
            log_det = log_det + coupling_log_det
        u = z * (-self.value.log_sigma(obs)).exp()  # (B, D)
        return log_det - 0.5 * u.square().sum(-1)

    def q(self, obs: torch.Tensor, action: torch.Tensor, keep: torch.Tensor | None = None) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2), equation (2). One pass of the flow serves both."""
        return self.alpha * (self.energy(obs, action, keep)[..., None] + self.value.shifts(obs))

    forward = q  # what functional_call calls

    def v(self, obs: torch.Tensor) -> torch.Tensor:
        """V_1(s), V_2(s): (B, 2), equation (3)."""
        return self.value(obs)

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """log pi(a|s): (B,), equation (4)."""
        return self.energy(obs, action) - self.value.log_sigma(obs).sum(-1) - self.value.log_normalizer

    def policy_metrics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means over the batch: entropy in nats, log sigma, share of the actions' coordinates beyond the clamp."""
        action, log_sigma = self.sample(obs), self.value.log_sigma(obs).mean()
        clamped = (action.abs() > 1 - 1e-5).float().mean()
        return dict(entropy=-self.log_prob(obs, action).mean(), log_sigma=log_sigma, actions_clamped=clamped)


Agent = MEow  # its name in what the scripts share
METRICS = ("qf_loss", "qf1_loss", "qf2_loss", "qf1_values", "qf2_values", "target_values", "grad_norm")


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


def make_update(agent: MEow, buffer: ReplayBuffer, args: Args):
    """update(), a gradient step of equation (6); its METRICS (7,), which it overwrites; and what it moves, by name."""
    target = copy.deepcopy(agent.value).requires_grad_(False)  # V'
    params, target_params = flatten(agent), flatten(target)
    value_params = params[-len(target_params) :]  # V's are the last of the agent's
    metrics, device = torch.zeros(len(METRICS), device=params.device), params.device
    size = len(concatenate(p.detach() for p in agent.value.shift_nets.parameters()))
    flow, shifts = params[:-size], params[-size:]
    slow, fast = dict(params=[flow], lr=0.3 * args.learning_rate), dict(params=[shifts], lr=args.learning_rate)
    optimizer = torch.optim.Adam([slow, fast], fused=True, capturable=True)

    @compiled(args)
    def gradient(params: torch.Tensor, target_params: torch.Tensor, batch: Batch, bits: torch.Tensor):
        next_v = functional_call(target, unflatten(target_params, target), batch.next_obs)  # (B, 2)
        next_v = next_v.amin(-1, keepdim=True) if args.clipped_double_q else next_v.mean(-1, keepdim=True)
        y = batch.rewards + args.gamma * (1 - batch.terminations) * next_v  # (B, 1)
        bits = torch.cat([bits, bits << 16], -1)  # a unit takes the upper 16 of each: (4, 2, B, 64)
        keep = (bits >= (round(args.dropout * 2**16) << 16) - 2**31).to(y) / (1 - args.dropout)

        def loss(params: dict[str, torch.Tensor]):
            q = functional_call(agent, params, (batch.obs, batch.actions, keep))  # (B, 2)
            qf_loss = (q - y).square().mean(0)  # (2,)
            return qf_loss.mean(), torch.cat([qf_loss.mean()[None], qf_loss, q.mean(0), y.mean()[None]])

        grads, values = torch.func.grad(loss, has_aux=True)(unflatten(params, agent))
        grad = concatenate(grads.values())  # (P,)
        norm = grad.norm()
        return grad * (args.max_grad_norm / (norm + 1e-6)).clamp(max=1), torch.cat([values, norm[None]])

    @recorded(args)
    def update() -> None:
        batch = buffer.sample(args.batch_size)
        bits = torch.empty(4, 2, args.batch_size, 16, dtype=torch.int64, device=device).random_(-(2**63), None)
        grad, values = gradient(params, target_params, batch, bits.view(torch.int32))
        flow.grad, shifts.grad = grad[:-size], grad[-size:]
        optimizer.step()
        target_params.lerp_(value_params, args.tau)  # V' <- V' + tau (V - V')
        metrics.copy_(values)

    return update, metrics, dict(agent=agent, target=target, optimizer=optimizer)


@torch.random.fork_rng()
@torch.no_grad()
def evaluate(agent: nn.Module, sim, args: Args, video: Path | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns (N,) and lengths (N,) of one episode in each environment; an mp4 of the first one if there is a path."""
    torch.manual_seed(EVAL_SEED)  # from which a simulator may draw, too
    sim.reset(EVAL_SEED)
    returns, lengths = torch.zeros(2, sim.num_envs, device=args.device)
    active, frames = torch.ones_like(returns), []
    for step in itertools.count(1):
        if video and active[0]:
            frames.append(sim.render())
        actions = agent.sample(agent.standardizer(sim.obs), args.deterministic_eval)
        _, rewards, terminated, truncated, valid = sim.step(actions)
        returns += rewards * active * valid  # an environment whose episode is over goes on, but does not count
        lengths += active * valid
        active *= ~(terminated | truncated)
        if step % 50 == 0 and not active.any():  # asking waits for the device
            break
    if video:
        simulators.write_video(video, frames)
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
    """The agent of a checkpoint, which acts on agent.standardizer(obs), and the args that it was trained with."""
    checkpoint = load_checkpoint(Path(path), device)
    args = dataclasses.replace(Args(**checkpoint["args"]), device=device)
    agent = Agent(*checkpoint["sizes"], args)
    agent.standardizer = Standardizer(checkpoint["sizes"][0])
    agent.load_state_dict(checkpoint["agent"])
    return agent.to(device), args


def make_sim(args: Args, seed: int):
    try:
        size = (args.num_envs, seed, args.device)
        return simulators.make(args.sim, args.env_id, *size, args.capture_video, args.brax_backend)
    except (ImportError, ValueError) as e:
        sys.exit(f"error: --sim {args.sim} --env-id {args.env_id}: {e}")


def train(args: Args) -> Path:
    """Train, log, evaluate and save; returns the run's folder. Ctrl-C and SIGTERM save a checkpoint and stop."""
    torch.set_num_threads(min(torch.get_num_threads(), 4))  # more do not help nets of this size
    torch.compiler.reset()  # code that another run in this process compiled has that run's flags in it
    saved = load_checkpoint(Path(args.resume, "checkpoint.pt"), args.device) if args.resume else {}
    global_step, best_return, events, added = saved.get("run", (0, -math.inf, {}, 0))
    require(not saved or Path(args.resume, "buffer.bin").exists(), f"--resume {args.resume}: no buffer.bin; finished?")
    seed = args.seed + global_step
    sim = make_sim(args, seed % 2**31)
    torch.manual_seed(seed)
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 1_000_000}"
    run_dir = Path(args.resume or "runs/" + "".join(c if c.isalnum() or c in "-_." else "_" for c in name))
    run_dir.mkdir(parents=True, exist_ok=bool(args.resume))
    git = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    device = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {device}"
    versions = {m: sys.modules[m].__version__ for m in ("torch", "numpy", "jax") if m in sys.modules}
    versions.update(python=platform.python_version())
    facts = dict(args=vars(args), command=shlex.join(sys.argv), commit=commit, machine=machine, versions=versions)
    (run_dir / (f"args-from-{global_step}.json" if saved else "args.json")).write_text(json.dumps(facts, indent=2))
    print(f"run: {run_dir}\n{args}", flush=True)
    if args.track:
        import wandb

        wandb.init(name=run_dir.name, id=run_dir.name[-128:], resume="allow", config=vars(args), sync_tensorboard=True)
    writer = SummaryWriter(str(run_dir), purge_step=global_step if saved else None)
    capacity, sizes = min(args.buffer_size, args.total_timesteps + args.num_envs), (sim.obs_dim, sim.action_dim)
    agent = Agent(*sizes, args).to(args.device)
    agent.standardizer = Standardizer(sim.obs_dim).to(args.device)
    buffer = ReplayBuffer(run_dir / "buffer.bin", capacity, agent, sizes, args.device, added)
    update, metrics, learner = make_update(agent, buffer, args)
    for name, part in learner.items() if saved else ():  # all but the simulator: new episodes begin
        part.load_state_dict(saved[name])

    obs, actions = (torch.zeros(args.num_envs, n, device=args.device) for n in sizes)  # what act() reads and writes
    sample = compiled(args)(agent.sample)

    @recorded(args)
    def act() -> None:
        agent.standardizer.update(obs)
        actions.copy_(sample(agent.standardizer(obs)).nan_to_num())  # a NaN can take a simulator down; the log finds it

    def save(name: str) -> None:
        """The state that --resume continues from; where it is not finite, in failed.pt."""
        buffer.flush(), writer.flush()
        path = run_dir / (name if np.isfinite(metrics.tolist()).all() else "failed.pt")
        state = dict(algorithm=Path(__file__).stem, args=dict(vars(args), resume=""), sizes=sizes)
        state.update(run=(global_step, best_return, events, buffer.flushed))
        with open(path.with_suffix(".tmp"), "wb") as f:
            torch.save({**state, **{name: part.state_dict() for name, part in learner.items()}}, f)
            os.fsync(f.fileno())
        os.replace(path.with_suffix(".tmp"), path)  # at every moment the old file or the new one, whole

    returns, lengths = torch.zeros(2, args.num_envs, device=args.device)  # of the episodes under way
    ended = torch.zeros(3, device=args.device)  # of those that ended since the last log: sums of return, length, 1
    start_step, start_time, last_return, eval_return = global_step, time.time(), math.nan, math.nan
    bar = tqdm(total=args.total_timesteps, initial=global_step, mininterval=0.5 if sys.stderr.isatty() else 30)
    stop = []  # a SIGTERM ends the run where it arrives, as Ctrl-C, or at the next step where code ignores exceptions
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(stop.append(number) or 128 + number))
    signal.signal(signal.SIGINT, signal.default_int_handler)  # simulators set their own
    try:
        while True:
            # Checkpoint, evaluation and logs of the step that was made; a resumed run begins here and logs it again
            require(not stop, "stopped by SIGTERM")
            end = global_step >= args.total_timesteps
            eval_due = end or global_step % args.eval_frequency < args.num_envs
            if eval_due:
                save("checkpoint.pt")  # before the evaluation, in which the simulator may fail
                require(np.isfinite(metrics.tolist()).all(), f"step {global_step}: a loss is not finite")
            if eval_due and global_step and "eval/episodic_return" not in events:
                video = run_dir / f"video-{global_step}.mp4" if args.capture_video else None
                eval_return, length = (x.mean().item() for x in evaluate(agent, sim, args, video))
                if eval_return > best_return:
                    save("best.pt")
                    best_return = eval_return
                events.update({"eval/episodic_return": eval_return, "eval/episodic_length": length})
                sim.reset()  # the episodes that the evaluation cut off are over
                returns.zero_(), lengths.zero_()
                start_step, start_time = global_step, time.time()  # of SPS, which leaves evaluations out
            for name, value in events.items():
                writer.add_scalar(name, value, global_step)
            if end:
                break

            obs.copy_(sim.obs)
            act()
            if global_step < args.learning_starts:
                actions.uniform_(-1, 1)
            else:
                for _ in range(args.updates_per_step):
                    update()
            next_obs, rewards, terminated, truncated, valid = sim.step(actions)
            buffer.add(valid, obs, actions, rewards, next_obs, terminated)
            global_step, events = global_step + args.num_envs, {}
            bar.update(args.num_envs)
            returns, lengths, done = returns + rewards * valid, lengths + valid, terminated | truncated
            ended += torch.stack([returns * done, lengths * done, done]).sum(-1)
            returns, lengths = returns * ~done, lengths * ~done
            if global_step // args.num_envs % 100 == 0 and global_step > args.learning_starts:  # waits for the device
                values = metrics.tolist()
                require(np.isfinite(values).all(), f"step {global_step}: not finite: {dict(zip(METRICS, values))}")
                policy = torch.no_grad()(agent.policy_metrics)(buffer.sample(args.batch_size).obs)
                events.update({f"losses/{name}": value for name, value in zip(METRICS, values)})
                events.update({f"policy/{name}": x.item() for name, x in policy.items()})
                last_return, length, any_ended = (ended / ended[2].clamp(min=1)).tolist()
                if any_ended:
                    events.update({"charts/episodic_return": last_return, "charts/episodic_length": length})
                ended.zero_()
                events["charts/SPS"] = (global_step - start_step) / (time.time() - start_time)
                bar.set_postfix(episode=last_return, evaluation=eval_return, SPS=events["charts/SPS"], refresh=False)
    except BaseException as e:  # Ctrl-C, SIGTERM, an error of the simulator, a loss that is not finite
        e = e.__context__ if isinstance(e.__context__, (KeyboardInterrupt, SystemExit)) else e  # torch.save hides it
        save("checkpoint.pt")
        bar.close()
        print(f"stopped at step {global_step}; continue with: python {sys.argv[0]} --resume {run_dir}")
        raise SystemExit(130) if isinstance(e, KeyboardInterrupt) else e from e.__cause__
    save("checkpoint.pt")
    (run_dir / "buffer.bin").unlink()
    [each.close() for each in (bar, writer)]
    if args.track:
        wandb.finish()
    print(f"best evaluation return {best_return:.1f}; checkpoints in {run_dir}", flush=True)
    sim.close()  # Isaac Lab may end the process here
    return run_dir


if __name__ == "__main__":
    args = parse_args()
    if args.evaluate:
        agent, sim = load_agent(args.evaluate, args.device)[0], make_sim(args, args.seed)
        sizes = load_checkpoint(Path(args.evaluate))["sizes"]
        require(sizes == (sim.obs_dim, sim.action_dim), f"{args.evaluate} is not of {args.env_id}")
        video = Path(args.evaluate).with_suffix(".mp4") if args.capture_video else None
        returns, lengths = evaluate(agent, sim, args, video)
        print(f"{args.env_id}: return {returns.mean():.2f} +- {returns.std(False):.2f}, length {lengths.mean():.1f}")
        sim.close()
    else:
        train(args)
