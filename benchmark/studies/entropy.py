"""Entropies that S2AC's density gives to the particles of a sampler, against exact ones (section 4.1 of its paper).

    python -m benchmark.studies.entropy

Particles start from N(0, 6 I) and move to a target in the plane by steps of size 0.5. The density is that of the first
order in the step size, log q^L = log q^0 - eps sum_l tr grad h for the step u <- u + eps h(u); the entropy is its mean
over the particles. Column `varied` of the CSV:

    sampler  figure 4a: SVGD, and SGLD, DLD and HMC of appendix C.1, 200 particles, 200 steps
    sigma    figures 4b, 9: SVGD with other bandwidths of the kernel; `rule` is the one that the script trains with
    grid     figures 4c, 10: SVGD with other numbers of steps and particles, sigma 5

SVGD is the `svgd` of s2ac_continuous_action.py. Exact entropies are closed form, those of mixtures by quadrature.
estimate and spread are mean and standard deviation over the seeds; particles_entropy is that of a Gaussian with the
particles' covariance: it says whether they have arrived at a Gaussian target.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import torch
import tyro
from torch.distributions import Categorical, Distribution, MixtureSameFamily, MultivariateNormal, Normal

import s2ac_continuous_action as s2ac
from benchmark import facts, panels, save_picture, table, write_csv

START, EPS, PAPER = Normal(0.0, 6.0**0.5), 0.5, dict(particles=200, steps=200, sigma=5.0)
STEPS, PARTICLES = (10, 20, 50, 100, 200, 400, 1000, 2000, 4000), (10, 20, 50, 100, 200)
SIGMAS = (0.1, 0.5, 1.0, 2.0, 5.0, 10.0, 100.0, "rule")


@dataclasses.dataclass
class Args:
    csv: Path = Path("runs/entropy.csv")  # table to write
    png: Path | None = Path("runs/entropy.png")  # page of pictures to write
    seeds: int = 10  # repetitions of every setting
    seed: int = 0  # seed of the particles' starts


def targets() -> dict[str, Distribution]:
    """The paper's Gaussian, Gaussians of growing variance, equally weighted mixtures of Gaussians on a circle."""
    found = {"paper": MultivariateNormal(torch.tensor([-0.69, 0.8]), torch.tensor([[1.13, 0.82], [0.82, 3.39]]))}
    found |= {f"variance {v}": MultivariateNormal(torch.zeros(2), v * torch.eye(2)) for v in (0.25, 1, 4, 16, 64)}
    for k in range(2, 9):
        angle = 2 * math.pi * torch.arange(k) / k
        parts = MultivariateNormal(3 * torch.stack([angle.cos(), angle.sin()], -1), torch.eye(2))
        found[f"mixture of {k}"] = MixtureSameFamily(Categorical(torch.ones(k)), parts, validate_args=False)
    return found


def quadrature(target: Distribution, limit: float = 15.0, n: int = 601) -> float:
    """-int p log p du over [-limit, limit]^2 by a midpoint sum."""
    axis = (torch.arange(n, dtype=torch.float64) + 0.5) * 2 * limit / n - limit
    values = target.log_prob(torch.cartesian_prod(axis, axis))
    return -(values.exp() * values).sum().item() * (2 * limit / n) ** 2


