"""Trained agents on the goal maps against the optimum of the objective that all algorithms share.

    python -m benchmark.run runs/maps --preset goal    # or temperatures, or densities
    python -m benchmark.studies.goal_map_optimum runs/maps --csv runs/maps/optimum.csv --png runs/maps/optimum.png

Measures the last checkpoint of each run by multigoal.measure: rollouts of sampled actions, V against soft value
iteration, KL(pi || pi*) at the map's states by a histogram. The optimum, algorithm "optimum", has rows of its own,
from the computed Q* and pi* on the same grid of actions. Columns besides:

    mass      densities alone: the least integral of pi over the box at the map's states; what is missing from 1 lies
              in spikes narrower than a cell or, of a flow through tanh, at |a| = 1
    q_rmse    RMSE of Q against Q* over the action grid, each less its mean there; the mean over the map's states
    q_maxima  local maxima of Q on the action grid: cells that none within 4 cells, the step of the grid on which V* is
              interpolated, exceeds, a plateau counted once; the mean over the states
    entropy   of pi in nats, by the histogram, log 4 if uniform; the mean over the grid of 15 x 15 positions
    hits      with the wall put up and 30 steps: the rollouts that hit it, and of these reached_after_hit

Prints a table. --png NAME.png draws five pages of each map, NAME-MAP.png with V and 20 trajectories of each algorithm's
first seed beside the optimum's, NAME-MAP-entropy.png, -landscapes.png (Q at the map's states, its maxima dotted),
-wall.png and -start.png (mean |mu(s)| and sigma(s) of S2AC's q^0 in training). What is drawn lies in a folder beside
the CSV, of its name; a run whose arrays lack a page is not on it. Runs that are in the CSV are not measured again.
"""

import dataclasses
import functools
import itertools
import json
import re
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import scipy.ndimage
import torch
import tyro

import multigoal
from benchmark import UserError, exit_code, facts, panels, run_missing, save_picture, scalars, table, word_of
from benchmark.report import describe, folders_of, local
from benchmark.studies import densities

KEYS = ("algorithm", "env_id", "alpha", "seed")
AXIS = np.linspace(-multigoal.BOUND, multigoal.BOUND, 15)
POSITIONS = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), -1).reshape(-1, 2)  # where entropies are measured


@dataclasses.dataclass
class Args:
    paths: tyro.conf.Positional[tuple[Path, ...]] = ()  # folders of grids or runs
    csv: Path = Path("runs/optimum.csv")  # results, one row a run
    png: Path | None = None  # page of pictures to write
    episodes: int = 400  # rollouts of a trained policy
    jobs: int = 2  # runs that are measured side by side, one thread each


def key_of(run: Path) -> tuple[str, str, float, int]:
    """(algorithm, map, alpha, seed) of a run; the algorithm is the script's word and the flags that change it."""
    facts = json.loads((run / "args.json").read_text())
    args, word = facts["args"], word_of(next(x for x in shlex.split(facts["command"]) if x.endswith(".py")))
    flags = sorted(flag for flag in describe(facts["command"])[2] if flag.split()[0] not in ("alpha", "batch-size"))
    name = f"s2ac-{args['variant']}" if word == "s2ac" else " ".join([word, *flags])
    return name, args["env_id"], float(args["alpha"]), int(args["seed"])


def saved(csv: Path, row: dict) -> Path:
    """Where the arrays lie that the pages draw of a row: v, on every other point of the grid, and others of record."""
    end = f"gamma-{row['gamma']:g}" if row["algorithm"] == "optimum" else row["seed"]
    word, env_id = row["algorithm"].replace(" ", "-"), row["env_id"].partition(":")[2]
    return csv.with_suffix("") / f"{word}_{env_id}_{row['alpha']:g}_{end}.npz"


def measure(run: Path, csv: Path, episodes: int) -> dict:
    """A row of the CSV. In a process of its own: for a density it changes the script's module."""
    about, key = json.loads((run / "args.json").read_text()), key_of(run)
    if density := re.search(r"densities.py.* --density[ =](\S+)", about["command"]):
        densities.mixture.Agent = densities.DENSITIES[density[1]]
    agent, trained = multigoal.load_policy(run / "checkpoint.pt")
    if getattr(trained, "autotune", False) or key[0].startswith("meow-plus"):
        raise UserError(f"{run}: its temperature moves, so the optimum of --alpha is not its own")
    measured = multigoal.measure(agent, trained, gym.make(trained.env_id), episodes)
    best, policy = measured.optimum, multigoal.policy_of(agent)
    repeats = multigoal.repeats_of(agent, policy)
    entropies = np.array([multigoal.histogram(repeats, best, state)[1] for state in POSITIONS])
    q = q_of(agent, trained, multigoal.STATES[trained.env_id], best.actions)
    row = dict(zip(KEYS, key, strict=True), gamma=trained.gamma, steps=trained.total_timesteps, episodes=episodes)
    row |= record(csv, row, best, policy, measured.rollouts, measured.v, q, entropies, start_of(run))
    row |= dict(v_origin=round(measured.v_origin, 1), optimum_origin=round(float(measured.optimum_origin), 1))
    row |= dict(rmse=round(measured.rmse, 1), kl=round(float(measured.kl.mean()), 3))
    row |= dict(mass=f"{mass(agent, multigoal.STATES[trained.env_id]):.6f}" if hasattr(agent, "log_prob") else "")
    seconds = (run / "checkpoint.pt").stat().st_mtime - (run / "args.json").stat().st_mtime
    row |= dict(seconds=round(seconds), command=local(about["command"]))
    return row | {name: about[name] for name in ("commit", "machine")}


