"""What MEow's soft Q-function gets wrong, against rollouts from replayed states (MuJoCo's five tasks).

    python -m benchmark.studies.fit runs/RUN ... --csv benchmark/results/fit.csv

For runs that were stopped (Ctrl-C), whose buffer.bin is still there. One row for the transitions of the last `fresh`
steps and one for all others. V and Q are min_i of the checkpoint's; V^ and Q^ the discounted soft returns of rollouts of
its policy, Q^(s, a) from the replayed action, V^(s) from an own one (`own`) less alpha log pi of it.

    v, v_rollout            V(s), V^(s): above it, V is overestimated
    v_rmse                  error of the state part, b: root of the mean of (V - V^)^2, which has the rollouts' noise in it
    advantage, advantage_rollout    alpha log pi(a|s) = Q - V of the replayed actions, and Q^ - V^
    gain, gain_rollout      Q(s, own) - Q(s, replayed), and Q^'s; gain_error its standard error
    td_rmse                 root of the mean of (Q - y)^2, y the target of equation (6)
    lag                     V(s) - V'(s), of the target network
    rare                    share of the replayed actions with log pi(a|s) < -20
    entropy, log_sigma      of the policy, nats; mean of log sigma(s) by dimension of the action
"""

import copy
import dataclasses
import importlib
import json
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmark import facts, markdown, read_csv, write_csv


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of stopped runs
    csv: Path = Path("runs/fit.csv")  # table to append to
    states: int = 256  # replayed states from which rollouts start
    horizon: int = 400  # steps of a rollout; 0.99^400 = 0.02
    fresh: int = 10_000  # steps
    seed: int = 0


def set_state(env, obs: np.ndarray) -> None:
    """The state that has this observation, but for the position on the ground, which does not matter."""
    model = env.unwrapped.model
    skip = 1 if len(obs) == model.nq - 1 + model.nv else 2
    qpos = np.concatenate([np.zeros(skip), obs[: model.nq - skip]])
    env.reset()
    env.unwrapped.set_state(qpos, obs[model.nq - skip :][: model.nv].astype(np.float64))


def soft_returns(script, agent, args, obs: np.ndarray, actions: np.ndarray, horizon: int) -> np.ndarray:
    """r_0 + sum_t gamma^t (r_t - alpha log pi) of rollouts that begin with `actions` (B, D) in `obs` (B, O): (B,)."""
    envs, total, alive = [script.make_env(args.env_id) for _ in obs], np.zeros(len(obs)), np.ones(len(obs), bool)
    obs = obs.copy()
    for env, x in zip(envs, obs, strict=True):
        set_state(env, x)
    for t in range(horizon):
        for i in np.flatnonzero(alive):
            obs[i], reward, terminated, _, _ = envs[i].step(actions[i])
            total[i] += args.gamma**t * reward
            alive[i] = not terminated
        drawn = agent.sample(torch.from_numpy(obs))
        actions = drawn.numpy()
        total += alive * args.gamma ** (t + 1) * -args.alpha * agent.log_prob(torch.from_numpy(obs), drawn).numpy()
    return total


@torch.no_grad()
def measure(run: Path, args: Args) -> list[dict]:
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    script = importlib.import_module(checkpoint["algorithm"])
    agent, trained = script.load_agent(run / "checkpoint.pt")
    target = copy.deepcopy(agent.value)
    target.load_state_dict(checkpoint["target"])
    norm = getattr(agent, "norm", lambda obs: obs)
    step = checkpoint["run"][0]
    capacity = min(trained.buffer_size, trained.total_timesteps + trained.num_envs)
    buffer = script.ReplayBuffer(run / "buffer.bin", capacity, *checkpoint["sizes"], "cpu", step)
    torch.manual_seed(args.seed), np.random.seed(args.seed)
    rows, facts_of_run = [], json.loads((run / "args.json").read_text())
    for age, (low, high) in dict(fresh=(step - args.fresh, step), old=(0, step - args.fresh)).items():
        batch = script.Batch(*buffer.rows[torch.randint(low, high, (4096,))].split(buffer.widths, -1))
        next_v = target(norm(batch.next_obs)).amin(-1, keepdim=True)
        y = batch.rewards + trained.gamma * (1 - batch.terminations) * next_v
        few = script.Batch(*(x[: args.states] for x in batch))
        own = agent.sample(few.obs)
        log_pi = agent.log_prob(few.obs, own).numpy()
        v, q, q_own = (
            x.amin(-1).numpy() for x in (agent.v(few.obs), agent.q(few.obs, few.actions), agent.q(few.obs, own))
        )
        q_hat, own_hat = (
            soft_returns(script, agent, trained, few.obs.numpy(), a.numpy(), args.horizon) for a in (few.actions, own)
        )
        v_hat = own_hat - trained.alpha * log_pi
        gain_hat = own_hat - q_hat
        log_prob = agent.log_prob(batch.obs, batch.actions)
        row = dict(env_id=trained.env_id, algorithm=checkpoint["algorithm"], seed=trained.seed, step=step, age=age)
        row |= dict(v=v.mean(), v_rollout=v_hat.mean(), v_rmse=np.square(v - v_hat).mean() ** 0.5)
        row |= dict(advantage=(q - v).mean(), advantage_rollout=(q_hat - v_hat).mean())
        row |= dict(gain=(q_own - q).mean(), gain_rollout=gain_hat.mean(), gain_error=gain_hat.std() / len(q) ** 0.5)
        row |= dict(td_rmse=(agent.q(batch.obs, batch.actions) - y).square().mean().sqrt().item())
        row |= dict(lag=(agent.v(batch.obs) - target(norm(batch.obs))).mean().item())
        row |= dict(rare=(log_prob < -20).float().mean().item())
        row |= dict(log_pi_median=log_prob.median().item())
        row |= dict(entropy=agent.policy_metrics(batch.obs)["entropy"].item())
        sigma = agent.flows[0].value.log_sigma(norm(batch.obs)).mean(0)
        row |= dict(log_sigma=" ".join(f"{x:.2f}" for x in sigma.tolist()))
        row = {k: float(f"{x:.4g}") if isinstance(x, (float, np.floating)) else x for k, x in row.items()}
        print(row, flush=True)
        rows.append(row | dict(commit=facts_of_run["commit"], trained=facts_of_run["command"]))
    return rows


def main(args: Args) -> None:
    for run in args.runs:
        rows = [row | facts() for row in measure(run, args)]
        write_csv(args.csv, read_csv(args.csv) + rows)
    print(markdown(rows))


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
