"""The scripts as a user meets them: tasks, loop, buffer, presets, logs, files, command line."""

import dataclasses
import json
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import tasks
from lives import MODULES, ROOT, SCRIPTS, check_rows, flags, folder_of, refused, run, scalars

MEOW = "meow_continuous_action.py"
meow = MODULES[MEOW]  # for what the scripts share; test_parity holds that it is one text
GOAL = "multigoal:MultiGoalAsymmetric-v0"
each_script = pytest.mark.parametrize("script", SCRIPTS)


def train(script: str, **more) -> Path:
    """A short run in this process."""
    return MODULES[script].train(MODULES[script].parse_args(flags(script, **more))).resolve()


def agent_of(folder: Path, name: str = "checkpoint.pt") -> torch.Tensor:
    parts = torch.load(folder / name, weights_only=True)["agent"]
    return torch.cat([x.flatten() for x in parts.values()])


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# Tasks


BOUNDS = [  # dtype, low, high, actions in [-1, 1], what the task gets
    ("float32", (-2, 0.1), (1, 0.7), [(-1, -1), (1, 1), (0.5, 0)], [(-2, 0.1), (1, 0.7), (0.25, 0.4)]),
    ("float32", (-1, 3), (1, 3), [(-1, -1), (1, 1), (0.5, 0.3)], [(-1, 3), (1, 3), (0.5, 3)]),
    ("float64", (0.1, -1 / 3), (0.7, 1e6), [(-1, -1), (1, 1), (3, -3)], [(0.1, -1 / 3), (0.7, 1e6), (0.7, -1 / 3)]),
    ("int8", (-128, 0), (127, 3), [(-1, -1), (1, 1), (0, 0.2), (0.5, -0.5)], [(-128, 0), (127, 3), (0, 2), (63, 1)]),
    ("uint8", (0, 7), (255, 7), [(-1, -1), (1, 1), (0.1, 0)], [(0, 7), (255, 7), (140, 7)]),
    ("int64", (-5,), (5,), [(-1,), (1,), (0.05,), (0.15,)], [(-5,), (5,), (0,), (1,)]),
]


@pytest.mark.parametrize("dtype, low, high, actions, expected", BOUNDS)
def test_actions_reach_the_task_in_its_own_bounds_and_type(dtype, low, high, actions, expected):
    gym.register("Bounds-v0", "tasks:Counting", kwargs=dict(low=low, high=high, dtype=np.dtype(dtype).type))
    env = meow.make_env("Bounds-v0")
    del gym.registry["Bounds-v0"]
    env.reset()
    assert (env.action_space.low == -1).all() and (env.action_space.high == 1).all()
    for action in actions:
        env.step(np.array(action, np.float32))
    seen = env.unwrapped.actions  # it refuses what is outside or of another type
    np.testing.assert_allclose(seen, np.array(expected, dtype), rtol=1e-6, atol=1e-7)
    assert (seen[0] == np.array(low, dtype)).all() and (seen[1] == np.array(high, dtype)).all()  # exactly


REFUSED = {
    "Hoper-v4": "Did you mean: `Hopper`",
    "nowhere:Task-v0": "No module named 'nowhere'",
    "tasks:Absent-v0": "Absent",
    "CartPole-v1": "actions are Discrete(2)",
    "tasks:Discrete-v0": "actions are Discrete(3)",
    "tasks:Unbounded-v0": "actions are Box",
    "tasks:Matrix-v0": "actions are Box",
    "tasks:Image-v0": "observations are Box",
}


def test_tasks_of_another_kind_are_refused():
    for env_id, message in REFUSED.items():
        with pytest.raises(SystemExit, match="^error: .*" + re.escape(message)):
            meow.make_env(env_id)


def test_observations_of_several_parts_are_flattened():
    env = meow.make_env("tasks:Dict-v0")
    obs, _ = env.reset()
    assert obs.shape == env.observation_space.shape == (9,) and obs.dtype == np.float32
    assert (train(MEOW, env_id="tasks:Dict-v0", total_timesteps=110) / "best.pt").exists()


