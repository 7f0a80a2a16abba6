"""Dynamics that copy: what stands still stays to the byte, what was covered comes back as it was."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from dreamenv.errors import ConfigError
from dreamenv.models.codecs.exact import ExactPatches, ExactPatchesConfig
from dreamenv.models.dynamics.canvas import CanvasFlow, CanvasFlowConfig, blend, moved
from dreamenv.models.interface import to_frames, to_images

CODEC = ExactPatches(ExactPatchesConfig())


def a_model(new: float, uncovered: float) -> CanvasFlow:
    """Dynamics that draw noise, with the two shares' logits everywhere as given."""
    torch.manual_seed(0)
    model = CanvasFlow(CanvasFlowConfig(backbone={"type": "unet", "channels": [16], "blocks": [1]}))
    nn.init.normal_(model.out.weight[:48], std=0.3)
    assert model.out.bias is not None
    with torch.no_grad():
        model.out.bias[48:64], model.out.bias[64:80] = new, uncovered
    return model.eval()


def moved_cell(latents: torch.Tensor, down: int, across: int) -> torch.Tensor:
    """Latents of the pictures moved so that each pixel shows what was so many below and to the right of it."""
    picture = CODEC.decode(latents).roll((-down, -across), (2, 3))
    return CODEC.encode(picture)


def a_film(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """A random still scene uint8 (64, 64, 3), and frames (1, T, 64, 64, 3) in which a square crosses it."""
    scene = np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)
    film = np.repeat(scene[None, None], steps, 1)
    for t in range(steps):
        film[0, t, 20:28, 3 * t : 3 * t + 6] = (255, 0, 128)
    return scene, film


def latents_of(film: np.ndarray) -> torch.Tensor:
    return CODEC.encode(to_images(torch.from_numpy(film[0])))[None]


def test_every_frame_comes_back_to_the_byte_in_half_precision_too() -> None:
    frames = torch.arange(256, dtype=torch.uint8).repeat(48).view(1, 64, 64, 3)
    latents = CODEC.encode(to_images(frames))
    assert torch.equal(to_frames(CODEC.decode(latents)), frames)
    assert torch.equal(to_frames(CODEC.decode(latents.half().float())), frames)


@torch.no_grad()
def test_what_stands_still_stays_to_the_byte() -> None:
    model, (_, film) = a_model(new=-9, uncovered=0), a_film(4)
    state = model.begin(latents_of(film), torch.zeros(1, 3, dtype=torch.int64))
    for t in range(30):
        action = torch.tensor([t % 15])
        state = model.advance(state, action, model.predict(state, action).latent)
    assert np.array_equal(to_frames(CODEC.decode(state.latents[:, -1])).numpy()[0], film[0, -1])


@torch.no_grad()
def test_uncovered_ground_comes_back_as_it_was() -> None:
    scene, film = a_film(15)
    model, latents, none = a_model(new=9, uncovered=11), latents_of(film), torch.zeros(1, 3, dtype=torch.int64)
    state = model.begin(latents[:, :4], none)
    for t in range(4, 15):
        state = model.advance(state, torch.tensor([4]), latents[:, t])
    shown = to_frames(CODEC.decode(model.predict(state, torch.tensor([4])).latent)).numpy()[0]
    assert np.array_equal(shown, scene), "also where the square is now and where it was at first"
    later = model.begin(latents[:, 11:], none, past=latents[:, [0, 5, 9]])
    assert np.array_equal(to_frames(CODEC.decode(later["background"])).numpy()[0], scene)
    drawn = a_model(new=9, uncovered=-9).predict(state, torch.tensor([4])).latent
    assert (drawn - latents[:, -1]).abs().mean() > 0.1, "with another share it is what the network draws"


def test_a_share_that_is_nothing_still_learns() -> None:
    first, second = torch.zeros(1, 3, 1, 2), torch.ones(1, 3, 1, 2)
    logit = torch.tensor([[[[-6.0, 6.0]]]], requires_grad=True)
    mixed = blend(first, second, logit)
    assert mixed[0, :, 0].tolist() == [[0.0, 1.0]] * 3
    mixed.sum().backward()
    assert logit.grad is not None and (logit.grad > 0).all()


