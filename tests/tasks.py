"""Small gymnasium tasks whose transitions, bounds and faults the tests know in advance."""

import gymnasium as gym
import numpy as np


class Counting(gym.Env):
    """Observation: (episode, step). Odd episodes terminate after 3 steps; even ones run until the time limit of 5.

    The reward is the step. `low`, `high`: action bounds; a step outside them fails.
    """

    def __init__(self, low=(-1.0,), high=(1.0,), nan_at: int | None = None):
        self.observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float64)
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))
        self.episode, self.total, self.nan_at, self.actions = -1, 0, nan_at, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        return np.array([self.episode, 0.0]), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.actions.append(action)
        self.t, self.total = self.t + 1, self.total + 1
        reward = np.nan if self.total == self.nan_at else float(self.t)
        return np.array([self.episode, float(self.t)]), reward, self.episode % 2 == 1 and self.t == 3, False, {}


class NoScreen(Counting):
    """A task that can draw, on a machine that cannot."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}

    def __init__(self, render_mode=None):
        super().__init__()
        self.render_mode = render_mode

    def render(self):
        raise RuntimeError("no GL context")


class Faulty(Counting):
    """Breaks at step 150 of those it has made, all episodes counted, or with `reset` at reset number `resets`."""

    def __init__(self, fault: str, resets: int = 0):
        super().__init__()
        self.fault, self.resets = fault, resets

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        if self.fault == "reset" and self.episode == self.resets:
            raise RuntimeError("no ground\nunder the robot")
        return obs, info

    def step(self, action):
        obs, reward, *others = super().step(action)
        if self.total == 150 and self.fault == "step":
            raise RuntimeError("the joints\nhave come apart")
        values = dict(nan_obs=(np.nan, 0), inf_obs=(np.inf, 0), nan_reward=(0, np.nan)) if self.total == 150 else {}
        of_obs, of_reward = values.get(self.fault, (0, 0))
        return obs + of_obs, reward + of_reward, *others


class Spaces(gym.Env):
    """Never stepped: a task with the given spaces."""

    def __init__(self, obs, action):
        self.observation_space, self.action_space = obs, action


box = gym.spaces.Box(-1.0, 1.0, (2,))
gym.register("Counting-v0", Counting, max_episode_steps=5)
gym.register("NaN-v0", Counting, max_episode_steps=5, kwargs=dict(nan_at=150))
for name, fault in dict(NaNObs="nan_obs", InfObs="inf_obs", NaNReward="nan_reward", BadStep="step").items():
    gym.register(f"{name}-v0", Faulty, max_episode_steps=5, kwargs=dict(fault=fault))
gym.register("BadReset-v0", Faulty, max_episode_steps=5, kwargs=dict(fault="reset"))
gym.register("BadLaterReset-v0", Faulty, max_episode_steps=5, kwargs=dict(fault="reset", resets=30))
gym.register("NoScreen-v0", NoScreen, max_episode_steps=5)
gym.register("Bounds-v0", Counting, max_episode_steps=5, kwargs=dict(low=(-2.0, 0.0, 5.0), high=(1.0, 0.1, 6.0)))
gym.register("Dict-v0", Spaces, kwargs=dict(obs=gym.spaces.Dict(a=box), action=box))
gym.register("Image-v0", Spaces, kwargs=dict(obs=gym.spaces.Box(0, 255, (8, 8, 3), np.uint8), action=box))
gym.register("Discrete-v0", Spaces, kwargs=dict(obs=box, action=gym.spaces.Discrete(3)))
gym.register("Unbounded-v0", Spaces, kwargs=dict(obs=box, action=gym.spaces.Box(-np.inf, 1.0, (2,))))
