"""One page about runs: learning curves beside the paper's, final and aggregate scores with intervals.

    python -m benchmark.report runs/paper --out runs/paper/report
    python -m benchmark.report benchmark/results/hopper_meow.csv runs/Hopper-v4__* --out report
    python -m benchmark.report runs/paper --export benchmark/results/NAME.csv      # the evaluations as one CSV

Reads folders of benchmark.run, run folders, folders of run folders, and exported CSVs. The algorithm of a run is the
word of the script in its command, its task is --env-id, and the other flags make a variant of the algorithm (but not
--seed, --total-timesteps and the like: PLAIN). Flags that all runs share are said once. A run is set beside the paper's
curve of the same flags: figure 3's of none, figure 6's of its two ablations.
Writes index.html, which holds everything and opens from disk, and its pictures as PNG; prints the tables as Markdown.
CSV: step, return (mean of the evaluation episodes), SPS, seed, commit, machine, command, one row an evaluation.

Intervals are rliable's: 95%, percentiles of a bootstrap over seeds, stratified by task. One seed has none.
"""

import base64
import dataclasses
import html
import itertools
import json
import re
import shlex
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import tyro
from rliable import library, metrics

from benchmark import (
    NAMES,
    UserError,
    colors,
    exit_code,
    markdown,
    panels,
    read_csv,
    save_picture,
    scalars,
    word_of,
    write_csv,
)
from benchmark.run import run_folders

COLUMNS = ["step", "return", "SPS", "seed", "commit", "machine", "command"]
PLAIN = "env-id seed exp-name total-timesteps total-steps device compile torch-deterministic track capture-video resume"
PLAIN = {*PLAIN.split(), "eval-frequency", "eval-episodes", "checkpoint-frequency"}
PLAIN |= {*"num-seeds async-envs checkpoint-minutes debug wandb-project-name wandb-entity".split()}  # of older commits
PAPER = "MEow paper figure 3 (digitised)"
ABLATION = "MEow paper figure 6 ablation (digitised)"
ABLATIONS = {frozenset({"no-reward-shift"}): "MEow vanilla", frozenset({"no-clipped-double-q"}): "MEow LRS only"}
TEN_SEEDS = "SimbaV2 repository, results/baseline"
LAST = 5  # evaluations behind a final score
# How often the interval holds the mean of normal returns in %, by the number of seeds (a test simulates it)
COVERAGE = {2: 50, 3: 75, 5: 84, 10: 89}


@dataclasses.dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]]  # folders of grids or runs, and exported CSVs
    out: Path | None = None  # folder to write index.html and the pictures to
    export: Path | None = None  # CSV to write the evaluations of all runs to
    reps: int = 2000  # bootstrap samples


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
    while words and not words[0].endswith((".py", "benchmark.sb3")):
        words.pop(0)
    if not words or not all(word.startswith("--") for word in words[1:2]):
        raise UserError(f"not the command of a script: {command}")
    flags, word = {}, word_of(words[0].replace("benchmark.sb3", "sb3.py"))
    for each in words[1:]:
        if each.startswith("--"):
            name, equals, value = each[2:].partition("=")
            flags[name := name.replace("_", "-")] = [value] if equals else []
        else:
            flags[name].append(each)
    word = f"sb3:{' '.join(flags.pop('algo', ['sac']))}" if word == "sb3" else word
    own = {" ".join([name, *values]) for name, values in flags.items() if name.removeprefix("no-") not in PLAIN}
    return NAMES.get(word, word), " ".join(flags.get("env-id", ["Hopper-v4"])), frozenset(own)


def curve(run: Path) -> list[dict]:
    """Rows of the CSV from the run's TensorBoard events and args.json, none before its first evaluation. SPS is the
    last one logged before."""
    facts, speeds = json.loads((run / "args.json").read_text()), scalars(run, "charts/SPS")
    script, *flags = shlex.split(facts["command"])
    about = dict(seed=facts["args"]["seed"], commit=facts["commit"], machine=facts["machine"])
    about["command"] = shlex.join([Path(script).name, *flags])  # wherever the script lay
    rows = []
    for event in scalars(run, "eval/episodic_return"):
        sps = next((s.value for s in reversed(speeds) if s.step <= event.step), float("nan"))
        rows.append({"step": event.step, "return": round(event.value, 2), "SPS": round(sps, 1)} | about)
    return rows