@pytest.mark.parametrize("num_envs, capacity", [(1, 1000), (3, 1000), (3, 50)])
def test_no_transition_crosses_an_episode(monkeypatch, num_envs, capacity):
    """The task changes and returns one array, and its infos differ between copies."""
    buffers, make = [], meow.ReplayBuffer.__init__
    monkeypatch.setattr(meow.ReplayBuffer, "__init__", lambda self, *args: make(self, *args) or buffers.append(self))
    more = dict(total_timesteps=240, learning_starts=230, eval_frequency=1000)
    logged = scalars(train(MEOW, num_envs=num_envs, buffer_size=capacity, **more))
    (buffer,) = buffers
    held = min(240, capacity - capacity % num_envs)
    assert buffer.size == held and buffer.added == 240
    check_rows(buffer.rows[:held].numpy())
    ends = [k * num_envs for k in (5, 8, 13, 16)]
    assert logged["charts/episodic_return"][:4] == list(zip(ends, (15, 6, 15, 6), strict=True))
    assert logged["charts/episodic_length"][:4] == list(zip(ends, (5, 3, 5, 3), strict=True))


def test_acts_on_what_it_sees_and_stores_what_it_did(monkeypatch):
    """Environment i starts from seed + i; random actions are uniform; later ones are the policy's."""
    seeds, envs, buffers = [], [], []
    reset, make, init = tasks.Counting.reset, meow.make_env, meow.ReplayBuffer.__init__

    def seeded(self, *, seed=None, options=None):
        seeds.append(seed)
        return reset(self, seed=seed)

    monkeypatch.setattr(tasks.Counting, "reset", seeded)
    monkeypatch.setattr(meow, "make_env", lambda *args: envs.append(make(*args)) or envs[-1])
    monkeypatch.setattr(meow.ReplayBuffer, "__init__", lambda self, *args: init(self, *args) or buffers.append(self))
    policy = lambda self, obs, deterministic=False: torch.tanh(obs[:, 1:] - obs[:, :1] / 9)  # noqa: E731
    monkeypatch.setattr(meow.Agent, "sample", policy)
    train(MEOW, num_envs=3, seed=7, total_timesteps=600, learning_starts=300, utd=0.01, eval_frequency=10_000)
    assert [seed for seed in seeds if seed is not None][:3] == [7, 8, 9]
    rows = buffers[0].rows[:600].numpy()
    done = np.stack([env.unwrapped.actions for env in envs[:3]], 1)[..., 0]
    np.testing.assert_allclose(rows[:, 2].reshape(-1, 3), done, atol=1e-6)
    np.testing.assert_allclose(rows[300:, 2], np.tanh(rows[300:, 1] - rows[300:, 0] / 9), rtol=1e-5)
    assert abs(rows[:300, 2].mean()) < 0.15 and rows[:300, 2].min() < -0.9 and rows[:300, 2].max() > 0.9


def test_logs_and_evaluations_of_three_environments_are_due_at_the_next_step_that_they_reach():
    more = dict(num_envs=3, total_timesteps=600, learning_starts=300, utd=0.01, eval_frequency=250)
    logged = scalars(train(MEOW, **more))
    assert [step for step, _ in logged["charts/SPS"]] == [402, 501, 600]
    assert [step for step, _ in logged["eval/episodic_return"]] == [252, 501, 600]


def test_flush_copies_what_is_new_also_where_the_ring_wraps():
    buffer = meow.ReplayBuffer(Path("buffer.bin"), 10, 2, 1, "cpu")
    buffer.rows = buffer.file.clone()  # as on a GPU
    for k in range(1, 60):
        buffer.add(*(np.full((2, n), k) for n in buffer.widths))
        if k % 9 in (0, 2, 3):
            buffer.flush(), buffer.flush()
            assert torch.equal(buffer.file, buffer.rows)


