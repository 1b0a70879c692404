"""MEow on robots simulated in parallel, hundreds to thousands on one device, and SAC on the same loop, in one file.

Chao, Feng, Sun, Lee, See and Lee, "Maximum Entropy Reinforcement Learning via Energy-Based Normalizing
Flow", NeurIPS 2024, https://arxiv.org/abs/2405.13629: its six Isaac tasks, and any task of three simulators

    python meow_isaacgym.py --sim isaacgymenvs --env-id Ant             # Isaac Gym; Python 3.8
    python meow_isaacgym.py --sim isaaclab --env-id Isaac-Ant-v0        # Isaac Lab 3.0
    python meow_isaacgym.py --sim brax --env-id ant                     # brax on MJX; CPU or GPU
    python meow_isaacgym.py --algo sac ...                              # the baseline
    torchrun --nproc-per-node 2 meow_isaacgym.py ...                    # each GPU its own robots, one agent
    python meow_isaacgym.py --resume runs/ant__...                      # after a stop; the robots begin new episodes

The algorithms are those of meow_continuous_action.py and sac_continuous_action.py, equation numbers included, and
their networks are the same text. What is different here: a step is a step of all N robots at once and is followed by
one update; observations, actions and the replay buffer never leave the device; nothing in the loop waits for the
device except logs and checkpoints; observations are standardised; the simulators reset each in its own way, and what
the loop sees of them is one contract, said above `IsaacGymEnvs`. N: robots, B: batch, O: obs, D: action.

    equation                                                                    here
    (1)  u = z / sigma(s),  z = couplings(atanh a),  u ~ N(0, I)                MEow.energy
    (2)  Q_i(s,a) = alpha [-|u|^2 / 2 - sum log(1 - a^2) + b_i(s)]              MEow.q
    (3)  V_i(s)   = alpha [D log(2 pi) / 2 + sum log sigma(s) + b_i(s)]         SoftValue.forward, MEow.v
    (4)  log pi(a|s) = (Q_i(s,a) - V_i(s)) / alpha,  the same for i = 1, 2      MEow.log_prob
    (5)  a = tanh(couplings^-1(sigma(s) u)),  u ~ N(0, I), or u = 0             MEow.sample
    (6)  y = r + gamma (1 - d) min_i V_i'(s'),  L = mean (Q_i(s,a) - y)^2       make_meow_learner
"""

# Isaac Gym needs Python 3.8: all here is in its syntax, and asks for no newer torch than 2.4
from __future__ import annotations

import contextlib
import copy
import dataclasses
import fcntl
import hashlib
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
import tempfile
import time
from pathlib import Path
from typing import Literal, NamedTuple, Optional

# isaacgym refuses to be imported after torch, so this cannot wait until the flags are parsed. Where it is missing,
# the simulator says so.
if "isaacgymenvs" in " ".join(sys.argv).replace("=", " ").split():
    with contextlib.suppress(ImportError):
        import isaacgym  # noqa: F401

import numpy as np
import psutil
import torch
import torch.distributed as dist
import torch.nn as nn
import tyro
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm


@dataclasses.dataclass
class Args:
    exp_name: str = Path(__file__).stem
    """name of the experiment, part of the run's folder"""
    sim: Literal["brax", "isaacgymenvs", "isaaclab"] = "brax"
    """simulator; each has its own requirements file"""
    env_id: str = "ant"
    """task, by the simulator's name for it: ant (brax), Ant (isaacgymenvs), Isaac-Ant-v0 (isaaclab)"""
    algo: Literal["meow", "sac"] = "meow"
    """algorithm"""
    seed: int = 1
    """seed of the parameters, the replay samples, the action noise, and of the simulator where it takes one"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where networks, replay buffer and simulator live; auto takes the GPU if there is one"""
    torch_deterministic: bool = False
    """use deterministic torch algorithms only; the simulators on a GPU are not deterministic"""
    track: bool = False
    """log to Weights & Biases too (`WANDB_MODE=offline` needs no account)"""
    wandb_project_name: str = "meow"
    """W&B project"""
    wandb_entity: Optional[str] = None  # noqa: UP045  tyro reads it, and Python 3.8 has no `str | None`
    """W&B entity (team)"""
    capture_video: bool = False
    """write an mp4 of one episode at every evaluation, under the run's videos/"""
    evaluate: Optional[str] = None  # noqa: UP045
    """path of a checkpoint: replay its policy, print the returns and exit"""
    resume: Optional[str] = None  # noqa: UP045
    """folder of a run that was stopped or killed: go on with it, in place and with its flags, in new episodes"""
    debug: bool = False
    """show the traceback of an error"""
    total_steps: int = 1_000_000
    """steps of all robots at once, each followed by one update"""
    num_envs: int = 128
    """robots; in a torchrun, of each process"""
    buffer_steps: int = 15_000
    """steps that the replay buffer holds, that is 15,000 N transitions"""
    batch_size: int = 1024
    """transitions in an update; in a torchrun, of each process"""
    learning_starts: int = 100
    """steps with uniformly random actions before the first update"""
    gamma: float = 0.99
    """discount factor"""
    tau: float = 0.005
    """Polyak step of the target"""
    checkpoint_frequency: int = 10_000
    """steps between checkpoints; there is one at the end and at a stop, too"""
    checkpoint_minutes: float = 10.0
    """minutes after which a checkpoint is due in any case"""
    eval_frequency: int = 10_000
    """steps between evaluations, one episode of every robot"""
    deterministic_eval: bool = True
    """evaluate the policy's deterministic action rather than samples"""
    brax_backend: Literal["mjx", "spring", "positional", "generalized"] = "mjx"
    """physics of brax; spring is the quickest to compile"""
    # MEow's and SAC's own; the deterministic action is u = 0 (Proposition 2), and tanh(mu(s))
    alpha: float = 0.2
    """temperature: the weight of the entropy"""
    learning_rate: float = 1e-3
    """Adam's step size"""
    max_grad_norm: float = 30.0
    """the gradient is clipped to this norm (MEow)"""
    sigma_min: float = -5.0
    """lower bound of log sigma(s) (MEow)"""
    sigma_max: float = -0.3
    """upper bound of log sigma(s) (MEow)"""
    dropout: float = 0.1
    """dropout in the coupling nets, in the loss alone (MEow)"""
    coupling: Literal["additive", "affine"] = "additive"
    """form of the four coupling layers (MEow)"""
    reward_shift: bool = True
    """learnable reward shifts b_1(s), b_2(s) in the Q-functions"""
    clipped_double_q: bool = True
    """the smaller V_i' in the target (without it their mean: the paper's ablation with shifts only; MEow)"""
    autotune: bool = False
    """automatic temperature: from alpha on, it moves until the entropy is -D (SAC)"""


