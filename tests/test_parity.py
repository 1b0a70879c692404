"""The scripts are one text but for the algorithm: what has the same name has the same source, in the same order."""

import ast
import difflib
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*_continuous_action.py"))
PAIRS = list(itertools.combinations(SCRIPTS, 2))


def definitions(source: str) -> dict[str, str]:
    """Top-level functions and classes by name, their source with decorators; Args is compared by its fields."""
    lines = source.splitlines()
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    first = {node.name: min([node.lineno, *(d.lineno for d in node.decorator_list)]) for node in nodes}
    return {n.name: "\n".join(lines[first[n.name] - 1 : n.end_lineno]) for n in nodes if n.name != "Args"}


def fields(source: str) -> tuple[str, dict[str, tuple[str, str]]]:
    """Args: the text above the algorithm's own fields, and of each own field its type and its help."""
    (node,) = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Args")
    text = "\n".join(source.splitlines()[node.lineno : node.end_lineno])
    shared, mark, _ = text.partition("'s own")
    assert mark, "no comment '# X's own' in Args"
    shared = shared.rpartition("\n")[0]
    pairs = zip(node.body[::2], node.body[1::2], strict=True)  # each field, then its docstring
    own = {f.target.id: (ast.unparse(f.annotation), d.value.value) for f, d in pairs if f"    {f.target.id}:" in text}
    return shared, {name: field for name, field in own.items() if f"\n    {name}:" not in f"\n{shared}"}


def differences(name: str, left: str, right: str, pair: tuple[str, str]) -> str:
    lines = difflib.unified_diff(left.splitlines(), right.splitlines(), *(f"{path}: {name}" for path in pair), "", "")
    return "\n".join(lines)


def drift(sources: tuple[str, str], pair: tuple[str, str]) -> list[str]:
    """A diff for everything of one name and two texts."""
    left, right = (definitions(source) for source in sources)
    found = [differences(name, left[name], right[name], pair) for name in left if name in right]
    (shared_left, own_left), (shared_right, own_right) = (fields(source) for source in sources)
    found.append(differences("Args, shared fields", shared_left, shared_right, pair))
    for name in own_left.keys() & own_right.keys():
        found.append(differences(f"Args.{name}", "\n".join(own_left[name]), "\n".join(own_right[name]), pair))
    main = [source[source.index('if __name__ == "__main__"') :] for source in sources]
    return [text for text in [*found, differences("__main__", *main, pair)] if text]


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_same_name_same_source(pair):
    found = drift(tuple((ROOT / path).read_text() for path in pair), pair)
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("pair", PAIRS, ids="-".join)
def test_same_order(pair):
    left, right = (list(definitions((ROOT / path).read_text())) for path in pair)
    assert [name for name in left if name in right] == [name for name in right if name in left]
    assert {"make_env", "ReplayBuffer", "gradient_of", "run_seed", "evaluate", "load_checkpoint", "train"} <= {
        *left
    } & {*right}


@pytest.mark.parametrize(
    "before, after",
    [
        ("    envs.close()\n", "    envs.close()  # drift\n"),
        ("class ReplayBuffer:\n", "class ReplayBuffer:\n\n"),
        ("@torch.random.fork_rng()\n", "@torch.no_grad()\n"),
        ("    gamma: float = 0.99\n", "    gamma: float = 0.9\n"),
        ('"""temperature: the weight of the entropy', '"""temperature'),
        ("        sys.exit(130)\n", "        sys.exit(131)\n"),
    ],
)
def test_drift_is_found(before, after):
    pair = ("meow_continuous_action.py", "sac_continuous_action.py")
    sources = [(ROOT / path).read_text() for path in pair]
    assert before in sources[1] and not drift(tuple(sources), pair)
    (found,) = drift((sources[0], sources[1].replace(before, after, 1)), pair)
    assert found.startswith("--- meow_continuous_action.py: ")


@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "meow_continuous_action.py" in pair], ids="-".join)
def test_a_third_at_most_differs(pair):
    """What the command prints, against difflib's count of the same lines."""
    done = subprocess.run([sys.executable, "-m", "benchmark.compare", *pair], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (total,) = (line for line in done.stdout.splitlines() if line.startswith("total"))
    shares = [int(word.rstrip("%")) for word in total.split() if word.endswith("%")]
    assert len(shares) == 2 and max(shares) <= 33
    left, right = ((ROOT / path).read_text().splitlines() for path in pair)
    blocks = difflib.SequenceMatcher(None, left, right, autojunk=False).get_matching_blocks()
    kept = sum(block.size for block in blocks)
    for share, side in zip(shares, (left, right), strict=True):
        assert abs(share / 100 - (1 - kept / len(side))) < 0.06
    assert "\nthe same: imports, " in done.stdout and " train" in done.stdout.splitlines()[-1]
