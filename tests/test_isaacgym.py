"""The parallel scripts: contracts of the simulators (scripted stand-ins, the real brax), buffer, runs, resuming."""

import ast
import itertools
import os
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fake_simulators as fake
import meow_isaacgym as meow
import sac_isaacgym as sac
import simulators
from benchmark import parallel
from lives import scalars

ROOT = Path(__file__).resolve().parent.parent
SIMS = [("isaacgymenvs", "Ant"), ("isaacgymenvs", "AllegroHand"), ("isaaclab", "Isaac-Fake-v0")]
SHORT = dict(num_envs=6, learning_starts=120, batch_size=16, buffer_size=1200, device="cpu", compile="off")
SHORT |= dict(eval_frequency=60_000)
each_script = pytest.mark.parametrize("script", [meow, sac], ids=["meow", "sac"])


@pytest.fixture
def stand_ins(monkeypatch, tmp_path):
    """Isaac Gym and Isaac Lab as far as the contracts go; runs are written to a folder of the test."""
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def buffers(monkeypatch):
    """The buffers that runs of MEow and SAC make."""
    found = []
    for script in (meow, sac):
        make = script.ReplayBuffer.__init__
        kept = lambda self, *args, make=make: make(self, *args) or found.append(self)  # noqa: E731
        monkeypatch.setattr(script.ReplayBuffer, "__init__", kept)
    return found


def args_of(script, steps: int, **more):
    """Of a short run of so many steps of all six environments; by default of Isaac Gym's stand-in."""
    kind = dict(sim="isaacgymenvs", env_id="Ant", total_timesteps=6 * steps)
    return script.Args(**{**kind, **SHORT, **more})


def episodes_in(buffer) -> list[tuple[int, int, int, bool]]:
    """(environment, episode, t, terminated) of its transitions, oldest first as long as it has not wrapped: each within
    an episode, with its reward, as it was seen."""
    rows = buffer.rows[: min(int(buffer.added), buffer.capacity)].split(buffer.widths, -1)
    obs, actions, rewards, next_obs, terminations = (field.numpy() for field in rows)
    assert (obs[:, :2] == next_obs[:, :2]).all() and (next_obs[:, 2] == obs[:, 2] + 1).all()
    assert (rewards[:, 0] == fake.reward_of(*next_obs[:, :3].T)).all()
    np.testing.assert_array_equal(next_obs[:, 3], actions[:, 0])  # the action is the one that led there
    return [(int(x[0]), int(x[1]), int(x[2]), bool(d)) for x, d in zip(next_obs, terminations[:, 0], strict=True)]


# The contract of the simulators


@each_script
@pytest.mark.parametrize("sim, env_id", SIMS)
def test_what_reaches_the_buffer(stand_ins, buffers, script, sim, env_id):
    """Exactly the transitions of the script: none across a reset, none lost, d = 1 at failures alone."""
    script.train(args_of(script, 60, sim=sim, env_id=env_id))
    rows = episodes_in(buffers[0])
    wanted = fake.expected(6, 60, deferred=sim == "isaacgymenvs", early=env_id == "AllegroHand")
    assert len(rows) == len(set(rows)) and set(rows) == wanted
    assert any(d for *_, d in rows) and any(t == fake.LIMIT and not d for _, _, t, d in rows)


def test_rates_of_the_loop(stand_ins, monkeypatch):
    """benchmark.parallel: a row for each algorithm, whose parts are shares of the whole. It is the simulator."""
    step = fake.LabEnv.step
    monkeypatch.setattr(fake.LabEnv, "step", lambda self, actions: time.sleep(0.005) or step(self, actions))
    [monkeypatch.setattr(script, "make_update", lambda *args: (lambda: None, None, None)) for script in (meow, sac)]
    sim = dict(sim="isaaclab", env_id="Isaac-Fake-v0", device="cpu", compile="off")
    rows = parallel.measure(parallel.Args(Path("unused.csv"), steps=20, **sim), 6)
    assert [row["algo"] for row in rows] == ["meow", "sac"]
    assert all(row["steps_per_s"] == pytest.approx(6 * row["updates_per_s"], rel=0.02) for row in rows)
    assert all(row["simulator_share"] > 0.5 and 0 < row["steps_per_s"] < 6 / 0.005 for row in rows)
    assert all(sum(row[f"{part}_share"] for part in parallel.PARTS) == pytest.approx(1, abs=0.01) for row in rows)