# The paper's settings for its six Isaac tasks, MEow's and SAC's; Isaac Lab's tasks take those of the same name. The
# ones for brax are this project's own, chosen on ant (docs/parallel.md says what was tried).
PRESETS = {
    "Ant": dict(alpha=0.075, tau=0.0005, sigma_max=2.0),
    "Humanoid": dict(alpha=0.25, tau=0.00025),
    "Ingenuity": dict(alpha=0.025, tau=0.0025, sigma_min=-4.0, total_steps=500_000),
    "Anymal": dict(alpha=0.00075, tau=0.025, sigma_max=-1.0),
    "AllegroHand": dict(alpha=0.1, tau=0.001, sigma_min=-4.0, num_envs=512, batch_size=256),
    "FrankaCabinet": dict(alpha=0.075, tau=0.01, num_envs=512, batch_size=256),
    "brax": dict(alpha=0.05, tau=0.01, batch_size=256),
}
SAC_PRESETS = {
    "Ant": dict(alpha=0.4, tau=0.0025),
    "Humanoid": dict(alpha=0.025, tau=0.0025),
    "Ingenuity": dict(alpha=0.1, tau=0.0025, total_steps=500_000),
    "Anymal": dict(alpha=0.01, tau=0.0025),
    "AllegroHand": dict(alpha=0.1, tau=0.0025, num_envs=512, batch_size=256),
    "FrankaCabinet": dict(alpha=0.1, tau=0.025, num_envs=512, batch_size=256),
    "brax": dict(autotune=True, batch_size=256),
}
INSTALL = {
    "brax": "pip install -r requirements-brax.txt (Python 3.11 or newer)",
    "isaacgymenvs": "see requirements-isaacgym.txt (Python 3.8, Isaac Gym Preview 4 from developer.nvidia.com)",
    "isaaclab": "see requirements-isaaclab.txt (Python 3.12)",
}
EVAL_SEED = 10_000  # evaluation episodes start from the same states every time, where the simulator can
LOG_EVERY = 100  # steps between logs; beside evaluations and checkpoints, the loop waits for the device there alone

# What --resume lets a flag change: nothing that would make it another run
MAY_CHANGE = {"resume", "debug", "device", "track", "wandb_project_name", "wandb_entity", "capture_video"}
MAY_CHANGE |= {"checkpoint_frequency", "checkpoint_minutes"}


class UserError(Exception):
    """Something that the user can put right; printed as one line, exit code 2."""


class RunError(Exception):
    """A run that cannot go on, whose state is saved; printed as one line, exit code 1."""


def preset(sim: str, env_id: str, algo: str) -> dict:
    """What differs from the defaults of Args. Isaac-Ant-v0 and Isaac-Ant-Direct-v0 take Ant's."""
    task = "brax" if sim == "brax" else re.sub(r"^Isaac-(\w+?)(-Direct)?-v\d+$", r"\1", env_id)
    if algo == "sac":
        return {"learning_rate": 3e-4, "reward_shift": False, **SAC_PRESETS.get(task, {})}
    return dict(PRESETS.get(task, {}))


def parse_flags(argv: list | None = None) -> Args:
    """Command line -> Args. Flags given win over the preset of the task, or over the args of --evaluate's file.

    With --resume the args are those of the run. Raises UserError if a flag that makes the run what it is differs.
    """
    argv = sys.argv[1:] if argv is None else argv
    first = tyro.cli(Args, args=[a for a in argv if a not in ("-h", "--help")])
    file = first.evaluate or first.resume
    if first.evaluate is not None:
        values = {**load_checkpoint(file)["args"], "device": "auto", "track": False, "capture_video": False}
        values["resume"] = None
    elif first.resume is not None:
        values = latest_checkpoint(file)[0]["args"]
    else:
        values = preset(first.sim, first.env_id, first.algo)
    if file is not None and values["sim"] == "isaacgymenvs" and first.sim != "isaacgymenvs":
        raise UserError(f"{file} needs Isaac Gym; add --sim isaacgymenvs, which must be known early")
    args = tyro.cli(Args, args=argv, default=dataclasses.replace(Args(), **values))
    for name in values.keys() - MAY_CHANGE if first.resume is not None else ():
        if getattr(args, name) != values[name]:
            flag = "--" + name.replace("_", "-")
            raise UserError(f"{flag} {getattr(args, name)}: expected {values[name]}, as in {file}; leave it out")
    return args


def check_flags(args: Args) -> None:
    """Raise UserError, naming the flag, its value and its range, before anything is built."""
    positive = ("total_steps", "num_envs", "buffer_steps", "batch_size", "learning_starts", "eval_frequency")
    positive += ("checkpoint_frequency", "checkpoint_minutes", "alpha", "learning_rate", "max_grad_norm")
    ranges = {name: (0 < getattr(args, name) < math.inf, "above 0 and finite") for name in positive}
    ranges.update({name: (0 <= getattr(args, name) <= 1, "in [0, 1]") for name in ("gamma", "tau")})
    ranges["seed"] = (0 <= args.seed < 2**32, "in [0, 2^32)")
    ordered = -20 <= args.sigma_min < args.sigma_max <= 10
    ranges["sigma_min"] = (ordered, "-20 <= sigma_min < sigma_max <= 10")
    ranges["dropout"] = (0 <= args.dropout < 1, "in [0, 1)")
    ranges["evaluate"] = (not (args.evaluate and args.resume), "no --resume beside it")
    ranges["device"] = (args.device != "cuda" or torch.cuda.is_available(), "cpu: torch sees no CUDA device")
    for name, (ok, expected) in ranges.items():
        if not ok:
            raise UserError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected {expected}")


# Simulators. What the loop sees of each of them:
#   sim.num_envs, sim.obs_dim, sim.action_dim   N, O, D
#   sim.reset(seed)              starts an episode in every robot, the same ones for a seed where the simulator can
#   sim.obs (N, O)               what to act on next
#   sim.step(actions (N, D))     -> obs (N, O), reward, terminated, truncated, valid, (N,) each
#   sim.render()                 -> a picture (H, W, 3)
# of which `obs` follows the action, so where an episode ended it is the true last one, and sim.obs may already belong
# to the next; `terminated` and `truncated` exclude each other (a task that ends is not cut off); `valid` is false
# where the step was not one of the task, as it reset the robot, and must not be learned from. All of them are tensors
# on the device, (N,) float for the reward and bool for the flags, that the next step leaves alone.


class IsaacGymEnvs:
    """Isaac Gym's tasks: deferred resets, the old 4-tuple, and buffers that the next step overwrites.

    A robot that is done returns its true last observation and is reset in the next step, whatever its action is, so
    that step is not valid. `reset` of the task computes nothing; the first observations are zeros until a step was
    made. A failure on the step of the time limit is marked as a time-out, too: it counts as truncated here.
    """

    def __init__(self, args: Args, seed: int, device: torch.device):
        import isaacgym  # noqa: F401  first: it explains itself if torch came before it
        import isaacgymenvs

        torch.manual_seed(seed)  # `make` takes a seed and does not apply it; the tasks draw from torch
        name = str(device) if device.type == "cpu" else f"cuda:{device.index or 0}"
        self.env = isaacgymenvs.make(
            seed=seed,
            task=args.env_id,
            num_envs=args.num_envs,
            sim_device=name,
            rl_device=name,
            graphics_device_id=(device.index or 0) if args.capture_video else -1,
            headless=not args.capture_video,
            virtual_screen_capture=args.capture_video,
            force_render=args.capture_video,
        )
        self.num_envs, self.device = args.num_envs, device
        self.obs_dim, self.action_dim = self.env.observation_space.shape[0], self.env.action_space.shape[0]

    def reset(self, seed: int | None = None) -> None:
        """A step in which every robot is reset; it gives the first observations."""
        self.env.reset_buf.fill_(1)
        actions = torch.zeros(self.num_envs, self.action_dim, device=self.device)
        self.obs = self.env.step(actions)[0]["obs"].clone()
        self.done = torch.zeros(self.num_envs, dtype=torch.bool, device=self.device)  # of the last step

    def step(self, actions: torch.Tensor):
        obs, reward, reset, infos = self.env.step(actions)  # reward and reset are the task's own buffers
        valid = ~self.done
        self.obs = obs["obs"].clone()
        self.done = reset.bool()
        truncated = self.done & infos["time_outs"].bool()
        return self.obs, reward.clone(), self.done & ~truncated, truncated, valid

    def render(self) -> np.ndarray:
        return self.env.render(mode="rgb_array")


