"""Robot-steps and updates a second of meow_isaacgym.py, and where the time goes, for several numbers of robots.

    python -m benchmark.parallel --env-id ant --num-envs 16 64 256 --csv benchmark/results/brax_rates.csv
    python -m benchmark.parallel --env-id ant --num-envs 128 512 1024 2048 4096 --csv NAME.csv    # on a GPU

The loop is the script's: act, step the simulator, store, draw a batch, update. It runs twice, after a warm-up in which
everything is compiled or captured: as it is, which gives the rates, and with a wait for the device after each part,
which gives the shares of the simulator, the policy (standardisation included), the update (drawing its batch included)
and the buffer. Settings are the task's preset. Leave the machine's other cores idle while it runs.

    python -m benchmark.parallel --runs runs/ant__* --csv benchmark/results/brax_ant.csv

writes the curves of runs instead: mean return and length of the training episodes that ended since the last log, and
of the evaluations, with the seconds since the first log.
"""

import dataclasses
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Literal

import torch
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import meow_isaacgym as script
from benchmark import write_csv

PARTS = ("policy", "simulator", "buffer", "update")


@dataclasses.dataclass
class Args:
    csv: Path
    """table to write"""
    sim: Literal["brax", "isaacgymenvs", "isaaclab"] = "brax"
    """simulator; isaacgymenvs makes one environment a process, so one number of robots"""
    env_id: str = "ant"
    """task"""
    brax_backend: str = "mjx"
    """physics of brax"""
    num_envs: tuple[int, ...] = (16, 64, 256)
    """numbers of robots"""
    algos: tuple[Literal["meow", "sac"], ...] = ("meow", "sac")
    """algorithms"""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """where everything lives"""
    steps: int = 300
    """steps that are timed"""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: count CPU seconds of the process, for a CPU that other jobs use, too"""
    runs: tuple[Path, ...] = ()
    """folders of runs whose curves to write instead"""


def loop(sim, agent, standardizer, buffer, update, batch_size: int, steps: int, wait, now) -> dict[str, float]:
    """Seconds by now() spent in each part over `steps` steps; wait() returns when the device is done."""
    seconds = dict.fromkeys(PARTS, 0.0)
    for _ in range(steps):
        clock = [now()]

        def lap(clock=clock):
            wait()
            clock.append(now())

        obs = sim.obs
        standardizer.update(obs)
        with torch.no_grad():
            actions = agent.sample(standardizer(obs)).nan_to_num()
        lap()
        next_obs, rewards, terminated, truncated, valid = sim.step(actions)
        lap()
        buffer.add(valid, obs, actions, rewards, next_obs, terminated)
        lap()
        batch = buffer.sample(batch_size)
        update(batch._replace(obs=standardizer(batch.obs), next_obs=standardizer(batch.next_obs)))
        lap()
        for part, start, end in zip(PARTS, clock, clock[1:], strict=False):
            seconds[part] += end - start
    return seconds


def measure(args: Args, num_envs: int) -> list[dict]:
    """A row for each algorithm; they share the simulator."""
    flags = ["--sim", args.sim, "--env-id", args.env_id, "--num-envs", str(num_envs), "--device", args.device]
    flags += ["--brax-backend", args.brax_backend]
    settings = [script.parse_flags([*flags, "--algo", algo]) for algo in args.algos]
    device = script.rank_device(settings[0])
    now = time.perf_counter if args.clock == "wall" else time.process_time
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    sim = script.make_sim(settings[0], 1, device)
    rows = []
    for setting in settings:
        sim.reset()
        agent = script.make_agent(sim.obs_dim, sim.action_dim, setting).to(device)
        make_learner = script.make_meow_learner if setting.algo == "meow" else script.make_sac_learner
        update = make_learner(agent, setting)[0]
        update = script.captured(update) if device.type == "cuda" else update
        buffer = script.DeviceBuffer(2 * args.steps + 100, num_envs, sim.obs_dim, sim.action_dim, device)
        with tempfile.TemporaryDirectory() as folder:  # the mapping outlives its file
            buffer.open(Path(folder) / "buffer.bin")
        standardizer = script.Standardizer(sim.obs_dim).to(device)
        about = (sim, agent, standardizer, buffer, update, setting.batch_size)
        loop(*about, 50, wait, now)
        wait()
        start = now()
        loop(*about, args.steps, lambda: None, now)
        wait()
        total = now() - start
        seconds = loop(*about, args.steps, wait, now)
        row = dict(sim=args.sim, env_id=args.env_id, algo=setting.algo, num_envs=num_envs, batch=setting.batch_size)
        row.update(robot_steps_per_s=round(num_envs * args.steps / total), updates_per_s=round(args.steps / total, 1))
        row.update({f"{part}_share": round(seconds[part] / sum(seconds.values()), 3) for part in PARTS})
        name = torch.cuda.get_device_name() if device.type == "cuda" else "no GPU"
        machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads, {name}"
        rows.append(
            {**row, "clock": args.clock, "machine": machine, "commit": script.commit(), "command": shlex.join(sys.argv)}
        )
        print("  ".join(f"{key}={value}" for key, value in rows[-1].items() if key != "command"), flush=True)
    return rows


def curves(run: Path) -> list[dict]:
    """Rows of a run's curves."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    facts = json.loads((run / "args.json").read_text())
    about = dict(algo=facts["args"]["algo"], seed=facts["args"]["seed"])
    about.update({key: facts[key] for key in ("machine", "commit", "command")})
    begin, rows = events.Scalars("losses/qf_loss")[0].wall_time, []
    for kind in ("charts", "eval"):
        lengths = {e.step: e.value for e in events.Scalars(f"{kind}/episodic_length")}
        for e in events.Scalars(f"{kind}/episodic_return"):
            row = {"curve": "training" if kind == "charts" else "evaluation", "robot_step": e.step}
            row.update({"return": round(e.value, 2), "length": round(lengths[e.step], 1)})
            rows.append({**row, "seconds": round(e.wall_time - begin), **about})
    return rows


def main(args: Args) -> None:
    rows = [row for run in args.runs for row in curves(run)]
    for num_envs in () if args.runs else args.num_envs:
        rows += measure(args, num_envs)
        write_csv(args.csv, rows)  # after each, as a larger one may not fit the memory
    write_csv(args.csv, rows)


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except script.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