def folders_of(path: Path) -> list[Path]:
    """Run folders of a grid, of one that still runs too, or below a folder, without what a grid set aside."""
    if (path / "grid.json").exists():
        cells = json.loads((path / "grid.json").read_text())["cells"]
        return [run for cell in cells for run in run_folders(path / cell["name"])]
    found = (file.parent for file in path.rglob("args.json"))
    return sorted(run for run in found if not re.search("/abandoned-[0-9]+/", str(run)))


def run_rows(path: Path) -> dict[str, list[dict]]:
    """Where from -> rows of a run, for a CSV or a folder. Raises UserError."""
    if path.is_file():
        rows, found = read_csv(path), defaultdict(list)
        if not rows or not set(COLUMNS) <= set(rows[0]):
            raise UserError(f"{path}: not an exported CSV, with the columns {', '.join(COLUMNS)}")
        for row in rows:
            found[f"{path}: {row['command']}, seed {row['seed']}, commit {row['commit']}"].append(row)
        return found
    if not (folders := folders_of(path)):
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
    key = lambda r: (rank.index(r.algorithm) if r.algorithm in rank else 99, r.method, r.env_id, r.seed)  # noqa: E731
    return sorted(runs.values(), key=key), sorted(shared), left_out


def references() -> dict[tuple[str, str, str], dict[int, float]]:
    """(source, algorithm, task) -> step -> return."""
    curves = defaultdict(dict)
    for row in read_csv(Path(__file__).parent / "reference" / "learning_curves.csv"):
        curves[row["source"], row["algorithm"], row["env_id"]][int(row["step"])] = float(row["mean_return"])
    return curves


def references_of(run: Run, curves: dict) -> dict[str, dict[int, float]]:
    """Source -> its curve for the run's algorithm, flags and task; a v5 id is compared with v4."""
    full = None if run.flags else run.algorithm.removeprefix("SB3 ")
    keys = {PAPER: full, ABLATION: ABLATIONS.get(run.flags) if run.algorithm == "MEow" else None, TEN_SEEDS: full}
    env_id = re.sub("-v5$", "-v4", run.env_id)
    return {source: curves[source, name, env_id] for source, name in keys.items() if (source, name, env_id) in curves}


