"""Time of choosing one action: S2AC's variants, SQL and SAC, beside the paper's relative times.

    python -m benchmark.acting --csv benchmark/results/acting.csv

One state, no GPU, one thread, not compiled; agents as they are initialised, each with its MuJoCo preset. `draw` is
agent.sample(obs), `evaluation` agent.sample(obs, deterministic=True). Batches of calls of all agents are interleaved,
so that a machine that changes its pace does so for all; of each the best batch counts. Relative times are to SAC's.
Printed: a table for docs/results.md.
"""

import dataclasses
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
import tyro

import s2ac_continuous_action as s2ac
import sac_continuous_action as sac
import sql_continuous_action as sql
from benchmark import commit, write_csv

SIZES = {"Hopper-v4": (11, 3), "HalfCheetah-v4": (17, 6), "Ant-v4": (27, 8)}  # (O, D)
PAPER = {"SAC": "1", "SQL": "1.15", "S2AC phi-theta": "4.5 (D = 3) to 8.4 (D = 8)", "S2AC phi-theta-psi": "1.15"}


@dataclasses.dataclass
class Args:
    env_ids: tuple[str, ...] = tuple(SIZES)
    """tasks whose sizes and presets are used"""
    calls: int = 100
    """calls in a batch"""
    repeats: int = 20
    """batches of each agent"""
    csv: Path | None = None
    """table to write, one row an agent and task"""


def agents(env_id: str) -> dict[str, torch.nn.Module]:
    """By name, one of each algorithm and variant."""
    scripts = {"SAC": (sac, []), "SQL": (sql, [])}
    scripts |= {f"S2AC {variant}": (s2ac, ["--variant", variant]) for variant in ("phi", "phi-theta", "phi-theta-psi")}
    return {
        name: script.Agent(*SIZES[env_id], script.parse_args(["--env-id", env_id, "--device", "cpu", *flags]))
        for name, (script, flags) in scripts.items()
    }


@torch.inference_mode()
def milliseconds(found: dict[str, torch.nn.Module], obs: torch.Tensor, args: Args) -> dict[tuple[str, bool], float]:
    """Best batch of each agent, by name and whether deterministic, in ms a call; the first round warms up."""
    times = {(name, deterministic): [] for name in found for deterministic in (False, True)}
    for _ in range(args.repeats + 1):
        for (name, deterministic), batches in times.items():
            start = time.perf_counter()
            for _ in range(args.calls):
                found[name].sample(obs, deterministic)
            batches.append((time.perf_counter() - start) / args.calls * 1e3)
    return {key: min(batches[1:]) for key, batches in times.items()}


def table(rows: list[dict]) -> str:
    """Markdown: a row an agent and task."""
    lines = ["| task | algorithm | draw, ms | of SAC's | evaluation, ms | of SAC's | in the paper |", "|" + "---|" * 7]
    base = {row["env_id"]: row for row in rows if row["algorithm"] == "SAC"}
    for row in rows:
        cells = [row["env_id"], row["algorithm"]]
        for key in ("draw_ms", "evaluation_ms"):
            cells += [row[key], f"{float(row[key]) / float(base[row['env_id']][key]):.2f}"]
        lines.append(f"| {' | '.join(cells)} | {PAPER.get(row['algorithm'], '')} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = f"{platform.machine()}, 1 of {os.cpu_count()} threads, torch {torch.__version__}"
    command = shlex.join(["python", "-m", "benchmark.acting", *sys.argv[1:]])
    rows = []
    for env_id in args.env_ids:
        found = agents(env_id)
        times = milliseconds(found, torch.randn(1, SIZES[env_id][0]), args)
        for name in found:
            row = dict(env_id=env_id, algorithm=name, draw_ms=f"{times[name, False]:.3f}")
            row |= dict(evaluation_ms=f"{times[name, True]:.3f}", commit=commit(), machine=machine, command=command)
            rows.append(row)
    print(table(rows))
    if args.csv is not None:
        write_csv(args.csv, rows)


if __name__ == "__main__":
    main(tyro.cli(Args))