class IsaacLab:
    """Isaac Lab's tasks: resets within the step that ends an episode; the last observation is in the extras.

    `final_obs` is the one of the last step in which some robot ended: it is stale for the others. Action spaces are
    unbounded; actions in [-1, 1] are what the tasks scale.
    """

    def __init__(self, args: Args, seed: int, device: torch.device):
        import gymnasium
        import isaaclab_tasks  # noqa: F401  registers the tasks
        from isaaclab.app import launch_simulation
        from isaaclab_tasks.utils import parse_env_cfg

        cfg = parse_env_cfg(args.env_id, device=str(device), num_envs=args.num_envs)
        cfg.seed, cfg.compute_final_obs = seed, True
        self.app = contextlib.ExitStack()  # the simulation app, open until the process ends
        self.app.enter_context(launch_simulation(cfg, dict(headless=True, enable_cameras=args.capture_video)))
        self.env = gymnasium.make(args.env_id, cfg=cfg, render_mode="rgb_array" if args.capture_video else None)
        self.num_envs, self.device = args.num_envs, device
        spaces = self.env.unwrapped.single_observation_space["policy"], self.env.unwrapped.single_action_space
        self.obs_dim, self.action_dim = (math.prod(space.shape) for space in spaces)

    def reset(self, seed: int | None = None) -> None:
        self.obs = self.env.reset()[0]["policy"].clone()

    def step(self, actions: torch.Tensor):
        obs, reward, terminated, truncated, extras = self.env.step(actions.clamp(-1, 1))
        terminated, truncated = terminated.clone(), truncated & ~terminated
        done = terminated | truncated
        self.obs = obs["policy"].clone()
        last = self.obs  # until an episode ends for the first time there is no final_obs
        if "final_obs" in extras:
            last = torch.where(done[:, None], extras["final_obs"]["policy"], self.obs)  # (N, O)
        return last, reward.clone(), terminated, truncated, torch.ones_like(done)

    def render(self) -> np.ndarray:
        return self.env.render()


class Brax:
    """brax's tasks, one compiled function a step; its arrays and torch's tensors are the same memory (dlpack).

    Robots that end are reset within the step, from states drawn anew; the observation before that is handed out as
    the last one. A robot whose physics is no longer finite is reset, and its step is not valid.
    """

    tasks = ("ant", "humanoid", "halfcheetah", "hopper", "walker2d")
    time_limit = 1000  # steps of an episode, as in brax's own training

    def __init__(self, args: Args, seed: int, device: torch.device):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the buffer needs the GPU's memory, too
        import jax
        import jax.numpy as jnp
        from brax import envs

        if args.env_id not in self.tasks:
            raise UserError(f"--env-id {args.env_id}: brax has {', '.join(self.tasks)}")
        try:
            self.jax_device = jax.devices("gpu" if device.type == "cuda" else "cpu")[device.index or 0]
        except RuntimeError as e:
            raise UserError("--device cuda: jax sees no GPU; pip install 'jax[cuda12]' (the version pinned)") from e
        self.jax, self.device, self.num_envs = jax, device, args.num_envs
        self.env = envs.get_environment(args.env_id, backend=args.brax_backend)
        self.obs_dim, self.action_dim = self.env.observation_size, self.env.action_size

        def typed(tree):
            """The same for every call (jax has weak types), as each difference costs a compilation of its own."""
            return jax.tree_util.tree_map(lambda x: jax.lax.convert_element_type(x, x.dtype), tree)

        def first(key):
            """States of robots at the start of an episode, their ages (N,), and the key of the next call."""
            keys = jax.random.split(key, args.num_envs + 1)
            return typed(jax.vmap(self.env.reset)(keys[1:])), jnp.zeros(args.num_envs, jnp.int32), keys[0]

        def step(state, ages, key, actions):
            new = typed(jax.vmap(self.env.step)(state, actions))
            finite = jnp.isfinite(new.obs).all(-1) & jnp.isfinite(new.reward)  # (N,)
            terminated = (new.done > 0) & finite
            truncated = ~terminated & ((ages + 1 >= self.time_limit) | ~finite)
            done = terminated | truncated  # (N,)

            def reset_done(new, key):
                fresh, _, key = first(key)

                def pick(x, y):
                    return jnp.where(done.reshape(-1, *[1] * (y.ndim - 1)), x, y)

                return jax.tree_util.tree_map(pick, fresh, new), key

            # drawing new states takes time: only if a robot needs one
            state, key = jax.lax.cond(done.any(), reset_done, lambda new, key: (new, key), new, key)
            result = (jnp.nan_to_num(new.obs), jnp.nan_to_num(new.reward), terminated, truncated, finite)
            return state, jnp.where(done, 0, ages + 1), key, result

        self.first, self.advance = jax.jit(first), jax.jit(step)
        self.key = self.make_key(seed)

    def make_key(self, seed: int):
        with self.jax.default_device(self.jax_device):
            return self.jax.device_put(self.jax.random.PRNGKey(seed), self.jax_device)

    def reset(self, seed: int | None = None) -> None:
        key = self.key if seed is None else self.make_key(seed)
        self.state, self.ages, key = self.first(key)
        self.key = key if seed is None else self.key
        self.obs = torch.from_dlpack(self.state.obs)

    def step(self, actions: torch.Tensor):
        actions = self.jax.dlpack.from_dlpack(actions.contiguous())
        self.state, self.ages, self.key, result = self.advance(self.state, self.ages, self.key, actions)
        self.obs = torch.from_dlpack(self.state.obs)
        return tuple(torch.from_dlpack(x) for x in result)

    def render(self) -> np.ndarray:
        from brax.io import image

        return image.render_array(self.env.sys, self.jax.tree_util.tree_map(lambda x: x[0], self.state.pipeline_state))


def make_sim(args: Args, seed: int, device: torch.device):
    """The simulator of --sim. Raises UserError with the way to install it if it is missing."""
    try:
        return dict(brax=Brax, isaacgymenvs=IsaacGymEnvs, isaaclab=IsaacLab)[args.sim](args, seed, device)
    except ImportError as e:
        raise UserError(f"--sim {args.sim}: {str(e).splitlines()[0]}; to install it: {INSTALL[args.sim]}") from e


class Batch(NamedTuple):
    obs: torch.Tensor  # (B, O)
    actions: torch.Tensor  # (B, D), in [-1, 1]
    rewards: torch.Tensor  # (B,)
    next_obs: torch.Tensor  # (B, O), the true last observation where an episode ended
    terminations: torch.Tensor  # (B,), 1 where the task ended, 0 at time-outs


