"""Grids of runs: scripts x tasks x seeds x variants, each cell a script's own command line, as Ray tasks.

    python -m benchmark.run runs/smoke --preset smoke
    python -m benchmark.run runs/mine --scripts meow sac sb3:ppo --env-ids Hopper-v4 --seeds 1 2 3 --flags="--utd 0.5"
    python -m benchmark.run runs/mine --resume

The cost is printed first. grid.json in the folder has the cells and their states, a folder for each cell its log and
its runs. --resume continues a grid that was interrupted or killed: what is done is not run again, a run continues from
its last checkpoint, or starts anew where it has none; cells that the flags add are added. Exit code: 0 all
done, 1 a cell failed, 2 a mistake in the flags, 130 or 143 interrupted. Runs on this machine, or on the cluster at
RAY_ADDRESS, whose nodes need folder, scripts and Python at the same paths.
"""

import dataclasses
import fcntl
import itertools
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import tomllib
import tyro
from rich.progress import Progress

from benchmark import NAMES, ROOT, UserError, exit_code, scalars, script_of

PRESETS = tomllib.loads((ROOT / "benchmark" / "presets.toml").read_text())
STEPS = PRESETS.pop("steps")
GPU_RUNS = ("walker2d", "ant", "humanoid")  # whose five runs each shared one H200 through MPS


@dataclasses.dataclass
class Args:
    folder: tyro.conf.Positional[Path]  # folder of the grid
    preset: Literal[tuple(PRESETS)] | None = None  # a grid of benchmark/presets.toml
    scripts: tuple[str, ...] = ()  # by path or word (meow-mixture, sb3:ppo), instead of the preset's, as the next three
    env_ids: tuple[str, ...] = ()  # tasks
    seeds: tuple[int, ...] = ()  # seeds
    variants: tuple[str, ...] = ()  # flags of a variant each: `--variants "" no-reward-shift "coupling affine"`
    flags: str = ""  # flags of every run, in quotes, after the preset's: `--flags="--total-timesteps 50000"`
    cpus: float = 1.0  # CPUs of a process, and its OMP_NUM_THREADS
    gpu_fraction: float = 0.0  # share of a GPU of each process: with 0.2 five share one, with 0 a process sees none
    retries: int = 1  # further attempts at a run that failed, from its last checkpoint
    resume: bool = False  # continue the grid that is in the folder
    dry_run: bool = False  # print the cells and the cost, run nothing


def grid(args: Args) -> dict[str, dict]:
    """Name -> cell, of the flags; empty without a preset or scripts. Raises UserError."""
    given = {key: getattr(args, key) for key in ("scripts", "env_ids", "seeds", "variants") if getattr(args, key)}
    if args.preset is None and (given or args.flags) and not {"scripts", "env_ids"} <= set(given):
        raise UserError("a grid, and --flags for it, needs --preset, or --scripts and --env-ids")
    cells = {}
    for block in PRESETS[args.preset] if args.preset else [{}] if given else []:
        block = dict(seeds=(1,), variants=("",), flags="") | block | given
        axes = (block[key] for key in ("scripts", "env_ids", "variants", "seeds"))
        for script, env_id, variant, seed in itertools.product(*axes):
            path, own = script_of(script)
            stem, label = "_".join([path.stem, *own[1:]]), re.sub(r"[^\w.]+", "-", variant).strip("-")
            name = re.sub(r"[^\w.-]", "_", "__".join(filter(None, (stem, env_id, label, f"seed{seed}"))))
            flags = [*own, *shlex.split(f"{block['flags']} {args.flags} {variant and f'--{variant}'}")]
            flags += ["--exp-name", f"{stem}.{label}"] if label else []
            cell = dict(name=name, word=script, script=str(path), env_id=env_id, seed=seed, flags=flags)
            cells = merge(cells, {name: cell | dict(state="waiting")})
    return cells


