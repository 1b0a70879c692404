"""One page about runs: learning curves beside the paper's, final and aggregate scores with intervals.

    python -m benchmark.report runs/paper benchmark/results/hopper_meow.csv --out runs/report
    python -m benchmark.report runs/paper --export benchmark/results/NAME.csv      # the evaluations as one CSV

Reads folders of benchmark.run, run folders, folders of run folders, and exported CSVs, one row an evaluation. The
command of a run says what it is: the script is the algorithm, --env-id the task, and the other flags, but PLAIN, make a
variant; those that all runs share are said once. A run is set beside the paper's curve of the same flags: figure 3's of
none, figure 6's of its two ablations. Writes index.html, which holds everything and opens from disk, and its pictures
as PNG; prints the tables as Markdown. Intervals are rliable's, of a bootstrap over seeds; one seed has none.
"""

import base64
import dataclasses
import html
import json
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import tyro
from rliable import library, metrics

from benchmark import NAMES, UserError, colors, exit_code, markdown, panels, save_picture, scalars, word_of

COLUMNS = ["step", "return", "SPS", "seed", "commit", "machine", "command"]
PLAIN = "env-id seed exp-name total-timesteps total-steps device compile torch-deterministic track capture-video resume"
OLDER = "num-seeds async-envs checkpoint-minutes jobs debug wandb-project-name wandb-entity"  # of older commits
PLAIN = {*f"{PLAIN} {OLDER} eval-frequency eval-episodes checkpoint-frequency".split()}
PAPER = "MEow paper figure 3 (digitised)"
ABLATION = "MEow paper figure 6 ablation (digitised)"
ABLATIONS = {"no-reward-shift": "MEow vanilla", "no-clipped-double-q": "MEow LRS only"}
TEN_SEEDS = "SimbaV2 repository, results/baseline"
LAST = 5  # evaluations behind a final score


@dataclasses.dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]]  # folders of grids or runs, and exported CSVs
    out: Path | None = None  # folder to write index.html and the pictures to
    export: Path | None = None  # CSV to write the evaluations of all runs to
    reps: int = 2000  # bootstrap samples


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
    default = "ant" if words[0].endswith("_isaacgym.py") else "Hopper-v4"
    own = {" ".join([name, *values]) for name, values in flags.items() if name.removeprefix("no-") not in PLAIN}
    return NAMES.get(word, word), " ".join(flags.get("env-id", [default])), frozenset(own)


def local(command: str) -> str:
    """The command with the script's path in the project, wherever that lay."""
    script, *flags = shlex.split(command)
    return shlex.join([re.search(r"(benchmark/(studies/)?)?[^/]*$", script)[0], *flags])


def curve(run: Path) -> list[dict]:
    """Rows of the CSV from the run's TensorBoard events and args.json. SPS is the last one logged before."""
    facts, speeds = json.loads((run / "args.json").read_text()), scalars(run, "charts/SPS")
    about = dict(seed=facts["args"]["seed"], commit=facts["commit"], machine=facts["machine"])
    about["command"] = local(facts["command"])
    rows = []
    for event in scalars(run, "eval/episodic_return"):
        sps = next((s.value for s in reversed(speeds) if s.step <= event.step), float("nan"))
        rows.append({"step": event.step, "return": round(event.value, 2), "SPS": round(sps, 1)} | about)
    return rows


def folders_of(path: Path) -> list[Path]:
    """Run folders below a folder, of a grid too, without what a grid set aside."""
    found = (file.parent for file in path.rglob("args.json"))
    return sorted(run for run in found if not re.search("/abandoned-[0-9]+/", str(run)))


def rows_of(path: Path) -> pd.DataFrame:
    """Rows of a CSV or of the runs in a folder, with their source. Raises UserError."""
    if path.is_file():
        frame = pd.read_csv(path, dtype=dict(commit=str), keep_default_na=False, na_values=["", "nan"])
        if not {*COLUMNS} <= {*frame}:
            raise UserError(f"{path}: not an exported CSV, with the columns {', '.join(COLUMNS)}")
        return frame[COLUMNS].assign(source=f"{path}, commit " + frame["commit"].astype(str))
    if not (folders := folders_of(path)):
        raise UserError(f"{path}: no CSV, no grid and no run in it")
    rows = [row | dict(source=str(run)) for run in folders for row in curve(run)]
    return pd.DataFrame(rows, columns=[*COLUMNS, "source"])


