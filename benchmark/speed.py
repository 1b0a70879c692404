"""How fast each script trains, beside Stable-Baselines3's and SBX's SAC, measured side by side in one run.

    python -m benchmark.speed --csv benchmark/results/speed.csv --png benchmark/results/speed.png

Every implementation trains in a process of its own that waits for its turn; the turns go round, so that a machine that
slows down slows all of them. What is timed on each turn: an update (with the draw of its batch), the choice of an
action (with its way to the GPU and back), and the whole loop, which is the script's own `train` (environment, buffer,
update, logs; no evaluation). Printed: medians, the range of the turns, and the ratio to MEow. Leave the machine alone
while it runs. Written: one row a turn.

    python -m benchmark.speed --grow --csv benchmark/results/speed_growth.csv    # batch, environments
    python -m benchmark.speed --device cuda --processes 1 5 15 --csv NAME.csv    # one GPU; start MPS before
"""

import dataclasses
import importlib
import importlib.util
import json
import os
import platform
import shlex
import statistics
import subprocess
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

from benchmark import ROOT, commit, write_csv

SCRIPTS = {"MEow": "meow", "MEow mixture": "meow_mixture", "SAC": "sac", "SQL": "sql", "S2AC": "s2ac"}
LIBRARIES = {"SB3 SAC": "stable_baselines3", "SBX SAC": "sbx"}
PARTS = ("update_ms", "act_ms", "loop_sps")
WARM_UP = 1_000  # random steps before the first update
USUAL = dict(batch_size=("batch", 256), num_envs=("envs", 1), processes=("processes", 1))  # column: label, value
COLUMNS = ["env_id", "implementation", "mode", "threads", *USUAL, "turn", *PARTS]


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...] = ("Hopper-v4", "HalfCheetah-v4", "Ant-v4", "Humanoid-v4")
    """tasks"""
    implementations: tuple[str, ...] = (*SCRIPTS, *LIBRARIES)
    """what to time; SB3 SAC and SBX SAC need requirements-benchmark.txt"""
    modes: tuple[Literal["eager", "compiled"], ...] = ("eager", "compiled")
    """of this project's scripts"""
    threads: tuple[int, ...] = (1, 2)
    """threads of each process"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where networks and replay buffer live; cuda leaves SB3 and SBX out"""
    processes: tuple[int, ...] = (1,)
    """runs that train at the same time, a process each; the loop's steps a second are those of all together"""
    turns: int = 7
    """turns of each implementation"""
    seconds: float = 1.0
    """length of each of the three measurements of a turn"""
    grow: bool = False
    """time MEow and SAC as batch (64 to 4096) and environments (1 to 16) grow instead, on Hopper-v4"""
    csv: Path | None = None
    """table to write"""
    png: Path | None = None
    """bar chart to write"""
    worker: str | None = None
    """(what the command calls itself with)"""


def rate(function: Callable[[], object], seconds: float, wait: Callable[[], object]) -> float:
    """Calls a second over `seconds`; wait() returns when a GPU is done."""
    wait()
    start, n = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        function()
        n += 1
    wait()
    return n / (time.perf_counter() - start)


def turns(job: dict, update: Callable[[], object], act: Callable[[], object]) -> Iterator[None]:
    """Times a turn for every line on stdin and prints it. Every `yield` lets the training loop make one step."""
    wait = torch.cuda.synchronize if job["device"] == "cuda" else lambda: None
    for part in (update, act):
        for _ in range(5):  # compiled and recorded
            part()
    for _ in range(50):
        yield
    print("ready", flush=True)
    for _ in sys.stdin:
        row = dict(update_ms=1e3 / rate(update, job["seconds"], wait), act_ms=1e3 / rate(act, job["seconds"], wait))
        start, steps = time.perf_counter(), 0
        while time.perf_counter() - start < job["seconds"]:
            yield
            steps += 1
        wait()
        print(json.dumps(row | dict(loop_sps=steps / (time.perf_counter() - start))), flush=True)
    sys.exit()  # the command is gone


def train_script(job: dict) -> None:
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

        timing = turns(job, update, choose)

        def timed_update() -> None:
            update()
            next(timing)

        return timed_update, metrics, learner

    module.make_update = make_timed_update
    module.train(module.parse_args([f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]))


