"""What a grid of benchmark.run is made of: presets, cells, and what they cost."""

import itertools
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
MAPS = ("multigoal:MultiGoal-v0", "multigoal:MultiGoalAsymmetric-v0")
TASKS = ("Hopper-v4", "HalfCheetah-v4", "Walker2d-v4", "Ant-v4", "Humanoid-v4")
STEPS = dict(zip(TASKS, (1_500_000, 1_500_000, 4_000_000, 4_000_000, 5_000_000), strict=True))
STEPS |= dict.fromkeys(MAPS, 16_000)  # environment steps by the scripts' presets, for the estimate alone
# Environment steps a second of one run on a core that no other job slows, for the estimate alone: medians of Hopper-v4
# in benchmark/results/speed.csv and speed_eager.csv. Other scripts count as MEow.
RATES = {"meow": 118.0, "sac": 95.0, "sql": 40.0, "s2ac": 7.0}
FIRST = "--total-timesteps 1200 --learning-starts 1000 --eval-frequency 600 --eval-episodes 2"
PRESETS = {
    "smoke": [dict(scripts=("meow", "sac", "sql"), env_ids=("Hopper-v4",), seeds=(1, 2), flags=FIRST)],
    "goal": [dict(scripts=("meow", "sac", "sql"), env_ids=MAPS, seeds=(1, 2, 3, 4, 5))],
    "cpu": [
        dict(scripts=("meow", "sac"), env_ids=TASKS[:2], seeds=(1, 2, 3), flags="--total-timesteps 100000"),
        dict(scripts=("meow", "sac"), env_ids=MAPS[:1], seeds=(1, 2, 3)),
        dict(scripts=("sql",), env_ids=MAPS[:1], seeds=(1, 2, 3)),
    ],
    "paper": [dict(scripts=("meow", "sac", "sql"), env_ids=TASKS, seeds=(1, 2, 3, 4, 5))],
    "ablation": [
        dict(
            scripts=("meow",),
            env_ids=("Hopper-v4",),
            seeds=(1, 2, 3),
            flags="--total-timesteps 150000",
            variants=("", "no-clipped-double-q", "no-reward-shift", "coupling affine", "no-deterministic-eval"),
        )
    ],
}


class UserError(Exception):
    """A mistake in what was asked for, said in one line."""


def exit_code(main: Callable, args: type, description: str) -> int:
    """main of the command line's args. 2, after one line, for a UserError, 130 for Ctrl-C before anything ran."""
    try:
        return main(tyro.cli(args, description=description)) or 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def grid(args) -> dict[str, dict]:
    """Name -> cell, of the flags of benchmark.run; empty without a preset or scripts. Raises UserError."""
    given = {key: getattr(args, key) for key in ("scripts", "env_ids", "seeds", "variants") if getattr(args, key)}
    if args.preset is None and given and not {"scripts", "env_ids"} <= set(given):
        raise UserError("a grid needs --preset, or --scripts and --env-ids")
    if args.preset is None and not given and (args.flags or args.num_seeds != 1):
        raise UserError(
            "--flags and --num-seeds are for cells of --preset or --scripts, and neither is given: give one, or leave "
            "them out; cells that are in the grid keep theirs"
        )
    cells = {}
    for block in PRESETS[args.preset] if args.preset else [{}] if given else []:
        block = dict(seeds=(1,), variants=("",), flags="") | block | given
        for script, env_id, variant in itertools.product(block["scripts"], block["env_ids"], block["variants"]):
            path = Path(script) if script.endswith(".py") else ROOT / f"{script}_continuous_action.py"
            if not path.is_file():
                raise UserError(f"{script}: no such script")
            flags = shlex.split(f"{block['flags']} {args.flags} {variant and f'--{variant}'}")
            label = re.sub(r"[^\w.]+", "-", variant).strip("-")
            for i in range(0, len(block["seeds"]), args.num_seeds):
                seeds = list(block["seeds"][i : i + args.num_seeds])
                if seeds != list(range(seeds[0], seeds[0] + len(seeds))):
                    raise UserError(f"one process trains consecutive seeds, not {seeds}")
                name = f"{path.stem}__{env_id}{f'__{label}' if label else ''}__seed{'-'.join(map(str, seeds))}"
                cell = dict(name=re.sub(r"[^\w.-]", "_", name), script=str(path.resolve()), env_id=env_id)
                cell |= dict(variant=label, flags=flags, seeds=seeds)
                cells = merge(cells, {cell["name"]: cell | dict(state="waiting", attempts=[], runs=[])})
    return cells


def merge(old: dict[str, dict], new: dict[str, dict]) -> dict[str, dict]:
    """The cells of both. Raises UserError where the two disagree."""
    seeds = {(c["script"], c["env_id"], c["variant"], seed): c["name"] for c in old.values() for seed in c["seeds"]}
    for name, cell in new.items():
        if name in old and cell["script"] != old[name]["script"]:
            raise UserError(
                f"{name} would be of {old[name]['script']} and of {cell['script']}; expected one script of that file "
                "name: rename one, or give it a grid of its own"
            )
        if name in old and cell["flags"] != old[name]["flags"]:
            raise UserError(f"{name} is in the grid with other flags: {shlex.join(old[name]['flags'])}")
        for seed in cell["seeds"]:
            other = seeds.get((cell["script"], cell["env_id"], cell["variant"], seed), name)
            if other != name:
                raise UserError(f"{name}: seed {seed} is in {other}, too")
    return old | {name: cell for name, cell in new.items() if name not in old}


def steps(cell: dict) -> int:
    """Environment steps of the cell over its seeds; of a task that STEPS lacks, a million a seed."""
    given = re.findall(r"--total[-_]timesteps[ =](\d+)", " ".join(cell["flags"]))
    return len(cell["seeds"]) * (int(given[-1]) if given else STEPS.get(re.sub("-v5$", "-v4", cell["env_id"]), 10**6))


def estimate(cells: list[dict], rate: tuple[str, ...]) -> str:
    """What the cells cost, in one line. Raises UserError for a rate that is not NAME=NUMBER."""
    if not all(re.fullmatch(r"\w+=\d*\.?\d+", r) and float(r.split("=")[1]) for r in rate):
        raise UserError("--rate takes the script's first word and steps a second: meow=120")
    rates = RATES | {r.split("=")[0]: float(r.split("=")[1]) for r in rate}
    words = {cell["name"]: Path(cell["script"]).stem.split("_")[0] for cell in cells}
    hours = sum(steps(cell) / rates.get(words[cell["name"]], rates["meow"]) for cell in cells) / 3600
    used = ", ".join(f"{word} {rates.get(word, rates['meow']):g}" for word in sorted(set(words.values())))
    runs = sum(len(cell["seeds"]) for cell in cells)
    return (
        f"{runs} runs in {len(cells)} processes, {sum(map(steps, cells)):,} environment steps, "
        f"about {hours:,.{0 if hours > 10 else 1}f} CPU hours (steps a second and core: {used or 'none'})"
    )


def run_folders(here: Path) -> list[Path]:
    """The run folders of the cell whose folder is `here`, without what was set aside."""
    return sorted(path.parent for path in here.glob("runs/*/args.json"))
