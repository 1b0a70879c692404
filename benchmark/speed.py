"""Milliseconds of MEow's update and of choosing one action, eager.

    python -m benchmark.speed --env-id Hopper-v4 --threads 1

The update includes drawing its batch from the replay buffer. Batches of calls are repeated; the best and the
median batch are printed. Leave the other cores idle while it runs.
"""

import dataclasses
import os
import platform
import statistics
import time
from collections.abc import Callable

import torch
import tyro

import meow_continuous_action as meow


@dataclasses.dataclass
class Args:
    env_id: str = "Hopper-v4"
    """task whose sizes and preset are used"""
    threads: int = 1
    """torch threads"""
    repeats: int = 30
    """batches of calls that are timed"""


def milliseconds(function: Callable[[], object], calls: int, repeats: int) -> tuple[float, float]:
    """Best and median over `repeats` batches of `calls` calls, in ms a call; the first batch warms up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(calls):
            function()
        times.append((time.perf_counter() - start) / calls * 1e3)
    return min(times[1:]), statistics.median(times[1:])


def main(args: Args) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    env = meow.make_env(args.env_id)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    flags = meow.parse_args(["--env-id", args.env_id])
    agent = meow.MEow(obs_dim, action_dim, flags)
    update, _ = meow.make_update(agent, flags)
    buffer = meow.ReplayBuffer(100_000, 1, obs_dim, action_dim, torch.device("cpu"))
    buffer.size = buffer.capacity
    for field in buffer.data[:4]:
        field.normal_()
    buffer.data.actions.tanh_()
    obs = torch.randn(1, obs_dim)

    def act():
        with torch.inference_mode():
            return agent.sample(obs)

    print(f"{args.env_id}, {args.threads} of {os.cpu_count()} threads, torch {torch.__version__}, {platform.machine()}")
    for name, function, calls in (
        ("update", lambda: update(buffer.sample(flags.batch_size), 0), 50),
        ("act", act, 500),
    ):
        best, median = milliseconds(function, calls, args.repeats)
        print(f"{name}: best {best:.3f} ms, median {median:.3f} ms")


if __name__ == "__main__":
    main(tyro.cli(Args))