def train_library(job: dict) -> None:
    """The same by a SAC from PyPI, with its defaults and this project's batch."""
    import gymnasium as gym

    SAC = importlib.import_module(LIBRARIES[job["implementation"]]).SAC
    env = gym.make(job["env_id"])
    model = SAC("MlpPolicy", env, learning_starts=WARM_UP, batch_size=job["batch_size"], buffer_size=200_000)
    obs = env.observation_space.sample().astype(np.float32)
    timing = turns(job, lambda: model.train(1, job["batch_size"]), lambda: model.predict(obs))

    def callback(*_) -> bool:
        if model.num_timesteps > WARM_UP + 100:
            next(timing)
        return True

    model.learn(10**9, callback=callback)


def work(job: dict) -> None:
    torch.set_num_threads(job["threads"])
    (train_script if job["implementation"] in SCRIPTS else train_library)(job)


def jobs_of(args: Args) -> list[list[dict]]:
    """Groups of jobs that are measured side by side."""
    base = dict(device=args.device, seconds=args.seconds) | {name: value for name, (_, value) in USUAL.items()}
    groups = []
    if args.grow:
        base |= dict(env_id="Hopper-v4", mode="compiled", threads=max(args.threads))
        for name in ("MEow", "SAC"):
            for axis, values in (("batch_size", (64, 256, 1024, 4096)), ("num_envs", (1, 4, 16))):
                groups.append([base | dict(implementation=name) | {axis: value} for value in values])
        return groups
    for env_id in args.env_ids:
        for threads in args.threads:
            group = []
            for name in args.implementations:
                about = base | dict(env_id=env_id, threads=threads, implementation=name)
                if name in SCRIPTS:
                    group += [about | dict(mode=mode, processes=n) for mode in args.modes for n in args.processes]
                elif args.device == "cpu":
                    group.append(about | dict(mode="eager" if name == "SB3 SAC" else "compiled"))
            groups.append(group)
    return groups


def start_worker(job: dict, folder: Path, log: Path) -> subprocess.Popen:
    threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1" if job["threads"] == 1 else ""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "benchmark.speed", "--worker", json.dumps(job)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log.open("w"), text=True)
    env = os.environ | threads | dict(PYTHONPATH=path, XLA_FLAGS=one)
    return subprocess.Popen(command, env=env, cwd=folder, **pipes)


def answer_of(worker: subprocess.Popen, job: dict, log: Path) -> str:
    """The worker's next line that is for the command: "ready" or a turn."""
    while not (line := worker.stdout.readline()).startswith(("ready", "{")):
        if not line:
            raise SystemExit(f"error: {job}\n{log.read_text()[-2000:]}")
    return line


def measure(jobs: list[dict], turns: int) -> list[dict]:
    """Rows of one group: the processes of all jobs compile side by side, then `turns` rounds of the jobs one by one."""
    workers, rows = [], []
    with tempfile.TemporaryDirectory() as folder:  # for the runs that the scripts write
        try:
            for job in jobs:
                logs = [Path(folder) / f"{len(workers)}-{n}.log" for n in range(job["processes"])]
                workers.append([(start_worker(job, Path(folder), log), job, log) for log in logs])
            for own in workers:
                for each in own:
                    answer_of(*each)
                print(f"ready: {own[0][1]['implementation']} {own[0][1]['mode']}", file=sys.stderr)
            for turn in range(turns):
                for job, own in zip(jobs, workers, strict=True):
                    for worker, *_ in own:
                        worker.stdin.write("go\n")
                        worker.stdin.flush()
                    timed = [json.loads(answer_of(*each)) for each in own]
                    row = {part: statistics.median(each[part] for each in timed) for part in PARTS}
                    row["loop_sps"] = sum(each["loop_sps"] for each in timed)
                    kept = {key: job[key] for key in COLUMNS if key in job}
                    rows.append(kept | dict(turn=turn) | {part: float(f"{x:.4g}") for part, x in row.items()})
        finally:
            for worker, *_ in (each for own in workers for each in own):
                worker.kill()
                worker.wait()
    return rows


def median(rows: list[dict], part: str, **chosen) -> float:
    """Median over the turns of the rows with these values."""
    return statistics.median(float(r[part]) for r in rows if all(str(r[k]) == str(v) for k, v in chosen.items()))


