"""Compiled updates, several seeds in one process, and the command that times them."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import meow_continuous_action as meow
import s2ac_continuous_action as s2ac
import sac_continuous_action as sac
import sql_continuous_action as sql
from benchmark import speed
from numerics import random_batch
from test_scripts import GOAL, cold, run, scalars, short_flags

ROOT = Path(__file__).resolve().parent.parent
MODULES = [meow, sac, sql]
NAMES = [module.__name__.split("_")[0] for module in MODULES]


def updates(module, seeds: list[int], n: int = 30, **flags) -> tuple[list[dict], torch.Tensor]:
    """State of each agent and of its learner, and the last statistics, after n updates in float64 without dropout."""
    no_dropout = dict(dropout=0.0) if module is meow else {}
    args = module.Args(batch_size=32, num_seeds=len(seeds), device="cpu", **{"compile": "off", **no_dropout, **flags})
    torch.set_default_dtype(torch.float64)
    try:
        agents = [torch.manual_seed(seed) and module.Agent(6, 2, args) for seed in seeds]
        update, learner = module.make_update(agents, args)
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        for k in range(n):
            inputs = []
            for rng, seed in zip(rngs, seeds, strict=True):
                torch.manual_seed(1000 * seed + k)
                inputs.append((*random_batch(32, 6, 2), *module.draw_noise(2, args, rng)))
            stats = update(*(torch.stack(x) for x in zip(*inputs, strict=True)), n=k)
    finally:
        torch.set_default_dtype(torch.float32)
    return [{"agent": a.state_dict()} | module.seed_state(learner, s) for s, a in enumerate(agents)], stats


def distance(left: dict, right: dict) -> float:
    """Largest difference of two states of updates()."""
    assert left.keys() == right.keys()
    pairs = [(left[name][key], right[name][key]) for name in left for key in left[name]]
    assert len(pairs) > 20 and all(x.shape == y.shape for x, y in pairs)
    return max((x - y).abs().max().item() for x, y in pairs if x.numel())


@pytest.mark.parametrize("module", [*MODULES, s2ac], ids=[*NAMES, "s2ac"])
def test_parameters_of_every_seed_begin_at_multiples_of_16_bytes(module):
    """Or CUDA's batched products fail; moving them into their rows changes no value."""
    args = module.Args(compile="off", device="cpu", num_seeds=2)
    agents = [module.Agent(11, 3, args) for _ in range(2)]
    before = [{name: x.clone() for name, x in agent.state_dict().items()} for agent in agents]
    module.make_update(agents, args)
    for agent, state in zip(agents, before, strict=True):
        trained = [p for name, p in agent.named_parameters() if name != "log_alpha"]
        assert len(trained) > 10 and all(p.data_ptr() % 16 == 0 for p in trained)
        assert all(torch.equal(x, state[name]) for name, x in agent.state_dict().items())


def test_moments_of_another_layout_are_refused():
    """Fused Adam does not look: it would read and write beside them."""
    args = meow.Args(batch_size=32, compile="off", device="cpu")
    agent = meow.Agent(11, 3, args)
    update, learner = meow.make_update([agent], args)
    batch = (x.float()[None] for x in random_batch(32, 11, 3))
    update(*batch, meow.draw_noise(3, args, torch.Generator())[0][None], n=0)
    state = meow.seed_state(learner, 0)
    meow.load_seed_state(learner, state)
    state["optimizer"]["exp_avg"] = state["optimizer"]["exp_avg"][:-1]
    with pytest.raises(ValueError, match="optimizer: not the moments of"):
        meow.load_seed_state(learner, state)


MIXTURE = (meow, dict(density="mixture"))


@pytest.mark.parametrize("module, flags", [*((m, {}) for m in MODULES), MIXTURE], ids=[*NAMES, "mixture"])
def test_seeds_side_by_side_are_the_seeds_alone(module, flags):
    together, stats = updates(module, [1, 2, 3], **flags)
    for s, seed in enumerate((1, 2, 3)):
        (alone,), stats_alone = updates(module, [seed], **flags)
        assert distance(together[s], alone) < 1e-10
        torch.testing.assert_close(stats[s], stats_alone[0], rtol=1e-9, atol=1e-9)
    assert distance(together[0], together[1]) > 0.01


