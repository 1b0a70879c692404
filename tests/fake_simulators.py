"""Stand-ins for Isaac Gym and Isaac Lab that keep the documented contracts to the letter, and the script they play.

Robot i, episode e, step t after the reset: the observation is (i, e, t, what the robot was told to do: the first
action), the reward is 100 i + 10 e + t, and `script` says when the episode ends and how. All is numpy, so that a test
can count what torch is asked to do by the loop alone.
"""

import contextlib
import types

import gymnasium
import numpy as np
import torch

LIMIT = 6  # steps of an episode
OBS_DIM, ACTION_DIM = 4, 2


def script(robot: int, episode: int) -> tuple[int, bool]:
    """Length of the episode and whether it ends in a failure; some fail on the very step of the time limit."""
    length = (LIMIT, 3, LIMIT, 2, LIMIT, 5)[(robot + episode) % 6]
    return length, length < LIMIT or (robot + episode) % 6 == 2


def reward_of(robot, episode, t):
    return 100 * robot + 10 * episode + t


class Robots:
    """The physics: N robots that follow the script."""

    def __init__(self, num_envs: int):
        self.robot, self.episode = np.arange(num_envs), np.full(num_envs, -1)
        self.t, self.told = np.zeros(num_envs, dtype=np.int64), np.zeros(num_envs)

    def reset(self, which: np.ndarray) -> None:
        self.episode[which] += 1
        self.t[which], self.told[which] = 0, 0

    def move(self, actions: np.ndarray) -> None:
        self.t += 1
        self.told = actions[:, 0].copy()

    def observations(self) -> np.ndarray:
        return np.stack([self.robot, self.episode, self.t, self.told], -1).astype(np.float32)

    def ends(self) -> tuple[np.ndarray, np.ndarray]:
        """Which robots fail and which reach the time limit, on this step."""
        length, fails = np.array([script(i, e) for i, e in zip(self.robot, self.episode, strict=True)]).T
        return (self.t == length) & (fails == 1), self.t == LIMIT


class VecTask:
    """isaacgymenvs 1.5.1: everything is in buffers that each step overwrites; a reset happens a step late.

    `early` tasks (AllegroHand, Ingenuity) reset before the physics of the step, the others after it; either way the
    step's action is without effect on a robot that is reset.
    """

    def __init__(self, num_envs: int, early: bool):
        self.robots, self.early, self.actions = Robots(num_envs), early, []
        self.obs_buf = np.zeros((num_envs, OBS_DIM), dtype=np.float32)  # zeros until the first step
        self.rew_buf = np.zeros(num_envs, dtype=np.float32)
        self.resets = np.ones(num_envs, dtype=np.int64)
        self.reset_buf = torch.from_numpy(self.resets)  # what a caller sees and may write
        self.obs_dict, self.extras = {}, {}
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (OBS_DIM,))
        self.action_space = gymnasium.spaces.Box(-1, 1, (ACTION_DIM,))

    def step(self, actions: torch.Tensor):
        self.actions.append(actions.numpy().copy())
        resets = self.resets == 1
        self.robots.move(actions.numpy())
        self.robots.reset(resets)
        self.robots.t[resets] = self.early
        self.resets[:] = 0
        fail, limit = self.robots.ends()
        self.obs_buf[:] = self.robots.observations()
        self.rew_buf[:] = reward_of(*self.robots.observations().T[:3])
        self.resets[:] = (fail | limit) & ~resets
        self.extras["time_outs"] = torch.from_numpy(limit & (self.resets == 1))  # also where it failed there
        self.obs_dict["obs"] = torch.from_numpy(self.obs_buf)
        return self.obs_dict, torch.from_numpy(self.rew_buf), self.reset_buf, self.extras

    def reset(self):
        self.obs_dict["obs"] = torch.from_numpy(self.obs_buf)
        return self.obs_dict

    def render(self, mode: str):
        return np.zeros((8, 8, 3), dtype=np.uint8)