class DeviceBuffer:
    """Ring of transitions, each a row of one preallocated float32 tensor on the device: 4 (2 O + D + 2) bytes.

    15,000 steps of N robots take, on Isaac Gym's tasks: 1.00 GB on Ant (N 128, O 60, D 8), 1.84 GB on Humanoid (128,
    108, 21), 0.26 GB on Ingenuity (128, 13, 6), 0.84 GB on Anymal (128, 48, 12), 5.96 GB on AllegroHand (512, 88, 16)
    and 1.75 GB on FrankaCabinet (512, 23, 9). Raises UserError if that exceeds the free memory.

    Which transitions are valid is known on the device alone, so position and size are there, too. The invalid ones
    are written to one more row behind the ring, which is never drawn. `open` gives the ring its file.
    """

    def __init__(self, steps: int, num_envs: int, obs_dim: int, action_dim: int, device: torch.device):
        need = 4 * steps * num_envs * (2 * obs_dim + action_dim + 2)
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
        if need > free:
            raise UserError(
                f"--buffer-steps {steps} of {num_envs} robots need {need / 1e9:.2f} GB, {device} has {free / 1e9:.2f} "
                f"GB free; expected at most {int(steps * free / need)}"
            )
        self.widths = (obs_dim, action_dim, 1, obs_dim, 1)  # of the fields of Batch
        self.capacity, self.bytes = steps * num_envs, need
        self.position = torch.zeros((), dtype=torch.int64, device=device)  # transitions added so far

    def open(self, path: Path, position: int = 0) -> None:
        """Allocate the rows, with what the file has of them. Raises UserError if the disk has no room for it.

        On a CPU they are the file, mapped into memory; to a GPU they are copied from it, and `flush` copies back.
        """
        floats = (self.capacity + 1) * sum(self.widths)
        with open(path, "ab") as f:
            held, need, free = f.tell(), 4 * floats, shutil.disk_usage(path.parent).free
            try:
                if need - held > free:  # or what there is would be taken before that fails, from all who use the disk
                    raise OSError("no space left")
                os.posix_fallocate(f.fileno(), 0, need)  # or a disk that is full kills the process later
            except OSError as e:
                f.truncate(held)
                raise UserError(f"{path} needs {need / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on disk: {e}") from e
        self.path, self.mapped = path, torch.from_file(str(path), True, floats).view(self.capacity + 1, -1)
        self.rows = self.mapped.to(self.position.device)  # on a CPU the same tensor
        self.position.fill_(position)
        self.flushed = position

    def flush(self, chunk: int = 2**20) -> int:
        """Wait until the file has all rows and is on disk. Returns the position."""
        position = int(self.position)
        start = max(self.flushed, position - self.capacity)
        while self.rows is not self.mapped and start < position:
            row = start % self.capacity
            count = min(chunk, position - start, self.capacity - row)
            self.mapped[row : row + count] = self.rows[row : row + count]
            start += count
        self.flushed = position
        with open(self.path, "rb") as f:
            os.fsync(f.fileno())
        return position

    def add(self, valid: torch.Tensor, *transitions: torch.Tensor) -> None:
        """Store the valid ones of one step of every robot: the fields of Batch in order, first dimension N."""
        index = (self.position + valid.cumsum(0) - 1) % self.capacity  # (N,), consecutive for the valid ones
        index = torch.where(valid, index, self.capacity)
        columns = [field.reshape(len(valid), -1).to(self.rows.dtype) for field in transitions]
        self.rows.index_copy_(0, index, torch.cat(columns, -1))
        self.position += valid.sum()

    def fields(self, rows: torch.Tensor) -> Batch:
        """Rows (B, 2 O + D + 2) as the fields of Batch, which are views of them."""
        obs, actions, rewards, next_obs, terminations = rows.split(self.widths, -1)
        return Batch(obs, actions, rewards.squeeze(-1), next_obs, terminations.squeeze(-1))

    def sample(self, batch_size: int) -> Batch:
        """Transitions drawn uniformly with replacement."""
        size = self.position.clamp(1, self.capacity)
        index = torch.randint(2**62, (batch_size,), device=size.device) % size  # randint's bound would be on the host
        return self.fields(self.rows.index_select(0, index))


def sum_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """Sum of x over the processes of a torchrun, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def largest_over_ranks(numbers: list, device: torch.device) -> list:
    """The largest of each number over the processes of a torchrun; with several it waits for the device."""
    if not dist.is_initialized():
        return numbers
    x = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x.tolist()


def each_ranks(own: dict) -> list:
    """What each process of a torchrun gives, in the order of their ranks."""
    if not dist.is_initialized():
        return [own]
    every = [None] * dist.get_world_size()
    dist.all_gather_object(every, own)
    return every


class Standardizer(nn.Module):
    """(obs - mean) / std, clipped to [-5, 5], with mean and std of the observations visited so far, by all ranks.

    Each visited observation counts once, when it is acted on. Statistics of the sampled batches instead would count
    early ones again and again, and would move with the batch size. Transitions are stored as they were seen and
    standardised when drawn, so that old and new ones are on one scale. Sums are in double precision: they add up
    exactly enough over 1e9 observations, and over the ranks in one all_reduce.
    """

    def __init__(self, obs_dim: int):
        super().__init__()
        self.register_buffer("sums", torch.zeros(2 * obs_dim + 1, dtype=torch.float64))  # of x, x^2 and 1
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.ones(obs_dim))

    def update(self, obs: torch.Tensor) -> None:
        x = obs.double()  # (N, O)
        total = torch.cat([x.sum(0), x.square().sum(0), x.new_full((1,), len(x))])
        self.sums += sum_over_ranks(total)
        mean, mean_square = (self.sums[:-1] / self.sums[-1]).chunk(2)  # (O,) each
        self.mean.copy_(mean)
        self.std.copy_((mean_square - mean.square()).clamp_(min=1e-8).sqrt_())

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        return ((obs - self.mean) / self.std).clamp(-5, 5)


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


class Coupling(nn.Module):
    """One coupling layer: z <- b z + (1 - b) (z exp(s) + t), (t, s) = net(b z, obs), s = 0 if additive."""

    def __init__(self, obs_dim: int, action_dim: int, mask: torch.Tensor, affine: bool, hidden_dim: int = 64):
        super().__init__()
        self.affine = affine
        self.register_buffer("mask", mask)  # (D,), b: 1 for what passes unchanged and conditions the rest
        self.register_buffer("free", 1 - mask)  # (D,), 1 - b
        self.linear1 = nn.Linear(action_dim + obs_dim, hidden_dim)
        self.linear2 = nn.Linear(hidden_dim, hidden_dim)
        self.linear3 = nn.Linear(hidden_dim, (1 + affine) * action_dim)
        self.norm1, self.norm2 = nn.LayerNorm(hidden_dim), nn.LayerNorm(hidden_dim)
        self.beta1, self.beta2 = nn.Parameter(torch.ones(hidden_dim)), nn.Parameter(torch.ones(hidden_dim))
        for layer in (self.linear1, self.linear2, self.linear3):
            nn.init.orthogonal_(layer.weight)

    def net(self, z: torch.Tensor, obs: torch.Tensor, drop: torch.Tensor | None):
        """t and s (None if additive), each (B, D) and zero where b = 1. drop: dropout masks (2, B, 64) or None."""
        h = torch.cat([self.mask * z, obs], -1)  # (B, D + O)
        h = swish(self.norm1(self.linear1(h)), self.beta1)  # (B, 64)
        h = h if drop is None else h * drop[0]
        h = swish(self.norm2(self.linear2(h)), self.beta2)  # (B, 64)
        h = h if drop is None else h * drop[1]
        h = self.linear3(h)  # (B, D), or (B, 2 D) if affine
        if not self.affine:
            return self.free * h, None
        t, s = h.chunk(2, -1)
        return self.free * t, self.free * torch.tanh(s)  # exp(s) in [1/e, e]

    def forward(self, z: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        """Sampling direction, z (B, D)."""
        t, s = self.net(z, obs, None)
        return z + t if s is None else z * s.exp() + t

    def inverse(self, z: torch.Tensor, obs: torch.Tensor, drop: torch.Tensor | None):
        """Density direction. Returns z (B, D) and the log-determinant, (B,) or 0 if additive."""
        t, s = self.net(z, obs, drop)
        return (z - t, 0.0) if s is None else ((z - t) * (-s).exp(), -s.sum(-1))


class SoftValue(nn.Module):
    """Everything that V depends on: the sigma-net and the shifts b_1, b_2. The target is a copy of this alone."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.alpha, self.sigma_min, self.sigma_max = args.alpha, args.sigma_min, args.sigma_max
        self.log_normalizer = 0.5 * action_dim * math.log(2 * math.pi)  # of the prior N(0, I)
        self.sigma_net = StateNet(obs_dim, 64, action_dim)
        self.shift_nets = nn.ModuleList([StateNet(obs_dim, 256, 1) for _ in range(2 * args.reward_shift)])

    def log_sigma(self, obs: torch.Tensor) -> torch.Tensor:
        """log sigma(s), (B, D), in [sigma_min, sigma_max]."""
        return self.sigma_min + 0.5 * (self.sigma_max - self.sigma_min) * (torch.tanh(self.sigma_net(obs)) + 1)

    def shifts(self, obs: torch.Tensor) -> torch.Tensor:
        """b_1(s), b_2(s): (B, 2); zeros without the reward shift."""
        if len(self.shift_nets) == 0:
            return obs.new_zeros(*obs.shape[:-1], 2)
        return torch.cat([net(obs) for net in self.shift_nets], -1)

    def forward(self, obs: torch.Tensor) -> torch.Tensor:
        """V_1(s), V_2(s): (B, 2), equation (3)."""
        log_sigma = self.log_sigma(obs).sum(-1, keepdim=True)  # (B, 1)
        return self.alpha * (self.log_normalizer + log_sigma + self.shifts(obs))


