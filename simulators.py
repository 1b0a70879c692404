"""Isaac Gym, Isaac Lab and brax behind one contract: thousands of environments of a task on one device.

    import simulators                                          # before torch, as Isaac Gym demands it
    sim = simulators.make("brax", "ant", num_envs=64, seed=1, device="cpu")

N environments, O observation, D action. All tensors are on the device and are not overwritten by the next step.

    sim.num_envs, sim.obs_dim, sim.action_dim   N, O, D
    sim.reset(seed)   begins an episode in every environment; on brax the same ones for the same seed
    sim.obs           (N, O), what to act on next
    sim.step(actions) actions (N, D) in [-1, 1] -> obs (N, O), reward (N,) float, terminated, truncated, valid (N,) bool
    sim.render()      a picture (H, W, 3) of the first environment
    sim.close()

`obs` follows the action: where an episode ended it is the true last observation, while sim.obs belongs to the next
episode. An environment is never terminated and truncated at once. `valid` is false for a step that is no transition and
must not be learned from: the simulator spent it on a reset (reward 0), or its physics was no longer finite.
"""

from __future__ import annotations  # Isaac Gym needs Python 3.8

import contextlib
import math
import os
from pathlib import Path

with contextlib.suppress(ImportError):  # it refuses to be imported after torch; IsaacGymEnvs shows what went wrong
    import isaacgym  # noqa: F401

import numpy as np
import torch

INSTALL = {
    "brax": "pip install -r requirements-brax.txt (Python 3.11 or newer)",
    "isaacgymenvs": "see requirements-isaacgym.txt (Python 3.8, Isaac Gym Preview 4 from developer.nvidia.com)",
    "isaaclab": "see requirements-isaaclab.txt (Python 3.12)",
}


class IsaacGymEnvs:
    """Isaac Gym's tasks, isaacgymenvs 1.5.1: deferred resets, the old 4-tuple, buffers that each step overwrites.

    An environment that is done returns its true last observation and is reset in the next step, whatever its action is,
    so that step is not valid. The task's `reset` computes nothing: the first observations are zeros until a step was
    made. A failure on the step of the time limit is marked as a time-out, too, and counts as truncated.
    """

    def __init__(self, env_id: str, num_envs: int, seed: int, device: str, render: bool):
        import isaacgym  # noqa: F401  first: it explains itself if torch came before it
        import isaacgymenvs

        torch.manual_seed(seed)  # `make` takes a seed and does not apply it; the tasks draw from torch
        name = "cuda:0" if device == "cuda" else device
        self.env = isaacgymenvs.make(
            seed=seed,
            task=env_id,
            num_envs=num_envs,
            sim_device=name,
            rl_device=name,
            graphics_device_id=0 if render else -1,
            headless=not render,
            virtual_screen_capture=render,
            force_render=render,
        )
        self.num_envs, self.device = num_envs, device
        self.obs_dim, self.action_dim = self.env.observation_space.shape[0], self.env.action_space.shape[0]

    def reset(self, seed: int | None = None) -> None:
        """A step in which every environment is reset; it gives the first observations."""
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
        return self.obs, torch.where(valid, reward, torch.zeros_like(reward)), self.done & ~truncated, truncated, valid

    def render(self) -> np.ndarray:
        return self.env.render(mode="rgb_array")

    def close(self) -> None:
        """Isaac Gym ends with the process."""


class IsaacLab:
    """Isaac Lab's tasks, 3.0: resets within the step that ends an episode; the last observation is in the extras.

    `final_obs` is the one of the last step in which some environment ended: it is stale for the others. Action spaces
    are unbounded; actions in [-1, 1] are what the tasks scale.
    """

    def __init__(self, env_id: str, num_envs: int, seed: int, device: str, render: bool):
        import gymnasium
        import isaaclab_tasks  # noqa: F401  registers the tasks
        from isaaclab.app import launch_simulation
        from isaaclab_tasks.utils import parse_env_cfg

        cfg = parse_env_cfg(env_id, device="cuda:0" if device == "cuda" else device, num_envs=num_envs)
        cfg.seed, cfg.compute_final_obs = seed, True
        self.app = contextlib.ExitStack()
        self.app.enter_context(launch_simulation(cfg, dict(headless=True, enable_cameras=render)))
        self.env = gymnasium.make(env_id, cfg=cfg, render_mode="rgb_array" if render else None)
        spaces = self.env.unwrapped.single_observation_space["policy"], self.env.unwrapped.single_action_space
        self.num_envs, (self.obs_dim, self.action_dim) = num_envs, (math.prod(space.shape) for space in spaces)

    def reset(self, seed: int | None = None) -> None:
        self.obs = self.env.reset(seed=seed)[0]["policy"].clone()

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

    def close(self) -> None:
        self.env.close()
        self.app.close()


