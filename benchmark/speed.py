"""How fast each script trains, beside Stable-Baselines3's and SBX's SAC, measured side by side in one run.

    python -m benchmark.speed --env-ids Hopper-v4 --batch-sizes 64 256 1024 4096 --csv NAME.csv
    python -m benchmark.speed --device cuda --processes 1 5 15 --csv NAME.csv    # one GPU; start MPS before
    python -m benchmark.speed --implementations SAC SQL "S2AC phi" "S2AC phi-theta" "S2AC phi-theta-psi" --modes eager

Every implementation trains in a process of its own; they are timed in turns, so that a machine that slows down slows
all of them: an update with the draw of its batch, the choice of an action with its way to the GPU and back, the same as
an evaluation does it (deterministic, one state, not compiled), and the whole loop, which is the script's own `train`
without evaluations. Prints medians and ranges; writes one row a turn.
"""

import dataclasses
import importlib
import itertools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
import tyro

from benchmark import facts, table, write_csv

SCRIPTS = {"MEow": "meow", "MEow+": "meow_plus", "MEow mixture": "meow_mixture", "SAC": "sac", "SAC-NF": "sac_nf"}
SCRIPTS |= {"SQL": "sql", "S2AC": "s2ac"}
LIBRARIES = {"SB3 SAC": ("stable_baselines3", "eager"), "SBX SAC": ("sbx", "compiled")}
PARTS = ("update_ms", "act_ms", "evaluation_ms", "loop_sps")
SIZES = ("batch_size", "num_envs", "processes")
XLA = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"  # one thread
WARM_UP = 1_000  # random steps before the first update


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...] = ("Hopper-v4", "HalfCheetah-v4", "Ant-v4", "Humanoid-v4")  # tasks
    implementations: tuple[str, ...] = (*SCRIPTS, *LIBRARIES)  # what to time; also "S2AC phi", a variant
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")  # of this project's scripts
    threads: tuple[int, ...] = (1, 2)  # threads of each process
    batch_sizes: tuple[int, ...] = (256,)  # transitions in an update
    num_envs: tuple[int, ...] = (1,)  # environments of this project's scripts, with an update for each of their steps
    processes: tuple[int, ...] = (1,)  # runs that train at the same time; the loop's steps a second are all runs' sum
    device: Literal["cpu", "cuda"] = "cpu"  # where networks and replay buffer live; cuda leaves SB3 and SBX out
    turns: int = 7  # turns of each implementation
    seconds: float = 1.0  # length of each of the four measurements of a turn
    csv: Path | None = None  # table to write


def rate(function: Callable[[], object], seconds: float, wait: Callable[[], object]) -> float:
    """Calls a second over `seconds`; wait() returns when a GPU is done."""
    wait()
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        function()
        n += 1
    wait()
    return n / (time.perf_counter() - start)


def turns(job: dict, pipe, **parts: Callable[[], object]) -> Iterator[None]:
    """Times a turn and sends it, for each message. Every `yield` lets the training loop make one step."""
    seconds, wait = job["seconds"], torch.cuda.synchronize if job["device"] == "cuda" else lambda: None
    for part in parts.values():
        for _ in range(5):  # compiled and recorded
            part()
    for _ in range(50):
        yield
    pipe.send("ready")
    while pipe.recv():
        row = {f"{name}_ms": 1e3 / rate(part, seconds, wait) for name, part in parts.items()}
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            yield
            steps += 1
        wait()
        pipe.send(row | dict(loop_sps=steps / (time.perf_counter() - start)))


def train_script(job: dict, pipe) -> None:
    """Train by one of this project's scripts; after each update, of which there is one a step, comes `turns`."""
    name, variant = job["implementation"], ""
    if name.startswith("S2AC"):
        name, _, variant = name.partition(" ")
    module = importlib.import_module(f"{SCRIPTS[name]}_continuous_action")
    flags = dict(env_id=job["env_id"], device=job["device"], compile="on" if job["mode"] == "compiled" else "off")
    flags |= dict(batch_size=job["batch_size"], num_envs=job["num_envs"], utd=1.0, learning_starts=WARM_UP)
    flags |= dict(buffer_size=200_000, total_timesteps=10**9, eval_frequency=10**9, checkpoint_frequency=10**9)
    flags |= dict(exp_name=f"speed{os.getpid()}") | (dict(variant=variant) if variant else {})
    make_update = module.make_update

    def make_timed_update(agent: torch.nn.Module, buffer, args):
        update, metrics, learner = make_update(agent, buffer, args)
        obs_dim, action_dim = buffer.widths[:2]
        obs = np.random.normal(size=(args.num_envs, obs_dim)).astype(np.float32)
        obs_in = torch.zeros(args.num_envs, obs_dim, device=args.device)  # from here to `act` as in train
        actions_out = torch.zeros(args.num_envs, action_dim, device=args.device)
        sample = module.compiled(args)(agent.sample)
        act = module.recorded(args)(torch.no_grad()(lambda: actions_out.copy_(sample(obs_in))))

        def choose() -> np.ndarray:
            obs_in.copy_(torch.from_numpy(obs))
            act()
            return actions_out.cpu().numpy()

        @torch.no_grad()
        def evaluate() -> np.ndarray:
            return agent.sample(torch.as_tensor(obs[:1], device=args.device), True).cpu().numpy()

        timing = turns(job, pipe, update=update, act=choose, evaluation=evaluate)
        return lambda: (update(), next(timing)), metrics, learner

    module.make_update = make_timed_update
    module.train(module.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]))