def measure_optimum(csv: Path, env_id: str, alpha: float, gamma: float, episodes: int, about: dict) -> dict:
    """The optimum's row of the CSV. about: commit, machine and command."""
    best = multigoal.optimum_of(env_id, alpha, gamma)
    policy = functools.partial(best.policy, rng=np.random.default_rng(0))
    rollouts, q = multigoal.rollout(gym.make(env_id), policy, episodes), best.q(np.array(multigoal.STATES[env_id]))
    entropies, origin = scipy.special.entr(np.exp(best.log_shares(POSITIONS))).sum(-1), best.v(np.zeros((1, 2)))[0]
    row = dict(zip(KEYS, ("optimum", env_id, alpha, 0), strict=True), gamma=gamma, episodes=episodes)
    row |= record(csv, row, best, policy, rollouts, best.values, q, entropies, {})
    return row | dict.fromkeys(("v_origin", "optimum_origin"), round(float(origin), 1)) | dict(rmse=0.0, kl=0.0) | about


def record(csv: Path, row: dict, best, policy, rollouts, v: np.ndarray, q: np.ndarray, entropies, start: dict) -> dict:
    """Columns that runs and the optimum share; saves what the pages draw.

    best: the SoftOptimum, policy: (B, 2) -> (B, 2), v (S, S), q (N, A * A) at the map's states, entropies of the
    shares of the action cells at POSITIONS, start: of start_of.
    """
    env_id, n = row["env_id"], round(len(best.actions) ** 0.5)
    walled = multigoal.rollout(gym.make(env_id, obstacle=True, max_episode_steps=30), policy, len(rollouts.goals))
    entropies, peaks = entropies + np.log(4 / n**2), maxima(q)  # of the density
    arrays = dict(v=v[::2, ::2], entropy=entropies.reshape(round(len(entropies) ** 0.5), -1), maxima=peaks)
    arrays["q"] = (q - q.mean(-1, keepdims=True)).reshape(peaks.shape)[:, ::2, ::2]
    walls = [*zip(walled.paths[:20], walled.hits[:20], strict=True)]
    arrays |= dict(hit=joined(x for x, hit in walls if hit), free=joined(x for x, hit in walls if not hit))
    arrays = {name: np.float16(x.clip(-6e4, 6e4)) for name, x in arrays.items()} | start
    saved(csv, row).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(saved(csv, row), np.float16(joined(rollouts.paths[:20])), **arrays)
    new = dict(q_rmse=round(q_error(q, best.q(np.array(multigoal.STATES[env_id]))), 1))
    new |= dict(q_maxima=round(float(peaks.sum((1, 2)).mean()), 2), entropy=round(float(entropies.mean()), 3))
    new |= dict(hits=int(walled.hits.sum()), reached_after_hit=int((walled.hits & (walled.goals >= 0)).sum()))
    return outcomes(env_id, rollouts) | new


@torch.no_grad()
def q_of(agent: torch.nn.Module, trained, states: tuple, actions: np.ndarray) -> np.ndarray:
    """Q at `states` (N, 2) and `actions` (A, 2), (N, A): the lesser of two, or their mean as in the run's target."""
    obs = torch.tensor(states).float().repeat_interleave(len(actions), 0)
    both = agent.q(obs, torch.tensor(actions).float().repeat(len(states), 1))  # (N * A, 2)
    q = both.amin(-1) if getattr(trained, "clipped_double_q", True) else both.mean(-1)
    return q.double().view(len(states), -1).numpy()


def q_error(q: np.ndarray, optimal: np.ndarray) -> float:
    """RMSE of q (N, A) over the actions, each less its mean over them; the mean over the states."""
    return float((q - optimal).std(-1).mean())