def interval(scores, func, reps: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Estimate (K,) and its interval (2, K), None for one seed, of func over (seeds, tasks, ...) or a list of such."""
    arrays = scores if isinstance(scores, list) else [scores]
    if min(len(array) for array in arrays) < 2:
        return func(*arrays), None
    np.random.seed(0)  # rliable draws from the global generator, whatever generator it is given
    points, intervals = library.get_interval_estimates({"": scores}, func, reps=reps)
    return points[""], intervals[""]


def by(runs: list[Run], key: str) -> dict[str, list[Run]]:
    groups = defaultdict(list)
    for run in runs:
        groups[getattr(run, key)].append(run)
    return groups


def number(x: float) -> str:
    return "" if np.isnan(x) else f"{x:.0f}" if abs(x) >= 100 else f"{x:.2f}"


def span(ends: np.ndarray | None, form=number) -> str:
    return "one seed" if ends is None else f"{form(ends[0])} to {form(ends[1])}"


class Page:
    """HTML in pieces, the tables' Markdown on stdout, the pictures as files and inside the page."""

    def __init__(self, out: Path):
        self.out, self.parts = out, []
        out.mkdir(parents=True, exist_ok=True)

    def text(self, text: str, tag: str = "p") -> None:
        self.parts.append(f"<{tag}>{html.escape(text)}</{tag}>")

    def table(self, rows: list[dict]) -> None:
        cell = "".join
        head = cell(f"<th tabindex=0>{html.escape(name)}</th>" for name in rows[0])
        body = cell(f"<tr>{cell(f'<td>{html.escape(str(v))}</td>' for v in row.values())}</tr>\n" for row in rows)
        self.parts.append(f"<div><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>")
        print(markdown(rows) + "\n")

    def picture(self, figure, name: str, alt: str) -> None:
        path = self.out / (re.sub(r"[^\w.-]", "_", name) + ".png")
        save_picture(figure, path)
        data = base64.b64encode(path.read_bytes()).decode()
        self.parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')

    def write(self, title: str) -> None:
        page = (Path(__file__).parent / "report.html").read_text()
        page = page.replace("{{title}}", html.escape(title)).replace("{{body}}", "\n".join(self.parts))
        (self.out / "index.html").write_text(page)


def learning_curves(page: Page, name: str, env_id: str, runs: list[Run], curves: dict, reps: int) -> None:
    """Picture of one task: each run, each method's mean over the steps that all its seeds have, its references."""
    figure, ((ax,),) = panels(size=(10, 4))
    end, methods = max(max(run.returns) for run in runs), by(runs, "method")
    color = colors(methods)
    for method, own in methods.items():
        for run in own:
            ax.plot(*zip(*run.returns.items(), strict=True), color=color[method], linewidth=0.5, alpha=0.6)
        steps = sorted(set.intersection(*(set(run.returns) for run in own)))
        if steps:
            scores = np.array([[[run.returns[step] for step in steps]] for run in own])  # (seeds, 1, steps)
            mean, ends = interval(scores, lambda x: x.mean((0, 1)), reps)
            ax.plot(steps, np.ravel(mean), color=color[method], linewidth=2, label=f"{method}, {len(own)} seeds")
            if ends is not None:
                ax.fill_between(steps, *ends, color=color[method], alpha=0.2)
        for source, reference in references_of(own[0], curves).items():
            shown = {step: value for step, value in reference.items() if step <= 1.2 * end}
            style, label = (":", "10 seeds, SimbaV2") if source == TEN_SEEDS else ("--", "paper")
            if shown:
                ax.plot(*zip(*shown.items(), strict=True), style, color=color[method], label=f"{method}, {label}")
    ax.set(title=env_id, xlabel="environment steps", ylabel="evaluation return")
    page.picture(figure, f"{name}_{env_id}", f"Learning curves on {env_id}")


def final_table(page: Page, runs: list[Run], curves: dict, reps: int) -> None:
    rows = []
    for env_id, on_task in by(runs, "env_id").items():
        step = min(max(run.returns) for run in on_task)
        for method, own in by(on_task, "method").items():
            scores = np.array([[run.score(step)] for run in own])
            mean, ends = interval(scores, lambda x: np.array([x.mean(), np.median(x)]), reps)
            row = dict(task=env_id, method=method, seeds=len(own), step=step, mean=number(mean[0]))
            row |= {"95% interval": span(None if ends is None else ends[:, 0]), "median": number(mean[1])}
            row |= {"each seed": " / ".join(number(x) for x in scores[:, 0])}
            best = max(value for run in own for at, value in run.returns.items() if at <= step)
            row |= {"best evaluation": number(best)}
            paper = next(iter(references_of(own[0], curves).values()), {})
            inside = paper and min(paper) <= step <= max(paper)
            row |= {"paper there": number(np.interp(step, [*paper], [*paper.values()])) if inside else ""}
            rows.append(row | {"paper's end": f"{number(paper[max(paper)])} ({max(paper)})" if paper else ""})
    page.text("Final scores", "h3")
    page.text(
        f"Mean of the last {LAST} evaluations up to the step that all runs of the task have reached; over seeds, its "
        "mean with the interval and its median. The paper's return there is that of its curve at this step, between "
        "two points a line; its end is the curve's last point, with its step."
    )
    page.table(rows)


def aggregates(page: Page, name: str, runs: list[Run], curves: dict, reps: int) -> None:
    """Interquartile mean over the tasks of the paper, table and picture."""
    full = dict(algorithm="MEow", flags=frozenset())
    scale = {run.env_id: references_of(dataclasses.replace(run, **full), curves).get(PAPER) for run in runs}
    methods = {m: by([r for r in own if scale[r.env_id]], "env_id") for m, own in by(runs, "method").items()}
    methods = {method: own for method, own in methods.items() if own}
    tasks = [env_id for env_id in scale if methods and all(env_id in own for own in methods.values())]
    page.text("Aggregate scores", "h3")
    if not tasks:
        return page.text("None: they are over tasks of the paper's figure 3 that all methods have which have any.")
    scale = {env_id: scale[env_id][max(scale[env_id])] for env_id in tasks}
    n = min(len(own[env_id]) for own in methods.values() for env_id in tasks)
    last = {t: min(max(run.returns) for own in methods.values() for run in own[t]) for t in tasks}
    ends = ", ".join(f"{env_id} {scale[env_id]:.0f}, scored at step {last[env_id]}" for env_id in tasks)
    page.text(
        "A score is the final score of the table above divided by the return that the paper's MEow ends with (the last "
        f"point of its curve in figure 3): {ends}. So 1 is the paper's final MEow. Of each method and task the first "
        f"{n} seeds count, the fewest that one has. IQM: mean of the middle half of the scores. Optimality gap: mean "
        "shortfall from 1."
    )
    rows, color = [], colors(methods)
    figure, ((ax,),) = panels(size=(10, 0.8 + 0.3 * len(methods)))
    for method, own in methods.items():
        scores = np.array([[run.score(last[t]) / scale[t] for run in own[t][:n]] for t in tasks]).T  # (seeds, tasks)
        func = lambda x: np.array([metrics.aggregate_iqm(x), metrics.aggregate_optimality_gap(x)])  # noqa: E731
        point, ends = interval(scores, func, reps)
        row = dict(method=method, seeds=n, tasks=len(tasks))
        for k, head in enumerate(("IQM", "optimality gap")):
            row[head] = f"{point[k]:.3f} ({span(None if ends is None else ends[:, k], '{:.3f}'.format)})"
        rows.append(row)
        ax.plot(point[0], method, "o", color=color[method])
        if ends is not None:
            ax.plot(ends[:, 0], [method] * 2, color=color[method], linewidth=4, alpha=0.5)
    ax.invert_yaxis()
    ax.set(xlabel="IQM of the scores with 95% interval; 1 is the paper's final MEow")
    page.table(rows)
    page.picture(figure, f"{name}_aggregates", "Aggregate scores with intervals")


def list_runs(page: Page, runs: list[Run]) -> None:
    page.text("Runs", "h2")
    rows = []
    for run in runs:
        row = dict(method=run.method, task=run.env_id, seed=run.seed, steps=max(run.returns), evaluations=len(run.rows))
        sps = float(run.rows[-1]["SPS"])
        row |= {"last return": number(list(run.returns.values())[-1]), "SPS": number(sps)}
        row |= {"hours": number(max(run.returns) / sps / 3600)}
        rows.append(row | {key: run.rows[-1][key] for key in COLUMNS[4:]} | dict(source=run.source))
    page.table(rows)


def main(args: Args) -> None:
    """Raises UserError."""
    if args.reps < 1 or not (args.out or args.export):
        raise UserError("--out, --export or both must be given" if args.reps > 0 else "--reps must be positive")
    runs, shared, left_out = load(args.paths)
    if args.export is not None:
        write_csv(args.export, ({key: row[key] for key in COLUMNS} for run in runs for row in run.rows), COLUMNS)
        print(f"{len(runs)} runs: {args.export}")
    if args.out is None:
        return
    curves, page, title = references(), Page(args.out), "MEow: runs beside the paper"
    page.text(title, "h1")
    covers = ", ".join(f"{share}% with {n} seeds" for n, share in COVERAGE.items())
    page.text(f"{len(runs)} runs of {', '.join(by(runs, 'method'))} on {', '.join(by(runs, 'env_id'))}.")
    page.text(
        f"Intervals are 95% percentile intervals of a bootstrap over seeds, stratified by task ({args.reps} samples, "
        f"rliable). With few seeds they are too narrow: of normal returns they hold the mean in {covers}. One seed has "
        "no interval. The paper's curves are digitised from its smoothed figures."
    )
    if shared:
        page.text(f"All runs have the flags {'; '.join(shared)}, which are not in their names below.")
    for line in left_out:
        page.text(f"Left out: {line}.")
    groups = {"Algorithms": [run for run in runs if not run.variant]}
    groups |= {f"Variants of {a}": own for a, own in by(runs, "algorithm").items() if any(run.variant for run in own)}
    for name, own in ((name, own) for name, own in groups.items() if own):
        page.text(name, "h2")
        for env_id, on_task in by(own, "env_id").items():
            page.text(env_id, "h3")
            learning_curves(page, name.replace(" ", "_").lower(), env_id, on_task, curves, args.reps)
        final_table(page, own, curves, args.reps)
        aggregates(page, name.replace(" ", "_").lower(), own, curves, args.reps)
    list_runs(page, runs)
    page.text(f"Made by: python -m benchmark.report {shlex.join(map(str, args.paths))}", "footer")
    page.write(title)
    print(f"{len(runs)} runs: {args.out / 'index.html'}")


if __name__ == "__main__":
    sys.exit(exit_code(main, Args, __doc__))
