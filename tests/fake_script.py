"""A script that keeps the contracts of the training scripts' command line and trains nothing.

The evaluation return at step t is `--level` + t/100 + seed (for tests of what reads it). Tasks: Crash-v0 fails at half
of its steps, Mistake-v0 is refused, any other runs through. Each step executed is a line of the run's steps.txt.
"""

import argparse
import json
import os
import shlex
import signal
import sys
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

parser = argparse.ArgumentParser()
parser.add_argument("--env-id", default="Hopper-v4")
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--num-seeds", type=int, default=1)
parser.add_argument("--exp-name", default="fake_script")
parser.add_argument("--total-timesteps", type=int, default=100)
parser.add_argument("--level", type=float, default=0.0)
parser.add_argument("--seconds", type=float, default=0.0, help="of a step")
parser.add_argument(
    "--hold", type=float, default=0.0, help="seconds that level 0 waits at half of its steps; level 10 does not"
)
parser.add_argument("--resume")


def scalar(writer, tag: str, value: float, step: int) -> None:
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def stop(number, frame):
    sys.exit(128 + number)


args = parser.parse_args()
if args.env_id == "Mistake-v0":
    print("error: no task Mistake-v0", file=sys.stderr)
    sys.exit(2)
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
first, runs = 0, []
if args.resume:
    runs = [Path(args.resume)]
    args = argparse.Namespace(**json.loads((runs[0] / "args.json").read_text())["args"])
    first = int((runs[0] / "checkpoint.pt").read_text())
else:
    for seed in range(args.seed, args.seed + args.num_seeds):
        run = Path("runs") / f"{args.env_id}__{args.exp_name}__{seed}__{time.time_ns()}"
        run.mkdir(parents=True)
        facts = dict(args=vars(args) | {"seed": seed}, command=shlex.join(sys.argv), commit="abc")
        facts |= dict(machine=f"niceness {os.nice(0)}")
        (run / "args.json").write_text(json.dumps(facts))
        runs.append(run)
writers = [EventFileWriter(str(run)) for run in runs]
for step in range(first + 10, args.total_timesteps + 10, 10):
    time.sleep(args.seconds)
    for run, writer in zip(runs, writers, strict=True):
        scalar(writer, "charts/SPS", 50.0, step)
        seed = json.loads((run / "args.json").read_text())["args"]["seed"]
        scalar(writer, "eval/episodic_return", args.level + step / 100 + seed, step)
        writer.flush()
        with open(run / "steps.txt", "a") as f:
            f.write(f"{step}\n")
        (run / "checkpoint.tmp").write_text(str(step))
        (run / "checkpoint.tmp").replace(run / "checkpoint.pt")
    print(
        f"\r {step / args.total_timesteps:.0%}|## | {step}/{args.total_timesteps} [00:01<00:01]",
        end="",
        file=sys.stderr,
    )
    if step == args.total_timesteps // 20 * 10:
        time.sleep(args.hold * (1 - args.level / 10) ** 2)  # a bad one is still there to be stopped, if late
    if args.env_id == "Crash-v0" and step >= args.total_timesteps / 2:
        raise FloatingPointError(f"the loss is not finite at step {step}")