def load(paths: tuple[Path, ...]) -> tuple[pd.DataFrame, list[str], list[str]]:
    """The evaluations, the flags that all runs share, and what was left out: of two runs with the same algorithm, task,
    flags and seed the shorter one. Raises UserError."""
    rows = pd.concat([rows_of(path) for path in paths], ignore_index=True)
    if rows.empty:
        raise UserError("no run has an evaluation")
    about = {command: describe(command) for command in rows["command"].unique()}
    shared = frozenset.intersection(*(flags for *_, flags in about.values()))
    rows["algorithm"], rows["env_id"] = (rows["command"].map(lambda c, k=k: about[c][k]) for k in (0, 1))
    rows["flags"] = rows["command"].map(lambda c: ", ".join(sorted(about[c][2])))
    rows["variant"] = rows["command"].map(lambda c: ", ".join(sorted(about[c][2] - shared)))
    rows["method"] = (rows["algorithm"] + " " + rows["variant"]).str.strip()
    same, rank = ["method", "env_id", "seed"], {name: i for i, name in enumerate(NAMES.values())}
    longest = rows.groupby(same)["step"].transform("idxmax")
    chosen = rows["source"] == rows["source"][longest].to_numpy()
    left_out = [f"{source} (another run, as long or longer, is here)" for source in rows["source"][~chosen].unique()]
    rows = rows[chosen].drop_duplicates([*same, "step"], keep="last")
    rows = rows.assign(rank=rows["algorithm"].map(lambda name: rank.get(name, 99)))
    return rows.sort_values(["rank", *same, "step"], ignore_index=True), sorted(shared), left_out


def references() -> pd.DataFrame:
    """(source, algorithm, task) -> step -> return."""
    frame = pd.read_csv(Path(__file__).parent / "reference" / "learning_curves.csv")
    return frame.set_index(["source", "algorithm", "env_id", "step"])["mean_return"].sort_index()


def references_of(run: pd.Series, curves: pd.Series) -> dict[str, pd.Series]:
    """Source -> its curve for a row's algorithm, flags and task; a v5 id is compared with v4."""
    full = None if run["flags"] else run["algorithm"].removeprefix("SB3 ")
    keys = {PAPER: full, TEN_SEEDS: full, ABLATION: ABLATIONS.get(run["flags"]) if run["algorithm"] == "MEow" else None}
    keys = {source: (source, name, re.sub("-v5$", "-v4", run["env_id"])) for source, name in keys.items() if name}
    return {source: curves.loc[key] for source, key in keys.items() if key in curves.index.droplevel("step")}


def interval(scores: np.ndarray | tuple, func, reps: int) -> tuple[np.ndarray, np.ndarray]:
    """Estimate (K,) and its interval (2, K), nan for one seed, of func over scores (seeds, tasks, ...), or
    over those of several methods in a tuple."""
    each = scores if isinstance(scores, tuple) else (scores,)
    if min(map(len, each)) < 2:
        return func(*each), np.full((2, len(func(*each))), np.nan)
    np.random.seed(0)  # rliable draws from the global generator, whatever generator it is given
    points, intervals = library.get_interval_estimates({"": scores}, func, reps=reps)
    return points[""], intervals[""]


def number(x: float) -> str:
    return "" if np.isnan(x) else f"{x:.0f}" if abs(x) >= 100 else f"{x:.2f}"


def span(ends: np.ndarray, form=number) -> str:
    return "one seed" if np.isnan(ends[0]) else f"{form(ends[0])} to {form(ends[1])}"


def final(rows: pd.DataFrame, step: int) -> pd.Series:
    """Seed -> mean of its last evaluations up to the step."""
    return rows[rows["step"] <= step].groupby("seed")["return"].apply(lambda x: x.tail(LAST).mean())


def last_step(rows: pd.DataFrame) -> int:
    """The last step that all runs have reached. Raises UserError if a run has no evaluation up to there."""
    steps = rows.groupby(["method", "seed"])["step"].agg(["min", "max"])
    if steps["min"].max() > (last := steps["max"].min()):
        late = ", seed ".join(map(str, steps["min"].idxmax()))
        raise UserError(f"{late}: no evaluation up to step {last}, where another run ends")
    return last


