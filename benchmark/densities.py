"""Densities for MEow that could hold several modes, and what else might help it, tried on the 4-goal map.

    python -m benchmark.densities --png runs/densities/densities.png

Q_i = V_i + alpha log pi makes V_i the exact soft value of any normalised pi. Each trial trains by MEow's script or by
that of its mixture at the map's preset, with flags, or with another agent in the place of the script's: flows with more
couplings or with a prior whose mean depends on the state, and rational-quadratic splines on the box (package zuko). It
measures the last checkpoint as benchmark.truth does, and the least integral of pi over the box, by quadrature at the
map's states: what is missing from 1 lies in spikes narrower than a cell or, of a flow through tanh, at |a| = 1.
A run whose row is in the CSV is not run again. Exit code 1: a run failed; the others are done.
"""

import contextlib
import csv
import dataclasses
import functools
import json
import math
import os
import shlex
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import nn

import meow_continuous_action as meow
import meow_mixture_continuous_action as mixture
import multigoal
from benchmark import run_all, write_csv
from benchmark.truth import counts, spread

MAP = multigoal.MAPS[0]


class Pair(nn.Module):
    """Two couplings in the place of one; with dropout they share its masks."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.first, self.second = first, second

    def forward(self, z, obs):
        return self.second(self.first(z, obs), obs)

    def inverse(self, z, obs, keep=None):
        z, second = self.second.inverse(z, obs, keep)
        z, first = self.first.inverse(z, obs, keep)
        return z, first + second


class DeepMEow(meow.MEow):
    """The paper's flow with eight couplings."""

    def __init__(self, obs_dim: int, action_dim: int, args: meow.Args):
        super().__init__(obs_dim, action_dim, args)
        for k, coupling in enumerate(self.couplings):
            more = meow.Coupling(obs_dim, action_dim, 1 - coupling.mask, args)
            self.couplings[k] = Pair(coupling, more)


class PriorMean(meow.MLP):
    """z <- z + mu(s), used like a coupling: it makes N(0, sigma(s)^2) the prior N(mu(s), sigma(s)^2)."""

    def forward(self, z, obs):
        return z + super().forward(obs)

    def inverse(self, z, obs, keep=None):
        return z - super().forward(obs), 0.0


class PriorMeanMEow(meow.MEow):
    """The paper's flow from a prior whose mean, too, depends on the state."""

    def __init__(self, obs_dim: int, action_dim: int, args: meow.Args):
        super().__init__(obs_dim, action_dim, args)
        self.couplings[0] = Pair(PriorMean(obs_dim, 64, action_dim), self.couplings[0])


class ZeroStartMEow(mixture.MixtureMEow):
    """The mixture with hidden weights that start at zero, as those of the flow's nets of the state do."""

    def __init__(self, obs_dim: int, action_dim: int, args: mixture.Args):
        super().__init__(obs_dim, action_dim, args)
        for net in (self.mixture, *self.value.shift_nets):
            for linear in net.linears[:2]:
                nn.init.zeros_(linear.weight)


class FreeStartMEow(meow.MEow):
    """The paper's flow, its nets of the state with hidden weights as nn.Linear draws them, like the mixture's."""

    def __init__(self, obs_dim: int, action_dim: int, args: meow.Args):
        super().__init__(obs_dim, action_dim, args)
        for net in (self.value.sigma_net, *self.value.shift_nets):
            for linear in net.linears[:2]:
                linear.reset_parameters()


def splines(obs_dim: int, action_dim: int, transforms: int, hidden: int):
    """Rational-quadratic splines of the box onto itself (Durkan et al. 2019), 8 bins, as a function of the state.

    Each transform is autoregressive: a dimension's spline depends on the state and on the dimensions before it, in
    turning order. With two dimensions that is what a coupling does.
    """
    import zuko

    make = functools.partial(
        zuko.flows.MaskedAutoregressiveTransform,
        features=action_dim,
        context=obs_dim,
        univariate=functools.partial(zuko.transforms.MonotonicRQSTransform, bound=1.0),
        shapes=[(8,), (8,), (7,)],  # widths and heights of the bins, slopes at the knots between them
        hidden_features=(hidden, hidden),
        activation=torch.nn.SiLU,
    )
    order = list(range(action_dim))
    return zuko.lazy.LazyComposedTransform(*(make(order=order[:: (-1) ** k]) for k in range(transforms)))


class MixtureSplineMEow(mixture.MixtureMEow):
    """The mixture as a prior, and splines between it and the action."""

    def __init__(self, obs_dim: int, action_dim: int, args: mixture.Args, transforms: int = 2, hidden: int = 64):
        super().__init__(obs_dim, action_dim, args)
        value = self.value
        del self.value  # to come last again: make_update takes the end of the parameters for V's
        self.flow, self.value = splines(obs_dim, action_dim, transforms, hidden), value

    def log_prob(self, obs, action):
        z, log_det = self.flow(obs).call_and_ladj(action)
        return super().log_prob(obs, z) + log_det

    def sample(self, obs, deterministic=False):
        return self.flow(obs).inv(super().sample(obs, deterministic)).clamp(-1, 1)


