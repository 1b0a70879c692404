"""What makes the scripts fast and must not change what they compute: flat parameters, compiled code, CUDA graphs."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from lives import MODULES, SCRIPTS, flags

SAC = "sac_continuous_action.py"
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
each_script = pytest.mark.parametrize("script", SCRIPTS)


@pytest.fixture
def learner(tmp_path):
    """learner(script, ...): an agent with O = 6, D = 2, its buffer of random transitions, its update and the rest."""
    before = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()

    def make(script: str, dtype: torch.dtype = torch.float32, transitions: int = 200, **more):
        module = MODULES[script]
        torch.set_default_dtype(dtype)
        torch.compiler.reset()
        torch.manual_seed(0)
        args = module.parse_args(flags(script, **more))
        buffer = module.ReplayBuffer(tmp_path / "buffer.bin", transitions, 6, 2, args.device)
        _, actions, _, _, terminations = buffer.rows.normal_().split(buffer.widths, -1)
        actions.tanh_(), terminations.copy_(terminations > 1), buffer.size.fill_(transitions)
        agent = module.Agent(6, 2, args).to(args.device)
        return agent, buffer, args, *module.make_update(agent, buffer, args)

    yield make
    torch.set_default_dtype(before[0])
    torch.use_deterministic_algorithms(before[1])


def numbers_of(agent, metrics: torch.Tensor, parts: dict) -> list[torch.Tensor]:
    """All that an update changes."""
    states = [agent.state_dict(), *(part.state_dict() for part in parts.values())]
    return [metrics.clone(), *(x.clone() for x in tree_leaves(states) if isinstance(x, torch.Tensor))]


@each_script
def test_parameters_begin_at_multiples_of_16_bytes_and_keep_their_values(learner, script):
    module = MODULES[script]
    agent, _, args, *_ = learner(script)
    assert all(p.data_ptr() % 16 == 0 for p in agent.parameters() if p.dim())
    net = module.Agent(6, 2, args)
    before = {name: p.clone() for name, p in net.named_parameters()}
    flat = module.flatten(net)
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert all(torch.equal(x, before[name]) for name, x in module.unflatten(flat, net).items())
    flat.fill_(2.0)
    assert all((p == 2).all() for p in net.parameters()) and flat.numel() % 4 == 0


@each_script
def test_optimizers_saved_on_a_cpu_can_be_recorded_on_a_gpu(learner, script):
    """load_state_dict takes the flag from the file, and a CUDA graph needs it."""
    *_, parts = learner(script)
    groups = [group for part in parts.values() for group in part.state_dict().get("param_groups", ())]
    assert groups and all(group["capturable"] for group in groups)


@each_script
def test_every_update_draws_fresh_noise(learner, script):
    """On one transition, so that the batch is always the same: only the noise differs."""
    ends = []
    for seed in (1, 1, 2):
        agent, _, _, update, _, _ = learner(script, transitions=1)
        torch.manual_seed(seed)
        update(), update()
        ends.append(torch.nn.utils.parameters_to_vector(agent.parameters()).detach().clone())
    assert torch.equal(ends[0], ends[1])
    if script != "meow_mixture_continuous_action.py":  # which draws none
        assert not torch.equal(ends[0], ends[2])


@pytest.mark.parametrize("name", ["meow", "meow_plus", "sac", "sql"])
def test_compiled_is_eager(learner, name):
    """Parameters, targets, Adam's moments and metrics after 20 updates, and the deterministic actions."""
    ends = []
    for compile in ("on", "off"):
        script = f"{name}_continuous_action.py"
        own = dict(dropout=0.1) if "meow" in name else {}
        agent, _, args, update, metrics, parts = learner(script, torch.float64, compile=compile, **own)
        torch.manual_seed(1)
        for _ in range(20):
            update()
        ends.append(numbers_of(agent, metrics, parts))
    assert len(ends[0]) > 30
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


def test_compiled_actions(learner):
    """They are drawn anew every time, as eager ones are, and follow the parameters."""
    agent, _, args, *_ = learner(SAC, compile="on")
    sample, obs = MODULES[SAC].compiled(args)(agent.sample), torch.ones(10_000, 6)
    with torch.no_grad():
        for scale in (1.0, 1.3):
            for p in agent.parameters():
                p.mul_(scale)
            first, second, eager = (x.atanh() for x in (sample(obs), sample(obs), agent.sample(obs)))
            assert len(torch.cat([first, second]).unique(dim=0)) > 19_900
            assert ((first.mean(0) - eager.mean(0)).abs() < 0.07 * eager.std(0)).all()  # five standard errors
            assert ((first.std(0) / eager.std(0) - 1).abs() < 0.05).all()


def test_second_run_of_a_process_has_its_own_flags(tmp_path, monkeypatch):
    """What torch.compile keeps of the first has its discount in it. Traced only, by the backend "eager"."""
    monkeypatch.chdir(tmp_path)
    real, module, ends = torch.compile, MODULES[SAC], []

    def traced(function=None, **options):
        options = dict(options=dict(guard_filter_fn=options["options"]["guard_filter_fn"]), fullgraph=True)
        return real(function, backend="eager", **options)

    monkeypatch.setattr(torch, "compile", traced)
    for gamma, compile in ((0.9, "on"), (0.0, "on"), (0.0, "off")):
        run = module.train(module.parse_args(flags(SAC, gamma=gamma, compile=compile, total_timesteps=130, utd=0.2)))
        agent, _ = module.load_agent(run / "checkpoint.pt")
        ends.append(torch.nn.utils.parameters_to_vector(agent.parameters()).detach())
    assert not torch.allclose(ends[0], ends[1], atol=1e-4)
    torch.testing.assert_close(ends[1], ends[2], rtol=1e-4, atol=1e-5)


# On a GPU


@gpu
@each_script
def test_recorded_updates_are_eager_ones(learner, script, monkeypatch):
    """50 updates with CUDA graphs and without, of the same random numbers, without dropout."""
    torch.use_deterministic_algorithms(True)  # as the scripts do: not every operation is allowed then
    ends, own = [], dict(dropout=0.0) if hasattr(MODULES[script].Args, "dropout") else {}
    for recorded in (True, False):
        if not recorded:
            monkeypatch.setattr(MODULES[script], "recorded", lambda args: lambda function: function)
        agent, _, _, update, metrics, parts = learner(script, device="cuda", **own)
        torch.manual_seed(1)
        for _ in range(50):
            update()
        ends.append(numbers_of(agent, metrics, parts))
    for x, y in zip(*ends, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


@gpu
@each_script
@pytest.mark.parametrize("compile", ["on", "off"])
def test_replays_draw_fresh_numbers(learner, script, compile):
    """Of the batch and the noise of an update, and of an action."""
    agent, _, args, update, metrics, _ = learner(script, device="cuda", compile=compile)
    obs, actions, seen = torch.zeros(1, 6, device="cuda"), torch.zeros(1, 2, device="cuda"), []
    sample = MODULES[script].compiled(args)(agent.sample)
    act = MODULES[script].recorded(args)(torch.no_grad()(lambda: actions.copy_(sample(obs))))
    for _ in range(20):
        update(), act()
        seen.append((*metrics.tolist(), *actions[0].tolist()))
    assert len({row[:-2] for row in seen}) == len({row[-2:] for row in seen}) == 20
    assert torch.tensor(seen).isfinite().all()
