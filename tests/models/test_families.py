"""What each family promises beside the contract of all: caches, conditions, parameterisations, shapes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

from dreamenv.contract.actions import NUM_ACTIONS
from dreamenv.contract.frames import NATIVE, observe
from dreamenv.errors import ConfigError
from dreamenv.flow import SamplerConfig, sample
from dreamenv.models.backbones.dit import DiT, DiTConfig
from dreamenv.models.codecs.conv import ConvAutoencoder, ConvAutoencoderConfig
from dreamenv.models.codecs.pixels import Pixels, PixelsConfig
from dreamenv.models.dynamics.causal import CausalFlow, CausalFlowConfig
from dreamenv.models.dynamics.flow import LatentFlow, LatentFlowConfig
from dreamenv.models.dynamics.pixel import PixelWorldModel, PixelWorldModelConfig
from dreamenv.models.dynamics.predictor import LatentPredictor, LatentPredictorConfig
from dreamenv.models.interface import NULL_ACTION, LatentSpec

SMALL = {"type": "unet", "channels": (16, 32), "blocks": (1, 1)}


def shaken(module: nn.Module, std: float = 0.1, seed: int = 0) -> nn.Module:
    """With every parameter that begins at zero drawn anew, so that each has an effect."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if not parameter.any():
                parameter.normal_(std=std, generator=generator)
    return module.eval()


def small_causal(context: int = 4) -> CausalFlow:
    torch.manual_seed(0)
    config = CausalFlowConfig(LatentSpec((5, 8, 8)), context, width=32, depth=3, heads=4)
    model = shaken(CausalFlow(config))
    assert isinstance(model, CausalFlow)
    return model


@torch.no_grad()
def test_the_cache_is_full_recomputation_across_the_wrap() -> None:
    k, steps = 4, 13  # the buffer wraps three times
    model = small_causal(k)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(2, k + steps, 5, 8, 8, generator=generator)
    actions = torch.randint(NUM_ACTIONS, (2, k + steps), generator=generator)
    x, tau = torch.randn(2, 5, 8, 8, generator=generator), torch.tensor([0.3, 0.7])
    state = model.begin(latents[:, :k], actions[:, : k - 1])
    for t in range(k, k + steps):
        found = model.predict(state, actions[:, t - 1], x, tau).latent
        frames = torch.cat([latents[:, :t], (x * tau[:, None, None, None])[:, None]], 1)
        before = torch.cat([torch.full((2, 1), NULL_ACTION), actions[:, :t]], 1)
        taus = torch.cat([torch.ones(2, t), tau[:, None]], 1)
        whole, _ = model.frames(frames, before, taus, torch.zeros(2, t + 1))
        expected = latents[:, t - 1] + whole[:, -1, :5]
        assert torch.allclose(found, expected, atol=1e-4), t
        state = model.advance(state, actions[:, t - 1], latents[:, t])
    assert state["keys"].shape == (2, k, 3, 16, 64)


@torch.no_grad()
def test_no_frame_sees_a_later_one_and_each_sees_the_window_before() -> None:
    model = small_causal(2)
    x = torch.randn(1, 12, 5, 8, 8, generator=torch.Generator().manual_seed(0))
    actions, ones = torch.zeros(1, 12, dtype=torch.int64), torch.ones(1, 12)
    out, _ = model.frames(x, actions, ones, 0 * ones)
    changed = x.clone()
    changed[:, 4] += 1
    other, _ = model.frames(changed, actions, ones, 0 * ones)
    differs = (out != other).flatten(2).any(2)[0]
    # a block looks two frames back, three blocks six
    assert differs.tolist() == [4 <= t <= 10 for t in range(12)]


