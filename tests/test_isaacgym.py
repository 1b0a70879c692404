"""meow_isaacgym.py: simulator contracts against scripted stand-ins, the device buffer, standardisation, ranks, brax."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._python_dispatch import TorchDispatchMode

import fake_simulators as fake
import meow_continuous_action as meow
import meow_isaacgym as script
import sac_continuous_action as sac
import two_ranks
from numerics import update_of

ROOT = Path(__file__).resolve().parent.parent
SOURCE = (ROOT / "meow_isaacgym.py").read_text()
CPU = torch.device("cpu")
SIMS = [("isaacgymenvs", "Ant"), ("isaacgymenvs", "AllegroHand"), ("isaaclab", "Isaac-Fake-v0")]
SHORT = dict(num_envs=6, learning_starts=20, batch_size=16, buffer_steps=200, device="cpu", eval_frequency=1000)


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Isaac Gym and Isaac Lab as far as the contracts go; runs are written to a folder of the test."""
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def buffers(monkeypatch):
    """The buffers that a run makes."""
    found = []

    class Spy(script.DeviceBuffer):
        def __init__(self, *args):
            super().__init__(*args)
            found.append(self)

    monkeypatch.setattr(script, "DeviceBuffer", Spy)
    return found


def run(*flags, cwd, path=(), launcher=(), **env) -> subprocess.CompletedProcess:
    """The script in a process of its own."""
    path = os.pathsep.join(map(str, [*path, ROOT, ROOT / "tests"]))
    command = [sys.executable, *launcher, str(ROOT / "meow_isaacgym.py"), *map(str, flags)]
    xla = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "XLA_FLAGS": xla, **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=170)


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def stored(buffer) -> list[np.ndarray]:
    """The buffer's transitions, oldest first as long as it has not wrapped."""
    size = min(int(buffer.position), buffer.capacity)
    return [field[:size].numpy() for field in buffer.data]


# The contract of the simulators


@pytest.mark.parametrize("sim, env_id", SIMS)
@pytest.mark.parametrize("algo", ["meow", "sac"])
def test_what_reaches_the_buffer(stand_ins, buffers, sim, env_id, algo):
    """Exactly the transitions of the script: none across a reset, none lost, d = 1 at failures alone."""
    script.train_robots(script.Args(sim=sim, env_id=env_id, algo=algo, total_steps=60, **SHORT))
    obs, actions, rewards, next_obs, terminations = stored(buffers[0])
    assert (obs[:, :2] == next_obs[:, :2]).all()  # same robot, same episode
    assert (next_obs[:, 2] == obs[:, 2] + 1).all()
    assert (rewards == fake.reward_of(*next_obs[:, :3].T)).all()
    np.testing.assert_array_equal(next_obs[:, 3], actions[:, 0])  # the action is the one that led there
    rows = [(int(x[0]), int(x[1]), int(x[2]), bool(d)) for x, d in zip(next_obs, terminations, strict=True)]
    wanted = fake.expected(6, 60, deferred=sim == "isaacgymenvs", early=env_id == "AllegroHand")
    assert len(rows) == len(set(rows)) and set(rows) == wanted
    assert any(d for *_, d in rows) and any(t == fake.LIMIT and not d for _, _, t, d in rows)


@pytest.mark.parametrize("sim, env_id", SIMS)
def test_the_five_of_the_contract(stand_ins, sim, env_id):
    """Flags exclude each other, nothing handed out is overwritten by the next step, sim.obs is what to act on."""
    adapter = script.make_sim(script.Args(sim=sim, env_id=env_id, **SHORT), 1, CPU)
    adapter.reset()
    history, copies = [], []
    for k in range(40):
        before = adapter.obs
        history.append((before, *adapter.step(torch.full((6, 2), k / 100))))
        copies.append([x.clone() for x in history[-1]])
    for step, copied in zip(history, copies, strict=True):
        for handed_out, at_the_time in zip(step, copied, strict=True):
            assert torch.equal(handed_out, at_the_time)
    for (_, obs, reward, terminated, truncated, valid), after in zip(history, history[1:], strict=False):
        assert all(x.dtype == torch.bool for x in (terminated, truncated, valid)) and reward.dtype == torch.float32
        assert not (terminated & truncated).any()
        done = terminated | truncated
        if sim == "isaaclab":
            assert valid.all() and torch.equal(after[0][done, 2], torch.zeros(int(done.sum())))
            assert torch.equal(after[0][~done], obs[~done])
        else:
            assert torch.equal(after[0], obs) and torch.equal(after[-1], ~done)
            assert (after[1][done, 1] == obs[done, 1] + 1).all()  # the step after a done resets
    assert any((step[3] & (step[1][:, 2] == fake.LIMIT)).any() for step in history) == (sim == "isaaclab")


