"""SAC here and in Stable-Baselines3: same task, seeds, settings and evaluation; are the returns the same?

    pip install -r requirements-benchmark.txt
    python -m benchmark.sb3 --env-id Hopper-v4 --total-timesteps 50000

Settings are Stable-Baselines3's defaults, given to both: Adam 3e-4 for actor, Q and alpha, an actor step with every
update, batch 256, tau 0.005, gamma 0.99, target entropy -D, 2 x 256 ReLU. Ours runs through its command line. Both are
evaluated by sac_continuous_action.evaluate, deterministic, on the same starts. Finished runs are kept in the CSV and
not run again; runs of another length or with other evaluations may be there, too, and count for nothing. Printed: for
each library the mean over seeds of the last five evaluations and its standard deviation, and Welch's 95% interval of
the difference. Exit code: 1 if a run failed.
"""

import csv
import dataclasses
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import scipy.stats
import torch
import tyro

import sac_continuous_action as sac
from benchmark import ROOT, commit, run_all, write_csv
from benchmark.export import curve

LIBRARIES = ("this project", "Stable-Baselines3")


@dataclasses.dataclass
class Args:
    env_id: str = "Hopper-v4"
    """task"""
    total_timesteps: int = 50_000
    """steps of a run"""
    learning_starts: int = 5_000
    """uniformly random steps before the first update"""
    eval_frequency: int = 5_000
    """steps between evaluations of 10 episodes"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """a run of each library for each seed"""
    jobs: int = 2
    """runs side by side, one thread each"""
    csv: Path | None = None
    """results, by default runs/sb3_{env_id}.csv"""


def evaluation_steps(args: Args) -> set[int]:
    """Steps at which a run is evaluated."""
    return {*range(args.eval_frequency, args.total_timesteps, args.eval_frequency), args.total_timesteps}


def train_ours(args: Args, seed: int) -> list[dict]:
    """One run through the command line; its evaluation curve."""
    flags = dict(env_id=args.env_id, seed=seed, total_timesteps=args.total_timesteps, device="cpu", q_lr=3e-4)
    flags |= dict(learning_starts=args.learning_starts, eval_frequency=args.eval_frequency, policy_frequency=1)
    flags |= dict(exp_name=f"sb3_check_{time.time_ns()}", buffer_size=args.total_timesteps)
    command = [sys.executable, str(ROOT / "sac_continuous_action.py")]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    (run,) = Path("runs").glob(f"*__{flags['exp_name']}__*")
    return curve(run)


def train_sb3(args: Args, seed: int) -> list[dict]:
    """The same run with Stable-Baselines3."""
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback

    torch.set_num_threads(1)
    eval_args, eval_envs = sac.Args(args.env_id, device="cpu"), [sac.make_env(args.env_id) for _ in range(10)]
    versions = f"stable-baselines3 {stable_baselines3.__version__}, torch {torch.__version__}"
    about = dict(seed=seed, commit=commit(), machine=f"{os.cpu_count()} cores, 1 torch thread, {versions}")
    about["command"] = shlex.join(["python", "-m", "benchmark.sb3", *sys.argv[1:]])
    rows, steps, start = [], evaluation_steps(args), time.time()

    class Evaluation(BaseCallback):
        def _on_step(self) -> bool:
            if self.num_timesteps in steps:
                actor = self.model.policy.actor
                policy = SimpleNamespace(sample=lambda obs, deterministic: actor(obs, deterministic=deterministic))
                returns, _ = sac.evaluate(policy, eval_envs, eval_args)
                sps = round(self.num_timesteps / (time.time() - start), 1)
                rows.append({"step": self.num_timesteps, "return": round(float(returns.mean()), 2), "SPS": sps} | about)
            return True

    env = sac.make_env(args.env_id)
    settings = dict(learning_starts=args.learning_starts, buffer_size=args.total_timesteps, seed=seed, device="cpu")
    model = stable_baselines3.SAC("MlpPolicy", env, **settings)
    model.learn(args.total_timesteps, callback=Evaluation())
    return rows


def run(args: Args, library: str, seed: int) -> list[dict]:
    rows = (train_ours if library == LIBRARIES[0] else train_sb3)(args, seed)
    return [{"library": library} | row for row in rows]


def wanted(args: Args, rows: list[dict]) -> list[dict]:
    """The rows of the runs with the evaluations that `args` asks for, without those of shorter and longer runs."""
    runs = {}
    for row in rows:
        runs.setdefault((row["library"], row["seed"], row["command"]), []).append(row)
    steps = evaluation_steps(args)
    return [row for own in runs.values() if {int(row["step"]) for row in own} == steps for row in own]


def report(rows: list[dict], seeds: tuple[int, ...]) -> None:
    """Print the table, and the interval of the difference of the means."""
    scores = {}
    for library in LIBRARIES:
        curves = [[float(r["return"]) for r in rows if (r["library"], int(r["seed"])) == (library, s)] for s in seeds]
        scores[library] = np.array([np.mean(c[-5:]) for c in curves])
        sps = np.nanmedian([float(r["SPS"]) for r in rows if r["library"] == library])
        each = " / ".join(f"{score:.1f}" for score in scores[library])
        mean, std = scores[library].mean(), scores[library].std(ddof=1)
        print(f"{library}: {mean:.1f} +- {std:.1f} over {len(seeds)} seeds ({each}), {sps:.0f} SPS")
    ours, theirs = scores.values()
    interval = scipy.stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval()
    print(f"difference {ours.mean() - theirs.mean():.1f}, 95% interval {interval.low:.1f} to {interval.high:.1f}")


def main(args: Args) -> int:
    """Exit code: 0, or 1 if a run failed."""
    path = args.csv or Path("runs") / f"sb3_{args.env_id}.csv"
    rows = list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []
    finished = {(row["library"], int(row["seed"])) for row in wanted(args, rows)}
    cells, failed = [(library, seed) for seed in args.seeds for library in LIBRARIES], []
    jobs = {
        f"{library}, seed {seed}": (args, library, seed) for library, seed in cells if (library, seed) not in finished
    }
    for progress, new in run_all(run, jobs, args.jobs, failed):
        print(f"{progress}: last evaluation {new[-1]['return']}", flush=True)
        rows += new
        write_csv(path, rows)
    both = tuple(seed for seed in args.seeds if not any(f"{library}, seed {seed}" in failed for library in LIBRARIES))
    if both:
        report(wanted(args, rows), both)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