@torch.no_grad()
def test_each_frame_has_a_noise_level_of_its_own() -> None:
    model = small_causal()
    latents, actions = torch.randn(2, 4, 5, 8, 8), torch.zeros(2, 3, dtype=torch.int64)
    now = torch.zeros(2, dtype=torch.int64)
    levels = torch.zeros(2, 4)
    levels[0, 1] = 0.2
    plain, noisy = (model.predict(model.begin(latents, actions, level=x), now).latent for x in (None, levels))
    assert not torch.allclose(plain[0], noisy[0]) and torch.allclose(plain[1], noisy[1], atol=1e-5)


@torch.no_grad()
def test_the_transformer_attends_to_the_actions_in_their_order() -> None:
    torch.manual_seed(0)
    model = shaken(
        LatentPredictor(
            LatentPredictorConfig(
                LatentSpec((5, 8, 8)),
                backbone={"type": "dit", "width": 32, "depth": 2, "features": 16, "cross_attention": True},
                embedding=32,
                filter_bank=0,
            )
        )
    )
    assert isinstance(model, LatentPredictor)
    seen: list[torch.Tensor] = []
    model.backbone.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    latents, now = torch.randn(1, 4, 5, 8, 8), torch.tensor([3])
    a = model.predict(model.begin(latents, torch.tensor([[1, 7, 1]])), now).latent
    b = model.predict(model.begin(latents, torch.tensor([[7, 1, 1]])), now).latent
    assert not torch.allclose(a, b)
    assert not torch.allclose(seen[0][:, 0], seen[0][:, 2]), "the same action at another time is another token"
    backbone = model.backbone
    maps, cond = torch.randn(1, 20, 8, 8), torch.randn(1, 32)
    mixed = backbone(maps, cond, seen[0]), backbone(maps, cond, seen[1])
    assert not torch.allclose(*mixed), "tokens reach the features by attention alone too"


@torch.no_grad()
def test_a_new_transformer_heeds_no_condition_and_covers_the_grid() -> None:
    torch.manual_seed(0)
    backbone = DiT(DiTConfig(width=32, depth=2, heads=2, features=24), 6, 16)
    maps = torch.randn(2, 6, 8, 12)
    out = backbone(maps, torch.randn(2, 16))
    assert out.shape == (2, 24, 8, 12) and torch.equal(out, backbone(maps, torch.randn(2, 16)))
    with pytest.raises(ConfigError, match="patch 2"):
        backbone(torch.randn(1, 6, 7, 8), torch.randn(1, 16))
    with pytest.raises(ConfigError, match="cross_attention"):
        DiT(DiTConfig(cross_attention=True), 6, 16)


@torch.no_grad()
def test_a_velocity_is_followed_to_the_clean_latent() -> None:
    """Before training the network says velocity 0: every point stays where it is; then the sampler integrates it."""
    torch.manual_seed(0)
    config = LatentFlowConfig(LatentSpec((5, 8, 8)), backbone=SMALL, embedding=32, parameterisation="velocity")
    model = LatentFlow(config)
    state = model.begin(torch.randn(2, 4, 5, 8, 8), torch.zeros(2, 3, dtype=torch.int64))
    x, action = torch.randn(2, 5, 8, 8), torch.zeros(2, dtype=torch.int64)
    assert torch.equal(model.predict(state, action, x, torch.full((2,), 0.4)).latent, x)
    assert not model.predict(state, action).latent.any() and model.sees_noise
    nn.init.constant_(model.out.bias[:5], 0.5)  # a constant velocity leads from x to x + 0.5, whatever the steps
    if model.filters is not None:
        assert not model.filters.mix.weight.any()
    for nfe in (2, 5):
        found = sample(model, state, action, x, SamplerConfig(nfe=nfe)).latent
        assert torch.allclose(found, x + 0.5, atol=1e-5), nfe
    one = SamplerConfig(nfe=1)
    assert torch.allclose(sample(model, state, action, x, one).latent, torch.full_like(x, 0.5)), "without noise"
    assert not one.stochastic(model)
    clean = LatentFlow(LatentFlowConfig(LatentSpec((5, 8, 8)), backbone=SMALL, embedding=32))
    assert not clean.goes_on_from(model) and clean.goes_on_from(clean)
    with pytest.raises(ConfigError, match="parameterisation"):
        LatentFlowConfig(parameterisation="noise")  # type: ignore[arg-type]


