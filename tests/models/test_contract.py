"""One contract for every registered codec, dynamics and head: whatever registers itself is tested here."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreamenv.bundle import GameFacts, Limits, Starts, load_bundle, save_bundle
from dreamenv.errors import ConfigError
from dreamenv.flow import SamplerConfig, sample
from dreamenv.models.interface import Codec, Dynamics, OutcomeHead, State
from dreamenv.models.io import load_model, save_model
from dreamenv.models.registry import build, lookup, register, spec_of, types
from dreamenv.vector import DreamVectorEnv
from dreamenv.world_model import WorldModel
from trainers.models import completed

K = 3  # not the default of anything


def shipped(kind: str) -> list[str]:
    """The project's own types, whichever toys other tests have registered before."""
    return [name for name in types(kind) if not name.startswith("toy_")]


CODECS = shipped("codec")
PAIRS = [  # on pixels only those that are made for them: so many take others too long
    (codec, dynamics)
    for codec in CODECS
    for dynamics in shipped("dynamics")
    if dynamics == {"pixels": "pixel_world_model", "exact_patches": "canvas_flow"}.get(codec, dynamics)
]


def codec_of(name: str) -> Codec:
    torch.manual_seed(0)
    return build("codec", {"type": name}).eval()


def fitting(kind: str, name: str, codec: Codec) -> Any:
    """A small model on the codec's latents, see `small`; skips what cannot work on them."""
    try:
        return small(kind, name, codec)
    except ConfigError as error:
        pytest.skip(f"{name} does not work on {codec.spec.layout}: {error}")


def small(kind: str, name: str, codec: Codec, **more: Any) -> Any:
    """A small model on the codec's latents, nothing left at zero."""
    torch.manual_seed(1)
    model = build(kind, completed(kind, {"type": name}, codec, context=K, bias=(30.0, 0.0, 0.0), **more))
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def pictures(codec: Codec, count: int, seed: int = 0) -> torch.Tensor:
    h, w, c = codec.frame
    return torch.rand(count, c, h, w, generator=torch.Generator().manual_seed(seed))


def begun(codec: Codec, dynamics: Dynamics, rows: int) -> tuple[State, torch.Tensor]:
    """States of real-looking history, and actions (rows,)."""
    latents = codec.encode(pictures(codec, rows * K)).unflatten(0, (rows, K))
    actions = torch.arange(rows * (K - 1)).view(rows, K - 1) % 15
    return dynamics.begin(codec.sequence(latents), actions), torch.arange(rows) % 15


@pytest.mark.parametrize("name", CODECS)
def test_a_codec(name: str, tmp_path: Path) -> None:
    codec = codec_of(name)
    images = pictures(codec, 5)
    with torch.no_grad():
        latents = codec.encode(images)
        assert latents.shape == (5, *codec.spec.shape) and latents.dtype == torch.float32
        drawn = codec.decode(latents)
        assert drawn.shape == images.shape and torch.isfinite(drawn).all()
        alone = torch.cat([codec.encode(image[None]) for image in images])
        same = torch.isclose(alone, latents, atol=1e-4).float().mean()
        assert same > 0.99, "a picture's latent does not depend on its company, but for what rounding tips over"
        cells = codec.pool(torch.ones(5, *codec.frame[:2]), latents)
        assert cells.shape == (5, *codec.spec.shape[1:]) and cells.max() <= 1 + 1e-5
        visible = codec.visible(latents)
        assert visible.shape == cells.shape and visible.min() >= 0 and visible.max() <= 1
        noised = codec.noised(latents, torch.ones_like(latents))
        assert torch.equal((noised != latents).any(dim=(0, 2, 3)).nonzero()[:, 0], torch.arange(codec.content_channels))
        row = codec.sequence(latents[None])
        assert row.shape == (1, *latents.shape)
        held = codec.hold(row.clone(), torch.tensor([[False, True, True, True, True]]))
        assert torch.equal(held[:, :, : codec.content_channels], row[:, :, : codec.content_channels])
    save_model(tmp_path / "m", codec, {"step": 1})
    again, facts = load_model(tmp_path / "m", "codec")
    assert isinstance(again, Codec) and facts == {"step": 1} and again.spec == codec.spec
    with torch.no_grad():
        assert torch.equal(again.encode(images), latents)


