"""Commands that measure: each module's first lines say what it does and how to call it."""

import csv
import io
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def commit() -> str:
    """The commit of this project, for the tables; empty outside of git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    return subprocess.run(git, capture_output=True, text=True).stdout.strip()


def write_csv(path: Path, rows: Iterable[dict], columns: Iterable[str] | None = None) -> None:
    """Write rows under `columns`, by default the last row's; a column that a row lacks is empty there.

    The file is, at every moment, the old one or the new one, whole. Makes its folder. Raises ValueError for a row with
    another column.
    """
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[-1] if columns is None else columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.write_text(text.getvalue())
    new.replace(path)


def run_all(
    function: Callable, jobs: dict[str, tuple], workers: int, failed: list[str]
) -> Iterator[tuple[str, object]]:
    """("3 of 9, 5 min to go: NAME", function(*arguments)) for each of `jobs`, name -> arguments, as they finish.

    `workers` processes of one thread each run side by side. A job that fails is printed, and its name is appended to
    `failed`; the others go on.
    """
    os.environ["OMP_NUM_THREADS"] = "1"
    start = time.time()
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(function, *arguments): name for name, arguments in jobs.items()}
        for done, future in enumerate(as_completed(futures), 1):
            name, left = futures[future], (time.time() - start) * (len(futures) - done) / done / 60
            try:
                result = future.result()
            except (Exception, SystemExit) as e:  # SystemExit: a script's UserError
                failed.append(name)
                print(f"{name} failed: {type(e).__name__}: {e}", file=sys.stderr, flush=True)
                continue
            yield f"{done} of {len(futures)}, {left:.0f} min to go: {name}", result
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
