"""Schedules, terms of the loss and how rollouts go on, against closed forms and PyTorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from dreamenv.config import from_dict
from dreamenv.errors import ConfigError
from dreamenv.flow import SamplerConfig, sample
from dreamenv.models.interface import State
from dreamenv.models.io import load_model
from tests.here import brief
from tests.trainers.common import dynamics_task, settings
from trainers.loop import LoopConfig, learning_rate, momentum
from trainers.objectives import OBJECTIVES, ObjectivesConfig, run_objectives
from trainers.rollout import RolloutConfig, Rollouts
from trainers.tasks.dynamics import DynamicsTask, DynamicsTaskConfig
from trainers.terms.flow import flow_weights
from trainers.train import override, train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_objectives_are_compared_by_one_command(
    tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainers.table.HORIZONS", (1, 5, 10))
    small = (
        "loop.batch_size=4",
        "dynamics:model.backbone.channels=[16, 16, 16]",
        "task.val_ratio=0.2",
        *brief("flow_unet"),
    )
    config = ObjectivesConfig(
        steps=3000,
        objectives=("squared, teacher forcing", "flow, velocity"),
        out=tmp_path / "o",
        clips=4,
        samples=2,
        seconds=0.1,
        stage_steps=2,
        set=small,
    )
    rows = run_objectives(config)
    assert list(rows) == list(config.objectives) and {row["trained_steps"] for row in rows.values()} == {2}
    assert rows["flow, velocity"]["best_psnr_10"] > rows["flow, velocity"]["average_psnr_10"]
    assert "| flow, velocity | 2 |" in (tmp_path / "o" / "table.md").read_text()
    for name in OBJECTIVES:
        ObjectivesConfig(objectives=(name,))
    with pytest.raises(ConfigError, match="did you mean 'squared'"):
        ObjectivesConfig(objectives=("square",))
    with pytest.raises(ConfigError, match="no stage 'flow', only codec, dynamics, head"):
        ObjectivesConfig(set=("flow:loop.batch_size=4",))


def test_one_cycle_is_pytorchs() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.Adam([parameter], lr=0.1)
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.02, total_steps=1001)
    config = LoopConfig(steps=1000, lr=0.02, schedule="one_cycle")
    for step in range(1000):
        if abs(step / 1000 - 0.3) > 0.005:  # theirs turns a step earlier
            group = optimizer.param_groups[0]
            assert learning_rate(config, step / 1000) == pytest.approx(group["lr"], rel=0.01, abs=1e-7), step
            assert momentum(config, step / 1000) == pytest.approx(group["betas"][0], abs=1e-3)
        optimizer.step()
        theirs.step()


TERMS: dict[str, dict[str, Any]] = {
    "huber": {"delta": 0.5},
    "perceptual": {"weight": 1.0, "samples": 2},
    "inverse": {"weight": 1.0, "width": 16},
    "pixel_adversarial": {"weight": 1.0, "width": 8},
    "flow": {"times": "logit_normal", "power": 2.0, "sigma_min": 0.01},
}


@pytest.mark.parametrize("name", TERMS)
def test_a_term_trains_the_dynamics(name: str, latents: Path, tmp_path: Path, precision: str) -> None:
    values = settings(latents, {"squared": {}, name: TERMS[name]})
    figures = train(values, tmp_path / "run")
    assert np.isfinite(list(figures.values())).all()
    task = dynamics_task(latents, {name: TERMS[name]}, unroll=2)
    batch = task.batch(np.random.default_rng(0), 4)
    nn.init.normal_(task.model.out.weight, std=0.05)  # type: ignore[union-attr, arg-type]
    loss, metrics = task.loss(task.model, batch.to(torch.device("cpu")), torch.Generator().manual_seed(0), 0.5)
    loss.backward()
    grads = [p.grad for p in task.model.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in grads) > 0 and all(torch.isfinite(g).all() for g in grads)
    assert metrics and torch.isfinite(loss)


class _Calls(TorchDispatchMode):
    """Remembers the names of the operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        masks = "index" in func.__name__ and any(i is not None and i.dtype == torch.bool for i in args[1])
        self.names.add("mask" if masks else func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_what_a_cuda_graph_cannot_record_is_seen() -> None:
    with _Calls() as calls:
        torch.ones(3)[torch.tensor([0.0, 1.0, float(torch.ones(()))]) > 0]
    assert calls.names >= {"lift_fresh", "_local_scalar_dense", "mask"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_step_of_an_objective_can_be_a_cuda_graph(name: str, latents: Path) -> None:
    """It brings no tensor from the host and asks the device for no value, or it says so."""
    values = override(settings(latents), OBJECTIVES[name])
    task = DynamicsTask(
        from_dict(DynamicsTaskConfig, {k: v for k, v in values["task"].items() if k != "type"}), values["model"], 0
    )
    batch = task.batch(np.random.default_rng(0), 4).to(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    with _Calls() as calls:
        task.loss(task.model, batch, generator, 0.5)[0].backward()
    found = calls.names & {"lift_fresh", "_local_scalar_dense", "nonzero", "masked_select", "unique", "mask"}
    assert not found or task.graph_key(0.5) is None


def test_a_huber_error_is_pytorchs(latents: Path) -> None:
    task = dynamics_task(latents, {"huber": {"delta": 0.3}}, importance=0.0, drop_actions=0.0)
    batch = task.batch(np.random.default_rng(0), 4).to(torch.device("cpu"))
    nn.init.normal_(task.model.out.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    _, metrics = task.loss(task.model, batch, torch.Generator().manual_seed(0), 0.0)
    how = RolloutConfig(1, 0.3, 0.0, 0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    rollouts = Rollouts(task.model, task.model, task.codec, task.channels, batch, how, None, generator)
    step = rollouts.mean.steps[0]
    expected = 2 * nn.HuberLoss(reduction="none", delta=0.3)(step.prediction.latent, step.target)
    expected = ((expected * task.channels).mean(1) * step.live).mean()
    assert float(metrics["weighted_1"]) == pytest.approx(float(expected.detach()), rel=1e-4)


def test_the_inverse_network_never_bends_the_dynamics_by_its_own_loss(latents: Path) -> None:
    task = dynamics_task(latents, {"inverse": {"weight": 0.0, "width": 16}}, unroll=2)
    nn.init.normal_(task.model.out.weight, std=0.05)  # type: ignore[union-attr, arg-type]
    batch = task.batch(np.random.default_rng(0), 4).to(torch.device("cpu"))
    loss, _ = task.loss(task.model, batch, torch.Generator().manual_seed(0), 0.5)
    loss.backward()
    assert all(p.grad is None or not p.grad.any() for p in task.model.parameters())
    told = dict(task.terms["inverse"].named_parameters())
    assert all(told[name].grad is not None and told[name].grad.any() for name in ("stem.weight", "out.weight"))  # type: ignore[union-attr]


@pytest.mark.parametrize(("own", "expected"), [((1.0, 1.0), 1.0), ((0.0, 0.0), 0.0), ((0.0, 1.0), 0.5)])
def test_steps_go_on_from_the_truth_as_often_as_asked(
    own: tuple[float, float], expected: float, latents: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = dynamics_task(latents, {"squared": {}}, unroll=4, own_inputs=own, pad=0.0)
    nn.init.normal_(task.model.out.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    batch = task.batch(np.random.default_rng(0), 64).to(torch.device("cpu"))
    how = RolloutConfig(4, 0.0, 0.0, 0.0, own[0] + 0.5 * (own[1] - own[0]))
    generator = torch.Generator().manual_seed(0)
    rollouts = Rollouts(task.model, task.model, task.codec, task.channels, batch, how, None, generator)
    k = task.context
    seen = torch.stack([step.state.latents[:, -1] for step in rollouts.mean.steps[1:]], 1)
    true = (seen == batch.latents[:, k : k + 3]).flatten(2).all(2).float()
    assert 1 - float(true.mean()) == pytest.approx(expected, abs=0.12)
    assert not (rollouts.mean.trail[:, k:] == batch.latents[:, k:]).flatten(2).all(2).any(), "terms see predictions"
    asked: list[float] = []
    monkeypatch.setattr(
        "trainers.tasks.dynamics.RolloutConfig", lambda *values: asked.append(values[-1]) or RolloutConfig(*values)
    )
    task.loss(task.model, batch, torch.Generator().manual_seed(0), 0.5)
    assert asked == [how.own], "the task says so too"
    assert (task.graph_key(0.5) is None) == (own[0] != own[1])


def test_an_oracle_of_straight_paths_is_a_perfect_shortcut(latents: Path) -> None:
    """Where noise and clean latent are joined by a straight line and the clean one is known, long steps are right."""
    flow = {"type": "latent_flow", "shortcut": 4, "filter_bank": 0, "embedding": 32}
    flow["backbone"] = {"type": "unet", "channels": [16, 32], "blocks": [1, 1]}
    from trainers.tasks.dynamics import DynamicsTask, DynamicsTaskConfig

    terms = {"shortcut": {"share": 1.0}, "flow": {}}
    task = DynamicsTask(
        DynamicsTaskConfig(latents=str(latents), terms=terms, val_ratio=0.2, context_noise=0.0), flow, 0
    )
    batch = task.batch(np.random.default_rng(0), 4).to(torch.device("cpu"))

    class Clean(nn.Module):
        def forward(self, state: State, action: torch.Tensor, **told: Any) -> Any:
            found = task.model.predict(state, action, **told)
            target = batch.latents[:, task.context]
            return type(found)(target + 0 * found.latent, found.log_error)

    _, metrics = task.loss(Clean(), batch, torch.Generator().manual_seed(0), 0.5)
    assert float(metrics["shortcut"]) < 1e-8 and float(metrics["flow"]) < 1e-8
    _, metrics = task.loss(task.model, batch, torch.Generator().manual_seed(0), 0.5)
    assert float(metrics["flow"]) > 1e-3
    with pytest.raises(ConfigError, match="model.shortcut"):
        dynamics_task(latents, {"shortcut": {}})


def test_reflow_follows_its_teacher(latents: Path, tmp_path: Path) -> None:
    train(settings(latents, {"squared": {}, "flow": {}}), tmp_path / "teacher")
    teacher = str(tmp_path / "teacher" / "model")
    terms = {"squared": {}, "reflow": {"teacher": teacher, "nfe": 2, "share": 0.5}}
    train(settings(latents, terms), tmp_path / "run")
    assert ",reflow," in (tmp_path / "run" / "metrics.csv").read_text()
    with pytest.raises(ConfigError, match="reflow.teacher"):
        dynamics_task(latents, {"reflow": {"teacher": str(tmp_path)}})
    task = dynamics_task(latents, {"reflow": {"teacher": teacher, "nfe": 2, "share": 1.0}}, drop_actions=0.0)
    batch = task.batch(np.random.default_rng(0), 4).to(torch.device("cpu"))
    model, _ = load_model(teacher, "dynamics")
    asked: list[tuple[Any, ...]] = []

    class Student(nn.Module):
        """Remembers what it is shown, and says what the teacher makes of that noise by the same two evaluations."""

        def forward(self, state: State, action: torch.Tensor, **told: Any) -> Any:
            asked.append((action, told))
            return task.model.predict(state, action, **told)

    task.loss(Student(), batch, torch.Generator().manual_seed(0), 0.5)
    action, told = asked[-1]
    k = task.context
    state = model.begin(batch.latents[:, :k], batch.actions[:, : k - 1])  # type: ignore[operator]
    tau = told["tau"][:, None, None, None]
    generator = torch.Generator().manual_seed(0)
    for shape in ((4,), (4,), (4, k, 8, 16, 16)):  # hidden actions, levels, the context's noise
        (torch.rand if len(shape) == 1 else torch.randn)(shape, generator=generator)
    noise = torch.randn((4, 8, 16, 16), generator=generator)
    clean = sample(model, state, action, noise, SamplerConfig(nfe=2)).latent  # type: ignore[arg-type]
    assert torch.allclose(told["x"], (1 - tau) * noise + tau * clean, atol=1e-5), "on the line of the teacher's pair"


def test_weights_of_the_path() -> None:
    tau = torch.tensor([0.0, 0.5, 0.9, 1.0])
    assert flow_weights(tau, 1.0, 5.0).tolist() == pytest.approx([1, 2, 5, 5])
    assert flow_weights(tau, 2.0, 1e9)[:3].tolist() == pytest.approx([1, 4, 100], rel=1e-4)
    assert flow_weights(tau, 0.0, 5.0).tolist() == [1, 1, 1, 1]
