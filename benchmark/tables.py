"""The tables and learning curves of the pages, from the CSVs in benchmark/results/ and benchmark/reference/.

    python -m benchmark.tables

writes what stands between <!-- table: NAME --> and <!-- end --> in README.md and docs/*.md, and draws docs/NAME.png for
each [NAME] of benchmark/curves.toml. A score is the mean of a run's last five evaluations up to a step, with Student's
95% interval of the mean over the seeds; "paper" is the mean of the paper's curve at these steps.
"""

import math
import re
from pathlib import Path

import numpy as np
import pandas as pd
import tomllib
from rliable import metrics
from scipy.stats import norm, t

from benchmark import ROOT, colors, markdown, panels, save_picture, table
from benchmark.report import ABLATION, LAST, PAPER, TEN_SEEDS, draw_curves, final, last_step, references, span
from benchmark.report import interval as confidence

CURVES = tomllib.loads((ROOT / "benchmark/curves.toml").read_text())


def read(*names: str, **wanted: list[str]) -> pd.DataFrame:
    """Rows of the CSVs, as text, none of one that is not there, whose columns have one of the wanted values."""
    paths = (ROOT / f"benchmark/results/{name}.csv" for name in names)
    frames = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in paths if path.exists())
    rows = pd.concat([pd.DataFrame(columns=["command"]), *frames])
    for column, values in wanted.items():
        rows = rows[rows[column].isin(values)]
    return rows


def interval(x: list[float]) -> str:
    if len(x) == 1:
        return f"{x[0]:.0f} (one seed)"
    half = t.ppf(0.975, len(x) - 1) * np.std(x, ddof=1) / math.sqrt(len(x))
    return f"{np.mean(x):.0f} ({np.mean(x) - half:.0f} to {np.mean(x) + half:.0f})"


def curves(name: str) -> pd.DataFrame:
    """The evaluations of each task's methods; "paper" is the name of the paper's curve."""
    parts, tasks = [], dict(CURVES[name])
    until = tasks.pop("until", math.inf)
    for task, methods in tasks.items():
        for method, csv_name, words, paper in methods:
            rows = read(csv_name)
            rows = rows[rows["command"].str.contains(words, regex=False)]
            parts.append(rows.assign(task=task, method=method, paper=paper))
    rows = pd.concat(parts).astype({"step": int, "seed": int, "return": float})
    return rows[rows["step"] <= until]


def paper_of(run: pd.Series) -> dict[str, pd.Series]:
    """The paper's curve for a row: figure 3's, and only of ablations figure 6's."""
    keys, known = [(source, run["paper"], run["task"]) for source in (PAPER, ABLATION)], references()
    return dict([(key[0], known[key]) for key in keys if key in known.index.droplevel("step")][:1])


def scores(name: str) -> list[dict]:
    lines = []
    for task, rows in curves(name).groupby("task", sort=False):
        last = last_step(rows)
        for method, own in rows.groupby("method", sort=False):
            x, steps = final(own, last), sorted(step for step in {*own["step"]} if step <= last)[-LAST:]
            line = dict(task=task, method=method, steps=f"{last:,}", score=interval([*x]), paper="")
            for paper in paper_of(own.iloc[0]).values():
                line["paper"] = f"{np.interp(steps, paper.index, paper).mean():.0f}"
            lines.append(line | {"each seed": " / ".join(f"{value:.0f}" for value in x)})
    return lines


def five_tasks() -> str:
    lines = {}
    for row in scores("five_tasks"):  # of a task MEow's comes first
        line = lines.setdefault(row["task"], {key: row[key] for key in ("task", "steps")})
        here = {"MEow here": row["score"], "MEow in the paper": row["paper"], "SAC here": ""}
        line |= here if row["method"] == "MEow" else {"SAC here": row["score"]}
    return markdown([*lines.values()])


def plus() -> str:
    """Returns at the steps where MEow+ has evaluations, beside the means of ten seeds."""
    lines, known = [], references()[TEN_SEEDS]
    for task, rows in curves("plus").groupby("task", sort=False):
        for step in (50_000, 100_000, 200_000, 300_000):
            own = rows[rows["step"] == step].groupby("method")["return"].apply(list)
            if "MEow+" not in own:
                continue
            line = dict(task=task, step=f"{step:,}") | {"MEow+": interval(own["MEow+"])}
            line["each seed"] = " / ".join(f"{value:.0f}" for value in own["MEow+"])
            line |= {f"{name} here": interval(own[name]) if name in own else "" for name in ("MEow", "SAC")}
            lines.append(line | {f"{name}, 10 seeds": f"{known[name, task, step]:.0f}" for name in ("SAC", "CrossQ")})
    return markdown(lines)