def test_distance_walked(monkeypatch, tmp_path):
    """benchmark.parallel: robots that walk 0.5 and -1 a step and fall after 3 and 5 steps, from position 9."""

    class Sim:
        def reset(self, seed):
            assert seed == meow.EVAL_SEED
            self.t, self.obs, self.metrics = 0, torch.zeros(2, 4), {}

        def step(self, actions):
            self.t += 1
            self.metrics["x_position"] = 9 + 0.5 * self.t * np.array([1, -2])
            fallen = torch.tensor([self.t == 3, self.t == 5])
            return None, torch.ones(2), fallen, torch.zeros(2, dtype=torch.bool), torch.ones(2, dtype=torch.bool)

    torch.save(dict(algorithm="meow_isaacgym", run=(60, 0, {}, 0)), tmp_path / "checkpoint.pt")
    agent = SimpleNamespace(standardizer=lambda x: x, sample=lambda obs, flag: obs)
    monkeypatch.setattr(meow, "load_agent", lambda path: (agent, SimpleNamespace(num_envs=2)))
    monkeypatch.setattr(meow, "make_sim", lambda args, seed: Sim())
    found = parallel.walk(tmp_path)
    assert found == {"step": 60, "return": 4.0, "length": 4.0, "distance": (2 * 0.5 - 4 * 1.0) / 2}


