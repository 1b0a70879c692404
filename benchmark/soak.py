"""A long run watched at every checkpoint: memory, open files, and the time that checkpoints take.

    python -m benchmark.soak --csv benchmark/results/soak.csv

trains one script on Pendulum-v1 for 200,000 steps with a checkpoint every 5,000, and prints how much the resident
memory grew after --settled steps, the numbers of open files, and the checkpoints' share of the wall time (flush of the
replay buffer's file, copies, checksums, write, fsync). Exit code 1 if memory grew by 2% or more, files were left open,
or checkpoints took 1% or more. The run goes to a temporary folder.
"""

import dataclasses
import importlib
import os
import shlex
import sys
import tempfile
import time
from pathlib import Path

import psutil
import tyro

from benchmark import write_csv

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass
class Args:
    script: str = "meow"
    """first word of the script"""
    flags: str = "--env-id Pendulum-v1 --total-timesteps 200000 --checkpoint-frequency 5000 --device cpu"
    """its flags"""
    settled: int = 20_000
    """environment steps after which memory is not to grow"""
    csv: Path | None = None
    """table to write, a row a checkpoint"""


def watch(module, flags: list[str]) -> list[dict]:
    """Train in this process. A row for each checkpoint: step, memory, open files, seconds of it and since the start."""
    rows, process, began = [], psutil.Process(), []
    flush, save_checkpoint, start = module.ReplayBuffer.flush, module.save_checkpoint, time.perf_counter()

    def timed_flush(buffer) -> None:  # the first thing that a save does
        began.append(time.perf_counter())
        flush(buffer)

    def timed_save(path: Path, checkpoint: dict) -> None:
        save_checkpoint(path, checkpoint)
        now = time.perf_counter()
        row = dict(step=checkpoint["global_step"], file=path.name, rss_mb=round(process.memory_info().rss / 1e6, 2))
        row |= dict(open_files=process.num_fds(), checkpoint_s=round(now - began[-1], 4), wall_s=round(now - start, 1))
        rows.append(row)

    module.ReplayBuffer.flush, module.save_checkpoint = timed_flush, timed_save
    try:
        module.train(module.parse_args(flags))
    finally:
        module.ReplayBuffer.flush, module.save_checkpoint = flush, save_checkpoint
    return rows


def verdict(rows: list[dict], settled: int) -> tuple[str, bool]:
    """What the rows say, in one line, and whether it is well. The last row is the end of the run."""
    later = [row for row in rows if row["step"] >= settled]
    memory, files = [row["rss_mb"] for row in later], {row["open_files"] for row in later}
    growth = max(memory) / memory[0] - 1
    share = sum(row["checkpoint_s"] for row in rows) / rows[-1]["wall_s"]
    line = f"{len(rows)} checkpoints in {rows[-1]['wall_s']:.0f} s: memory {memory[0]:.0f} MB after {settled} steps, "
    line += (
        f"later at most {growth:+.2%}; open files {min(files)} to {max(files)}; checkpoints {share:.3%} of the time, "
    )
    line += f"the longest {max(row['checkpoint_s'] for row in rows):.2f} s"
    return line, growth < 0.02 and len(files) == 1 and share < 0.01


def main(args: Args) -> None:
    sys.path.insert(0, str(ROOT))
    module = importlib.import_module(f"{args.script}_continuous_action")
    out, began_in = args.csv and args.csv.resolve(), os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        rows = watch(module, shlex.split(args.flags))
        os.chdir(began_in)
    if out:
        facts = dict(commit=module.commit(), command=f"python -m benchmark.soak {shlex.join(sys.argv[1:])}")
        write_csv(out, (row | facts for row in rows))
    line, well = verdict(rows, args.settled)
    print(line)
    sys.exit(0 if well else 1)


if __name__ == "__main__":
    main(tyro.cli(Args))