def maxima(q: np.ndarray) -> np.ndarray:
    """Where q (N, A * A) has a local maximum on the action grid, (N, A, A): no cell within 4 on each axis is above.
    Of a plateau, which a net with ReLU can have, the first cell alone."""
    q = q.reshape(len(q), round(q.shape[-1] ** 0.5), -1)
    alone = [[[0] * 3] * 3, [[1] * 3] * 3, [[0] * 3] * 3]  # neighbours of a cell: those of the same state
    plateaus, _ = scipy.ndimage.label(q == scipy.ndimage.maximum_filter(q, (1, 9, 9), mode="nearest"), alone)
    peaks, (names, first) = np.zeros(q.shape, bool), np.unique(plateaus, return_index=True)
    peaks.flat[first[names > 0]] = True
    return peaks


def joined(paths: Iterable[np.ndarray]) -> np.ndarray:
    """The paths (T_i, 2) as one, NaN before each, (1 + sum of T_i + 1, 2)."""
    gap = np.full((1, 2), np.nan)
    return np.concatenate([gap, *(part for path in paths for part in (path, gap))])


def start_of(run: Path) -> dict[str, np.ndarray]:
    """start: steps, mean |mu(s)| and the geometric mean of sigma(s) of S2AC's q^0, (3, T), if the run learns it."""
    mean, log_sigma = (scalars(run, f"policy/{name}") for name in ("mean_abs", "log_sigma"))
    points = [(a.step, a.value, np.exp(b.value)) for a, b in zip(mean, log_sigma, strict=False)]
    return {"start": np.float32(points).T} if any(value for _, value, _ in points) else {}


@torch.no_grad()
def mass(agent: torch.nn.Module, states: tuple, cells: int = 400) -> float:
    """The least of int pi(a|s) da over the box at `states` (N, 2), by a midpoint sum over cells^2 actions."""
    middles = (torch.arange(cells) + 0.5) * 2 / cells - 1
    actions = torch.cartesian_prod(middles, middles)  # (cells^2, 2)
    log_probs = (agent.log_prob(torch.tensor(s).float().expand(len(actions), -1), actions) for s in states)
    return min(4 * log_prob.double().exp().mean().item() for log_prob in log_probs)


def outcomes(env_id: str, rollouts: multigoal.Rollouts) -> dict:
    """Columns of the CSV: goals reached, in all and each, mean return and length."""
    goals = [int((rollouts.goals == g).sum()) for g in range(len(gym.make(env_id).unwrapped.goals))]
    row = dict(reached=sum(goals), goals=" / ".join(map(str, goals)))
    return row | {
        "return": round(float(rollouts.returns.mean()), 1),
        "length": round(float(rollouts.lengths.mean()), 2),
    }


def summary(rows: pd.DataFrame) -> str:
    """A line an algorithm, over its seeds, and the optimum's, for each map and temperature."""
    rows = rows.sort_values(["env_id", "alpha"], kind="stable", ignore_index=True)
    goals, percent = rows["goals"].str.split(" / ", expand=True).astype(float), 100 / rows["episodes"]
    rows["reach_a_goal_%"], rows["least_goal_%"] = goals.sum(axis=1) * percent, goals.min(axis=1) * percent
    cells = "reach_a_goal_%:0 least_goal_%:0 return:1 length:1 v_origin:1 rmse:1 kl:2 mass:4 seconds:0"
    cells += " q_rmse:1 q_maxima:1 entropy:2 hits:0 reached_after_hit:0"
    return table(rows, "env_id alpha algorithm", cells)


PAGES = {  # what a page's name ends in: the array that it shows, the numbers under an algorithm's name, a panel's size
    "": ("v", "RMSE {rmse:g}, KL {kl:g}", (1.75, 1.8)),
    "-entropy": ("entropy", "mean {entropy:g}", (1.75, 1.8)),
    "-landscapes": ("q", "RMSE {q_rmse:g}, maxima {q_maxima:g}", (2, 2)),
    "-wall": ("hit", "{hits:g} hit it, {reached_after_hit:g} of them reach a goal", (1.9, 1.9)),
    "-start": ("start", "", (3, 1.8)),
}


