"""How fast each script trains, beside Stable-Baselines3's and SBX's SAC, measured side by side in one run.

    python -m benchmark.speed --csv benchmark/results/speed.csv --png benchmark/results/speed.png

Every implementation is a process of its own that waits its turn; the turns go round, so that a machine that slows
down slows all of them. What is timed on each turn: an update (with the draw of its batch), the choice of one action,
and the whole loop (environment, buffer, update, logs; no evaluation). Printed: medians, the range of the turns, and
the ratio to MEow. Leave the machine alone while it runs. Written: one row a turn.

    python -m benchmark.speed --grow --csv benchmark/results/speed_growth.csv     # batch, environments, seeds
    python -m benchmark.speed --device cuda --num-seeds 1 5 10 20 --csv NAME.csv  # a GPU
"""

import dataclasses
import importlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

from benchmark import write_csv

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"MEow": "meow", "SAC": "sac", "SQL": "sql", "S2AC": "s2ac"}
LIBRARIES = {"SB3 SAC": "stable_baselines3", "SBX SAC": "sbx"}
PARTS = ("update_ms", "act_ms", "loop_sps")
WARM_UP = 1_000  # random steps before the first update
COLUMNS = ["env_id", "implementation", "mode", "threads", "batch_size", "num_envs", "num_seeds", "turn", *PARTS]


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
    num_seeds: tuple[int, ...] = (1,)
    """agents that one process trains side by side (this project's scripts)"""
    turns: int = 7
    """turns of each implementation"""
    seconds: float = 1.0
    """length of each of the three measurements of a turn"""
    grow: bool = False
    """time MEow and SAC as batch (64 to 4096), environments (1 to 16) and seeds (1 to 10) grow instead, on Hopper-v4"""
    count: bool = False
    """count the operations and bytes of an update instead"""
    csv: Path | None = None
    """table to write"""
    png: Path | None = None
    """bar chart to write"""
    worker: str | None = None
    """(what the command calls itself with)"""


def rate(function: Callable[[int], object], seconds: float, wait: Callable[[], object]) -> float:
    """Calls a second of what function(n) does n times, over about `seconds`; wait() returns when a GPU is done."""
    n, elapsed = 1, 0.0
    while True:
        wait()
        start = time.perf_counter()
        function(n)
        wait()
        elapsed = time.perf_counter() - start
        if elapsed > seconds / 2:
            return n / elapsed
        n = max(2 * n, int(0.8 * n * seconds / max(elapsed, 1e-4)))


def script_parts(job: dict) -> dict[str, Callable[[int], object]]:
    """The three things to time of one of this project's scripts: its own functions and its own loop."""
    module = importlib.import_module(f"{SCRIPTS[job['implementation']]}_continuous_action")
    more = dict(compile="on" if job["mode"] == "compiled" else "off", device=job["device"], learning_starts=WARM_UP)
    more |= dict(batch_size=job["batch_size"], num_envs=job["num_envs"], num_seeds=job["num_seeds"])
    args = module.parse_args(["--env-id", job["env_id"]])
    args = dataclasses.replace(args, **more, total_timesteps=10**9, eval_frequency=10**9, buffer_size=200_000)
    update, runs, _ = module.make_runs(args)

    state = dict(inputs=[], n=0, stats=[None] * len(runs))

    def to_next_update() -> None:
        state.update(inputs=module.advance(runs, state["stats"])[0])
        while not state["inputs"]:  # a step without an update
            state.update(inputs=module.advance(runs, [None] * len(runs))[0])

    to_next_update()

    def loop(steps: int) -> None:
        for _ in range(steps):
            state.update(stats=update(*state["inputs"], n=state["n"]), n=state["n"] + 1)
            to_next_update()

    device = module.choose_device(args)
    env = module.make_env(args.env_id)
    obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
    agents = [module.Agent(obs_dim, action_dim, args).to(device) for _ in range(args.num_seeds)]
    lone_update, _ = module.make_update(agents, args)
    buffer = module.ReplayBuffer(100_000, 1, obs_dim, action_dim, device)
    buffer.rows.normal_()
    buffer.fields(buffer.rows).actions.tanh_()
    buffer.fields(buffer.rows).terminations.zero_()
    buffer.size, rng = buffer.capacity, torch.Generator(device)

    def updates(calls: int) -> None:
        for n in range(calls):
            drawn = [(*buffer.sample(args.batch_size, rng), *module.draw_noise(action_dim, args, rng)) for _ in agents]
            lone_update(*(torch.stack(x) for x in zip(*drawn, strict=True)), n=n)

    act, obs = module.compiled(agents[0].act, args), torch.randn(args.num_envs, obs_dim, device=device)

    @torch.no_grad()
    def acts(calls: int) -> None:
        for _ in range(calls):
            act(obs, agents[0].act_noise(args.num_envs, rng))

    return dict(update_ms=updates, act_ms=acts, loop_sps=loop)


