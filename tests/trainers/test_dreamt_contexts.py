"""Heads that learn from dreams, and dreams that are judged by a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from torch import nn

from dreamenv.models.interface import Prediction, State
from tests.trainers.common import Oracle, dynamics_task, settings
from trainers.dreams import CALM, EVENT, NEAR, shared_out
from trainers.tasks.outcome import OutcomeTask, OutcomeTaskConfig
from trainers.terms.outcome import Outcome
from trainers.train import train

HEAD = {"type": "picture_head", "width": 16}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def dynamics(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("flow")
    train(settings(latents), folder)
    return str(folder / "model")


def test_dreamt_contexts_of_the_head_are_of_the_moment_they_are_labelled_with(
    latents: Path, dynamics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With dynamics that only count, a context says from where it was dreamt, and how far."""
    monkeypatch.setattr("trainers.dreams.sample", lambda _, state, *__: Prediction(state.latents[:, -1] + 1, None))
    config = OutcomeTaskConfig(latents=str(latents), dynamics=dynamics, drift=5, dreams=200, dreamt=1.0, val_ratio=0.2)
    task = OutcomeTask(config, HEAD, 0)
    assert task.renew(0) and not task.renew(1)
    data, dreams, labels = task.data, task.dreams, task.moments.labels
    assert dreams is not None and dreams.contexts.shape[1:] == (4, 8, 16, 16) and (dreams.depth <= 5).all()
    assert (data.start[dreams.steps] == data.start[dreams.begin]).all(), "a dream never crosses the episode's start"
    assert not data.validation[dreams.steps].any()
    event, near, calm = ((dreams.kind == kind) for kind in (EVENT, NEAR, CALM))
    assert (labels[dreams.steps[event]] > 0).all() and event.sum() == near.sum() > 140
    assert (dreams.begin[near] == dreams.begin[event]).all() and (dreams.depth[near] <= dreams.depth[event]).all()
    assert set(dreams.depth[calm]) == set(range(6)) and calm.sum() == 8 * (200 - event.sum())
    real = data.contexts(dreams.begin, 4)[0]
    for depth in range(6):
        here = dreams.depth == depth
        expected = data.stored[real[here]].astype(np.float32)
        expected = np.concatenate([expected, *(expected[:, -1:] + step for step in range(1, depth + 1))], 1)[:, -4:]
        assert np.abs(dreams.contexts[here].numpy() - expected).max() < 0.01
    seen = 0
    for seed in range(5):
        batch = task.batch(np.random.default_rng(seed), 64)
        for row in range(64):
            (found,) = np.unique(np.flatnonzero((dreams.contexts == batch.context[row]).all(1).all(1).all(1).all(1)))[
                :1
            ]
            assert int(batch.labels[row]) == labels[dreams.steps[found]]
            assert batch.actions[row].tolist() == data.contexts(dreams.steps[[found]], 4)[1][0].tolist()
            seen += int(batch.labels[row] > 0)
    assert 80 < seen < 180, "balance 0.4"


def test_dreams_are_renewed_by_the_number_of_the_step(latents: Path, dynamics: str, tmp_path: Path) -> None:
    config = OutcomeTaskConfig(latents=str(latents), dynamics=dynamics, drift=3, dreams=8, renewed=2, val_ratio=0.2)
    task, other = OutcomeTask(config, HEAD, 0), OutcomeTask(config, HEAD, 0)
    assert task.renew(0) and other.renew(1)
    assert task.dreams is not None and other.dreams is not None
    first = task.dreams.contexts
    assert not task.renew(1) and task.renew(2) and not torch.equal(task.dreams.contexts, first)
    assert not task.renew(3) and task.renew(5)
    assert other.renew(5) and torch.equal(task.dreams.contexts, other.dreams.contexts)
    assert other.renew(0) and torch.equal(other.dreams.contexts, first)
    seen = []
    settings = {"type": "outcome", "latents": str(latents), "dynamics": dynamics, "val_ratio": 0.2}
    settings |= {"dreams": 8, "renewed": 2, "dreamt": 1.0}
    with pytest.MonkeyPatch.context() as patch:
        draw = OutcomeTask.batch
        patch.setattr(OutcomeTask, "batch", lambda s, *a: (seen.append(s.dreams), draw(s, *a))[1])
        train({"model": HEAD, "task": settings, "loop": {"steps": 5, "batch_size": 8, "workers": 0}}, tmp_path / "run")
    assert [id(dreams) for dreams in seen] == [id(seen[i]) for i in (0, 0, 2, 2, 4)] and len({*map(id, seen)}) == 3


