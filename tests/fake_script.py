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
parser.add_argument("--exp-name", default="fake_script")
parser.add_argument("--total-timesteps", type=int, default=100)
parser.add_argument("--level", type=float, default=0.0)
parser.add_argument("--seconds", type=float, default=0.0, help="of a step")
parser.add_argument("--resume")


def scalar(writer, tag: str, value: float, step: int) -> None:
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value)])
    writer.add_event(Event(wall_time=time.time(), step=step, summary=summary))


def stop(number, frame):
    sys.exit(128 + number)


args = parser.parse_args()
if args.env_id == "Mistake-v0":
    sys.exit("error: no task Mistake-v0")
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, stop)
begun = 0
if args.resume:
    run = Path(args.resume)
    args = argparse.Namespace(**json.loads((run / "args.json").read_text())["args"])
    begun = int((run / "checkpoint.pt").read_text())
else:
    run = Path("runs") / f"{args.env_id}__{args.exp_name}__{args.seed}__{time.time_ns()}"
    run.mkdir(parents=True)
    facts = dict(args=vars(args), command=shlex.join(sys.argv), commit="abc", machine=f"niceness {os.nice(0)}")
    (run / "args.json").write_text(json.dumps(facts))
writer = EventFileWriter(str(run))
for step in range(begun + 10, args.total_timesteps + 10, 10):
    time.sleep(args.seconds)
    scalar(writer, "charts/SPS", 50.0, step)
    scalar(writer, "eval/episodic_return", args.level + step / 100 + args.seed, step)
    writer.flush()
    with open(run / "steps.txt", "a") as f:
        f.write(f"{step}\n")
    (run / "checkpoint.tmp").write_text(str(step))
    (run / "checkpoint.tmp").replace(run / "checkpoint.pt")
    bar = f"\r {step / args.total_timesteps:.0%}|## | {step}/{args.total_timesteps} [00:01<00:01]"
    print(bar, end="", file=sys.stderr)
    if args.env_id == "Crash-v0" and step >= args.total_timesteps / 2:
        raise FloatingPointError(f"the loss is not finite at step {step}")