@pytest.mark.parametrize("sim, env_id", SIMS)
def test_the_five_of_the_contract(stand_ins, sim, env_id):
    """Flags exclude each other, nothing handed out is overwritten by the next step, sim.obs is what to act on."""
    adapter = simulators.make(sim, env_id, 6, 1, "cpu")
    adapter.reset()
    history, copies = [], []
    for k in range(40):
        before = adapter.obs
        history.append((before, *adapter.step(torch.full((6, 2), k / 20))))
        copies.append([x.clone() for x in history[-1]])
    assert sim != "isaaclab" or fake.made[-1].actions[-1].max() == 1  # it gets clamped actions
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
    adapter = simulators.IsaacGymEnvs("Ant", 6, 1, "cpu", False)
    assert (adapter.env.reset()["obs"] == 0).all()
    adapter.reset()
    assert adapter.obs[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    adapter.step(torch.zeros(6, 2))
    adapter.reset()  # in the middle of episodes
    assert adapter.obs[:, 1].tolist() == [1] * 6 and adapter.obs[:, 2].tolist() == [0] * 6
    assert adapter.step(torch.zeros(6, 2))[-1].all()


@pytest.mark.parametrize("sim, env_id", SIMS)
def test_evaluation_is_one_episode_of_every_environment(stand_ins, buffers, monkeypatch, sim, env_id):
    """Its returns are those of the script's episodes; training goes on after it, with new ones, and crosses nothing."""
    early = env_id == "AllegroHand"
    adapter = simulators.make(sim, env_id, 6, 1, "cpu")
    fake.made[-1].robots.episode[:] = -1  # make() has begun an episode
    agent = meow.Agent(fake.OBS_DIM, fake.ACTION_DIM, meow.Args())
    agent.standardizer = meow.Standardizer(fake.OBS_DIM)
    agent.standardizer.update(adapter.obs)
    returns, lengths = meow.evaluate(agent, adapter, args_of(meow, 1))
    for i in range(6):
        length = fake.script(i, 0)[0]
        steps = range(1 + early, length + 1)
        assert lengths[i] == len(steps) and returns[i] == sum(fake.reward_of(i, 0, t) for t in steps)
    visited, update = [], meow.Standardizer.update
    monkeypatch.setattr(meow.Standardizer, "update", lambda s, obs: visited.append(obs.clone()) or update(s, obs))
    folder = meow.train(args_of(meow, 90, sim=sim, env_id=env_id, eval_frequency=150))
    assert all((visited[step][:, 2] == early).all() for step in (0, 25, 50, 75))
    assert episodes_in(buffers[0])
    assert [step for step, _ in scalars(folder)["eval/episodic_return"]] == [150, 300, 450, 540]


def test_episode_statistics(stand_ins):
    """Means over the episodes that ended since the last log, rewards of crossing steps left out."""
    folder = meow.train(args_of(meow, 100))
    ended, episodes = fake.expected(6, 100, deferred=True), {}
    for i, episode, t, _ in ended:
        episodes.setdefault((i, episode), []).append(t)
    whole = {key: ts for key, ts in episodes.items() if len(ts) == fake.script(*key)[0]}
    returns = [sum(fake.reward_of(*key, t) for t in ts) for key, ts in whole.items()]
    ((step, value),) = scalars(folder)["charts/episodic_return"]
    assert step == 600 and value == pytest.approx(np.mean(returns), rel=1e-6)
    assert scalars(folder)["charts/episodic_length"][0][1] == pytest.approx(np.mean([len(ts) for ts in whole.values()]))


WAITS = {"_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique2", "equal", "is_nonzero"}


@each_script
def test_the_loop_waits_for_the_device_at_logs_alone(stand_ins, script):
    """The operations that need a value on the host are as many in 90 steps as in 50."""

    class Count(TorchDispatchMode):
        waits = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.waits += func.overloadpacket.__name__ in WAITS
            return func(*args, **(kwargs or {}))

    counts, own = [], dict(autotune=True) if script is sac else {}
    for steps in (50, 90):
        with Count() as count:
            script.train(args_of(script, steps, exp_name=str(steps), **own))
        counts.append(count.waits)
    assert counts[0] == counts[1] > 0


# Buffer and standardization


class AsSeen:
    """An agent for a buffer, whose standardizer changes nothing."""

    @staticmethod
    def standardizer(obs: torch.Tensor) -> torch.Tensor:
        return obs


def test_buffer_holds_the_valid_ones_and_draws_them_uniformly(tmp_path):
    """Its file has the same after each flush, also where it is a copy, as it is of a buffer on a GPU."""
    torch.manual_seed(0)
    numbers, path = np.random.default_rng(0), tmp_path / "buffer.bin"
    buffer = meow.ReplayBuffer(path, 20, AsSeen, (1, 1), "cpu")
    assert buffer.rows is buffer.file
    buffer.rows = buffer.file.clone()
    kept, k = [], 0
    for _ in range(40):  # wraps several times
        valid = torch.from_numpy(numbers.random(4) < 0.6)
        values = torch.arange(k, k + 4.0)
        kept += values[valid].tolist()
        buffer.add(valid, values[:, None], values[:, None] / 7, values, values[:, None] + 1, values % 2 == 1)
        k += 4
        size = min(len(kept), 20)
        assert sorted(buffer.rows[:size, 2].tolist()) == kept[-size:]
        if numbers.random() < 0.4:  # sometimes more than the ring holds is new, and sometimes nothing
            buffer.flush(), buffer.flush()
            assert torch.equal(buffer.file[:20], buffer.rows[:20])
            again = meow.ReplayBuffer(path, 20, AsSeen, (1, 1), "cpu", len(kept))
            assert torch.equal(again.rows[:20], buffer.rows[:20]) and int(again.added) == len(kept) == buffer.flushed
    batch = buffer.sample(40_000)
    values, counts = batch.rewards.unique(return_counts=True)
    assert values.tolist() == kept[-20:]
    assert (counts - 2000).abs().max() < 5 * 2000**0.5
    assert torch.equal(batch.next_obs, batch.rewards + 1) and torch.equal(batch.obs, batch.rewards)
    assert torch.equal(batch.terminations, batch.rewards % 2)


def test_standardizer_against_numpy():
    numbers, standardizer, seen = np.random.default_rng(0), meow.Standardizer(3), []
    for k in range(200):
        seen.append(numbers.normal([1e3, -2, 0], [0.1, 5, 1e-3], (32, 3)).astype(np.float32) * (1 + k / 100))
        standardizer.update(torch.from_numpy(seen[-1]))
    seen = np.concatenate(seen).astype(np.float64)
    x = np.array([[2e3, 0, 0.0], [1e9, -1e9, 1e-3]])
    expected = np.clip((x - seen.mean(0)) / seen.std(0), -5, 5)
    np.testing.assert_allclose(standardizer(torch.from_numpy(x).float()), expected, rtol=1e-3)
    np.testing.assert_allclose(standardizer(torch.from_numpy(x)), expected, rtol=1e-9)


def test_each_visited_observation_counts_once(stand_ins, monkeypatch):
    """Statistics are those of what was acted on, evaluations left out; updates read observations on that scale."""
    visited, batches = [], []
    update, sample = meow.Standardizer.update, meow.ReplayBuffer.sample
    monkeypatch.setattr(meow.Standardizer, "update", lambda s, x: visited.append(x.numpy().copy()) or update(s, x))
    monkeypatch.setattr(meow.ReplayBuffer, "sample", lambda s, n: batches.append(sample(s, n)) or batches[-1])
    folder = meow.train(args_of(meow, 60, sim="isaaclab", env_id="Isaac-Fake-v0", eval_frequency=120))
    assert len(visited) == 60 and len(batches) == 40
    seen = np.concatenate(visited)
    agent, _ = meow.load_agent(folder / "checkpoint.pt")
    probe = torch.randn(50, 4)
    standardized = ((probe.numpy() - seen.mean(0)) / seen.std(0)).clip(-5, 5)
    np.testing.assert_allclose(agent.standardizer(probe), standardized, rtol=1e-4, atol=1e-5)
    robots = np.concatenate([batch.obs[:, 0].numpy() for batch in batches])
    raw = robots * 35**0.5 / 12**0.5 + 2.5  # six environments, each visited as often: mean 2.5, variance 35 / 12
    np.testing.assert_allclose(raw, raw.round(), atol=1e-4)


@each_script
def test_acts_on_standardized_observations(stand_ins, monkeypatch, script):
    """By the statistics of all so far; the first actions are uniform, later ones the policy's."""
    seen, visited, update = [], [], script.Standardizer.update

    def sample(self, obs, deterministic=False):
        seen.append(obs.numpy().copy())
        return torch.tanh(obs[:, :2])

    monkeypatch.setattr(script.Agent, "sample", sample)
    monkeypatch.setattr(script.Standardizer, "update", lambda s, x: visited.append(x.numpy().copy()) or update(s, x))
    script.train(args_of(script, 60, sim="isaaclab", env_id="Isaac-Fake-v0"))
    told = np.stack(fake.made[-1].actions[:60])  # (60, 6, 2)
    for k in range(60):
        so_far = np.concatenate(visited[: k + 1]).astype(float)
        expected = ((visited[k] - so_far.mean(0)) / np.maximum(so_far.std(0), 1e-4)).clip(-5, 5)
        np.testing.assert_allclose(seen[k], expected, rtol=1e-4, atol=1e-4)
        assert k < 20 or np.allclose(told[k], np.tanh(seen[k][:, :2]))
    assert told[:20].min() < -0.9 and told[:20].max() > 0.9 and abs(told[:20].mean()) < 0.2


def test_updates_for_each_step(stand_ins, monkeypatch):
    for n in (1, 3):
        draws, sample = [], meow.ReplayBuffer.sample
        with monkeypatch.context() as patch:
            patch.setattr(meow.ReplayBuffer, "sample", lambda s, b, f=sample, d=draws: d.append(b) or f(s, b))
            meow.train(args_of(meow, 50, updates_per_step=n))
        assert len(draws) == 30 * n


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@gpu
@each_script
def test_recorded_updates_are_eager_ones(script, tmp_path, monkeypatch):
    """50 updates of a buffer on a GPU with CUDA graphs and without, of the same random numbers."""
    ends = []
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(script, "recorded", lambda args: lambda function: function)
        torch.manual_seed(0)
        args = script.Args(device="cuda", compile="off", batch_size=64, **(dict(dropout=0.0) if script is meow else {}))
        agent = script.Agent(6, 2, args)
        agent.standardizer = script.Standardizer(6)
        agent.cuda().standardizer.update(torch.randn(100, 6, device="cuda"))
        buffer = script.ReplayBuffer(tmp_path / f"{recorded}.bin", 1000, agent, (6, 2), "cuda")
        x = torch.randn(1000, 16, device="cuda")
        buffer.add(x[:, 0] > 0, x[:, :6], x[:, 6:8].tanh(), x[:, 8], x[:, 9:15], x[:, 15] > 1)
        update, metrics, _ = script.make_update(agent, buffer, args)
        torch.manual_seed(1)
        for _ in range(50):
            update()
        ends.append([*agent.parameters(), metrics])
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


# Python 3.8 and the command line


class Evaluated(ast.NodeTransformer):
    """Takes the annotations away that are not evaluated: all but those of the classes whose fields are read."""

    def visit_ClassDef(self, node):
        return node if node.name in ("Args", "Batch") else self.generic_visit(node)

    def visit_FunctionDef(self, node):
        node.returns = None
        return self.generic_visit(node)

    def visit_arg(self, node):
        return ast.arg(node.arg)

    def visit_AnnAssign(self, node):
        return ast.Expr(node.value or node.target)


NEWER = [r"\bzip\(.*strict=", r"(?<![\w.])(list|dict|tuple|set|type)\[", r"\|= (\{|dict\()", r"\| (None|dict|\{)"]
NEWER += [r"(\}|\b(str|int|float|None)|dict\([^)]*\)) \| ", r"\.(remove(prefix|suffix)|cache|pairwise|lcm|nextafter)\b"]
NEWER += [r"\.(bit_count|is_relative_to|with_stem|readlink|to_thread|randbytes|batched|hardlink_to|aclosing|chdir)\b"]


def newer_than_3_8(source: str) -> list[str]:
    """What of the source Python 3.8 does not have: grammar, and the parts of the library that are easily used."""
    try:
        tree = ast.parse(source, feature_version=(3, 8))
    except SyntaxError as e:
        return [str(e)]
    lines = ast.unparse(Evaluated().visit(tree)).splitlines()
    found = [] if "from __future__ import annotations" in source else ["annotations are evaluated"]
    return found + [line for line in lines if re.search("|".join(NEWER), line)]


@pytest.mark.parametrize("file", ["meow_isaacgym.py", "sac_isaacgym.py", "simulators.py"])
def test_what_isaac_gym_imports_is_of_python_3_8(file):
    assert newer_than_3_8((ROOT / file).read_text()) == []
    flags = ["--isolated", "--target-version=py38", "--select=E9,F", file]
    done = subprocess.run([sys.executable, "-m", "ruff", "check", *flags], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


NEWER_LINES = ["match x:\n    case 1: pass", "with (open(a) as f, open(b) as g): pass", "x = 'abc'.removeprefix('a')"]
NEWER_LINES += [
    "for a, b in zip(x, y, strict=True): pass",
    "x = dict(a=1) | y",
    "x |= {a: 1 for a in y}",
    "x = int | None",
]
NEWER_LINES += ["x = list[int]()", "class Args:\n    a: str | None = None", "class Batch:\n    a: list[int]"]


def test_newer_python_is_found():
    future = "from __future__ import annotations\n"
    assert all(newer_than_3_8(future + line) for line in NEWER_LINES)
    assert not newer_than_3_8(future + "def f(a: str | None) -> list[int]:\n    x: int | None = a | b")
    assert newer_than_3_8("def f(a: str | None): pass")


def test_video_and_evaluation(stand_ins, monkeypatch, capsys):
    folder = meow.train(args_of(meow, 120, capture_video=True))
    assert (folder / "video-720.mp4").stat().st_size > 0
    monkeypatch.setattr(sys, "argv", ["meow_isaacgym.py", "--evaluate", str(folder / "best.pt")])
    runpy.run_path(str(ROOT / "meow_isaacgym.py"), run_name="__main__")
    assert "Ant: return " in capsys.readouterr().out


@pytest.mark.parametrize("sim", ["brax", "isaacgymenvs", "isaaclab"])
def test_missing_simulator(monkeypatch, tmp_path, sim):
    monkeypatch.chdir(tmp_path)
    for name in ("brax", "isaacgym", "isaacgymenvs", "isaaclab", "isaaclab_tasks"):
        monkeypatch.setitem(sys.modules, name, None)
    requirements = re.search(r"requirements-\w+\.txt", simulators.INSTALL[sim])[0]
    assert (ROOT / requirements).is_file()
    with pytest.raises(SystemExit, match=f"error: --sim {sim} .*to install it: .*{requirements}"):
        meow.train(meow.Args(sim=sim, device="cpu"))
    assert not (tmp_path / "runs").exists()


def test_mistakes_are_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"algorithm": "other_script", "args": {}}, "other.pt")
    for flag, message in (
        ("--gamma=2", "--gamma 2.0: expected 0 to 1"),
        ("--num-envs=0", "--num-envs 0: expected"),
        ("--learning-starts=1000000000", "--learning-starts: expected less than --total-timesteps"),
        ("--evaluate=other.pt", "other.pt was written by other_script.py"),
        ("--resume=none", "none/checkpoint.pt is not a checkpoint"),
    ):
        with pytest.raises(SystemExit, match=f"^error: {message}.*$"):
            meow.parse_args([flag])
    assert [path.name for path in tmp_path.iterdir()] == ["other.pt"]