def merge(old: dict[str, dict], new: dict[str, dict]) -> dict[str, dict]:
    """The cells of both. Raises UserError where the two disagree."""
    for name, key in itertools.product(old.keys() & new.keys(), ("script", "flags")):
        if old[name][key] != new[name][key]:
            raise UserError(f"{name} is in the grid with another {key}: {old[name][key]}, not {new[name][key]}")
    return old | {name: cell for name, cell in new.items() if name not in old}


def steps(cell: dict) -> int:
    """Environment steps of the cell; of a task that STEPS lacks, a million."""
    given = re.findall(r"--total[-_]timesteps[ =](\d+)", " ".join(cell["flags"]))
    return int(given[-1]) if given else STEPS.get(re.sub("-v5$", "-v4", cell["env_id"]), 10**6)


def measured() -> dict[tuple[str, str], float]:
    """(implementation, task) -> its steps a second on one CPU thread: medians of committed tables, the fastest."""
    rows = pd.concat(map(pd.read_csv, (ROOT / "benchmark" / "results").glob("speed*.csv")))
    one = rows.reindex(columns=["threads", "num_envs", "num_seeds", "processes"]).fillna(1) == 1  # not all are in all
    rows = rows[one.all(axis=1) & (rows["batch_size"] == 256) & ~rows["machine"].str.contains("NVIDIA", na=False)]
    turns = rows.groupby(["implementation", "env_id", "mode", "commit"])["loop_sps"]
    return turns.median().groupby(["implementation", "env_id"]).max().to_dict()


def gpu_rates() -> dict[int, float]:
    """Processes -> steps a second of all MEow processes that share one H200 through MPS, of committed tables."""
    results = ROOT / "benchmark" / "results"
    alone = pd.read_csv(results / "speed_h200.csv").query("implementation == 'MEow' and num_seeds == 1")
    runs = pd.concat([pd.read_csv(results / f"{task}_meow.csv").assign(task=task) for task in GPU_RUNS])
    together = runs.groupby(["task", "seed"])["SPS"].median()
    return {1: alone["loop_sps"].median(), len(together): together.sum()}


def duration(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{60 * hours:.0f} minutes"


def estimate(cells: list[dict], args: Args) -> str:
    """What the cells cost on CPUs and on a GPU, by measured speeds."""
    rates, used, hours, total = measured(), {}, 0.0, sum(map(steps, cells))
    for cell in cells:
        name, env_id = NAMES.get(cell["word"], Path(cell["word"]).stem), re.sub("-v5$", "-v4", cell["env_id"])
        likely = itertools.product((name, "SB3 SAC" if "SB3" in name else "MEow"), (env_id, "Hopper-v4"))
        like = next((key for key in likely if key in rates), "")
        rate = rates.get(like, 150.0)
        used[name, env_id] = f"{name} {env_id} {rate:.0f}" + ("" if like == (name, env_id) else " (of another)")
        hours += steps(cell) / rate / 3600
    side_by_side = min(max(1, int((os.cpu_count() or 1) / args.cpus)), max(1, len(cells)))
    k = max(1, int(1 / args.gpu_fraction)) if args.gpu_fraction else 15
    gpu = gpu_rates()
    rate = float(np.interp(k, list(gpu), list(gpu.values())))
    return (
        f"to run: {len(cells)} runs, {total:,} environment steps\n"
        f"  CPU: {duration(hours)} of a core, {duration(hours / side_by_side)} here, {side_by_side} at a time, by the "
        f"steps a second and core in benchmark/results/speed*.csv: {', '.join(used.values())}\n"
        f"  GPU: {duration(total / rate / 3600)} of one H200, {k} processes with MPS, {rate:,.0f} steps/s in all, "
        f"by what {max(gpu)} processes of an older MEow made (benchmark/results/{GPU_RUNS[0]}_meow.csv and others)"
    )


def run_folders(here: Path) -> list[Path]:
    """The run folders of the cell whose folder is `here`, without what was set aside."""
    return sorted(path.parent for path in here.glob("runs/*/args.json"))


def next_command(here: Path, cell: dict) -> list[str] | None:
    """What is left to do in the cell's folder: None, resume a run, or start (what has no checkpoint is set aside)."""
    script = [sys.executable, cell["script"]]
    for run in run_folders(here)[:1]:
        evaluations, args = scalars(run, "eval/episodic_return"), json.loads((run / "args.json").read_text())["args"]
        if evaluations and evaluations[-1].step >= args.get("total_timesteps", math.inf):
            return None
        if (run / "checkpoint.pt").exists():
            return [*script, "--resume", str(run.relative_to(here)), *cell["flags"]]
    if (here / "runs").exists():
        (here / "runs").rename(here / f"abandoned-{len(list(here.glob('abandoned-*'))) + 1}")
    return [*script, "--env-id", cell["env_id"], "--seed", str(cell["seed"]), *cell["flags"]]


def run_cell(folder: Path, cell: dict, cpus: float, gpu_fraction: float) -> None:
    """One attempt at a cell, in a Ray task: start its script or resume it, its output appended to the cell's log.txt.
    When the task is cancelled, the script gets SIGTERM and is waited for. Raises CalledProcessError if it fails."""
    here, hidden = folder / cell["name"], {} if gpu_fraction else {"CUDA_VISIBLE_DEVICES": ""}
    here.mkdir(parents=True, exist_ok=True)
    with open(here / "lock", "a") as lock, open(here / "log.txt", "a") as log:
        # the script holds the lock, too: if it outlives a grid that was killed, the next one waits for it here
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (command := next_command(here, cell)) is None:
            return
        print(f"\n# {time.strftime('%F %T')} {shlex.join(command)}", file=log, flush=True)
        files = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock.fileno()])
        env = os.environ | {"OMP_NUM_THREADS": str(max(1, int(cpus)))} | hidden
        process = subprocess.Popen(command, cwd=here, env=env, **files)
        try:
            while (code := process.poll()) is None:
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    if code:
        raise subprocess.CalledProcessError(code, command)


