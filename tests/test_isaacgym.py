"""meow_isaacgym.py: simulator contracts against scripted stand-ins, buffer, standardisation, ranks, resuming, brax."""

import ast
import copy
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
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
from benchmark import parallel
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
    return [field.numpy() for field in buffer.fields(buffer.rows[:size])]


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


def test_rates_of_the_loop(stand_ins):
    """benchmark.parallel: a row for each algorithm, whose parts are shares of the whole."""
    args = parallel.Args(Path("unused.csv"), sim="isaaclab", env_id="Isaac-Fake-v0", device="cpu", steps=20)
    rows = parallel.measure(args, 6)
    assert [row["algo"] for row in rows] == ["meow", "sac"]
    assert all(row["robot_steps_per_s"] == pytest.approx(6 * row["updates_per_s"], rel=0.02) for row in rows)
    assert all(sum(row[f"{part}_share"] for part in parallel.PARTS) == pytest.approx(1, abs=0.01) for row in rows)


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


def test_buffer_holds_the_valid_ones_and_draws_them_uniformly(tmp_path):
    """Its file has the same after each flush, also where it is a copy, as it is of a buffer on a GPU."""
    torch.manual_seed(0)
    buffer, numbers = script.DeviceBuffer(5, 4, 1, 1, CPU), np.random.default_rng(0)
    buffer.open(tmp_path / "buffer-0.bin")
    assert buffer.rows is buffer.mapped
    buffer.rows = buffer.mapped.clone()
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
            assert buffer.flush(chunk=3) == buffer.flush(chunk=3) == len(kept)
            assert torch.equal(buffer.mapped[:20], buffer.rows[:20])
            again = script.DeviceBuffer(5, 4, 1, 1, CPU)
            again.open(tmp_path / "buffer-0.bin", len(kept))
            assert torch.equal(again.rows[:20], buffer.rows[:20]) and int(again.position) == len(kept)
    batch = buffer.sample(40_000)
    values, counts = batch.rewards.unique(return_counts=True)
    assert values.tolist() == kept[-20:]
    assert (counts - 2000).abs().max() < 5 * 2000**0.5
    assert torch.equal(batch.next_obs[:, 0], batch.rewards + 1) and torch.equal(batch.obs[:, 0], batch.rewards)
    assert torch.equal(batch.terminations, batch.rewards % 2)


def test_buffer_states_and_checks_its_memory(monkeypatch, tmp_path):
    text = " ".join(script.DeviceBuffer.__doc__.split())
    sizes = re.findall(r"([\d.]+) GB on (\w+) \((?:N )?(\d+), (?:O )?(\d+), (?:D )?(\d+)\)", text)
    assert {task for _, task, *_ in sizes} == set(script.PRESETS) - {"brax"}
    for gigabytes, task, *dims in sizes:
        n, obs_dim, action_dim = map(int, dims)
        assert float(gigabytes) == pytest.approx(15_000 * n * 4 * (2 * obs_dim + action_dim + 2) / 1e9, abs=0.005)
        assert script.Args(**script.preset("isaacgymenvs", task, "meow")).num_envs == n
    buffer = script.DeviceBuffer(100, 3, 5, 2, CPU)
    buffer.open(tmp_path / "buffer-0.bin")
    held = buffer.rows.numel() * buffer.rows.element_size()
    assert held - buffer.bytes == 4 * (2 * 5 + 2 + 2)  # the row behind the ring
    assert (tmp_path / "buffer-0.bin").stat().st_size == held
    message = r"--buffer-steps 10{9} of 128 robots need 66560.00 GB, cpu has .* GB free; expected at most \d+"
    with pytest.raises(script.UserError, match=message):
        script.DeviceBuffer(10**9, 128, 60, 8, CPU)

    def some_and_no_more(file: int, start: int, length: int):  # as ext4 does where the disk is full
        os.truncate(file, held + 1)
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "posix_fallocate", some_and_no_more)
    for buffer.capacity, why in ((101, r"\[Errno 122\] Disk quota exceeded"), (10**12, "no space left")):
        with pytest.raises(script.UserError, match=rf"buffer-0.bin needs .* GB, .* GB are free on disk: {why}"):
            buffer.open(tmp_path / "buffer-0.bin")
        assert (tmp_path / "buffer-0.bin").stat().st_size == held


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


