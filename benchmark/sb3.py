"""PPO, TD3, DDPG and SAC of Stable-Baselines3, evaluated and logged as this project's scripts are.

    python -m benchmark.run runs/x --scripts meow sac sb3:ppo sb3:td3 sb3:ddpg --env-ids Hopper-v4 --seeds 1 2 3
    python -m benchmark.sb3 --algo ppo --env-id Hopper-v4    # one run

The hyperparameters are the library's defaults (2.9.2), not those that RL Baselines3 Zoo tuned; gamma is 0.99.

    PPO   Adam 3e-4, 2,048 steps, then 10 epochs of batches of 64, clip 0.2, GAE 0.95, no entropy bonus, nets 2 x 64
    SAC   Adam 3e-4, batch 256, tau 0.005, an update a step after 100 random ones, automatic temperature, nets 2 x 256
    TD3   Adam 1e-3, batch 256, tau 0.005, an update a step after 100 random ones, actor delay 2, nets 400, 300
    DDPG  as TD3, with one critic, an actor step with every update, and no noise on the target's actions

TD3 and DDPG explore without noise then (the Zoo: --action-noise 0.1 --learning-starts 10000), PPO does not normalise
observations. A run cannot be resumed; its last policy is in model.zip.
"""

import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import stable_baselines3
import torch
import tyro
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import configure
from stable_baselines3.common.noise import NormalActionNoise
from tqdm import tqdm

sys.path.append(str(Path(__file__).resolve().parent.parent))  # a grid runs this file by its path
sys.path.append(os.getcwd())  # --env-id mytask:My-v0 finds a mytask.py here

import sac_continuous_action as sac
from benchmark import facts


@dataclasses.dataclass
class Args:
    algo: Literal["ppo", "td3", "ddpg", "sac"]  # the algorithm
    env_id: str = "Hopper-v4"  # gymnasium id; `module:Name-v0` imports the module first
    exp_name: str = ""  # part of the run folder's name, by default sb3_ALGO
    seed: int = 1  # seed of the parameters, the environment and the actions
    device: str = "auto"  # where the networks live
    total_timesteps: int | None = None  # environment steps, by default those of the scripts' presets
    learning_starts: int | None = None  # random steps before the first update, by default the library's; PPO has none
    action_noise: float = 0.0  # standard deviation of the Gaussian exploration noise of TD3 and DDPG
    eval_frequency: int = 10_000  # steps between evaluations
    eval_episodes: int = 10  # episodes of an evaluation, deterministic, with the scripts' seeds


class Protocol(BaseCallback):
    """Evaluations and logs of this project's scripts."""

    def __init__(self, args: Args):
        super().__init__()
        self.args, self.envs = args, [sac.make_env(args.env_id) for _ in range(args.eval_episodes)]
        self.start_step, self.start_time = 0, time.time()  # of SPS, which leaves evaluations out
        self.bar = tqdm(total=args.total_timesteps, mininterval=0.5 if sys.stderr.isatty() else 30)

    def sample(self, obs: torch.Tensor, deterministic: bool) -> torch.Tensor:  # what evaluate calls
        return torch.from_numpy(self.model.predict(obs.numpy(), deterministic=deterministic)[0])

    def _on_step(self) -> bool:
        step, events = self.num_timesteps, {}
        self.bar.update()
        if episode := self.locals["infos"][0].get("episode"):
            events |= {"charts/episodic_return": episode["r"], "charts/episodic_length": episode["l"]}
        end = step >= self.args.total_timesteps
        if end or step % self.args.eval_frequency == 0:
            events["charts/SPS"] = (step - self.start_step) / (time.time() - self.start_time)
            returns, lengths = sac.evaluate(self, self.envs, sac.Args(self.args.env_id, device="cpu"))
            events |= {"eval/episodic_return": returns.mean(), "eval/episodic_length": lengths.mean()}
            self.start_step, self.start_time = step, time.time()
        for name, value in events.items():
            self.logger.record(name, float(value))
        if events:
            self.logger.dump(step)
        return not end  # PPO would fill its last rollout


def train(args: Args) -> Path:
    """Train, log and evaluate; returns the run's folder."""
    preset = sac.PRESETS.get(args.env_id.replace("-v5", "-v4"), {})
    args.total_timesteps = args.total_timesteps or preset.get("total_timesteps", 1_000_000)
    args.exp_name = args.exp_name or f"sb3_{args.algo}"
    name = f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns() // 1_000_000}"
    run = Path("runs", "".join(c if c.isalnum() or c in "-_." else "_" for c in name))
    env, settings = sac.make_env(args.env_id), dict(seed=args.seed, device=args.device)
    if args.algo != "ppo":
        settings["buffer_size"] = min(1_000_000, args.total_timesteps)
        settings |= {} if args.learning_starts is None else dict(learning_starts=args.learning_starts)
        zeros = np.zeros(env.action_space.shape)
        settings["action_noise"] = NormalActionNoise(zeros, zeros + args.action_noise) if args.action_noise else None
    model = getattr(stable_baselines3, args.algo.upper())("MlpPolicy", env, **settings)
    model.set_logger(configure(str(run), ["tensorboard"]))
    about = dict(args=vars(args), versions={m.__name__: m.__version__ for m in (stable_baselines3, torch, np)})
    (run / "args.json").write_text(json.dumps(about | facts(model.device.type), indent=2))
    print(f"run: {run}\n{args}")
    model.learn(args.total_timesteps, callback=Protocol(args))
    model.save(run / "model.zip")
    return run


if __name__ == "__main__":
    train(tyro.cli(Args, description=__doc__))
