"""Entropies that S2AC's density gives to particles of SVGD, against exact ones (section 4.1 of its paper).

    python -m benchmark.entropy

By the code of s2ac_continuous_action.py, equations (2) and (3), on targets in the plane: the paper's Gaussian,
Gaussians of growing variance, mixtures of Gaussians on a circle. From the paper's setting (200 particles from
N(0, 6 I), 200 steps of size 0.5, sigma = 5) one thing at a time is changed: the number of particles, of steps, the
bandwidth sigma of the kernel (`rule` is the one that the script trains with). Exact entropies are closed form, those
of mixtures by quadrature.

Columns of the CSV: estimate and spread are the mean over the seeds of -mean log q^L and its standard deviation;
particles' entropy is that of a Gaussian with the particles' covariance: for a Gaussian target it says whether the
particles have arrived, whatever (3) says of them. Printed: a table for docs/results.md.
"""

import dataclasses
import math
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import tyro

import s2ac_continuous_action as s2ac
from benchmark import commit, write_csv

START_VARIANCE, EPS = 6.0, 0.5
PAPER = dict(particles=200, steps=200, sigma=5.0)
SWEEPS = {
    "particles": (5, 10, 20, 50, 100, 200, 400),
    "steps": (3, 10, 20, 50, 100, 200, 400),
    "sigma": (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0, "rule"),
}


@dataclasses.dataclass
class Args:
    csv: Path = Path("runs/entropy.csv")
    """table to write"""
    png: Path | None = Path("runs/entropy.png")
    """picture to write"""
    seeds: int = 10
    """repetitions of every setting"""
    seed: int = 0
    """seed of the particles' starts"""


@dataclasses.dataclass
class Target:
    """An equally weighted mixture of N(mean_k, covariance)."""

    name: str
    means: torch.Tensor  # (K, 2)
    covariance: torch.Tensor  # (2, 2)

    def log_p(self, u: torch.Tensor) -> torch.Tensor:
        """log p(u), (...), of u (..., 2)."""
        parts = torch.distributions.MultivariateNormal(self.means, self.covariance)
        return torch.logsumexp(parts.log_prob(u[..., None, :]), -1) - math.log(len(self.means))

    def entropy(self) -> float:
        """In nats: closed form of one Gaussian, quadrature of a mixture."""
        if len(self.means) == 1:
            return 1 + math.log(2 * math.pi) + 0.5 * self.covariance.logdet().item()
        return quadrature(self.log_p)


def targets() -> list[Target]:
    paper = Target("paper", torch.tensor([[-0.69, 0.8]]), torch.tensor([[1.13, 0.82], [0.82, 3.39]]))
    origin, eye = torch.zeros(1, 2), torch.eye(2)
    gaussians = [Target(f"variance {v}", origin, v * eye) for v in (0.25, 1, 4, 16, 64)]
    mixtures = []
    for k in (2, 3, 4):
        angle = 2 * math.pi * torch.arange(k) / k
        mixtures.append(Target(f"mixture of {k}", 3 * torch.stack([angle.cos(), angle.sin()], -1), eye))
    return [paper, *gaussians, *mixtures]


def quadrature(log_p: Callable, limit: float = 15.0, n: int = 601) -> float:
    """-int p log p du over [-limit, limit]^2 by a midpoint sum."""
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) * 2 * limit / n - limit
    values = log_p(torch.cartesian_prod(axis, axis))
    return -(values.exp() * values).sum().item() * (2 * limit / n) ** 2


def run(target: Target, seeds: int, particles: int, steps: int, sigma: float | str) -> tuple[torch.Tensor, ...]:
    """Particles (m, seeds, 2) and estimated entropies (seeds,): each seed is one `state` of the script's svgd."""
    u = START_VARIANCE**0.5 * torch.randn(particles, seeds, 2)
    log_q0 = (-0.5 * u.square() / START_VARIANCE - 0.5 * math.log(2 * math.pi * START_VARIANCE)).sum(-1)  # (m, seeds)
    h2 = None if sigma == "rule" else torch.full((seeds,), sigma**2)
    score = torch.func.grad(lambda u: target.log_p(u).sum())
    u, change = s2ac.svgd(score, u, steps, EPS, h2)
    return u, -(log_q0 + change).mean(0)


