"""The scripts as a user meets them: loop, buffer, presets, errors, logs, checkpoints, command line."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import gymnasium as gym
import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import meow_continuous_action as meow
import s2ac_continuous_action as s2ac
import sac_continuous_action as sac
import sql_continuous_action as sql
from lives import Life

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = sorted(path.name for path in ROOT.glob("*_continuous_action.py"))
MODULES = {module.__name__ + ".py": module for module in (meow, s2ac, sac, sql)}
GOAL = "multigoal:MultiGoalAsymmetric-v0"  # the map whose episodes end after 30 steps at the latest
SHORT = dict(learning_starts=100, batch_size=32, buffer_size=10_000, eval_episodes=2, device="cpu")
QUICK = {s2ac: dict(svgd_particles=2, svgd_steps=1)}  # where an update of the preset's takes long


def run(*flags, cwd, script="meow_continuous_action.py", **env) -> subprocess.CompletedProcess:
    """The script in a process forked from one that has imported everything, tests' tasks and goal maps importable."""
    life = Life(script, *flags, cwd=cwd, **env).wait()
    return subprocess.CompletedProcess(flags, life.code, life.out, life.err)


def cold(*flags, cwd, script="meow_continuous_action.py", **env) -> subprocess.CompletedProcess:
    """As `run`, but as from a shell: it takes 5 s to import."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    command = [sys.executable, str(ROOT / script), *map(str, flags)]
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=120)


def short_flags(**more) -> list[str]:
    return [f"--{k.replace('_', '-')}={v}" for k, v in {**SHORT, **more}.items()]


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(run_dir)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.fixture(params=SCRIPTS)
def module(request):
    """Each script in turn."""
    return MODULES[request.param]


@pytest.fixture
def trained(module, tmp_path, monkeypatch):
    """A short run of each script on the goal map: its folder."""
    monkeypatch.chdir(tmp_path)
    flags = short_flags(total_timesteps=400, eval_frequency=200, **QUICK.get(module, {}))
    args = module.parse_args(["--env-id", GOAL, *flags])
    return tmp_path / module.train(args)[0]


def test_every_script_is_tested():
    assert list(MODULES) == SCRIPTS


# Buffer and loop


@pytest.mark.parametrize("num_envs, capacity", [(1, 10_000), (3, 10_000), (3, 50)])
def test_no_transition_crosses_an_episode(tmp_path, monkeypatch, num_envs, capacity):
    """Time-outs keep the true last observation and d = 0, terminations d = 1, and a reset is never a next_obs."""
    monkeypatch.chdir(tmp_path)
    buffers = []

    class Spy(meow.ReplayBuffer):
        def __init__(self, *args):
            super().__init__(*args)
            buffers.append(self)

    monkeypatch.setattr(meow, "ReplayBuffer", Spy)
    flags = dict(SHORT, buffer_size=capacity, total_timesteps=240, num_envs=num_envs, eval_frequency=1000)
    meow.train(meow.Args(env_id="tasks:Counting-v0", **flags))
    (buffer,) = buffers
    assert buffer.size == min(240, capacity - capacity % num_envs)
    obs, _, rewards, next_obs, terminations = (field[: buffer.size].numpy() for field in buffer.fields(buffer.rows))
    assert (obs[:, 0] == next_obs[:, 0]).all()  # same episode
    assert (next_obs[:, 1] == obs[:, 1] + 1).all() and (rewards == next_obs[:, 1]).all()
    odd = obs[:, 0] % 2 == 1
    assert ((terminations == 1) == (odd & (next_obs[:, 1] == 3))).all()
    assert terminations.sum() > 0 and (terminations[next_obs[:, 1] == 5] == 0).all() and (next_obs[:, 1] == 5).any()


def test_buffer_samples_uniformly_what_it_holds():
    torch.manual_seed(0)
    buffer = meow.ReplayBuffer(10, 2, 1, 1, torch.device("cpu"))
    for i in range(0, 14, 2):  # wraps: the first four are overwritten
        obs = torch.tensor([[i], [i + 1.0]])
        buffer.add(torch.cat([obs, obs / 100, obs, obs + 1, torch.tensor([[0.0], [1.0]])], 1))
    batch = buffer.sample(20_000, torch.Generator().manual_seed(0))
    values, counts = batch.rewards.unique(return_counts=True)
    assert values.tolist() == list(range(4, 14))
    assert (counts - 2000).abs().max() < 5 * 2000**0.5
    assert torch.equal(batch.next_obs[:, 0], batch.rewards + 1)
    assert torch.equal(batch.terminations, batch.rewards % 2)


def test_buffer_states_and_checks_its_memory():
    humanoid = 4 * 1_000_000 * (2 * 376 + 17 + 2)
    assert f"{humanoid / 1e9:.1f} GB on Humanoid" in " ".join(meow.ReplayBuffer.__doc__.split())
    with pytest.raises(
        meow.UserError, match=r"--buffer-size 10{12} needs 3084000.00 GB, cpu has .* free; expected at most \d+"
    ):
        meow.ReplayBuffer(10**12, 1, 376, 17, torch.device("cpu"))


@pytest.mark.parametrize("utd, num_envs, updates", [(1, 1, 100), (0.5, 1, 50), (2, 1, 200), (1, 4, 100)])
def test_updates_per_step(tmp_path, monkeypatch, utd, num_envs, updates):
    monkeypatch.chdir(tmp_path)
    made, make_update = [], meow.make_update

    def counted(agents, args):
        update, learner = make_update(agents, args)
        return lambda *x, n: made.append((x[0].shape[1], n)) or update(*x, n=n), learner

    monkeypatch.setattr(meow, "make_update", counted)
    meow.train(meow.Args(env_id="tasks:Counting-v0", utd=utd, num_envs=num_envs, **SHORT, total_timesteps=200))
    assert made == [(32, n) for n in range(updates)]


def test_actions_reach_the_task_in_its_own_bounds():
    env = meow.make_env("tasks:Bounds-v0")
    env.reset()
    for action in (-np.ones(3), np.ones(3), np.zeros(3), np.array([0.5, -0.5, 1.0])):
        env.step(action.astype(np.float32))
    expected = [[-2, 0, 5], [1, 0.1, 6], [-0.5, 0.05, 5.5], [0.25, 0.025, 6]]
    np.testing.assert_allclose(env.unwrapped.actions, expected, atol=1e-6)


def test_same_seed_same_numbers_and_evaluation_leaves_training_alone(module, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    agents, curves = [], []
    for name, seed, eval_frequency in (("a", 1, 120), ("b", 1, 120), ("c", 1, 240), ("d", 2, 120)):
        flags = dict(seed=seed, eval_frequency=eval_frequency, exp_name=name, total_timesteps=240)
        flags = ["--env-id", GOAL, "--no-deterministic-eval", *short_flags(**flags, **QUICK.get(module, {}))]
        (folder,) = module.train(module.parse_args(flags))
        agents.append(torch.load(folder / "checkpoint.pt", weights_only=True)["agent"])
        curves.append(scalars(folder)["eval/episodic_return"])

    def equal(a, b):
        return all(torch.equal(x, y) for x, y in zip(a.values(), b.values(), strict=True))

    assert curves[0] == curves[1] and equal(agents[0], agents[1])
    assert equal(agents[0], agents[2]) and not equal(agents[0], agents[3])
    assert [step for step, _ in curves[0]] == [120, 240]


def test_evaluation_repeats_its_episodes():
    agent = meow.MEow(3, 1, meow.Args())
    envs = meow.make_envs("Pendulum-v1", 3)
    first, lengths = meow.evaluate(agent, envs, True, torch.device("cpu"))
    assert (first == meow.evaluate(agent, envs, True, torch.device("cpu"))[0]).all()
    assert len(set(first)) == 3 and (lengths == 200).all()
    env = gym.make("Pendulum-v1")  # the second episode by hand
    obs, _ = env.reset(seed=10_001)
    total, done = 0.0, False
    while not done:
        action = agent.sample(torch.as_tensor(obs)[None], deterministic=True)[0].detach().numpy()
        obs, reward, terminated, truncated, _ = env.step(2 * action)
        total, done = total + reward, terminated or truncated
    assert total == pytest.approx(first[1], rel=1e-4)


@pytest.mark.parametrize("script", SCRIPTS)
def test_loss_that_is_not_finite_stops_the_run(tmp_path, script):
    """A temperature that overflows: the first update that went wrong is named, the state is saved."""
    flags = short_flags(env_id=GOAL, alpha=1e30, num_envs=1, total_timesteps=1000, **QUICK.get(MODULES[script], {}))
    done = run(*flags, cwd=tmp_path, script=script)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = re.search(r"error: the loss is not finite: at step (\d+), qf_loss=(inf|nan).* is in (\S+)", done.stderr)
    assert message[1] in ("100", "101")
    assert 100 <= MODULES[script].load_checkpoint(tmp_path / message[3])["global_step"] <= 200  # the next log


def test_sac_learns_pendulum(tmp_path, monkeypatch):
    """-200 within 4,000 steps; about -1,200 is a policy that has learned nothing."""
    monkeypatch.chdir(tmp_path)
    flags = dict(total_timesteps=4_000, learning_starts=500, eval_frequency=1_000, buffer_size=4_000, device="cpu")
    flags |= dict(batch_size=256, eval_episodes=5)
    (folder,) = sac.train(sac.Args(env_id="Pendulum-v1", **flags))
    assert max(value for _, value in scalars(folder)["eval/episodic_return"]) > -200


# Presets, flags and bad input


PAPER = {  # alpha, tau, sigma_max, learning starts, steps: table of ../shared/ALGORITHMS.md, paper's appendix
    "Hopper": (0.25, 0.005, -0.3, 5_000, 1_500_000),
    "HalfCheetah": (0.25, 0.003, 2.0, 10_000, 1_500_000),
    "Walker2d": (0.1, 0.005, -0.3, 10_000, 4_000_000),
    "Ant": (0.05, 0.0001, -0.3, 5_000, 4_000_000),
    "Humanoid": (0.125, 0.0005, -0.3, 5_000, 5_000_000),
}


@pytest.mark.parametrize("task", PAPER)
@pytest.mark.parametrize("suffix", ["v4", "v5"])
def test_presets_are_the_papers_and_flags_win(task, suffix):
    args = meow.parse_args(["--env-id", f"{task}-{suffix}"])
    assert (args.alpha, args.tau, args.sigma_max, args.learning_starts, args.total_timesteps) == PAPER[task]
    shared = (args.learning_rate, args.max_grad_norm, args.gamma, args.batch_size, args.buffer_size, args.sigma_min)
    assert shared == (1e-3, 30, 0.99, 256, 1_000_000, -5)
    assert (args.dropout, args.utd, args.num_envs, args.eval_episodes, args.eval_frequency) == (0.1, 1, 1, 10, 10_000)
    args = meow.parse_args(["--env-id", f"{task}-{suffix}", "--alpha", "0.7", "--no-reward-shift"])
    assert (args.alpha, args.reward_shift, args.tau) == (0.7, False, PAPER[task][1])


CLEANRL = dict(policy_lr=3e-4, q_lr=1e-3, tau=0.005, policy_frequency=2, autotune=True, batch_size=256, gamma=0.99)
HAARNOJA = dict(learning_rate=3e-4, tau=0.005, value_samples=16, particles=16, batch_size=256, gamma=0.99)
MESSAOUD = dict(learning_rate=3e-4, tau=0.005, svgd_particles=10, variant="phi-theta", batch_size=100, gamma=0.99)
SCALE = {"Hopper": 30, "HalfCheetah": 30, "Walker2d": 10, "Ant": 300, "Humanoid": 100}  # of SQL's rewards


@pytest.mark.parametrize("task", PAPER)
@pytest.mark.parametrize("suffix", ["v4", "v5"])
def test_presets_of_the_others(task, suffix):
    env_id = ["--env-id", f"{task}-{suffix}"]
    alpha = 0.2 if task == "Ant" else 1.0  # of S2AC, whose step size is the paper's 0.1 times alpha
    stein = MESSAOUD | dict(alpha=alpha, svgd_step_size=pytest.approx(0.1 * alpha))
    for script, expected in ((s2ac, stein), (sac, CLEANRL), (sql, HAARNOJA | dict(alpha=1 / SCALE[task]))):
        args = script.parse_args(env_id)
        assert {name: getattr(args, name) for name in expected} == expected
        assert (args.learning_starts, args.total_timesteps, args.utd) == (5_000, PAPER[task][-1], 1)
        assert script.parse_args([*env_id, "--tau", "0.7"]).tau == 0.7


@pytest.mark.parametrize("map_id, alpha, gamma", [("multigoal:MultiGoal-v0", 2.5, 0.9), (GOAL, 10.0, 0.8)])
def test_presets_of_the_goal_maps_share_the_objective(module, map_id, alpha, gamma):
    args = module.parse_args(["--env-id", map_id])
    assert (args.alpha, args.gamma, args.total_timesteps) == (alpha, gamma, 16_000)
    assert not getattr(args, "autotune", False)


@pytest.mark.parametrize(
    "flags, message",
    [
        (dict(gamma=1.5), r"--gamma 1.5: expected in \[0, 1\]"),
        (dict(tau=-0.1), "--tau -0.1: expected"),
        (dict(alpha=0.0), "--alpha 0.0: expected above 0"),
        (dict(alpha=float("nan")), "--alpha nan: expected above 0"),
        (dict(num_envs=0), "--num-envs 0: expected above 0"),
        (dict(buffer_size=100), "--buffer-size 100: expected at least --batch-size"),
        (dict(learning_starts=1, num_envs=2), "--learning-starts 1: expected at least --num-envs"),
        (dict(seed=-1), "--seed -1: expected"),
        (dict(env_id="Hoper-v4"), "Hoper.* Did you mean: `Hopper`"),
        (dict(env_id="nowhere:Task-v0"), "No module named 'nowhere'"),
        (dict(env_id="tasks:Dict-v0"), "observations are Dict.* expected a Box of one dimension"),
        (dict(env_id="tasks:Image-v0"), "observations are Box.* no images"),
        (dict(env_id="tasks:Discrete-v0"), r"actions are Discrete\(3\); expected a Box"),
        (dict(env_id="tasks:Unbounded-v0"), "actions are Box.*expected finite bounds"),
    ],
)
def test_bad_input_is_refused_before_a_run_begins(module, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(module.UserError, match=message):
        module.train(module.Args(**flags))
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "script, flags, message",
    [
        (meow, dict(dropout=1.0), r"--dropout 1.0: expected in \[0, 1\)"),
        (meow, dict(sigma_min=1.0), "--sigma-min 1.0: expected .* sigma_min < sigma_max"),
        (meow, dict(max_grad_norm=-1.0), "--max-grad-norm -1.0: expected above 0"),
        (s2ac, dict(svgd_particles=1), "--svgd-particles 1: expected at least 2"),
        (s2ac, dict(svgd_steps=-1), "--svgd-steps -1: expected at least 0"),
        (s2ac, dict(svgd_step_size=0.0), "--svgd-step-size 0.0: expected above 0"),
        (s2ac, dict(initial_std=-1.0), "--initial-std -1.0: expected above 0"),
        (s2ac, dict(sigma_min=1.0), "--sigma-min 1.0: expected .* sigma_min < sigma_max"),
        (sac, dict(policy_frequency=0), "--policy-frequency 0: expected above 0"),
        (sac, dict(policy_lr=float("inf")), "--policy-lr inf: expected above 0"),
        (sql, dict(particles=0), "--particles 0: expected above 0"),
        (sql, dict(value_samples=-1), "--value-samples -1: expected above 0"),
    ],
)
def test_bad_values_of_own_flags(script, flags, message):
    with pytest.raises(script.UserError, match=message):
        script.check_args(script.Args(**flags))


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_missing_gpu(module):
    with pytest.raises(module.UserError, match="--device cuda: expected cpu: torch sees no CUDA device"):
        module.check_args(module.Args(device="cuda"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_user_errors_are_one_line_and_exit_code_2(tmp_path, script):
    (tmp_path / "bad.pt").write_bytes(b"not a checkpoint")
    torch.save({"algorithm": "other_script"}, tmp_path / "other.pt")
    for flags, message in (
        (["--env-id", "Hoper-v4"], "error: --env-id Hoper-v4: Environment `Hoper` doesn't exist"),
        (["--evaluate", "bad.pt"], "error: bad.pt is not a readable checkpoint"),
        (["--evaluate", "other.pt"], "error: other.pt was written by other_script.py"),
        (["--evaluate", "absent.pt"], "error: absent.pt: no such checkpoint"),
    ):
        done = run(*flags, cwd=tmp_path, script=script)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.strip().splitlines()[-1].startswith(message)


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_shows_the_preset_of_the_task(tmp_path, script):
    done = cold("--env-id", "Ant-v4", "--help", cwd=tmp_path, script=script)
    assert done.returncode == 0 and "--total-timesteps" in done.stdout
    assert "4000000" in done.stdout  # Ant's preset, not the default


def test_dm_control_without_shimmy(monkeypatch):
    monkeypatch.setitem(sys.modules, "shimmy", None)
    with pytest.raises(
        meow.UserError, match=r"dm_control/cartpole-balance-v0.* pip install 'shimmy\[dm-control\]' 'mujoco<4'"
    ):
        meow.make_env("dm_control/cartpole-balance-v0")


def test_dm_control_with_shimmy(tmp_path, monkeypatch):
    pytest.importorskip("shimmy")
    pytest.importorskip("dm_control")
    if int(version("mujoco").split(".")[0]) >= 4:
        pytest.skip("dm_control does not know mujoco 4")
    monkeypatch.chdir(tmp_path)
    flags = dict(SHORT, total_timesteps=200)
    (folder,) = meow.train(meow.Args(env_id="dm_control/cartpole-balance-v0", **flags))
    assert (folder / "best.pt").exists()


# Logs and files


LOSSES = {"qf_loss", "qf1_loss", "qf2_loss", "q1", "q2", "target", "grad_norm"}
OWN_METRICS = {
    meow: {"policy/entropy", "policy/log_sigma"},
    s2ac: {"policy/entropy", "policy/log_sigma", "policy/action_std", "losses/actor_loss", "losses/stein_norm"},
    sac: {"policy/entropy", "policy/log_sigma", "policy/alpha", "losses/actor_loss", "losses/alpha_loss"},
    sql: {"policy/action_std", "losses/stein_norm"},
}


def test_logs(module, trained):
    """Every metric is there, at the right steps, and documented in docs/running.md; so is every flag."""
    logged = scalars(trained)
    charts = {"charts/episodic_return", "charts/episodic_length", "charts/SPS"}
    others = {"eval/episodic_return", "eval/episodic_length"}
    assert set(logged) == {"losses/" + name for name in LOSSES} | charts | others | OWN_METRICS[module]
    assert [step for step, _ in logged["eval/episodic_return"]] == [200, 400]
    assert [step for step, _ in logged["losses/qf_loss"]] == [200, 304, 400]
    page = (ROOT / "docs" / "running.md").read_text()
    assert not [tag for tag in logged if f"`{tag}`" not in page]
    assert not [f for f in module.Args.__dataclass_fields__ if f"`--{f.replace('_', '-')}" not in page]
    written = json.loads((trained / "args.json").read_text())
    assert written["args"]["alpha"] == 10 and written["args"]["total_timesteps"] == 400
    assert written["versions"]["torch"] == torch.__version__


def test_two_runs_of_a_name_in_one_second(module, tmp_path, monkeypatch):
    """As from a shell loop over a flag: each has a folder of its own, the second that of the next second."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(module.time, "time", lambda: 1000.9)
    first, second = (module.start_run(module.Args(tau=tau), None) for tau in (0.01, 0.02))
    assert [run_dir.name.rpartition("__")[2] for run_dir, _, _ in (first, second)] == ["1000", "1001"]
    for (run_dir, writer, _), tau in ((first, 0.01), (second, 0.02)):
        writer.close()
        assert json.loads((run_dir / "args.json").read_text())["args"]["tau"] == tau