def library_parts(job: dict) -> dict[str, Callable[[int], object]]:
    """The same of a SAC from PyPI, with its defaults and this project's batch."""
    import gymnasium as gym

    SAC = importlib.import_module(LIBRARIES[job["implementation"]]).SAC
    env = gym.make(job["env_id"])
    model = SAC("MlpPolicy", env, learning_starts=WARM_UP, batch_size=job["batch_size"], buffer_size=200_000)
    model.learn(WARM_UP + 100)
    obs = env.observation_space.sample().astype(np.float32)

    def updates(calls: int) -> None:
        model.train(gradient_steps=calls, batch_size=job["batch_size"])

    if (
        job["implementation"] == "SBX SAC"
    ):  # compiled anew for each number of gradient steps: one a call, as in its loop

        def updates(calls: int) -> None:
            for _ in range(calls):
                model.train(gradient_steps=1, batch_size=job["batch_size"])

    def acts(calls: int) -> None:
        for _ in range(calls):
            model.predict(obs)

    return dict(update_ms=updates, act_ms=acts, loop_sps=lambda steps: model.learn(steps, reset_num_timesteps=False))


def count(args: Args) -> str:
    """Of each script's update, batch 256: matrix products, in GFLOP, and the bytes of parameters and their moments.

    An update reads and writes each parameter, its two moments and its target, and writes and reads its gradient, in
    float32; with a policy delay, SAC's two actor steps every other update count as one.
    """
    from torch.utils.flop_counter import FlopCounterMode

    text = ["| task | script | GFLOP | parameters | MB of parameters, moments, targets, gradients |", "|---" * 5 + "|"]
    for env_id in args.env_ids:
        for name in SCRIPTS:
            module = importlib.import_module(f"{SCRIPTS[name]}_continuous_action")
            flags = module.parse_args(["--env-id", env_id, "--compile=off", "--device=cpu", "--batch-size=256"])
            env = module.make_env(env_id)
            obs_dim, action_dim = env.observation_space.shape[0], env.action_space.shape[0]
            agent = module.Agent(obs_dim, action_dim, flags)
            update, learner = module.make_update([agent], flags)
            widths = (obs_dim, action_dim, 1, obs_dim, 1)
            obs, actions, rewards, next_obs, terminations = torch.zeros(256, sum(widths)).split(widths, -1)
            batch = (obs, actions, rewards[:, 0], next_obs, terminations[:, 0])
            inputs = (*batch, *module.draw_noise(action_dim, flags, torch.Generator()))
            flops = 0.0
            for n in range(2):
                with FlopCounterMode(display=False) as counter:
                    update(*(x[None] for x in inputs), n=n)
                flops += counter.get_total_flops() / 2
            trained = sum(p.numel() for p in agent.parameters())
            targets = sum(p.numel() for p in learner["target"][0].parameters())
            moved = 4 * (2 * 4 * trained + 2 * targets)
            text.append(f"| {env_id} | {name} | {flops / 1e9:.2f} | {trained} | {moved / 1e6:.1f} |")
    return "\n".join(text)


def kernels(update: Callable[[int], object]) -> int:
    """CUDA kernels that an update launches or replays."""
    from torch.profiler import DeviceType, ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        update(10)
        torch.cuda.synchronize()
    return round(sum(event.device_type == DeviceType.CUDA for event in profiled.events()) / 10)


def work(job: dict) -> None:
    """A worker: prepares and warms up, then times one turn for every line that it reads."""
    torch.set_num_threads(job["threads"])
    parts = script_parts(job) if job["implementation"] in SCRIPTS else library_parts(job)
    wait = torch.cuda.synchronize if job["device"] == "cuda" else lambda: None
    for name, part in parts.items():
        start = time.perf_counter()
        part(3)
        print(f"{name}: first calls {time.perf_counter() - start:.1f} s", file=sys.stderr)
        rate(part, 0.3, wait)
    facts = dict(kernels=kernels(parts["update_ms"])) if job["device"] == "cuda" else {}
    print("ready", flush=True)
    for _ in sys.stdin:
        per_second = {name: rate(part, job["seconds"], wait) for name, part in parts.items()}
        row = {name: 1e3 / per_second[name] for name in ("update_ms", "act_ms")} | facts
        # the loop's unit is an update, of which there is one an environment step of each seed
        print(json.dumps(row | dict(loop_sps=per_second["loop_sps"])), flush=True)