def draw(args: Args, rows: pd.DataFrame) -> None:
    """The pages: a row of panels for each temperature, a column for the optimum and each algorithm."""
    found = [(row, saved(args.csv, row)) for row in rows.to_dict("records")]
    found = [(row, np.load(file)) for row, file in found if file.is_file()]
    for env_id, (suffix, (key, numbers, size)) in itertools.product(dict.fromkeys(rows["env_id"]), PAGES.items()):
        shown = {}  # (alpha, gamma) -> algorithm -> row and arrays of the first seed
        for row, arrays in found:
            if key in arrays and row["env_id"] == env_id:
                cell = shown.setdefault((row["alpha"], row["gamma"]), {})
                cell.setdefault(row["algorithm"], (row, arrays))
        shown = {cell: shown[cell] for cell in sorted(shown) if {*shown[cell]} != {"optimum"}}
        columns = [x for x in dict.fromkeys(["optimum", *rows["algorithm"]]) if any(x in own for own in shown.values())]
        if not shown:
            continue
        figure, axes = panels(len(shown), len(columns), size=size, sharex=True, sharey=True)
        for line, ((alpha, _), own) in zip(axes, shown.items(), strict=True):
            scale, image = ["optimum"] if "optimum" in own else own, None
            values = np.concatenate([own[name][1][key].ravel() for name in scale]).astype(float)
            line[0].set_ylabel(f"alpha {alpha:g}", fontsize=6)
            for ax, name in zip(line, columns, strict=True):
                if name not in own:
                    ax.set_visible(ax is line[0])  # which has the label
                    continue
                image = paint(ax, key, own[name][1], env_id, vmin=values.min(), vmax=values.max())
                ax.set_title(f"{name}\n{numbers.format(**own[name][0])}".strip(), fontsize=6)
                ax.tick_params(labelsize=5)
            if image:
                figure.colorbar(image, ax=[*line], fraction=0.03, pad=0.01).ax.tick_params(labelsize=5)
        save_picture(figure, args.png.with_stem(f"{args.png.stem}-{env_id.partition(':')[2]}{suffix}"))


def paint(ax, key: str, arrays: Mapping[str, np.ndarray], env_id: str, **limits: float):
    """One panel. Returns what a colour bar explains, or None."""
    env, image, options = gym.make(env_id).unwrapped, None, limits | dict(shading="gouraud", rasterized=True)
    arrays = {name: x.astype(float) for name, x in arrays.items()}
    if key == "start":
        ax.plot(arrays[key][0], arrays[key][1:].T, label=["mean of |mu(s)|", "sigma(s)"])
        ax.set_xlabel("steps", fontsize=6)
        return None
    if key == "q":
        middles = np.linspace(-1, 1, n := arrays["maxima"].shape[-1]) * (1 - 1 / n)
        for i, state in enumerate(multigoal.STATES[env_id]):
            x, y = corner = np.array([i % 3, -(i // 3)]) * 2.1
            image = ax.pcolormesh(middles[::2] + x, middles[::2] + y, arrays[key][i].T, **options)
            ax.plot(*(middles[np.argwhere(arrays["maxima"][i])] + corner).T, ".", color="tab:red", markersize=2)
            ax.text(x, y - 0.9, "({:g}, {:g})".format(*state), fontsize=6, color="white", ha="center")
        ax.set(aspect="equal", xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
        return image
    if key != "hit":
        axis = np.linspace(-multigoal.BOUND, multigoal.BOUND, len(arrays[key]))
        image = ax.pcolormesh(axis, axis, arrays[key].T, **options)
    else:
        ax.plot(*env.wall.T, color="black", linewidth=2)
    colors = dict(v={"arr_": "black"}, hit=dict(hit="tab:red", free="tab:green"), entropy={})[key]
    for name, color in colors.items():
        for array in (array for x, array in arrays.items() if x.startswith(name)):
            ax.plot(*array.T, color=color, linewidth=0.5)
    turn = np.linspace(0, 2 * np.pi)
    for x, y in env.goals:
        ax.plot(x + env.radius * np.cos(turn), y + env.radius * np.sin(turn), color="tab:red", linewidth=1)
    ax.set(xlim=AXIS[[0, -1]], ylim=AXIS[[0, -1]], aspect="equal")
    return image


def main(args: Args) -> int:
    """Exit code: 0, or 1 if a run could not be measured. Raises UserError."""
    runs = [run for path in args.paths for run in folders_of(path) if (run / "checkpoint.pt").exists()]
    jobs = {}
    for run in runs:
        key = key_of(run)
        if key[1] in multigoal.MAPS and jobs.setdefault(key, (run, args.csv, args.episodes))[0] != run:
            print(f"left out: {run}: another run is {', '.join(map(str, key))}, too", file=sys.stderr)
    code = run_missing(measure, jobs, args.csv, KEYS, args.jobs)
    if not args.csv.exists():
        raise UserError(f"no run on a goal map in {', '.join(map(str, args.paths))}, and no {args.csv}")
    about, jobs = facts(), {}
    for (env_id, alpha, gamma), own in pd.read_csv(args.csv).groupby(["env_id", "alpha", "gamma"]):
        jobs["optimum", env_id, alpha, 0, gamma] = args.csv, env_id, alpha, gamma, int(own["episodes"].iloc[0]), about
    code |= run_missing(measure_optimum, jobs, args.csv, (*KEYS, "gamma"), args.jobs)
    rows = pd.read_csv(args.csv)
    print(summary(rows))
    if args.png:
        draw(args, rows)
    return code


if __name__ == "__main__":
    sys.exit(exit_code(main, Args, __doc__))