def test_isaac_gyms_first_observation_is_not_its_zeros(stand_ins):
    adapter = script.make_sim(script.Args(sim="isaacgymenvs", env_id="Ant", **SHORT), 1, CPU)
    assert (adapter.env.reset()["obs"] == 0).all()
    adapter.reset()
    assert adapter.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    adapter.step(torch.zeros(6, 2))
    adapter.reset()  # in the middle of episodes
    assert adapter.obs[:, 1].tolist() == [1] * 6 and adapter.obs[:, 2].tolist() == [0] * 6
    assert adapter.step(torch.zeros(6, 2))[-1].all()


def test_isaac_lab_gets_clamped_actions(stand_ins):
    adapter = script.make_sim(script.Args(sim="isaaclab", env_id="Isaac-Fake-v0", **SHORT), 1, CPU)
    adapter.reset()
    adapter.step(torch.tensor([[-3.0, 0.5]]).expand(6, 2))
    assert (fake.made[-1].actions[-1] == [-1, 0.5]).all()


@pytest.mark.parametrize("sim, env_id", SIMS)
def test_evaluation_is_one_episode_of_every_robot(stand_ins, buffers, monkeypatch, sim, env_id):
    """Its returns are those of the script's episodes; training goes on after it, with new ones, and crosses nothing."""
    early, flags = env_id == "AllegroHand", dict(SHORT, eval_frequency=25)
    adapter = script.make_sim(script.Args(sim=sim, env_id=env_id, **flags), 1, CPU)
    agent = script.make_agent(fake.OBS_DIM, fake.ACTION_DIM, script.Args())
    returns, lengths = script.evaluate_robots(agent, script.Standardizer(fake.OBS_DIM), adapter, True)
    for robot in range(6):
        length = fake.script(robot, 0)[0]
        steps = range(1 + early, length + 1)
        assert lengths[robot] == len(steps) and returns[robot] == sum(fake.reward_of(robot, 0, t) for t in steps)
    visited, update = [], script.Standardizer.update
    monkeypatch.setattr(script.Standardizer, "update", lambda s, obs: visited.append(obs.clone()) or update(s, obs))
    folder = script.train_robots(script.Args(sim=sim, env_id=env_id, total_steps=90, **flags))
    assert all((visited[step][:, 2] == early).all() for step in (0, 25, 50, 75))
    obs, _, _, next_obs, _ = stored(buffers[0])
    assert (obs[:, :2] == next_obs[:, :2]).all() and (next_obs[:, 2] == obs[:, 2] + 1).all()
    assert [step for step, _ in scalars(folder)["eval/episodic_return"]] == [150, 300, 450, 540]


def test_episode_statistics(stand_ins):
    """Means over the episodes that ended since the last log, rewards of crossing steps left out."""
    folder = script.train_robots(script.Args(sim="isaacgymenvs", env_id="Ant", total_steps=100, **SHORT))
    ended, episodes = fake.expected(6, 100, deferred=True), {}
    for robot, episode, t, _ in ended:
        episodes.setdefault((robot, episode), []).append(t)
    whole = {key: ts for key, ts in episodes.items() if len(ts) == fake.script(*key)[0]}
    returns = [sum(fake.reward_of(*key, t) for t in ts) for key, ts in whole.items()]
    ((step, value),) = scalars(folder)["charts/episodic_return"]
    assert step == 600 and value == pytest.approx(np.mean(returns), rel=1e-6)
    assert scalars(folder)["charts/episodic_length"][0][1] == pytest.approx(np.mean([len(ts) for ts in whole.values()]))


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


