"""How fast each script trains, beside Stable-Baselines3's and SBX's SAC, measured side by side in one run.

    python -m benchmark.speed --csv benchmark/results/speed.csv
    python -m benchmark.speed --env-ids Hopper-v4 --batch-sizes 64 256 1024 4096 --csv NAME.csv
    python -m benchmark.speed --device cuda --processes 1 5 15 --csv NAME.csv    # one GPU; start MPS before
    python -m benchmark.speed --acting --csv benchmark/results/acting.csv        # SAC, SQL, S2AC's variants

Every implementation trains in a process of its own that waits for its turn; the turns go round, so that a machine that
slows down slows all of them. Timed on each turn: an update with the draw of its batch, the choice of an action with its
way to the GPU and back, and the whole loop, which is the script's own `train` (no evaluation). Printed: medians, the
range of the turns, and the ratio to MEow. Written: one row a turn. Leave the machine alone while it runs.
--acting times the choice of one action alone: one state, no GPU, one thread, not compiled, the fastest batch.
"""

import dataclasses
import importlib
import importlib.util
import itertools
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from benchmark import commit, markdown, write_csv

SCRIPTS = {"MEow": "meow", "MEow mixture": "meow_mixture", "SAC": "sac", "SQL": "sql", "S2AC": "s2ac"}
LIBRARIES = {"SB3 SAC": "stable_baselines3", "SBX SAC": "sbx"}
PARTS = dict(update_ms=("update, ms", 2), act_ms=("act, ms", 3), loop_sps=("loop, steps/s", 0))  # header, digits
WARM_UP = 1_000  # random steps before the first update
USUAL = dict(batch_size=("batch", 256), num_envs=("envs", 1), processes=("processes", 1))  # column: label, value
SIZES = {"Hopper-v4": (11, 3), "HalfCheetah-v4": (17, 6), "Ant-v4": (27, 8)}  # (O, D), of --acting
PAPER = {"SAC": "1", "SQL": "1.15", "S2AC phi-theta": "4.5 (D = 3) to 8.4 (D = 8)", "S2AC phi-theta-psi": "1.15"}


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...] = ("Hopper-v4", "HalfCheetah-v4", "Ant-v4", "Humanoid-v4")  # tasks
    implementations: tuple[str, ...] = (*SCRIPTS, *LIBRARIES)  # what to time
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")  # of this project's scripts
    threads: tuple[int, ...] = (1, 2)  # threads of each process
    batch_sizes: tuple[int, ...] = (256,)  # transitions in an update
    num_envs: tuple[int, ...] = (1,)  # environments of this project's scripts, with an update for each of their steps
    processes: tuple[int, ...] = (1,)  # runs that train at the same time; the loop's steps a second are all runs' sum
    device: Literal["cpu", "cuda"] = "cpu"  # where networks and replay buffer live; cuda leaves SB3 and SBX out
    turns: int = 7  # turns of each implementation, or with --acting batches of each agent
    seconds: float = 1.0  # length of each of the three measurements of a turn; --acting takes a tenth
    acting: bool = False  # time the choice of an action alone
    csv: Path | None = None  # table to write


def rate(function: Callable[[], object], seconds: float, wait: Callable[[], object] = lambda: None) -> float:
    """Calls a second over `seconds`; wait() returns when a GPU is done."""
    wait()
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        function()
        n += 1
    wait()
    return n / (time.perf_counter() - start)


