"""One row for each run: its flags, its returns on the way and how fast it was. For a search that is written down.

    python -m benchmark.studies.trials runs/RUN ... --csv benchmark/results/beyond.csv

A run that is in the CSV already, by task, command and commit, is replaced. What a run had not reached is empty.
"""

import dataclasses
import json
from pathlib import Path

import numpy as np
import tyro

from benchmark import markdown, read_csv, scalars, write_csv


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of runs
    csv: Path = Path("runs/trials.csv")  # table to write
    steps: tuple[int, ...] = (20_000, 50_000, 100_000)  # where the return is that of the evaluation


def trial(run: Path, steps: tuple[int, ...]) -> dict:
    facts = json.loads((run / "args.json").read_text())
    curve = {event.step: event.value for event in scalars(run, "eval/episodic_return")}
    row = dict(env_id=facts["args"]["env_id"], seed=facts["args"]["seed"], last_evaluation=max(curve, default=0))
    row |= {f"return_{n}": f"{curve[n]:.0f}" if n in curve else "" for n in steps}
    row["best"] = f"{max(curve.values()):.0f}" if curve else ""
    for name in ("losses/target_values", "policy/entropy"):
        values = [event.value for event in scalars(run, name)[-20:]]  # of the last 2,000 steps
        row[f"last_{name.partition('/')[2]}"] = f"{np.mean(values):.2f}" if values else ""
    sps = [event.value for event in scalars(run, "charts/SPS")]
    row |= dict(SPS=f"{np.median(sps):.0f}" if sps else "", commit=facts["commit"], machine=facts["machine"])
    return row | dict(command=facts["command"])


def main(args: Args) -> None:
    rows = {(row["env_id"], row["command"], row["commit"]): row for row in read_csv(args.csv)}
    for run in args.runs:
        row = trial(run, args.steps)
        rows[row["env_id"], row["command"], row["commit"]] = row
    write_csv(args.csv, [*rows.values()])
    print(markdown([*rows.values()]))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