def start_ray():
    """Ray on this machine, small and quiet, or the cluster at RAY_ADDRESS. Returns the module. Raises UserError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # run_cell hides the GPUs itself
    os.environ.setdefault("RAY_worker_niceness", "0")  # with Ray's 15 a grid stands still beside any other job
    import ray

    local = dict(address="local", num_cpus=os.cpu_count(), include_dashboard=False, object_store_memory=80 * 2**20)
    try:
        ray.init(log_to_driver=False, logging_level="error", **({} if os.environ.get("RAY_ADDRESS") else local))
    except ConnectionError as e:
        raise UserError(f"RAY_ADDRESS {os.environ.get('RAY_ADDRESS')}: {e}") from e

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    for number in (signal.SIGINT, signal.SIGTERM):  # Ray has handlers of its own, which do not wait for the tasks
        signal.signal(number, interrupt)
    return ray


def tail(log: Path, size: int = 4096) -> str:
    return log.read_bytes()[-size:].decode(errors="replace").replace("\r", "\n")


def fraction(folder: Path, cell: dict) -> float:
    """How far the cell is, by the last progress bar in its log."""
    log = folder / cell["name"] / "log.txt"
    bars = re.findall(r"(\d+)/(\d+) \[", tail(log)) if log.exists() and cell["state"] != "done" else []
    return int(bars[-1][0]) / int(bars[-1][1]) if bars else float(cell["state"] == "done")


def save(folder: Path, cells: dict[str, dict]) -> None:
    """Write grid.json, whole or not at all."""
    (folder / "grid.json.tmp").write_text(json.dumps(dict(cells=list(cells.values())), indent=1))
    (folder / "grid.json.tmp").replace(folder / "grid.json")


def run_grid(folder: Path, cells: dict[str, dict], args: Args) -> int:
    """Run the cells that are not done. Returns the exit code."""
    ray = start_ray()
    have = ray.cluster_resources()
    if args.cpus > have.get("CPU", 0) or args.gpu_fraction > have.get("GPU", 0):
        raise UserError(
            f"--cpus, --gpu-fraction: Ray finds {have.get('CPU', 0):g} CPUs and {have.get('GPU', 0):g} GPUs"
        )
    again = dict(max_retries=args.retries, retry_exceptions=[subprocess.CalledProcessError])
    task = ray.remote(run_cell).options(num_cpus=args.cpus, num_gpus=args.gpu_fraction, **again)
    left = [cell for cell in cells.values() if cell["state"] != "done"]
    running = {task.remote(folder, cell, args.cpus, args.gpu_fraction): cell for cell in left}
    for cell in left:
        cell["state"] = "waiting or running"

    def summary() -> str:
        states = [cell["state"] for cell in cells.values()]
        return ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(("done", "failed", *states)))

    with Progress(speed_estimate_period=900) as progress:
        bar = progress.add_task(summary(), total=sum(map(steps, cells.values())))
        try:
            while running:
                save(folder, cells)
                for done in ray.wait(list(running), timeout=1.0)[0]:
                    cell = running.pop(done)
                    try:
                        ray.get(done)
                        cell["state"] = "done"
                    except ray.exceptions.RayError as e:  # the script failed, the worker died, or could not write
                        cell |= dict(state="failed", error=str(e).strip().splitlines()[-1])
                    progress.print(f"{cell['state']}: {cell['name']}", soft_wrap=True)
                covered = sum(steps(cell) * fraction(folder, cell) for cell in cells.values())
                progress.update(bar, completed=covered, description=summary())
        except KeyboardInterrupt as e:
            progress.print(f"interrupted; waiting for the scripts to save. Continue with --resume {args.folder}")
            for each, cell in running.items():
                cell["state"] = "interrupted"
                ray.cancel(each)
            ray.wait(list(running), num_returns=len(running), timeout=600) if running else None
            return 128 + (e.args[0] if e.args else signal.SIGINT)
        finally:
            save(folder, cells)
            ray.shutdown()
    for cell in (cell for cell in cells.values() if cell["state"] == "failed"):
        log = folder / cell["name"] / "log.txt"
        print(f"\nfailed: {cell['name']}: {cell['error']}; end of {log}:")
        print("    " + "\n    ".join(tail(log).splitlines()[-15:]) if log.exists() else "")
    print(f"\n{summary()}. The page: python -m benchmark.report {args.folder} --out {args.folder}/report")
    return int(any(cell["state"] == "failed" for cell in cells.values()))


def main(args: Args) -> int:
    """Returns the exit code. Raises UserError."""
    if args.cpus <= 0 or not 0 <= args.gpu_fraction <= 1 or args.retries < 0:
        raise UserError("--cpus must be positive, --gpu-fraction from 0 to 1, --retries not negative")
    folder, cells = args.folder.resolve(), grid(args)
    manifest = folder / "grid.json"
    if manifest.exists() and not args.resume:
        raise UserError(f"{args.folder} has a grid: --resume continues it")
    if manifest.exists():
        cells = merge({cell["name"]: cell for cell in json.loads(manifest.read_text())["cells"]}, cells)
    if not cells:
        raise UserError(f"nothing to run: {args.folder} has no grid, and there is no --preset and no --scripts")
    left = [cell for cell in cells.values() if cell["state"] != "done"]
    print(f"{estimate(left, args)}\ndone before: {len(cells) - len(left)}", flush=True)
    pipes = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps"))
    if 0 < args.gpu_fraction < 1 and not (pipes / "control").exists():
        print("CUDA MPS does not run here: processes take turns on a GPU. To start it, before the grid:")
        print("    nvidia-cuda-mps-control -d", flush=True)
    if args.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` closes the pipe
        print("\n".join(f"{cell['state']:12}{cell['name']} {shlex.join(cell['flags'])}" for cell in cells.values()))
    if args.dry_run or not left:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise UserError(f"another benchmark.run works on {args.folder}") from e
        return run_grid(folder, cells, args)


if __name__ == "__main__":
    sys.exit(exit_code(main, Args, __doc__))
