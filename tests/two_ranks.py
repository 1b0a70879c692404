"""What each process of a torchrun does in test_isaacgym.py: 50 updates on its part of given batches, parameters saved.

torchrun --nproc-per-node 2 tests/two_ranks.py updates OUT
torchrun --nproc-per-node 2 tests/two_ranks.py train OUT [--resume RUN_DIR]   # through the script's own functions
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

import fake_simulators
import meow_isaacgym as script

UPDATES, BATCH, OBS_DIM, ACTION_DIM = 50, 32, 5, 3


def updates(algo: str, rank: int, ranks: int) -> torch.Tensor:
    """Parameters after 50 updates with this rank's part of the batches, in double precision and without dropout."""
    args = script.Args(algo=algo, dropout=0.0, alpha=0.3, tau=0.05, max_grad_norm=0.5, autotune=True)
    torch.manual_seed(0)
    agent = script.make_agent(OBS_DIM, ACTION_DIM, args).double()
    make_learner = script.make_meow_learner if algo == "meow" else script.make_sac_learner
    update, _ = make_learner(agent, args)
    numbers = torch.Generator().manual_seed(1)  # the same stream on every rank; each takes its rows

    def rows(*shape):
        full = torch.randn(BATCH, *shape, generator=numbers, dtype=torch.float64)
        return full.chunk(ranks)[rank]

    script.SAC.sample_with_log_prob = lambda self, obs: self.actor(obs, rows(ACTION_DIM))
    standardizer = script.Standardizer(OBS_DIM)
    for _ in range(UPDATES):
        obs, actions, rewards, next_obs = rows(OBS_DIM) * 3 + 1, rows(ACTION_DIM).tanh(), rows(), rows(OBS_DIM)
        standardizer.update(obs)
        batch = script.Batch(standardizer(obs), actions, rewards, standardizer(next_obs), (rows() > 1).double())
        update(batch)
    return torch.cat([p.detach().flatten() for p in agent.parameters()] + [standardizer.mean, standardizer.std])


def train(more: list[str], rank: int) -> torch.Tensor:
    """Parameters and statistics after training on the stand-in for Isaac Gym, each rank with robots of its own.

    A run that is not a resumed one gets a Ctrl-C in its 130th step: its rank 1 does, and torchrun, which sends it on.
    """
    agents, make_agent = [], script.make_agent
    script.make_agent = lambda *dims_and_args: agents.append(make_agent(*dims_and_args)) or agents[0]
    add, count = script.DeviceBuffer.add, []

    def add_and_interrupt(buffer, *transitions):
        add(buffer, *transitions)
        count.append(1)
        if len(count) == 130 and rank == 1 and not more:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getppid(), signal.SIGINT)

    script.DeviceBuffer.add = add_and_interrupt
    fake_simulators.install()
    flags = [*more, "--sim=isaacgymenvs", "--env-id=Ant", "--num-envs=6", "--total-steps=240", "--learning-starts=20"]
    flags += ["--batch-size=16", "--buffer-steps=100", "--eval-frequency=100", "--device=cpu"]
    sys.argv[0] = Path(sys.argv[0]).name
    script.train_robots(script.parse_flags(flags))
    return torch.cat([p.detach().flatten() for p in agents[0].parameters()])


if __name__ == "__main__":
    mode, out = sys.argv[1], Path(sys.argv[2])
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if mode == "updates":
        dist.init_process_group("gloo")
        for algo in ("meow", "sac"):
            torch.save(updates(algo, rank, ranks), out / f"{algo}{rank}.pt")
        dist.destroy_process_group()
    else:
        torch.save(train(sys.argv[3:], rank), out / f"{rank}.pt")