@pytest.mark.parametrize("algo", ["meow", "sac"])
def test_the_loop_waits_for_the_device_at_logs_alone(stand_ins, algo):
    """The operations that need a value on the host are as many in 90 steps as in 50."""

    class Count(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.waits += func.overloadpacket.__name__ in WAITS
            return func(*args, **(kwargs or {}))

    counts, flags = [], dict(SHORT, sim="isaacgymenvs", env_id="Ant", algo=algo, autotune=True)
    for steps in (50, 90):
        with Count() as count:
            script.train_robots(script.Args(exp_name=str(steps), total_steps=steps, **flags))
        counts.append(count.waits)
    assert counts[0] == counts[1] > 0


# Buffer and standardisation


def test_buffer_holds_the_valid_ones_and_draws_them_uniformly():
    torch.manual_seed(0)
    buffer, numbers = script.DeviceBuffer(5, 4, 1, 1, CPU), np.random.default_rng(0)
    kept, k = [], 0
    for _ in range(40):  # wraps several times
        valid = torch.from_numpy(numbers.random(4) < 0.6)
        values = torch.arange(k, k + 4.0)
        kept += values[valid].tolist()
        buffer.add(valid, values[:, None], values[:, None] / 7, values, values[:, None] + 1, values % 2 == 1)
        k += 4
        size = min(len(kept), 20)
        assert sorted(buffer.data.rewards[:size].tolist()) == kept[-size:]
    batch = buffer.sample(40_000)
    values, counts = batch.rewards.unique(return_counts=True)
    assert values.tolist() == kept[-20:]
    assert (counts - 2000).abs().max() < 5 * 2000**0.5
    assert torch.equal(batch.next_obs[:, 0], batch.rewards + 1) and torch.equal(batch.obs[:, 0], batch.rewards)
    assert torch.equal(batch.terminations, batch.rewards % 2)


def test_buffer_states_and_checks_its_memory():
    text = " ".join(script.DeviceBuffer.__doc__.split())
    sizes = re.findall(r"([\d.]+) GB on (\w+) \((?:N )?(\d+), (?:O )?(\d+), (?:D )?(\d+)\)", text)
    assert {task for _, task, *_ in sizes} == set(script.PRESETS) - {"brax"}
    for gigabytes, task, *dims in sizes:
        n, obs_dim, action_dim = map(int, dims)
        assert float(gigabytes) == pytest.approx(15_000 * n * 4 * (2 * obs_dim + action_dim + 2) / 1e9, abs=0.005)
        assert script.Args(**script.preset("isaacgymenvs", task, "meow")).num_envs == n
    buffer = script.DeviceBuffer(100, 3, 5, 2, CPU)
    held = sum(field.numel() * field.element_size() for field in buffer.data)
    assert held - buffer.bytes == 4 * (2 * 5 + 2 + 2)  # the row behind the ring
    message = r"--buffer-steps 10{9} of 128 robots need 66560.00 GB, cpu has .* GB free; expected at most \d+"
    with pytest.raises(script.UserError, match=message):
        script.DeviceBuffer(10**9, 128, 60, 8, CPU)


def test_standardizer_against_numpy():
    numbers, standardizer = np.random.default_rng(0), script.Standardizer(3)
    seen = []
    for k in range(200):
        seen.append(numbers.normal([1e3, -2, 0], [0.1, 5, 1e-3], (32, 3)).astype(np.float32) * (1 + k / 100))
        standardizer.update(torch.from_numpy(seen[-1]))
    seen = np.concatenate(seen).astype(np.float64)
    np.testing.assert_allclose(standardizer.mean, seen.mean(0), rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(standardizer.std, seen.std(0), rtol=1e-5)
    x = np.array([[2e3, 0, 0.0], [1e9, -1e9, 1e-3]])
    expected = np.clip((x - seen.mean(0)) / seen.std(0), -5, 5)
    np.testing.assert_allclose(standardizer(torch.from_numpy(x).float()), expected, rtol=1e-3)


def test_each_visited_observation_counts_once(stand_ins, monkeypatch):
    """Statistics are those of what was acted on, evaluations left out; updates read observations on that scale."""
    visited, batches, update = [], [], script.Standardizer.update
    monkeypatch.setattr(
        script.Standardizer, "update", lambda s, obs: visited.append(obs.numpy().copy()) or update(s, obs)
    )
    make_learner = script.make_meow_learner

    def spy(agent, args):
        learn, learner = make_learner(agent, args)
        return lambda batch: batches.append(batch) or learn(batch), learner

    monkeypatch.setattr(script, "make_meow_learner", spy)
    flags = dict(SHORT, eval_frequency=20)
    folder = script.train_robots(script.Args(sim="isaaclab", env_id="Isaac-Fake-v0", total_steps=60, **flags))
    assert len(visited) == 60 and len(batches) == 40
    seen = np.concatenate(visited)
    state = script.load_checkpoint(folder / "checkpoint.pt")["standardizer"]
    np.testing.assert_allclose(state["mean"], seen.mean(0), rtol=1e-5)
    np.testing.assert_allclose(state["std"], seen.std(0), rtol=1e-4)
    robots = np.concatenate([batch.obs[:, 0].numpy() for batch in batches])
    raw = robots * 35**0.5 / 12**0.5 + 2.5  # six robots, each visited as often: mean 2.5, variance 35 / 12
    np.testing.assert_allclose(raw, raw.round(), atol=1e-4)


# Algorithms, ranks and the GPU


def sources(module) -> dict[str, str]:
    text = Path(module.__file__).read_text()
    nodes = (node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef | ast.ClassDef))
    return {node.name: ast.get_source_segment(text, node) for node in nodes}


def test_what_has_the_name_of_another_script_has_its_source():
    mine, different = sources(script), {"Args"}
    for other in (sources(meow), sources(sac)):
        shared = mine.keys() & other.keys() - different
        assert {"StateNet", "save_checkpoint", "load_checkpoint", "UserError"} <= shared
        assert [name for name in shared if mine[name] != other[name]] == []
    assert {"swish", "Coupling", "SoftValue", "MEow", "dropout_masks"} <= mine.keys() & sources(meow).keys()
    assert {"ShiftedTwinQ", "GaussianActor", "SAC", "monte_carlo_value"} <= mine.keys() & sources(sac).keys()


@pytest.mark.parametrize("algo", ["meow", "sac"])
def test_update_is_that_of_the_single_robot_script(algo):
    """Same parameters, batches and random numbers, same agent and target after ten updates."""
    flags = dict(alpha=0.3, tau=0.05, gamma=0.9)
    mine = script.Args(algo=algo, learning_rate=1e-3, max_grad_norm=0.5, autotune=True, dropout=0.1, **flags)
    torch.manual_seed(0)
    agent = script.make_agent(6, 3, mine).double()
    if algo == "meow":
        reference = meow.MEow(6, 3, meow.Args(max_grad_norm=0.5, **flags)).double()
        reference.load_state_dict(agent.state_dict())
        theirs, target = update_of(meow, reference, meow.Args(max_grad_norm=0.5, **flags))
        update, learner = script.make_meow_learner(agent, mine)
    else:
        sac_args = sac.Args(policy_lr=1e-3, q_lr=1e-3, policy_frequency=1, reward_shift=True, **flags)
        reference = sac.SAC(6, 3, sac_args).double()
        reference.load_state_dict(agent.state_dict())
        theirs, target = update_of(sac, reference, sac_args)
        update, learner = script.make_sac_learner(agent, mine)
    for n in range(10):
        x = torch.randn(32, 17, dtype=torch.float64)
        batch = [x[:, :6], x[:, 6:9].tanh(), x[:, 9], x[:, 10:16], (x[:, 16] > 1).double()]
        torch.manual_seed(n)
        stats = update(script.Batch(*batch))
        torch.manual_seed(n)  # the next numbers are those that update has just drawn
        if algo == "meow":
            noise = torch.empty(4, 2, 32, 16, dtype=torch.int64).random_(-(2**63), None).view(torch.int32)
        else:
            noise = torch.stack([torch.randn(32, 3, dtype=torch.float64) for _ in range(2)])
        expected = theirs(meow.Batch(*batch), (noise,), n)
        torch.testing.assert_close(stats, expected, rtol=1e-6, atol=1e-9)  # theirs are in part single
    for p, q in zip(agent.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    for p, q in zip(learner["target"].parameters(), target.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def torchrun(*words, cwd) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "tests" / "two_ranks.py"), *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done


def test_two_ranks_are_one_process_with_the_joined_batch(tmp_path, monkeypatch):
    """After 50 updates: equal on both ranks, and to 1e-5 equal to one process that saw both batches as one."""
    torchrun("updates", str(tmp_path), cwd=tmp_path)
    monkeypatch.setattr(script.SAC, "sample_with_log_prob", script.SAC.sample_with_log_prob)  # two_ranks replaces it
    for algo in ("meow", "sac"):
        first, second = (torch.load(tmp_path / f"{algo}{rank}.pt") for rank in (0, 1))
        assert torch.equal(first, second)
        assert (first - two_ranks.updates(algo, 0, 1)).abs().max() < 1e-5
        alone = two_ranks.updates(algo, 0, 2)  # one rank's batches without the other's: must not be the same
        assert (first - alone).abs().max() > 1e-3


def test_two_ranks_train(tmp_path):
    """Each has robots of its own, both end with the same parameters, and one of them logs, for all robots."""
    done = torchrun("train", str(tmp_path), cwd=tmp_path)
    assert torch.equal(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
    (folder,) = tmp_path.glob("runs/*")
    assert done.stdout.count("run: ") == 1 and "12 robots, 840 robot-steps" in done.stdout
    assert [step for step, _ in scalars(folder)["eval/episodic_return"]] == [840]
    assert json.loads((folder / "args.json").read_text())["ranks"] == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("algo", ["meow", "sac"])
def test_captured_update_is_the_eager_one(algo):
    args = script.Args(algo=algo, dropout=0.0, alpha=0.3)
    agents = [script.make_agent(27, 8, args).cuda() for _ in range(2)]
    agents[1].load_state_dict(agents[0].state_dict())
    make_learner = script.make_meow_learner if algo == "meow" else script.make_sac_learner
    eager, graph = (make_learner(agent, args)[0] for agent in agents)
    graph = script.captured(graph)
    for n in range(20):
        x = torch.randn(256, 65, device="cuda")
        batch = script.Batch(x[:, :27], x[:, 27:35].tanh(), x[:, 35], x[:, 36:63], (x[:, 63] > 1).float())
        losses = []
        for update in (eager, graph):
            torch.manual_seed(n)
            losses.append(update(batch))
        if algo == "meow":  # SAC's noise is drawn at other offsets of the generator's stream
            torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-4)
    assert all(p.isfinite().all() for p in agents[1].parameters())


# Python 3.8 and the command line


def newer_than_3_8(source: str) -> list[str]:
    """What of the source Python 3.8 does not have: grammar, and the parts of the library that are easily used."""
    try:
        tree = ast.parse(source, feature_version=(3, 8))
    except SyntaxError as e:
        return [str(e)]
    annotations = set()  # not evaluated, but for those of the classes whose fields are read at run time
    for node in ast.walk(tree):
        for part in (getattr(node, "annotation", None), getattr(node, "returns", None)):
            annotations |= set(ast.walk(part)) if part is not None else set()
    for cls in tree.body:
        if isinstance(cls, ast.ClassDef) and cls.name in ("Args", "Batch"):
            annotations -= {x for field in cls.body if isinstance(field, ast.AnnAssign) for x in ast.walk(field)}
    methods = {"removeprefix", "removesuffix", "cache", "pairwise", "lcm", "nextafter", "bit_count", "is_relative_to"}
    methods |= {"with_stem", "readlink", "to_thread", "randbytes", "batched", "hardlink_to", "aclosing", "chdir"}
    found = [] if "from __future__ import annotations\n" in source else ["annotations are evaluated"]
    for node in set(ast.walk(tree)) - annotations:
        where = f"line {getattr(node, 'lineno', 0)}: "
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "zip" and node.keywords:
            found.append(where + "zip(strict=)")
        if isinstance(node, ast.Attribute) and node.attr in methods:
            found.append(where + node.attr)
        if isinstance(node, ast.Subscript) and getattr(node.value, "id", "") in {
            "list",
            "dict",
            "tuple",
            "set",
            "type",
        }:
            found.append(where + "subscript of a built-in type")
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.BitOr):
            for side in [node.left, node.right] if isinstance(node, ast.BinOp) else [node.value]:
                name = getattr(side, "id", None) or getattr(getattr(side, "func", None), "id", None)
                none = isinstance(side, ast.Constant) and side.value is None
                if none or isinstance(side, ast.Dict | ast.DictComp) or name in {"str", "int", "float", "dict"}:
                    found.append(where + "| of types or of dicts")
    return found


def test_the_file_is_of_python_3_8():
    assert newer_than_3_8(SOURCE) == []
    flags = ["--isolated", "--target-version=py38", "--select=E9,F"]
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", *flags, "meow_isaacgym.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "line",
    [
        "match x:\n    case 1: pass",
        "with (open(a) as f, open(b) as g): pass",
        "for a, b in zip(x, y, strict=True): pass",
        "x = dict(a=1) | y",
        "x |= {a: 1 for a in y}",
        "x = list[int]()",
        "x = 'abc'.removeprefix('a')",
        "x = int | None",
        "class Args:\n    a: str | None = None",
        "class Batch:\n    a: list[int]",
    ],
)
def test_newer_python_is_found(line):
    assert newer_than_3_8("from __future__ import annotations\n" + line)
    assert not newer_than_3_8("from __future__ import annotations\ndef f(a: str | None) -> list[int]: return a | b")
    assert newer_than_3_8("def f(a: str | None): pass")


