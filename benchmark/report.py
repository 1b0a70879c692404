"""One page about runs: learning curves beside the paper's, final and aggregate scores with intervals, runtimes.

    python -m benchmark.report runs/paper --out runs/paper/report
    python -m benchmark.report benchmark/results/hopper_meow.csv runs/Hopper-v4__* --out report

Reads folders of benchmark.run, run folders, folders of run folders, and CSVs of benchmark.export. The algorithm of a
run is the word of the script in its command, its task is --env-id, and the other flags make a variant of the
algorithm (but not --seed, --total-timesteps and the like: PLAIN in scores.py). Flags that all runs share are said once.
A run is set beside the paper's curve of the same flags: figure 3's of none, figure 6's of its two ablations.
Writes index.html, which holds everything and opens from disk, and its pictures as PNG; prints the tables as Markdown.

Intervals are rliable's: 95%, percentiles of a bootstrap over seeds, stratified by task. One seed has none.
"""

import base64
import dataclasses
import html
import io
import itertools
import shlex
import sys
from pathlib import Path

import numpy as np
import tyro
from rliable import metrics

from benchmark import write_csv
from benchmark.grids import UserError, exit_code
from benchmark.scores import (
    COLUMNS,
    LAST,
    PAPER,
    TEN_SEEDS,
    Run,
    by,
    interval,
    load,
    mean_curve,
    references,
    references_of,
)

# How often the interval holds the mean of normal returns in %, by the number of seeds (a test simulates it)
COVERAGE = {2: 50, 3: 75, 5: 84, 10: 89}


@dataclasses.dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]]
    """folders of grids or runs, and CSVs of benchmark.export"""
    out: Path
    """folder to write index.html and the pictures to"""
    csv: Path | None = None
    """write the evaluations of all runs as one CSV, too, in the form of benchmark.export"""
    reps: int = 2000
    """bootstrap samples"""


def number(x: float) -> str:
    return "" if np.isnan(x) else f"{x:.0f}" if abs(x) >= 100 else f"{x:.2f}"


def span(low: float, high: float) -> str:
    return "one seed" if np.isnan(low) else f"{number(low)} to {number(high)}"


def share(ends: np.ndarray | None) -> str:
    return "one seed" if ends is None else f"{ends[0]:.3f} to {ends[1]:.3f}"


def iqm(x: np.ndarray) -> np.ndarray:
    """Mean of the middle half along the first axis: rliable's aggregate_iqm, without its overhead a sample."""
    cut = len(x) // 4
    return np.partition(x, (cut, len(x) - cut - 1), axis=0)[cut : len(x) - cut].mean(0)


def improvement(x: np.ndarray, y: np.ndarray) -> float:
    """P(x > y) + P(x = y) / 2 of scores (seeds, tasks), mean over tasks: rliable's probability_of_improvement, which
    takes 10 times as long or more for it, since it computes a p-value, too."""
    x, y = x[:, None], y[None]
    return ((x > y) + 0.5 * (x == y)).mean((0, 1)).mean()


class Page:
    """HTML in pieces, the tables' Markdown on stdout, the pictures as files and inside the page."""

    def __init__(self, out: Path):
        self.out, self.parts = out, []
        out.mkdir(parents=True, exist_ok=True)

    def text(self, text: str, tag: str = "p") -> None:
        self.parts.append(f"<{tag}>{html.escape(text)}</{tag}>")

    def table(self, rows: list[dict]) -> None:
        if not rows:
            return
        cell = "".join
        head = cell(f"<th tabindex=0>{html.escape(name)}</th>" for name in rows[0])
        body = cell(f"<tr>{cell(f'<td>{html.escape(str(v))}</td>' for v in row.values())}</tr>\n" for row in rows)
        self.parts.append(f"<div><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>")
        lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)]
        print("\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n")

    def picture(self, figure, name: str, alt: str) -> None:
        import matplotlib.pyplot as plt

        buffer = io.BytesIO()
        figure.savefig(buffer, dpi=120)
        plt.close(figure)
        (self.out / f"{name}.png").write_bytes(buffer.getvalue())
        data = base64.b64encode(buffer.getvalue()).decode()
        self.parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')

    def write(self, title: str) -> None:
        page = (Path(__file__).parent / "report.html").read_text()
        page = page.replace("{{title}}", html.escape(title)).replace("{{body}}", "\n".join(self.parts))
        (self.out / "index.html").write_text(page)