@pytest.mark.parametrize(("codec", "name"), PAIRS)
def test_dynamics(codec: str, name: str, tmp_path: Path) -> None:
    frames = codec_of(codec)
    model: Dynamics = fitting("dynamics", name, frames)
    assert model.spec == frames.spec and model.context == K
    with torch.no_grad():
        state, action = begun(frames, model, 4)
        assert state.latents.shape == (4, K, *frames.spec.shape) and state.actions.shape == (4, K - 1)
        assert {len(value) for value in state.values()} == {4}
        found = model.predict(state, action)
        assert found.latent.shape == (4, *frames.spec.shape) and found.latent.dtype == torch.float32
        assert found.log_error.shape == (4, *frames.spec.shape[1:]) and torch.isfinite(found.latent).all()
        one = model.predict(state.rows(slice(2, 3)), action[2:3])
        assert torch.allclose(one.latent, found.latent[2:3], atol=1e-4), "a row does not depend on its batch"
        noise = torch.randn(found.latent.shape, generator=torch.Generator().manual_seed(0))
        assert torch.equal(model.predict(state, action, noise, torch.zeros(4)).latent, found.latent), (
            "tau 0 is no noise"
        )
        later = model.predict(state, action, noise, torch.full((4,), 0.5)).latent
        assert torch.allclose(later, found.latent) == model.deterministic
        other = model.predict(state, (action + 7) % 15).latent
        assert not torch.equal(other, found.latent), "the action matters"
        drawn = [sample(model, state, action, noise, SamplerConfig(nfe=2)).latent for _ in range(2)]
        assert torch.equal(*drawn)
        following = model.advance(state, action, found.latent)
        assert torch.equal(following.latents[:, :-1], state.latents[:, 1:]) and set(following) == set(state)
        assert torch.equal(following.latents[:, -1], found.latent) and torch.equal(following.actions[:, -1], action)
        assert {k: v.shape for k, v in following.items()} == {k: v.shape for k, v in state.items()}
        back = State.from_arrays(following.arrays(), torch.device("cpu"))
        assert all(torch.equal(back[n], following[n]) for n in following) and set(back) == set(following)
        fanned = State.cat([state.rows(slice(1, 2))] * 3)
        assert torch.allclose(model.predict(fanned, action[1:2].repeat(3)).latent, found.latent[1:2], atol=1e-4)
        hints = model.hints(state, action)
        assert set(hints) == set(found.hints)
        for key, value in hints.items():
            assert torch.allclose(value, found.hints[key], atol=1e-5)
    with torch.enable_grad():
        state, action = begun(frames, model, 2)
        target = state.latents[:, -1].detach()
        truth = model.truth(state, target)
        prediction = model(state, action, hints=truth)
        model.align(prediction.latent, target).square().mean().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    save_model(tmp_path / "m", model, {})
    again, _ = load_model(tmp_path / "m", "dynamics")
    assert spec_of(again) == json.loads(json.dumps(spec_of(model)))


@pytest.mark.parametrize(("codec", "name"), [(c, h) for c in CODECS for h in shipped("head")])
def test_a_head(codec: str, name: str) -> None:
    frames = codec_of(codec)
    head: OutcomeHead = fitting("head", name, frames)
    latents = frames.encode(pictures(frames, 2 * K)).unflatten(0, (2, K))
    state = State({"latents": frames.sequence(latents), "actions": torch.zeros(2, K - 1, dtype=torch.int64)})
    hints = {name: torch.zeros(2, *shape) for name, shape in head.hinted.items()}
    found = head.log_probabilities(state, torch.tensor([1, 7]), hints)
    assert found.shape == (2, 3) and torch.allclose(found.exp().sum(1), torch.ones(2))


def head_for(codec: Codec, dynamics: Dynamics) -> OutcomeHead:
    """The head that makes most of what the dynamics hint."""
    heads: list[OutcomeHead] = []
    told = {name: shape[0] for name, shape in dynamics.hinted.items() if shape}
    for name in shipped("head"):
        with suppress(ConfigError):
            heads.append(small("head", name, codec, **told))
    fit = [head for head in heads if head.hinted.items() <= dynamics.hinted.items()]
    return max(fit, key=lambda head: len(head.hinted))


@pytest.mark.parametrize(("codec", "name"), PAIRS)
def test_as_an_environment(codec: str, name: str, tmp_path: Path) -> None:
    """Seeds, batches, snapshots and branches hold for every pair that fits, with a head that fits too."""
    frames = codec_of(codec)
    dynamics = fitting("dynamics", name, frames)
    hints = dynamics.hints(*begun(frames, dynamics, 1))
    assert {name: tuple(hint.shape[1:]) for name, hint in hints.items()} == dynamics.hinted
    head = head_for(frames, dynamics)
    starts = np.random.default_rng(0).integers(0, 256, (3, 1, *frames.frame), dtype=np.uint8)
    bank = Starts(starts, np.zeros((3, 0), np.uint8), np.arange(3, dtype=np.int32))
    model = WorldModel(frames, dynamics, head)
    folder = save_bundle(tmp_path / "b", model, GameFacts("coinrun", "easy", 50), Limits(1e6, 1e6), bank, {})
    bundle = load_bundle(folder, "cpu", "fp32")

    def play(n: int, seed: int, steps: int = 6) -> tuple[np.ndarray, DreamVectorEnv]:
        envs = DreamVectorEnv(n, bundle=bundle, sampler={"nfe": 2}, exact=True)
        envs.reset(seed=seed)
        for t in range(steps):
            seen = envs.step(np.full(n, t % 15))[0]
        return seen, envs

    three, envs = play(3, 5)
    assert np.array_equal(three, play(3, 5)[0]) and np.array_equal(three[2:], play(1, 7)[0])
    snapshot = envs.snapshot()
    after = envs.step(np.array([1, 7, 8]))[0]
    fan = envs.branch(snapshot, 2, index=1)
    assert np.array_equal(envs.restore(snapshot), three) and np.array_equal(envs.step(np.array([1, 7, 8]))[0], after)
    branches = fan.step(np.array([7, 7]))[0]
    assert np.array_equal(branches[0], after[1])
    assert np.array_equal(branches[0], branches[1]) == dynamics.deterministic, "another future"


def test_a_name_is_taken_once() -> None:
    cls, config = lookup("codec", CODECS[0], "")
    register("codec", CODECS[0], config)(cls)
    with pytest.raises(ConfigError, match="registered by"):
        register("codec", CODECS[0], config)(type("Other", (), {}))
