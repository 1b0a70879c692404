"""Every algorithm on the goal maps against the optimum of the objective that all of them share, at four temperatures.

    python -m benchmark.truth --png runs/truth/truth.png      # shortened runs
    python -m benchmark.truth --presets

Trains through the scripts' command lines and measures the last checkpoint with multigoal.measure: 400 rollouts of
sampled actions, V against soft value iteration (SAC's V from 256 actions of its policy, SQL's from 1024 uniform ones,
S2AC's from 40 of its particles), KL(pi || pi*) at the map's states by a histogram, and 400 rollouts of at most 30
steps with the wall up, counting those that run into it and reach a goal all the same.
Prints a table for docs/results.md and draws a page: V and 20 paths of each algorithm's first seed beside the optimum's.
What the page is drawn from is kept in a folder beside the CSV, of its name, so that the page needs no training.
S2AC's phi-theta and phi-theta-psi, where both are wanted, are one run of the latter, whose sampler changes nothing in
the rest; acting by particles it is the former.
A run whose row is in the CSV is not run again, so the command can be interrupted and repeated. Exit code 1: a run
failed; the others are done.
"""

import csv
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

import multigoal
from benchmark import run_all, write_csv
from benchmark.grids import script_of

FLAGS = {f"s2ac-{variant}": f"--variant {variant}" for variant in ("phi", "phi-theta", "phi-theta-psi")}
# Beside half the presets' steps. S2AC has half the updates of the others, and rates to learn in them, not its preset's
SHORT = {"sql": "--batch-size 64", "s2ac": "--batch-size 32 --utd 0.5 --tau 0.01 --learning-rate 1e-3"}
OWN_ALPHA = dict(zip(multigoal.MAPS, (2.5, 10.0), strict=True))  # the presets'