class Brax:
    """brax's tasks, one compiled function a step; its arrays and torch's tensors are the same memory (dlpack).

    Environments that end are reset within the step, from states drawn anew; the observation before that is the last
    one. One whose physics is no longer finite is reset, and its step is not valid. `metrics` has the task's own
    measures of the last step, such as x_position, (N,) each.
    """

    tasks = ("ant", "humanoid", "halfcheetah", "hopper", "walker2d")
    time_limit = 1000  # steps of an episode, as in brax's own training

    def __init__(self, env_id: str, num_envs: int, seed: int, device: str, backend: str):
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the replay buffer needs the GPU's memory, too
        import jax
        import jax.numpy as jnp
        from brax import envs

        if env_id not in self.tasks:
            raise ValueError(f"{env_id}: brax has {', '.join(self.tasks)}")
        try:
            self.jax_device = jax.devices("gpu" if device == "cuda" else "cpu")[0]
        except RuntimeError as e:
            raise ValueError("jax sees no GPU; pip install 'jax[cuda12]' (the version pinned) or --device cpu") from e
        self.jax, self.num_envs = jax, num_envs
        self.env = envs.get_environment(env_id, backend=backend)
        self.obs_dim, self.action_dim = self.env.observation_size, self.env.action_size

        def typed(tree):
            """The same for every call (jax has weak types), as each difference costs a compilation of its own."""
            return jax.tree_util.tree_map(lambda x: jax.lax.convert_element_type(x, x.dtype), tree)

        def first(key):
            """States at the start of an episode, their ages (N,), and the key of the next call."""
            keys = jax.random.split(key, num_envs + 1)
            return typed(jax.vmap(self.env.reset)(keys[1:])), jnp.zeros(num_envs, jnp.int32), keys[0]

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

            # drawing new states takes time: only if an environment needs one
            state, key = jax.lax.cond(done.any(), reset_done, lambda new, key: (new, key), new, key)
            result = (jnp.nan_to_num(new.obs), jnp.nan_to_num(new.reward), terminated, truncated, finite)
            return state, jnp.where(done, 0, ages + 1), key, result, new.metrics

        self.first, self.advance = jax.jit(first), jax.jit(step)
        self.key = self.make_key(seed)
        self.reset()
        self.step(torch.zeros(num_envs, self.action_dim, device=device))  # compiles: a Ctrl-C in it finds no run yet
        self.key = self.make_key(seed)

    def make_key(self, seed: int):
        with self.jax.default_device(self.jax_device):
            return self.jax.device_put(self.jax.random.PRNGKey(seed), self.jax_device)

    def reset(self, seed: int | None = None) -> None:
        self.state, self.ages, key = self.first(self.key if seed is None else self.make_key(seed))
        if seed is None:
            self.key = key
        self.obs = torch.from_dlpack(self.state.obs)

    def step(self, actions: torch.Tensor):
        actions = self.jax.dlpack.from_dlpack(actions.contiguous())
        self.state, self.ages, self.key, result, self.metrics = self.advance(self.state, self.ages, self.key, actions)
        self.obs = torch.from_dlpack(self.state.obs)
        return tuple(torch.from_dlpack(x) for x in result)

    def render(self) -> np.ndarray:
        from brax.io import image

        return image.render_array(self.env.sys, self.jax.tree_util.tree_map(lambda x: x[0], self.state.pipeline_state))

    def close(self) -> None:
        """There is nothing to close."""


def make(
    sim: str, env_id: str, num_envs: int, seed: int, device: str, render: bool = False, backend: str = "mjx"
) -> Brax | IsaacGymEnvs | IsaacLab:
    """The task `env_id` of the simulator `sim`: brax, isaacgymenvs or isaaclab.

    device: cpu or cuda. render: `render` will be called. backend: brax's physics. The first episodes have begun. Raises
    ImportError, with the way to install it, where the simulator is missing, and ValueError for a task or device that it
    does not have, or where nothing can be drawn.
    """
    try:
        if sim == "brax":
            made = Brax(env_id, num_envs, seed, device, backend)
        else:
            made = (IsaacGymEnvs if sim == "isaacgymenvs" else IsaacLab)(env_id, num_envs, seed, device, render)
    except ImportError as e:
        raise ImportError(f"{' '.join(str(e).split()) or 'it is missing'}; to install it: {INSTALL[sim]}") from e
    made.reset()
    try:
        if render:
            import imageio  # noqa: F401  for write_video

            made.render()
    except Exception as e:  # each renderer raises its own
        hint = "brax needs libegl1 and MUJOCO_GL=egl, isaacgymenvs a display"
        raise ValueError(f"cannot draw a picture here ({type(e).__name__}: {e}); {hint}") from e
    return made


def write_video(path: Path, frames: list[np.ndarray]) -> None:
    """Pictures (H, W, 3) as an mp4 of 30 a second."""
    import imageio

    imageio.mimsave(str(path), frames, fps=30)