def mover(target: Distribution, u: torch.Tensor, sampler: str = "SVGD", sigma: float | str = 5.0) -> Callable:
    """The sampler as a function (u, n) -> (particles after n steps, change of log q, (m, seeds)), for u (m, seeds, 2)
    as at the start: appendix C.1 of the paper. HMC's momentum starts from N(0, I) and goes on from call to call."""
    score, momentum = torch.func.grad(lambda u: target.log_prob(u).sum()), torch.randn_like(u)
    h2 = None if sigma == "rule" else torch.full(u.shape[1:2], float(sigma) ** 2)

    def laplacian(u: torch.Tensor) -> torch.Tensor:  # of log p, the trace of the score's gradient
        return sum(torch.func.grad(lambda u, d=d: score(u)[..., d].sum())(u)[..., d] for d in range(2))

    def move(u: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        change = torch.zeros_like(u[..., 0])
        for _ in range(n):
            if sampler == "HMC":
                momentum.add_(EPS / 2 * score(u))
                change, u = change - EPS**2 / 2 * laplacian(u), u + EPS * momentum
                momentum.add_(EPS / 2 * score(u))
            else:
                noise = (2 * EPS) ** 0.5 * torch.randn_like(u) if sampler == "SGLD" else 0
                change, u = change - EPS * laplacian(u), u + EPS * score(u) + noise
        return u, change

    return (lambda u, n: s2ac.svgd(score, u, n, EPS, h2)) if sampler == "SVGD" else move


def run(target: Distribution, seeds: int, particles: int, steps: tuple[int, ...], **sampler) -> Iterator[tuple]:
    """After each of `steps`: the number of steps, particles (m, seeds, 2), estimated entropies (seeds,)."""
    u = START.sample((particles, seeds, 2))
    log_q, move, made = START.log_prob(u).sum(-1), mover(target, u, **sampler), 0
    for n in steps:
        u, change = move(u, n - made)
        log_q, made = log_q + change, n
        yield n, u, -log_q.mean(0)


def draw(rows: list[dict], shown: dict[tuple, torch.Tensor], path: Path) -> None:
    """Three lines of panels: samplers and the estimate by steps; particles by bandwidth; errors by steps, particles."""
    figure, axes = panels(3, 8, (1.9, 2.1))
    paper, frame = targets()["paper"], pd.DataFrame(rows)
    axis = torch.linspace(-7, 7, 60)
    density = paper.log_prob(torch.cartesian_prod(axis, axis)).exp().view(60, 60).T
    panel = iter([*axes[0, :4], *axes[1]])
    for (varied, name), u in sorted(shown.items(), key=lambda x: x[0][0] != "sampler"):
        ax, row = next(panel), frame[(frame["varied"] == varied) & (frame["target"] == "paper")]
        row = row[row[varied] == name].iloc[0]
        ax.plot(*u.T, ".", markersize=2)
        ax.contour(axis, axis, density, levels=4, linewidths=0.8, colors="black", zorder=3)
        title = name if varied == "sampler" else f"sigma {name}"
        ax.set(title=f"{title}: {row['estimate']:.2f}", xlim=(-7, 7), ylim=(-7, 7), aspect="equal")
    ax, own = axes[0, 4], frame[(frame["varied"] == "grid") & (frame["particles"] == max(frame["particles"]))]
    own = own[own["target"] == "paper"]
    ax.errorbar(own["steps"], own["estimate"], own["spread"], marker="o", markersize=2, label="estimate, 200 particles")
    ax.plot(own["steps"], own["particles_entropy"], label="Gaussian of the particles' covariance")
    ax.axhline(own["exact"].iloc[0], color="black", linewidth=0.8, linestyle="--", label="exact")
    ax.set(xscale="log", xlabel="steps", title="paper's Gaussian")
    [each.remove() for each in axes[0, 5:]]
    for ax, name in zip(axes[2], ("paper", *(f"mixture of {k}" for k in range(2, 9))), strict=True):
        own = frame[(frame["varied"] == "grid") & (frame["target"] == name) & (frame["steps"] <= 400)]
        error = (own["estimate"] - own["exact"]).set_axis(pd.MultiIndex.from_frame(own[["particles", "steps"]]))
        error = error.unstack()
        ax.grid(False)
        ax.imshow(error, cmap="RdBu", vmin=-1, vmax=1, origin="lower", aspect="auto")
        for i, j in itertools.product(*map(range, error.shape)):
            ax.text(j, i, f"{error.iat[i, j]:.1f}", ha="center", va="center", fontsize=5)
        ax.set_xticks(range(len(error.columns)), error.columns, fontsize=5)
        ax.set_yticks(range(len(error.index)), error.index, fontsize=5)
        ax.set(title=f"{name}: error", xlabel="steps", ylabel="particles")
    save_picture(figure, path)


def main(args: Args) -> None:
    torch.manual_seed(args.seed)
    rows, shown, about = [], {}, facts()
    for name, target in targets().items():
        exact = target.entropy().item() if isinstance(target, MultivariateNormal) else quadrature(target)
        todo = [("grid", dict(PAPER, particles=m)) for m in PARTICLES if "variance" not in name]
        todo += [("sigma", dict(PAPER, sigma=sigma)) for sigma in SIGMAS]
        todo += [("sampler", dict(PAPER, sampler=x)) for x in ("SVGD", "SGLD", "DLD", "HMC") if name == "paper"]
        for varied, settings in todo:
            long = 4000 if (name, settings["particles"]) == ("paper", PAPER["particles"]) else 400
            steps = [n for n in STEPS if n <= long] if varied == "grid" else [settings["steps"]]
            for n, u, estimates in run(target, args.seeds, **settings | dict(steps=steps)):
                row = dict(target=name, varied=varied, sampler="SVGD") | settings | dict(steps=n, step_size=EPS)
                row |= dict(seeds=args.seeds, estimate=estimates.mean().item(), spread=estimates.std().item())
                covariance = torch.stack([each.T.cov() for each in u.unbind(1)])  # (seeds, 2, 2)
                normals = torch.logdet(covariance) / 2 + 1 + math.log(2 * math.pi)  # (seeds,), entropies
                row |= dict(exact=exact, particles_entropy=normals.mean().item())
                rows.append({k: float(f"{x:.5g}") if isinstance(x, float) else x for k, x in row.items()} | about)
            if name == "paper" and varied != "grid":
                shown[varied, settings[varied]] = u[:, 0]
    write_csv(args.csv, rows)
    print(table(pd.DataFrame(rows).query("varied == 'sampler'"), "sampler exact", "estimate:2 particles_entropy:2"))
    if args.png is not None:
        draw(rows, shown, args.png)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