def test_isaac_gym_is_imported_before_torch(tmp_path):
    """From the command line, with packages that are as strict about it as the real ones; Isaac Gym has no gymnasium."""
    packages = tmp_path / "packages"
    packages.mkdir()
    strict = (
        "import sys\nif 'torch' in sys.modules: raise ImportError('PyTorch was imported before isaacgym modules.')\n"
    )
    (packages / "isaacgym.py").write_text(strict)
    (packages / "isaacgymenvs.py").write_text("import isaacgym\nfrom fake_simulators import make\n")
    flags = [
        "--sim",
        "isaacgymenvs",
        "--env-id=Ant",
        "--num-envs=6",
        "--total-steps=120",
        "--batch-size=16",
        "--buffer-steps=100",
    ]
    done = run(*flags, "--capture-video", cwd=tmp_path, path=[packages])
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.glob("runs/Ant__*")
    (video,) = folder.glob("videos/*.mp4")
    assert video.stat().st_size > 0 and (folder / "best.pt").exists()
    again = run("--evaluate", folder / "best.pt", cwd=tmp_path, path=[packages])
    assert again.returncode == 2 and "add --sim isaacgymenvs" in again.stderr and "Traceback" not in again.stderr
    again = run("--sim=isaacgymenvs", "--evaluate", folder / "best.pt", cwd=tmp_path, path=[packages])
    assert again.returncode == 0 and "Ant, 6 episodes: return" in again.stdout, again.stderr


