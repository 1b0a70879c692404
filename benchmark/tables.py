"""The tables and learning curves of the pages, from the CSVs in benchmark/results/ and benchmark/reference/.

    python -m benchmark.tables

writes what stands between <!-- table: NAME --> and <!-- end --> in README.md and docs/*.md, and draws docs/NAME.png for
each NAME in CURVES. A score is the mean of a run's last five evaluations up to a step, with Student's 95% interval of
the mean over the seeds; "paper" is the mean of the paper's curve at these steps.
"""

import math
import re
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import norm, t

from benchmark import ROOT, colors, markdown, panels, read_csv, save_picture

TASKS = ("Hopper", "HalfCheetah", "Walker2d", "Ant", "Humanoid")
MEOW, SAC = ("MEow", "hopper_meow", "", "MEow"), ("SAC", "hopper_sac", "", "")  # method, CSV, words, paper's curve
LRS = ("mean of V₁', V₂'", "ablation_hopper", "--no-clipped", "MEow LRS only")
VANILLA = ("no reward shifts", "ablation_hopper", "--no-reward", "MEow vanilla")
AFFINE = ("affine couplings", "ablation_hopper", "--coupling affine", "")
FIVE = {f"{x}-v4": [("MEow", f"{x.lower()}_meow", "", "MEow"), ("SAC", f"{x.lower()}_sac", "", "")] for x in TASKS}
CURVES = {"five_tasks": FIVE, "ablations": {"Hopper-v4": [MEOW, AFFINE, LRS, VANILLA]}}
CURVES |= {"mixture": {"Hopper-v4": [MEOW, ("MEow's mixture", "mixture_hopper", "", "")]}}
CURVES |= {"s2ac": {"Hopper-v4": [SAC, ("S²AC(φ, θ)", "s2ac_hopper", "", "")]}, "sb3": {}}
CURVES["rewrite"] = {"Hopper-v4": [MEOW, ("MEow, present text", "hopper_meow_100k", "", ""), SAC]}
CURVES["rewrite"]["Hopper-v4"] += [("SAC, present text", "hopper_sac_100k", "", "")]
for x in ("Pendulum-v1", "Hopper-v4"):
    CURVES["sb3"][x] = [("SAC", f"sb3_{x}", "sac_continuous", ""), ("SAC of SB3", f"sb3_{x}", "benchmark.sb3", "")]


def read(*names: str, folder: str = "results", **wanted: list[str]) -> list[dict]:
    """Rows of the CSVs, none of one that is not there, whose columns have one of the wanted values."""
    rows = (row for name in names for row in read_csv(ROOT / f"benchmark/{folder}/{name}.csv"))
    return [row for row in rows if all(row[column] in values for column, values in wanted.items())]


def groups(rows: list[dict], columns: str) -> dict[tuple, list[dict]]:
    found = defaultdict(list)
    for row in rows:
        found[tuple(row[column] for column in columns.split())].append(row)
    return found


def mean(rows: list[dict], column: str, digits: int) -> str:
    """Mean (lowest to highest) over the rows; of a timing, whose rows are turns, the median."""
    x = [float(row[column]) for row in rows if row[column] != ""]
    middle = np.median(x) if "turn" in rows[0] else sum(x) / max(len(x), 1)
    low, high = (f"{f(x, default=0):.{digits}f}" for f in (min, max))
    return (f"{middle:.{digits}f}" + (f" ({low} to {high})" if low != high else "")) if x else ""


def table(rows: list[dict], by: str, cells: str, across: str = "") -> str:
    """A line for each value of the columns `by`; cells "return:0 kl:2": column and digits, for each value of across."""
    lines = []
    for key, own in groups(rows, by).items():
        line = dict(zip(by.split(), key, strict=True)) | ({} if across else {"n": len(own)})
        for value, part in groups(own, across).items():
            for column, digits in (cell.split(":") for cell in cells.split()):
                head = f"{across} {value[0]}".removeprefix("algorithm ") if across else column
                text = mean(part, column, int(digits))
                line[head] = text.partition(" (")[0] if across else text  # many columns: no ranges
        lines.append(line)
    return markdown(lines)


def interval(x: list[float]) -> str:
    if len(x) == 1:
        return f"{x[0]:.0f} (one seed)"
    half = t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / math.sqrt(len(x))
    return f"{np.mean(x):.0f} ({np.mean(x) - half:.0f} to {np.mean(x) + half:.0f})"


def curves(name: str) -> dict[str, dict[str, tuple[list[dict], dict]]]:
    """Task -> method -> step -> return, of each seed and of the paper. Methods that have not run are left out."""
    found = defaultdict(dict)
    for env_id, methods in CURVES[name].items():
        for method, csv_name, words, algorithm in methods:
            seeds = groups([row for row in read(csv_name) if words in row["command"]], "seed").values()
            runs = [{int(row["step"]): float(row["return"]) for row in own} for own in seeds]
            if name == "rewrite":  # as far as both texts went
                runs = [{step: value for step, value in run.items() if step <= 100_000} for run in runs]
            rows = read("learning_curves", folder="reference", env_id=[env_id], algorithm=[algorithm])
            rows = [*groups(rows, "source").values()][0] if rows else []  # of figure 3; only the ablations are of 6
            if runs:
                found[env_id][method] = runs, {int(row["step"]): float(row["mean_return"]) for row in rows}
    return found