@torch.no_grad()
def test_one_evaluation_of_a_shortcut_model_is_a_draw() -> None:
    torch.manual_seed(0)
    model = shaken(LatentFlow(LatentFlowConfig(LatentSpec((5, 8, 8)), backbone=SMALL, embedding=32, shortcut=4)))
    assert isinstance(model, LatentFlow)
    state = model.begin(torch.randn(2, 4, 5, 8, 8), torch.zeros(2, 3, dtype=torch.int64))
    action, noise = torch.zeros(2, dtype=torch.int64), torch.randn(2, 5, 8, 8)
    one = SamplerConfig(nfe=1)
    assert one.stochastic(model) and not SamplerConfig(nfe=1, temperature=0).stochastic(model)
    drawn = [sample(model, state, action, z, one).latent for z in (noise, -noise)]
    assert not torch.allclose(*drawn)
    told = model.predict(state, action, noise, torch.zeros(2), span=torch.ones(2)).latent
    assert torch.equal(told, drawn[0]), "it is told that the one step goes all the way"
    assert not torch.allclose(told, model.predict(state, action, noise, torch.zeros(2)).latent)
    mean = sample(model, state, action, noise, SamplerConfig(nfe=1, temperature=0)).latent
    assert torch.equal(mean, model.predict(state, action).latent)
    assert model.spans == (1, 0.5, 0.25, 0.125)

    def said(span: float) -> torch.Tensor:
        return model.predict(state, action, noise, torch.full((2,), 0.25), span=torch.full((2,), span)).latent

    assert torch.equal(said(1 / 3), said(0.25)) and torch.equal(said(0.7), said(0.5)), "only what it has learnt"
    assert torch.equal(said(1 / 16), said(0.0)) and not torch.equal(said(0.125), said(0.0))
    plain = LatentFlow(LatentFlowConfig(LatentSpec((5, 8, 8)), backbone=SMALL, embedding=32))
    assert not one.stochastic(plain) and SamplerConfig(nfe=2).stochastic(plain)
    predictor = LatentPredictor(LatentPredictorConfig(LatentSpec((5, 8, 8)), backbone=SMALL, embedding=32))
    assert not SamplerConfig(nfe=2).stochastic(predictor)


@pytest.mark.parametrize(("shape", "skips"), [((1, 84, 84), False), ((1, 84, 84), True), ((3, 64, 64), True)])
@torch.no_grad()
def test_the_pixel_model_says_all_frames_at_once(shape: tuple[int, int, int], skips: bool) -> None:
    torch.manual_seed(0)
    config = PixelWorldModelConfig(LatentSpec(shape, "pixels"), width=16, embedding=8, skips=skips)
    model = shaken(PixelWorldModel(config))
    assert isinstance(model, PixelWorldModel)
    frames, past = torch.rand(2, 4, *shape), torch.randint(15, (2, 3))
    future = torch.randint(15, (2, 4))
    logits = model.logits(frames, past, future)
    assert logits.shape == (2, 4, *shape)
    assert len(model.down) == len(model.up) == 4
    kinds = {type(m) for m in model.modules()}
    assert nn.GroupNorm in kinds and nn.Embedding in kinds and nn.SiLU not in kinds
    later = future.clone()
    later[:, 3] = (later[:, 3] + 1) % 15
    assert not torch.allclose(model.logits(frames, past, later), logits), "future actions are heeded"
    state, unknown = model.begin(frames, past), future.clone()
    unknown[:, 1:] = NULL_ACTION
    found = model.predict(state, future[:, 0])
    expected = torch.sigmoid(model.logits(frames, past, unknown)[:, 0])
    assert torch.equal(found.latent, expected)
    variance = (expected * (1 - expected)).mean(1).clamp_min(1e-6)
    assert torch.allclose(found.log_error.exp(), variance, rtol=1e-4)
    moved = frames.roll(8, -1)
    assert not torch.allclose(model.logits(moved, past, future), logits.roll(8, -1), atol=1e-3), "it knows places"


