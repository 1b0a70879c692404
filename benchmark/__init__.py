"""Commands that measure: each module's first lines say what it does and how to call it. Here is what they share."""

import csv
import importlib.metadata
import itertools
import json
import multiprocessing
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import tyro
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
NAMES = {"meow": "MEow", "sac": "SAC", "sql": "SQL", "s2ac": "S2AC", "meow-mixture": "MEow mixture", "sac-nf": "SAC-NF"}
NAMES |= {f"sb3:{algo}": f"SB3 {algo.upper()}" for algo in ("ppo", "td3", "ddpg", "sac")}
NAMES["meow-plus"] = "MEow+"
PALETTE = "#3f90da #e76300 #bd1f01 #832db6 #94a4a2 #717581 #ffa90e #a96b59 #b9ac70 #92dadd".split()  # Petroff 2021


class UserError(Exception):
    """A mistake in what was asked for, said in one line."""


def exit_code(main: Callable, args: type, description: str) -> int:
    """main of the command line's args. 2, after one line, for a UserError."""
    try:
        return main(tyro.cli(args, description=description)) or 0
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 2


def facts(device: str = "cpu", threads: bool = True) -> dict[str, str]:
    """How a row is made: commit (empty outside of git), machine with torch's threads and versions, command."""
    import torch

    have = {found.metadata["Name"].lower(): found.version for found in importlib.metadata.distributions()}
    packages = ("torch", "gymnasium", "mujoco", "numpy", "stable_baselines3", "sbx-rl", "jax", "brax")
    versions = ", ".join(f"{name} {have[name]}" for name in packages if name in have)
    cpu = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    machine = [platform.machine(), *re.findall("model name.*: (.*)", cpu)[:1], f"{os.cpu_count()} cores"]
    machine += [f"{torch.get_num_threads()} torch threads"] * threads
    machine += [torch.cuda.get_device_name() if device == "cuda" else "no GPU"]
    spec = sys.modules["__main__"].__spec__
    script = ["python", "-m", spec.name] if spec else [sys.argv[0]]
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() if shutil.which("git") else ""
    command = shlex.join([*script, *sys.argv[1:]])
    return dict(commit=commit, machine=f"{', '.join(machine)}; {versions}", command=command)


def script_of(word: str) -> tuple[Path, list[str]]:
    """The script of a path or of a word (meow-mixture, sb3:ppo), and the flags that choose it. Raises UserError."""
    algo, own = word.partition(":")[2], f"{word.replace('-', '_')}_continuous_action.py"
    path = ROOT / {"densities": "benchmark/studies/densities.py"}.get(word, "benchmark/sb3.py" if algo else own)
    path = Path(word) if word.endswith(".py") else path
    if not path.is_file() or (algo and word not in NAMES):
        raise UserError(f"{word}: no such script")
    return path.resolve(), ["--algo", algo] if algo else []


def word_of(script: str | Path) -> str:
    """meow-mixture of meow_mixture_continuous_action.py."""
    return re.sub("_(continuous_action|isaacgym)$", "", Path(script).stem).replace("_", "-")


def scalars(run: Path, tag: str) -> list:
    """TensorBoard events of a run: .step, .value. Empty if it has none of this tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return events.Scalars(tag) if tag in events.Tags()["scalars"] else []


def read_csv(path: Path) -> list[dict]:
    """Rows; none if there is no such file."""
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def write_csv(path: Path, rows: list[dict]) -> None:
    """A column that a row lacks is empty there. At every moment the file is the old one or the new one, whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    with open(new, "w", newline="") as f:
        writer = csv.DictWriter(f, dict.fromkeys(key for row in rows for key in row), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    new.replace(path)


def run_missing(function: Callable, jobs: dict[tuple, tuple], path: Path, keys: tuple[str, ...], workers: int) -> int:
    """Append function(*arguments) -> row to the CSV at `path` for the `jobs` that it lacks. Returns 1 if one failed.

    jobs: values of the columns `keys` -> arguments. `workers` processes of one thread each run side by side.
    """
    rows, code = read_csv(path), 0
    have = {tuple(row[key] for key in keys) for row in rows}
    todo = {names: arguments for names, arguments in jobs.items() if tuple(map(str, names)) not in have}
    os.environ["OMP_NUM_THREADS"] = "1"
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(function, *arguments): ", ".join(map(str, n)) for n, arguments in todo.items()}
        for future in tqdm(as_completed(futures), total=len(todo)):
            try:
                rows.append(future.result())
                write_csv(path, rows)
                tqdm.write(json.dumps(rows[-1]))
            except (Exception, SystemExit) as e:  # SystemExit: a mistake that a script found
                code = 1
                tqdm.write(f"failed: {futures[future]}: {type(e).__name__}: {e}", file=sys.stderr)
    return code


def markdown(rows: list[dict]) -> str:
    """A table of rows with the same keys."""
    lines = [rows[0], ["---"] * len(rows[0]), *(row.values() for row in rows)] if rows else []
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def table(rows, by: str, cells: str, across: str = "") -> str:
    """A line for each value of the columns `by` of a frame; cells "return:0 kl:2": column and digits.

    A cell is the mean (lowest to highest) over n rows, or of a timing, whose rows are turns, the median. With `across`,
    a column, there is a column for each of its values, without ranges. A column that is not there is empty.
    """
    import pandas as pd

    digits = {column: int(n) for column, n in (cell.split(":") for cell in cells.split())}
    columns, middle = [*by.split(), *across.split()], pd.Series.median if "turn" in rows else pd.Series.mean

    def text(x: pd.Series) -> str:
        f, x = f"{{:z.{digits[x.name]}f}}".format, pd.to_numeric(x).dropna()
        low, high = f(x.min()), f(x.max())
        return (f(middle(x)) + (f" ({low} to {high})" if low != high and not across else "")) if len(x) else ""

    groups = rows.reindex(columns=[*columns, *digits]).groupby(columns, sort=False)
    found = pd.DataFrame({"n": groups.size()} | {column: groups[column].agg(text) for column in digits})
    if across:  # in the order of the rows; unstack(sort=False) of pandas 2.3 mixes cells up
        order = found.index.droplevel(across).unique(), found.index.unique(across)
        found = found[[*digits][0]].unstack(fill_value="").reindex(index=order[0], columns=order[1])
        found = found.add_prefix("" if across == "algorithm" else f"{across} ")
    return markdown(found.reset_index().to_dict("records"))


def colors(names: Iterable[str]) -> dict[str, str]:
    """Name -> colour: an algorithm's is the same in all pictures, others take what is left."""
    fixed, names = dict(zip(NAMES.values(), PALETTE, strict=False)), list(names)
    left = itertools.cycle([color for color in PALETTE if color not in map(fixed.get, names)])
    return {name: fixed.get(name) or next(left) for name in names}


def panels(rows: int = 1, columns: int = 1, size: tuple[float, float] = (4.2, 3.4), **options):
    """A figure and its panels (rows, columns), each of this size in inches."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
    plt.rcParams.update({"grid.linewidth": 0.3, "legend.frameon": False})
    options |= dict(figsize=(size[0] * columns, size[1] * rows), layout="constrained", squeeze=False)
    return plt.subplots(rows, columns, **options)


def save_picture(figure, path: Path, legend: bool = True) -> None:
    """Write the figure, its legend, each label once, beside the panels."""
    import matplotlib.pyplot as plt

    named = {label: handle for ax in figure.axes for handle, label in zip(*ax.get_legend_handles_labels(), strict=True)}
    if legend and named:
        figure.legend(named.values(), named.keys(), loc="outside right upper")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