class SplineMEow(MixtureSplineMEow):
    """Splines from the uniform distribution alone."""

    def __init__(self, obs_dim: int, action_dim: int, args: mixture.Args, transforms: int = 4, hidden: int = 64):
        super().__init__(obs_dim, action_dim, args, transforms, hidden)
        del self.mixture

    def log_prob(self, obs, action):
        return self.flow(obs).call_and_ladj(action)[1] - self.action_dim * math.log(2)

    def sample(self, obs, deterministic=False):
        z = (torch.zeros if deterministic else torch.rand)(len(obs), self.action_dim)
        return self.flow(obs).inv(z if deterministic else 2 * z - 1).clamp(-1, 1)

    def policy_metrics(self, obs):
        return dict(entropy=-self.log_prob(obs, self.sample(obs)).mean())


TRIALS = {  # name -> (script, flags beside the preset, what makes the agent)
    "mixture of 8, the preset": (mixture, "", mixture.MixtureMEow),
    "mixture of 1": (mixture, "--components 1", mixture.MixtureMEow),
    "mixture of 2": (mixture, "--components 2", mixture.MixtureMEow),
    "mixture of 4": (mixture, "--components 4", mixture.MixtureMEow),
    "mixture, min of the heads in the target": (mixture, "--clipped-double-q", mixture.MixtureMEow),
    "mixture, 1,000 random steps": (mixture, "--learning-starts 1000", mixture.MixtureMEow),
    "mixture, tau 0.02": (mixture, "--tau 0.02", mixture.MixtureMEow),
    "mixture, hidden weights from zero": (mixture, "", ZeroStartMEow),
    "mixture under 2 splines": (mixture, "", MixtureSplineMEow),
    "flow, the paper's": (meow, "", meow.MEow),
    "flow, mean of the heads": (meow, "--no-clipped-double-q", meow.MEow),
    "flow, affine couplings": (meow, "--coupling affine", meow.MEow),
    "flow, no dropout": (meow, "--dropout 0", meow.MEow),
    "flow, hidden weights not from zero": (meow, "", FreeStartMEow),
    "flow, 8 couplings": (meow, "", DeepMEow),
    "flow, prior mean of the state": (meow, "", PriorMeanMEow),
    "splines, 2 transforms": (mixture, "", functools.partial(SplineMEow, transforms=2)),
    "splines, 4 transforms": (mixture, "", SplineMEow),
    "splines, 2 transforms, 256 wide": (mixture, "", functools.partial(SplineMEow, transforms=2, hidden=256)),
}


@dataclasses.dataclass
class Args:
    trials: tuple[str, ...] = tuple(TRIALS)
    """names of the trials"""
    seeds: tuple[int, ...] = (1, 2, 3)
    """a run of each trial for each seed"""
    flags: str = ""
    """more flags of the script, for every run; give such runs a --csv of their own: rows go by trial and seed"""
    episodes: int = 400
    """rollouts of a trained policy"""
    jobs: int = 2
    """runs side by side, one thread each"""
    folder: Path = Path("runs/densities")
    """folder of the runs"""
    csv: Path = Path("runs/densities/densities.csv")
    """results, one row a run"""
    png: Path | None = None
    """picture to write: error of V and KL, a dot a run"""


@torch.no_grad()
def mass(agent: torch.nn.Module, states, cells: int = 400) -> float:
    """The least of int pi(a|s) da over the box at `states` (N, 2), by a midpoint sum over cells^2 actions."""
    middles = (torch.arange(cells) + 0.5) * 2 / cells - 1
    actions = torch.cartesian_prod(middles, middles)  # (cells^2, 2)
    states = torch.as_tensor(states, dtype=torch.float32)
    total = [agent.log_prob(s.expand(len(actions), -1), actions).double().exp().mean().item() * 4 for s in states]
    return min(total)


