"""How many lines of two scripts differ, and where.

    python -m benchmark.compare sac_continuous_action.py meow_continuous_action.py

The lines are those of `git diff --no-index`, counted on each side under the definition that holds them.
"""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import tyro


@dataclasses.dataclass
class Args:
    left: tyro.conf.Positional[Path]
    """a script"""
    right: tyro.conf.Positional[Path]
    """the script that it is compared with"""


def sections(path: Path) -> list[str]:
    """For each line of a script, the name of the top-level definition that it is in or, between two, the next one."""
    source = path.read_text()
    names = []
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign | ast.AugAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            name = ast.unparse(target).strip("()")
        else:
            name = {ast.Expr: "docstring", ast.If: "__main__"}.get(type(node), "imports")
        names += [name] * (node.end_lineno - len(names))
    return names + names[-1:] * (len(source.splitlines()) - len(names))


def differing(left: Path, right: Path) -> tuple[set[int], set[int]]:
    """Numbers of the lines that differ, on the left and on the right, counted from 1."""
    command = ["git", "diff", "--no-index", "--unified=0", str(left), str(right)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode > 1:
        sys.exit(f"error: {done.stderr.strip()}")
    lines = (set(), set())
    for hunk in re.findall(r"^@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@", done.stdout, re.M):
        for side, start, count in ((0, hunk[0], hunk[1]), (1, hunk[2], hunk[3])):
            lines[side].update(range(int(start), int(start) + int(count or 1)))
    return lines


def table(left: Path, right: Path) -> dict[str, list[tuple[int, int]]]:
    """Section -> [(lines that differ, lines) on the left, on the right], in the order of the scripts."""
    names, changed = [sections(left), sections(right)], differing(left, right)
    rows = {}
    for name in dict.fromkeys(names[1] + names[0]):
        lines = [[i for i, n in enumerate(side, 1) if n == name] for side in names]
        rows[name] = [(len(changed[k].intersection(lines[k])), len(lines[k])) for k in (0, 1)]
    return rows


def main(args: Args) -> None:
    for path in (args.left, args.right):
        if not path.is_file():
            sys.exit(f"error: {path}: no such script")
    rows = table(args.left, args.right)
    total = [tuple(sum(row[k][i] for row in rows.values()) for i in (0, 1)) for k in (0, 1)]
    print(f"{'lines that differ, of all':28}{args.left.name:>30}{args.right.name:>30}")
    for name, row in rows.items():
        if row[0][0] or row[1][0]:
            print(f"{name:28}" + "".join(f"{f'{n} of {m}' if m else '-':>30}" for n, m in row))
    print(f"{'total':28}" + "".join(f"{f'{n} of {m}, {n / m:.0%}':>30}" for n, m in total))
    print("the same: " + ", ".join(name for name, row in rows.items() if not row[0][0] and not row[1][0]))


if __name__ == "__main__":
    main(tyro.cli(Args))
