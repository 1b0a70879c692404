"""What a grid of benchmark.run is made of: presets, cells, and what they cost."""

import itertools
import re
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import tyro

from benchmark import ROOT

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
    "goal": [dict(scripts=("meow-mixture", "meow", "sac", "sql"), env_ids=MAPS, seeds=(1, 2, 3, 4, 5))],
    "cpu": [
        dict(scripts=("meow", "sac"), env_ids=TASKS[:2], seeds=(1, 2, 3), flags="--total-timesteps 100000"),
        dict(scripts=("meow-mixture", "sac", "sql"), env_ids=MAPS[:1], seeds=(1, 2, 3)),
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


def script_of(word: str) -> Path:
    """The script of a path, or of the word that this project's is named by: meow-mixture. Raises UserError."""
    path = Path(word) if word.endswith(".py") else ROOT / f"{word.replace('-', '_')}_continuous_action.py"
    if not path.is_file():
        raise UserError(f"{word}: no such script")
    return path.resolve()


def word_of(script: str | Path) -> str:
    """The word that a script is named by, meow-mixture of meow_mixture_continuous_action.py."""
    return re.sub("_(continuous_action|isaacgym)$", "", Path(script).stem).replace("_", "-")


def grid(args) -> dict[str, dict]:
    """Name -> cell, of the flags of benchmark.run; empty without a preset or scripts. Raises UserError."""
    given = {key: getattr(args, key) for key in ("scripts", "env_ids", "seeds", "variants") if getattr(args, key)}
    if args.preset is None and given and not {"scripts", "env_ids"} <= set(given):
        raise UserError("a grid needs --preset, or --scripts and --env-ids")
    if args.preset is None and not given and args.flags:
        raise UserError(
            "--flags is for cells of --preset or --scripts, and neither is given: give one, or leave it out; the cells "
            "of the grid keep theirs"
        )
    cells = {}
    for block in PRESETS[args.preset] if args.preset else [{}] if given else []:
        block = dict(seeds=(1,), variants=("",), flags="") | block | given
        axes = (block[key] for key in ("scripts", "env_ids", "variants", "seeds"))
        for script, env_id, variant, seed in itertools.product(*axes):
            path, label = script_of(script), re.sub(r"[^\w.]+", "-", variant).strip("-")
            name = f"{path.stem}__{env_id}{f'__{label}' if label else ''}__seed{seed}"
            cell = dict(name=re.sub(r"[^\w.-]", "_", name), script=str(path), env_id=env_id, seed=seed, variant=label)
            cell["flags"] = shlex.split(f"{block['flags']} {args.flags} {variant and f'--{variant}'}")
            cells = merge(cells, {cell["name"]: cell | dict(state="waiting", attempts=[], runs=[])})
    return cells


def merge(old: dict[str, dict], new: dict[str, dict]) -> dict[str, dict]:
    """The cells of both. Raises UserError where the two disagree."""
    for name, cell in new.items():
        if name in old and cell["script"] != old[name]["script"]:
            raise UserError(
                f"{name} would be of {old[name]['script']} and of {cell['script']}; expected one script of that file "
                "name: rename one, or give it a grid of its own"
            )
        if name in old and cell["flags"] != old[name]["flags"]:
            raise UserError(f"{name} is in the grid with other flags: {shlex.join(old[name]['flags'])}")
    return old | {name: cell for name, cell in new.items() if name not in old}


def steps(cell: dict) -> int:
    """Environment steps of the cell; of a task that STEPS lacks, a million."""
    given = re.findall(r"--total[-_]timesteps[ =](\d+)", " ".join(cell["flags"]))
    return int(given[-1]) if given else STEPS.get(re.sub("-v5$", "-v4", cell["env_id"]), 10**6)


def estimate(cells: list[dict], rate: tuple[str, ...]) -> str:
    """What the cells cost, in one line. Raises UserError for a rate that is not NAME=NUMBER."""
    if not all(re.fullmatch(r"[\w-]+=\d*\.?\d+", r) and float(r.split("=")[1]) for r in rate):
        raise UserError("--rate takes the script's word and steps a second: meow=120")
    rates = RATES | {r.split("=")[0]: float(r.split("=")[1]) for r in rate}
    words = [word_of(cell["script"]) for cell in cells]
    hours = sum(steps(c) / rates.get(w, rates["meow"]) for c, w in zip(cells, words, strict=True)) / 3600
    used = ", ".join(f"{word} {rates.get(word, rates['meow']):g}" for word in sorted(set(words)))
    return (
        f"{len(cells)} runs, {sum(map(steps, cells)):,} environment steps, "
        f"about {hours:,.{0 if hours > 10 else 1}f} CPU hours (steps a second and core: {used or 'none'})"
    )


def run_folders(here: Path) -> list[Path]:
    """The run folders of the cell whose folder is `here`, without what was set aside."""
    return sorted(path.parent for path in here.glob("runs/*/args.json"))
