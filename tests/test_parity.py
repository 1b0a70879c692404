"""The scripts are one text but for the algorithm: what has the same name has the same source, in the same order."""

import ast
import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = {
    path.stem.removesuffix("_continuous_action"): path.read_text() for path in ROOT.glob("*_continuous_action.py")
}
PARALLEL = {path.stem.removesuffix("_isaacgym"): path.read_text() for path in ROOT.glob("*_isaacgym.py")}
OWN = {"PRESETS", "ANT", "BRAX", "GOAL_MAP", "LIMITS", "METRICS", "Agent", "make_update"}  # the algorithm's
SHARED = {"parse_args", "make_env", "Batch", "ReplayBuffer", "flatten", "compiled", "recorded", "evaluate"}
SHARED |= {"load_checkpoint", "load_agent", "train", "__main__", "Args", "EVAL_SEED", "MAY_CHANGE"}  # in every script


def blocks(source: str) -> dict[str, str]:
    """The top-level functions, classes and names in their order, with decorators; of Args the part above "'s own"."""
    lines, found = source.splitlines(), {}
    for node in ast.parse(source).body:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        text = "\n".join(lines[first - 1 : node.end_lineno])
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            name = node.name
        elif isinstance(node, ast.Assign | ast.AugAssign):
            name = ast.unparse(node.targets[0] if isinstance(node, ast.Assign) else node.target)
        elif isinstance(node, ast.If):
            name = "__main__"
        else:
            continue
        if name == "Args":
            text, *own = re.split(r"\n    # .*'s own\b", text)
            assert len(own) == 1, 'one comment "# X\'s own" in Args'
        found[name] = found.get(name, "") + text
    return found


def drift(sources: dict[str, str]) -> list[str]:
    """What has one name and two texts, or another place among the names that two scripts have in common."""
    found = []
    for (one, a), (two, b) in itertools.combinations({s: blocks(text) for s, text in sources.items()}.items(), 2):
        found += [f"{name}: {one}, {two}" for name in a if name not in OWN and a[name] != b.get(name, a[name])]
        if [name for name in a if name in b] != [name for name in b if name in a]:
            found.append(f"order: {one}, {two}")
    return found


def test_what_has_the_same_name_is_the_same_text_in_the_same_order():
    assert len(SOURCES) >= 6 and not drift(SOURCES)
    assert blocks(SOURCES["sac"])["make_update"] == blocks(SOURCES["sac_nf"])["make_update"]
    for script, source in SOURCES.items():
        assert not (SHARED | OWN) - {"GOAL_MAP", "ANT", "BRAX"} - blocks(source).keys(), script


def test_parallel_scripts():
    """They are one text but for the algorithm, and of the algorithm's script all but what has to do with the loop."""
    assert PARALLEL.keys() == {"meow", "sac"} and not drift(PARALLEL)
    loop = {"Args", "PRESETS", "LIMITS", "EVAL_SEED", "MAY_CHANGE", "parse_args", "ReplayBuffer"}
    loop |= {"evaluate", "load_agent", "train", "__main__"}
    for name, source in PARALLEL.items():
        mine, theirs = blocks(source), blocks(SOURCES[name])
        assert {each for each in mine if each in theirs and mine[each] != theirs[each]} == loop
        assert theirs.keys() - mine.keys() <= {"GOAL_MAP", "make_env"}


@pytest.mark.parametrize(
    "path", [*ROOT.glob("*_continuous_action.py"), *ROOT.glob("*_isaacgym.py")], ids=lambda p: p.stem
)
def test_a_script_is_read_in_one_sitting(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 600 and max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    "before, after, names",
    [
        ("    eval_envs = [", "    eval_envs  = [", {"train"}),
        ("@torch.random.fork_rng()\n", "", {"evaluate"}),
        ("    gamma: float = 0.99 ", "    gamma: float = 0.9 ", {"Args"}),
        ("  # temperature", "  # the temperature", set()),  # in the algorithm's own part
        ('if __name__ == "__main__":\n', 'if __name__ == "__main__":\n    pass\n', {"__main__"}),
        ("def make_env(", "class MLP:\n    pass\n\n\ndef make_env(", {"MLP", "order"}),
    ],
)
def test_drift_is_found(before, after, names):
    source = SOURCES["meow"]
    assert before in source
    found = drift(dict(one=source, two=source.replace(before, after, 1)))
    assert {line.partition(":")[0] for line in found} == names