@pytest.mark.parametrize("downsample", [4, 8, 16])
@pytest.mark.parametrize("upsample", ["upsample_conv", "conv_transpose"])
@torch.no_grad()
def test_the_convolutional_autoencoder(downsample: int, upsample: str) -> None:
    torch.manual_seed(0)
    codec = ConvAutoencoder(ConvAutoencoderConfig(downsample=downsample, upsample=upsample, width=8))  # type: ignore[arg-type]
    images = torch.rand(2, 3, 64, 64)
    latents = codec.encode(images)
    assert latents.shape == (2, 16, 64 // downsample, 64 // downsample) == (2, *codec.spec.shape)
    assert isinstance(codec.latent_head, nn.Conv2d) and codec.latent_head.kernel_size == (1, 1)
    drawn = codec.decode(100 * torch.randn_like(latents))
    assert drawn.shape == images.shape and 0 <= drawn.min() and drawn.max() <= 1
    strides = [m.stride for m in codec.encoder if isinstance(m, nn.Conv2d) and m.stride != (1, 1)]
    assert 2 ** len(strides) == downsample
    transposed = any(isinstance(m, nn.ConvTranspose2d) for m in codec.decoder)
    assert transposed == (upsample == "conv_transpose")
    made = codec(images, torch.zeros_like(latents))
    assert torch.equal(made.images, codec.decode(latents)) and made.divergence == 0
    with pytest.raises(ConfigError, match="downsample 3"):
        ConvAutoencoderConfig(downsample=3)


@torch.no_grad()
def test_a_variational_one_draws_and_knows_its_divergence() -> None:
    torch.manual_seed(0)
    codec = ConvAutoencoder(ConvAutoencoderConfig(frame=(84, 84, 1), downsample=4, width=8, variational=True))
    images = torch.rand(2, 1, 84, 84)
    mean, log_variance = codec.distribution(images)
    assert log_variance is not None and mean.shape == (2, 16, 21, 21) and torch.equal(codec.encode(images), mean)
    noise = torch.randn_like(mean)
    made = codec(images, noise)
    expected = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(0.0, 1.0)).mean()
    assert torch.allclose(made.divergence, expected, rtol=1e-4)
    assert torch.allclose(made.images, codec.decode(mean + (log_variance / 2).exp() * noise), atol=1e-6)


@torch.no_grad()
def test_pixels_are_their_own_latents() -> None:
    codec = Pixels(PixelsConfig((84, 84, 1)))
    images = torch.rand(2, 1, 84, 84)
    assert torch.equal(codec.decode(codec.encode(images)), images) and codec.spec == LatentSpec((1, 84, 84), "pixels")
    with pytest.raises(ConfigError, match="square"):
        PixelsConfig((84, 64, 1))


def test_frames_are_seen_as_gymnasiums_wrappers_make_them() -> None:
    import gymnasium as gym
    from gymnasium.wrappers import GrayscaleObservation, ResizeObservation

    frames = np.random.default_rng(0).integers(0, 256, (5, *NATIVE), dtype=np.uint8)

    class Still(gym.Env):
        observation_space = gym.spaces.Box(0, 255, NATIVE, np.uint8)
        action_space = gym.spaces.Discrete(2)
        at = 0

        def reset(self, **_: object) -> tuple[np.ndarray, dict]:
            self.at += 1
            return frames[self.at - 1], {}

    env = ResizeObservation(GrayscaleObservation(Still()), (84, 84))
    expected = np.stack([env.reset()[0] for _ in frames])
    assert np.array_equal(observe(frames, (84, 84, 1))[..., 0], expected)
    assert observe(frames, NATIVE) is frames and observe(frames[None], (64, 64, 1)).shape == (1, 5, 64, 64, 1)
