"""Steps and updates a second of meow_isaacgym.py and sac_isaacgym.py, where the time goes, and curves of their runs.

    python -m benchmark.parallel --env-id ant --num-envs 64 256 --csv benchmark/results/brax_rates.csv
    python -m benchmark.parallel --env-id ant --num-envs 128 1024 4096 --csv NAME.csv    # on a GPU

The loop is the scripts': act, step the simulator, store, update. After a warm-up in which everything is compiled or
recorded it runs twice: as it is, which gives the rates, and with a wait for the device after each part, which gives the
shares of policy, simulator, buffer and update. Leave the machine's other cores idle.

    python -m benchmark.parallel --runs runs/ant__* --csv benchmark/results/brax_ant.csv

writes the curves of finished brax runs instead: return and length of the training episodes and of the evaluations, and
of the last checkpoint, played once more, the distance walked: x after the last step of an episode minus x after its
first, in m.
"""

import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import meow_isaacgym
import sac_isaacgym
from benchmark import facts, scalars, write_csv

SCRIPTS = dict(meow=meow_isaacgym, sac=sac_isaacgym)
PARTS = ("policy", "simulator", "buffer", "update")


@dataclasses.dataclass
class Args:
    csv: Path  # table to write
    sim: Literal["brax", "isaaclab"] = "brax"  # simulator
    env_id: str = "ant"  # task
    brax_backend: str = "mjx"  # physics of brax
    num_envs: tuple[int, ...] = (16, 64, 256)  # numbers of environments
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where everything lives
    compile: Literal["on", "off"] = "on"  # torch.compile
    steps: int = 300  # steps of all environments that are timed
    runs: tuple[Path, ...] = ()  # folders of runs whose curves to write instead


def measure(args: Args, num_envs: int) -> list[dict]:
    """A row for each algorithm; they share the simulator. One update a step, whatever the preset."""
    flags = ["--sim", args.sim, "--env-id", args.env_id, "--num-envs", str(num_envs), "--device", args.device]
    flags += ["--brax-backend", args.brax_backend, "--compile", args.compile, "--learning-starts", str(num_envs)]
    settings = {name: script.parse_args(flags) for name, script in SCRIPTS.items()}
    sim = meow_isaacgym.make_sim(settings["meow"], 1)
    sizes, device, rows = (sim.obs_dim, sim.action_dim), settings["meow"].device, []
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    for name, script in SCRIPTS.items():
        setting = settings[name]
        torch.compiler.reset()
        agent = script.Agent(*sizes, setting).to(device)
        agent.standardizer = script.Standardizer(sim.obs_dim).to(device)
        obs, actions = (torch.zeros(num_envs, n, device=device) for n in sizes)
        sample = script.compiled(setting)(agent.sample)

        def act(agent=agent, sample=sample, obs=obs, actions=actions):
            agent.standardizer.update(obs)
            actions.copy_(sample(agent.standardizer(obs)))

        act = script.recorded(setting)(torch.no_grad()(act))
        with tempfile.TemporaryDirectory() as folder:  # the mapping outlives its file
            path = Path(folder, "buffer.bin")
            buffer = script.ReplayBuffer(path, (2 * args.steps + 100) * num_envs, agent, sizes, device)
        update, _, _ = script.make_update(agent, buffer, setting)

        def loop(steps: int, wait, act=act, update=update, buffer=buffer, obs=obs, actions=actions) -> np.ndarray:
            """Seconds spent in each of PARTS; wait() returns when the device is done."""
            clock = np.zeros((steps, 5))
            for now in clock:
                now[0] = time.perf_counter()
                obs.copy_(sim.obs), act(), wait()
                now[1] = time.perf_counter()
                next_obs, rewards, terminated, _, valid = sim.step(actions)
                wait()
                now[2] = time.perf_counter()
                buffer.add(valid, obs, actions, rewards, next_obs, terminated), wait()
                now[3] = time.perf_counter()
                update(), wait()
                now[4] = time.perf_counter()
            return np.diff(clock).sum(0)

        sim.reset()
        loop(50, wait)
        start = time.perf_counter()
        loop(args.steps, lambda: None), wait()
        total = time.perf_counter() - start
        seconds = loop(args.steps, wait)
        row = dict(sim=args.sim, env_id=args.env_id, algo=name, num_envs=num_envs, batch=setting.batch_size)
        row |= dict(steps_per_s=round(num_envs * args.steps / total), updates_per_s=round(args.steps / total, 1))
        row |= {f"{part}_share": round(x / seconds.sum(), 3) for part, x in zip(PARTS, seconds, strict=True)}
        print("  ".join(f"{key}={value}" for key, value in row.items()), flush=True)
        rows.append(row | facts(device))
    return rows


def algorithm(run: Path) -> str:
    return torch.load(run / "checkpoint.pt", weights_only=True)["algorithm"].removesuffix("_isaacgym")


@torch.no_grad()
def walk(run: Path) -> dict[str, float]:
    """Return, length and distance (m) of the last checkpoint: means over an episode in each environment, with the
    deterministic action, from the starts of the evaluations."""
    script = SCRIPTS[algorithm(run)]
    agent, args = script.load_agent(run / "checkpoint.pt")
    args.capture_video = False
    sim = script.make_sim(args, 1)
    sim.reset(script.EVAL_SEED)
    returns, lengths, start, end = np.zeros((4, args.num_envs))
    active = np.ones(args.num_envs, dtype=bool)
    while active.any():
        _, rewards, terminated, truncated, valid = sim.step(agent.sample(agent.standardizer(sim.obs), True))
        x = np.asarray(sim.metrics["x_position"])
        start = np.where(lengths == 0, x, start)
        end = np.where(active, x, end)
        returns += rewards.numpy() * active * valid.numpy()
        lengths += active * valid.numpy()
        active &= ~(terminated | truncated).numpy()
    step = torch.load(run / "checkpoint.pt", weights_only=True)["run"][0]
    return {"step": step, "return": returns.mean(), "length": lengths.mean(), "distance": (end - start).mean()}


def curves(run: Path) -> list[dict]:
    """Rows of a run's curves, and one of its last checkpoint."""
    saved, rows = json.loads((run / "args.json").read_text()), []
    about = dict(env_id=saved["args"]["env_id"], algo=algorithm(run), seed=saved["args"]["seed"])
    about |= {key: saved[key] for key in ("machine", "commit", "command")}
    begin = scalars(run, "losses/qf_loss")[0].wall_time
    for curve, kind in dict(training="charts", evaluation="eval").items():
        ends = zip(scalars(run, f"{kind}/episodic_return"), scalars(run, f"{kind}/episodic_length"), strict=True)
        for e, length in ends:
            row = {"curve": curve, "step": e.step, "return": round(e.value, 2), "length": round(length.value, 1)}
            rows.append(row | dict(seconds=round(e.wall_time - begin)) | about)
    last = {key: round(value, 2) for key, value in walk(run).items()}
    return [*rows, dict(curve="last checkpoint", **last) | about]


def main(args: Args) -> None:
    rows = []
    for each in args.runs or args.num_envs:
        rows += curves(each) if args.runs else measure(args, each)
        write_csv(args.csv, rows)  # after each, as a larger number of environments may not fit the memory


if __name__ == "__main__":
    main(tyro.cli(Args))