def test_buffer_that_does_not_fit(stand_ins):
    with pytest.raises(SystemExit, match=r"buffer.bin needs \d+.\d\d GB of disk and device; lower --buffer-size"):
        meow.train(args_of(meow, 10**12, buffer_size=10**12))


PAPER = {  # N, batch, MEow's alpha, tau, log sigma range, SAC's alpha, tau: the paper's appendix
    "Ant": (128, 1024, 0.075, 0.0005, -5, 2, 0.4, 0.0025),
    "Humanoid": (128, 1024, 0.25, 0.00025, -5, -0.3, 0.025, 0.0025),
    "Ingenuity": (128, 1024, 0.025, 0.0025, -4, -0.3, 0.1, 0.0025),
    "Anymal": (128, 1024, 0.00075, 0.025, -5, -1, 0.01, 0.0025),
    "AllegroHand": (512, 256, 0.1, 0.001, -4, -0.3, 0.1, 0.0025),
    "FrankaCabinet": (512, 256, 0.075, 0.01, -5, -0.3, 0.1, 0.025),
}


@pytest.mark.parametrize("task", PAPER)
def test_presets_are_the_papers_and_flags_win(task):
    gym = ["--sim=isaacgymenvs", "--env-id", task, "--device=cpu"]
    args, baseline = meow.parse_args(gym), sac.parse_args(gym)
    numbers = (args.num_envs, args.batch_size, args.alpha, args.tau, args.log_sigma_min, args.log_sigma_max)
    assert (*numbers, baseline.alpha, baseline.tau) == PAPER[task]
    assert (baseline.num_envs, baseline.batch_size) == (args.num_envs, args.batch_size)
    for a in (args, baseline):
        steps = (500_000 if task == "Ingenuity" else 1_000_000, 15_000, 100)
        assert (a.total_timesteps, a.buffer_size, a.learning_starts) == tuple(n * a.num_envs for n in steps)
        assert (a.gamma, a.updates_per_step) == (0.99, 1)
    assert (args.learning_rate, args.max_grad_norm, args.reward_shift) == (1e-3, 30, True)
    assert (baseline.q_lr, baseline.policy_lr, baseline.policy_frequency) == (3e-4, 3e-4, 1)
    assert not baseline.autotune and not baseline.reward_shift
    assert meow.parse_args([*gym, "--alpha=0.7"]).alpha == 0.7
    for lab in (f"Isaac-{task}-v0", f"Isaac-{task}-Direct-v0"):
        assert sac.parse_args(["--sim=isaaclab", "--env-id", lab, "--device=cpu"]).tau == baseline.tau