@pytest.mark.parametrize("sim", ["brax", "isaacgymenvs", "isaaclab"])
def test_missing_simulator(monkeypatch, tmp_path, sim):
    monkeypatch.chdir(tmp_path)
    for name in ("brax", "isaacgym", "isaacgymenvs", "isaaclab", "isaaclab_tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    requirements = re.search(r"requirements-\w+\.txt", script.INSTALL[sim])[0]
    assert (ROOT / requirements).is_file()
    with pytest.raises(script.UserError, match=f"--sim {sim}: .*to install it: .*{requirements}"):
        script.train_robots(script.Args(sim=sim, device="cpu"))
    assert not (tmp_path / "runs").exists()


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    (tmp_path / "jax.py").write_text("raise ImportError('No module named jax')\n")
    torch.save({"algorithm": "other_script"}, tmp_path / "other.pt")
    for flags, message in (
        ([], "error: --sim brax: No module named jax; to install it: pip install -r requirements-brax.txt"),
        (["--gamma=2"], "error: --gamma 2.0: expected in [0, 1]"),
        (["--evaluate=other.pt"], "error: other.pt was written by other_script.py"),
    ):
        done = run(*flags, cwd=tmp_path, path=[tmp_path])
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith(message)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(tau=-0.1), "--tau -0.1: expected"),
        (dict(alpha=0.0), "--alpha 0.0: expected above 0"),
        (dict(num_envs=0), "--num-envs 0: expected above 0"),
        (dict(buffer_steps=0), "--buffer-steps 0: expected above 0"),
        (dict(learning_starts=0), "--learning-starts 0: expected above 0"),
        (dict(sigma_min=1.0), "--sigma-min 1.0: expected -20 <= sigma_min"),
        (dict(dropout=1.0), r"--dropout 1.0: expected in \[0, 1\)"),
        (dict(buffer_steps=10**9), r"--buffer-steps 10{9} of 128 robots need"),
    ],
)
def test_bad_input_is_refused_before_a_run_begins(stand_ins, flags, message):
    with pytest.raises(script.UserError, match=message):
        script.train_robots(script.Args(sim="isaacgymenvs", env_id="Ant", **flags))
    assert not Path("runs").exists()


