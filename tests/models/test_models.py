"""Networks, flow and metrics against closed forms and other libraries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio
from sklearn.decomposition import PCA
from sklearn.metrics import average_precision_score
from torch import nn

from dreamenv.contract.noise import branch_stream, draw_step, reset_generator
from dreamenv.evaluation.metrics import (
    average_precision,
    calibration_error,
    colour_bins,
    colour_frequencies,
    psnr,
    rare_pixels,
    squared_error,
)
from dreamenv.flow import SamplerConfig, integrate, interpolate, velocity
from dreamenv.models.blocks import DynamicFilters, alternating
from dreamenv.models.codecs.patches import PatchAutoencoder, PatchAutoencoderConfig
from dreamenv.models.dynamics.flow import LatentFlow, LatentFlowConfig
from dreamenv.models.interface import LatentSpec, Prediction, to_frames, to_images
from tests.conftest import predicted, toy_world_model
from trainers.labels import calibrate, joint_outcomes
from trainers.latent_data import channel_weights
from trainers.pixels import colour_weights, motion_mask, variance_penalty


def test_the_linear_path_starts_as_pca() -> None:
    torch.manual_seed(0)
    images = torch.rand(32, 3, 64, 64).cumsum(3) / 64
    autoencoder = PatchAutoencoder(PatchAutoencoderConfig(latent_channels=6, width=16, blocks=1))
    explained = autoencoder.init_pca(images)
    patches = torch.nn.functional.pixel_unshuffle(images, 4).permute(0, 2, 3, 1).reshape(-1, 48).double().numpy()
    pca = PCA(6).fit(patches)
    assert explained == pytest.approx(pca.explained_variance_ratio_.sum(), abs=1e-4)
    reconstruction, latents, _ = autoencoder(images, torch.zeros(1))
    theirs = torch.from_numpy(pca.inverse_transform(pca.transform(patches))).float()
    ours = torch.nn.functional.pixel_unshuffle(reconstruction, 4).permute(0, 2, 3, 1).reshape(-1, 48)
    assert torch.allclose(ours, theirs, atol=1e-4)
    assert torch.allclose(latents.var((0, 2, 3)), torch.ones(6), atol=1e-2)
    assert float(variance_penalty(latents.detach())) < 1e-3
    cells = torch.rand(latents.shape[0], 1, *latents.shape[2:], generator=torch.Generator().manual_seed(0)) < 0.3
    those = latents.detach().movedim(1, -1)[cells[:, 0]].double().numpy() + 0.5
    expected = ((those.var(0, ddof=1) - 1) ** 2 + those.mean(0) ** 2).mean()
    assert float(variance_penalty(latents.detach() + 0.5, cells)) == pytest.approx(expected, rel=1e-4)


def test_frames_and_images_are_inverse() -> None:
    frames = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), dtype=np.uint8))
    assert torch.equal(to_frames(to_images(frames)), frames)
    assert (
        to_frames(torch.full((1, 3, 64, 64), 7.0)).max() == 255
        and to_frames(torch.full((1, 3, 64, 64), -7.0)).max() == 0
    )


def test_dynamic_filters_can_shift_by_a_cell() -> None:
    filters = DynamicFilters(2, 3, bank=2, kernel=3)
    with torch.no_grad():
        filters.filters.weight.zero_()
        for c in range(2):
            filters.filters.weight[c, c, 1, 0] = 1  # filter 0 takes the cell to the left
            filters.filters.weight[2 + c, c, 1, 1] = 1  # filter 1 keeps
        filters.mix.bias.copy_(torch.tensor([1.0, 0.0]))
    latent = torch.randn(1, 2, 5, 5)
    shifted = filters(latent, torch.zeros(1, 3, 5, 5))
    assert torch.equal(shifted[..., 1:], latent[..., :-1]) and not shifted[..., 0].any()


def test_at_tau_zero_the_noise_is_gated_out() -> None:
    dynamics = toy_world_model().dynamics
    b, k, c = 2, 4, 8
    context, actions, zero = torch.randn(b, k, c, 16, 16), torch.randint(15, (b, k)), torch.zeros(b)
    plain = predicted(dynamics, context, actions).latent
    noisy = predicted(dynamics, context, actions, torch.randn(b, c, 16, 16), zero).latent
    later = predicted(dynamics, context, actions, torch.randn(b, c, 16, 16), zero + 0.5).latent
    assert torch.equal(plain, noisy) and not torch.allclose(plain, later)


def test_an_untrained_model_predicts_no_change() -> None:
    model = LatentFlow(
        LatentFlowConfig(
            latent=LatentSpec((3, 16, 16)),
            backbone={"type": "unet", "channels": (16, 16), "blocks": (1, 1)},
            embedding=16,
            filter_bank=2,
        )
    )
    context = torch.randn(2, 4, 3, 16, 16)
    found = predicted(model, context, torch.zeros(2, 4, dtype=torch.long))
    assert torch.equal(found.latent, context[:, -1]) and found.log_error.shape == (2, 16, 16)


@pytest.mark.parametrize(
    ("nfe", "solver"), [(1, "euler"), (2, "euler"), (5, "euler"), (1, "heun"), (3, "heun"), (7, "heun")]
)
def test_a_known_target_is_reached_in_exactly_nfe_evaluations(nfe: int, solver: str) -> None:
    target, calls, spans = torch.randn(2, 3, 4, 4), [], []

    def predict(x: torch.Tensor | None, tau: float, span: float) -> Prediction:
        calls.append(tau)
        spans.append(span)
        return Prediction(target, torch.zeros(2, 4, 4))

    out = integrate(predict, torch.randn(2, 3, 4, 4), SamplerConfig(nfe=nfe, solver=solver)).latent  # type: ignore[arg-type]
    assert torch.equal(out, target) and len(calls) == nfe and calls[0] == 0 and max(calls) < 1
    steps = nfe if solver == "euler" else (nfe + 1) // 2
    assert spans[0] == 0 and set(spans[1:]) <= {1 / steps}, "it is told a step's length only with a point on the path"


def test_the_sampler_transports_noise_to_a_gaussian() -> None:
    """For a Gaussian target the optimal x-prediction is known in closed form; many steps must recover its spread."""
    mean, std = 2.0, 0.5

    def predict(x: torch.Tensor | None, tau: float, span: float) -> Prediction:
        if x is None:
            return Prediction(torch.full((20000, 1, 1, 1), mean), torch.zeros(20000, 1, 1))
        gain = tau * std**2 / (tau**2 * std**2 + (1 - tau) ** 2)
        return Prediction(mean + gain * (x - tau * mean), torch.zeros(20000, 1, 1))

    noise = torch.randn(20000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    errors = {}
    for nfe, solver in ((8, "euler"), (65, "euler"), (65, "heun")):
        out = integrate(predict, noise, SamplerConfig(nfe=nfe, solver=solver)).latent  # type: ignore[arg-type]
        assert float(out.mean()) == pytest.approx(mean, abs=0.02)
        errors[nfe, solver] = abs(float(out.std()) - std)
    assert errors[65, "heun"] < errors[65, "euler"] < errors[8, "euler"] and errors[65, "heun"] < 0.01
    cold = integrate(predict, noise, SamplerConfig(nfe=8, temperature=0.0)).latent
    assert float(cold.std()) < 1e-6


def test_path_and_velocity_agree() -> None:
    noise, clean, tau = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.tensor([0.25, 0.25])
    x = interpolate(noise, clean, tau)
    assert torch.allclose(velocity(x, clean, 0.25), clean - noise, atol=1e-5)
    assert torch.allclose(interpolate(noise, clean, torch.zeros(2)), noise)


def test_noise_is_keyed_by_its_counters_alone() -> None:
    def draw(*key: int) -> tuple:
        uniform, noise = draw_step(*key, (3,))
        assert draw_step(*key, None)[0] == uniform and not draw_step(*key, None)[1].size
        return uniform, *noise.tolist()

    keys = [
        (s, b, e, t)
        for s in (0, 1, 2**63, 2**63 + 1, 2**64 - 1)
        for b in (0, 2**64 - 1)
        for e in (0, 1)
        for t in (0, 1)
    ]
    values = [draw(*k) for k in reversed(keys)][::-1]
    assert values == [draw(*k) for k in keys] and len(set(values)) == len(keys)
    assert reset_generator(0, 0).random() != draw_step(0, 0, 0, 0, None)[0]


def test_branches_of_branches_do_not_share_noise() -> None:
    streams = [branch_stream(parent, k) for parent in (0, 1, 2, 5) for k in range(1, 50)]
    assert len(set(streams)) == len(streams) and all(0 < s < 2**64 for s in streams)
    assert branch_stream(7, 0) == 7


def test_metrics_agree_with_scikit() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    assert float(psnr(squared_error(a, b).mean())) == pytest.approx(peak_signal_noise_ratio(a, b), abs=1e-4)
    assert float(psnr(0.0)) == 100
    scores, positive, weights = rng.random(500).round(2), rng.random(500) < 0.1, rng.random(500)
    assert average_precision(scores, positive) == pytest.approx(average_precision_score(positive, scores))
    assert average_precision(scores, positive, weights) == pytest.approx(
        average_precision_score(positive, scores, sample_weight=weights)
    )
    assert average_precision(scores, np.zeros(500, bool)) == 0
    nothing = np.where(scores > np.quantile(scores, 0.9), 0.0, weights)  # the likeliest stand for no sample
    kept = nothing > 0
    assert average_precision(scores, positive, nothing) == pytest.approx(
        average_precision_score(positive[kept], scores[kept], sample_weight=nothing[kept])
    )


def test_calibration_error_of_known_cases() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(200000)
    outcome = rng.random(200000) < p
    assert calibration_error(p, outcome) < 0.01
    assert calibration_error(np.ones(1000), np.arange(1000) < 300) == pytest.approx(0.7)
    assert calibration_error(np.array([0.9, 0.1]), np.array([True, False]), np.array([3.0, 1.0])) == pytest.approx(0.1)


def test_rare_colours() -> None:
    frames = np.zeros((20, 64, 64, 3), np.uint8)
    frames[0, :4, :4] = (255, 255, 0)
    frequencies = colour_frequencies(frames)
    assert frequencies.sum() == pytest.approx(1)
    assert rare_pixels(frames, frequencies).sum() == 16 and rare_pixels(frames, frequencies)[0, :4, :4].all()
    weights = colour_weights(torch.from_numpy(frequencies).float())[colour_bins(torch.from_numpy(frames))]
    assert weights[0, 0, 0] == pytest.approx(
        np.sqrt(0.01 / frequencies.min(where=frequencies > 0, initial=1)), rel=1e-3
    )
    assert weights[5].unique().tolist() == [1.0]


def test_motion_mask_is_the_dilated_difference() -> None:
    a = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
    b = a.clone()
    b[0, 10, 10, 1] = 200
    mask = motion_mask(b, a)[0]
    assert mask.sum() == 9 and mask[9:12, 9:12].all()


def test_channel_weights_are_the_decoders_sensitivity() -> None:
    autoencoder = PatchAutoencoder(PatchAutoencoderConfig(latent_channels=4, width=16, blocks=1))
    with torch.no_grad():
        autoencoder.linear_out.weight.copy_(
            torch.randn(48, 4, 1, 1) * torch.tensor([3.0, 1.0, 0.5, 0.1])[None, :, None, None]
        )
    weights = channel_weights(autoencoder, torch.randn(8, 4, 16, 16))
    energy = autoencoder.linear_out.weight.square().sum((0, 2, 3))
    assert torch.allclose(weights, energy / energy.mean(), rtol=1e-3)


def test_joint_outcomes_are_the_distinct_pairs() -> None:
    rewards = np.array([0, 0, 10, 0, 10, 1, 0], np.float32)
    ends = np.array([0, 1, 1, 0, 1, 0, 0], bool)
    outcomes, labels = joint_outcomes(rewards, ends, 8)
    assert outcomes[0] == (0.0, False) and set(outcomes) == {(0.0, False), (0.0, True), (10.0, True), (1.0, False)}
    assert [outcomes[i] for i in labels] == list(zip(rewards.tolist(), ends.tolist(), strict=True))
    few, labels = joint_outcomes(rewards, ends, 3)
    assert len(few) == 3 and all(few[i][1] == e for i, e in zip(labels, ends, strict=True))


def test_calibration_undoes_class_balancing() -> None:
    """Logits that are right for balanced classes must come out right for the true base rates."""
    generator = torch.Generator().manual_seed(0)
    labels = (torch.rand(60000, generator=generator) < 0.05).long()
    evidence = torch.randn(60000, generator=generator) + 2.0 * labels  # log-likelihood ratio: 2 x - 2
    logits = torch.stack(
        [torch.zeros(60000), 0.5 * (2 * evidence - 2)], 1
    )  # balanced prior, and half as sure as it should be
    scale, bias, _ = calibrate(logits, labels, torch.ones(60000))
    assert scale == pytest.approx(2.0, rel=0.05) and bias[0] == 0
    assert bias[1] == pytest.approx(np.log(0.05 / 0.95), abs=0.1)


def test_global_noise_reaches_every_cell_and_begins_without_effect() -> None:
    torch.manual_seed(0)
    backbone = {"type": "unet", "channels": (16, 32), "blocks": (1, 1)}
    shape = {"latent": LatentSpec((4, 32, 32)), "backbone": backbone, "embedding": 32, "filter_bank": 4}
    plain = LatentFlow(LatentFlowConfig(**shape))  # pyright: ignore[reportArgumentType]
    for parameter in plain.parameters():  # much of it begins at zero
        nn.init.normal_(parameter, std=0.1)
    model = LatentFlow(LatentFlowConfig(**shape, gate=True, global_noise=True))  # pyright: ignore[reportArgumentType]
    model.load_state_dict(model.grown(plain.state_dict()))
    context, actions, zero = torch.randn(2, 4, 4, 32, 32), torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2)
    noise, tau = torch.randn(2, 4, 32, 32), torch.full((2,), 0.5)
    before = [
        predicted(model, context, actions, noise, tau).latent,
        predicted(model, context, actions, noise, zero).latent,
    ]
    last = context[:, -1]
    assert (before[0] - last).detach() == pytest.approx(
        (predicted(plain, context, actions, noise, tau).latent - last).detach() * torch.tensor(4.0).sigmoid(), abs=1e-5
    )
    other = noise.clone()
    other[:, :, 0, 0] += 3

    def felt_far_away() -> float:
        difference = (
            predicted(model, context, actions, other, tau).latent
            - predicted(model, context, actions, noise, tau).latent
        )
        return float(difference[:, :, 28:, 28:].detach().abs().mean())

    little = felt_far_away()  # the group norms'
    nn.init.normal_(model.condition[0].weight[:, -4:])  # pyright: ignore
    assert felt_far_away() > 5 * little
    assert torch.equal(predicted(model, context, actions, noise, zero).latent, before[1]), (
        "at tau = 0 there is no noise"
    )
    assert alternating(torch.randn(2000, 4, 16, 16)).std() == pytest.approx(1, abs=0.05)
    assert alternating(torch.ones(1, 4, 16, 16)).abs().max() == 0