@pytest.mark.parametrize("script", [meow, sac])
def test_presets_of_brax(script):
    """Each task's own, ant's for one that has none, the paper's Ant for another simulator, and flags before all."""
    args = {
        task: script.parse_args(["--env-id", task, "--device=cpu"]) for task in ("ant", "hopper", "walker2d", "swimmer")
    }
    numbers = {task: (a.gamma, a.updates_per_step, a.batch_size) for task, a in args.items()}
    assert numbers["ant"] == numbers["swimmer"] == (0.97, 4, 256)
    assert numbers["hopper"] == numbers["walker2d"] == (0.997, 32, 128)
    assert script.parse_args(["--env-id", "hopper", "--device=cpu", "--gamma=0.9"]).gamma == 0.9
    assert script.parse_args(["--sim=isaaclab", "--env-id=hopper", "--device=cpu"]).gamma == 0.99


@each_script
def test_loss_that_is_not_finite_stops_the_run(stand_ins, monkeypatch, script):
    monkeypatch.setattr(fake, "reward_of", lambda i, episode, t: np.where(episode == 2, np.nan, i))
    with pytest.raises(SystemExit, match=r"error: step 600: not finite: {'qf_loss': nan"):
        script.train(args_of(script, 300))
    (failed,) = Path().glob("runs/*/failed.pt")
    assert script.load_checkpoint(failed)["run"][0] == 600
    assert all(np.isfinite(actions).all() for actions in fake.made[-1].actions)  # the simulator never saw a NaN


