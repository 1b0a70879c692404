"""Is the soft value right? V and Q of a MEow or MEow+ run against rollouts from replayed states of MuJoCo's five tasks.

    python -m benchmark.studies.fit runs/RUN ... --csv benchmark/results/beyond_fit.csv

For runs that were stopped (Ctrl-C), whose buffer.bin is still there. One row for the transitions of the last `fresh`
steps and one for all others. V and Q are min_i of the checkpoint's; V^ and Q^ the discounted soft returns of rollouts
of its policy, Q^(s, a) from the replayed action, V^(s) from an own one (`own`) less alpha log pi of it.

    v, v_rollout, v_error   V(s), V^(s): above it, V is overestimated; standard error of V - V^
    v_rmse                  root of the mean of (V - V^)^2: the error of b, with the rollouts' noise in it
    advantage, advantage_rollout    alpha log pi(a|s) = Q - V of the replayed actions, and Q^ - V^
    gain, gain_rollout      Q(s, own) - Q(s, replayed), and Q^'s; gain_error its standard error
    td_rmse                 root of the mean of (Q - y)^2, y the target of equation (6)
    lag                     V(s) - V'(s), of the target network
    rare                    share of the replayed actions with log pi(a|s) < -20
    alpha, entropy, log_sigma       temperature; of the policy, nats; mean of log sigma(s) by dimension of the action
"""

import copy
import dataclasses
import importlib
import json
import sys
from pathlib import Path

import numpy as np
import torch
import tyro

from benchmark import UserError, exit_code, facts, markdown, read_csv, write_csv


@dataclasses.dataclass
class Args:
    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of stopped runs
    csv: Path = Path("runs/fit.csv")  # table to append to
    states: int = 80  # replayed states from which rollouts start
    horizon: int = 600  # steps of a rollout; 0.99^600 = 0.002 of a constant reward is left out
    fresh: int = 10_000  # steps
    seed: int = 0  # of the draws of transitions and actions


def set_state(env, obs: np.ndarray) -> None:
    """The state that has this observation (O,), but for the position on the ground, which does not matter."""
    model = env.unwrapped.model
    skip = 1 if len(obs) == model.nq - 1 + model.nv else 2
    qpos = np.concatenate([np.zeros(skip), obs[: model.nq - skip]])
    env.reset()
    env.unwrapped.set_state(qpos, obs[model.nq - skip :][: model.nv].astype(np.float64))


def soft_returns(envs: list, agent, alpha: float, gamma: float, actions: torch.Tensor, horizon: int) -> np.ndarray:
    """sum_t gamma^t (r_t - alpha log pi(a_t|s_t)) but for the entropy of a_0, which is given: (B,). actions: (B, D)."""
    total, alive = np.zeros(len(envs)), np.ones(len(envs), bool)
    obs = np.zeros((len(envs), *envs[0].observation_space.shape), np.float32)
    for t in range(horizon):
        for i in np.flatnonzero(alive):
            obs[i], reward, terminated, _, _ = envs[i].step(actions[i].numpy())
            total[i] += gamma**t * reward
            alive[i] = not terminated
        actions = agent.sample(torch.from_numpy(obs))
        log_prob = agent.log_prob(torch.from_numpy(obs), actions).numpy()
        total -= alive * gamma ** (t + 1) * alpha * log_prob
    return total


@torch.no_grad()
def measure(run: Path, args: Args) -> list[dict]:
    if not (run / "buffer.bin").exists():
        raise UserError(f"{run}: no buffer.bin; expected a run that was stopped, not one that has finished")
    checkpoint = torch.load(run / "checkpoint.pt", weights_only=True)
    script = importlib.import_module(checkpoint["algorithm"])
    agent, trained = script.load_agent(run / "checkpoint.pt")
    target, alpha, step = copy.deepcopy(agent.value), float(agent.value.alpha), checkpoint["run"][0]
    target.load_state_dict(checkpoint["target"])
    norm = getattr(agent, "standardize", lambda obs: obs)  # MEow+'s
    n = trained.num_envs
    capacity = min(trained.buffer_size, trained.total_timesteps + n) // n * n
    buffer = script.ReplayBuffer(run / "buffer.bin", capacity, *checkpoint["sizes"], "cpu", step)
    torch.manual_seed(args.seed), np.random.seed(args.seed)
    envs = [script.make_env(trained.env_id) for _ in range(args.states)]

    def q_rollout(obs: torch.Tensor, actions: torch.Tensor) -> np.ndarray:
        for env, x in zip(envs, obs.numpy(), strict=True):
            set_state(env, x)
        return soft_returns(envs, agent, alpha, trained.gamma, actions, args.horizon)

    rows, made = [], json.loads((run / "args.json").read_text())
    begin, fresh = max(step - capacity, 0), max(step - min(args.fresh, capacity), 0)
    for age, (low, high) in dict(fresh=(fresh, step), old=(begin, fresh)).items():
        if low >= high:
            continue
        batch = script.Batch(*buffer.rows[torch.randint(low, high, (4096,)) % capacity].split(buffer.widths, -1))
        next_v, clipped = target(norm(batch.next_obs)), getattr(trained, "clipped_double_q", True)
        next_v = next_v.amin(-1, keepdim=True) if clipped else next_v.mean(-1, keepdim=True)
        y = batch.rewards + trained.gamma * (1 - batch.terminations) * next_v
        obs, replayed = batch.obs[: args.states], batch.actions[: args.states]
        own = agent.sample(obs)
        v, q, q_own = (x.amin(-1).numpy() for x in (agent.v(obs), agent.q(obs, replayed), agent.q(obs, own)))
        q_hat, own_hat = q_rollout(obs, replayed), q_rollout(obs, own)
        v_hat, log_prob = own_hat - alpha * agent.log_prob(obs, own).numpy(), agent.log_prob(batch.obs, batch.actions)
        row = dict(env_id=trained.env_id, algorithm=checkpoint["algorithm"], seed=trained.seed, step=step, age=age)
        row |= dict(horizon=args.horizon, v_error=(v - v_hat).std() / len(v) ** 0.5)
        row |= dict(v=v.mean(), v_rollout=v_hat.mean(), v_rmse=np.square(v - v_hat).mean() ** 0.5)
        row |= dict(advantage=(q - v).mean(), advantage_rollout=(q_hat - v_hat).mean(), gain=(q_own - q).mean())
        row |= dict(gain_rollout=(own_hat - q_hat).mean(), gain_error=(own_hat - q_hat).std() / len(q) ** 0.5)
        row |= dict(td_rmse=(agent.q(batch.obs, batch.actions) - y).square().mean().sqrt().item())
        row |= dict(lag=(agent.v(batch.obs) - target(norm(batch.obs))).mean().item())
        row |= dict(rare=(log_prob < -20).float().mean().item(), log_pi_median=log_prob.median().item(), alpha=alpha)
        row |= dict(entropy=agent.policy_metrics(batch.obs)["entropy"].item())
        row = {k: float(f"{x:.4g}") if isinstance(x, float | np.floating) else x for k, x in row.items()}
        sigma = agent.value.log_sigma(norm(batch.obs)).mean(0)
        row |= dict(log_sigma=" ".join(f"{x:.2f}" for x in sigma.tolist()))
        rows.append(row | dict(trained=made["command"], trained_commit=made["commit"]))
    return rows


def main(args: Args) -> None:
    """Raises UserError."""
    rows = [row | facts() for run in args.runs for row in measure(run, args)]
    write_csv(args.csv, read_csv(args.csv) + rows)
    print(markdown(rows))


if __name__ == "__main__":
    sys.exit(exit_code(main, Args, __doc__))