def test_buffer_samples_uniformly_what_it_holds():
    buffer = meow.ReplayBuffer(Path("buffer.bin"), 10, 2, 1, "cpu")
    for i in range(0, 14, 2):  # wraps: the first four are overwritten
        x = np.array([[i], [i + 1]])
        buffer.add(np.repeat(x, 2, 1), x / 100, x[:, 0], np.repeat(x + 1, 2, 1), x[:, 0] % 2)
    torch.manual_seed(0)
    batch = buffer.sample(20_000)
    values, counts = batch.rewards.unique(return_counts=True)
    assert values.tolist() == list(range(4, 14)) and (counts - 2000).abs().max() < 5 * 2000**0.5
    assert torch.equal(batch.next_obs, batch.obs + 1) and torch.equal(batch.terminations, batch.rewards % 2)
    assert torch.equal(batch.actions, batch.rewards / 100)


@pytest.mark.parametrize("utd, num_envs, updates", [(1, 1, 100), (0.5, 1, 50), (2, 1, 200), (1, 4, 100), (0.1, 4, 10)])
def test_updates_per_step(monkeypatch, utd, num_envs, updates):
    made, make_update = [], meow.make_update

    def counted(agent, buffer, args):
        _, *others = make_update(agent, buffer, args)
        return lambda: made.append(buffer.added), *others

    monkeypatch.setattr(meow, "make_update", counted)
    train(MEOW, utd=utd, num_envs=num_envs, total_timesteps=200)
    assert len(made) == updates and made == sorted(made) and made[0] >= 100


# Seeds and evaluations


@each_script
def test_same_seed_same_numbers(script):
    """Of a task that draws from numpy.random and random; how often it is evaluated does not matter."""
    more = dict(env_id="tasks:Dice-v0", learning_starts=40, total_timesteps=80, deterministic_eval=False, utd=0.5)
    runs = [train(script, seed=seed, eval_frequency=n, **more) for seed, n in ((1, 20), (1, 20), (1, 40), (2, 90))]
    agents, curves = [agent_of(run) for run in runs], [scalars(run)["eval/episodic_return"] for run in runs]
    assert torch.equal(agents[0], agents[1]) and torch.equal(agents[0], agents[2])
    assert not torch.equal(agents[0], agents[3])
    assert curves[0] == curves[1] and [step for step, _ in curves[0]] == [20, 40, 60, 80]
    assert curves[2] == [point for point in curves[0] if point[0] % 40 == 0]


def test_evaluation_repeats_its_episodes_and_moves_nothing_else():
    args = meow.parse_args(flags(MEOW, env_id="tasks:Dice-v0", deterministic_eval=False))
    agent, envs = meow.Agent(2, 2, args), [meow.make_env("tasks:Dice-v0") for _ in range(3)]
    returns, lengths = meow.evaluate(agent, envs, args)
    assert (lengths == 20).all() and len(set(returns)) == 3
    random.random(), np.random.rand(), torch.rand(1)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    assert (returns == meow.evaluate(agent, envs, args)[0]).all()
    assert before == (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())


def test_evaluation_by_hand():
    args = meow.parse_args(flags(MEOW, env_id="Pendulum-v1"))
    agent = meow.Agent(3, 1, args)
    returns, lengths = meow.evaluate(agent, [meow.make_env("Pendulum-v1") for _ in range(2)], args)
    env = gym.make("Pendulum-v1")
    obs, _ = env.reset(seed=10_001)
    total, done = 0.0, False
    while not done:
        action = agent.sample(torch.as_tensor(obs)[None], deterministic=True)[0].detach().numpy()
        obs, reward, terminated, truncated, _ = env.step(2 * action)
        total, done = total + reward, terminated or truncated
    assert total == pytest.approx(returns[1], rel=1e-4) and (lengths == 200).all()