def test_readme_names_the_lines_of_the_equations():
    """Rows `| (k) | equation | Class.method, line N |` of the README point at that definition."""
    lines = (ROOT / "meow_continuous_action.py").read_text().splitlines()
    rows = re.findall(r"^\| \((\d)\) .*\| `([\w.]+)`, line (\d+) \|$", (ROOT / "README.md").read_text(), re.M)
    assert [row[0] for row in rows] == list("123456")
    for _, name, line in rows:
        assert f"def {name.split('.')[-1]}(" in lines[int(line) - 1]


def test_links_of_the_pages_lead_somewhere():
    """Each relative link of README.md and docs/ to a file that is there and, after a #, to a heading of it."""
    pages = {ROOT / "README.md", *(ROOT / "docs").glob("*.md")}
    pages -= {ROOT / "docs" / "bad-inputs.md"}  # it quotes messages
    assert len(pages) > 5
    for page in sorted(pages):
        for path, anchor in re.findall(r"\]\((?!https?:)([^)#]*)#?([^)]*)\)", page.read_text()):
            target = page.parent / path if path else page
            assert target.is_file(), (page, path)
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.M) if anchor else []
            slugs = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
            assert not anchor or anchor in slugs, (page, anchor)


def test_evaluate_replays_a_checkpoint(module, trained):
    """Returns printed by --evaluate are the ones logged; flags change what is replayed."""
    expected = scalars(trained)["eval/episodic_return"][-1][1]
    cwd, script = trained.parent.parent, module.__name__ + ".py"
    done = run("--evaluate", trained / "checkpoint.pt", cwd=cwd, script=script)
    assert done.returncode == 0, done.stderr
    assert len(re.findall(r"episode \d: return", done.stdout)) == 2
    assert float(re.search(r"2 episodes: return (\S+)", done.stdout)[1]) == pytest.approx(expected, abs=0.01)
    sampled = run(
        "--evaluate", trained / "checkpoint.pt", "--no-deterministic-eval", "--eval-episodes", 3, cwd=cwd, script=script
    )
    assert "3 episodes" in sampled.stdout
    wrong = run("--evaluate", trained / "checkpoint.pt", "--env-id", "Pendulum-v1", cwd=cwd, script=script)
    assert wrong.returncode == 2 and "(O, D) = (2, 2), Pendulum-v1 has (3, 1)" in wrong.stderr


