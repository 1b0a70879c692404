"""Evaluation curves of runs on one task as CSV, and as a picture beside the paper's.

    python -m benchmark.export runs/RUN [runs/RUN ...] --csv benchmark/results/NAME.csv --png benchmark/results/NAME.png

CSV: step, return (mean of the evaluation episodes), SPS, seed, commit, machine, command, one row an evaluation.
The paper's curves are in benchmark/reference/learning_curves.csv (digitised from its figures).
"""

import csv
import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmark import write_csv
from benchmark.grids import UserError, exit_code, word_of

REFERENCE = Path(__file__).parent / "reference" / "learning_curves.csv"


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[list[Path]]
    """folders of the runs"""
    csv: Path
    """file to write"""
    png: Path | None = None
    """picture to write"""


def curve(run: Path) -> list[dict]:
    """Rows of the CSV from the run's TensorBoard events and args.json, none before its first evaluation.

    SPS is the last one logged before.
    """
    events = EventAccumulator(str(run)).Reload()
    facts = json.loads((run / "args.json").read_text())
    tags = ("charts/SPS", "eval/episodic_return")
    speeds, returns = (events.Scalars(tag) if tag in events.Tags()["scalars"] else [] for tag in tags)
    script, *flags = shlex.split(facts["command"])
    command = shlex.join([Path(script).name, *flags])  # wherever the script lay
    rows = []
    for event in returns:
        sps = next((s.value for s in reversed(speeds) if s.step <= event.step), float("nan"))
        about = dict(seed=facts["args"]["seed"], commit=facts["commit"], machine=facts["machine"])
        row = {"step": event.step, "return": round(event.value, 2), "SPS": round(sps, 1)}
        rows.append(row | about | {"command": command})
    return rows


def reference(env_id: str, algorithm: str = "meow") -> list[tuple[int, float]]:
    """(step, return) of the paper's figure 3 for task and script, if it is there; a v5 id is compared with v4."""
    with open(REFERENCE, newline="") as f:
        wanted = ("MEow paper figure 3 (digitised)", algorithm, re.sub(r"-v5$", "-v4", env_id))
        rows = [row for row in csv.DictReader(f) if (row["source"], row["algorithm"].lower(), row["env_id"]) == wanted]
    return [(int(row["step"]), float(row["mean_return"])) for row in rows]


def draw(rows: list[dict], env_id: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6, 4), layout="constrained")
    last = max(row["step"] for row in rows)
    drawn = {}  # script's word -> marker
    for command, seed in dict.fromkeys((row["command"], row["seed"]) for row in rows):  # a line a run
        script = word_of(command.split()[0])
        if script not in drawn:
            drawn[script] = "os^D"[len(drawn) % 4]
            paper = [point for point in reference(env_id, script) if point[0] <= 1.2 * last]
            label = f"{script}, paper, figure 3, mean of 5 seeds, digitised"
            style = dict(color="black", linestyle="--", marker=drawn[script] if len(drawn) > 1 else None, markersize=3)
            if paper:
                ax.plot(*zip(*paper, strict=True), **style, label=label)
        own = [row for row in rows if (row["command"], row["seed"]) == (command, seed)]
        steps, returns = [row["step"] for row in own], [row["return"] for row in own]
        ax.plot(steps, returns, marker=drawn[script], markersize=3, label=f"{script}, seed {seed}")
    ax.set(title=env_id, xlabel="environment steps", ylabel="evaluation return")
    ax.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Args) -> None:
    """Raises UserError."""
    for run in args.runs:
        if not (run / "args.json").is_file():
            raise UserError(f"{run} is not the folder of a run: it has no args.json")
    env_id, *others = {json.loads((run / "args.json").read_text())["args"]["env_id"]: 0 for run in args.runs}
    if others:
        raise UserError(f"the runs are on {', '.join([env_id, *others])}; expected one task: export each on its own")
    rows = [row for run in args.runs for row in curve(run)]
    if not rows:
        raise UserError("no run has an evaluation yet: wait for the first one")
    write_csv(args.csv, rows)
    if args.png is not None:
        draw(rows, env_id, args.png)
    print(f"{env_id}: {len(rows)} evaluations of {len(args.runs)} runs in {args.csv}")


if __name__ == "__main__":
    sys.exit(exit_code(main, Args, __doc__))