@pytest.mark.parametrize("deterministic", [True, False])
def test_evaluation_of_episodes_of_several_lengths(deterministic):
    """Each environment gets the action of its own observation, also when others have ended."""
    args = meow.parse_args(flags(MEOW, deterministic_eval=deterministic))
    envs, asked = [meow.make_env("tasks:Counting-v0") for _ in range(4)], []
    envs[0].reset(), envs[2].reset()  # the episodes to come are of 3, 5, 3 and 5 steps
    agent = SimpleNamespace(sample=lambda obs, flag: asked.append(flag) or torch.tanh(obs[:, 1:] - 2 * obs[:, :1]))
    returns, lengths = meow.evaluate(agent, envs, args)
    assert (returns.tolist(), lengths.tolist()) == ([6, 15, 6, 15], [3, 5, 3, 5]) and set(asked) == {deterministic}
    for env, episode, n in zip(envs, (1, 0, 1, 0), (3, 5, 3, 5), strict=True):
        np.testing.assert_allclose(np.ravel(env.unwrapped.actions), np.tanh(np.arange(n) - 2 * episode), atol=1e-6)


# Presets and flags


PAPER = {  # alpha, tau, log_sigma_max, learning starts, steps: MEow's paper, appendix
    "Hopper": (0.25, 0.005, -0.3, 5_000, 1_500_000),
    "HalfCheetah": (0.25, 0.003, 2.0, 10_000, 1_500_000),
    "Walker2d": (0.1, 0.005, -0.3, 10_000, 4_000_000),
    "Ant": (0.05, 0.0001, -0.3, 5_000, 4_000_000),
    "Humanoid": (0.125, 0.0005, -0.3, 5_000, 5_000_000),
}
COMMON = dict(gamma=0.99, batch_size=256, buffer_size=1_000_000, utd=1, num_envs=1, eval_frequency=10_000)
COMMON |= dict(eval_episodes=10, deterministic_eval=True)
OTHERS = {  # CleanRL's, for SAC-NF, too; Haarnoja et al.'s; Messaoud et al.'s
    "sac": dict(policy_lr=3e-4, q_lr=1e-3, tau=0.005, policy_frequency=2, autotune=True),
    "sac_nf": dict(policy_lr=3e-4, q_lr=1e-3, tau=0.005, policy_frequency=2, autotune=True),
    "sql": dict(learning_rate=3e-4, tau=0.005, value_samples=16, particles=16),
    "meow_plus": dict(alpha=0.05, kappa=30, learning_rate=1e-3, flow_learning_rate=3e-4, tau=0.005, dropout=0.1)
    | dict(log_sigma_min=-5, log_sigma_max=-0.3, max_grad_norm=30),  # this project's, the same for all
    "s2ac": dict(learning_rate=3e-4, tau=0.005, svgd_particles=10, variant="phi-theta", batch_size=100),
}
REWARD_SCALE = {"Hopper": 30, "HalfCheetah": 30, "Walker2d": 10, "Ant": 300, "Humanoid": 100}  # SQL's


@pytest.mark.parametrize("version", ["v4", "v5"])
@pytest.mark.parametrize("task", PAPER)
def test_presets_are_the_papers_and_flags_win(task, version):
    names = ("alpha", "tau", "log_sigma_max", "learning_starts", "total_timesteps")
    expected = {"meow": COMMON | dict(zip(names, PAPER[task], strict=True))}
    expected["meow"] |= dict(learning_rate=1e-3, max_grad_norm=30, dropout=0.1, log_sigma_min=-5, coupling="additive")
    expected["meow_mixture"] = {k: v for k, v in expected["meow"].items() if k not in ("dropout", "coupling")}
    for algorithm, own in OTHERS.items():
        expected[algorithm] = COMMON | own | dict(learning_starts=5_000, total_timesteps=PAPER[task][-1])
    expected["sql"]["alpha"] = 1 / REWARD_SCALE[task]
    alpha = 0.2 if task == "Ant" else 1.0
    expected["s2ac"] |= dict(alpha=alpha, svgd_step_size=pytest.approx(0.1 * alpha))  # the paper's 0.1 times alpha
    for algorithm, values in expected.items():
        module = MODULES[f"{algorithm}_continuous_action.py"]
        args = module.parse_args(["--env-id", f"{task}-{version}"])
        assert {name: getattr(args, name) for name in values} == values, algorithm
        args = module.parse_args(["--env-id", f"{task}-{version}", "--tau=0.7", "--gamma=0.5", "--device=cpu"])
        assert (args.tau, args.gamma, args.total_timesteps) == (0.7, 0.5, PAPER[task][-1])


