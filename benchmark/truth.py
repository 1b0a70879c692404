"""MEow (with its mixture and with the paper's flow), SAC and SQL on the goal maps against their objective's optimum.

    python -m benchmark.truth

Trains each script with its preset, on each map and for each seed, through its command line; measures the last
checkpoint with multigoal.measure (400 rollouts of sampled actions; V against soft value iteration: SAC's V from 256
actions of its policy, SQL's from 1024 uniform ones); prints a table for the README. A run whose row is in the CSV is
not run again, so the command can be interrupted and repeated.
"""

import csv
import dataclasses
import json
import multiprocessing
import os
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import gymnasium as gym
import numpy as np
import tyro

import multigoal

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {"meow-flow": ["--density", "flow", "--clipped-double-q"]}


@dataclasses.dataclass
class Args:
    algorithms: tuple[str, ...] = ("meow", "meow-flow", "sac", "sql")
    """scripts to compare, by the start of their names; meow-flow: with the paper's density and target"""
    env_ids: tuple[str, ...] = multigoal.MAPS
    """maps"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """a run of each script on each map for each seed"""
    total_timesteps: int | None = None
    """steps of every run, instead of the presets'"""
    episodes: int = 400
    """rollouts of a trained policy"""
    jobs: int = 2
    """runs side by side, one thread each"""
    csv: Path = Path("benchmark/results/truth.csv")
    """results, one row a run"""


def run(args: Args, algorithm: str, env_id: str, seed: int) -> dict:
    """Train and measure: a row of the CSV."""
    script, name = f"{algorithm.split('-')[0]}_continuous_action.py", f"truth_{algorithm}_{time.time_ns()}"
    command = [sys.executable, str(ROOT / script), "--env-id", env_id, "--seed", str(seed), *FLAGS.get(algorithm, [])]
    command += ["--exp-name", name, "--device", "cpu"]
    command += [] if args.total_timesteps is None else ["--total-timesteps", str(args.total_timesteps)]
    start = time.time()
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    seconds = time.time() - start
    (folder,) = Path("runs").glob(f"*__{name}__*")
    agent, trained = multigoal.load_policy(folder / "checkpoint.pt")
    measured = multigoal.measure(agent, trained, gym.make(env_id), args.episodes)
    rollouts, facts = measured.rollouts, json.loads((folder / "args.json").read_text())
    goals = [int((rollouts.goals == g).sum()) for g in range(len(gym.make(env_id).unwrapped.goals))]
    row = dict(env_id=env_id, algorithm=algorithm, alpha=trained.alpha, gamma=trained.gamma, seed=seed)
    row |= dict(steps=trained.total_timesteps, reached=sum(goals), goals=" / ".join(map(str, goals)))
    row |= {"return": round(float(rollouts.returns.mean()), 1), "length": round(float(rollouts.lengths.mean()), 2)}
    row |= dict(v_origin=round(measured.v_origin, 1), optimum_origin=round(float(measured.optimum_origin), 1))
    row |= dict(rmse=round(measured.rmse, 1), seconds=round(seconds), commit=facts["commit"], machine=facts["machine"])
    return row | dict(command=facts["command"])


def optimum(env_id: str, alpha: float, gamma: float, episodes: int) -> tuple[str, float, float, float]:
    """Goals, return, length of the optimal policy's rollouts and V*(0,0)."""
    env, best = gym.make(env_id), multigoal.optimum_of(env_id, alpha, gamma)
    rng = np.random.default_rng(0)
    rollouts = multigoal.rollout(env, lambda obs: best.policy(obs, rng), episodes)
    goals = " / ".join(str((rollouts.goals == g).sum()) for g in range(len(env.unwrapped.goals)))
    return goals, rollouts.returns.mean(), rollouts.lengths.mean(), best.v(np.zeros((1, 2)))[0]


def table(rows: list[dict], episodes: int) -> str:
    """Markdown: a row a run, and the optimum's, for each map."""
    lines = ["| map | algorithm | seed | reach a goal | each goal | return | length | V(0,0) | RMSE of V | time |"]
    lines.append("|" + "---|" * 10)
    for env_id in dict.fromkeys(row["env_id"] for row in rows):
        name = env_id.partition(":")[2]
        chosen = [row for row in rows if row["env_id"] == env_id]
        chosen.sort(key=lambda row: (row["algorithm"], int(row["seed"])))
        for r in chosen:
            lines.append(
                f"| {name} | {r['algorithm']} | {r['seed']} | {r['reached']} of {episodes} | {r['goals']} | "
                f"{r['return']} | {r['length']} | {r['v_origin']} | {r['rmse']} | {r['seconds']} s |"
            )
        goals, mean_return, length, v = optimum(env_id, float(r["alpha"]), float(r["gamma"]), episodes)
        reached = f"{sum(map(int, goals.split(' / ')))} of {episodes}"
        lines.append(f"| {name} | optimum | | {reached} | {goals} | {mean_return:.1f} | {length:.2f} | {v:.1f} | 0 | |")
    return "\n".join(lines)


def main(args: Args) -> None:
    rows = list(csv.DictReader(args.csv.read_text().splitlines())) if args.csv.exists() else []
    finished = {(row["algorithm"], row["env_id"], int(row["seed"])) for row in rows}
    wanted = [(a, e, s) for s in args.seeds for e in args.env_ids for a in args.algorithms]
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
        futures = {pool.submit(run, args, *job): job for job in wanted if job not in finished}
        for future in as_completed(futures):
            row = future.result()
            rows.append(row)
            print({key: row[key] for key in list(row)[:-3]}, flush=True)
            args.csv.parent.mkdir(parents=True, exist_ok=True)
            with open(args.csv, "w", newline="") as f:
                writer = csv.DictWriter(f, row.keys(), lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
    print(table(rows, args.episodes))


if __name__ == "__main__":
    main(tyro.cli(Args))