@torch.no_grad()
def test_a_cell_s_picture_is_moved_by_whole_pixels() -> None:
    picture = np.random.default_rng(1).integers(256, size=(1, 64, 64, 3), dtype=np.uint8)
    latents = latents_of(picture[None])[0]
    logits = torch.full((1, 2, 5, 16, 16), -60.0)
    logits[:, :, 2] = 0  # at rest
    logits[:, :, 2, 5, 7] = -60
    logits[:, 0, 1, 5, 7] = logits[:, 1, 4, 5, 7] = 0  # this cell shows what was one pixel up and two right
    logits = logits.flatten(1, 2)
    shown = to_frames(CODEC.decode(moved(latents, logits, 4))).numpy()[0]
    expected = picture[0].copy()
    expected[20:24, 28:32] = picture[0, 19:23, 30:34]
    assert np.array_equal(shown, expected)
    logits[:, 2, 5, 7] = 0  # and half of what was two right of it
    half = moved(latents, logits, 4)[0, :, 5, 7]
    expected = [moved_cell(latents, y, 2)[0, :, 5, 7] for y in (-1, 0)]
    assert torch.allclose(half, (expected[0] + expected[1]) / 2, atol=1e-5)
    for motion in (1, 2, 4):
        fresh, moves = CanvasFlow(CanvasFlowConfig(motion=motion)), 2 * motion + 1
        assert fresh.out.bias is not None
        begins = fresh.out.bias[-2 * moves :].view(2, moves).softmax(1)[:, motion]
        assert begins.tolist() == pytest.approx([0.95, 0.95], abs=0.01), "at rest"


@torch.no_grad()
def test_no_dream_leaves_the_range_of_pixels() -> None:
    model, action = a_model(new=9, uncovered=-9), torch.tensor([4])
    state = model.begin(latents_of(a_film(4)[1]), torch.zeros(1, 3, dtype=torch.int64))
    for _ in range(200):
        state = model.advance(state, action, model.predict(state, action).latent)
        assert state.latents.abs().max() <= 2
    assert (model.train().predict(state, action).latent.abs() > 2).any(), "but for the clamp"


@torch.no_grad()
def test_what_differs_from_the_background_moves_alone_over_it() -> None:
    scene, film = a_film(15)
    config = CanvasFlowConfig(backbone={"type": "unet", "channels": [16], "blocks": [1]}, motion=8, layered=True)
    model, latents, action = CanvasFlow(config).eval(), latents_of(film), torch.tensor([4])
    assert model.out.bias is not None
    model.out.bias[48:64], model.out.bias[64:80] = 9, -9  # all is new, nothing uncovered
    model.out.bias[82:] = -60
    model.out.bias[82 + 8] = model.out.bias[82 + 17 + 5] = 0  # each cell shows what was three pixels to the left
    state = model.begin(latents[:, :4], torch.zeros(1, 3, dtype=torch.int64))
    for t in range(4, 15):
        state = model.advance(state, action, latents[:, t])
    last, expected = film[0, -1], scene.copy()
    expected[20:28, 45:51] = (255, 0, 128)
    for apart, wanted in ((9, expected), (-9, np.concatenate([last[:, :1].repeat(3, 1), last[:, :-3]], 1))):
        model.out.bias[81] = apart
        shown = to_frames(CODEC.decode(model.predict(state, action).latent)).numpy()[0]
        assert np.array_equal(shown, wanted)
    model.out.bias[81], model.out.bias[82 + 17 + 8] = 9, 0  # or, as likely, it stays
    places = [to_images(torch.from_numpy(p)) for p in (last, expected)]
    half = CODEC.decode(model.predict(state, action).latent)
    assert torch.allclose(half, (places[0] + places[1]) / 2, atol=1e-3), "a mean of two pictures, not of four"
    with pytest.raises(ConfigError, match="layered: without motion"):
        CanvasFlowConfig(layered=True)


@torch.no_grad()
def test_what_is_left_out_in_evaluation_would_not_have_been_seen() -> None:
    config = CanvasFlowConfig(backbone={"type": "unet", "channels": [16], "blocks": [1]}, motion=8, layered=True)
    torch.manual_seed(0)
    model, latents, action = CanvasFlow(config), latents_of(a_film(9)[1]), torch.tensor([4])
    torch.nn.init.normal_(model.out.weight, std=0.3)
    state = model.begin(latents[:, :4], torch.zeros(1, 3, dtype=torch.int64))
    for t in range(4, 9):
        state = model.advance(state, action, latents[:, t])
        whole = model.train().predict(state, action).latent.clamp(-2, 2)
        assert torch.allclose(model.eval().predict(state, action).latent, whole, atol=1e-5)
        assert (whole - state["background"]).abs().max() > 0.1