def test_flags_that_do_not_fit_the_checkpoint(tmp_path):
    flags = short_flags(env_id="Pendulum-v1", total_timesteps=120)
    assert run(*flags, cwd=tmp_path).returncode == 0
    (checkpoint,) = tmp_path.glob("runs/*/checkpoint.pt")
    affine = run("--evaluate", checkpoint, "--coupling", "affine", cwd=tmp_path)
    assert affine.returncode == 2 and "does not fit" in affine.stderr and "Traceback" not in affine.stderr


ABLATIONS = [("meow", "--no-reward-shift"), ("meow", "--no-clipped-double-q"), ("meow", "--coupling=affine")]
ABLATIONS += [("meow", "--dropout=0.5"), ("sac", "--reward-shift"), ("sac", "--no-autotune"), ("sac", "--utd=0.5")]
ABLATIONS += [("s2ac", "--variant=phi"), ("s2ac", "--variant=phi-theta-psi"), ("s2ac", "--svgd-steps=0")]
ABLATIONS += [("sql", "--particles=4"), ("sql", "--value-samples=50")]


@pytest.mark.parametrize("algorithm, flag", ABLATIONS)
def test_ablations_train_and_replay(tmp_path, algorithm, flag):
    script = f"{algorithm}_continuous_action.py"
    few = dict(svgd_particles=2) if algorithm == "s2ac" else {}
    done = run(flag, *short_flags(env_id="Pendulum-v1", total_timesteps=110, **few), cwd=tmp_path, script=script)
    assert done.returncode == 0, done.stderr
    (checkpoint,) = tmp_path.glob("runs/*/checkpoint.pt")
    assert run("--evaluate", checkpoint, cwd=tmp_path, script=script).returncode == 0