@pytest.mark.parametrize("algo", ["meow", "sac"])
def test_update_is_that_of_the_single_robot_script(algo):
    """Same parameters, batches and random numbers, same agent and target after ten updates."""
    flags = dict(alpha=0.3, tau=0.05, gamma=0.9)
    mine = script.Args(algo=algo, learning_rate=1e-3, max_grad_norm=0.5, autotune=True, dropout=0.0, **flags)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        agent = script.make_agent(6, 3, mine)
        if algo == "meow":
            args = meow.Args(max_grad_norm=0.5, dropout=0.0, batch_size=32, **flags)
            reference = meow.MEow(6, 3, args)
            reference.couplings, value = copy.deepcopy(agent.couplings), copy.deepcopy(agent.value)
            reference.value.sigma_net, reference.value.shift_nets = value.sigma_net, value.shift_nets
            theirs, moved = update_of(meow, reference, args)
            update, learner = script.make_meow_learner(agent, mine)
        else:
            args = sac.Args(policy_lr=1e-3, policy_frequency=1, reward_shift=True, batch_size=32, **flags)
            reference = sac.SAC(6, 3, args)
            reference.qf.shift_nets = copy.deepcopy(agent.qf.shift_nets)
            reference.load_state_dict(agent.state_dict())
            theirs, moved = update_of(sac, reference, args, obs_dim=6)
            update, learner = script.make_sac_learner(agent, mine)
        for n in range(10):
            x = torch.randn(32, 17)
            batch = [x[:, :6], x[:, 6:9].tanh(), x[:, 9], x[:, 10:16], (x[:, 16] > 1).double()]
            torch.manual_seed(n)
            stats = update(script.Batch(*batch))
            torch.manual_seed(n)  # the same numbers for the other one
            expected = theirs(meow.Batch(*(x if x.dim() == 2 else x[:, None] for x in batch)))
            torch.testing.assert_close(stats, expected[: len(stats)], rtol=1e-6, atol=1e-9)
    finally:
        torch.set_default_dtype(torch.float32)
    closed_over = dict(zip(update.__code__.co_freevars, update.__closure__, strict=True))
    assert closed_over["target_params"].cell_contents.grad_fn is None  # or a chain of all updates would stay in memory
    for p, q in zip(agent.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
    for p, q in zip(learner["target"].parameters(), moved["target"].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def torchrun(*words, cwd, code=0) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "--master-port=0"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(ROOT / "tests" / "two_ranks.py"), *words]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == code, done.stderr
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


def test_two_ranks_train(tmp_path, monkeypatch):
    """Each has robots of its own, both end with the same parameters, and one of them logs, for all robots.

    On the way they get a Ctrl-C, one of them twice, agree on a step to stop at, and are resumed.
    """
    stopped = torchrun("train", str(tmp_path), cwd=tmp_path, code=1)
    (folder,) = tmp_path.glob("runs/*")
    assert stopped.stdout.count("run: ") == 1 and "12 robots, 2,880 robot-steps" in stopped.stdout
    command = f"torchrun --nproc-per-node 2 two_ranks.py --sim isaacgymenvs --resume runs/{folder.name}"
    assert re.search(r"stopped at step (\d+); go on with: (.*)", stopped.stdout).groups() == ("200", command)
    assert stopped.stderr.count("error:") == 0 and not list(tmp_path.glob("*.pt"))
    own = script.load_checkpoint(folder / "checkpoint.pt")["run"]["ranks"]
    assert own[0]["position"] == own[1]["position"] > 600
    assert not torch.equal(own[0]["rng"][0], own[1]["rng"][0])
    rings = [np.fromfile(folder / f"buffer-{rank}.bin", np.float32).reshape(601, 12) for rank in (0, 1)]
    assert not np.array_equal(*rings)
    with pytest.raises(script.UserError, match="1 processes; expected 2: torchrun --nproc-per-node 2"):
        script.train_robots(script.Args(sim="isaacgymenvs", env_id="Ant", resume=str(folder), device="cpu"))

    done = torchrun("train", str(tmp_path), "--resume", str(folder), cwd=tmp_path)
    assert done.stdout.count("run: ") == 1 and "resumed at step 200; the robots begin new episodes" in done.stdout
    assert torch.equal(*(torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)))
    assert [step for step, _ in scalars(folder)["eval/episodic_return"]] == [1200, 2400, 2880]
    assert [step for step, _ in scalars(folder)["charts/SPS"]] == [1200, 2400, 2880]
    assert json.loads((folder / "args.json").read_text())["ranks"] == 2
    assert not list(folder.glob("buffer-*"))


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
    torch.save({"algorithm": "other_script", "args": {}}, tmp_path / "other.pt")
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
        (dict(checkpoint_frequency=0), "--checkpoint-frequency 0: expected above 0"),
        (dict(checkpoint_minutes=0.0), "--checkpoint-minutes 0.0: expected above 0"),
        (dict(evaluate="a", resume="b"), "--evaluate a: expected no --resume beside it"),
        (dict(resume="runs/none"), "--resume runs/none: nothing to go on from: runs/none/checkpoint.pt: no such"),
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