def run(args: Args, name: str, seed: int) -> dict:
    """Train and measure: a row of the CSV. In a process of its own, as it changes the script's module."""
    script, flags, script.Agent = TRIALS[name]
    os.chdir(args.folder)
    exp_name = f"densities_{time.time_ns()}"
    command = ["--env-id", MAP, "--seed", str(seed), "--device", "cpu", "--no-deterministic-eval", "--compile", "off"]
    command += [*shlex.split(flags), *shlex.split(args.flags)]
    start = time.time()
    with open(f"{exp_name}.log", "w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        folder = script.train(script.parse_args([*command, "--exp-name", exp_name]))
    seconds = time.time() - start
    agent, trained = script.load_agent(folder / "checkpoint.pt")
    env = gym.make(MAP)
    measured = multigoal.measure(agent, trained, env, args.episodes)
    facts = json.loads((folder / "args.json").read_text())
    row = dict(trial=name, seed=seed, steps=trained.total_timesteps) | counts(env, measured.rollouts)
    row |= dict(v_origin=round(measured.v_origin, 1), rmse=round(measured.rmse, 1))
    row |= dict(kl=round(float(measured.kl.mean()), 3), mass=f"{mass(agent, multigoal.STATES[MAP]):.6f}")
    row |= dict(parameters=sum(p.numel() for p in agent.parameters()), seconds=round(seconds))
    again = ["python", "-m", "benchmark.densities", "--trials", name, "--seeds", str(seed)]
    again += [f"--flags={args.flags}"] if args.flags else []
    return row | dict(commit=facts["commit"], machine=facts["machine"], command=shlex.join(again))


def by_trial(rows: list[dict]) -> dict[str, list[dict]]:
    """Trial -> its rows by seed, in the order of TRIALS."""
    rows = sorted(rows, key=lambda row: int(row["seed"]))
    trials = {name: [row for row in rows if row["trial"] == name] for name in TRIALS}
    return {name: runs for name, runs in trials.items() if runs}


def table(rows: list[dict], episodes: int) -> str:
    """Markdown: a row a trial, over its seeds: mean and range."""
    head = "trial | seeds | reach a goal, % | least goal, % | return | V(0,0) | RMSE of V | KL, nats"
    lines = [f"| {head} | mass in the box, least | parameters | time, s |", "|" + "---|" * 11]
    for name, runs in by_trial(rows).items():
        goals = np.array([row["goals"].split(" / ") for row in runs], dtype=float) * 100 / episodes  # (S, G)
        cells = [name, len(runs), f"{goals.sum(1).mean():.0f}", " / ".join(f"{least:.0f}" for least in goals.min(1))]
        cells += [spread(runs, "return", 1), spread(runs, "v_origin", 1), spread(runs, "rmse", 1)]
        cells += [spread(runs, "kl", 2), f"{min(float(row['mass']) for row in runs):.4f}"]
        lines.append("| " + " | ".join(map(str, [*cells, runs[0]["parameters"], spread(runs, "seconds", 0)])) + " |")
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """A row a trial, a dot a run: RMSE of V, KL, share of the goal that is reached least."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    trials = by_trial(rows)
    size = dict(figsize=(10, 0.28 * len(trials) + 1.1), sharey=True, layout="constrained")
    figure, axes = plt.subplots(1, 3, **size)
    titles = ("RMSE of V against V*", "KL(pi || pi*), nats", "share of the least goal, %")
    for ax, title in zip(axes, titles, strict=True):
        for y, runs in enumerate(trials.values()):
            goals = np.array([row["goals"].split(" / ") for row in runs], dtype=float)  # (S, G)
            share = 100 * goals.min(1) / goals.sum(1).clip(1)
            x = {titles[0]: [float(row["rmse"]) for row in runs], titles[1]: [float(row["kl"]) for row in runs]}
            ax.plot(x.get(title, share), [y] * len(runs), "o", color="tab:blue", alpha=0.7, markersize=5)
        ax.set_xlabel(title)
        ax.grid(axis="y", linewidth=0.3)
    axes[0].set(xscale="log", yticks=range(len(trials)), yticklabels=trials)
    axes[1].set(xscale="log")
    for ax in axes[:2]:
        ax.xaxis.set_minor_formatter("")
        ax.xaxis.set_major_formatter("{x:g}")
    axes[0].invert_yaxis()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    print(f"picture: {path}")


def main(args: Args) -> int:
    """Exit code: 0, 1 if a run failed, 2 for a trial that there is not."""
    unknown = [name for name in args.trials if name not in TRIALS]
    if unknown:
        print(f"error: --trials {', '.join(unknown)}: expected some of: {'; '.join(TRIALS)}", file=sys.stderr)
        return 2
    args = dataclasses.replace(args, folder=args.folder.resolve())
    args.folder.mkdir(parents=True, exist_ok=True)
    rows = list(csv.DictReader(args.csv.read_text().splitlines())) if args.csv.exists() else []
    finished = {(row["trial"], int(row["seed"])) for row in rows}
    todo = [(name, seed) for seed in args.seeds for name in args.trials if (name, seed) not in finished]
    jobs, failed = {f"{name}, seed {seed}": (args, name, seed) for name, seed in todo}, []
    for progress, row in run_all(run, jobs, args.jobs, failed):
        rows.append(row)
        shown = ("reached", "goals", "return", "v_origin", "rmse", "kl", "mass", "seconds")
        print(progress, *(f"{key} {row[key]}" for key in shown), sep=", ", flush=True)
        write_csv(args.csv, rows)
    print(table(rows, args.episodes))
    if args.png:
        draw(rows, args.png)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