def test_crafted_checkpoint_executes_nothing(tmp_path):
    class Crafted:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path}/executed",)

    torch.save({"algorithm": "meow_continuous_action", "agent": Crafted()}, tmp_path / "crafted.pt")
    with pytest.raises(meow.UserError, match="not a readable checkpoint"):
        meow.load_checkpoint(tmp_path / "crafted.pt")
    assert not (tmp_path / "executed").exists()


def test_wandb_offline(tmp_path):
    flags = short_flags(env_id="Pendulum-v1", total_timesteps=300)
    done = cold("--track", *flags, cwd=tmp_path, WANDB_MODE="offline", WANDB_SILENT="true")
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    content = log.read_bytes()
    assert b"losses/qf_loss" in content and b"eval/episodic_return" in content and b"total_timesteps" in content


def test_video(tmp_path):
    """An mp4 of whole episodes where the task can draw; a line that says what to install where it cannot."""
    flags = short_flags(env_id=GOAL, total_timesteps=200)
    done = run("--capture-video", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (before, after) = sorted(tmp_path.glob("runs/*/videos/*.mp4"))
    assert imageio.imread(before).shape[1:] == (280, 280, 3) and len(imageio.imread(after)) > 1
    failed = run("--capture-video", "--env-id", "tasks:NoScreen-v0", cwd=tmp_path)
    assert failed.returncode == 2 and "Traceback" not in failed.stderr
    assert "tasks:NoScreen-v0 cannot draw here (no GL context)" in failed.stderr
    assert "apt-get install libegl1" in failed.stderr