@dataclasses.dataclass
class Args:
    algorithms: tuple[str, ...] = ("meow-mixture", "meow", "sac", "sql", *FLAGS)
    """scripts to compare, by their words; s2ac's with its variant"""
    env_ids: tuple[str, ...] = multigoal.MAPS
    """maps"""
    alphas: tuple[float, ...] = (1.0, 2.5, 10.0, 20.0)
    """temperatures, of the runs and of the optimum that they are compared with"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """a run of each script on each map at each temperature for each seed"""
    presets: bool = False
    """instead of --alphas each map's own temperature, with the scripts' presets at full length"""
    total_timesteps: int = 8_000
    """steps of every run without --presets, an update each (SQL's of batches of 64, S2AC's one in two, of 32)"""
    episodes: int = 400
    """rollouts of a trained policy"""
    jobs: int = 2
    """runs side by side, one thread each"""
    folder: Path = Path("runs/truth")
    """folder of the runs"""
    csv: Path | None = None
    """results, one row a run, by default truth.csv or truth_presets.csv in --folder; what the page is drawn from lies
    in the folder of the same name without .csv"""
    png: Path | None = None
    """page of pictures to write"""


def command_of(args: Args, algorithm: str, env_id: str, alpha: float, seed: int) -> list[str]:
    """The command line that trains a cell."""
    script = "s2ac" if algorithm in FLAGS else algorithm
    command = [sys.executable, str(script_of(script)), "--env-id", env_id, "--seed", str(seed)]
    command += ["--device", "cpu", *FLAGS.get(algorithm, "").split()]
    if not args.presets:
        command += ["--alpha", f"{alpha:g}", "--total-timesteps", str(args.total_timesteps)]
        command += ["--eval-frequency", str(args.total_timesteps)]  # once: before they learn, episodes are long
        command += SHORT.get(script, "").split()
        command += ["--svgd-step-size", f"{0.01 * alpha:g}"] if script == "s2ac" else []  # the paper's, times alpha
    return command


def saved(args: Args, algorithm: str, env_id: str, alpha: float, seed: int) -> Path:
    """Where the arrays lie that the page draws of a cell: v, on every other point of the grid, and 20 paths."""
    return args.csv.with_suffix("") / f"{algorithm}_{env_id.partition(':')[2]}_{alpha:g}_{seed}.npz"


def run(args: Args, algorithms: list[str], env_id: str, alpha: float, seed: int) -> list[dict]:
    """Train the last of the algorithms and measure all: rows of the CSV. More than one are S2AC with and without its
    sampler: it follows the Gaussian and Q, which learn without it. Raises RuntimeError with the script's last errors.
    """
    name = f"truth_{algorithms[-1]}_{time.time_ns()}"
    command = command_of(args, algorithms[-1], env_id, alpha, seed)
    start = time.time()
    done = subprocess.run([*command, "--exp-name", name], cwd=args.folder, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)}: exit code {done.returncode}: {done.stderr[-2000:]}")
    seconds = time.time() - start
    (folder,) = (args.folder / "runs").glob(f"*__{name}__*")
    facts, rows = json.loads((folder / "args.json").read_text()), []
    for algorithm in algorithms:
        agent, trained = multigoal.load_policy(folder / "checkpoint.pt")
        if algorithm != algorithms[-1]:
            agent.sampler = None  # it acts by particles
        env = gym.make(env_id)
        measured = multigoal.measure(agent, trained, env, args.episodes)
        rollouts = measured.rollouts
        arrays = [np.clip(x, -6e4, 6e4).astype(np.float16) for x in (measured.v[::2, ::2], *rollouts.paths[:20])]
        saved(args, algorithm, env_id, alpha, seed).parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(saved(args, algorithm, env_id, alpha, seed), *arrays[1:], v=arrays[0])
        row = dict(env_id=env_id, algorithm=algorithm, alpha=trained.alpha, gamma=trained.gamma, seed=seed)
        row |= dict(steps=trained.total_timesteps, episodes=args.episodes) | counts(env, rollouts)
        row |= dict(v_origin=round(measured.v_origin, 1), optimum_origin=round(float(measured.optimum_origin), 1))
        row |= dict(rmse=round(measured.rmse, 1), kl=round(float(measured.kl.mean()), 3))
        row |= hit_counts(env_id, multigoal.policy_of(agent), args.episodes)
        row |= dict(seconds=round(seconds), commit=facts["commit"], machine=facts["machine"])
        rows.append(row | dict(command=shlex.join([Path(command[1]).name, *command[2:]])))
    return rows


def counts(env: gym.Env, rollouts: multigoal.Rollouts) -> dict:
    """Columns of the CSV: goals reached, in all and each, mean return and length."""
    goals = [int((rollouts.goals == g).sum()) for g in range(len(env.unwrapped.goals))]
    means = {"return": round(float(rollouts.returns.mean()), 1), "length": round(float(rollouts.lengths.mean()), 2)}
    return dict(reached=sum(goals), goals=" / ".join(map(str, goals))) | means


def hit_counts(env_id: str, policy: Callable[[np.ndarray], np.ndarray], episodes: int) -> dict:
    """Columns of the CSV: rollouts that run into the wall, and how many of these reach a goal within 30 steps."""
    env = gym.make(env_id, obstacle=True, max_episode_steps=30)
    rollouts = multigoal.rollout(env, policy, episodes)
    return dict(hits=int(rollouts.hits.sum()), reached_after_hit=int((rollouts.hits & (rollouts.goals >= 0)).sum()))


def optimum(env_id: str, alpha: float, gamma: float, episodes: int) -> tuple[dict, multigoal.Rollouts]:
    """The row of the optimal policy, and its rollouts."""
    env, best = gym.make(env_id), multigoal.optimum_of(env_id, alpha, gamma)
    rng = np.random.default_rng(0)

    def policy(obs: np.ndarray) -> np.ndarray:
        return best.policy(obs, rng)

    rollouts = multigoal.rollout(env, policy, episodes)
    row = dict(algorithm="optimum", v_origin=best.v(np.zeros((1, 2)))[0], rmse=0, kl=0, seconds="")
    return row | counts(env, rollouts) | hit_counts(env_id, policy, episodes), rollouts


def cells_of(rows: list[dict]) -> dict[tuple[str, float], dict[str, list[dict]]]:
    """(map, alpha) -> algorithm -> its rows by seed."""
    cells = {}
    for row in sorted(rows, key=lambda row: (row["env_id"], float(row["alpha"]), row["algorithm"], int(row["seed"]))):
        cells.setdefault((row["env_id"], float(row["alpha"])), {}).setdefault(row["algorithm"], []).append(row)
    return cells


def spread(rows: list[dict], key: str, digits: int) -> str:
    """Mean and, of several, range of a column that may be empty."""
    x = [float(row[key]) for row in rows if row.get(key, "") != ""]
    if not x:
        return ""
    mean = f"{sum(x) / len(x):.{digits}f}"
    return mean if len(x) == 1 else f"{mean} ({min(x):.{digits}f} to {max(x):.{digits}f})"


def table(rows: list[dict], episodes: int) -> str:
    """Markdown: a row an algorithm, over its seeds, and the optimum's, for each map and temperature."""
    head = "map | alpha | algorithm | seeds | reach a goal, % | each goal, % | least, % | return | length | V(0,0)"
    head += " | RMSE of V | KL, nats | hit the wall, % | then reach a goal, % | time, s"
    lines = [f"| {head} |", "|" + "---|" * 15]
    for (env_id, alpha), algorithms in cells_of(rows).items():
        gamma = float(next(iter(algorithms.values()))[0]["gamma"])
        best = optimum(env_id, alpha, gamma, episodes)[0]
        for algorithm, runs in [*algorithms.items(), ("optimum", [best])]:
            goals = np.array([row["goals"].split(" / ") for row in runs], dtype=float) * 100 / episodes  # (S, G)
            each = " / ".join(f"{share:.0f}" for share in goals.mean(0))
            hits = [int(row["hits"]) for row in runs if row.get("hits", "") != ""]
            after = [int(row["reached_after_hit"]) for row in runs if row.get("hits", "") != ""]
            cells = [env_id.partition(":")[2], f"{alpha:g}", algorithm, "" if algorithm == "optimum" else len(runs)]
            cells += [f"{goals.sum(1).mean():.0f}", each, f"{goals.min():.0f}", spread(runs, "return", 1)]
            cells += [spread(runs, "length", 1), spread(runs, "v_origin", 1), spread(runs, "rmse", 1)]
            cells += [spread(runs, "kl", 2), f"{100 * sum(hits) / episodes / len(hits):.0f}" if hits else ""]
            cells += [f"{100 * sum(after) / sum(hits):.0f}" if sum(hits) else "", spread(runs, "seconds", 0)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(args: Args, rows: list[dict]) -> None:
    """The page: a row of panels for each map and temperature asked for, a column for the optimum and each algorithm."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    cells = cells_of([r for r in rows if r["env_id"] in args.env_ids and r["algorithm"] in args.algorithms])
    if not args.presets:
        cells = {cell: algorithms for cell, algorithms in cells.items() if cell[1] in args.alphas}
    columns = ["optimum", *(a for a in args.algorithms if any(a in cell for cell in cells.values()))]
    size = dict(figsize=(1.7 * len(columns), 1.75 * len(cells) + 0.3), squeeze=False, layout="constrained")
    figure, axes = plt.subplots(len(cells), len(columns), sharex=True, sharey=True, **size)
    for line, ((env_id, alpha), algorithms) in zip(axes, cells.items(), strict=True):
        env, gamma = gym.make(env_id).unwrapped, float(next(iter(algorithms.values()))[0]["gamma"])
        best = multigoal.optimum_of(env_id, alpha, gamma)
        for ax, name in zip(line, columns, strict=True):
            ax.tick_params(labelsize=5)
            if name == "optimum":
                v, paths, title = best.values, optimum(env_id, alpha, gamma, 20)[1].paths, "optimum"
            else:
                runs = [(row, saved(args, name, env_id, alpha, int(row["seed"]))) for row in algorithms.get(name, [])]
                row, file = next(((row, file) for row, file in runs if file.is_file()), (None, None))
                if row is None:
                    ax.set_title(f"{name}: no run here", fontsize=6)
                    continue
                arrays = np.load(file)
                v, *paths = (arrays[key].astype(float) for key in ("v", *(k for k in arrays.files if k != "v")))
                title = f"{name}, RMSE {row['rmse']}, KL {float(row['kl']):.2f}"
            low, high = best.values.min(), best.values.max()
            axis = np.linspace(-multigoal.BOUND, multigoal.BOUND, len(v))
            ax.pcolormesh(axis, axis, v.T, vmin=low, vmax=high, shading="gouraud", rasterized=True)
            for path in paths:
                ax.plot(*path.T, color="black", linewidth=0.5)
            for goal in env.goals:
                ax.add_patch(plt.Circle(goal, env.radius, fill=False, color="tab:red"))
            ax.set_title(title, fontsize=6)
            ax.set(xlim=(-multigoal.BOUND, multigoal.BOUND), ylim=(-multigoal.BOUND, multigoal.BOUND), aspect="equal")
        line[0].set_ylabel(f"{env_id.partition(':')[2]}, alpha {alpha:g}", fontsize=6)
    args.png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.png, dpi=100)
    plt.close(figure)
    print(f"page: {args.png}")


def main(args: Args) -> int:
    """Exit code: 0, 1 if a run failed, or 2 if the CSV has runs that this table cannot hold."""
    default = args.folder / ("truth_presets.csv" if args.presets else "truth.csv")
    args = dataclasses.replace(args, folder=args.folder.resolve(), csv=args.csv or default)
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(args.csv.read_text().splitlines())) if args.csv.exists() else []
    for row in rows:
        steps = row["steps"] if args.presets else str(args.total_timesteps)
        if (row["steps"], row["episodes"]) != (steps, str(args.episodes)):
            found, wanted = f"{row['steps']} steps and {row['episodes']} rollouts", f"{steps} and {args.episodes}"
            print(f"error: {args.csv} has a run of {found}; expected {wanted}: give another --csv", file=sys.stderr)
            return 2
    finished = {(row["algorithm"], row["env_id"], float(row["alpha"]), int(row["seed"])) for row in rows}
    wanted = [
        (algorithm, env_id, alpha, seed)
        for seed in args.seeds
        for env_id in args.env_ids
        for alpha in ((OWN_ALPHA[env_id],) if args.presets else args.alphas)
        for algorithm in args.algorithms
    ]
    todo = {}  # cells that one run will do for -> their algorithms
    for algorithm, *cell in (cell for cell in wanted if cell not in finished):
        todo.setdefault((algorithm.removesuffix("-psi"), *cell), []).append(algorithm)
    jobs, failed = {}, []
    for (_, env_id, alpha, seed), algorithms in todo.items():
        name = f"{' and '.join(sorted(algorithms))} {env_id} alpha {alpha:g} seed {seed}"
        jobs[name] = (args, sorted(algorithms), env_id, alpha, seed)
    for progress, new in run_all(run, jobs, args.jobs, failed):
        rows += new
        shown = ("algorithm", "reached", "goals", "return", "v_origin", "rmse", "kl", "hits", "reached_after_hit")
        for row in new:
            print(progress, *(f"{key} {row[key]}" for key in (*shown, "seconds")), sep=", ", flush=True)
        write_csv(args.csv, rows)
    print(table(rows, args.episodes))
    if args.png:
        draw(args, rows)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