def test_two_runs_of_a_name_in_one_second(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(script.time, "time", lambda: 1000.9)
    runs = [script.open_run(script.Args(), None, 1, "") for _ in range(2)]
    assert [run_dir.name.rpartition("__")[2] for run_dir, *_ in runs] == ["1000", "1001"]
    for run_dir, writer, _ in runs:
        writer.close()
        assert (run_dir / "args.json").exists()


def test_loss_that_is_not_finite_stops_the_run(stand_ins, monkeypatch):
    monkeypatch.setattr(fake, "reward_of", lambda robot, episode, t: np.where(episode == 2, np.nan, robot))
    with pytest.raises(script.RunError, match=r"at step \d+, qf_loss=nan.* is in (\S+)/failed.pt"):
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


# Stop and resume


def stop_at(monkeypatch, step: int, *numbers: int, pause: float = 0.0) -> None:
    """Signals to this process while it adds the transitions of that step, as of the start of the next run."""
    add, count = script.DeviceBuffer.add, []

    def spy(self, *transitions):
        add(self, *transitions)
        count.append(1)
        for number in numbers if len(count) == step else ():
            os.kill(os.getpid(), number)
            time.sleep(pause)

    monkeypatch.setattr(script.DeviceBuffer, "add", spy)


def stopped(args, code: int) -> Path:
    """Folder of the run, which ends with this exit code and leaves the handlers of signals as they were."""
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end:
        script.train_robots(args)
    assert end.value.code == code
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    return max(Path().glob("runs/*"), key=lambda path: path.stat().st_mtime)


def resume(folder: Path, *flags: str) -> Path:
    return script.train_robots(script.parse_flags(["--sim", "isaacgymenvs", "--resume", str(folder), *flags]))


def leaves(tree, path=()):
    """All tensors and values of a checkpoint, by where they are, but for the flags."""
    children = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list | tuple) else None
    if children is None:
        return {path: tree.tolist() if isinstance(tree, torch.Tensor) else tree}
    return {k: v for name, child in children if name != "args" for k, v in leaves(child, (*path, name)).items()}


HANGS = """import time, fake_simulators

class Hangs(fake_simulators.VecTask):
    def step(self, actions):
        if len(self.actions) == 330 + 2 * 52:  # two evaluations of 50 steps; each reset is a step, too
            open("hangs", "w").close()
            time.sleep(100)
        return super().step(actions)

fake_simulators.VecTask = Hangs
from fake_simulators import make
"""


@pytest.mark.parametrize("algo", ["meow", "sac"])
def test_stopped_and_resumed_is_not_stopped(stand_ins, monkeypatch, algo):
    """Bit for bit, where the robots begin new episodes anyway, and they are the same: after an evaluation."""
    reset = fake.Robots.reset

    def from_the_first(self, which):
        if which.all():
            self.episode[:] = -1
        reset(self, which)

    monkeypatch.setattr(fake.Robots, "reset", from_the_first)
    flags = dict(SHORT, sim="isaacgymenvs", env_id="Ant", algo=algo, autotune=True, total_steps=130, eval_frequency=30)
    flags.update(buffer_steps=40)  # so that it wraps
    whole = script.train_robots(script.Args(exp_name="whole", **flags))
    stop_at(monkeypatch, 60, signal.SIGINT)
    folder = stopped(script.Args(**flags), 130)
    assert resume(folder) == folder
    for name in ("checkpoint.pt", "best.pt"):
        one, other = (leaves(script.load_checkpoint(path / name)) for path in (whole, folder))
        assert {k: v for k, v in one.items() if v == v} == {k: v for k, v in other.items() if v == v}  # not the NaN
        assert one.keys() == other.keys() and len(one) > 50
    logged, other = scalars(whole), scalars(folder)
    assert logged.keys() == other.keys() and len(logged["charts/SPS"]) == 6
    assert all(logged[tag] == other[tag] for tag in logged if tag != "charts/SPS")