@pytest.mark.parametrize("script", [s for s in SCRIPTS if "plus" not in s])  # its alpha is not in units of reward
def test_presets_of_the_goal_maps_share_the_objective(script):
    for env_id, alpha, gamma in (("multigoal:MultiGoal-v0", 2.5, 0.9), (GOAL, 10.0, 0.8)):
        args = MODULES[script].parse_args(["--env-id", env_id])
        assert (args.alpha, args.gamma, args.total_timesteps) == (alpha, gamma, 16_000)
        assert not getattr(args, "autotune", False)


@each_script
def test_numbers_out_of_range_are_refused(script):
    """Every number of Args: nan, and what is below its range."""
    module, values = MODULES[script], {}
    for field in dataclasses.fields(module.Args):
        if type(field.default) in (int, float) and (script == MEOW or field.name not in vars(meow.Args())):
            values[field.name] = ("-21", "nan", "inf")[: 3 if isinstance(field.default, float) else 1]
    values["alpha"] = ("0", "nan")
    assert len(values) >= 2
    for name, bad in values.items():
        for value in bad:
            flag = f"--{name.replace('_', '-')}"
            with pytest.raises(SystemExit, match=rf"^error: {flag} .*expected"):
                module.parse_args([f"{flag}={value}"])


MISTAKES = {
    "--gamma=1.5": "--gamma 1.5: expected 0 to 1",
    "--tau=1.1": "--tau 1.1: expected 0 to 1",
    "--num-envs=0": "--num-envs 0: expected",
    "--learning-starts=0": "--learning-starts 0: expected",
    "--total-timesteps=5000": "--learning-starts: expected less than --total-timesteps",
    "--num-envs=2000000": "--num-envs: expected at most --buffer-size",
    "--log-sigma-min=0": "--log-sigma-min: above the maximum",
}
if not torch.cuda.is_available():
    MISTAKES["--device=cuda"] = "--device cuda: PyTorch sees no GPU"


def test_mistakes_are_named():
    for flag, message in MISTAKES.items():
        with pytest.raises(SystemExit, match="^error: " + re.escape(message)):
            meow.parse_args([flag])


@each_script
def test_a_mistake_is_one_line_and_leaves_nothing(script, tmp_path):
    mistakes = "--env-id=Hoper-v4 --env-id=tasks:Image-v0 --gamma=2 --evaluate=absent.pt --resume=absent".split()
    for flag in mistakes if script == MEOW else mistakes[:1]:
        refused(script, flag, cwd=tmp_path, message=flag.partition("=")[2])
    assert not Path("runs").exists()
    life = run(script, "--gama=0.9", cwd=tmp_path, code=2)
    assert "--gama" in life.err and "Traceback" not in life.err
    shown = run(script, "--env-id=Ant-v4", "--help", cwd=tmp_path).out
    assert "4000000" in shown and "discount factor" in shown  # Ant's preset; the help of a flag


