"""Entropies that S2AC's density gives to particles of SVGD, against exact ones (section 4.1 of its paper).

    python -m benchmark.studies.entropy

By `svgd` of s2ac_continuous_action.py on targets in the plane. From the paper's setting (200 particles from N(0, 6 I),
200 steps of size 0.5, sigma = 5) one thing at a time is changed: the number of particles, of steps, the bandwidth sigma
of the kernel (`rule` is the one that the script trains with). Exact entropies are closed form, those of mixtures by
quadrature. CSV: estimate and spread are mean and standard deviation over the seeds of -mean log q^L; particles_entropy
is that of a Gaussian with the particles' covariance: it says whether they have arrived at a Gaussian target.
"""

import dataclasses
import math
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal, Normal

import s2ac_continuous_action as s2ac
from benchmark import PALETTE, facts, panels, save_picture, table, write_csv

START, EPS, PAPER = Normal(0.0, 6.0**0.5), 0.5, dict(particles=200, steps=200, sigma=5.0)
SWEEPS = {
    "particles": (5, 10, 20, 50, 100, 200, 400),
    "steps": (3, 10, 20, 50, 100, 200, 400),
    "sigma": (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0, "rule"),
}


@dataclasses.dataclass
class Args:
    csv: Path = Path("runs/entropy.csv")  # table to write
    png: Path | None = Path("runs/entropy.png")  # picture to write
    seeds: int = 10  # repetitions of every setting
    seed: int = 0  # seed of the particles' starts


def targets() -> dict[str, Distribution]:
    """The paper's Gaussian, Gaussians of growing variance, equally weighted mixtures of Gaussians on a circle."""
    found = {"paper": MultivariateNormal(torch.tensor([-0.69, 0.8]), torch.tensor([[1.13, 0.82], [0.82, 3.39]]))}
    found |= {f"variance {v}": MultivariateNormal(torch.zeros(2), v * torch.eye(2)) for v in (0.25, 1, 4, 16, 64)}
    for k in (2, 3, 4):
        angle = 2 * math.pi * torch.arange(k) / k
        parts = MultivariateNormal(3 * torch.stack([angle.cos(), angle.sin()], -1), torch.eye(2))
        found[f"mixture of {k}"] = MixtureSameFamily(Categorical(torch.ones(k)), parts, validate_args=False)
    return found


def quadrature(target: Distribution, limit: float = 15.0, n: int = 601) -> float:
    """-int p log p du over [-limit, limit]^2 by a midpoint sum."""
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) * 2 * limit / n - limit
    values = target.log_prob(torch.cartesian_prod(axis, axis))
    return -(values.exp() * values).sum().item() * (2 * limit / n) ** 2


def run(target: Distribution, seeds: int, particles: int, steps: int, sigma: float | str) -> tuple[torch.Tensor, ...]:
    """Particles (m, seeds, 2) and estimated entropies (seeds,): each seed is one `state` of the script's svgd."""
    u = START.sample((particles, seeds, 2))
    h2 = None if sigma == "rule" else torch.full((seeds,), sigma**2)
    end, change = s2ac.svgd(torch.func.grad(lambda u: target.log_prob(u).sum()), u, steps, EPS, h2)
    return end, -(START.log_prob(u).sum(-1) + change).mean(0)


def draw(rows: list[dict], path: Path) -> None:
    figure, (axes,) = panels(columns=3, size=(3.6, 3.6), sharey=True)
    for ax, varied in zip(axes, SWEEPS, strict=True):
        for name, color in zip(("paper", "variance 1", "variance 16", "mixture of 4"), PALETTE, strict=False):
            chosen = [r for r in rows if (r["target"], r["varied"]) == (name, varied) and r[varied] != "rule"]
            x, error = [r[varied] for r in chosen], [r["estimate"] - r["exact"] for r in chosen]
            ax.errorbar(x, error, [r["spread"] for r in chosen], marker="o", markersize=3, color=color, label=name)
        ax.axhline(0, color="black", linewidth=0.8, linestyle="--")
        ax.set(xscale="log", ylim=(-6, 3), xlabel=varied)
    axes[0].set_ylabel("estimated - exact entropy, nats")
    save_picture(figure, path)


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    rows, about = [], facts()
    for name, target in targets().items():
        exact = target.entropy().item() if isinstance(target, MultivariateNormal) else quadrature(target)
        for varied, value in ((varied, value) for varied, values in SWEEPS.items() for value in values):
            settings = PAPER | {varied: value}
            u, estimates = run(target, args.seeds, **settings)
            row = dict(target=name, varied=varied, **settings, step_size=EPS, seeds=args.seeds)
            row |= dict(estimate=estimates.mean().item(), spread=estimates.std().item(), exact=exact)
            covariance = torch.stack([each.T.cov() for each in u.unbind(1)])  # (seeds, 2, 2)
            row["particles_entropy"] = MultivariateNormal(torch.zeros(2), covariance).entropy().mean().item()
            rows.append({k: float(f"{x:.5g}") if isinstance(x, float) else x for k, x in row.items()} | about)
    write_csv(args.csv, rows)
    frame = pd.DataFrame(rows)
    print(table(frame[frame["varied"] == "sigma"], "target exact", "estimate:2", "sigma"))
    if args.png is not None:
        draw(rows, args.png)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