class MEow(nn.Module):
    """Policy, soft Q-functions and soft values of one flow. Observations (B, O), actions (B, D) in [-1, 1]."""

    def __init__(self, obs_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.alpha, self.obs_dim, self.action_dim = args.alpha, obs_dim, action_dim
        mask = (torch.arange(action_dim) + 1) % 2 * 1.0  # b = 1, 0, 1, 0, ...
        masks = (mask, 1 - mask, mask, 1 - mask)  # in the order of sampling
        self.couplings = nn.ModuleList([Coupling(obs_dim, action_dim, b, args.coupling == "affine") for b in masks])
        self.value = SoftValue(obs_dim, action_dim, args)

    def act_noise(self, n: int, rng: torch.Generator) -> torch.Tensor:
        """What `act` takes for n observations: draws (n, D) from N(0, I)."""
        return torch.randn(n, self.action_dim, generator=rng, device=rng.device)

    def act(self, obs: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Actions (B, D), equation (5): the flow of the point `noise` (B, D) of the prior."""
        z = self.value.log_sigma(obs).exp() * noise  # (B, D)
        for coupling in self.couplings:
            z = coupling(z, obs)
        return torch.tanh(z)

    def sample(self, obs: torch.Tensor, deterministic: bool = False) -> torch.Tensor:
        """Actions (B, D) of draws from the prior or, if deterministic, of its mode."""
        noise = obs.new_zeros(len(obs), self.action_dim)
        return self.act(obs, noise if deterministic else noise.normal_())

    def energy(self, obs: torch.Tensor, action: torch.Tensor, drop: torch.Tensor | None = None) -> torch.Tensor:
        """The part of log pi(a|s) that depends on a, (B,): equation (1), Q_i / alpha - b_i.

        drop: dropout masks (4, 2, B, 64) for the coupling nets, in the loss alone; without them there is no dropout.
        """
        action = action.clamp(-1 + 1e-5, 1 - 1e-5)
        log_plus, log_minus = torch.log1p(action), torch.log1p(-action)  # exact near |a| = 1, unlike 1 - a^2
        z = 0.5 * (log_plus - log_minus)  # atanh a
        log_det = -(log_plus + log_minus).sum(-1)  # -sum log(1 - a^2), (B,)
        for k in reversed(range(len(self.couplings))):
            z, coupling_log_det = self.couplings[k].inverse(z, obs, None if drop is None else drop[k])
            log_det = log_det + coupling_log_det
        u = z * (-self.value.log_sigma(obs)).exp()  # (B, D)
        return log_det - 0.5 * u.square().sum(-1)

    def forward(self, obs: torch.Tensor, action: torch.Tensor, drop: torch.Tensor | None = None) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2), what the loss needs; torch.func.functional_call calls this alone."""
        return self.q(obs, action, drop)

    def q(self, obs: torch.Tensor, action: torch.Tensor, drop: torch.Tensor | None = None) -> torch.Tensor:
        """Q_1(s,a), Q_2(s,a): (B, 2), equation (2). One pass of the flow; the heads differ by their shifts."""
        return self.alpha * (self.energy(obs, action, drop)[..., None] + self.value.shifts(obs))

    def v(self, obs: torch.Tensor) -> torch.Tensor:
        """V_1(s), V_2(s): (B, 2), exactly alpha log int exp(Q_i / alpha) da, equation (3)."""
        return self.value(obs)

    def log_prob(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        """log pi(a|s): (B,), equation (4)."""
        log_sigma = self.value.log_sigma(obs).sum(-1)
        return self.energy(obs, action) - log_sigma - self.value.log_normalizer

    @torch.no_grad()
    def statistics(self, obs: torch.Tensor) -> dict[str, torch.Tensor]:
        """What is logged of the policy: its entropy (nats) and log sigma, means over the batch."""
        entropy = -self.log_prob(obs, self.sample(obs)).mean()
        return dict(entropy=entropy, log_sigma=self.value.log_sigma(obs).mean())


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


def monte_carlo_value(q: torch.Tensor, log_prob: torch.Tensor, alpha: torch.Tensor | float) -> torch.Tensor:
    """Estimate of V(s), (B,), from M actions of the policy: equation (4). q, log_prob: (M, B)."""
    return (q - alpha * log_prob).mean(0)


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


LOSSES = ("qf_loss", "qf1_loss", "qf2_loss", "q1", "q2", "target", "grad_norm")
SAC_LOSSES = LOSSES + ("actor_loss", "alpha_loss")


def flatten_with_gradients(module: nn.Module) -> nn.Parameter:
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


def dropout_masks(bits: torch.Tensor, p: float, dtype: torch.dtype) -> torch.Tensor | None:
    """Masks (4, 2, B, 64) for the coupling nets, 0 with probability p, else 1 / (1 - p); None if p is 0."""
    if p == 0:
        return None
    bits = torch.cat([bits & 0xFFFF, bits >> 16 & 0xFFFF], -1)
    return (bits >= round(p * 2**16)).to(dtype) / (1 - p)


def average_gradient(params: nn.Parameter) -> None:
    """The mean over the ranks, whose batches are of one size: the gradient of all their batches joined."""
    if dist.is_initialized():
        sum_over_ranks(params.grad).div_(dist.get_world_size())


def adam(params: nn.Parameter, learning_rate: float) -> torch.optim.Adam:
    """Adam on one flat vector, in one kernel, its step count on the device so that it can be captured."""
    return torch.optim.Adam([params], lr=learning_rate, fused=True, capturable=params.is_cuda)


def make_meow_learner(agent: MEow, args: Args):
    """Returns update(batch) -> statistics (7,), named in LOSSES: one gradient step of equation (6).

    Also returns, by name, what an update changes besides the agent: the target V' and the optimiser.
    """
    target = copy.deepcopy(agent.value).requires_grad_(False)
    params = flatten_with_gradients(agent)  # the couplings, then all that V depends on
    target_params = flatten_with_gradients(target).detach()
    value_params = params.detach()[-len(target_params) :]
    optimizer = adam(params, args.learning_rate)

    def update(batch: Batch) -> torch.Tensor:
        with torch.no_grad():
            next_v = target(batch.next_obs)  # (B, 2)
            next_v = next_v.amin(-1) if args.clipped_double_q else next_v.mean(-1)  # (B,)
            y = batch.rewards + args.gamma * (1 - batch.terminations) * next_v  # (B,)
        bits = torch.empty(4, 2, len(y), 64 // 4, dtype=torch.int64, device=y.device).random_(-(2**63), None)
        drop = dropout_masks(bits.view(torch.int32), args.dropout, y.dtype)  # (4, 2, B, 64) or None
        q = agent.q(batch.obs, batch.actions, drop)  # (B, 2)
        qf_loss = (q - y[:, None]).square().mean(0)  # (2,)
        loss = qf_loss.mean()

        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        average_gradient(params)
        grad_norm = nn.utils.clip_grad_norm_([params], args.max_grad_norm)
        optimizer.step()
        target_params.lerp_(value_params, args.tau)  # V' <- V' + tau (V - V')
        return torch.cat([torch.stack([loss, *qf_loss, *q.mean(0), y.mean()]).detach(), grad_norm[None]])

    return update, dict(target=target, optimizer=optimizer)


def make_sac_learner(agent: SAC, args: Args):
    """Returns update(batch) -> statistics (9,), named in LOSSES: a gradient step of each of SAC's three losses.

    Also returns, by name, what an update changes besides the agent: the targets Q' and the optimisers.
    """
    target = copy.deepcopy(agent.qf).requires_grad_(False)
    q_params, actor_params = flatten_with_gradients(agent.qf), flatten_with_gradients(agent.actor)
    target_params = flatten_with_gradients(target).detach()
    q_optimizer, actor_optimizer = adam(q_params, args.learning_rate), adam(actor_params, args.learning_rate)
    alpha_optimizer = adam(agent.log_alpha, args.learning_rate)
    q_leaves, actor_leaves = list(agent.qf.parameters()), list(agent.actor.parameters())
    agent.log_alpha.grad = torch.zeros_like(agent.log_alpha)

    def update(batch: Batch) -> torch.Tensor:
        alpha = agent.log_alpha.detach().exp()
        with torch.no_grad():
            next_actions, next_log_prob = agent.sample_with_log_prob(batch.next_obs)
            next_q = target(batch.next_obs, next_actions).amin(-1)  # (B,)
            next_v = monte_carlo_value(next_q[None], next_log_prob[None], alpha)  # (B,), M = 1
            y = batch.rewards + args.gamma * (1 - batch.terminations) * next_v  # (B,)
        q = agent.q(batch.obs, batch.actions)  # (B, 2)
        qf_loss = (q - y[:, None]).square().mean(0)  # (2,)
        loss = qf_loss.mean()

        q_optimizer.zero_grad(set_to_none=False)
        loss.backward(inputs=q_leaves)
        average_gradient(q_params)
        q_optimizer.step()

        actions, log_prob = agent.sample_with_log_prob(batch.obs)
        actor_loss = (alpha * log_prob - agent.q(batch.obs, actions).amin(-1)).mean()
        actor_optimizer.zero_grad(set_to_none=False)
        actor_loss.backward(inputs=actor_leaves)
        average_gradient(actor_params)
        actor_optimizer.step()

        alpha_loss = -agent.log_alpha.exp() * (log_prob.detach().mean() - agent.action_dim)
        if args.autotune:
            alpha_optimizer.zero_grad(set_to_none=False)
            alpha_loss.backward()
            average_gradient(agent.log_alpha)
            alpha_optimizer.step()
        target_params.lerp_(q_params.detach(), args.tau)  # Q' <- Q' + tau (Q - Q')
        return torch.stack(
            [loss, *qf_loss, *q.mean(0), y.mean(), q_params.grad.norm(), actor_loss, alpha_loss]
        ).detach()

    return update, dict(
        target=target, q_optimizer=q_optimizer, actor_optimizer=actor_optimizer, alpha_optimizer=alpha_optimizer
    )


def make_agent(obs_dim: int, action_dim: int, args: Args):
    return (MEow if args.algo == "meow" else SAC)(obs_dim, action_dim, args)


def captured(update):
    """update(batch) -> statistics as a CUDA graph: one launch in place of several hundred small kernels.

    Three updates run as they are, on a side stream, so that what is allocated once is there; the fourth is recorded.
    From then on a batch is copied to where the recording read its own, and the recording is replayed.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    calls, inputs, stats = 0, None, None

    def replay(batch: Batch) -> torch.Tensor:
        nonlocal calls, inputs, stats
        calls += 1
        if calls <= 3:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                warm_up = update(batch)
            torch.cuda.current_stream().wait_stream(stream)
            return warm_up.clone()
        if calls == 4:
            inputs = Batch(*[field.clone() for field in batch])
            with torch.cuda.graph(graph):
                stats = update(inputs)  # recorded, not run
        for field, value in zip(inputs, batch):
            field.copy_(value)
        graph.replay()
        return stats.clone()  # the next replay overwrites it

    return replay


@torch.random.fork_rng()  # sampled evaluations leave the random numbers of training alone
@torch.no_grad()
def evaluate_robots(agent, standardizer: Standardizer, sim, deterministic: bool):
    """One episode of every robot, from its start. Returns their returns (N,) and lengths (N,), on the device."""
    sim.reset(EVAL_SEED)
    returns = torch.zeros(sim.num_envs, device=sim.obs.device)
    lengths, active = torch.zeros_like(returns), torch.ones_like(returns)
    step = 0
    while step % 50 or bool(active.any()):  # asking waits for the device
        _, rewards, terminated, truncated, valid = sim.step(agent.sample(standardizer(sim.obs), deterministic))
        counts = active * valid  # a robot that is done goes on, but no longer counts
        returns += rewards * counts
        lengths += counts
        active *= ~(terminated | truncated)
        step += 1
    return returns, lengths


@torch.random.fork_rng()
@torch.no_grad()
def film(agent, standardizer: Standardizer, sim, deterministic: bool, path: Path, most: int = 1000) -> None:
    """Write the first episode of the first robot (at most `most` steps) as mp4. Raises UserError if it cannot."""
    sim.reset(EVAL_SEED)
    frames = []
    try:
        import imageio

        while len(frames) < most:
            frames.append(sim.render())
            _, _, terminated, truncated, _ = sim.step(agent.sample(standardizer(sim.obs), deterministic))
            if terminated[0] or truncated[0]:
                break
        path.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimsave(str(path), frames, fps=30)
    except Exception as e:  # each simulator's renderer raises its own
        hint = "brax draws through MuJoCo: apt-get install libegl1 and set MUJOCO_GL=egl; isaacgymenvs needs a display"
        raise UserError(f"--capture-video: cannot draw here ({type(e).__name__}: {e}); {hint}") from e


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


def load_policy(path: str | Path, device: torch.device | str = "cpu", args: Args | None = None):
    """The agent of a checkpoint, what standardises its observations, and its args (or the ones given).

    Raises UserError if the args do not fit the checkpoint.
    """
    checkpoint = load_checkpoint(path, device)
    args = args or Args(**checkpoint["args"])
    agent = make_agent(checkpoint["obs_dim"], checkpoint["action_dim"], args).to(device)
    standardizer = Standardizer(checkpoint["obs_dim"]).to(device)
    try:
        agent.load_state_dict(checkpoint["agent"])
    except RuntimeError as e:
        raise UserError(f"{path} does not fit the flags: {' '.join(str(e).split())[:300]}") from e
    standardizer.load_state_dict(checkpoint["standardizer"])
    return agent, standardizer, args


def replay_policy(args: Args) -> None:
    """--evaluate: print the return of each robot's episode, their mean and standard deviation."""
    check_flags(args)
    device = rank_device(args)
    agent, standardizer, _ = load_policy(args.evaluate, device, args)
    sim = make_sim(args, args.seed, device)
    if (agent.obs_dim, agent.action_dim) != (sim.obs_dim, sim.action_dim):
        dims = (agent.obs_dim, agent.action_dim), (sim.obs_dim, sim.action_dim)
        raise UserError(f"{args.evaluate}: (O, D) = {dims[0]}, {args.env_id} has {dims[1]}")
    torch.manual_seed(args.seed)
    returns, lengths = evaluate_robots(agent, standardizer, sim, args.deterministic_eval)
    for i, (episodic_return, length) in enumerate(zip(returns.tolist(), lengths.tolist())):
        print(f"episode {i}: return {episodic_return:.2f}, length {length:.0f}")
    std = returns.std(unbiased=False)
    print(f"{args.env_id}, {len(returns)} episodes: return {returns.mean():.2f} +- {std:.2f}")
    if args.capture_video:
        path = Path(args.evaluate).parent / "videos" / f"evaluate-{Path(args.evaluate).stem}.mp4"
        film(agent, standardizer, sim, args.deterministic_eval, path)
        print(f"video: {path}")


def rank_device(args: Args) -> torch.device:
    """The CPU, or the GPU that torchrun means this process to have."""
    if args.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


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


def open_run(
    args: Args, checkpoint: dict | None, ranks: int, facts: str
) -> tuple[Path, SummaryWriter, io.BufferedWriter]:
    """Create the run's folder with args.json, or go on with the checkpoint's; lock it, start logs, print the args."""
    name = re.sub(r"[^\w.-]", "_", f"{args.env_id}__{args.exp_name}_{args.algo}__{args.seed}")
    run_dir = Path("runs") / f"{name}__{int(time.time())}" if checkpoint is None else Path(args.resume)
    values = dataclasses.asdict(args)
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    versions.update({m: getattr(sys.modules[m], "__version__", "?") for m in ("jax", "brax") if m in sys.modules})
    device = torch.cuda.get_device_name() if rank_device(args).type == "cuda" else "no GPU"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {device}"
    about = dict(args=values, command=shlex.join(sys.argv), commit=commit(), machine=machine, versions=versions)
    try:
        run_dir = new_folder(run_dir) if checkpoint is None else run_dir
        lock, file, void = lock_run(run_dir), "args.json", None
        if checkpoint is not None:
            step = checkpoint["global_step"]
            if step != latest_checkpoint(run_dir)[0]["global_step"]:
                raise UserError(f"--resume {run_dir}: another process went on with it; expected to be alone")
            file, void = f"args-from-{step}.json", step + 1  # what a killed run logged from there on
        write_file(run_dir / file, json.dumps({**about, "ranks": ranks}, indent=2).encode())
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
    print(f"run: {run_dir}\n" + "  ".join(f"{key}={value}" for key, value in values.items()) + f"\n{facts}", flush=True)
    return run_dir, writer, lock


def load_parts(parts: dict, checkpoint: dict, args: Args) -> None:
    """Put back the state of agent, standardizer, target and optimisers. Raises UserError if it does not fit."""
    try:
        for name, part in parts.items():
            state = checkpoint[name]
            if isinstance(part, torch.optim.Optimizer):  # its flags depend on the device, so they stay
                state = {**part.state_dict(), "state": state["state"]}
            part.load_state_dict(state)
    except (RuntimeError, KeyError, ValueError) as e:
        raise UserError(f"--resume {args.resume} does not fit {args.env_id}: {' '.join(str(e).split())[:300]}") from e


def rng_states(device: torch.device) -> list:
    """Of all that this process draws: the states of torch's generators, the CPU's and, on a GPU, that one's."""
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


@contextlib.contextmanager
def handlers_restored():
    """Puts the handlers of SIGINT and SIGTERM back in the end."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)  # a simulator's own, if it is not Python's, is None


@handlers_restored()
def train_robots(args: Args) -> Path | None:
    """Train, evaluate, log and save. Returns the run's folder; None in the ranks of a torchrun that do not log.

    With --resume it goes on as if it had not been stopped, but for the robots: the state of a simulator is not saved,
    so they begin new episodes, and those under way are not counted. On SIGINT or SIGTERM the run saves itself, and
    SystemExit has the shell's code for the signal, 130 or 143; a second signal ends it at once.
    """
    check_flags(args)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what CUDA needs to be deterministic
    torch.use_deterministic_algorithms(args.torch_deterministic)
    torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs time
    device = rank_device(args)
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun sets them
    robots = args.num_envs * ranks

    checkpoint, last_step = None, 0
    if args.resume is not None:
        checkpoint, problem = latest_checkpoint(args.resume)
        if problem and rank == 0:
            print(f"warning: {problem}", file=sys.stderr)
        if len(checkpoint["run"]["ranks"]) != ranks:
            n = len(checkpoint["run"]["ranks"])
            raise UserError(f"--resume {args.resume}: {ranks} processes; expected {n}: torchrun --nproc-per-node {n}")
        last_step = checkpoint["global_step"] // robots
        if last_step >= args.total_steps:
            raise UserError(f"--resume {args.resume}: finished, at step {last_step}")
        if not (Path(args.resume) / f"buffer-{rank}.bin").exists():
            raise UserError(f"{args.resume}/buffer-{rank}.bin: no such file; expected the replay buffer of the run")
    # Each rank's robots, samples and noise are its own, and new ones after a stop
    rank_seed = (args.seed + 1_000_003 * rank + last_step) % 2**32

    sim = make_sim(args, rank_seed, device)
    buffer = DeviceBuffer(args.buffer_steps, args.num_envs, sim.obs_dim, sim.action_dim, device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    torch.manual_seed(args.seed)  # the same parameters on every rank
    agent = make_agent(sim.obs_dim, sim.action_dim, args).to(device)
    standardizer = Standardizer(sim.obs_dim).to(device)
    update, learner = (make_meow_learner if args.algo == "meow" else make_sac_learner)(agent, args)
    parts = dict(agent=agent, standardizer=standardizer, **learner)
    if checkpoint is not None:
        load_parts(parts, checkpoint, args)
    if device.type == "cuda" and ranks == 1:  # with several ranks the all_reduce stays outside a graph
        update = captured(update)
    torch.manual_seed(rank_seed)
    losses = LOSSES if args.algo == "meow" else SAC_LOSSES

    if args.capture_video and rank == 0:  # fails now if it is going to
        with tempfile.TemporaryDirectory() as folder:
            film(agent, standardizer, sim, args.deterministic_eval, Path(folder) / "try.mp4", most=2)
    run_dir, writer, lock = None, None, None
    if rank == 0:
        facts = f"{robots} robots, {args.total_steps * robots:,} robot-steps, replay {buffer.bytes / 1e9:.2f} GB a rank"
        facts += ", as much on disk until the run is finished"
        if checkpoint is not None:
            facts += f"\nresumed at step {last_step}; the robots begin new episodes"
        run_dir, writer, lock = open_run(args, checkpoint, ranks, facts)
    run_dir = each_ranks(dict(run_dir=run_dir))[0]["run_dir"]

    global_step = last_step * robots  # robot-steps, of all ranks
    best_return, eval_return, episodic_return = -math.inf, math.nan, math.nan
    stats = []  # (global_step, statistics (L,)) of the updates since the last log
    returns, lengths = torch.zeros(2, args.num_envs, device=device)  # of the episodes under way
    episodes = torch.zeros(3, device=device)  # sum of returns, sum of lengths, number of those ended since the last log
    buffer_path = run_dir / f"buffer-{rank}.bin"
    if checkpoint is None:
        buffer.open(buffer_path)
    else:
        best_return, eval_return = checkpoint["best_return"], checkpoint["run"]["eval_return"]
        episodic_return, own = checkpoint["run"]["episodic_return"], checkpoint["run"]["ranks"][rank]
        stats, episodes = [(step, row.to(device)) for step, row in own["stats"]], own["episodes"].to(device)
        buffer.open(buffer_path, own["position"])
        if len(own["rng"]) == len(rng_states(device)):  # else it goes on on another device
            torch.set_rng_state(own["rng"][0])
            for state in own["rng"][1:]:
                torch.cuda.set_rng_state(state, device)

    def save(name: str) -> None:
        """Called by all ranks: a checkpoint is of one step, and it is written when all buffers are on disk."""
        own = dict(position=buffer.flush(), rng=rng_states(device), episodes=episodes.cpu())
        every = each_ranks(dict(stats=[(step, row.cpu()) for step, row in stats], **own))
        if rank == 0:
            writer.flush()
            facts = dict(algorithm=Path(__file__).stem, args=dataclasses.asdict(args), obs_dim=sim.obs_dim)
            facts.update(action_dim=sim.action_dim, global_step=global_step, best_return=best_return)
            facts.update(run=dict(eval_return=eval_return, episodic_return=episodic_return, ranks=every))
            save_checkpoint(run_dir / name, {**facts, **{k: part.state_dict() for k, part in parts.items()}})

    def log(name: str, value: float) -> None:
        if rank == 0:
            writer.add_scalar(name, value, global_step)

    def check_losses() -> torch.Tensor:
        """Statistics of the updates since the last log, (updates, L). Stops all ranks if one's are not finite."""
        rows = torch.stack([s for _, s in stats]).cpu()
        bad = rows.isfinite().all(-1).logical_not().nonzero().flatten().tolist()
        if largest_over_ranks([len(bad)], device)[0]:
            save("failed.pt")
            where = "on another rank"
            if bad:
                row = ", ".join(f"{k}={v:.4g}" for k, v in zip(losses, rows[bad[0]].tolist()))
                where = f"at step {stats[bad[0]][0]}, {row}"
            state = f"The state at step {global_step} is in {run_dir}/failed.pt"
            raise RunError(f"the loss is not finite: {where}. {state}")
        return rows

    received = []  # signals, with their time

    def on_signal(number: int, frame: object) -> None:
        received.append((number, time.time()))
        if received[-1][1] - received[0][1] > 1:  # torchrun sends a terminal's Ctrl-C once more, at once
            sys.exit(128 + number)

    if checkpoint is None:
        save("checkpoint.pt")  # from here on, a run that is killed leaves a file that loads
    for number in (signal.SIGINT, signal.SIGTERM):  # only now: simulators set their own
        signal.signal(number, on_signal)
    start_time, start_step = time.time(), global_step  # of what SPS counts, evaluations left out
    saved_at, age, stop = time.time(), 0.0, 0
    sim.reset()
    interval = 0.5 if sys.stderr.isatty() else 30.0  # seconds; a log file needs fewer lines
    bar = dict(total=args.total_steps, initial=last_step, mininterval=interval, maxinterval=interval)
    bar = tqdm(**bar, unit="step", disable=rank > 0)
    for step in range(last_step + 1, args.total_steps + 1):
        obs = sim.obs  # (N, O)
        standardizer.update(obs)
        if step <= args.learning_starts:
            actions = torch.rand(args.num_envs, sim.action_dim, device=device) * 2 - 1  # (N, D)
        else:
            with torch.no_grad():
                actions = agent.sample(standardizer(obs))
            actions = actions.nan_to_num()  # a NaN can take a simulator down; its losses are reported by the next log
        next_obs, rewards, terminated, truncated, valid = sim.step(actions)
        buffer.add(valid, obs, actions, rewards, next_obs, terminated)
        global_step += robots
        bar.update()

        returns += torch.where(valid, rewards, 0.0)
        lengths += valid
        done = terminated | truncated
        episodes += torch.stack([returns * done, lengths * done, done]).sum(-1)
        returns *= ~done
        lengths *= ~done

        if step > args.learning_starts:
            batch = buffer.sample(args.batch_size)
            batch = batch._replace(obs=standardizer(batch.obs), next_obs=standardizer(batch.next_obs))
            stats.append((global_step, update(batch)))

        eval_due = step % args.eval_frequency == 0 or step == args.total_steps
        if stats and (step % LOG_EVERY == 0 or eval_due):
            for name, value in zip(losses, check_losses().mean(0).tolist()):
                log(f"losses/{name}", value)
            stats.clear()
            ended = sum_over_ranks(episodes.clone()).tolist()
            episodes.zero_()
            if ended[2]:
                episodic_return = ended[0] / ended[2]
                log("charts/episodic_return", episodic_return)
                log("charts/episodic_length", ended[1] / ended[2])
            for name, value in agent.statistics(batch.obs).items():
                log(f"policy/{name}", value.item())
            now = time.time()
            sps = (global_step - start_step) / (now - start_time)
            log("charts/SPS", sps)
            bar.set_postfix_str(f"SPS {sps:.0f}, return {episodic_return:.1f}, eval {eval_return:.1f}", refresh=False)
            start_time, start_step = now, global_step

        if eval_due:
            pause = time.time()
            evaluated, ages = evaluate_robots(agent, standardizer, sim, args.deterministic_eval)
            total = sum_over_ranks(torch.stack([evaluated.sum(), ages.sum()])).tolist()
            eval_return = total[0] / robots
            log("eval/episodic_return", eval_return)
            log("eval/episodic_length", total[1] / robots)
            if args.capture_video and rank == 0:
                film(agent, standardizer, sim, args.deterministic_eval, run_dir / "videos" / f"step-{global_step}.mp4")
            if eval_return > best_return:
                best_return = eval_return
                save("best.pt")
            start_time += time.time() - pause

        if ranks == 1 or step % LOG_EVERY == 0:  # the same on all ranks
            asked = [max([number for number, _ in received], default=0), time.time() - saved_at]
            stop, age = largest_over_ranks(asked, device)
        due = step % args.checkpoint_frequency == 0 or step == args.total_steps
        if due or stop or age > 60 * args.checkpoint_minutes:
            if stats:
                check_losses()
            save("checkpoint.pt")
            saved_at, age = time.time(), 0.0
        if stop:
            break
        if eval_due:
            sim.reset()  # the episodes that the evaluation cut off are over
            returns.zero_()
            lengths.zero_()
    bar.close()
    finished = step == args.total_steps
    if rank == 0:
        writer.close()
        lock.close()
        if finished:
            print(f"evaluation return {eval_return:.1f} (best {best_return:.1f}); checkpoints in {run_dir}")
        else:
            how = "python" if ranks == 1 else f"torchrun --nproc-per-node {ranks}"
            early = "--sim isaacgymenvs " if args.sim == "isaacgymenvs" else ""
            how += f" {sys.argv[0]} {early}--resume {shlex.quote(str(run_dir))}"
            print(f"stopped at step {step}; go on with: {how}", flush=True)
    if finished:
        buffer_path.unlink()
    if ranks > 1:
        dist.barrier()  # when a rank has exited with a signal's code, torchrun ends the others
        dist.destroy_process_group()
    if not finished:
        sys.exit(128 + int(stop))
    return run_dir if rank == 0 else None


if __name__ == "__main__":
    try:
        args = parse_flags()
        replay_policy(args) if args.evaluate else train_robots(args)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as e:
        if "--debug" in sys.argv:
            raise
        for bar in list(tqdm._instances):
            bar.close()  # which ends its line
        # What all ranks meet, their first one says: flags, and what they have agreed on
        shared = isinstance(e, RunError) or (isinstance(e, UserError) and not dist.is_initialized())
        if os.environ.get("RANK", "0") == "0" or not shared:
            known = isinstance(e, (UserError, RunError))
            print(f"error: {e}" if known else f"error: {type(e).__name__}: {e} (--debug shows where)", file=sys.stderr)
        sys.exit(2 if isinstance(e, UserError) else 1)