PAPER = {  # N, batch, MEow's alpha, tau, log sigma range, SAC's alpha, tau: ../shared/ALGORITHMS.md, paper's appendix
    "Ant": (128, 1024, 0.075, 0.0005, -5, 2, 0.4, 0.0025),
    "Humanoid": (128, 1024, 0.25, 0.00025, -5, -0.3, 0.025, 0.0025),
    "Ingenuity": (128, 1024, 0.025, 0.0025, -4, -0.3, 0.1, 0.0025),
    "Anymal": (128, 1024, 0.00075, 0.025, -5, -1, 0.01, 0.0025),
    "AllegroHand": (512, 256, 0.1, 0.001, -4, -0.3, 0.1, 0.0025),
    "FrankaCabinet": (512, 256, 0.075, 0.01, -5, -0.3, 0.1, 0.025),
}


@pytest.mark.parametrize("task", PAPER)
def test_presets_are_the_papers_and_flags_win(task):
    gym = ["--sim=isaacgymenvs", "--env-id", task]
    args, baseline = script.parse_flags(gym), script.parse_flags([*gym, "--algo=sac"])
    numbers = (args.num_envs, args.batch_size, args.alpha, args.tau, args.sigma_min, args.sigma_max)
    assert (*numbers, baseline.alpha, baseline.tau) == PAPER[task]
    assert (baseline.num_envs, baseline.batch_size) == (args.num_envs, args.batch_size)
    for a in (args, baseline):
        assert (a.buffer_steps, a.learning_starts, a.gamma) == (15_000, 100, 0.99)
        assert a.total_steps == (500_000 if task == "Ingenuity" else 1_000_000)
    assert (args.learning_rate, args.max_grad_norm, args.reward_shift) == (1e-3, 30, True)
    assert (baseline.learning_rate, baseline.autotune, baseline.reward_shift) == (3e-4, False, False)
    assert script.parse_flags([*gym, "--alpha=0.7"]).alpha == 0.7
    assert script.preset("isaaclab", f"Isaac-{task}-v0", "meow") == script.preset("isaacgymenvs", task, "meow")
    assert script.preset("isaaclab", f"Isaac-{task}-Direct-v0", "sac") == script.preset("isaacgymenvs", task, "sac")