def turns(job: dict, pipe, update: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """Times a turn and sends it, for each message. Every `yield` lets the training loop make one step."""
    seconds, wait = job["seconds"], torch.cuda.synchronize if job["device"] == "cuda" else lambda: None
    for part in (update, act):
        for _ in range(5):  # compiled and recorded
            part()
    for _ in range(50):
        yield
    pipe.send("ready")
    while pipe.recv():
        row = dict(update_ms=1e3 / rate(update, seconds, wait), act_ms=1e3 / rate(act, seconds, wait))
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < seconds:
            yield
            steps += 1
        wait()
        pipe.send(row | dict(loop_sps=steps / (time.perf_counter() - start)))


def train_script(job: dict, pipe) -> None:
    """Train by one of this project's scripts; after each update, of which there is one a step, comes `turns`."""
    module = importlib.import_module(f"{SCRIPTS[job['implementation']]}_continuous_action")
    flags = dict(env_id=job["env_id"], device=job["device"], compile="on" if job["mode"] == "compiled" else "off")
    flags |= dict(batch_size=job["batch_size"], num_envs=job["num_envs"], utd=1.0, learning_starts=WARM_UP)
    flags |= dict(buffer_size=200_000, total_timesteps=10**9, eval_frequency=10**9, checkpoint_frequency=10**9)
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

        timing = turns(job, pipe, update, choose)
        return lambda: (update(), next(timing)), metrics, learner

    module.make_update = make_timed_update
    module.train(module.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]))


def train_library(job: dict, pipe) -> None:
    """The same by a SAC from PyPI, with its defaults and this project's batch."""
    import gymnasium as gym

    SAC = importlib.import_module(LIBRARIES[job["implementation"]]).SAC
    env = gym.make(job["env_id"])
    model = SAC("MlpPolicy", env, learning_starts=WARM_UP, batch_size=job["batch_size"], buffer_size=200_000)
    obs = env.observation_space.sample().astype(np.float32)
    timing = turns(job, pipe, lambda: model.train(1, job["batch_size"]), lambda: model.predict(obs))
    model.learn(10**9, callback=lambda *_: model.num_timesteps <= WARM_UP + 100 or next(timing) is None)


