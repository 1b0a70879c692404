"""Runs read from folders and CSVs, the references' curves, and intervals by rliable: what benchmark.report prints.

What a run is, is read off its command: the algorithm is the script's word, the task is --env-id, and the other
flags make a variant of the algorithm, apart from PLAIN, which change no algorithm, and those that all runs share. The
references are for runs without such flags, shared or not, but for the ablations'.
"""

import csv
import dataclasses
import itertools
import json
import re
import shlex
from collections import defaultdict
from pathlib import Path

import numpy as np
from rliable import library

from benchmark.export import REFERENCE, curve
from benchmark.grids import UserError, run_folders, word_of

COLUMNS = ["step", "return", "SPS", "seed", "commit", "machine", "command"]
NAMES = {"meow": "MEow", "meow-mixture": "MEow mixture", "sac": "SAC", "sql": "SQL", "s2ac": "S2AC"}
PLAIN = "env-id seed exp-name total-timesteps total-steps device compile torch-deterministic track capture-video resume"
PLAIN = {*PLAIN.split(), "eval-frequency", "eval-episodes", "checkpoint-frequency"}
PLAIN |= {*"num-seeds async-envs checkpoint-minutes debug wandb-project-name wandb-entity".split()}  # of older commits
PAPER = "MEow paper figure 3 (digitised)"
ABLATION = "MEow paper figure 6 ablation (digitised)"
ABLATIONS = {frozenset({"no-reward-shift"}): "MEow vanilla", frozenset({"no-clipped-double-q"}): "MEow LRS only"}
TEN_SEEDS = "SimbaV2 repository, results/baseline"
LAST = 5  # evaluations behind a final score


@dataclasses.dataclass
class Run:
    algorithm: str
    env_id: str
    flags: frozenset[str]
    seed: int
    rows: list[dict]  # as in a CSV, one an evaluation, in the order of the steps
    source: str
    variant: str = ""

    @property
    def method(self) -> str:
        return f"{self.algorithm} {self.variant}".strip()

    @property
    def returns(self) -> dict[int, float]:
        return {int(row["step"]): float(row["return"]) for row in self.rows}

    def score(self, step: int) -> float:
        """Mean of the last evaluations up to the step."""
        return float(np.mean([value for at, value in sorted(self.returns.items()) if at <= step][-LAST:]))


def describe(command: str) -> tuple[str, str, frozenset[str]]:
    """(algorithm, task, its other flags) of a script's command line. Raises UserError."""
    words = shlex.split(command)
    while words and not words[0].endswith(".py"):
        words.pop(0)
    if not words or not all(word.startswith("--") for word in words[1:2]):
        raise UserError(f"not the command of a script: {command}")
    flags, algorithm = {}, word_of(words[0])
    for word in words[1:]:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            flags[name := name.replace("_", "-")] = [value] if equals else []
        else:
            flags[name].append(word)
    own = {" ".join([name, *values]) for name, values in flags.items() if name.removeprefix("no-") not in PLAIN}
    return NAMES.get(algorithm, algorithm), " ".join(flags.get("env-id", ["Hopper-v4"])), frozenset(own)


def run_rows(path: Path) -> dict[str, list[dict]]:
    """Where from -> rows of a run, for a CSV or a folder. Raises UserError."""
    if path.is_file():
        with open(path, newline="") as f:
            rows = list(csv.DictReader(f))
        if not rows or list(rows[0]) != COLUMNS:
            raise UserError(f"{path}: not a CSV of benchmark.export, with the columns {', '.join(COLUMNS)}")
        found = defaultdict(list)
        for row in rows:
            found[f"{path}: {row['command']}, seed {row['seed']}, commit {row['commit']}"].append(row)
        return found
    if (path / "grid.json").exists():
        folders = []
        for cell in json.loads((path / "grid.json").read_text())["cells"]:  # of one that still runs, what lies there
            folders += [path / run for run in cell["runs"]] or run_folders(path / cell["name"])
    else:
        found = (file.parent for file in path.rglob("args.json"))
        folders = sorted(run for run in found if not re.search("/abandoned-[0-9]+/", str(run)))  # of benchmark.run
    if not folders:
        raise UserError(f"{path}: no CSV, no grid and no run in it")
    return {str(folder): curve(folder) for folder in folders}


