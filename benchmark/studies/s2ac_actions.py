"""Which of its particles should S2AC take in an evaluation? Returns of several choices, and what Q promises of them.

    python -m benchmark.studies.s2ac_actions runs/RUN/checkpoint.pt ... --csv runs/s2ac_actions.csv

    random       one of the particles, as in training
    best         that of the highest min_i Q_i
    likely       that of the highest log pi
    mean         tanh of the particles' mean
    start        tanh mu(s), where the particles start
    fixed        as best, of the same draws in every state
    sampler      f(s, 0) of phi-theta-psi

return, std: of ten episodes with this choice in every step. promised: min_i Q_i of the chosen action less that of a
random particle, mean over states of the episodes of visited_by: the random choice, or this choice in every step.
realized: the same difference in the discounted soft return of rollouts that take the action once and random particles
from then on, and its standard error. Where promised is more than realized, Q overestimates what the choice picks. For
the MuJoCo tasks, whose state can be set.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import tyro

import s2ac_continuous_action as s2ac
from benchmark import facts, markdown, write_csv


@dataclasses.dataclass
class Args:
    checkpoints: tyro.conf.Positional[tuple[Path, ...]]  # of runs of S2AC
    csv: Path = Path("runs/s2ac_actions.csv")  # table to write
    states: int = 200  # states from which each choice is tried once; 0: returns only
    horizon: int = 200  # steps of a rollout, 0.99^200 = 0.13
    seed: int = 0  # seed of states and rollouts


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


def episodes(agent: s2ac.S2AC, act: Callable, args: s2ac.Args) -> np.ndarray:
    """Returns (E,) of the script's evaluation, with these actions."""
    agent.sample, saved = lambda obs, deterministic: act(obs), agent.sample
    returns = s2ac.evaluate(agent, [s2ac.make_env(args.env_id) for _ in range(args.eval_episodes)], args)[0]
    agent.sample = saved
    return returns


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


def soft_returns(agent: s2ac.S2AC, args: s2ac.Args, states: list, actions: np.ndarray, horizon: int) -> np.ndarray:
    """r_0 + sum_t gamma^t (r_t - alpha log pi) of rollouts that begin with `actions` (B, D) in the states: (B,)."""
    envs, total, alive = [s2ac.make_env(args.env_id) for _ in states], np.zeros(len(states)), np.ones(len(states), bool)
    obs = np.stack([obs for obs, *_ in states])
    for env, (_, qpos, qvel) in zip(envs, states, strict=True):
        env.reset()
        env.unwrapped.set_state(qpos, qvel)
    for t in range(horizon):
        for i in np.flatnonzero(alive):
            obs[i], reward, terminated, _, _ = envs[i].step(actions[i])
            total[i] += args.gamma**t * reward
            alive[i] = not terminated
        drawn, log_prob = agent.policy(torch.from_numpy(obs))
        actions = drawn[0].numpy()
        total += alive * args.gamma ** (t + 1) * -args.alpha * log_prob[0].numpy()
    return total


@torch.no_grad()
def measure(checkpoint: Path, args: Args) -> list[dict]:
    """A row for each choice."""
    agent, trained = s2ac.load_agent(checkpoint)
    torch.manual_seed(args.seed), np.random.seed(args.seed)
    step, found, rows = torch.load(checkpoint, weights_only=True)["run"][0], choices(agent), []

    def measured(obs: torch.Tensor, states: list, act: Callable) -> np.ndarray:  # min Q and the soft return, (2, B)
        q = agent.q(obs, actions := act(obs)).amin(-1).numpy()
        return np.stack([q, soft_returns(agent, trained, states, actions.numpy(), args.horizon)])

    for name, act in found.items():
        returns = episodes(agent, act, trained)
        row = dict(env_id=trained.env_id, seed=trained.seed, step=step, choice=name)
        row |= {"return": returns.mean(), "std": returns.std()}
        for visited_by in dict.fromkeys(["random", name]) if args.states else [None]:
            if visited_by:
                states = visited_states(found[visited_by], trained.env_id, args.states)
                obs = torch.from_numpy(np.stack([obs for obs, *_ in states]))
                promised, realized = measured(obs, states, act) - measured(obs, states, found["random"])  # (B,) each
                row |= dict(visited_by=visited_by, promised=promised.mean(), realized=realized.mean())
                row |= dict(standard_error=realized.std() / len(states) ** 0.5)
            rows.append({k: round(float(x), 2) if isinstance(x, np.floating) else x for k, x in row.items()})
            print(rows[-1], flush=True)
    return rows


def main(args: Args) -> None:
    rows = [row for checkpoint in args.checkpoints for row in measure(checkpoint, args)]
    write_csv(args.csv, [row | facts() for row in rows])
    print(markdown(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