def work(job: dict, pipe, folder: str) -> None:
    """A process of its own: its output is log.txt in the folder, where the scripts write their runs."""
    os.chdir(folder)
    for fd in (1, 2):
        os.dup2(os.open("log.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    torch.set_num_threads(job["threads"])
    (train_script if job["implementation"] in SCRIPTS else train_library)(job, pipe)


def groups_of(args: Args) -> list[list[dict]]:
    """Groups of jobs that are measured side by side."""
    groups, usual = [], {column: value for column, (_, value) in USUAL.items()}
    for env_id, threads in itertools.product(args.env_ids, args.threads):
        base = dict(env_id=env_id, threads=threads, device=args.device, seconds=args.seconds)
        jobs = []
        for name in args.implementations:
            axes = itertools.product(args.modes, args.batch_sizes, args.num_envs, args.processes)
            if name in SCRIPTS:
                jobs += [dict(implementation=name) | dict(zip(("mode", *USUAL), x, strict=True)) for x in axes]
            elif args.device == "cpu":
                jobs.append(dict(implementation=name, mode="eager" if name == "SB3 SAC" else "compiled") | usual)
        groups.append([base | job for job in jobs])
    return groups


def measure(jobs: list[dict], turns: int) -> list[dict]:
    """Rows of one group: the processes of all jobs compile side by side, then `turns` rounds of the jobs one by one."""
    context, processes, pipes, rows = multiprocessing.get_context("spawn"), [], [[] for _ in jobs], []
    with tempfile.TemporaryDirectory() as folder:
        try:
            for job, own in zip(jobs, pipes, strict=True):
                os.environ |= {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
                xla = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
                os.environ["XLA_FLAGS"] = xla if job["threads"] == 1 else ""
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
                kept = {key: job[key] for key in ("env_id", "implementation", "mode", "threads", *USUAL)}
                rows.append(kept | dict(turn=turn) | {part: float(f"{x:.4g}") for part, x in row.items()})
        except EOFError:  # a process is gone
            sys.exit(f"error: {Path(folder, 'log.txt').read_text()[-2000:]}")
        finally:
            [process.kill() for process in processes]
            [process.join() for process in processes]
    return rows


def table(rows: list[dict]) -> str:
    """Median (range) of each part, and the ratio of the loop's steps a second to those of MEow, compiled, likewise."""
    groups, lines, usual = {}, [], USUAL | dict(num_seeds=("seeds", 1))  # num_seeds: in tables of older commits
    for row in rows:
        more = "".join(f", {label} {row[k]}" for k, (label, x) in usual.items() if str(row.get(k, x)) != str(x))
        groups.setdefault((row["env_id"], str(row["threads"]), row["implementation"], more, row["mode"]), []).append(
            row
        )
    for (env_id, threads, name, more, mode), own in groups.items():
        line = {"task": env_id, "threads": threads, "implementation": name + more, "mode": mode}
        for part, (head, digits) in PARTS.items():
            values = [float(row[part]) for row in own]
            middle, low, high = (f"{f(values):.{digits}f}" for f in (statistics.median, min, max))
            line[head] = f"{middle} ({low}–{high})"
        meow = groups.get((env_id, threads, "MEow", more, "compiled"), [])
        best, this = ([float(row["loop_sps"]) for row in x] for x in (meow, own))
        faster = f"{statistics.median(best) / statistics.median(this):.2f}" if meow else ""
        lines.append(line | {"MEow is faster by": faster})
    return markdown(lines)


@torch.inference_mode()
def act(args: Args) -> list[dict]:
    """Rows of --acting. The batches of all agents take turns."""
    torch.set_num_threads(1)
    rows, agents = [], {"SAC": ("sac", []), "SQL": ("sql", [])}
    agents |= {f"S2AC {variant}": ("s2ac", ["--variant", variant]) for variant in ("phi", "phi-theta", "phi-theta-psi")}
    for env_id in (env_id for env_id in args.env_ids if env_id in SIZES):
        obs, made, times = torch.randn(1, SIZES[env_id][0]), {}, {}
        for name, (word, flags) in agents.items():
            script = importlib.import_module(f"{word}_continuous_action")
            made[name] = script.Agent(
                *SIZES[env_id], script.parse_args(["--env-id", env_id, "--device", "cpu", *flags])
            )
        for _, name, still in itertools.product(range(args.turns + 1), made, (False, True)):
            calls = rate(lambda sample=made[name].sample, still=still: sample(obs, still), args.seconds / 10)  # noqa: B023
            times.setdefault((name, still), []).append(1e3 / calls)
        for name in made:
            draw, evaluation = (f"{min(times[name, still][1:]):.3f}" for still in (False, True))
            rows.append(dict(env_id=env_id, algorithm=name, draw_ms=draw, evaluation_ms=evaluation))
    return rows


def acting_table(rows: list[dict]) -> str:
    """Times, and in brackets relative to SAC's."""
    lines, base = [], {row["env_id"]: row for row in rows if row["algorithm"] == "SAC"}
    for row in rows:
        line = {"task": row["env_id"], "algorithm": row["algorithm"]}
        for key, head in (("draw_ms", "draw, ms"), ("evaluation_ms", "evaluation, ms")):
            line[head] = f"{row[key]} ({float(row[key]) / float(base[row['env_id']][key]):.2f})"
        lines.append(line | {"in the paper": PAPER.get(row["algorithm"], "")})
    return markdown(lines)


def main(args: Args) -> None:
    packages = ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3", "sbx-rl", "jax")
    have = [name for name in packages if importlib.util.find_spec(name.replace("-", "_").replace("sbx_rl", "sbx"))]
    processor = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    machine = f"{platform.machine()}, {processor}, {os.cpu_count()} cores, {device}; "
    machine += ", ".join(f"{name} {version(name)}" for name in have)
    facts = dict(commit=commit(), machine=machine, command="python -m benchmark.speed " + shlex.join(sys.argv[1:]))
    print(f"{machine}\nload before the start: {os.getloadavg()[0]:.2f}")
    rows = []
    for jobs in [[]] if args.acting else groups_of(args):
        rows += act(args) if args.acting else measure(jobs, args.turns)
        if args.csv:  # after every group: what is measured is kept if the rest fails
            write_csv(args.csv, (row | facts for row in rows))
    print((acting_table if args.acting else table)(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
