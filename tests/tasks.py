"""Small gymnasium tasks whose transitions, bounds and faults the tests know in advance."""

import itertools
import random
import time
from pathlib import Path

import gymnasium as gym
import numpy as np


class Counting(gym.Env):
    """Observation: (episode, step), in one array that is changed and returned again and again. The reward is the step.

    Odd episodes terminate after 3 steps, even ones run until the time limit of 5. Infos differ between copies. An
    action that is not of the space's type, or outside it, fails. The first copy of a process is the one to train on,
    the others are to evaluate on. Faults are over once there is a file named mended in the current directory.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}
    copies = itertools.count()

    def __init__(self, low=(-1.0,), high=(1.0,), dtype=np.float32, fault="", place="", picture="yes", render_mode=None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
        self.action_space = gym.spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
        self.picture, self.render_mode, self.actions, self.obs = picture, render_mode, [], np.zeros(2, np.float32)
        self.episode, self.total, self.copy = -1, 0, next(Counting.copies)
        self.fault = fault if place == ("Evaluation" if self.copy else "Training") else ""
        self.info = {"n": np.zeros(self.copy + 1)} if self.copy % 2 else {"n": "some text", "m": None}

    def failing(self, *faults: str) -> bool:
        """In training from step 150 on, or in the reset after step 200; in an evaluation from its third step on."""
        due = self.total == 200 if self.fault == "SleepReset" else self.total >= (3 if self.copy else 150)
        return self.fault in faults and due and not Path("mended").exists()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if self.failing("RaiseReset"):
            raise RuntimeError("no ground\nunder the robot")
        if self.failing("SleepReset"):
            time.sleep(30)
        self.obs[:] = self.episode, self.t = self.episode + 1, 0
        return self.obs, self.info

    def step(self, action):
        assert action.dtype == self.action_space.dtype and self.action_space.contains(action), action
        self.actions.append(action)
        self.t, self.total = self.t + 1, self.total + 1
        if self.failing("Raise"):
            raise RuntimeError("the joints\nhave come apart")
        if self.failing("Sleep"):
            time.sleep(30)
        if self.failing("Slow"):
            time.sleep(0.02)
        self.obs[:] = self.episode, self.t
        reward = float(self.t)
        if self.failing("NaNObs", "InfObs"):
            self.obs[0] = np.nan if self.fault == "NaNObs" else np.inf
        if self.failing("NaNReward"):
            reward = np.nan
        end = self.t == 3 and self.episode % 2 == 1
        return self.obs, reward, end, self.t == 5 and not self.failing("Endless"), self.info

    def render(self):
        if self.picture == "raise":
            raise RuntimeError("no GL context")
        return np.full((32, 32, 3), 40 * self.t, np.uint8) if self.picture == "yes" else None


class Dice(gym.Env):
    """Draws from the generators of numpy and of Python that a whole process shares. Ends at a time limit."""

    def __init__(self):
        self.observation_space = self.action_space = gym.spaces.Box(-1.0, 1.0, (2,))

    def reset(self, *, seed=None, options=None):
        return np.random.uniform(-1, 1, 2), {}

    def step(self, action):
        return np.random.uniform(-1, 1, 2), random.random(), False, False, {}


class Spaces(gym.Env):
    """A task with the given spaces, whose observations are drawn from them."""

    def __init__(self, obs, action):
        self.observation_space, self.action_space = obs, action

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.reset()[0], 1.0, False, False, {}


FAULTS = ("Raise", "RaiseReset", "NaNObs", "InfObs", "NaNReward", "Slow", "Sleep", "SleepReset", "Endless")
for fault, place in itertools.product(FAULTS, ("Training", "Evaluation")):
    gym.register(f"{fault}In{place}-v0", Counting, kwargs=dict(fault=fault, place=place))
for name, picture in dict(Counting="yes", NoPicture="none", NoScreen="raise").items():
    gym.register(f"{name}-v0", Counting, kwargs=dict(picture=picture))
gym.register("Dice-v0", Dice, max_episode_steps=20)
box, matrix = gym.spaces.Box(-1.0, 1.0, (2,)), gym.spaces.Box(-1.0, 1.0, (2, 2))
for name, obs, action in (
    ("Dict", gym.spaces.Dict(a=box, b=matrix, c=gym.spaces.Discrete(3)), box),
    ("Image", gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), box),
    ("Discrete", box, gym.spaces.Discrete(3)),
    ("Unbounded", box, gym.spaces.Box(-np.inf, 1.0, (2,))),
    ("Matrix", box, matrix),
):
    gym.register(f"{name}-v0", Spaces, max_episode_steps=5, kwargs=dict(obs=obs, action=action))
