"""SAC-NF: soft actor-critic whose actor is a normalizing flow, that of MEow (https://arxiv.org/abs/2405.13629).

Mazoure et al., "Leveraging exploration in off-policy algorithms via normalizing flows", CoRL 2019, arXiv 1905.06893

    python sac_nf_continuous_action.py --env-id Ant-v4

From SAC it differs in the policy's family alone; from MEow in SAC's objective and settings: two losses and a soft value
from samples, not one loss and an exact soft value. B: batch, O: observation, D: action.

    (1)  z ~ N(mu(s), sigma(s)^2),  z <- z + (1 - b_k) t_k(b_k z, s) for k = 1 to 4,  a = tanh(z)  FlowActor.forward
    (2)  log pi(a|s) = log N(z at the start) - sum log(1 - a^2)                                    FlowActor.forward
    (3)  Q_i(s,a), two nets                                                                        TwinQ.forward
    (4)  V(s) = (1/M) sum_j [min_i Q_i(s,a_j) - alpha log pi(a_j|s)],  a_j ~ pi                    SACNF.v
    (5)  y = r + gamma (1 - d) V'(s'),  M = 1,  L_Q = mean (Q_i(s,a) - y)^2                        make_update
    (6)  L_pi = mean (alpha log pi(a|s) - min_i Q_i(s,a)),  a ~ pi                                 make_update
    (7)  L_alpha = -alpha mean (log pi(a|s) + H),  H = -D                                          make_update
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
    # SAC-NF's own
    alpha: float = 1.0  # temperature: the weight of the entropy
    autotune: bool = True  # automatic temperature: it moves from alpha on until the entropy is -D
    policy_lr: float = 3e-4  # Adam's step size for the actor
    q_lr: float = 1e-3  # Adam's step size for the Q-functions and alpha
    policy_frequency: int = 2  # updates between those of the actor, which then makes as many steps


GOAL_MAP = dict(alpha=2.5, gamma=0.9, autotune=False, num_envs=8, learning_starts=1_000)
GOAL_MAP |= dict(total_timesteps=16_000, buffer_size=100_000, eval_frequency=2_000)
STEPS = {"Hopper": 1.5, "HalfCheetah": 1.5, "Walker2d": 4, "Ant": 4, "Humanoid": 5}  # millions, as in MEow's paper
PRESETS = {f"{task}-v4": dict(total_timesteps=int(n * 1e6)) for task, n in STEPS.items()}  # a -v5 task takes those
PRESETS |= {"multigoal:MultiGoal-v0": GOAL_MAP}
PRESETS["multigoal:MultiGoalAsymmetric-v0"] = GOAL_MAP | dict(alpha=10.0, gamma=0.8)
LIMITS = dict(gamma=(0, 1), tau=(0, 1), seed=(0, 2**31), learning_starts=(1, 1e12))
LIMITS |= dict(policy_frequency=(1, 1e6))  # every other number must be above 0
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


def relu_net(in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Two hidden layers with ReLU."""
    layers = (nn.Linear(in_dim, hidden_dim), nn.ReLU(), nn.Linear(hidden_dim, hidden_dim), nn.ReLU())
    return nn.Sequential(*layers, nn.Linear(hidden_dim, out_dim))


class TwinQ(nn.Module):
    """Q_1 and Q_2. The target network is a copy of this."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        self.nets = nn.ModuleList([relu_net(obs_dim + action_dim, 256, 1) for _ in range(2)])

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2), equation (3)."""
        return torch.cat([net(torch.cat([obs, action], -1)) for net in self.nets], -1)


def log_one_minus_tanh2(u: torch.Tensor) -> torch.Tensor:
    """log(1 - tanh(u)^2), exact where tanh rounds to 1."""
    return 2 * (math.log(2) - u - nn.functional.softplus(-2 * u))


class FlowActor(nn.Module):
    """pi(.|s): tanh of four additive couplings of a Gaussian."""

    def __init__(self, obs_dim: int, action_dim: int):
        super().__init__()
        b = (torch.arange(action_dim) + 1) % 2 * 1.0  # 1, 0, 1, 0, ...: 1 for what conditions the rest
        self.register_buffer("masks", torch.stack([b, 1 - b, b, 1 - b]))  # (4, D)
        self.nets = nn.ModuleList([MLP(action_dim + obs_dim, 64, action_dim, norm=True) for _ in range(4)])  # t_k
        self.gaussian_net = relu_net(obs_dim, 256, 2 * action_dim)

    def gaussian(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """mu(s) and log sigma(s), (B, D) each, the latter in [-5, 2]."""
        mean, log_std = self.gaussian_net(obs).chunk(2, -1)
        return mean, -5 + 0.5 * (2 + 5) * (torch.tanh(log_std) + 1)

    def forward(self, obs: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, D), equation (1), of noise (B, D) from N(0, I), and log pi(a|s), (B,), equation (2)."""
        mean, log_std = self.gaussian(obs)
        z = mean + log_std.exp() * noise  # (B, D)
        for b, net in zip(self.masks, self.nets, strict=True):
            z = z + (1 - b) * net(torch.cat([b * z, obs], -1))
        log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi) - log_one_minus_tanh2(z)
        return torch.tanh(z), log_prob.sum(-1)


class SACNF(nn.Module):
    """Policy and soft Q-functions. Observations (B, O), actions (B, D) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.action_dim, self.log_alpha = action_dim, nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.actor, self.qf = FlowActor(obs_dim, action_dim), TwinQ(obs_dim, action_dim)

    def sample(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        """Actions (B, D): a draw from the policy, equation (1), or the image of z = mu(s) if deterministic."""
        return self.sample_with_log_prob(obs, float(not deterministic))[0]

    def sample_with_log_prob(self, obs: torch.Tensor, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
        """Actions (B, D) of noise from N(0, scale^2 I) and log pi(a|s), (B,)."""
        noise = scale * torch.randn(*obs.shape[:-1], self.action_dim, dtype=obs.dtype, device=obs.device)
        return self.actor(obs, noise)

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
        z = u = torch.atanh(action.clamp(-1 + 1e-6, 1 - 1e-6))  # (B, D)
        for b, net in zip(self.actor.masks.flip(0), reversed(self.actor.nets), strict=True):
            z = z - (1 - b) * net(torch.cat([b * z, obs], -1))
        log_normal = -0.5 * ((z - mean) / log_std.exp()).square() - log_std - 0.5 * math.log(2 * math.pi)
        return (log_normal - log_one_minus_tanh2(u)).sum(-1)

    def policy_metrics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """Means over the batch: entropy in nats, log sigma."""
        return dict(entropy=-self.sample_with_log_prob(obs)[1].mean(), log_sigma=self.actor.gaussian(obs)[1].mean())


Agent = SACNF  # its name in what the scripts share
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
