"""The adversarial stage, the energy score, the certainty weights, and the heads and the dreams that learn from one
another."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from dreamenv.errors import CheckpointError, ConfigError
from dreamenv.flow import SamplerConfig, sample
from dreamenv.models.dynamics.flow import LatentFlow, LatentFlowConfig
from dreamenv.models.interface import LatentSpec, Prediction, State
from dreamenv.models.io import load_model
from tests.conftest import predicted
from tests.trainers.common import ADVERSARIAL, FLOW, Oracle, dynamics_task, settings
from trainers.loop import Loop
from trainers.rollout import RolloutConfig, Rollouts
from trainers.tasks.dynamics import DynamicsTask, DynamicsTaskConfig
from trainers.tasks.outcome import OutcomeTaskConfig
from trainers.terms.adversarial import Critic, fool, judge
from trainers.terms.energy import energy_score
from trainers.terms.squared import error_estimate_score
from trainers.train import train

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def test_neither_side_of_the_game_trains_the_other() -> None:
    torch.manual_seed(0)
    critic = Critic(4, 16)
    real, dreamt = torch.randn(6, 3, 4, 8, 8), torch.randn(6, 3, 4, 8, 8, requires_grad=True)
    actions = torch.arange(6)
    fool(critic, dreamt, actions).backward()
    assert dreamt.grad is not None and dreamt.grad.abs().sum() > 0
    assert all(p.grad is None for p in critic.parameters()) and all(p.requires_grad for p in critic.parameters())
    dreamt.grad = None
    judge(critic, real, dreamt, actions)[0].backward()
    assert dreamt.grad is None and all(p.grad is not None for p in critic.parameters())


def test_a_critic_learns_to_tell_fog_from_frames() -> None:
    torch.manual_seed(0)
    critic = Critic(4, 16)
    optimizer = torch.optim.Adam(critic.parameters(), 2e-3, betas=(0.5, 0.99))
    actions = torch.zeros(16, dtype=torch.int64)

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        real = torch.randn(16, 3, 4, 8, 8).sign()
        return real, nn.functional.avg_pool2d(real.flatten(0, 1), 3, 1, 1).unflatten(0, (16, 3))

    for _ in range(60):
        loss, _ = judge(critic, *batch(), actions)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    real, fog = batch()
    assert judge(critic, real, fog, actions)[1] > 0.9 and fool(critic, fog, actions) > fool(critic, real, actions)


ENERGY = {"flow": {"weight": 0.3}, "squared": {"certainty": 0.5}, "energy": {"weight": 0.5}}


PLAIN = {"flow": {"weight": 0.3}, "squared": {"certainty": 0.5}}


def test_the_energy_score_of_two_draws_is_its_closed_form_and_favours_the_truth() -> None:
    """Of a fair coin's +-1, spread over a whole patch, the mean scores 1 and the coin itself 1 - 1/2."""

    def score(first: torch.Tensor, second: torch.Tensor, target: torch.Tensor) -> float:
        maps = [x[:, None, None, None].expand(-1, 3, 8, 8) for x in (first, second, target)]
        return float(energy_score(*maps, torch.ones(3, 1, 1), torch.ones(len(target), 8, 8))[0])

    one = torch.ones(1)
    assert score(3 * one, -1 * one, 1 * one) == pytest.approx((2 + 2 - 4) / 2, abs=0.01)
    assert score(3 * one, 2 * one, 0 * one) == pytest.approx((3 + 2 - 1) / 2, abs=0.01)
    coins = torch.randn(3, 20000, generator=torch.Generator().manual_seed(0)).sign()
    assert score(*(0 * coins[:2]), coins[2]) == pytest.approx(1, abs=0.01)
    assert score(*coins) == pytest.approx(0.5, abs=0.03)
    assert score(coins[0], coins[0], coins[2]) == pytest.approx(1, abs=0.03), "two draws that are one are no ensemble"
    first, second, target = torch.randn(3, 2, 4, 8, 8)
    none = energy_score(first, second, target, torch.ones(4, 1, 1), torch.zeros(2, 8, 8))
    assert float(none[0]) == 0 and float(none[1]) > 0, "cells without weight score nothing"


def test_an_error_estimate_is_best_at_the_mean_error_and_no_cell_outweighs_all() -> None:
    errors = torch.tensor([0.0] * 90 + [0.5] * 9 + [3.0])
    candidates = torch.linspace(-7, 3, 2001)
    scores = torch.stack([error_estimate_score(c.expand(100), errors).mean() for c in candidates])
    assert float(candidates[scores.argmin()]) == pytest.approx(float(errors.mean().log()), abs=0.05)
    estimates = torch.linspace(-30, 3, 3301, requires_grad=True)
    error_estimate_score(estimates, torch.full((3301,), 3.0)).sum().backward()
    assert estimates.grad is not None and float(estimates.grad.abs().max()) < 50, (
        "a likelihood's slope at -10 is 3 e^10"
    )