def jobs_of(args: Args) -> list[list[dict]]:
    """Groups of jobs that are measured side by side."""
    base = dict(device=args.device, seconds=args.seconds, batch_size=256, num_envs=1, num_seeds=1)
    if args.grow:
        axes = [("batch_size", n) for n in (64, 256, 1024, 4096)] + [("num_envs", n) for n in (1, 4, 16)]
        axes += [("num_seeds", n) for n in (1, 2, 5, 10)]
        about = dict(env_id="Hopper-v4", mode="compiled", threads=max(args.threads))
        return [
            [base | about | {axis: n, "implementation": name} for axis_, n in axes if axis_ == axis for name in group]
            for axis in ("batch_size", "num_envs", "num_seeds")
            for group in (("MEow",), ("SAC",))
        ]
    groups = []
    for env_id in args.env_ids:
        for threads in args.threads:
            group = []
            for name in args.implementations:
                about = base | dict(env_id=env_id, threads=threads, implementation=name)
                if name in SCRIPTS:
                    group += [about | dict(mode=mode, num_seeds=s) for mode in args.modes for s in args.num_seeds]
                elif args.device == "cpu":
                    group.append(about | dict(mode="eager" if name == "SB3 SAC" else "compiled"))
            groups.append(group)
    return groups


def measure(jobs: list[dict], turns: int) -> list[dict]:
    """Rows of one group: a process a job, all of which compile side by side, then `turns` rounds one by one."""
    workers, rows = [], []
    with tempfile.TemporaryDirectory() as folder:  # for the runs that the scripts' loops write
        try:
            for k, job in enumerate(jobs):
                threads = {name: str(job["threads"]) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
                one = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
                path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
                env = os.environ | threads | dict(PYTHONPATH=path, XLA_FLAGS=one if job["threads"] == 1 else "")
                command = [sys.executable, "-m", "benchmark.speed", "--worker", json.dumps(job)]
                pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
                log = Path(folder) / f"{k}.log"
                worker = subprocess.Popen(command, env=env, cwd=folder, **pipes, stderr=log.open("w"))
                workers.append(worker)
            for k, (job, worker) in enumerate(zip(jobs, workers, strict=True)):
                while (line := worker.stdout.readline()) != "ready\n":
                    if not line:
                        raise SystemExit(f"error: {job}\n{(Path(folder) / f'{k}.log').read_text()[-2000:]}")
                print(f"ready: {job['implementation']} {job['mode']}", file=sys.stderr)
            for turn in range(turns):
                for job, worker in zip(jobs, workers, strict=True):
                    worker.stdin.write("go\n")
                    worker.stdin.flush()
                    timed = json.loads(worker.stdout.readline())
                    timed["loop_sps"] *= job["num_seeds"]  # environment steps of all seeds together
                    kept = {key: job[key] for key in COLUMNS if key in job}
                    rows.append(kept | dict(turn=turn) | {key: float(f"{x:.4g}") for key, x in timed.items()})
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
    return rows


def median(rows: list[dict], part: str, **chosen) -> float:
    """Median over the turns of the rows with these values."""
    return statistics.median(float(r[part]) for r in rows if all(str(r[k]) == str(v) for k, v in chosen.items()))


def name_of(key: dict) -> str:
    """The implementation, with its batch, environments and seeds where they are not the usual ones."""
    usual = dict(batch_size=("batch", "256"), num_envs=("envs", "1"), num_seeds=("seeds", "1"))
    more = (f", {label} {key[k]}" for k, (label, value) in usual.items() if str(key[k]) != value)
    return key["implementation"] + "".join(more)


def table(rows: list[dict]) -> str:
    """Median (range) of each part, and the ratio of the loop's steps a second to MEow's of the same group and mode."""
    text = ["| task | threads | implementation | mode | update, ms | act, ms | loop, steps/s | MEow is faster by |"]
    text.append("|---" * 8 + "|")
    keys = ("env_id", "threads", "implementation", "mode", "batch_size", "num_envs", "num_seeds")
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
    sys.path.insert(0, str(ROOT))
    if args.count:
        print(count(args))
        return None
    commit = importlib.import_module("meow_continuous_action").commit()
    packages = ("torch", "gymnasium", "mujoco", "numpy", "stable-baselines3", "sbx-rl", "jax")
    have = [name for name in packages if importlib.util.find_spec(name.replace("-", "_").replace("sbx_rl", "sbx"))]
    processor = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), "")
    device = torch.cuda.get_device_name() if args.device == "cuda" else "no GPU"
    machine = f"{platform.machine()}, {processor}, {os.cpu_count()} cores, {device}; " + ", ".join(
        f"{name} {version(name)}" for name in have
    )
    command = "python -m benchmark.speed " + shlex.join(sys.argv[1:])
    print(f"{machine}\nload before the start: {os.getloadavg()[0]:.2f}")
    rows = []
    for jobs in jobs_of(args):
        rows += measure(jobs, args.turns)
        if args.csv:  # after every group: what is measured is kept if the rest fails
            names = [*COLUMNS, *(["kernels"] if args.device == "cuda" else []), "commit", "machine", "command"]
            facts = dict(commit=commit, machine=machine, command=command)
            write_csv(args.csv, (row | facts for row in rows), names)
    print(table(rows))
    if args.png:
        chart(rows, args.png)


if __name__ == "__main__":
    main(tyro.cli(Args))