class Page:
    """HTML in pieces, the tables' Markdown on stdout, the pictures as files and inside the page."""

    def __init__(self, out: Path):
        self.out, self.parts = out, []
        out.mkdir(parents=True, exist_ok=True)

    def text(self, text: str, tag: str = "p") -> None:
        self.parts.append(f"<{tag}>{html.escape(text)}</{tag}>")

    def table(self, rows: list[dict]) -> None:
        self.parts.append(f"<div>{pd.DataFrame(rows, dtype=str).to_html(index=False, border=0)}</div>")
        print(markdown(rows) + "\n")

    def picture(self, figure, name: str, alt: str) -> None:
        path = self.out / (re.sub(r"[^\w.-]", "_", name) + ".png")
        save_picture(figure, path)
        data = base64.b64encode(path.read_bytes()).decode()
        self.parts.append(f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{data}">')

    def write(self) -> None:
        page = (Path(__file__).parent / "report.html").read_text().replace("{{body}}", "\n".join(self.parts))
        (self.out / "index.html").write_text(page)


def draw_curves(ax, rows: pd.DataFrame, color: dict, title: str, references: Callable, reps: int = 0) -> None:
    """Panel of one task: each run, each method's mean over the steps that all its seeds have, its references."""
    for method, own in rows.groupby("method", sort=False):
        each, look = own.pivot(index="step", columns="seed", values="return"), dict(color=color[method])
        for seed in each:
            ax.plot(each[seed].dropna(), linewidth=0.5, alpha=0.6, **look)
        common = each.dropna()
        ax.plot(common.mean(axis=1), linewidth=2, label=f"{method}, mean of the seeds", **look)
        if reps and len(common):
            _, ends = interval(common.to_numpy().T[:, None], lambda x: x.mean((0, 1)), reps)
            ax.fill_between(common.index, *ends, alpha=0.2, **look)
        for source, reference in references(own.iloc[0]).items():
            style, label = (":", "of 10 seeds, SimbaV2") if source == TEN_SEEDS else ("--", "in the paper")
            shown = reference[reference.index <= 1.2 * rows["step"].max()]
            ax.plot(shown, style, label=f"{method} {label}" if len(shown) else None, **look)
    ax.set(title=title, xlabel="environment steps", ylabel="return")
    ax.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")


def final_table(page: Page, rows: pd.DataFrame, curves: pd.Series, reps: int) -> None:
    lines = []
    for env_id, on_task in rows.groupby("env_id", sort=False):
        step = last_step(on_task)
        for method, own in on_task.groupby("method", sort=False):
            scores = final(own, step)
            mean, ends = interval(scores.to_numpy()[:, None], lambda x: np.array([x.mean()]), reps)
            line = dict(task=env_id, method=method, seeds=len(scores), step=step, mean=number(mean[0]))
            line |= {"95% interval": span(ends[:, 0]), "median": number(scores.median())}
            line |= {"each seed": " / ".join(map(number, scores)), "paper there": "", "paper's end": ""}
            for paper in list(references_of(own.iloc[0], curves).values())[:1]:
                there = np.interp(step, paper.index, paper, left=np.nan, right=np.nan)
                line |= {"paper there": number(there), "paper's end": f"{number(paper.iloc[-1])} ({paper.index[-1]})"}
            lines.append(line)
    page.text("Final scores", "h3")
    page.table(lines)


def aggregates(page: Page, name: str, rows: pd.DataFrame, curves: pd.Series, reps: int) -> None:
    """Interquartile mean over the tasks of the paper, table and picture."""
    paper, ids = curves[PAPER, "MEow"].groupby("env_id").last(), rows["env_id"].unique()
    scale = {env_id: paper[v4] for env_id in ids if (v4 := re.sub("-v5$", "-v4", env_id)) in paper}
    rows = rows[rows["env_id"].isin([*scale])]
    seeds = rows.groupby(["method", "env_id"], sort=False)["seed"].nunique().unstack().dropna(axis=1)
    page.text("Aggregate scores", "h3")
    if seeds.empty:
        return page.text("None: all methods have no task of the paper's figure 3 in common.")
    n, last = int(seeds.min().min()), {env_id: last_step(rows[rows["env_id"] == env_id]) for env_id in seeds}
    ends = "; ".join(f"{env_id} {scale[env_id]:.0f} at {last[env_id]}" for env_id in seeds)
    page.text(f"Of each method and task the first {n} seeds; tasks, their paper's return and the step: {ends}.")
    lines, color = [], colors(seeds.index)
    figure, ((ax,),) = panels(size=(10, 0.8 + 0.3 * len(seeds)))
    for method, own in rows.groupby("method", sort=False):
        on = {env_id: final(own[own["env_id"] == env_id], last[env_id]) / scale[env_id] for env_id in seeds}
        scores = np.stack([scores.to_numpy()[:n] for scores in on.values()], 1)  # (seeds, tasks)
        point, ends = interval(scores, lambda x: np.array([metrics.aggregate_iqm(x)]), reps)
        iqm = f"{point[0]:.3f} ({span(ends[:, 0], '{:.3f}'.format)})"
        lines.append({"method": method, "seeds": n, "tasks": len(on), "IQM": iqm})
        ax.plot(point[0], method, "o", color=color[method])
        ax.plot(ends[:, 0], [method] * 2, color=color[method], linewidth=4, alpha=0.5)
    ax.invert_yaxis()
    ax.margins(y=0.2)
    ax.set(xlabel="IQM of the scores with 95% interval; 1 is the paper's final MEow")
    page.table(lines)
    page.picture(figure, f"{name}_aggregates", "Aggregate scores with intervals")


def main(args: Args) -> None:
    """Raises UserError."""
    if args.reps < 1 or not (args.out or args.export):
        raise UserError("--out, --export or both must be given" if args.reps > 0 else "--reps must be positive")
    rows, shared, left_out = load(args.paths)
    runs = rows.groupby(["method", "env_id", "seed"], sort=False).tail(1)
    if args.export is not None:
        args.export.parent.mkdir(parents=True, exist_ok=True)
        rows[COLUMNS].to_csv(args.export, index=False)
        print(f"{len(runs)} runs: {args.export}")
    if args.out is None:
        return
    curves, page = references(), Page(args.out)
    page.text(f"{len(runs)} runs of {', '.join(runs['method'].unique())} on {', '.join(runs['env_id'].unique())}.")
    if shared:
        page.text(f"All runs have the flags {'; '.join(shared)}, which are not in their names below.")
    [page.text(f"Left out: {line}.") for line in left_out]
    groups = {"Algorithms": rows[rows["variant"] == ""]}
    varied = rows.groupby(["algorithm", "env_id"])["variant"].transform(any)  # tasks on which a variant was run
    groups |= {f"Variants of {name}": own for name, own in rows[varied].groupby("algorithm", sort=False)}
    for name, own in ((name, own) for name, own in groups.items() if len(own)):
        page.text(name, "h2")
        for env_id, on_task in own.groupby("env_id", sort=False):
            page.text(env_id, "h3")
            figure, ((ax,),) = panels(size=(10, 4))
            beside = lambda run: references_of(run, curves)  # noqa: E731
            draw_curves(ax, on_task, colors(on_task["method"].unique()), env_id, beside, args.reps)
            page.picture(figure, f"{name.replace(' ', '_').lower()}_{env_id}", f"Learning curves on {env_id}")
        final_table(page, own, curves, args.reps)
        aggregates(page, name.replace(" ", "_").lower(), own, curves, args.reps)
    page.text("Runs", "h2")
    hours = (runs["step"] / runs["SPS"] / 3600).round(2)
    shown = ["method", "env_id", "seed", "step", "return", "SPS", "hours", *COLUMNS[4:], "source"]
    page.table(runs.assign(hours=hours)[shown].astype(str).to_dict("records"))
    page.text(f"Made by: python -m benchmark.report {shlex.join(map(str, args.paths))}", "footer")
    page.write()
    print(f"{len(runs)} runs: {args.out / 'index.html'}")


if __name__ == "__main__":
    sys.exit(exit_code(main, Args, __doc__))