def test_compiler_is_asked_for_where_it_pays(monkeypatch):
    monkeypatch.setenv("CXX", sys.executable)  # some program that is there

    def compile_of(*argv: str) -> str:
        return meow.parse_args(["--device=cpu", *argv]).compile

    assert compile_of("--env-id=Hopper-v4") == "on" == compile_of("--total-timesteps=5001", "--compile=on")
    assert compile_of("--total-timesteps=9000") == "off" == compile_of("--utd=0.001")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert compile_of("--env-id=Hopper-v4") == "off"
    with pytest.raises(SystemExit, match="error: --compile on: no C\\+\\+ compiler"):
        compile_of("--compile=on")


ABLATIONS = [("meow", dict(reward_shift=False)), ("meow", dict(clipped_double_q=False)), ("meow", dict(dropout=0.5))]
ABLATIONS += [("meow", dict(coupling="affine")), ("sac", dict(reward_shift=True)), ("sac", dict(autotune=False))]
ABLATIONS += [("s2ac", dict(variant="phi")), ("s2ac", dict(variant="phi-theta-psi")), ("s2ac", dict(svgd_steps=0))]
ABLATIONS += [("sql", dict(value_samples=50)), ("meow_mixture", dict(components=3))]


@pytest.mark.parametrize("algorithm, more", ABLATIONS)
def test_ablations_train_and_load(algorithm, more):
    script = f"{algorithm}_continuous_action.py"
    folder = train(script, total_timesteps=105, **more)
    agent, args = MODULES[script].load_agent(folder / "checkpoint.pt")
    assert more.items() <= vars(args).items() and agent.sample(torch.zeros(4, 2)).isfinite().all()


# Runs