@each_script
def test_checkpoints_load_without_the_simulator(stand_ins, script):
    folder = script.train(args_of(script, 40, sim="isaaclab", env_id="Isaac-Fake-v0"))
    agent, args = script.load_agent(folder / "best.pt")
    assert args.env_id == "Isaac-Fake-v0" and agent.standardizer.sums[0, 0] == 240
    assert agent.sample(agent.standardizer(torch.zeros(2, 4)), deterministic=True).shape == (2, 2)
    assert not (folder / "buffer.bin").exists()
    with pytest.raises(SystemExit, match="was written by"):
        (sac if script is meow else meow).load_agent(folder / "best.pt")


# Stop and resume


@each_script
@pytest.mark.parametrize("sim, env_id", SIMS)
def test_stopped_and_resumed(stand_ins, buffers, monkeypatch, capsys, script, sim, env_id):
    """Both parts' transitions, each from episodes that begin with it; none across the stop, no log lost or doubled."""
    add, steps = script.ReplayBuffer.add, itertools.count(1)

    def stopping(self, *fields):
        add(self, *fields)
        if next(steps) == 35:
            raise KeyboardInterrupt

    monkeypatch.setattr(script.ReplayBuffer, "add", stopping)
    with pytest.raises(SystemExit) as end:
        script.train(args_of(script, 130, sim=sim, env_id=env_id))
    assert end.value.code == 130
    (folder,) = Path().glob("runs/*")
    # the step whose transitions are stored is not counted yet: it is made again
    assert f"stopped at step 204; continue with: python {sys.argv[0]} --resume {folder}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="--gamma 0.5: expected 0.99, as in"):
        script.parse_args(["--resume", str(folder), "--gamma=0.5"])
    time.sleep(1 - time.time() % 1)  # event files are ordered by the second in their names
    assert script.train(script.parse_args(["--resume", str(folder), "--device=cpu"])) == folder
    rule = dict(deferred=sim == "isaacgymenvs", early=env_id == "AllegroHand")
    wanted = [sorted(fake.expected(6, steps, **rule)) for steps in (35, 96)]
    rows = episodes_in(buffers[1])
    assert [sorted(rows[: len(wanted[0])]), sorted(rows[len(wanted[0]) :])] == wanted
    logged = scalars(folder)
    for name, steps in {"losses/qf_loss": [600], "eval/episodic_return": [780], "charts/SPS": [600]}.items():
        assert [step for step, _ in logged[name]] == steps
    assert not (folder / "buffer.bin").exists() and (folder / "args-from-204.json").is_file()
    with pytest.raises(SystemExit, match="no buffer.bin; finished"):
        script.train(script.parse_args(["--resume", str(folder), "--device=cpu"]))