@pytest.mark.parametrize(
    ("terms", "optimizer"),
    [(ADVERSARIAL, "adamw"), (ENERGY, "adamw"), (ADVERSARIAL, "muon")],
    ids=["adversarial", "energy", "muon"],
)
def test_a_sharpening_run_resumes_to_the_same_bytes(
    terms: dict[str, Any], optimizer: str, latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = settings(latents, terms)
    values["loop"] |= {"optimizer": optimizer}
    figures = train(values, tmp_path / "whole")
    assert {"psnr_10", "sampled_psnr_10", "sampled_detail_10"} <= set(figures)
    update = Loop.update

    def killed(self: Loop, *drawn: Any) -> Any:
        if self.step == 5:
            raise KeyboardInterrupt
        return update(self, *drawn)

    monkeypatch.setattr(Loop, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        train(values, tmp_path / "killed")
    monkeypatch.undo()
    train(values, tmp_path / "killed", resume=True)
    own = ["checkpoint/auxiliary"] if "adversarial" in terms else []
    parts = ["checkpoint/optimizer", "model/model", *own]
    for name in (f"{part}.safetensors" for part in parts):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    kept = (tmp_path / "whole" / "checkpoint" / "optimizer.safetensors").read_bytes()
    assert (b"momentum_buffer" in kept) == (optimizer == "muon") and b"exp_avg_sq" in kept
    victim = own[0] if own else "checkpoint/optimizer"
    (tmp_path / "killed" / f"{victim}.safetensors").unlink()
    shutil.rmtree(tmp_path / "killed" / "checkpoint-before")
    with pytest.raises(CheckpointError, match=victim.split("/")[1]):
        train(values, tmp_path / "killed", resume=True)


def test_two_draws_of_one_sample_part_and_both_are_trained(latents: Path) -> None:
    """The energy score reaches every weight that a second evaluation uses, and only the rows set aside for it."""
    task = dynamics_task(latents, {"squared": {}, "energy": {"weight": 1.0}}, unroll=2)
    nn.init.normal_(task.model.out.weight, std=0.1)  # it begins as a copy of the last latent, without spread
    batch = task.batch(np.random.default_rng(0), 9)
    loss, metrics = task.loss(task.model, batch, torch.Generator().manual_seed(0), 0.5)
    assert float(metrics["spread_1"]) > 0.01 and float(metrics["energy_1"]) > 0
    loss.backward()
    assert all(p.grad is not None for p in task.model.parameters())
    task.model.zero_grad()
    how = RolloutConfig(2, 0.3, 0.5, 0.05, 1.0)
    energy = task.terms["energy"]
    noise = torch.Generator().manual_seed(0)
    rollouts = Rollouts(task.model, task.model, task.codec, task.channels, batch, how, energy.draws, noise)
    assert len(rollouts.batch.actions) == 6 and len(rollouts.drawn_batch.actions) == 3
    energy(rollouts, batch, 0.5)[0].backward()
    out = task.model.out.weight.grad
    assert out is not None and out[8].abs().max() > 0, "a draw's first evaluation estimates its error too"
    with pytest.raises(ConfigError, match="batch_size 1"):
        task.loss(task.model, batch.rows(slice(0, 1)), torch.Generator().manual_seed(0), 0.5)


class Stub(nn.Module):
    """Predicts zeros, sure of the left half of the picture and unsure of the right one."""

    def forward(self, state: State, action: torch.Tensor, **_: Any) -> Prediction:
        log_error = torch.full((len(action), 16, 16), -4.0)
        log_error[:, :, 8:] = 2.0
        return Prediction(torch.zeros_like(state.latents[:, -1]).requires_grad_(), log_error)


@pytest.mark.parametrize("certainty", [0.0, 0.5, 1.0])
def test_certainty_weighs_cells_by_the_error_expected_of_them(certainty: float, latents: Path) -> None:
    task = dynamics_task(latents, {"squared": {"certainty": certainty}}, importance=0.0, drop_actions=0.0)
    batch = task.batch(np.random.default_rng(0), 4)
    _, metrics = task.loss(Stub(), batch, torch.Generator().manual_seed(0), 0.5)
    error = (batch.latents[:, 4].float().square() * task.channels).mean(1)
    low, high = np.exp(4 * certainty), np.exp(-2 * certainty)
    expected = (error[:, :, :8].mean() * low + error[:, :, 8:].mean() * high) / (low + high)
    assert float(metrics["weighted_1"]) == pytest.approx(float(expected), rel=1e-4)
    assert float(metrics["error_1"]) == pytest.approx(float(error.mean()), rel=1e-4)


def test_pictures_are_those_of_the_step_that_was_drawn(latents: Path) -> None:
    """A model that answers with the true next latents, whatever it is asked, draws what the codec draws of them."""
    terms = {"squared": {}, "picture": {"weight": 1.0}}
    task = dynamics_task(latents, terms, unroll=3, pad=0.0, drop_actions=0.0)
    batch = task.batch(np.random.default_rng(0), 8)
    step, frames = batch.extra["picture.step"], batch.extra["picture.frames"]
    assert set(step.tolist()) == {1, 2, 3} and batch.extra["picture.live"].all()
    total, metrics = task.loss(Oracle(batch.latents), batch, torch.Generator().manual_seed(0), 0.5)
    own = task.codec.decode(batch.latents.float()[torch.arange(8), 3 + step])
    mse = (own - frames.movedim(-1, 1).float() / 255).square().mean((1, 2, 3))
    assert float(metrics["picture"]) == pytest.approx(float((mse + 1e-5).log10().mean()), rel=1e-4)
    assert mse.max() < 0.1 and float(total.detach()) == pytest.approx(float(metrics["picture"]), abs=0.1)


def test_the_energy_score_begins_when_it_is_told_to(latents: Path) -> None:
    task = dynamics_task(latents, {"squared": {}, "energy": {"begin": 0.5}}, unroll=2)
    batch = task.batch(np.random.default_rng(0), 4)
    for progress, begun in ((0.4, False), (0.5, True)):
        _, metrics = task.loss(task.model, batch, torch.Generator().manual_seed(0), progress)
        assert ("energy_1" in metrics) == begun == bool(task.graph_key(progress))


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ({"squared": {"certainty": 2.0}}, "certainty 2.0"),
        ({"adversarial": {"weight": -1.0}}, "weight -1.0"),
        ({"adversarial": {"judged": 9}}, "judged 9"),
        ({"adversarial": {"sampled": -1.0}}, "sampled -1.0"),
        ({"energy": {"weight": -1.0}}, "weight -1.0"),
        ({"energy": {"share": 1.0}}, "share 1.0"),
        ({"energy": {"begin": 1.0}}, "begin 1.0"),
        ({"energy": {}, "adversarial": {}}, "each wants dreams drawn in its own way"),
        ({"outcome": {}}, "head: required"),
        ({"outcome": {"head": "ae"}}, "outcome.head .*expected a head"),
        ({"squard": {}}, "did you mean 'squared'"),
    ],
)
def test_bad_terms_are_refused(latents: Path, terms: dict[str, Any], message: str) -> None:
    if "head" in terms.get("outcome", {}):
        terms = {"outcome": {"head": str(latents.parent / "ae" / "model")}}
    with pytest.raises(ConfigError, match=message):
        dynamics_task(latents, terms, unroll=3)
    with pytest.raises(ConfigError, match="drift"):
        OutcomeTaskConfig(latents="", drift=0)