@pytest.mark.parametrize("module, seeds", [(meow, [1]), (meow, [1, 2]), (sac, [1]), (sql, [1])])
def test_compiled_is_eager(module, seeds, capsys):
    """Parameters, targets and Adam's moments after 30 updates are equal to 1e-8."""
    compiled, stats = updates(module, seeds, compile="on")
    assert "goes on without" not in capsys.readouterr().out
    eager, stats_eager = updates(module, seeds)
    assert max(distance(x, y) for x, y in zip(compiled, eager, strict=True)) < 1e-8
    torch.testing.assert_close(stats, stats_eager, rtol=1e-6, atol=1e-8)


def test_second_compiled_run_of_a_process_has_its_own_flags(tmp_path, monkeypatch):
    """What torch.compile keeps of the first has its discount in it. Traced only, by the backend "eager"."""
    monkeypatch.chdir(tmp_path)
    real = torch.compile

    def traced(function, fullgraph, options):
        options = dict(guard_filter_fn=options["guard_filter_fn"])
        return real(function, fullgraph=fullgraph, backend="eager", options=options)

    monkeypatch.setattr(torch, "compile", traced)
    batch, targets = [x.float()[None] for x in random_batch(32, 3, 1)], []
    for gamma in (0.9, 0.0, 0.9):
        args = sql.Args(env_id="Pendulum-v1", batch_size=32, device="cpu", compile="on", gamma=gamma)
        update, _, _ = sql.make_runs(args)
        noise = [x[None] for x in sql.draw_noise(1, args, torch.Generator().manual_seed(0))]
        targets.append(update(*batch, *noise, n=0)[0, sql.LOSSES.index("target")].item())
    assert targets[0] == targets[2] != targets[1] == pytest.approx(batch[2].mean().item(), abs=1e-6)


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_compiled_actions(module):
    agent = module.Agent(6, 2, module.Args())
    act = module.compiled(agent.act, module.Args(compile="on", device="cpu"))
    noise = torch.randn(3, 4, 2)
    with torch.no_grad():
        for obs, z in zip(torch.randn(3, 4, 6), noise, strict=True):
            torch.testing.assert_close(act(obs, z), agent.act(obs, z), rtol=1e-4, atol=1e-5)
            for p in agent.parameters():  # the compiled function follows the parameters
                p.add_(0.01)


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_every_update_has_fresh_noise(module):
    """Two agents of equal parameters and one batch end apart, by what draw_noise gave them; equal noise, no gap."""
    args = module.Args(batch_size=16, device="cpu", num_seeds=3)
    agents = [torch.manual_seed(0) and module.Agent(6, 2, args) for _ in range(3)]
    update, _ = module.make_update(agents, args)
    batch, rng = [torch.stack([x.float()] * 3) for x in random_batch(16, 6, 2)], torch.Generator().manual_seed(0)
    noises = [module.draw_noise(2, args, rng), module.draw_noise(2, args, rng)]
    update(*batch, *(torch.stack([x, y, x]) for x, y in zip(*noises, strict=True)), n=0)
    first, second, third = (torch.nn.utils.parameters_to_vector(agent.parameters()) for agent in agents)
    assert torch.equal(first, third) and (first - second).abs().max() > 1e-5


@pytest.mark.parametrize("module", MODULES, ids=NAMES)
def test_runs_side_by_side_write_what_runs_alone_write(module, tmp_path, monkeypatch):
    """Folders, logs and checkpoints: those of --seed 5 --num-seeds 2 against --seed 5 and --seed 6."""
    monkeypatch.chdir(tmp_path)
    flags = ["--env-id", GOAL, *short_flags(total_timesteps=240, eval_frequency=120)]
    flags += ["--dropout", "0", "--density", "flow"] if module is meow else []
    torch.set_default_dtype(torch.float64)
    try:
        both = module.train(module.parse_args([*flags, "--seed=5", "--num-seeds=2", "--exp-name=both"]))
        alone = [module.train(module.parse_args([*flags, f"--seed={s}", "--exp-name=alone"]))[0] for s in (5, 6)]
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(both) == 2
    for together, single in zip(both, alone, strict=True):
        one, other = (module.load_checkpoint(folder / "checkpoint.pt") for folder in (together, single))
        differ = {k for k in one["args"] if one["args"][k] != other["args"][k]}
        assert differ == {"exp_name"} and one.keys() == other.keys() and one["global_step"] == 240
        states = [
            {k: v for k, v in c.items() if isinstance(v, dict) and k not in ("args", "run")} for c in (one, other)
        ]
        assert distance(*states) < 1e-9
        logs = scalars(together), scalars(single)
        for tag in logs[0].keys() - {"charts/SPS"}:
            assert [step for step, _ in logs[0][tag]] == [step for step, _ in logs[1][tag]]
            for (_, x), (_, y) in zip(logs[0][tag], logs[1][tag], strict=True):
                assert x == pytest.approx(y, rel=1e-5, abs=1e-5), tag