@each_script
def test_a_resumed_run_has_the_learner_that_was_saved(stand_ins, monkeypatch, script):
    """Stopped in its ninth update, and again in the first one after --resume."""
    calls, saved, sample = itertools.count(), [], script.ReplayBuffer.sample

    def stopping(self, n: int):
        if next(calls) in (8, 9):
            raise KeyboardInterrupt
        return sample(self, n)

    monkeypatch.setattr(script.ReplayBuffer, "sample", stopping)
    args = args_of(script, 130)
    for _ in range(2):
        with pytest.raises(SystemExit):
            script.train(args)
        (folder,) = Path().glob("runs/*")
        saved.append(torch.load(folder / "checkpoint.pt", weights_only=True))
        args = script.parse_args(["--resume", str(folder), "--device=cpu", "--compile=off"])
    assert saved[0]["run"] == saved[1]["run"]
    for each in saved:
        del each["args"], each["agent"]["standardizer.sums"]  # which has seen the start of the new episodes
    for x, y in zip(*map(tree_leaves, saved), strict=True):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_signals(stand_ins, tmp_path, number):
    """A run is resumed after any of them; what was logged after the last checkpoint is void. The run's process has an
    isaacgym as strict as the real one about being imported before torch."""
    (tmp_path / "isaacgym.py").write_text("import sys\nassert 'torch' not in sys.modules\n")
    (tmp_path / "isaacgymenvs.py").write_text("import isaacgym\nfrom fake_simulators import make\n")
    flags = {name.replace("_", "-"): value for name, value in SHORT.items()} | {"eval-frequency": 900}
    command = [sys.executable, str(ROOT / "meow_isaacgym.py"), "--sim=isaacgymenvs", "--env-id=Ant"]
    command += ["--total-timesteps=3600", *(f"--{name}={value}" for name, value in flags.items())]
    env = os.environ | dict(PYTHONPATH=os.pathsep.join(map(str, [tmp_path, ROOT, ROOT / "tests"])))
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 100
    while not list(tmp_path.glob("runs/*/best.pt")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 143), err
    assert ("stopped at step" in out) == (number == signal.SIGTERM)
    (folder,) = tmp_path.glob("runs/*")
    assert 900 <= meow.load_checkpoint(folder / "checkpoint.pt")["run"][0] < 3600
    time.sleep(1 - time.time() % 1)  # event files are ordered by the second in their names
    meow.train(meow.parse_args(["--resume", str(folder), "--device=cpu"]))
    logged = scalars(folder)
    assert [step for step, _ in logged["eval/episodic_return"]] == [900, 1800, 2700, 3600]
    assert [step for step, _ in logged["charts/SPS"]] == [600 * k for k in range(1, 7)]