@each_script
def test_run(script, tmp_path):
    """Through the command line: files, logs, --evaluate, load_agent; what cannot be resumed."""
    key = "0123456789abcdef" * 2 + "secret01"
    more = dict(total_timesteps=400, eval_frequency=150, env_id="Pendulum-v1", exp_name="../../a b\n/ü")
    life = run(script, *flags(script, **more), cwd=tmp_path / "x", WANDB_API_KEY=key)
    folder, module = folder_of(tmp_path / "x"), MODULES[script]
    files = sorted(path.name for path in folder.iterdir() if "events" not in path.name)
    assert files == ["args.json", "best.pt", "checkpoint.pt"]
    assert not [path for path in folder.iterdir() if key.encode() in path.read_bytes()]

    logged = scalars(folder)
    losses = {"qf_loss", "qf1_loss", "qf2_loss", "qf1_values", "qf2_values", "target_values", "grad_norm"}
    assert losses <= set(module.METRICS) and ("alpha" in module.METRICS) == ("sac_" in script)
    agent, args = module.load_agent(folder / "best.pt")
    tags = {f"losses/{name}" for name in module.METRICS}
    tags |= {f"policy/{name}" for name in agent.policy_metrics(torch.zeros(4, 3))}
    evaluations = {"eval/episodic_return", "eval/episodic_length"}
    assert logged.keys() == tags | evaluations | {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    for tag in tags | {"charts/SPS"}:
        assert [step for step, _ in logged[tag]] == [200, 300, 400], tag
    assert [step for step, _ in logged["eval/episodic_length"]] == [150, 300, 400]
    assert logged["charts/episodic_length"] == [(200, 200), (400, 200)]

    facts = json.loads((folder / "args.json").read_text())
    assert facts["args"]["exp_name"] == more["exp_name"] and facts["versions"]["torch"] == torch.__version__
    assert shlex.split(facts["command"])[1:] == flags(script, **more)
    best = max(value for _, value in logged["eval/episodic_return"])
    assert f"best evaluation return {best:.1f}; checkpoints in {folder.relative_to(tmp_path / 'x')}" in life.out
    for word in ("100%", "400/400", "episode=", "evaluation=", "SPS="):
        assert word in life.err

    assert args.exp_name == more["exp_name"] and args.device == "cpu"
    returns, _ = module.evaluate(agent, [module.make_env(args.env_id) for _ in range(2)], args)
    assert np.float32(returns.mean()) == best
    replay = ["--evaluate", folder / "best.pt", "--device=cpu"]
    evaluated = re.search(r"return (\S+) .* of \[(.*), (.*)\]", run(script, *replay, cwd=tmp_path / "x").out)
    assert [float(x) for x in evaluated.groups()] == pytest.approx([best, *returns], abs=0.06)
    refused(script, *replay, "--env-id=tasks:Counting-v0", cwd=tmp_path / "x", message="tasks:Counting-v0")

    resume = ["--resume", str(folder), "--device=cpu"]
    refused(script, *resume, cwd=tmp_path / "x", message="finished")
    with pytest.raises(SystemExit, match="^error: .*buffer.bin"):
        module.train(module.parse_args([*resume, "--total-timesteps=500"]))
    for flag in ("--seed=2", "--gamma=0.5", "--num-envs=2", "--env-id=Ant-v4"):
        with pytest.raises(SystemExit, match=f"^error: {flag.replace('=', ' ')}: expected"):
            module.parse_args([*resume, flag])
    assert len(list(folder.iterdir())) == 4 and [path.name for path in (tmp_path / "x").iterdir()] == ["runs"]


def test_task_file_in_the_current_directory(tmp_path):
    """As from a shell, with the script elsewhere."""
    shutil.copy(ROOT / "tests" / "tasks.py", tmp_path / "mytask.py")
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | dict(OMP_NUM_THREADS="1")
    argv = flags(MEOW, env_id="mytask:Counting-v0", total_timesteps=110)
    done = subprocess.run([sys.executable, str(ROOT / MEOW), *argv], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (folder_of(tmp_path) / "best.pt").exists()


def test_videos(tmp_path):
    """A file of the first episode of every evaluation; where nothing is drawn, one line."""
    more = dict(total_timesteps=200, eval_frequency=100, learning_starts=190, capture_video=True)
    run(MEOW, *flags(MEOW, **more), cwd=tmp_path)
    videos = sorted(folder_of(tmp_path).glob("videos*/*.mp4"))
    for video, length in zip(videos, (3, 5), strict=True):
        frames = imageio.imread(video)
        assert frames.shape == (length + 1, 32, 32, 3) and frames[-1].mean() > 40 * length - 10
    run(MEOW, "--evaluate", folder_of(tmp_path) / "best.pt", "--capture-video", cwd=tmp_path)
    assert len(list(tmp_path.glob("runs/*/videos*/*.mp4"))) == 3
    refused(MEOW, *flags(MEOW, **more | dict(env_id="tasks:NoPicture-v0")), cwd=tmp_path, message="tasks:NoPicture-v0")
    for name, message in dict(NoScreen="no GL context", Dice="render_mode").items():
        life = run(MEOW, *flags(MEOW, **more | dict(env_id=f"tasks:{name}-v0")), cwd=tmp_path, code=1)
        assert message in life.err and "stopped at step" not in life.out


def test_wandb_offline(tmp_path):
    more = dict(total_timesteps=200, track=True)
    run(MEOW, *flags(MEOW, **more), cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    assert all(name in log.read_bytes() for name in (b"losses/qf_loss", b"eval/episodic_return", b"total_timesteps"))


@each_script
def test_page_names_every_flag_and_metric(script):
    module, page = MODULES[script], (ROOT / "docs" / "running.md").read_text()
    args = module.parse_args(flags(script))
    names = [f"losses/{name}" for name in module.METRICS] + ["charts/SPS", "eval/episodic_return"]
    names += [f"policy/{name}" for name in module.Agent(3, 2, args).policy_metrics(torch.zeros(4, 3))]
    assert not [name for name in names if f"`{name}`" not in page]
    assert not [flag for name in vars(args) if (flag := f"`--{name.replace('_', '-')}") not in page]


def test_links_of_the_pages_lead_somewhere():
    """Each relative link of README.md and docs/ to a file that is there and, after a #, to a heading of it."""
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.is_file(), (page, path)
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, (page, anchor)