def plus_aggregates() -> str:
    """MEow+ beside others at the same step, over the tasks that MEow+ has there and the seeds that have all of these:
    rliable's interquartile mean of returns by the other's mean, and probability that a run is above the other's."""
    lines, known, rows = [], references()[TEN_SEEDS], curves("plus")

    def told(scores: np.ndarray | tuple, function) -> str:
        point, ends = confidence(scores, lambda *x: np.array([function(*x)]), 2_000)
        return f"{point[0]:.2f} ({span(ends[:, 0])})"

    for step in (50_000, 100_000, 200_000, 300_000):
        at = rows[rows["step"] == step]
        tasks = [*at.loc[at["method"] == "MEow+", "task"].unique()]
        own = {name: x.pivot(index="seed", columns="task", values="return") for name, x in at.groupby("method")}
        own = {name: x.reindex(columns=tasks).dropna().to_numpy() for name, x in own.items()}  # (seeds, tasks)
        for name in ("SAC here", "MEow here", "SAC, 10 seeds", "CrossQ, 10 seeds"):
            method, here = re.split("[ ,]", name)[0], name.endswith("here")
            y = own.get(method, np.empty((0, 0))) if here else np.array([[known[method, task, step] for task in tasks]])
            if not tasks or not len(x := own["MEow+"]) or not len(y):
                continue
            line = dict(step=f"{step:,}", tasks=len(tasks), seeds=len(x)) | {"beside": name}
            line["seeds there"] = len(y) if here else 10
            ratio = lambda x, y=y: metrics.aggregate_iqm(x / y.mean(0))  # noqa: E731
            line["IQM, 1 is the other"] = told((x, y) if here else x, ratio)
            line["tasks above"] = (x.mean(0) > y.mean(0)).sum()
            improvement = metrics.probability_of_improvement
            lines.append(line | {"probability of improvement": told((x, y), improvement) if here else ""})
    return markdown(lines)


def clamp() -> str:
    """-log of the integral of pi over the box, z ~ N(0, sigma^2): by that V / alpha is too high, a dimension."""
    log_sigma, z = np.array([-0.3, 0, 0.5, 1, 1.5, 2]), math.atanh(1 - 1e-5)
    sigma = np.exp(log_sigma)
    beyond = 2e-5 * norm.pdf(z, scale=sigma) / (1 - (1 - 1e-5) ** 2)  # all there have the clamped action's density
    errors = np.abs(np.log(1 - 2 * norm.sf(z, scale=sigma) + beyond))
    lines = zip(log_sigma, errors, strict=True)
    return markdown([{"log σ": x, "V is too high by": f"{error:.3f} α"} for x, error in lines])


def goals_by_alpha(rows: pd.DataFrame) -> str:
    """Of the rollouts that reach a goal, over all seeds, each goal's share in percent."""
    lines, names = {}, dict.fromkeys(["optimum", *rows["algorithm"]], "")
    for (alpha, name), own in rows.groupby(["alpha", "algorithm"], sort=False):
        counts = own["goals"].str.split(" / ", expand=True).astype(int).sum()
        line = lines.setdefault(alpha, {"alpha": alpha} | names)
        line[name] = " / ".join(f"{100 * x / max(1, counts.sum()):.0f}" for x in counts)
    return markdown([*lines.values()])