@pytest.mark.parametrize("sim, env_id", SIMS)
def test_what_reaches_the_buffer_of_a_resumed_run(stand_ins, buffers, monkeypatch, capsys, sim, env_id):
    """Both parts' transitions, each from episodes that begin with it; none across the stop, no log lost or doubled."""
    kind = dict(sim=sim, env_id=env_id)
    stop_at(monkeypatch, 35, signal.SIGTERM)
    folder = stopped(script.Args(total_steps=130, track=False, **kind, **SHORT), 143)
    early = "--sim isaacgymenvs " if sim == "isaacgymenvs" else ""
    said = f"stopped at step 35; go on with: python {sys.argv[0]} {early}--resume runs/{folder.name}"
    assert said in capsys.readouterr().out.splitlines()
    checkpoint = script.load_checkpoint(folder / "checkpoint.pt")
    assert checkpoint["global_step"] == 210 and len(checkpoint["run"]["ranks"][0]["stats"]) == 15
    assert (folder / "buffer-0.bin").stat().st_size == 4 * (6 * 200 + 1) * 12

    args = script.parse_flags(["--sim", sim, "--resume", str(folder), "--checkpoint-minutes=3"])
    assert script.train_robots(args) == folder
    assert "resumed at step 35; the robots begin new episodes" in capsys.readouterr().out
    rule = dict(deferred=sim == "isaacgymenvs", early=env_id == "AllegroHand")
    wanted = [sorted(fake.expected(6, steps, **rule)) for steps in (35, 95)]
    obs, _, _, next_obs, terminations = stored(buffers[1])
    assert (obs[:, :2] == next_obs[:, :2]).all() and (next_obs[:, 2] == obs[:, 2] + 1).all()
    rows = [(int(x[0]), int(x[1]), int(x[2]), bool(d)) for x, d in zip(next_obs, terminations, strict=True)]
    assert [sorted(rows[: len(wanted[0])]), sorted(rows[len(wanted[0]) :])] == wanted
    logged = scalars(folder)
    assert [step for step, _ in logged["losses/qf_loss"]] == [600, 780]
    assert [step for step, _ in logged["eval/episodic_return"]] == [780]
    assert [step for step, _ in logged["charts/episodic_return"]] == [600, 780]
    assert not list(folder.glob("buffer-*")) and (folder / "args-from-210.json").is_file()
    assert script.parse_flags(["--sim", sim, "--evaluate", str(folder / "best.pt")]).resume is None
    with pytest.raises(script.UserError, match="finished, at step 130"):
        script.train_robots(args)


def test_killed_and_resumed(stand_ins, tmp_path):
    """SIGKILL between checkpoints: what was logged after the last is void, and each step is logged once."""
    (tmp_path / "isaacgym.py").touch()
    (tmp_path / "isaacgymenvs.py").write_text(HANGS)
    flags = "--sim isaacgymenvs --env-id Ant --num-envs 6 --total-steps 400 --batch-size 16 --buffer-steps 100"
    flags += " --eval-frequency 150 --checkpoint-frequency 140 --device cpu"
    path = os.pathsep.join(map(str, [tmp_path, ROOT, ROOT / "tests"]))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "meow_isaacgym.py"), *flags.split()]
    process = subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.DEVNULL)
    while not (tmp_path / "hangs").exists() and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (folder,) = tmp_path.glob("runs/*")
    assert script.load_checkpoint(folder / "checkpoint.pt")["global_step"] == 6 * 280
    assert scalars(folder)["eval/episodic_return"][-1][0] == 6 * 300
    resume(folder)
    logged = scalars(folder)
    assert [at for at, _ in logged["charts/SPS"]] == [900, 1200, 1800, 2400]
    assert [at for at, _ in logged["eval/episodic_return"]] == [900, 1800, 2400]
    assert script.load_checkpoint(folder / "checkpoint.pt")["global_step"] == 2400