def test_loss_that_is_not_finite_stops_the_run(stand_ins, monkeypatch):
    monkeypatch.setattr(fake, "reward_of", lambda robot, episode, t: np.where(episode == 2, np.nan, robot))
    with pytest.raises(FloatingPointError, match=r"at step \d+, qf_loss=nan.* is in (\S+)/failed.pt"):
        script.train_robots(script.Args(sim="isaacgymenvs", env_id="Ant", total_steps=300, **SHORT))
    (failed,) = Path().glob("runs/*/failed.pt")
    assert script.load_checkpoint(failed)["global_step"] <= 600
    assert all(np.isfinite(actions).all() for actions in fake.made[-1].actions)  # the robots never saw a NaN


def test_checkpoints_load_without_the_simulator(stand_ins):
    folder = script.train_robots(
        script.Args(sim="isaaclab", env_id="Isaac-Fake-v0", algo="sac", total_steps=40, **SHORT)
    )
    agent, standardizer, args = script.load_policy(folder / "best.pt")
    assert args.algo == "sac" and int(standardizer.sums[-1]) == 240
    assert agent.sample(standardizer(torch.zeros(2, 4)), deterministic=True).shape == (2, 2)
    with pytest.raises(script.UserError, match="does not fit the flags"):
        script.load_policy(folder / "best.pt", args=script.Args())


# The real brax, on its `spring` physics, the quickest to compile


@pytest.fixture(scope="module")
def hopper():
    """An adapter with four robots and episodes of at most 30 steps, and brax's own step, one robot at a time."""
    pytest.importorskip("brax")
    import jax
    from brax import envs

    script.Brax.time_limit, limit = 30, script.Brax.time_limit
    sim = script.Brax(script.Args(env_id="hopper", brax_backend="spring", num_envs=4), 1, CPU)
    sim.reset()
    step = envs.get_environment("hopper", backend="spring").step
    alone = jax.jit(lambda state, i, actions: step(jax.tree_util.tree_map(lambda x: x[i], state), actions[i]))
    yield sim, jax, lambda state, i, actions: alone(state, i, actions.numpy())
    script.Brax.time_limit = limit