# The real brax, on its `spring` physics, the quickest to compile


@pytest.fixture(scope="module")
def hopper():
    """An adapter with four robots and episodes of at most 30 steps, and brax's own step, one robot at a time."""
    pytest.importorskip("brax")
    import jax
    from brax import envs

    simulators.Brax.time_limit, limit = 30, simulators.Brax.time_limit
    sim = simulators.Brax("hopper", 4, 1, "cpu", "spring")
    sim.reset()
    step = envs.get_environment("hopper", backend="spring").step
    alone = jax.jit(lambda state, i, actions: step(jax.tree_util.tree_map(lambda x: x[i], state), actions[i]))
    yield sim, jax, lambda state, i, actions: alone(state, i, actions.numpy())
    simulators.Brax.time_limit = limit


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


@each_script
def test_brax_trains_and_replays(hopper, tmp_path, monkeypatch, script):
    """Every metric is there; an evaluation plays the episodes that were logged: the same starts, the same returns.
    benchmark.parallel writes these curves, and how far the last checkpoint walks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script, "make_sim", lambda args, seed: hopper[0])
    flags = ["--env-id=hopper", "--num-envs=4", "--total-timesteps=600", "--batch-size=64", "--buffer-size=800"]
    flags += ["--learning-starts=200", "--device=cpu", "--compile=off"]
    folder = script.train(script.parse_args(flags))
    logged = scalars(folder)
    policy = {"policy/entropy", "policy/log_sigma"} | ({"policy/actions_clamped"} if script is meow else set())
    episodes = {f"{kind}/episodic_{what}" for kind in ("charts", "eval") for what in ("return", "length")}
    assert set(logged) == {"losses/" + name for name in script.METRICS} | policy | episodes | {"charts/SPS"}
    assert [step for step, _ in logged["losses/qf_loss"]] == [400]
    ((step, value),) = logged["eval/episodic_return"]
    agent, args = script.load_agent(folder / "checkpoint.pt")
    returns, _ = script.evaluate(agent, hopper[0], args)
    assert step == 600 and returns.mean().item() == pytest.approx(value, rel=1e-3, abs=0.01)
    *_, evaluation, last = parallel.curves(folder)
    assert (evaluation["curve"], evaluation["step"], last["curve"]) == ("evaluation", 600, "last checkpoint")
    for name in ("return", "length"):
        assert evaluation[name] == pytest.approx(last[name], rel=1e-3, abs=0.1)
    assert 0 < abs(last["distance"]) < 2 and evaluation["algo"] == script.__name__.partition("_")[0]


def test_brax_tasks():
    pytest.importorskip("brax")
    from brax import envs

    assert set(simulators.Brax.tasks) == {"ant", "humanoid", "halfcheetah", "hopper", "walker2d"} <= set(envs._envs)
    with pytest.raises(ValueError, match="Ant: brax has ant, humanoid"):
        simulators.make("brax", "Ant", 4, 1, "cpu")
