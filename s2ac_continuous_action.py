"""S2AC: Stein soft actor-critic.

Messaoud et al., "S2AC: Energy-Based Reinforcement Learning with Stein Soft Actor Critic", ICLR 2024, arXiv 2405.00987

    python s2ac_continuous_action.py --env-id Ant-v4 --variant phi-theta

Two Q-functions, and L steps of Stein variational gradient descent (SVGD) as the actor. They move m particles u_i from
a Gaussian towards pi(a|s) ~ exp(Q(s,a) / alpha), and to the first order in the step size eps the density of the result
is known. B: batch, O: observation, D: action, u: an action before its tanh, delta = u_i - u_j.

    (1)  u_i ~ q^0(.|s) = N(mu(s), sigma(s)^2)                                                S2AC.gaussian
    (2)  u_i <- u_i + eps/m sum_j [k s_j + grad_{u_j} k],  k = exp(-|delta|^2 / (2 h^2))      svgd, svgd_direction
    (3)  log q^L(u_i) = log q^0(u_i) + eps/((m - 1) h^2) sum_l sum_{j /= i} k [delta . s_j + |delta|^2/h^2 - D]  svgd
    (4)  a = tanh u,  log pi(a|s) = log q^L(u) - sum log(1 - tanh^2 u)                        S2AC.policy
    (5)  s_j = grad log p(u_j|s),  log p(u|s) = min_i Q_i(s,a) / alpha + sum log(1 - a^2)     score
    (6)  V(s) = (1/m) sum_i [min_i Q_i(s,a_i) - alpha log pi(a_i|s)]                          S2AC.v, make_update
    (7)  y = r + gamma (1 - d) V'(s'),  L_Q = mean (Q_i(s,a) - y)^2                           make_update
    (8)  L_theta = mean (alpha log pi(a|s) - min_i Q_i(s,a)),  through (1) to (4)             make_update
    (9)  f(s, z), z ~ N(0, I), moves along the sum in (2) of its own particles                make_update
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
from collections.abc import Callable
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
    # S2AC's own; the deterministic action is tanh mu(s), f(s, 0) of phi-theta-psi, of phi the best by Q of fixed draws
    alpha: float = 1.0  # temperature: the weight of the entropy
    learning_rate: float = 3e-4  # Adam's step size
    variant: Literal["phi", "phi-theta", "phi-theta-psi"] = "phi-theta"  # learned besides Q: nothing; q^0; q^0 and f
    svgd_particles: int = 10  # particles of a state, m
    svgd_steps: int | None = None  # steps of SVGD, L; by default 20 of variant phi and 3 of the others
    svgd_step_size: float = 0.1  # step size of SVGD, eps (alpha times the paper's); the kernel's h^2 is not below it
    initial_std: float = 0.5  # standard deviation of q^0 in variant phi
    log_sigma_min: float = math.log(0.1)  # lower bound of log sigma(s)
    log_sigma_max: float = 0.0  # upper bound of log sigma(s)


GOAL_MAP = dict(gamma=0.9, svgd_steps=5, batch_size=64, utd=0.5, num_envs=8, learning_starts=1_000)
GOAL_MAP |= dict(total_timesteps=16_000, buffer_size=100_000, eval_frequency=2_000)
STEPS = {"Hopper": 1.5, "HalfCheetah": 1.5, "Walker2d": 4, "Ant": 4, "Humanoid": 5}  # millions, as in MEow's paper
PRESETS = {f"{task}-v4": dict(batch_size=100, total_timesteps=int(n * 1e6)) for task, n in STEPS.items()}  # or -v5
PRESETS["Ant-v4"] |= dict(alpha=0.2, svgd_step_size=0.02)
PRESETS["multigoal:MultiGoal-v0"] = GOAL_MAP | dict(alpha=2.5, svgd_step_size=0.025)
PRESETS["multigoal:MultiGoalAsymmetric-v0"] = GOAL_MAP | dict(alpha=10.0, gamma=0.8)
LIMITS = dict(gamma=(0, 1), tau=(0, 1), seed=(0, 2**31), learning_starts=(1, 1e12), log_sigma_min=(-20, 10))
LIMITS |= dict(log_sigma_max=(-20, 10), svgd_particles=(2, 1e4), svgd_steps=(0, 1e4))  # every other must be above 0
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


def elu_net(in_dim: int, out_dim: int) -> nn.Sequential:
    """Two hidden layers with ELU: (2) follows the gradient of Q, and (8) differentiates it once more."""
    return nn.Sequential(nn.Linear(in_dim, 256), nn.ELU(), nn.Linear(256, 256), nn.ELU(), nn.Linear(256, out_dim))


def log_one_minus_tanh2(u: torch.Tensor) -> torch.Tensor:
    """log(1 - tanh(u)^2), exact where tanh rounds to 1."""
    return 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))


def score(q: Callable, obs: torch.Tensor, u: torch.Tensor, alpha: float) -> torch.Tensor:
    """grad_u log p(u|s), (K, B, D), for obs (B, O) and u (K, B, D): the gradient of equation (5)."""

    def log_p(u: torch.Tensor) -> torch.Tensor:
        min_q = q(obs.expand(len(u), -1, -1), torch.tanh(u)).amin(-1)  # (K, B)
        return (min_q / alpha + log_one_minus_tanh2(u).sum(-1)).sum()

    return torch.func.grad(log_p)(u)


def svgd_direction(u: torch.Tensor, others: torch.Tensor, scores: torch.Tensor, eps: float, h2: torch.Tensor | None):
    """The mean over j in (2), (m', B, D), for u (m', B, D), u_j and s_j (m, B, D); also delta, k, h^2 (B,), by default
    sum_ij |u_i - u_j|^2 / (4 m^2 log(m + 1)), a constant to gradients and at least eps: (3) is of the first order in
    eps / h^2, and without that bound (8) finds Gaussians so narrow that (3) is wrong."""
    if h2 is None:
        h2 = (others.var(0, correction=0).sum(-1) / (2 * math.log(len(others) + 1))).clamp(min=eps).detach()
    delta = u[:, None] - others  # (m', m, B, D)
    k = (-delta.square().sum(-1) / (2 * h2)).exp()  # (m', m, B)
    return (k[..., None] * (scores + delta / h2[:, None])).mean(1), delta, k, h2  # grad_{u_j} k = k delta / h^2


def svgd(score_of: Callable, u: torch.Tensor, steps: int, eps: float, h2: torch.Tensor | None = None):
    """`steps` steps of (2) from independent draws u (m, B, D), with score_of(u) -> (m, B, D): the particles where they
    end, (m, B, D), and log q^L - log q^0 of each, (m, B), equation (3); j = i would need the Hessian of Q."""
    change = torch.zeros_like(u[..., 0])  # (m, B)
    for _ in range(steps):
        scores = score_of(u)
        phi, delta, k, width = svgd_direction(u, u, scores, eps, h2)
        terms = k * ((delta * scores).sum(-1) + delta.square().sum(-1) / width - u.shape[-1])  # (m, m, B)
        change = change + eps / ((len(u) - 1) * width) * (terms.sum(1) + u.shape[-1])  # the term of j = i is -D
        u = u + eps * phi
    return u, change


def truncated_normal(*shape: int, device: torch.device = "cpu", rng: torch.Generator | None = None) -> torch.Tensor:
    """N(0, 1) within 3 standard deviations, the paper's start. log q^0 in (3) is N's, 0.0027 a dimension too low."""
    return 2**0.5 * torch.erfinv((2 * torch.rand(shape, generator=rng, device=device) - 1) * math.erf(3 / 2**0.5))


class S2AC(nn.Module):
    """Policy and soft Q-functions. Observations (B, O), actions (B, D) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.alpha, self.eps, self.m, self.action_dim = args.alpha, args.svgd_step_size, args.svgd_particles, action_dim
        self.steps = (20 if args.variant == "phi" else 3) if args.svgd_steps is None else args.svgd_steps
        self.initial = None if args.variant == "phi" else elu_net(obs_dim, 2 * action_dim)
        self.std, self.low, self.high = args.initial_std, args.log_sigma_min, args.log_sigma_max
        self.qf = nn.ModuleList([elu_net(obs_dim + action_dim, 1) for _ in range(2)])
        self.sampler = elu_net(obs_dim + action_dim, action_dim) if args.variant == "phi-theta-psi" else None
        self.register_buffer("fixed_xi", truncated_normal(self.m, action_dim, rng=torch.Generator().manual_seed(0)))

    def gaussian(self, obs: torch.Tensor, params: dict | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """mu(s) and log sigma(s) of q^0, (B, D) each, equation (1). params: in place of the net's own."""
        if self.initial is None:
            return (zeros := obs.new_zeros(len(obs), self.action_dim)), zeros + math.log(self.std)
        mean, log_std = functional_call(self.initial, params or {}, obs).chunk(2, -1)
        return mean, self.low + 0.5 * (self.high - self.low) * (torch.tanh(log_std) + 1)

    def policy(self, obs: torch.Tensor, xi: torch.Tensor | None = None, params: dict | None = None):
        """Actions (m, B, D) and log pi(a|s), (m, B): equations (1) to (4). xi: draws (m, B, D) to use."""
        xi = truncated_normal(self.m, len(obs), self.action_dim, device=obs.device) if xi is None else xi
        mean, log_std = self.gaussian(obs, params)  # (B, D) each
        log_q0 = (-0.5 * xi.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)  # (m, B)
        u, change = svgd(lambda u: score(self.q, obs, u, self.alpha), mean + log_std.exp() * xi, self.steps, self.eps)
        return torch.tanh(u), log_q0 + change - log_one_minus_tanh2(u).sum(-1)

    def sample(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        """Actions (B, D): a particle; if deterministic, tanh mu(s), f(s, 0), or of phi the best by Q of fixed draws."""
        if not deterministic:
            return self.policy(obs)[0][0]
        if self.initial is not None:
            z = obs.new_zeros(len(obs), self.action_dim)
            return torch.tanh(self.sampler(torch.cat([obs, z], -1)) if self.sampler else self.gaussian(obs)[0])
        actions, _ = self.policy(obs, self.fixed_xi[:, None].expand(-1, len(obs), -1))  # (m, B, D)
        best = self.q(obs.expand(len(actions), -1, -1), actions).amin(-1).argmax(0)  # (B,)
        return actions[best, torch.arange(len(obs), device=obs.device)]

    def q(self, obs: torch.Tensor, action: torch.Tensor, nets: nn.ModuleList | None = None) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2). nets: those of the target, in place of the agent's."""
        return torch.cat([net(torch.cat([obs, action], -1)) for net in nets or self.qf], -1)

    forward = q  # what functional_call calls

    def v(self, obs: torch.Tensor, samples: int = 40) -> torch.Tensor:
        """V_1(s), V_2(s): (B, 2), equation (6) for each of the two, from `samples` actions a state."""
        draws = (self.policy(obs) for _ in range(math.ceil(samples / self.m)))  # m actions and log pi of each
        values = [self.q(obs.expand(self.m, -1, -1), a) - self.alpha * log_prob[..., None] for a, log_prob in draws]
        return torch.cat(values).mean(0)

    def policy_metrics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means over the batch: entropy in nats, standard deviation of the actions in a state, |mu| and log sigma."""
        (actions, log_prob), (mean, log_std) = self.policy(obs), self.gaussian(obs)
        start = dict(mean_abs=mean.abs().mean(), log_sigma=log_std.mean())
        return dict(entropy=-log_prob.mean(), action_std=actions.std(0).mean()) | start


Agent = S2AC  # its name in what the scripts share
METRICS = ("qf_loss", "qf1_loss", "qf2_loss", "qf1_values", "qf2_values", "target_values", "grad_norm")
METRICS += ("actor_loss", "stein_norm")  # 0 of a net that the variant does not have


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


def make_update(agent: S2AC, buffer: ReplayBuffer, args: Args):
    """update(), a step of (7), (8) and (9); its METRICS (9,), which it overwrites; and what it moves, by name."""
    target = copy.deepcopy(agent.qf).requires_grad_(False)  # Q'
    flat = {name: flatten(net) for name, net in agent.named_children()}  # (P,) of qf, and of initial and sampler
    q_params, target_params, device = flat["qf"], flatten(target), flat["qf"].device
    metrics = torch.zeros(len(METRICS), device=device)
    options = dict(lr=args.learning_rate, fused=True, capturable=True)
    optimizers = {f"{name}_optimizer": torch.optim.Adam([x], **options) for name, x in flat.items()}

    @compiled(args)
    def q_gradient(q_params: torch.Tensor, batch: Batch, xi: torch.Tensor):
        next_actions, next_log_prob = agent.policy(batch.next_obs, xi)  # (m, B, D), (m, B)
        next_q = agent.q(batch.next_obs.expand(len(xi), -1, -1), next_actions, target).amin(-1)  # (m, B)
        next_v = (next_q - args.alpha * next_log_prob).mean(0)[:, None]  # (B, 1)
        y = batch.rewards + args.gamma * (1 - batch.terminations) * next_v  # (B, 1)

        def loss(params: dict[str, torch.Tensor]):
            q = functional_call(agent, {f"qf.{name}": p for name, p in params.items()}, (batch.obs, batch.actions))
            qf_loss = (q - y).square().mean(0)  # (2,)
            return qf_loss.mean(), torch.cat([qf_loss.mean()[None], qf_loss, q.mean(0), y.mean()[None]])

        grads, values = torch.func.grad(loss, has_aux=True)(unflatten(q_params, agent.qf))
        grad = concatenate(grads.values())  # (P,)
        return grad, torch.cat([values, grad.norm()[None]])

    @compiled(args)
    def initial_gradient(params: torch.Tensor, obs: torch.Tensor, xi: torch.Tensor):
        def loss(params: dict[str, torch.Tensor]):
            actions, log_prob = agent.policy(obs, xi, params)
            q = agent.q(obs.expand(len(xi), -1, -1), actions).amin(-1)  # (m, B)
            return (args.alpha * log_prob - q).mean()

        grads, actor_loss = torch.func.grad_and_value(loss)(unflatten(params, agent.initial))
        return concatenate(grads.values()), actor_loss

    @compiled(args)
    def sampler_gradient(params: torch.Tensor, obs: torch.Tensor, z: torch.Tensor):
        x, x_fixed = torch.cat([obs.expand(len(z), -1, -1), z], -1).chunk(2)  # (m, B, O + D) each
        fixed = agent.sampler(x_fixed)  # (m, B, D)
        u, vjp = torch.func.vjp(lambda p: functional_call(agent.sampler, p, x), unflatten(params, agent.sampler))
        phi = svgd_direction(u, fixed, score(agent.q, obs, fixed, args.alpha), args.svgd_step_size, None)[0]
        (grads,) = vjp(-phi / phi[..., 0].numel())  # u moves along phi
        return concatenate(grads.values()), phi.norm(dim=-1).mean()

    @recorded(args)
    def update() -> None:
        batch = buffer.sample(args.batch_size)
        xi = truncated_normal(2, args.svgd_particles, *batch.actions.shape, device=device)
        q_params.grad, metrics[:7] = q_gradient(q_params, batch, xi[0])
        optimizers["qf_optimizer"].step()
        if agent.initial is not None:
            flat["initial"].grad, metrics[7] = initial_gradient(flat["initial"], batch.obs, xi[1])
            optimizers["initial_optimizer"].step()
        if agent.sampler is not None:
            z = torch.randn(2 * args.svgd_particles, *batch.actions.shape, device=device)  # (2 m, B, D)
            flat["sampler"].grad, metrics[8] = sampler_gradient(flat["sampler"], batch.obs, z)
            optimizers["sampler_optimizer"].step()
        target_params.lerp_(q_params, args.tau)  # Q' <- Q' + tau (Q - Q')

    return update, metrics, dict(agent=agent, target=target) | optimizers


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