def test_brax_against_its_own_step(hopper):
    """Every transition is env.step of the state before; episodes end where it says or at the limit, and start anew."""
    sim, _, step = hopper
    sim.reset()
    ages, starts, ends = np.zeros(4, dtype=int), [], []
    generator = torch.Generator().manual_seed(0)
    for _ in range(80):
        before, acted_on = sim.state, sim.obs.clone()
        actions = torch.rand(4, 3, generator=generator) * 2 - 1
        obs, reward, terminated, truncated, valid = sim.step(actions)
        ages += 1
        assert valid.all() and np.array_equal(acted_on, before.obs)
        for i in range(4):
            alone = step(before, i, actions)
            np.testing.assert_allclose(obs[i], alone.obs, rtol=1e-3, atol=1e-3)
            np.testing.assert_allclose(reward[i], alone.reward, rtol=1e-3, atol=1e-3)
            assert bool(terminated[i]) == bool(alone.done) and bool(truncated[i]) == (ages[i] == 30 and not alone.done)
            if terminated[i] or truncated[i]:
                starts.append(sim.obs[i].numpy().copy())
                ends.append((int(ages[i]), bool(terminated[i])))
                ages[i] = 0
            else:
                assert torch.equal(sim.obs[i], obs[i])
    assert {True, False} == {terminated for _, terminated in ends} and len(ends) > 6
    starts = np.array(starts)
    assert len(np.unique(starts, axis=0)) == len(starts)  # no cached state
    assert np.abs(starts[:, 5:]).max() < 0.1 and abs(starts[:, 0] - 1.25).max() < 0.1  # at rest, upright


def test_brax_compiles_once_shares_memory_and_repeats_its_starts(hopper):
    sim, jax, _ = hopper
    sim.reset(7)
    first = sim.obs.clone()
    result = sim.step(torch.zeros(4, 3))
    assert sim.obs.data_ptr() == sim.state.obs.unsafe_buffer_pointer()
    assert all(x.device.type == "cpu" for x in result)
    sim.reset(7)
    assert torch.equal(sim.obs, first)
    sim.reset()
    assert not torch.equal(sim.obs, first)
    sim.step(torch.zeros(4, 3))
    assert sim.first._cache_size() == sim.advance._cache_size() == 1
    ours = torch.zeros(4, 3)
    assert jax.dlpack.from_dlpack(ours).unsafe_buffer_pointer() == ours.data_ptr()


def test_brax_robot_that_is_not_finite_is_reset_and_not_stored(hopper):
    sim, jax, _ = hopper
    sim.reset()
    state = sim.state.pipeline_state
    xd = state.xd.replace(vel=state.xd.vel.at[2].set(np.nan))
    xd_i = state.xd_i.replace(vel=state.xd_i.vel.at[2].set(np.nan))
    sim.state = sim.state.replace(pipeline_state=state.replace(qd=state.qd.at[2].set(np.nan), xd=xd, xd_i=xd_i))
    obs, reward, terminated, truncated, valid = sim.step(torch.zeros(4, 3))
    assert valid.tolist() == [True, True, False, True] and truncated.tolist() == [False, False, True, False]
    assert obs.isfinite().all() and reward.isfinite().all() and sim.obs.isfinite().all()
    assert sim.step(torch.zeros(4, 3))[-1].all()


@pytest.mark.parametrize("algo", ["meow", "sac"])
def test_brax_trains_and_replays(hopper, tmp_path, monkeypatch, capsys, algo):
    """Every metric is there; --evaluate plays the episodes that were logged: the same starts, the same returns."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "make_sim", lambda args, seed, device: hopper[0])
    flags = ["--env-id=hopper", "--num-envs=4", "--total-steps=150", "--batch-size=64", "--buffer-steps=200"]
    folder = script.train_robots(
        script.parse_flags([*flags, "--brax-backend=spring", "--device=cpu", f"--algo={algo}"])
    )
    logged, losses = scalars(folder), script.LOSSES if algo == "meow" else script.SAC_LOSSES
    policy = {"policy/entropy", "policy/log_sigma"} | ({"policy/alpha"} if algo == "sac" else set())
    episodes = {f"{kind}/episodic_{what}" for kind in ("charts", "eval") for what in ("return", "length")}
    assert set(logged) == {"losses/" + name for name in losses} | policy | episodes | {"charts/SPS"}
    assert [step for step, _ in logged["losses/qf_loss"]] == [600]
    ((step, value),) = logged["eval/episodic_return"]
    assert step == 600
    script.replay_policy(script.parse_flags(["--evaluate", str(folder / "checkpoint.pt"), "--device=cpu"]))
    printed = re.search(r"hopper, 4 episodes: return (\S+)", capsys.readouterr().out)[1]
    assert float(printed) == pytest.approx(value, rel=1e-3, abs=0.01)


def test_brax_tasks():
    pytest.importorskip("brax")
    from brax import envs

    assert set(script.Brax.tasks) == {"ant", "humanoid", "halfcheetah", "hopper", "walker2d"} <= set(envs._envs)
    with pytest.raises(script.UserError, match="--env-id Ant: brax has ant, humanoid"):
        script.Brax(script.Args(env_id="Ant"), 1, CPU)