@torch.no_grad()
def test_a_trained_model_is_grown_to_longer_moves_and_to_layers() -> None:
    shared, action = {"backbone": {"type": "unet", "channels": [16], "blocks": [1]}}, torch.tensor([4])
    old = CanvasFlow(CanvasFlowConfig(motion=2, **shared)).eval()
    nn.init.normal_(old.out.weight, std=0.05)
    assert old.out.bias is not None
    old.out.bias[81:] = torch.tensor([-30.0, 0.0, 9.0, 2.0, -30.0]).repeat(2)
    for options in ({"motion": 2, "layered": True}, {"motion": 8}, {"motion": 8, "layered": True}):
        new = CanvasFlow(CanvasFlowConfig(**shared, **options)).eval()  # pyright: ignore
        grown = new.grown(old.state_dict())
        if "layered" in options:
            assert grown["out.bias"][81] == -1 and not grown["out.weight"][81].any(), "a little everywhere"
            grown["out.bias"][81] = -60  # nowhere
        new.load_state_dict(grown)
        state = new.begin(latents_of(a_film(4)[1]), torch.zeros(1, 3, dtype=torch.int64))
        was, now = old.predict(state, action), new.predict(state, action)
        assert torch.allclose(was.latent, now.latent, atol=1e-5) and torch.equal(was.log_error, now.log_error)
        again = new.grown(new.state_dict())
        assert all(torch.equal(value, again[name]) for name, value in new.state_dict().items())
    for size in (80, 81, 82):  # of no shape that ever was: left as they are, to be refused
        cut = {"out.weight": old.out.weight[:size], "out.bias": old.out.bias[:size]}
        assert {name: len(value) for name, value in new.grown(cut).items()} == dict.fromkeys(cut, size)
    assert not new.grown({"out.bias": torch.tensor(1.0)})["out.bias"].ndim
    with pytest.raises(RuntimeError, match="size mismatch"):  # never to shorter ones
        old.load_state_dict(old.grown(CanvasFlow(CanvasFlowConfig(motion=4, **shared)).state_dict()))


@torch.no_grad()
def test_what_changes_less_than_a_little_stays_as_it_is() -> None:
    film = latents_of(a_film(4)[1]).clamp(-1.5, 1.5)
    config = CanvasFlowConfig(backbone={"type": "unet", "channels": [16], "blocks": [1]}, rest=(8.0,))
    model = CanvasFlow(config).eval()
    assert model.out.bias is not None
    model.out.bias[48:64], model.out.bias[64:80] = 9, -9
    state = model.begin(film, torch.zeros(1, 3, dtype=torch.int64))
    for values, moves in ((7, False), (9, True)):
        model.out.bias[:48] = values * 4 / 255
        change = model.predict(state, torch.tensor([4])).latent - film[:, -1]
        assert torch.allclose(change, torch.full_like(change, moves * values * 4 / 255), atol=1e-5)
    model.out.bias[:48] = 7 * 4 / 255
    assert (model.train().predict(state, torch.tensor([4])).latent != film[:, -1]).all(), "in training all of it counts"
    for wrong in ((1.0, 2.0), (-1.0,), (300.0,)):
        with pytest.raises(ConfigError, match="rest"):
            CanvasFlowConfig(rest=wrong)


def test_many_pictures_are_moved_as_few_are() -> None:
    """Beyond some number they are moved in parts, where no gradient is wanted."""
    rng = torch.Generator().manual_seed(0)
    maps, logits = torch.randn(37, 48, 4, 4, generator=rng), 3 * torch.randn(37, 34, 4, 4, generator=rng)
    needed = torch.rand(37, 4, 4, generator=rng) < 0.5
    for some in (None, needed):
        whole = moved(maps.requires_grad_(), logits, 4, some)
        with torch.no_grad():
            assert whole.requires_grad and torch.equal(moved(maps, logits, 4, some), whole)
            one = [
                moved(maps[i : i + 1], logits[i : i + 1], 4, None if some is None else some[i : i + 1]) for i in (0, 20)
            ]
        assert torch.equal(torch.cat(one), whole[[0, 20]])