def test_two_evaluations_sharpen_the_first_ones_answer() -> None:
    """The second evaluation sees the first's answer half buried in noise, at tau = 0.5."""
    seen: list[tuple[float, torch.Tensor | None]] = []
    noise = torch.randn(2, 8, 16, 16)

    class Recorder(LatentFlow):
        def predict(self, state: State, action: Any, x: Any = None, tau: Any = None, **_: Any) -> Prediction:
            seen.append((float(tau[0]), x))
            return Prediction(torch.full_like(state.latents[:, -1], 3.0), torch.zeros(len(action), 16, 16))

    model = Recorder(LatentFlowConfig(latent=LatentSpec((8, 16, 16))))
    state = model.begin(torch.zeros(2, 4, 8, 16, 16), torch.zeros(2, 3, dtype=torch.int64))
    sample(model, state, torch.zeros(2, dtype=torch.int64), noise, SamplerConfig(nfe=2))
    assert [t for t, _ in seen] == [0.0, 0.5] and seen[0][1] is None and seen[1][1] is not None
    assert torch.allclose(seen[1][1], 0.5 * noise + 1.5)


def test_a_closed_gate_copies_exactly_and_a_grown_one_begins_open(latents: Path, tmp_path: Path) -> None:
    train(settings(latents, PLAIN), tmp_path / "plain")
    plain = cast(LatentFlow, load_model(tmp_path / "plain" / "model")[0])
    config = DynamicsTaskConfig(latents=str(latents), init_from=str(tmp_path / "plain" / "model"), val_ratio=0.2)
    gated = cast(LatentFlow, DynamicsTask(config, FLOW | {"gate": True, "global_noise": True}, 0).model)
    context, actions = torch.randn(3, 4, 8, 16, 16), torch.zeros(3, 4, dtype=torch.int64)
    noise, half = torch.randn(3, 8, 16, 16), torch.full((3,), 0.5)
    with torch.no_grad():
        before, after = (predicted(model, context, actions, noise, half).latent for model in (plain, gated))
        last = context[:, -1]
        assert torch.allclose(after - last, (before - last) * torch.sigmoid(torch.tensor(4.0)), atol=1e-5)
        assert (before - last).abs().max() > 1e-3
        cast(torch.Tensor, gated.out.bias)[-1] = -200
        assert (predicted(gated, context, actions).latent == last).all()
    with pytest.raises(ConfigError, match="another architecture"):
        backbone = {"type": "unet", "channels": [24, 32], "blocks": [1, 1]}
        DynamicsTask(config, FLOW | {"gate": True, "backbone": backbone}, 0)