def name_of(row: dict) -> str:
    """The implementation, with its batch, environments and processes where they are not the usual ones."""
    usual = USUAL | dict(num_seeds=("seeds", 1))  # num_seeds: in tables of older commits
    more = (f", {label} {row[k]}" for k, (label, value) in usual.items() if str(row.get(k, value)) != str(value))
    return row["implementation"] + "".join(more)


def table(rows: list[dict]) -> str:
    """Median (range) of each part, and the ratio of the loop's steps a second to MEow's of the same group and mode."""
    text = ["| task | threads | implementation | mode | update, ms | act, ms | loop, steps/s | MEow is faster by |"]
    text.append("|---" * 8 + "|")
    keys = [key for key in rows[0] if key in ("env_id", "threads", "implementation", "mode", "num_seeds", *USUAL)]
    for key in dict.fromkeys(tuple(str(row[k]) for k in keys) for row in rows):
        chosen = dict(zip(keys, key, strict=True))
        cells = []
        for part, digits in (("update_ms", 2), ("act_ms", 3), ("loop_sps", 0)):
            values = sorted(float(r[part]) for r in rows if all(str(r[k]) == v for k, v in chosen.items()))
            middle = statistics.median(values)
            cells.append(f"{middle:.{digits}f} ({values[0]:.{digits}f}–{values[-1]:.{digits}f})")
        try:
            best = median(rows, "loop_sps", **chosen | dict(implementation="MEow", mode="compiled"))
            cells.append(f"{best / median(rows, 'loop_sps', **chosen):.2f}")
        except statistics.StatisticsError:  # MEow, compiled, is not among them
            cells.append("")
        about = f"{chosen['env_id']} | {chosen['threads']} | {name_of(chosen)} | {chosen['mode']}"
        text.append(f"| {about} | {' | '.join(cells)} |")
    return "\n".join(text)


def chart(rows: list[dict], path: Path) -> None:
    """Bars of the loop's steps a second, one for each line of the table, a panel for each task, with the range of the
    turns."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    env_ids = list(dict.fromkeys(row["env_id"] for row in rows))
    figure, axes = plt.subplots(1, len(env_ids), figsize=(3.4 * len(env_ids), 4), squeeze=False)
    for axis, env_id in zip(axes[0], env_ids, strict=True):
        here = [row for row in rows if row["env_id"] == env_id]
        bars = list(dict.fromkeys(f"{name_of(row)}, {row['mode']}" for row in here))
        for i, threads in enumerate(dict.fromkeys(str(row["threads"]) for row in here)):
            sps = {}  # bar -> the turns' values
            for row in here:
                if str(row["threads"]) == threads:
                    sps.setdefault(f"{name_of(row)}, {row['mode']}", []).append(float(row["loop_sps"]))
            for n, (bar, values) in enumerate(sps.items()):
                middle = statistics.median(values)
                error = [[middle - min(values)], [max(values) - middle]]
                label = f"{threads} threads" if threads != "1" else "1 thread"
                at = bars.index(bar) + 0.4 * i
                axis.barh(at, middle, 0.38, xerr=error, color=f"C{i}", label=label if n == 0 else None)
        axis.set_yticks([k + 0.2 for k in range(len(bars))], bars, fontsize=7)
        axis.invert_yaxis()
        axis.set(title=env_id, xlabel="environment steps / s")
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def main(args: Args) -> None:
    if args.worker is not None:
        return work(json.loads(args.worker))
    packages = ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3", "sbx-rl", "jax")
    have = [name for name in packages if importlib.util.find_spec(name.replace("-", "_").replace("sbx_rl", "sbx"))]
    processor = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    machine = f"{platform.machine()}, {processor}, {os.cpu_count()} cores, {device}; " + ", ".join(
        f"{name} {version(name)}" for name in have
    )
    facts = dict(commit=commit(), machine=machine, command="python -m benchmark.speed " + shlex.join(sys.argv[1:]))
    print(f"{machine}\nload before the start: {os.getloadavg()[0]:.2f}")
    rows = []
    for jobs in jobs_of(args):
        rows += measure(jobs, args.turns)
        if args.csv:  # after every group: what is measured is kept if the rest fails
            write_csv(args.csv, (row | facts for row in rows), [*COLUMNS, *facts])
    print(table(rows))
    if args.png:
        chart(rows, args.png)


if __name__ == "__main__":
    main(tyro.cli(Args))
