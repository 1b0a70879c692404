"""Grids of runs: scripts x tasks x seeds x variants, each cell the script's own command line, as Ray tasks.

    python -m benchmark.run runs/smoke --preset smoke
    python -m benchmark.run runs/mine --scripts meow sac --env-ids Hopper-v4 --seeds 1 2 3 --flags="--tau 0.01"
    python -m benchmark.run runs/mine --resume
    python -m benchmark.report runs/mine --out runs/mine/report

The cost is printed first. grid.json in the folder says what ran: commands, attempts, exit codes, run folders; each cell
has a folder with its log and its runs. --resume goes on with a grid that was interrupted or killed, from the runs' last
checkpoints; what is done is not run again, and cells that the flags add are added. Ctrl-C leaves a grid that resumes.
Exit code: 0 all done, 1 a cell failed, 2 a mistake in the flags, 130 or 143 interrupted.

Runs on this machine's cores, or on the cluster at RAY_ADDRESS, whose nodes need the folder, the scripts and this
Python at the same paths.
"""

import dataclasses
import fcntl
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import tyro

from benchmark.grids import UserError, estimate, exit_code, grid, merge, run_folders, steps


@dataclasses.dataclass
class Args:
    folder: tyro.conf.Positional[Path]
    """folder of the grid"""
    preset: Literal["smoke", "goal", "cpu", "paper", "ablation"] | None = None
    """a grid from the list: smoke 2 minutes; goal the goal maps; cpu 3 hours on 2 cores; paper all; ablation MEow's"""
    scripts: tuple[str, ...] = ()
    """scripts, by path or by this project's word (meow-mixture); in place of the preset's, as are the next three"""
    env_ids: tuple[str, ...] = ()
    """tasks"""
    seeds: tuple[int, ...] = ()
    """seeds"""
    variants: tuple[str, ...] = ()
    """flags that make a variant, without the first dashes: `--variants "" no-reward-shift "coupling affine"`"""
    flags: str = ""
    """flags of every run, in quotes, after the preset's: `--flags="--total-timesteps 50000"`"""
    cpus: float = 1.0
    """CPUs of a process, and its OMP_NUM_THREADS"""
    gpus: float = 0.0
    """share of a GPU for a process; with 0 it sees none"""
    retries: int = 1
    """further attempts at a run that failed, from its last checkpoint; a script that begins no run gets none"""
    resume: bool = False
    """go on with the grid that is in the folder"""
    rate: tuple[str, ...] = ()
    """environment steps a second of one run, for the estimate: `--rate meow=120 sac=90`"""
    dry_run: bool = False
    """print the cells and the cost, run nothing"""


def finished(run: Path) -> bool:
    """Whether the run's last evaluation is at or past its last step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    total = json.loads((run / "args.json").read_text())["args"].get("total_timesteps")
    events = EventAccumulator(str(run)).Reload()
    evaluations = events.Scalars("eval/episodic_return") if "eval/episodic_return" in events.Tags()["scalars"] else []
    return total is not None and bool(evaluations) and evaluations[-1].step >= total


def next_command(here: Path, cell: dict) -> list[str] | None:
    """What is left to do in the cell's folder: None, resume a run, or start (what cannot be resumed is set aside)."""
    script, runs = [sys.executable, cell["script"]], run_folders(here)
    if runs and finished(runs[0]):
        return None
    if runs and (runs[0] / "checkpoint.pt").exists():
        usage = subprocess.run([*script, "--help"], capture_output=True, text=True, cwd=here)
        if "--resume" in usage.stdout:
            return [*script, "--resume", str(runs[0].relative_to(here))]
    if (here / "runs").exists():
        (here / "runs").rename(here / f"abandoned-{len(list(here.glob('abandoned-*'))) + 1}")
    command = [*script, "--env-id", cell["env_id"], "--seed", str(cell["seed"])]
    command += ["--exp-name", f"{Path(cell['script']).stem}.{cell['variant']}"] if cell["variant"] else []
    return command + cell["flags"]


def run_cell(folder: Path, cell: dict, cpus: float, gpus: float) -> dict:
    """One attempt at a cell, in a Ray task: start its script or resume it, its output appended to the cell's log.txt.

    Returns the command and its exit code (0 if nothing was left to do). When the task is cancelled, the script gets
    SIGTERM and is waited for.
    """
    here = folder / cell["name"]
    here.mkdir(parents=True, exist_ok=True)
    threads = {"OMP_NUM_THREADS": str(max(1, int(cpus)))}
    env = os.environ | threads | ({} if gpus else {"CUDA_VISIBLE_DEVICES": ""})
    with open(here / "lock", "a") as lock, open(here / "log.txt", "a") as log:
        # the script holds the lock, too: if it outlives a grid that was killed, the next one waits for it here
        fcntl.flock(lock, fcntl.LOCK_EX)
        if (command := next_command(here, cell)) is None:
            return dict(command="", exit=0)
        print(f"\n# {time.strftime('%F %T')} {shlex.join(command)}", file=log, flush=True)
        files = dict(stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[lock.fileno()])
        process = subprocess.Popen(command, cwd=here, env=env, **files)
        try:
            while (code := process.poll()) is None:
                time.sleep(0.2)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
    return dict(command=shlex.join(command), exit=code)


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


def stop_tasks(ray, tasks) -> None:
    """Cancel the tasks and wait until their scripts have saved and ended."""
    for task in tasks:
        ray.cancel(task)
    ray.wait(tasks, num_returns=len(tasks), timeout=600) if tasks else None


def tail(log: Path, size: int = 4096) -> str:
    with open(log, "rb") as f:
        f.seek(max(0, log.stat().st_size - size))
        return f.read().decode(errors="replace").replace("\r", "\n")


