"""SAC on thousands of environments that are simulated in parallel on one device: the baseline of meow_isaacgym.py.

Haarnoja, Zhou, Abbeel and Levine, "Soft Actor-Critic: Off-Policy Maximum Entropy Deep Reinforcement Learning with a
Stochastic Actor", ICML 2018, https://arxiv.org/abs/1801.01290; automatic temperature: https://arxiv.org/abs/1812.05905

    python sac_isaacgym.py --sim brax --env-id ant                 # CPU or GPU
    python sac_isaacgym.py --sim isaacgymenvs --env-id Ant         # Python 3.8, GPU; never met the simulator
    python sac_isaacgym.py --sim isaaclab --env-id Isaac-Ant-v0    # Python 3.12, GPU; never met the simulator

Networks and update are the same text as in sac_continuous_action.py. Observations, actions and replay buffer stay on
the device, and observations are standardized. N: environments, B: batch, O: observation, D: action.

    (1)  u ~ N(mu(s), sigma(s)^2),  a = tanh(u)                                 GaussianActor.forward
    (2)  log pi(a|s) = log N(u) - sum log(1 - a^2)                              GaussianActor.forward
    (3)  Q_i(s,a), two nets                                                     ShiftedTwinQ.forward
    (4)  V(s) = (1/M) sum_j [min_i Q_i(s,a_j) - alpha log pi(a_j|s)],  a_j ~ pi  SAC.v
    (5)  y = r + gamma (1 - d) V'(s'),  M = 1,  L_Q = mean (Q_i(s,a) - y)^2     make_update
    (6)  L_pi = mean (alpha log pi(a|s) - min_i Q_i(s,a)),  a ~ pi              make_update
    (7)  L_alpha = -alpha mean (log pi(a|s) + H),  H = -D                       make_update
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
    # SAC's own
    alpha: float = 1.0  # temperature: the weight of the entropy
    autotune: bool = False  # automatic temperature: it moves from alpha on until the entropy is -D
    policy_lr: float = 3e-4  # Adam's step size for the actor
    q_lr: float = 3e-4  # Adam's step size for the Q-functions and alpha
    policy_frequency: int = 1  # updates between those of the actor, which then makes as many steps
    reward_shift: bool = False  # learnable reward shifts b_1(s), b_2(s) in the Q-functions, as in MEow


WIDE = dict(num_envs=512, batch_size=256, total_timesteps=512_000_000, learning_starts=51_200, buffer_size=7_680_000)
PRESETS = {  # the MEow paper's, for Isaac Gym; Isaac Lab's Isaac-Ant-v0 takes Ant's
    "Ant": dict(alpha=0.4, tau=0.0025),
    "Humanoid": dict(alpha=0.025, tau=0.0025),
    "Ingenuity": dict(alpha=0.1, tau=0.0025, total_timesteps=64_000_000),
    "Anymal": dict(alpha=0.01, tau=0.0025),
    "AllegroHand": dict(WIDE, alpha=0.1, tau=0.0025),
    "FrankaCabinet": dict(WIDE, alpha=0.1, tau=0.025),
}
ANT = dict(num_envs=64, batch_size=256, updates_per_step=4, gamma=0.97, total_timesteps=1_536_000, q_lr=1e-3)
ANT.update(learning_starts=6_400, buffer_size=1_000_000, eval_frequency=128_000, autotune=True)  # as MEow's
FALLS = dict(ANT, gamma=0.997, batch_size=128, updates_per_step=32, total_timesteps=512_000, eval_frequency=64_000)
BRAX = dict(hopper=FALLS, walker2d=FALLS)  # all others take ANT
LIMITS = dict(gamma=(0, 1), tau=(0, 1), seed=(0, 2**31), learning_starts=(1, 1e12), policy_frequency=(1, 1e6))
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


def relu_net(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    layers = (nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(hidden_dim, out_dim))


class ShiftedTwinQ(nn.Module):
    """Q_1 and Q_2; with the reward shift Q_i(s,a) = net_i(s,a) + b_i(s). The target network is a copy of this."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.nets = nn.ModuleList([relu_net(obs_dim + action_dim, 256, 1) for _ in range(2)])
        self.shift_nets = nn.ModuleList([relu_net(obs_dim, 256, 1) for _ in range(2 * args.reward_shift)])

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
        self.net = relu_net(obs_dim, 256, 2 * action_dim)

    def gaussian(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mu(s) and log sigma(s), (B, D) each, the latter in [-5, 2]."""
        mean, log_std = self.net(obs).chunk(2, -1)
        return mean, -5 + 0.5 * (2 + 5) * (torch.tanh(log_std) + 1)

    def forward(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, D), equation (1), of noise (B, D) from N(0, I), and log pi(a|s), (B,), equation (2)."""
        mean, log_std = self.gaussian(obs)
        u = mean + log_std.exp() * noise
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - log_one_minus_tanh2(u)
        return torch.tanh(u), log_prob.sum(-1)


class SAC(nn.Module):
    """Policy and soft Q-functions. Observations (B, O), actions (B, D) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.action_dim = action_dim
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.actor = GaussianActor(obs_dim, action_dim)
        self.qf = ShiftedTwinQ(obs_dim, action_dim, args)

    def sample(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        """Actions (B, D): a draw from the policy, equation (1), or tanh(mu(s)) if deterministic."""
        mean, log_std = self.actor.gaussian(obs)
        return torch.tanh(mean if deterministic else mean + log_std.exp() * torch.randn_like(mean))

    def sample_with_log_prob(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, D) and log pi(a|s), (B,)."""
        return self.actor(obs, torch.randn(*obs.shape[:-1], self.action_dim, dtype=obs.dtype, device=obs.device))

    def q(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2)."""
        return self.qf(obs, action)

    def v(self, obs: torch.Tensor, samples: int = 256) -> torch.Tensor:
        """V_1(s), V_2(s): (B, 2), equation (4) for each head, from `samples` actions a state."""
        obs = obs.expand(samples, *obs.shape)  # (M, B, O)
        action, log_prob = self.sample_with_log_prob(obs)
        return (self.q(obs, action) - self.log_alpha.exp() * log_prob[..., None]).mean(0)

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """log pi(a|s): (B,), equation (2)."""
        mean, log_std = self.actor.gaussian(obs)
        u = torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))
        log_normal = -0.5 * ((u - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
        return (log_normal - log_one_minus_tanh2(u)).sum(-1)

    def policy_metrics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means over the batch: entropy in nats, log sigma."""
        return dict(entropy=-self.sample_with_log_prob(obs)[1].mean(), log_sigma=self.actor.gaussian(obs)[1].mean())


Agent = SAC  # its name in what the scripts share
METRICS = ("qf_loss", "qf1_loss", "qf2_loss", "qf1_values", "qf2_values", "target_values", "grad_norm")
METRICS += ("actor_loss", "alpha_loss", "alpha")


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


def make_update(agent: nn.Module, buffer: ReplayBuffer, args: Args):
    """update(): (5); every policy_frequency-th time also as many steps of (6), (7). METRICS (10,). What it moves."""
    target = copy.deepcopy(agent.qf).requires_grad_(False)  # Q'
    q_params, target_params, actor_params = flatten(agent.qf), flatten(target), flatten(agent.actor)
    log_alpha, updates, device = agent.log_alpha.detach(), itertools.count(), q_params.device
    metrics, obs = q_params.new_zeros(len(METRICS)), q_params.new_zeros(args.batch_size, buffer.widths[0])
    q_optimizer = torch.optim.Adam([q_params], args.q_lr, fused=True, capturable=True)
    actor_optimizer = torch.optim.Adam([actor_params], args.policy_lr, fused=True, capturable=True)
    alpha_optimizer = torch.optim.Adam([log_alpha], args.q_lr, fused=True, capturable=True)

    @compiled(args)
    def q_gradient(q_params, target_params, actor_params, log_alpha, batch: Batch, noise: torch.Tensor):
        actor = unflatten(actor_params, agent.actor)
        next_actions, next_log_prob = functional_call(agent.actor, actor, (batch.next_obs, noise))
        next_q = functional_call(target, unflatten(target_params, target), (batch.next_obs, next_actions)).amin(-1)
        next_v = (next_q - log_alpha.exp() * next_log_prob)[:, None]  # (B, 1), equation (4) with M = 1
        y = batch.rewards + args.gamma * (1 - batch.terminations) * next_v  # (B, 1)

        def loss(params: dict[str, torch.Tensor]):
            q = functional_call(agent.qf, params, (batch.obs, batch.actions))  # (B, 2)
            qf_loss = (q - y).square().mean(0)  # (2,)
            return qf_loss.mean(), torch.cat([qf_loss.mean()[None], qf_loss, q.mean(0), y.mean()[None]])

        grads, values = torch.func.grad(loss, has_aux=True)(unflatten(q_params, agent.qf))
        grad = concatenate(grads.values())  # (P,)
        return grad, torch.cat([values, grad.norm()[None]])

    @compiled(args)
    def actor_gradient(actor_params, q_params, log_alpha, obs: torch.Tensor, noise: torch.Tensor):
        alpha, q_params = log_alpha.exp(), unflatten(q_params, agent.qf)

        def loss(params: dict[str, torch.Tensor]):
            actions, log_prob = functional_call(agent.actor, params, (obs, noise))
            q = functional_call(agent.qf, q_params, (obs, actions)).amin(-1)  # (B,)
            actor_loss = (alpha * log_prob - q).mean()
            return actor_loss, (actor_loss, log_prob.mean())

        grads, (actor_loss, log_prob) = torch.func.grad(loss, has_aux=True)(unflatten(actor_params, agent.actor))
        alpha_loss = -alpha * (log_prob - agent.action_dim)  # its gradient in log alpha is the loss itself
        return concatenate(grads.values()), alpha_loss, torch.stack([actor_loss, alpha_loss, alpha])

    @recorded(args)
    def update_q() -> None:
        batch = buffer.sample(args.batch_size)
        noise = torch.randn(batch.actions.shape, device=device)
        q_params.grad, values = q_gradient(q_params, target_params, actor_params, log_alpha, batch, noise)
        q_optimizer.step()
        target_params.lerp_(q_params, args.tau)  # Q' <- Q' + tau (Q - Q')
        metrics[:7].copy_(values), obs.copy_(batch.obs)  # which update_actor() takes

    @recorded(args)
    def update_actor() -> None:
        noise = torch.randn(args.batch_size, agent.action_dim, device=device)
        actor_params.grad, alpha_grad, values = actor_gradient(actor_params, q_params, log_alpha, obs, noise)
        log_alpha.grad = alpha_grad if args.autotune else None
        actor_optimizer.step(), alpha_optimizer.step()
        metrics[7:].copy_(values)

    def update() -> None:
        update_q()
        for _ in range(args.policy_frequency if next(updates) % args.policy_frequency == 0 else 0):
            update_actor()

    optimizers = dict(q_optimizer=q_optimizer, actor_optimizer=actor_optimizer, alpha_optimizer=alpha_optimizer)
    return update, metrics, dict(agent=agent, target=target, **optimizers)


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