def test_damaged_checkpoint(stand_ins, monkeypatch, capsys):
    """It goes on from the one before, and says so; without that one, or without the buffer, it does not begin."""
    flags = dict(SHORT, sim="isaacgymenvs", env_id="Ant", total_steps=60, checkpoint_frequency=15)
    stop_at(monkeypatch, 40, signal.SIGINT)
    folder = stopped(script.Args(**flags), 130)
    content = bytearray((folder / "checkpoint.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "checkpoint.pt").write_bytes(content)
    shutil.copytree(folder, "runs/other")
    resume(folder)
    printed = capsys.readouterr()
    assert "(not as in checksums.json); goes on from previous-checkpoint.pt" in printed.err
    assert "resumed at step 30" in printed.out
    assert [step for step, _ in scalars(folder)["charts/SPS"]] == [360]
    (Path("runs/other") / "buffer-0.bin").unlink()
    with pytest.raises(script.UserError, match="runs/other/buffer-0.bin: no such file; expected the replay buffer"):
        resume("runs/other")
    (Path("runs/other") / "previous-checkpoint.pt").unlink()
    with pytest.raises(script.UserError, match="--resume runs/other: nothing to go on from: .*not a readable"):
        resume("runs/other")


def test_flags_of_a_resumed_run(stand_ins, monkeypatch):
    """Those of the run; one that would make it another run is refused, one that would not is taken."""
    stop_at(monkeypatch, 30, signal.SIGINT)
    flags = dict(SHORT, sim="isaacgymenvs", env_id="Ant", total_steps=60)
    folder = stopped(script.Args(gamma=0.9, **flags), 130)
    again = ["--resume", str(folder)]
    with pytest.raises(script.UserError, match="needs Isaac Gym; add --sim isaacgymenvs"):
        script.parse_flags(again)
    again += ["--sim", "isaacgymenvs"]
    assert script.parse_flags(again).gamma == script.parse_flags([*again, "--gamma=0.9"]).gamma == 0.9
    assert script.parse_flags([*again, "--checkpoint-frequency=7", "--debug"]).checkpoint_frequency == 7
    for flag in ("--gamma=0.8", "--num-envs=7", "--total-steps=70", "--env-id=Humanoid", "--algo=sac"):
        message = flag.replace("=", " ") + f".*: expected .*, as in {folder}; leave it out"
        with pytest.raises(script.UserError, match=message):
            script.parse_flags([*again, flag])


def test_second_signal_ends_the_run_at_once(stand_ins, monkeypatch):
    """The same signal once more within a second is no second one: torchrun passes on what a terminal sends to all."""
    stop_at(monkeypatch, 30, signal.SIGINT, signal.SIGINT, signal.SIGTERM, pause=0.6)
    folder = stopped(script.Args(sim="isaacgymenvs", env_id="Ant", total_steps=60, **SHORT), 143)
    assert script.load_checkpoint(folder / "checkpoint.pt")["global_step"] == 0


def test_checkpoints_are_due_by_steps_and_by_minutes(stand_ins, monkeypatch):
    saved, save = [], script.save_checkpoint

    def spy(path, checkpoint):
        saved.append((path.name, checkpoint["global_step"] // 6))
        save(path, checkpoint)

    monkeypatch.setattr(script, "save_checkpoint", spy)
    flags = dict(SHORT, sim="isaacgymenvs", env_id="Ant", total_steps=25, eval_frequency=15)
    script.train_robots(script.Args(checkpoint_frequency=10, **flags))
    assert [step for name, step in saved if name == "checkpoint.pt"] == [0, 10, 20, 25]
    assert ("best.pt", 15) in saved
    saved.clear()
    script.train_robots(script.Args(exp_name="minutes", checkpoint_minutes=1e-9, **flags))
    assert [step for name, step in saved if name == "checkpoint.pt"] == list(range(26))


def test_errors_and_debug(stand_ins, monkeypatch, capsys):
    """One line and an exit code: 2 for what the user can put right, 1 for the rest; --debug shows where."""
    flags = "--sim isaacgymenvs --env-id Ant --num-envs 6 --total-steps 60 --learning-starts 20 --buffer-steps 100"
    flags += " --batch-size 16 --device cpu"

    def main(*more):
        monkeypatch.setattr(sys, "argv", ["meow_isaacgym.py", *flags.split(), *more])
        runpy.run_path(str(ROOT / "meow_isaacgym.py"), run_name="__main__")

    def last_line(code, *more):
        with pytest.raises(SystemExit) as end:
            main(*more)
        assert end.value.code == code
        return capsys.readouterr().err.splitlines()[-1]

    assert last_line(2, "--exp-name=a", "--gamma=2") == "error: --gamma 2.0: expected in [0, 1]"
    monkeypatch.setattr(fake, "reward_of", lambda robot, episode, t: np.where(episode == 2, np.nan, robot))
    assert last_line(1, "--exp-name=b").startswith("error: the loss is not finite: at step")
    monkeypatch.setattr(fake.VecTask, "step", lambda self, actions: 1 / 0)
    assert last_line(1, "--exp-name=c") == "error: ZeroDivisionError: division by zero (--debug shows where)"
    with pytest.raises(ZeroDivisionError):
        main("--exp-name=d", "--debug")


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