def fraction(log: Path) -> float:
    """How far the script is, by the last progress bar in its log."""
    bars = re.findall(r"(\d+)/(\d+) \[", tail(log)) if log.exists() else []
    return int(bars[-1][0]) / int(bars[-1][1]) if bars else 0.0


def save(folder: Path, cells: dict[str, dict]) -> None:
    """Write grid.json, whole or not at all. `log` and `runs` are relative to the folder."""
    (folder / "grid.json.tmp").write_text(json.dumps(dict(cells=list(cells.values())), indent=1))
    (folder / "grid.json.tmp").replace(folder / "grid.json")


def run_grid(folder: Path, cells: dict[str, dict], args: Args) -> int:
    """Run the cells that are not done. Returns the exit code."""
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    ray = start_ray()
    if args.gpus and not ray.cluster_resources().get("GPU"):
        raise UserError("--gpus: Ray finds no GPU")
    task = ray.remote(run_cell).options(num_cpus=args.cpus, num_gpus=args.gpus, max_retries=0)
    running, bars, sizes = {}, {}, {}

    def submit(cell: dict) -> None:
        log = folder / cell["name"] / "log.txt"
        sizes[cell["name"]] = log.stat().st_size if log.exists() else 0
        running[task.remote(folder, cell, args.cpus, args.gpus)] = cell
        cell["state"] = "waiting"

    def collect(done) -> None:
        cell, last = running.pop(done), dict(ended=time.strftime("%F %T"))
        try:
            last |= ray.get(done)
        except ray.exceptions.RayError as e:  # the worker died, or could not write
            last |= dict(command="", exit=None, error=str(e).strip().splitlines()[-1])
        cell["attempts"].append(last)
        cell["state"] = "done" if last["exit"] == 0 else "failed"
        cell["log"] = f"{cell['name']}/log.txt"
        cell["runs"] = [str(run.relative_to(folder)) for run in run_folders(folder / cell["name"])]
        tries[cell["name"]] += 1
        again = last["exit"] != 0 and cell["runs"] and tries[cell["name"]] <= args.retries
        progress.print(f"{'retry' if again else cell['state']}: {cell['name']}", soft_wrap=True)
        if cell["name"] in bars:
            progress.remove_task(bars.pop(cell["name"]))
        if again:
            submit(cell)

    def show() -> None:
        """Bars of what runs, and of the whole in environment steps."""
        for cell in running.values():
            log = folder / cell["name"] / "log.txt"
            if cell["state"] == "waiting" and log.exists() and log.stat().st_size > sizes[cell["name"]]:
                cell["state"] = "running"
                bars[cell["name"]] = progress.add_task(cell["name"], completed=fraction(log), total=1.0)
            if cell["name"] in bars:
                progress.update(bars[cell["name"]], completed=fraction(log))
        progress.update(whole, completed=covered(), description=summary())

    def covered() -> float:
        return sum(
            steps(c) * (c["state"] == "done" or fraction(folder / c["name"] / "log.txt")) for c in cells.values()
        )

    def summary() -> str:
        states = [cell["state"] for cell in cells.values()]
        return ", ".join(f"{states.count(s)} {s}" for s in dict.fromkeys(("done", "failed", *states)))

    tries = dict.fromkeys(cells, 0)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), speed_estimate_period=900) as progress:
        whole = progress.add_task(summary(), total=sum(map(steps, cells.values())), completed=covered())
        try:
            for cell in cells.values():
                if cell["state"] != "done":
                    submit(cell)
            while running:
                save(folder, cells)
                for done in ray.wait(list(running), timeout=1.0)[0]:
                    collect(done)
                show()
        except KeyboardInterrupt as e:
            progress.print(f"interrupted; waiting for the scripts to save. Go on with --resume {args.folder}")
            stop_tasks(ray, list(running))
            for cell in running.values():
                cell["state"] = "interrupted"
                cell["runs"] = [str(run.relative_to(folder)) for run in run_folders(folder / cell["name"])]
            return 128 + (e.args[0] if e.args else signal.SIGINT)
        finally:
            save(folder, cells)
            ray.shutdown()
    for cell in (cell for cell in cells.values() if cell["state"] == "failed"):
        last, log = cell["attempts"][-1], folder / cell["name"] / "log.txt"
        print(f"\nfailed: {cell['name']}, exit code {last['exit']}, end of {log}:")
        print("\n".join(f"    {line}" for line in tail(log).splitlines()[-15:]) if log.exists() else last["error"])
    print(f"\n{summary()}. The page: python -m benchmark.report {args.folder} --out {args.folder}/report")
    return 1 if any(cell["state"] == "failed" for cell in cells.values()) else 0


def main(args: Args) -> int:
    """Returns the exit code. Raises UserError."""
    if args.cpus <= 0 or args.gpus < 0 or args.retries < 0:
        raise UserError("--cpus must be positive, --gpus and --retries not negative")
    folder, cells = args.folder.resolve(), grid(args)
    manifest = folder / "grid.json"
    if manifest.exists() and not args.resume:
        raise UserError(f"{args.folder} has a grid: --resume goes on with it")
    if manifest.exists():
        old = {cell["name"]: cell for cell in json.loads(manifest.read_text())["cells"]}
        cells = merge(old, cells)
    if not cells:
        raise UserError(f"nothing to run: {args.folder} has no grid, and there is no --preset and no --scripts")
    left = [cell for cell in cells.values() if cell["state"] != "done"]
    print(f"to run: {estimate(left, args.rate)}; done before: {len(cells) - len(left)}", flush=True)
    if args.dry_run:
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` closes the pipe
        print("\n".join(f"{cell['state']:12}{cell['name']} {shlex.join(cell['flags'])}" for cell in cells.values()))
        return 0
    if not left:
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
