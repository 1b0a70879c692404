"""Which of its particles should S2AC take in an evaluation? Returns of several choices, and what Q promises of them.

    python -m benchmark.studies.s2ac_actions runs/RUN/checkpoint.pt ... --csv runs/s2ac_actions.csv

    random       one of the particles, as in training
    best         that of the highest min_i Q_i
    likely       that of the highest log pi
    mean         tanh of the particles' mean
    start        tanh mu(s), where the particles start
    fixed        as best, of the same draws in every state
    sampler      f(s, 0) of phi-theta-psi

return, std: of ten episodes with this choice in every step. The rest is measured in states of the episodes of
visited_by, either the random choice in every step, or this one:

    promised     min_i Q_i(s,a) of the choice less that of a random particle, mean over the states
    bellman      r + gamma (1 - d) V(s') - min_i Q_i(s,a), V of the particles at s' as in the target, mean over the
                 states: below 0 Q promises more than the step keeps; standard_error is its own, bellman_random that of
                 a random particle in the same states

For the MuJoCo tasks, whose state can be set.
"""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import tyro

import s2ac_continuous_action as s2ac
from benchmark import facts, markdown, write_csv


@dataclasses.dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]  # of runs of S2AC
    csv: Path = Path("runs/s2ac_actions.csv")  # table to write
    states: int = 1_000  # states in which each choice is tried once; 0: returns only
    seed: int = 0  # seed of the states


def choices(agent: s2ac.S2AC) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """Name -> obs (B, O) -> actions (B, D)."""

    def take(scores: Callable, xi: torch.Tensor | None = None) -> Callable[[torch.Tensor], torch.Tensor]:
        def act(obs: torch.Tensor) -> torch.Tensor:
            actions, log_prob = agent.policy(obs, None if xi is None else xi[:, None].expand(-1, len(obs), -1))
            best = scores(obs.expand(len(actions), -1, -1), actions, log_prob).argmax(0)  # (B,)
            return actions[best, torch.arange(len(obs))]

        return act

    found = dict(random=agent.sample)
    found["best"] = take(by_q := lambda obs, actions, log_prob: agent.q(obs, actions).amin(-1))
    found["fixed"] = take(by_q, agent.fixed_xi)
    found["likely"] = take(lambda obs, actions, log_prob: log_prob)
    found["mean"] = lambda obs: torch.tanh(torch.atanh(agent.policy(obs)[0].clamp(-1 + 1e-6, 1 - 1e-6)).mean(0))
    if agent.initial is not None:
        found["start"] = lambda obs: torch.tanh(agent.gaussian(obs)[0])
    if agent.sampler is not None:
        found["sampler"] = lambda obs, sample=agent.sample: sample(obs, deterministic=True)
    return found


def visited_states(act: Callable, env_id: str, n: int) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """n of (obs, qpos, qvel) from the episodes of act, a choice, that make the first 5 n or more."""
    env, states, seed = s2ac.make_env(env_id), [], s2ac.EVAL_SEED + 100
    while len(states) < 5 * n:
        obs, over, seed = env.reset(seed=seed)[0], (), seed + 1
        while not any(over):
            data = env.unwrapped.data
            states.append((obs, data.qpos.copy(), data.qvel.copy()))
            obs, _, *over, _ = env.step(act(torch.from_numpy(obs)[None])[0].numpy())
    return [states[i] for i in np.random.randint(len(states), size=n)]


def bellman_errors(agent: s2ac.S2AC, args: s2ac.Args, states: list, actions: torch.Tensor) -> np.ndarray:
    """r + gamma (1 - d) V(s') - min_i Q_i(s,a) of one step with actions (B, D) in each of the states, (B,)."""
    env, steps = s2ac.make_env(args.env_id), []
    for (_, qpos, qvel), action in zip(states, actions.numpy(), strict=True):
        env.reset()
        env.unwrapped.set_state(qpos, qvel)
        steps.append(env.step(action)[:3])
    next_obs, rewards, terminations = (torch.from_numpy(np.stack(x)) for x in zip(*steps, strict=True))
    drawn, log_prob = agent.policy(next_obs)  # (m, B, D), (m, B)
    v = (agent.q(next_obs.expand(len(drawn), -1, -1), drawn).amin(-1) - args.alpha * log_prob).mean(0)
    obs = torch.from_numpy(np.stack([obs for obs, *_ in states]))
    return (rewards + args.gamma * ~terminations * v - agent.q(obs, actions).amin(-1)).numpy()


@torch.no_grad()
def measure(checkpoint: Path, args: Args) -> list[dict]:
    """Rows of each choice: one for the states of each of visited_by."""
    agent, trained = s2ac.load_agent(checkpoint)
    torch.manual_seed(args.seed), np.random.seed(args.seed)
    step, found, rows = torch.load(checkpoint, weights_only=True)["run"][0], choices(agent), []
    states_of = functools.cache(lambda name: visited_states(found[name], trained.env_id, args.states))
    envs = [s2ac.make_env(trained.env_id) for _ in range(trained.eval_episodes)]
    for name, act in found.items():
        returns, _ = s2ac.evaluate(SimpleNamespace(sample=lambda obs, _, act=act: act(obs)), envs, trained)
        row = dict(env_id=trained.env_id, seed=trained.seed, step=step, choice=name)
        row |= {"return": returns.mean(), "std": returns.std()}
        for visited_by in dict.fromkeys(["random", name]) if args.states else [None]:
            if visited_by:
                states = states_of(visited_by)
                obs = torch.from_numpy(np.stack([obs for obs, *_ in states]))
                actions, other = act(obs), found["random"](obs)
                promised = (agent.q(obs, actions).amin(-1) - agent.q(obs, other).amin(-1)).mean().item()
                errors, others = (bellman_errors(agent, trained, states, x) for x in (actions, other))
                row |= dict(visited_by=visited_by, promised=promised, bellman=errors.mean())
                row |= dict(standard_error=errors.std() / len(states) ** 0.5, bellman_random=others.mean())
            rows.append({k: round(float(x), 2) if isinstance(x, float | np.floating) else x for k, x in row.items()})
            print(rows[-1], flush=True)
    return rows


def main(args: Args) -> None:
    rows = [row for checkpoint in args.checkpoints for row in measure(checkpoint, args)]
    write_csv(args.csv, [row | facts() for row in rows])
    print(markdown(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