def tables() -> dict[str, str]:
    """Name -> Markdown."""
    found = {name: markdown(scores(name)) for name in CURVES} | {"readme": five_tasks(), "clamp": clamp()}
    rows = read("truth_presets")
    rows["least_goal_%"] = [min(map(int, goals.split(" / "))) / 4 for goals in rows["goals"]]  # of 400 rollouts
    found["goals"] = table(rows, "env_id algorithm", "least_goal_%:0 return:0 v_origin:1 optimum_origin:1 rmse:1 kl:2")
    rows = read("densities")
    rows["least_goal_%"] = [min(map(int, goals.split(" / "))) / 4 for goals in rows["goals"]]
    found["densities"] = table(rows, "trial", "least_goal_%:0 return:0 rmse:1 kl:2 mass:3")
    rows = read("truth")
    runs = rows[rows["algorithm"] != "optimum"]
    found["temperatures"] = table(runs, "env_id alpha", "kl:2", "algorithm")
    found["goals_by_alpha"] = goals_by_alpha(rows[rows["env_id"] == "multigoal:MultiGoalAsymmetric-v0"])
    rows = read("estimation_multigoal", "estimation_hopper", states=["visited"], M=["1", "16", "1024"])
    found["estimators"] = table(rows, "env_id estimator", "bias:2", "M")
    rows = read("entropy", varied=["sigma"], target=["paper", "variance 1", "variance 16", "mixture of 4"])
    found["entropies"] = table(rows, "target exact", "estimate:2", "sigma")
    rows = read("entropy", varied=["sampler"])
    found["samplers"] = table(rows, "sampler exact", "estimate:2 spread:2 particles_entropy:2")
    rows = read("entropy", varied=["grid"], target=["paper"], particles=["200"])
    found["entropy_steps"] = table(rows, "steps exact", "estimate:2 spread:2 particles_entropy:2")
    found["s2ac_actions"] = table(read("s2ac_actions"), "seed step", "return:0", "choice")
    rows, cells = read("s2ac_bellman"), "return:0 promised:2 bellman:2 standard_error:2 bellman_random:2"
    found["s2ac_bellman"] = table(rows, "step choice visited_by", cells)
    rows = read("beyond")
    rows["trial"] = rows["command"].str.extract(r"--exp-name (\S+)", expand=False)
    plain = r"^.*?--exp-name \S+( --(total-timesteps|eval-freq\S+) \d+)* ?"
    rows["flags"] = rows["command"].str.replace(plain, "", regex=True)
    columns = [f"return_{n}" for n in (20_000, 30_000, 50_000, 100_000)]
    found["beyond"] = markdown(rows[["trial", "env_id", "commit", "flags", *columns]].to_dict("records"))
    rows = read("beyond_fit", age=["fresh"])
    rows["trial"] = rows["trained"].str.extract(r"--exp-name (\S+)", expand=False).fillna("the script")
    v, rollout = (rows[name].astype(float) for name in ("v", "v_rollout"))
    rows["V is off by"] = ((100 * v / rollout - 100).round() + 0.0).map("{:+.0f}%".format)
    columns = ["trial", "env_id", "seed", "step", "alpha", "v", "v_rollout", "V is off by", "rare", "td_rmse"]
    found["plus"], found["plus_aggregates"] = plus(), plus_aggregates()
    found["beyond_fit"] = markdown(rows[columns].to_dict("records"))
    timing, one = "update_ms:2 act_ms:3 loop_sps:0", ["1"]
    rows = read("speed", "speed_large", threads=one, env_id=["Hopper-v4", "Humanoid-v4"])
    found["speed"] = table(rows, "env_id implementation", timing)
    found["speed_now"] = table(read("speed_hopper"), "threads implementation", timing)
    found["acting"] = table(read("acting"), "algorithm", "draw_ms:3", "env_id")
    rows = read("compiled_eager").astype({"step": int})
    last = rows[rows["step"] == rows.groupby("env_id")["step"].transform("max")]
    found["compiled_eager"] = table(last, "env_id step", "return:0", "compile")
    found["speed_plus"] = table(read("speed_plus"), "env_id implementation", timing)
    found["speed_sac_nf"] = table(read("speed_sac_nf"), "implementation", timing)
    found["speed_eager"] = table(read("speed_eager"), "implementation", "update_ms:2", "mode")
    rows = read("speed_growth", num_seeds=one, implementation=["MEow"])
    found["speed_growth"] = table(rows, "batch_size num_envs", timing)
    rows = read("brax_ant", "brax_others", curve=["last checkpoint"])
    for flag in ("gamma", "alpha", "updates-per-step"):
        rows[flag] = rows["command"].str.extract(f"--{flag} ([0-9.]+)", expand=False).fillna("")
    found["brax"] = table(rows, "env_id algo gamma alpha updates-per-step step", "return:0 length:0 distance:0")
    steps = [str(128_000 * k) for k in (1, 2, 4, 8, 12)]
    found["brax_ant"] = table(read("brax_ant", curve=["evaluation"], step=steps), "step", "return:0", "algo")
    shares = " ".join(f"{part}_share:2" for part in ("policy", "simulator", "buffer", "update"))
    rows = read("brax_others", curve=["evaluation"], step=[str(128_000 * k) for k in range(1, 7)])
    rows = rows[rows["command"].str.contains("gamma 0.997 (?!--alpha 0.02)")]
    found["brax_stand"] = table(rows, "env_id algo step", "return:0 length:0")
    found["brax_rates"] = table(read("brax_rates"), "algo num_envs", f"steps_per_s:0 updates_per_s:1 {shares}")
    return found | {"speed_h200": table(read("speed_h200", num_seeds=one), "implementation", timing)}


def draw(name: str) -> None:
    """A panel for each task."""
    rows = curves(name)
    tasks = rows["task"].unique()
    columns = min(3, len(tasks))
    figure, axes = panels(math.ceil(len(tasks) / columns), columns, (4 + 2.6 / columns, 3.2))  # and a legend
    for ax, task in zip(axes.flat, tasks, strict=False):
        draw_curves(ax, rows[rows["task"] == task], colors(rows["method"].unique()), task, paper_of)
    [ax.remove() for ax in axes.flat[len(tasks) :]]
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
