"""Trained agents on the goal maps against the optimum of the objective that all algorithms share.

    python -m benchmark.run runs/maps --preset goal    # or temperatures, or densities
    python -m benchmark.studies.goal_map_optimum runs/maps --csv runs/maps/optimum.csv --png runs/maps/optimum.png

Measures the last checkpoint of each run by multigoal.measure: rollouts of sampled actions, V against soft value
iteration, KL(pi || pi*) at the map's states by a histogram. Of densities in closed form also the least integral of pi
over the box at those states: what is missing from 1 lies in spikes narrower than a cell or, of a flow through tanh, at
|a| = 1.
Prints a table and draws a page: V and 20 trajectories of each algorithm's first seed beside the optimum's, kept in a
folder beside the CSV, of its name. Runs that are in the CSV are not measured again.
"""

import dataclasses
import json
import re
import shlex
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pandas as pd
import torch

import multigoal
from benchmark import UserError, exit_code, panels, run_missing, save_picture, table, word_of
from benchmark.report import describe, folders_of
from benchmark.studies import densities

KEYS = ("algorithm", "env_id", "alpha", "seed")


@dataclasses.dataclass
class Args:
    paths: tuple[Path, ...] = ()  # folders of grids or runs
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


def saved(csv: Path, algorithm: str, env_id: str, alpha: float, seed: int) -> Path:
    """Where the arrays lie that the page draws of a run: v, on every other point of the grid, and 20 trajectories."""
    return csv.with_suffix("") / f"{algorithm.replace(' ', '-')}_{env_id.partition(':')[2]}_{alpha:g}_{seed}.npz"


def measure(run: Path, csv: Path, episodes: int) -> dict:
    """A row of the CSV. In a process of its own: for a density it changes the script's module."""
    facts, key = json.loads((run / "args.json").read_text()), key_of(run)
    if density := re.search(r"densities.py.* --density[ =](\S+)", facts["command"]):
        densities.mixture.Agent = densities.DENSITIES[density[1]]
    agent, trained = multigoal.load_policy(run / "checkpoint.pt")
    measured = multigoal.measure(agent, trained, gym.make(trained.env_id), episodes)
    v, *paths = (np.float16(x.clip(-6e4, 6e4)) for x in (measured.v[::2, ::2], *measured.rollouts.paths[:20]))
    saved(csv, *key).parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(saved(csv, *key), *paths, v=v)
    row = dict(zip(KEYS, key, strict=True), gamma=trained.gamma, steps=trained.total_timesteps, episodes=episodes)
    row |= outcomes(trained.env_id, measured.rollouts)
    row |= dict(v_origin=round(measured.v_origin, 1), optimum_origin=round(float(measured.optimum_origin), 1))
    row |= dict(rmse=round(measured.rmse, 1), kl=round(float(measured.kl.mean()), 3))
    row |= dict(mass=f"{mass(agent, multigoal.STATES[trained.env_id]):.6f}" if hasattr(agent, "log_prob") else "")
    seconds = (run / "checkpoint.pt").stat().st_mtime - (run / "args.json").stat().st_mtime
    return row | dict(seconds=round(seconds)) | {name: facts[name] for name in ("commit", "machine", "command")}


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


def optimum(env_id: str, alpha: float, gamma: float, episodes: int) -> tuple[dict, multigoal.Rollouts]:
    """The row of the optimal policy, and its rollouts."""
    best = multigoal.optimum_of(env_id, alpha, gamma)
    rng = np.random.default_rng(0)
    rollouts = multigoal.rollout(gym.make(env_id), lambda obs: best.policy(obs, rng), episodes)
    row = dict(algorithm="optimum", v_origin=best.v(np.zeros((1, 2)))[0], rmse=0, kl=0)
    return row | outcomes(env_id, rollouts), rollouts