def test_gradients_are_clipped_seed_by_seed():
    """A seed whose gradient is huge does not shrink the step of its neighbour."""
    torch.manual_seed(0)
    args = meow.Args(batch_size=16, num_seeds=2, max_grad_norm=1e-3, dropout=0.0, device="cpu")
    agents = [meow.MEow(3, 2, args) for _ in range(2)]
    update, learner = meow.make_update(agents, args)
    batch = [x.float() for x in random_batch(16, 3, 2)]
    batch = [torch.stack([x, x]) for x in batch]
    batch[2][1] *= 1e4  # the second seed's rewards
    noise = (torch.zeros(2, 4, 2, 16, 0, dtype=torch.int32),)
    norms = update(*batch, *noise, n=0)[:, -1]
    assert norms[1] > 10 * norms[0] > 0.1  # both are clipped, each to 0.001
    for s in range(2):  # Adam's first moment after one step is a tenth of the gradient
        assert meow.seed_state(learner, s)["optimizer"]["exp_avg"].norm() == pytest.approx(1e-4, rel=1e-3)


def test_without_a_compiler_the_run_goes_on(tmp_path):
    """No compiler: one line, eager. A compiler that fails: one line, eager. Too short a run: one line, eager."""
    flags = short_flags(env_id=GOAL, total_timesteps=160)
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "python").symlink_to(sys.executable)
    (tools / "g++").write_text("#!/bin/sh\nexit 1\n")
    (tools / "g++").chmod(0o755)
    cases = (
        (["--compile=on"], dict(PATH=""), "not compiled: no C++ compiler is found"),
        (["--compile=on"], dict(CXX=str(tools / "g++"), TORCHINDUCTOR_FX_GRAPH_CACHE="0"), "goes on without"),
        ([], {}, "not compiled: 60 updates do not pay for it"),
        (["--compile=off"], {}, None),
    )
    for more, env, line in cases:
        env = dict(env, TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
        done = (cold if "CXX" in env else run)(*flags, *more, cwd=tmp_path, **env)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        printed = done.stdout + done.stderr
        assert (line in printed) if line else ("compile:" not in printed and "not compiled" not in printed)
        assert "evaluation return" in done.stdout


def test_long_runs_compile_and_short_ones_do_not(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/usr/bin/g++")
    assert meow.choose_compile(meow.parse_args(["--env-id", "Hopper-v4"]))
    assert not meow.choose_compile(meow.parse_args(["--env-id", GOAL]))
    assert not meow.choose_compile(meow.parse_args(["--env-id", "Hopper-v4", "--utd", "0.001"]))
    assert meow.choose_compile(meow.parse_args(["--env-id", GOAL, "--compile", "on"]))
    assert not meow.choose_compile(meow.parse_args(["--env-id", "Hopper-v4", "--compile", "off"]))


RECORDED = [*((m, {}) for m in MODULES), MIXTURE, (meow, dict(num_seeds=2)), (s2ac, dict(variant="phi-theta-psi"))]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("module, flags", RECORDED, ids=[*NAMES, "mixture", "two seeds", "s2ac"])
def test_recorded_update_on_a_gpu(module, flags, monkeypatch):
    """With CUDA graphs: as eager on the same inputs, and other results from other noise with the same batch."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # as the scripts do: not every operation is allowed then
    states = {}
    for compile in ("on", "off"):
        args = module.Args(batch_size=32, compile=compile, device="cuda", **flags)
        agents = [torch.manual_seed(seed) and module.Agent(11, 3, args).cuda() for seed in range(1, args.num_seeds + 1)]
        update, _ = module.make_update(agents, args)
        rng = torch.Generator("cuda").manual_seed(0)
        torch.manual_seed(0)
        batch = [x.float().cuda().expand(len(agents), *x.shape) for x in random_batch(32, 11, 3)]
        rows = []
        for k in range(30):
            noise = zip(*(module.draw_noise(3, args, rng) for _ in agents), strict=True)
            rows.append(update(*batch, *(torch.stack(x) for x in noise), n=k))
        assert len({tuple(row.flatten().tolist()) for row in rows}) == 30
        states[compile] = torch.cat([torch.nn.utils.parameters_to_vector(agent.parameters()) for agent in agents])
    torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(states["on"], states["off"], rtol=1e-2, atol=1e-3)


# The command


def test_speed_command(tmp_path):
    """Every implementation in turn: a row a turn, in the CSV and in the table."""
    out = tmp_path / "new" / "speed.csv"
    command = [sys.executable, "-m", "benchmark.speed", "--env-ids=Hopper-v4", "--implementations", "MEow", "SAC"]
    command += ["SB3 SAC", "SBX SAC", "--modes=eager", "--threads=1", "--turns=2", "--seconds=0.05"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command += [f"--csv={out}", f"--png={tmp_path / 'speed.png'}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=170, env=env)
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(out.open()))
    assert [row["implementation"] for row in rows] == ["MEow", "SAC", "SB3 SAC", "SBX SAC"] * 2
    assert all(0 < float(row[part]) < 1e5 for row in rows for part in speed.PARTS)
    assert all(
        1e3 / float(row["loop_sps"]) > 0.1 * float(row["update_ms"]) for row in rows
    )  # an update is in each step
    assert len(re.findall(r"\| Hopper-v4 \| 1 \| ", done.stdout)) == 4
    assert (tmp_path / "speed.png").stat().st_size > 10_000


def test_speed_table():
    """Medians and ratios of known numbers."""
    rows = [
        dict(env_id="T", threads=1, implementation=name, mode="compiled", batch_size=256, num_envs=1, num_seeds=1)
        | dict(turn=k, update_ms=2.0 + k, act_ms=0.5, loop_sps=sps + k)
        for k in range(3)
        for name, sps in (("MEow", 300.0), ("SAC", 200.0))
    ]
    lines = speed.table(rows).splitlines()[2:]
    assert lines[0] == "| T | 1 | MEow | compiled | 3.00 (2.00–4.00) | 0.500 (0.500–0.500) | 301 (300–302) | 1.00 |"
    assert lines[1].endswith(f"| 201 (200–202) | {301 / 201:.2f} |")


@pytest.mark.parametrize(
    "name", ["speed.csv", "speed_hopper.csv", "speed_large.csv", "speed_eager.csv", "speed_growth.csv"]
)
def test_committed_speed_backs_the_pages(name):
    rows = list(csv.DictReader((ROOT / "benchmark" / "results" / name).open()))
    assert all(row["commit"] and "dirty" not in row["commit"] for row in rows)
    assert speed.table(rows) in (ROOT / "docs" / "speed.md").read_text()


def test_committed_speed_backs_the_readme():
    """How much faster MEow's loop is than the others' on Hopper, one thread and two."""
    table = speed.table(list(csv.DictReader((ROOT / "benchmark" / "results" / "speed_hopper.csv").open())))
    faster = re.findall(r"^\| Hopper-v4 \| (\d) \| (.*) \| \w+ \|.* ([\d.]+) \|$", table, re.M)
    one, two = ({name: x for threads, name, x in faster if threads == n} for n in "12")
    text = (
        f"{one['SAC']} times as fast as SAC (two threads: {two['SAC']}), {one['SB3 SAC']} ({two['SB3 SAC']}) times as"
    )
    readme = (ROOT / "README.md").read_text()
    assert f"{text} Stable-Baselines3's, {one['SBX SAC']} ({two['SBX SAC']}) times as SBX's" in readme


def test_committed_compiled_and_eager_curves_back_the_pages():
    """Each row of the table of docs/speed.md is in the CSV."""
    rows = list(csv.DictReader((ROOT / "benchmark" / "results" / "compiled_eager.csv").open()))
    returns = {(r["env_id"].split(":")[-1], r["step"], r["compile"], r["seed"]): float(r["return"]) for r in rows}
    table = re.findall(r"^\| (\S+) \| (\d+) \| (on|off) \| (.*) \|$", (ROOT / "docs" / "speed.md").read_text(), re.M)
    assert len(table) >= 14
    for env_id, step, compile, cells in table:
        assert cells == " | ".join(f"{returns[env_id, step, compile, seed]:.0f}" for seed in "123")