def axes(title: str, xlabel: str, ylabel: str = "", panels: int = 1, height: float = 4.5):
    """A figure and its panels, side by side with a common y axis."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, grid = plt.subplots(1, panels, figsize=(9, height), sharey=True, layout="constrained", squeeze=False)
    figure.suptitle(title)
    figure.supxlabel(xlabel)
    figure.supylabel(ylabel)
    return figure, grid[0]


def draw_estimates(ax, estimates: dict[str, tuple[float, np.ndarray | None]]) -> None:
    """Name -> (estimate, its interval (2,) or None), one below the other."""
    for i, (point, ends) in enumerate(estimates.values()):
        ax.plot(point, i, "o", color=f"C{i}")
        if ends is not None:
            ax.plot(ends, [i, i], color=f"C{i}", linewidth=3, alpha=0.5)
    ax.set_yticks(range(len(estimates)), list(estimates))
    ax.set_ylim(len(estimates) - 0.5, -0.5)


def learning_curves(page: Page, name: str, env_id: str, runs: list[Run], curves: dict, reps: int) -> None:
    """Picture and table of one task: each method beside its references."""
    page.text(env_id, "h3")
    figure, (ax,) = axes(env_id, "environment steps", "evaluation return")
    end, rows = max(max(run.returns) for run in runs), []
    for i, (method, own) in enumerate(by(runs, "method").items()):
        mean, color = mean_curve(own, reps), f"C{i}"
        for run in own:
            ax.plot(*zip(*run.returns.items(), strict=True), color=color, linewidth=0.5, alpha=0.6)
        full = {step: v for step, v in mean.items() if v[0] == len(own)}
        if full:
            label = f"{method}, {len(own)} seeds, mean and 95% interval" if len(own) > 1 else f"{method}, one seed"
            ax.plot(list(full), [v[1] for v in full.values()], color=color, linewidth=2, label=label)
            ax.fill_between(list(full), *zip(*(v[2:] for v in full.values()), strict=True), color=color, alpha=0.2)
        for source, reference in references_of(own[0], curves).items():
            shown = {step: value for step, value in reference.items() if step <= 1.2 * end}
            style = dict(color=color, linestyle=":" if source == TEN_SEEDS else "--")
            if shown:
                ax.plot(list(shown), list(shown.values()), label=f"{method}: {source}", **style)
            for step in sorted(set(mean) & set(reference)):
                n, value, low, high = mean[step]
                there = reference[step]
                row = dict(method=method, step=step, seeds=f"{n} of {len(own)}", ours=number(value))
                row |= {"95% interval": span(low, high), "reference": source, "its return": number(there)}
                place = "below" if there < low else "above" if there > high else "" if np.isnan(low) else "inside"
                rows.append(row | {"difference": number(value - there), "reference, of the interval": place})
    ax.legend(fontsize="small")
    page.picture(figure, f"{name}_{env_id.replace(':', '_').replace('/', '_')}", f"Learning curves on {env_id}")
    if rows:
        page.text("At each step that the runs and a reference have in common, single evaluations of this project:")
    page.table(rows)


def final_table(page: Page, runs: list[Run], curves: dict, reps: int) -> None:
    rows = []
    for env_id, on_task in by(runs, "env_id").items():
        step = min(max(run.returns) for run in on_task)
        for method, own in by(on_task, "method").items():
            scores = np.array([[run.score(step)] for run in own])
            mean, ends = interval(scores, lambda x: np.array([x.mean(), np.median(x)]), reps)
            row = dict(task=env_id, method=method, seeds=len(own), step=step, mean=number(mean[0]))
            row |= {"95% interval": span(np.nan, np.nan) if ends is None else span(*ends[:, 0])}
            row |= {"median": number(mean[1]), "each seed": " / ".join(number(x) for x in scores[:, 0])}
            best = max(value for run in own for at, value in run.returns.items() if at <= step)
            row |= {"best evaluation": number(best)}
            paper = next(iter(references_of(own[0], curves).values()), {})
            rows.append(row | {"paper's end": f"{number(paper[max(paper)])} ({max(paper)})" if paper else ""})
    page.text("Final scores", "h3")
    page.text(
        f"Mean of the last {LAST} evaluations up to the step that all runs of the task have reached; over seeds, its "
        "mean with the interval and its median. The paper's end is the last point of its curve, with its step."
    )
    page.table(rows)


def aggregates(page: Page, name: str, runs: list[Run], curves: dict, reps: int) -> None:
    """Scores over tasks of the paper: IQM and others, sample efficiency, probability of improvement."""
    full = dict(algorithm="MEow", flags=frozenset())
    scale = {run.env_id: references_of(dataclasses.replace(run, **full), curves) for run in runs}
    methods = {m: by([r for r in own if PAPER in scale[r.env_id]], "env_id") for m, own in by(runs, "method").items()}
    methods = {method: own for method, own in methods.items() if own}
    tasks = [env_id for env_id in scale if methods and all(env_id in own for own in methods.values())]
    page.text("Aggregate scores", "h3")
    if not tasks:
        return page.text("None: they are over tasks of the paper's figure 3 that all methods have which have any.")
    scale = {env_id: scale[env_id][PAPER][max(scale[env_id][PAPER])] for env_id in tasks}
    n = min(len(own[env_id]) for own in methods.values() for env_id in tasks)
    chosen = {method: [own[env_id][:n] for env_id in tasks] for method, own in methods.items()}
    on_task = {env_id: [run for own in methods.values() for run in own[env_id]] for env_id in tasks}
    last = {env_id: min(max(run.returns) for run in on_task[env_id]) for env_id in tasks}
    ends = ", ".join(f"{env_id} {scale[env_id]:.0f}, scored at step {last[env_id]}" for env_id in tasks)
    page.text(
        "A score is the final score of the table above divided by the return that the paper's MEow ends with (the last "
        f"point of its curve in figure 3): {ends}. So 1 is the paper's final MEow, and 0 a return of 0. Of each method "
        f"and task the first {n} seeds count, the fewest that one has. Methods without such a "
        "task are left out. The optimality gap is the mean shortfall from 1."
    )
    normal = lambda run, step: run.score(step) / scale[run.env_id]  # noqa: E731
    scores = {m: np.array([[normal(r, last[r.env_id]) for r in own] for own in c]).T for m, c in chosen.items()}

    estimators = dict(IQM=lambda x: iqm(x.ravel()), median=metrics.aggregate_median)
    estimators |= {"optimality gap": metrics.aggregate_optimality_gap}
    results = {
        method: interval(x, lambda x: np.array([f(x) for f in estimators.values()]), reps)
        for method, x in scores.items()
    }
    rows, about = [], f"seeds: {n}; tasks: {', '.join(tasks)}"
    figure, panels = axes(f"Scores ({about})", "score; 1 is the paper's final MEow", "", 3, 1.2 + 0.4 * len(results))
    for k, estimator in enumerate(estimators):
        panels[k].set_title(estimator)
        draw_estimates(panels[k], {m: (p[k], None if ends is None else ends[:, k]) for m, (p, ends) in results.items()})
    for method, (point, ends) in results.items():
        row = dict(method=method, seeds=n, tasks=len(tasks))
        for k, estimator in enumerate(estimators):
            row[estimator] = f"{point[k]:.3f} ({share(None if ends is None else ends[:, k])})"
        rows.append(row)
    page.text("Estimates with 95% intervals:")
    page.table(rows)
    page.picture(figure, f"{name}_aggregates", "Aggregate scores with intervals")

    steps = sorted(set.intersection(*(set(run.returns) for c in chosen.values() for own in c for run in own)))
    if steps:
        page.text("Sample efficiency", "h3")
        page.text(f"IQM of the normalised returns of single evaluations, at {len(steps)} steps that all runs have.")
        figure, (ax,) = axes(f"Sample efficiency ({about})", "environment steps", "IQM of scores")
        for method, c in chosen.items():
            x = np.array([[[r.returns[s] / scale[r.env_id] for s in steps] for r in own] for own in c])  # (tasks, n, S)
            point, ends = interval(x.swapaxes(0, 1), lambda x: iqm(x.reshape(-1, x.shape[-1])), reps)
            (line,) = ax.plot(steps, point, marker=".", label=method)
            if ends is not None:
                ax.fill_between(steps, *ends, color=line.get_color(), alpha=0.2)
        ax.legend()
        page.picture(figure, f"{name}_sample_efficiency", "Sample efficiency")

    pairs = {}
    for a, b in itertools.combinations(scores, 2):
        both = [scores[a], scores[b]]
        point, ends = interval(both, lambda *x: np.array([improvement(*x)]), reps)
        pairs[f"P({a} > {b})"] = (point[0], None if ends is None else ends[:, 0])
    if pairs:
        page.text("Probability of improvement", "h3")
        page.text(
            f"That a run of the first method beats one of the second, mean over tasks ({about}). Where every run beats "
            "every other, a bootstrap knows of nothing else, and its interval has no width."
        )
        page.table([{"of": p, "estimate": f"{x:.3f}", "95% interval": share(ends)} for p, (x, ends) in pairs.items()])
        figure, (ax,) = axes("Probability of improvement", "probability", "", 1, 1 + 0.3 * len(pairs))
        ax.axvline(0.5, color="gray", linewidth=0.5)
        draw_estimates(ax, pairs)
        page.picture(figure, f"{name}_improvement", "Probability of improvement")


def runtimes(page: Page, runs: list[Run]) -> None:
    rows = []
    key = lambda run: (run.method, run.env_id, run.rows[-1]["machine"])  # noqa: E731
    for (method, env_id, machine), own in itertools.groupby(sorted(runs, key=key), key):
        own = list(own)
        sps = np.array([float(run.rows[-1]["SPS"]) for run in own])
        hours = sum(max(run.returns) / x for run, x in zip(own, sps, strict=True)) / 3600
        row = dict(method=method, task=env_id, machine=machine, runs=len(own), SPS=number(float(np.median(sps))))
        row |= {"lowest": number(sps.min()), "highest": number(sps.max()), "hours in all": number(hours)}
        rows.append(row)
    page.text("Runtimes", "h2")
    page.text("SPS: environment steps a second since the start of the run, at its last evaluation; median over runs.")
    page.table(rows)
    page.text("Runs", "h2")
    rows = []
    for run in runs:
        row = dict(method=run.method, task=run.env_id, seed=run.seed, steps=max(run.returns), evaluations=len(run.rows))
        row |= {"last return": number(list(run.returns.values())[-1]), "SPS": number(float(run.rows[-1]["SPS"]))}
        rows.append(
            row | {key: run.rows[-1][key] for key in ("commit", "machine", "command")} | dict(source=run.source)
        )
    page.table(rows)


def main(args: Args) -> None:
    """Raises UserError."""
    if args.reps < 1:
        raise UserError("--reps must be positive")
    runs, shared, left_out = load(args.paths)
    curves, page, title = references(), Page(args.out), "MEow: runs beside the paper"
    page.text(title, "h1")
    tasks, covers = by(runs, "env_id"), ", ".join(f"{share}% with {n} seeds" for n, share in COVERAGE.items())
    page.text(f"{len(runs)} runs of {', '.join(by(runs, 'method'))} on {', '.join(tasks)}.")
    page.text(
        f"Intervals are 95% percentile intervals of a bootstrap over seeds, stratified by task ({args.reps} samples, "
        f"rliable). With few seeds they are too narrow: of normal returns they hold the mean in {covers}. One seed has "
        "no interval. The references are means that count as exact here; the paper's are digitised from its smoothed "
        "figures."
    )
    if shared:
        page.text(
            f"All runs have the flags {'; '.join(shared)}, which are not in their names below. Their references, if "
            "any, have the same flags."
        )
    for line in left_out:
        page.text(f"Left out: {line}.")
    groups = {"Algorithms": [run for run in runs if not run.variant]}
    groups |= {f"Variants of {a}": own for a, own in by(runs, "algorithm").items() if any(run.variant for run in own)}
    for name, own in groups.items():
        if own:
            page.text(name, "h2")
            for env_id, on_task in by(own, "env_id").items():
                learning_curves(page, name.replace(" ", "_").lower(), env_id, on_task, curves, args.reps)
            final_table(page, own, curves, args.reps)
            aggregates(page, name.replace(" ", "_").lower(), own, curves, args.reps)
    runtimes(page, runs)
    page.text(f"Made by: python -m benchmark.report {shlex.join(map(str, args.paths))}", "footer")
    page.write(title)
    if args.csv is not None:
        write_csv(args.csv, (row for run in runs for row in run.rows), COLUMNS)
    print(f"{len(runs)} runs: {args.out / 'index.html'}")


if __name__ == "__main__":
    sys.exit(exit_code(main, Args, __doc__))