def train_library(job: dict, pipe) -> None:
    """The same by a SAC from PyPI, with its defaults and this project's batch."""
    import gymnasium as gym

    SAC = importlib.import_module(LIBRARIES[job["implementation"]][0]).SAC
    env = gym.make(job["env_id"])
    model = SAC("MlpPolicy", env, learning_starts=WARM_UP, batch_size=job["batch_size"], buffer_size=200_000)
    obs = env.observation_space.sample().astype(np.float32)
    parts = dict(act=lambda: model.predict(obs), evaluation=lambda: model.predict(obs, deterministic=True))
    timing = turns(job, pipe, update=lambda: model.train(1, job["batch_size"]), **parts)
    model.learn(10**9, callback=lambda *_: model.num_timesteps <= WARM_UP + 100 or next(timing) is None)


def work(job: dict, pipe, folder: str) -> None:
    """A process of its own: its output is log.txt in the folder, where the scripts write their runs."""
    os.chdir(folder)
    for fd in (1, 2):
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    torch.set_num_threads(job["threads"])
    (train_library if job["implementation"] in LIBRARIES else train_script)(job, pipe)


def groups_of(args: Args) -> list[list[dict]]:
    """Groups of jobs that are measured side by side. A library has one mode and one environment."""
    groups = []
    for env_id, threads in itertools.product(args.env_ids, args.threads):
        chosen = [name for name in args.implementations if name not in LIBRARIES or args.device == "cpu"]
        jobs = {}
        for x in itertools.product(chosen, args.modes, args.batch_sizes, args.num_envs, args.processes):
            job = dict(env_id=env_id, threads=threads) | dict(zip(("implementation", "mode", *SIZES), x, strict=True))
            job |= dict(mode=LIBRARIES[x[0]][1], num_envs=1) if x[0] in LIBRARIES else {}
            jobs[tuple(job.values())] = job | dict(device=args.device, seconds=args.seconds)
        groups.append(list(jobs.values()))
    return groups


def measure(jobs: list[dict], turns: int) -> list[dict]:
    """Rows of one group: the processes of all jobs compile side by side, then `turns` rounds of the jobs one by one."""
    context, processes, pipes, rows = multiprocessing.get_context("spawn"), [], [[] for _ in jobs], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for job, own in zip(jobs, pipes, strict=True):
                os.environ |= {"OMP_NUM_THREADS": str(job["threads"]), "XLA_FLAGS": XLA if job["threads"] == 1 else ""}
                for _ in range(job["processes"]):
                    here, there = context.Pipe()
                    processes.append(context.Process(target=work, args=(job, there, folder), daemon=True))
                    processes[-1].start()
                    there.close()
                    own.append(here)
            for pipe in itertools.chain(*pipes):
                pipe.recv()
            for turn, (job, own) in itertools.product(range(turns), list(zip(jobs, pipes, strict=True))):
                [pipe.send("go") for pipe in own]
                timed = [pipe.recv() for pipe in own]
                row = {part: statistics.median(each[part] for each in timed) for part in PARTS}
                row["loop_sps"] = sum(each["loop_sps"] for each in timed)
                about = {key: x for key, x in job.items() if key not in ("device", "seconds")} | dict(turn=turn)
                rows.append(about | {part: float(f"{x:.4g}") for part, x in row.items()})
        except (EOFError, ConnectionError):  # a process is gone
            sys.exit(f"error: {Path(folder, 'log.txt').read_text()[-2000:]}")
        finally:
            for process in processes:
                process.kill()
                process.join()
    return rows


def main(args: Args) -> None:
    about = facts(args.device, threads=False)  # which are a column
    print(f"{about['machine']}\nload before the start: {os.getloadavg()[0]:.2f}")
    rows = []
    for jobs in groups_of(args):
        rows += measure(jobs, args.turns)
        if args.csv:  # after every group: what is measured is kept if the rest fails
            write_csv(args.csv, [row | about for row in rows])
    cells = "update_ms:2 act_ms:3 evaluation_ms:3 loop_sps:0"
    print(table(pd.DataFrame(rows), f"env_id threads implementation mode {' '.join(SIZES)}", cells))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