@pytest.mark.parametrize("workers", [0, 2])
def test_a_training_that_was_cut_off_goes_on_with_the_same_dreams(
    latents: Path, dynamics: str, tmp_path: Path, workers: int
) -> None:
    task = {"type": "outcome", "latents": str(latents), "dynamics": dynamics, "val_ratio": 0.2, "dreamt": 1.0}
    loop = {"steps": 6, "batch_size": 8, "checkpoint_every": 3}
    values = {"model": HEAD, "task": task | {"dreams": 8, "renewed": 2}, "loop": loop}
    train(values, tmp_path / "whole")
    values["loop"] = loop | {"workers": workers}
    with pytest.MonkeyPatch.context() as patch:
        losses, loss = [], OutcomeTask.loss
        patch.setattr(OutcomeTask, "loss", lambda s, *a: losses.append(0) or (1 / (len(losses) < 6), loss(s, *a))[1])
        with pytest.raises(ZeroDivisionError):
            train(values, tmp_path / "part")
    train(values, tmp_path / "part", resume=True)
    assert (tmp_path / "part" / "model" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("count", [1, 130, 514, 4096])
def test_dreams_of_each_length_are_drawn_with_one_evaluation_and_with_two(count: int) -> None:
    length = np.sort((64 ** np.random.default_rng(0).random(count)).round().astype(np.int64))
    length[count * 3 // 4 :] = 64
    for together in (128, 1024):
        batches = shared_out(length, together)
        assert np.array_equal(np.sort(np.concatenate([rows for rows, _ in batches])), np.arange(count))
        assert max(len(rows) for rows, _ in batches) <= together
        twice = np.concatenate([rows for rows, nfe in batches if nfe == 2] or [np.zeros(0, np.int64)])
        for part in (length < 8, length == 64):
            assert abs(part[twice].sum() - part.sum() / 2) <= len(batches)


def test_a_head_trained_on_dreams_reports_both_kinds_of_context(latents: Path, dynamics: str, tmp_path: Path) -> None:
    figures = train(
        {
            "model": HEAD,
            "task": {"type": "outcome", "latents": str(latents), "dynamics": dynamics, "val_ratio": 0.2, "dreams": 64},
            "loop": {"steps": 3, "batch_size": 16},
        },
        tmp_path / "head",
    )
    assert all(np.isfinite(value) for value in figures.values())
    assert {"ap reward 10 end", "ap dreamt reward 10 end"} <= set(figures)


class Judge(nn.Module):
    """A head that says what the last latent's first channels hold, and remembers what it was asked."""

    hinted: ClassVar[dict[str, tuple[int, ...]]] = {}

    def logits(self, state: State, action: torch.Tensor, hints: dict) -> torch.Tensor:
        self.context, self.action = state.latents, action
        return state.latents[:, -1, :3].mean((2, 3))


@pytest.fixture(scope="module")
def head(latents: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("head")
    train(
        {
            "model": HEAD,
            "task": {"type": "outcome", "latents": str(latents), "val_ratio": 0.2},
            "loop": {"steps": 2, "batch_size": 8},
        },
        folder,
    )
    return str(folder / "model")


def test_the_outcome_term_asks_about_the_moment_the_dream_has_reached(latents: Path, head: str) -> None:
    terms = {"squared": {}, "outcome": {"head": head, "weight": 1.0, "events": 0.5}}
    task = dynamics_task(latents, terms, unroll=6, context_noise=0.0, drop_actions=0.5, pad=0.2)
    term = cast(Outcome, task.terms["outcome"])
    judge = term._head[0] = cast(Any, Judge())
    data = task.data
    eventful = beyond = 0
    for seed in range(4):
        batch = task.batch(np.random.default_rng(seed), 64)
        labels, query = batch.extra["outcome.labels"], batch.extra["outcome.query"]
        oracle = Oracle(batch.latents)
        loss, metrics = task.loss(oracle, batch, torch.Generator().manual_seed(0), 0.5)
        assert float(metrics["error_1"]) == 0 and float(metrics["error_6"]) == 0
        expected = nn.functional.cross_entropy(judge.context[:, -1, :3].detach().mean((2, 3)), labels)
        assert float(metrics["outcome"]) == pytest.approx(float(expected))
        loss.backward()
        reached = cast(torch.Tensor, oracle.latents.grad)[torch.arange(64), 3 + query, :3]
        assert (reached.flatten(1).abs().sum(1) > 0).all(), "the answer's gradient reaches what was dreamt"
        for row in range(64):
            moments = np.flatnonzero((data.stored[:] == judge.context[row, -1].detach().half().numpy()).all((1, 2, 3)))
            known = {(int(term._labels[m]), int(data.actions[m])) for m in moments}
            assert (int(labels[row]), int(judge.action[row])) in known
            assert not data.validation[moments].all()
            live = batch.live[row].numpy()
            eventful += int(labels[row] > 0)
            beyond += int(not live.all())
            assert live[: int(query[row])].all() and (live[:-1] >= live[1:]).all()
    assert 40 < eventful < 120 and beyond > 40


@pytest.mark.parametrize("energy", [False, True])
def test_steps_after_the_end_of_an_episode_cost_nothing(energy: bool, latents: Path, head: str) -> None:
    terms: dict[str, Any] = {"flow": {}, "squared": {}, "outcome": {"head": head, "weight": 1e-9}}
    terms |= {"energy": {"weight": 0.5}} if energy else {}
    task = dynamics_task(latents, terms, unroll=4, importance=0.0, context_noise=0.0, drop_actions=0.0)
    batch = task.batch(np.random.default_rng(0), 8)
    batch.live[:] = False
    loss, _ = task.loss(task.model, batch, torch.Generator().manual_seed(0), 0.5)
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
