"""Errors of the soft-value estimators of SQL and SAC, on a trained MEow whose soft value is known (figure 1b).

    python -m benchmark.studies.value_estimators --checkpoint runs/RUN/checkpoint.pt --csv NAME.csv --png NAME.png

Q (the smaller of Q_1 and Q_2), pi and V are those of the checkpoint. Q is then given to the estimators of the other
scripts, for M = 1 ... 1024 samples, at an initial state and over states that the policy visits:

    SQL, uniform actions         sql_continuous_action.importance_sampled_value
    SAC, its Gaussian actor      mean of Q - alpha log pi; the actor of sac_continuous_action is trained on this Q first
    SAC, MEow's policy           the same with actions of pi: exact, which checks the method

Bias: mean of estimate - V; spread: standard deviation of an estimate; by state, then averaged over the states.
"""

import dataclasses
import sys
from pathlib import Path

import numpy as np
import torch

import multigoal
import sac_continuous_action as sac
import sql_continuous_action as sql
from benchmark import PALETTE, UserError, exit_code, facts, panels, save_picture, write_csv

UNIFORM, GAUSSIAN, OWN = "SQL, uniform actions", "SAC, its Gaussian actor", "SAC, MEow's policy"
M = [2**k for k in range(11)]


@dataclasses.dataclass
class Args:
    checkpoint: Path  # checkpoint of a run of MEow or of its mixture
    csv: Path  # table to write
    png: Path | None = None  # picture to write
    states: int = 64  # visited states
    repeats: int = 16  # estimates with M = 1024 at each visited state, 1024 / M times as many with M samples
    initial_repeats: int = 400  # the same at the initial state
    actor_steps: int = 1000  # gradient steps of SAC's actor on the checkpoint's Q


@torch.no_grad()
def visited_states(agent: torch.nn.Module, env_id: str, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """An initial state (1, O), and n (n, O) drawn from ten episodes of sampled actions."""
    env, states = sac.make_env(env_id), []
    for i in range(10):
        obs, over = env.reset(seed=sac.EVAL_SEED + i)[0], ()
        while not any(over):
            states.append(torch.from_numpy(obs))
            obs, _, *over, _ = env.step(agent.sample(states[-1][None])[0].numpy())
    states = torch.stack(states)
    return states[:1], states[torch.randint(len(states), (n,))]


def train_actor(agent: torch.nn.Module, obs: torch.Tensor, steps: int) -> sac.SAC:
    """SAC's actor, trained by its own loss on this Q, alpha and these states, 16 actions a state and step."""
    actor = sac.SAC(obs.shape[-1], agent.action_dim, sac.Args(alpha=agent.alpha, autotune=False))
    optimizer = torch.optim.Adam(actor.actor.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        actions, log_prob = actor.sample_with_log_prob(obs.expand(16, *obs.shape))
        loss = (agent.alpha * log_prob - agent.q(obs.expand(16, *obs.shape), actions).amin(-1)).mean()
        optimizer.zero_grad()
        loss.backward(inputs=list(actor.actor.parameters()))
        optimizer.step()
        schedule.step()
    return actor


@torch.no_grad()
def draw_samples(name: str, agent: torch.nn.Module, actor: sac.SAC, obs: torch.Tensor, n: int) -> torch.Tensor:
    """min_i Q_i and log pi (zeros if uniform), (2, n), of n actions at one state (1, O)."""
    pieces = []
    for repeated in obs.expand(n, -1).split(8192):
        actions, log_prob = torch.rand(len(repeated), agent.action_dim) * 2 - 1, torch.zeros(len(repeated))
        if name == GAUSSIAN:
            actions, log_prob = actor.sample_with_log_prob(repeated)
        elif name == OWN:
            log_prob = agent.log_prob(repeated, actions := agent.sample(repeated))
        pieces.append(torch.stack([agent.q(repeated, actions).amin(-1), log_prob]))
    return torch.cat(pieces, -1)


def draw(rows: list[dict], env_id: str, path: Path) -> None:
    figure, (axes,) = panels(columns=2, size=(4.5, 3.6))
    for ax, where in zip(axes, ("initial", "visited"), strict=True):
        for name, color in zip((UNIFORM, GAUSSIAN, OWN), PALETTE, strict=False):
            chosen = [row for row in rows if (row["states"], row["estimator"]) == (where, name)]
            m, bias, spread = (np.array([row[key] for row in chosen]) for key in ("M", "bias", "spread"))
            ax.plot(m, bias, marker="o", markersize=3, color=color, label=name)
            ax.fill_between(m, bias - spread, bias + spread, color=color, alpha=0.2)
        ax.axhline(0, color="black", linewidth=0.8, linestyle="--", label="MEow, equation (3)")
        ax.set(title=f"{env_id}, {where} state{'s' * (where == 'visited')}", xlabel="M", ylabel="estimate - V")
        ax.set_xscale("log", base=2)
    save_picture(figure, path)


def main(args: Args) -> None:
    """Raises UserError."""
    agent, trained = multigoal.load_policy(args.checkpoint)
    if not hasattr(agent, "value"):
        raise UserError(f"{args.checkpoint}: {type(agent).__name__} has no exact soft value; expected MEow's")
    agent.alpha = float(agent.alpha if hasattr(agent, "alpha") else agent.value.alpha)  # the latter is MEow+'s
    torch.manual_seed(0)
    initial, visited = visited_states(agent, trained.env_id, args.states)
    actor = train_actor(agent, torch.cat([initial, visited]), args.actor_steps)
    rows = []
    for where, obs in (("initial", initial), ("visited", visited)):
        with torch.no_grad():
            v = agent.v(obs).amin(-1)  # (B,)
        n = M[-1] * (args.initial_repeats if where == "initial" else args.repeats)
        for name in (UNIFORM, GAUSSIAN, OWN):
            q, log_prob = torch.stack([draw_samples(name, agent, actor, state[None], n) for state in obs], -1)  # (n, B)
            for m in M:  # n / m independent estimates of each V(s), from m samples each
                samples = (q - agent.alpha * log_prob).view(m, n // m, -1)
                uniform = sql.importance_sampled_value(samples, agent.alpha, agent.action_dim)
                error = (uniform if name == UNIFORM else samples.mean(0)) - v  # (n / m, B)
                row = dict(env_id=trained.env_id, states=where, estimator=name, M=m, alpha=agent.alpha)
                row |= dict(bias=error.mean(0).mean().item(), spread=error.std(0).mean().item())
                row["rmse"] = error.square().mean().sqrt().item()
                rows.append({k: float(f"{x:.5g}") if isinstance(x, float) else x for k, x in row.items()})
            print(rows[-1], flush=True)
    write_csv(args.csv, [row | facts() for row in rows])
    if args.png is not None:
        draw(rows, trained.env_id, args.png)


if __name__ == "__main__":
    sys.exit(exit_code(main, Args, __doc__))
