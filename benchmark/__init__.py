"""Commands that measure: each module's first lines say what it does and how to call it."""

import csv
import io
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, as_completed
from pathlib import Path


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


def as_done(futures: dict[Future, tuple]) -> Iterator[tuple[tuple, Future, str]]:
    """(what a future is of, the future, "3 of 9, 5 min to go") for each of `futures`, as they finish."""
    start = time.time()
    for done, future in enumerate(as_completed(futures), 1):
        left = (time.time() - start) * (len(futures) - done) / done / 60
        yield futures[future], future, f"{done} of {len(futures)}, {left:.0f} min to go"