def particles_entropy(u: torch.Tensor) -> float:
    """Entropy of a Gaussian with the particles' covariance, mean over the seeds. u: (m, seeds, 2)."""
    covariance = torch.stack([each.T.cov() for each in u.unbind(1)])  # (seeds, 2, 2)
    return (1 + math.log(2 * math.pi) + 0.5 * torch.linalg.slogdet(covariance).logabsdet).mean().item()


def draw(rows: list[dict], args: Args) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(13, 8), layout="constrained")
    by_name = {target.name: target for target in targets()}
    torch.manual_seed(args.seed)
    for ax, name in zip(axes[0], ("paper", "variance 16", "mixture of 4"), strict=True):
        axis = torch.linspace(-8, 8, 161)
        density = by_name[name].log_p(torch.cartesian_prod(axis, axis)).exp().view(161, 161)
        ax.contour(axis, axis, density.T, levels=8, linewidths=0.7)
        u, _ = run(by_name[name], 1, **PAPER)
        ax.scatter(*u[:, 0].T, s=6, color="black")
        ax.set(title=f"{name}: particles after {PAPER['steps']} steps", aspect="equal")
    for ax, varied in zip(axes[1], SWEEPS, strict=True):
        for name in ("paper", "variance 1", "variance 16", "mixture of 4"):
            chosen = [r for r in rows if (r["target"], r["varied"]) == (name, varied) and r[varied] != "rule"]
            x, error = [r[varied] for r in chosen], [r["estimate"] - r["exact"] for r in chosen]
            ax.errorbar(x, error, [r["spread"] for r in chosen], marker="o", markersize=3, label=name)
        ax.axhline(0, color="black", linewidth=0.8, linestyle="--")
        ax.set(xscale="log", ylim=(-6, 3), xlabel=varied, ylabel="estimated - exact entropy, nats")
    axes[1, 0].legend()
    figure.savefig(args.png, dpi=120)
    plt.close(figure)


def table(rows: list[dict]) -> str:
    """Markdown: exact entropies, and what is estimated by bandwidth, in the paper's setting otherwise."""
    names = ["paper's 5" if sigma == PAPER["sigma"] else str(sigma) for sigma in SWEEPS["sigma"]]
    lines = ["| target | exact | " + " | ".join(f"sigma {name}" for name in names) + " | Gaussian of the particles |"]
    lines.append("|" + "---|" * (len(names) + 3))
    for target in dict.fromkeys(row["target"] for row in rows):
        by_sigma = {str(r["sigma"]): r for r in rows if (r["target"], r["varied"]) == (target, "sigma")}
        chosen = [by_sigma[str(sigma)] for sigma in SWEEPS["sigma"]]
        cells = [f"{float(r['estimate']):.2f} ± {float(r['spread']):.2f}" for r in chosen]
        arrived = f"{float(by_sigma[str(PAPER['sigma'])]['particles_entropy']):.2f}"
        lines.append(f"| {target} | {float(chosen[0]['exact']):.3f} | {' | '.join(cells)} | {arrived} |")
    return "\n".join(lines)


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    command = shlex.join(["python", "-m", "benchmark.entropy", *sys.argv[1:]])
    rows, facts = [], dict(commit=commit(), command=command)
    for target in targets():
        exact = target.entropy()
        for varied, values in SWEEPS.items():
            for value in values:
                settings = PAPER | {varied: value}
                u, estimates = run(target, args.seeds, **settings)
                row = dict(target=target.name, varied=varied, **settings, step_size=EPS, seeds=args.seeds)
                row |= dict(estimate=estimates.mean().item(), spread=estimates.std().item(), exact=exact)
                row["particles_entropy"] = particles_entropy(u)
                rows.append({k: float(f"{x:.5g}") if isinstance(x, float) else x for k, x in row.items()} | facts)
    write_csv(args.csv, rows)
    print(table(rows))
    if args.png is not None:
        args.png.parent.mkdir(parents=True, exist_ok=True)
        draw(rows, args)


if __name__ == "__main__":
    main(tyro.cli(Args))