class LabEnv(gymnasium.Env):
    """Isaac Lab 3.0: resets within the step, `final_obs` in the extras, stale on steps in which no robot ends."""

    def __init__(self, cfg, render_mode=None):
        assert cfg.compute_final_obs, "final_obs is computed on demand only"
        self.robots, self.actions, self.extras = Robots(cfg.num_envs), [], {}
        unbounded = gymnasium.spaces.Box(-np.inf, np.inf, (ACTION_DIM,))
        self.single_action_space = unbounded
        self.single_observation_space = gymnasium.spaces.Dict(
            policy=gymnasium.spaces.Box(-np.inf, np.inf, (OBS_DIM,)), critic=unbounded
        )
        self.observation_space, self.action_space = self.single_observation_space, unbounded
        self.obs_buf = np.zeros((cfg.num_envs, OBS_DIM), dtype=np.float32)
        self.rew_buf = np.zeros(cfg.num_envs, dtype=np.float32)
        self.flags = np.zeros((2, cfg.num_envs), dtype=bool)

    def reset(self, seed=None, options=None):
        self.robots.reset(np.ones(len(self.robots.t), dtype=bool))
        self.obs_buf[:] = self.robots.observations()
        return {"policy": torch.from_numpy(self.obs_buf)}, self.extras

    def step(self, actions: torch.Tensor):
        self.actions.append(actions.numpy().copy())
        self.robots.move(actions.numpy())
        self.flags[:] = self.robots.ends()
        self.rew_buf[:] = reward_of(*self.robots.observations().T[:3])
        done = self.flags.any(0)
        if done.any():
            self.extras["final_obs"] = {"policy": torch.from_numpy(self.robots.observations())}
            self.robots.reset(done)
        self.obs_buf[:] = self.robots.observations()
        terminated, truncated = torch.from_numpy(self.flags)
        obs = {"policy": torch.from_numpy(self.obs_buf)}
        return obs, torch.from_numpy(self.rew_buf), terminated, truncated, self.extras

    def render(self):
        return np.zeros((8, 8, 3), dtype=np.uint8)


def expected(num_envs: int, steps: int, deferred: bool, early: bool = False) -> set[tuple[int, int, int, bool]]:
    """Transitions (robot, episode, t after it, terminated) that `steps` steps from a reset must give, and no others.

    deferred: the simulator spends a step on each reset. An early task's episodes are seen from t = 1 on, and it
    cannot tell a failure on the time limit from a time-out, as no deferred one can.
    """
    found = set()
    for robot in range(num_envs):
        episode, t, length = 0, int(early), script(robot, 0)[0]
        for _ in range(steps):
            if t == length:  # the step that is spent on the reset
                episode, t, length = episode + 1, int(early), script(robot, episode + 1)[0]
                continue
            t += 1
            fails = script(robot, episode)[1] and t == length
            found.add((robot, episode, t, fails and not (deferred and t == LIMIT)))
            if t == length and not deferred:
                episode, t, length = episode + 1, 0, script(robot, episode + 1)[0]
    return found


made = []  # the stand-ins made so far, the latest last


def make(seed, task, num_envs, sim_device, rl_device, graphics_device_id, headless, **flags):
    """isaacgymenvs.make"""
    made.append(VecTask(num_envs, early=task == "AllegroHand"))
    return made[-1]


def modules() -> dict[str, types.ModuleType]:
    """What the scripts import, by name."""

    def module(name, **content):
        result = types.ModuleType(name)
        result.__dict__.update(content)
        return result

    def parse_env_cfg(task, device, num_envs):
        return types.SimpleNamespace(num_envs=num_envs, seed=None, compute_final_obs=False)

    def lab(cfg, render_mode=None):
        made.append(LabEnv(cfg, render_mode))
        return made[-1]

    if "Isaac-Fake-v0" not in gymnasium.registry:
        gymnasium.register("Isaac-Fake-v0", lab, disable_env_checker=True)
    app = module("isaaclab.app", launch_simulation=contextlib.contextmanager(lambda cfg, flags: iter([None])))
    return {
        "isaacgym": module("isaacgym"),
        "isaacgymenvs": module("isaacgymenvs", make=make),
        "isaaclab": module("isaaclab", app=app),
        "isaaclab.app": app,
        "isaaclab_tasks": module("isaaclab_tasks"),
        "isaaclab_tasks.utils": module("isaaclab_tasks.utils", parse_env_cfg=parse_env_cfg),
    }