def scores(name: str) -> list[dict]:
    lines = []
    for env_id, methods in curves(name).items():
        last = min(max(run) for runs, _ in methods.values() for run in runs)  # the step that all have
        for method, (runs, paper) in methods.items():
            steps = [sorted(step for step in run if step <= last)[-5:] for run in runs]
            x = [float(np.mean([run[step] for step in own])) for run, own in zip(runs, steps, strict=True)]
            there = f"{np.interp(steps[0], [*paper], [*paper.values()]).mean():.0f}" if paper else ""
            line = dict(task=env_id, method=method, steps=f"{last:,}", score=interval(x), paper=there)
            lines.append(line | {"each seed": " / ".join(f"{value:.0f}" for value in x)})
    return lines


def five_tasks() -> str:
    lines = []
    for (task, steps), (meow, *sac) in groups(scores("five_tasks"), "task steps").items():
        line = {"task": task, "steps": steps, "MEow here": meow["score"], "MEow in the paper": meow["paper"]}
        lines.append(line | {"SAC here": sac[0]["score"] if sac else ""})
    return markdown(lines)


def clamp() -> str:
    """-log of the integral of pi over the box, z ~ N(0, sigma^2): by that V / alpha is too high, a dimension."""
    log_sigma, z = np.array([-0.3, 0, 0.5, 1, 1.5, 2]), math.atanh(1 - 1e-5)
    sigma = np.exp(log_sigma)
    beyond = 2e-5 * norm.pdf(z, scale=sigma) / (1 - (1 - 1e-5) ** 2)  # all there have the clamped action's density
    errors = np.abs(np.log(1 - 2 * norm.sf(z, scale=sigma) + beyond))
    head = ("log σ", "V is too high by")
    return markdown([dict(zip(head, (x, f"{e:.3f} α"), strict=True)) for x, e in zip(log_sigma, errors, strict=True)])


def tables() -> dict[str, str]:
    """Name -> Markdown."""
    found = {name: markdown(scores(name)) for name in CURVES} | {"readme": five_tasks(), "clamp": clamp()}
    rows = read("truth_presets")
    for row in rows:
        row["least_goal_%"] = min(map(int, row["goals"].split(" / "))) / 4  # of 400 rollouts
    found["goals"] = table(rows, "env_id algorithm", "least_goal_%:0 return:0 v_origin:1 optimum_origin:1 rmse:1 kl:2")
    found["temperatures"] = table(read("truth"), "env_id alpha", "kl:2", "algorithm")
    rows = read("estimation_multigoal", "estimation_hopper", states=["visited"], M=["1", "16", "1024"])
    found["estimators"] = table(rows, "env_id estimator", "bias:2", "M")
    rows = read("entropy", varied=["sigma"], target=["paper", "variance 1", "variance 16", "mixture of 4"])
    found["entropies"] = table(rows, "target exact", "estimate:2", "sigma")
    timing, one = "update_ms:2 act_ms:3 loop_sps:0", ["1"]
    rows = read("speed", "speed_large", threads=one, env_id=["Hopper-v4", "Humanoid-v4"])
    found["speed"] = table(rows, "env_id implementation", timing)
    found["speed_now"] = table(read("speed_hopper"), "threads implementation", timing)
    found["speed_eager"] = table(read("speed_eager"), "implementation", "update_ms:2", "mode")
    rows = read("speed_growth", num_seeds=one, implementation=["MEow"])
    found["speed_growth"] = table(rows, "batch_size num_envs", timing)
    rows = read("brax_ant", "brax_others", curve=["last checkpoint"])
    found["brax"] = table(rows, "env_id algo step", "return:0 length:0 distance:1")
    shares = " ".join(f"{part}_share:2" for part in ("policy", "simulator", "buffer", "update"))
    found["brax_rates"] = table(read("brax_rates"), "algo num_envs", f"steps_per_s:0 updates_per_s:1 {shares}")
    return found | {"speed_h200": table(read("speed_h200", num_seeds=one), "implementation", timing)}


def draw(name: str) -> None:
    """A panel for each task."""
    found = curves(name)
    columns = min(3, len(found))
    figure, axes = panels(math.ceil(len(found) / columns), columns, (4 + 2.6 / columns, 3.2))  # and a legend
    color = colors({method: 0 for methods in found.values() for method in methods})
    for ax, (env_id, methods) in zip(axes.flat, found.items(), strict=False):
        ax.set(title=env_id, xlabel="steps", ylabel="return")
        last = max(max(run) for runs, _ in methods.values() for run in runs)
        for method, (runs, paper) in methods.items():
            for run in runs:
                ax.plot(run.keys(), run.values(), color=color[method], linewidth=0.4)
            steps = sorted(set.intersection(*map(set, runs)))
            means = [np.mean([run[step] for run in runs]) for step in steps]
            ax.plot(steps, means, color=color[method], linewidth=2, label=f"{method}, mean of the seeds")
            paper = {step: value for step, value in paper.items() if step <= 1.2 * last}
            named = f"{method} in the paper" if paper else None
            ax.plot(paper.keys(), paper.values(), color=color[method], linestyle="--", label=named)
        ax.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")
    for ax in axes.flat[len(found) :]:
        ax.remove()
    save_picture(figure, ROOT / f"docs/{name}.png")


def pages() -> dict[Path, str]:
    """Page -> its text with the tables of today. KeyError for a marker that names no table."""
    every, marker = tables(), re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)
    texts = {path: path.read_text() for path in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
    return {path: marker.sub(lambda m: f"{m[1]}{every[m[2]]}\n{m[3]}", text) for path, text in texts.items()}


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text)
    for name in CURVES:
        draw(name)