def summary(rows: pd.DataFrame) -> str:
    """A line an algorithm, over its seeds, and the optimum's, for each map and temperature."""
    best = []
    for key, own in rows.groupby(["env_id", "alpha", "gamma"]):
        episodes = int(own["episodes"].iloc[0])
        best.append(optimum(*key, episodes)[0] | dict(env_id=key[0], alpha=key[1], episodes=episodes))
    rows = pd.concat([rows, pd.DataFrame(best)]).sort_values(["env_id", "alpha"], kind="stable", ignore_index=True)
    goals, percent = rows["goals"].str.split(" / ", expand=True).astype(float), 100 / rows["episodes"]
    rows["reach_a_goal_%"], rows["least_goal_%"] = goals.sum(axis=1) * percent, goals.min(axis=1) * percent
    cells = "reach_a_goal_%:0 least_goal_%:0 return:1 length:1 v_origin:1 rmse:1 kl:2 mass:4 seconds:0"
    return table(rows, "env_id alpha algorithm", cells)


def draw(args: Args, rows: pd.DataFrame) -> None:
    """The page: a row of panels for each map and temperature, a column for the optimum and each algorithm."""
    cells, columns = rows.groupby(["env_id", "alpha", "gamma"]), ["optimum", *rows["algorithm"].unique()]
    figure, axes = panels(len(cells), len(columns), size=(1.75, 1.8), sharex=True, sharey=True)
    circle = np.stack([np.cos(turn := np.linspace(0, 2 * np.pi)), np.sin(turn)], -1)
    for line, ((env_id, alpha, gamma), own) in zip(axes, cells, strict=True):
        env, best = gym.make(env_id).unwrapped, multigoal.optimum_of(env_id, alpha, gamma)
        line[0].set_ylabel(f"{env_id.partition(':')[2]}, alpha {alpha:g}", fontsize=6)
        for ax, name in zip(line, columns, strict=True):
            chosen = own[own["algorithm"] == name].to_dict("records")
            runs = [(row, saved(args.csv, name, env_id, alpha, row["seed"])) for row in chosen]
            row, file = next(((row, file) for row, file in runs if file.is_file()), (None, None))
            if name == "optimum":
                v, paths, title = best.values, optimum(env_id, alpha, gamma, 20)[1].paths, "optimum"
            elif row is None:
                ax.set_axis_off()
                continue
            else:
                arrays = {key: x.astype(float) for key, x in np.load(file).items()}
                v, paths, title = arrays.pop("v"), arrays.values(), f"{name}, RMSE {row['rmse']}, KL {row['kl']}"
            axis = np.linspace(-multigoal.BOUND, multigoal.BOUND, len(v))
            limits = dict(vmin=best.values.min(), vmax=best.values.max())
            ax.pcolormesh(axis, axis, v.T, **limits, shading="gouraud", rasterized=True)
            for path in paths:
                ax.plot(*path.T, color="black", linewidth=0.5)
            for goal in env.goals:
                ax.plot(*(goal + env.radius * circle).T, color="tab:red", linewidth=1)
            ax.set_title(title, fontsize=6)
            ax.tick_params(labelsize=5)
            ax.set(xlim=axis[[0, -1]], ylim=axis[[0, -1]], aspect="equal")
    save_picture(figure, args.png)


def main(args: Args) -> int:
    """Exit code: 0, or 1 if a run could not be measured. Raises UserError."""
    runs = [run for path in args.paths for run in folders_of(path) if (run / "checkpoint.pt").exists()]
    jobs = {key: (run, args.csv, args.episodes) for run in runs if (key := key_of(run))[1] in multigoal.MAPS}
    code = run_missing(measure, jobs, args.csv, KEYS, args.jobs)
    if not args.csv.exists():
        raise UserError(f"no run on a goal map in {', '.join(map(str, args.paths))}, and no {args.csv}")
    rows = pd.read_csv(args.csv)
    print(summary(rows))
    if args.png:
        draw(args, rows)
    return code


if __name__ == "__main__":
    sys.exit(exit_code(main, Args, __doc__))