def load(paths: tuple[Path, ...]) -> tuple[list[Run], list[str], list[str]]:
    """The runs, the flags that all of them share, and what was left out: runs without an evaluation, and of two with
    the same algorithm, task, flags and seed the shorter one. Raises UserError."""
    runs, left_out = {}, []
    for source, rows in itertools.chain.from_iterable(run_rows(path).items() for path in paths):
        if not rows:
            left_out.append(f"{source} (no evaluation yet)")
            continue
        rows = sorted({int(row["step"]): row for row in rows}.values(), key=lambda row: int(row["step"]))
        run = Run(*describe(rows[0]["command"]), int(rows[0]["seed"]), rows, source)
        key = (run.algorithm, run.env_id, run.flags, run.seed)
        shorter, longer = sorted((runs.get(key, run), run), key=lambda r: int(r.rows[-1]["step"]))
        runs[key] = longer
        left_out += [f"{shorter.source} (same run as {longer.source})"] if shorter is not longer else []
    if not runs:
        raise UserError("no run has an evaluation")
    shared = frozenset.intersection(*(run.flags for run in runs.values()))
    for run in runs.values():
        run.variant = ", ".join(sorted(run.flags - shared))
    rank = [*NAMES.values()]
    key = lambda r: (rank.index(r.algorithm) if r.algorithm in rank else 9, r.method, r.env_id, r.seed)  # noqa: E731
    return sorted(runs.values(), key=key), sorted(shared), left_out


def references() -> dict[tuple[str, str, str], dict[int, float]]:
    """(source, algorithm, task) -> step -> return."""
    curves = defaultdict(dict)
    with open(REFERENCE, newline="") as f:
        for row in csv.DictReader(f):
            curves[row["source"], row["algorithm"], row["env_id"]][int(row["step"])] = float(row["mean_return"])
    return curves


def references_of(run: Run, curves: dict) -> dict[str, dict[int, float]]:
    """Source -> its curve for the run's algorithm, flags and task; a v5 id is compared with v4."""
    full = None if run.flags else run.algorithm
    keys = {PAPER: full, ABLATION: ABLATIONS.get(run.flags) if run.algorithm == "MEow" else None, TEN_SEEDS: full}
    env_id = run.env_id.removesuffix("-v5") + "-v4" if run.env_id.endswith("-v5") else run.env_id
    return {source: curves[source, name, env_id] for source, name in keys.items() if (source, name, env_id) in curves}


def interval(scores, func, reps: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Estimate (K,) and its interval (2, K), None for one seed, of func over (seeds, tasks, ...) or a list of such."""
    arrays = scores if isinstance(scores, list) else [scores]
    if min(len(array) for array in arrays) < 2:
        return func(*arrays), None
    np.random.seed(0)  # rliable draws from the global generator, whatever generator it is given
    points, intervals = library.get_interval_estimates({"": scores}, func, reps=reps)
    return points[""], intervals[""]


def mean_curve(runs: list[Run], reps: int) -> dict[int, tuple[int, float, float, float]]:
    """Step -> (seeds that have it, their mean return, low and high end of its interval or nan)."""
    steps = defaultdict(list)  # which runs have a step -> steps
    for step in sorted({step for run in runs for step in run.returns}):
        steps[tuple(i for i, run in enumerate(runs) if step in run.returns)].append(step)
    curve = {}
    for who, at in steps.items():
        scores = np.array([[[runs[i].returns[step] for step in at]] for i in who])  # (seeds, 1, steps)
        mean, ends = interval(scores, lambda x: x.mean((0, 1)), reps)
        ends = np.full((2, len(at)), np.nan) if ends is None else ends
        curve |= {s: (len(who), *map(float, v)) for s, *v in zip(at, mean, *ends, strict=True)}
    return dict(sorted(curve.items()))


def by(runs: list[Run], key: str) -> dict[str, list[Run]]:
    groups = defaultdict(list)
    for run in runs:
        groups[getattr(run, key)].append(run)
    return groups
