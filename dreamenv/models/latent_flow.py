"""The latent dynamics: a conv U-Net with dynamic filters that predicts the clean next latent (x-prediction)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from dreamenv.actions import NUM_ACTIONS
from dreamenv.config import check
from dreamenv.flow import SamplerConfig, sample
from dreamenv.models.blocks import DynamicFilters, UNet, sinusoidal
from dreamenv.models.registry import register_model

NULL_ACTION = NUM_ACTIONS  # an extra embedding: "action unknown", for guidance and dropped actions


@dataclass(frozen=True)
class LatentFlowConfig:
    """Shape of the U-Net."""

    latent_channels: int = 16
    """C of the latents."""
    context: int = 4
    """K past latents the model sees, with the K - 1 actions between them and the current one."""
    channels: tuple[int, ...] = (64, 96, 128)
    """Width per resolution level; each level halves the grid."""
    blocks: tuple[int, ...] = (1, 2, 2)
    """Residual blocks per level, on the way down and (but for the last level) up."""
    embedding: int = 128
    """Width of the conditioning vector."""
    filter_bank: int = 24
    """Dynamic filters; 0 turns them off."""
    filter_size: int = 5
    """Their kernel size, in cells."""
    global_noise: bool = False
    """Whether the conditioning of all cells sees the noise too, so that a draw can commit to one camera position everywhere."""
    gate: bool = False
    """Whether each cell's change is multiplied by a gate in 0..1, so that what stands still can be copied exactly."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(1 <= self.latent_channels <= 256, f"latent_channels {self.latent_channels}: must be 1..256")
        check(1 <= self.context <= 64, f"context {self.context}: must be 1..64")
        check(1 <= len(self.channels) <= 5, f"channels {self.channels}: must have 1..5 levels")
        check(len(self.blocks) == len(self.channels),
              f"blocks {self.blocks}: must have one entry per level, {len(self.channels)}")
        check(8 <= min(self.channels) and max(self.channels) <= 2048, f"channels {self.channels}: must be 8..2048 each")
        check(1 <= min(self.blocks) and max(self.blocks) <= 64, f"blocks {self.blocks}: must be 1..64 each")
        check(8 <= self.embedding <= 4096 and self.embedding % 4 == 0,
              f"embedding {self.embedding}: must be a multiple of 4 in 8..4096")
        check(0 <= self.filter_bank <= 512, f"filter_bank {self.filter_bank}: must be 0..512")
        for name in ("global_noise", "gate"):
            check(isinstance(getattr(self, name), bool), f"{name} {getattr(self, name)!r}: must be true or false")
        check(self.filter_size % 2 == 1 and 1 <= self.filter_size <= 15, f"filter_size {self.filter_size}: must be odd, 1..15")


@register_model("latent_flow", LatentFlowConfig)
class LatentFlow(UNet):
    """Predicts the clean next latent, and how wrong it expects to be, from a noisy one and the context.

    At tau = 0 the noisy latent is pure noise and carries nothing; it is gated out (multiplied by tau), so the
    deterministic predictor of SEED phase 2 *is* this network at tau = 0, and one function evaluation needs no noise.

    Source: flow matching (Lipman et al. 2023) with x-prediction; context noise with
    its level as an input (GameNGen, Valevski et al. 2024); noise that conditions the whole picture (FGN, Alet et al. 2025).
    """

    def __init__(self, config: LatentFlowConfig) -> None:
        c, k, e, widths = config.latent_channels, config.context, config.embedding, config.channels
        super().__init__(c * (k + 1), c + 1 + config.gate, widths, config.blocks, e)
        self.config = config
        self.action_embedding = nn.Embedding(NUM_ACTIONS + 1, e // 2)
        seen = (k + 2) * (e // 2) + c * config.global_noise
        self.condition = nn.Sequential(nn.Linear(seen, 2 * e), nn.SiLU(), nn.Linear(2 * e, e), nn.SiLU())
        if config.gate:
            nn.init.constant_(cast(Tensor, self.out.bias)[c + 1 :], 4.0)  # begins open
        self.filters = DynamicFilters(c, widths[0], config.filter_bank, config.filter_size) if config.filter_bank else None

    def forward(self, noisy: Tensor | None, tau: Tensor, context: Tensor, actions: Tensor,
                context_noise: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Predict the next latent.

        Args:
            noisy: (B, C, H, W), the point at `tau` on the path from noise to the next latent; None means tau = 0.
            tau: (B,) in [0, 1).
            context: (B, K, C, H, W), past latents, the current one last.
            actions: int64 (B, K), the K - 1 actions between them and the one taken now; `NULL_ACTION` is unknown.
            context_noise: (B,) standard deviation of the noise in the context.

        Returns:
            The clean latent (B, C, H, W), and the log of its expected squared error per cell (B, H, W).
        """
        b, k, c, h, w = context.shape
        last = context[:, -1]
        gated = torch.zeros_like(last) if noisy is None else noisy * tau[:, None, None, None]
        half = self.config.embedding // 2
        scalars = [sinusoidal(tau, half).to(last.dtype), sinusoidal(context_noise, half).to(last.dtype)]
        if self.config.global_noise:
            scalars.append(4 * alternating(gated))  # of unit variance half-way, where tau (1 - tau) is a quarter
        cond = self.condition(torch.cat([self.action_embedding(actions).flatten(1), *scalars], 1))
        x = self.features(torch.cat([gated, context.reshape(b, k * c, h, w)], 1), cond)
        out = self.out(x)
        change = out[:, :c]
        if self.filters is not None:
            change = change + self.filters(last, x)
        if self.config.gate:
            change = change * out[:, c + 1 :].sigmoid()
        return last + change, out[:, c].float()


def alternating(x: Tensor) -> Tensor:
    """Alternating sum of each channel of (B, C, H, W) -> (B, C), scaled so that white noise keeps its variance.

    Pictures, which change slowly from cell to cell, give little: it reads the noise and hardly what it was mixed with.
    """
    h, w = x.shape[-2:]
    sign = 1 - 2 * ((torch.arange(h, device=x.device)[:, None] + torch.arange(w, device=x.device)) % 2)
    return (x * sign).sum((2, 3)) / (h * w) ** 0.5


def draw_next(model: nn.Module, context: Tensor, actions: Tensor, noise: Tensor | None,
              sampler: SamplerConfig, memory: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Draw the next latent, guided by the action if the sampler says so.

    Args:
        model: a `LatentFlow` or `TileFlow`.
        context: (B, K, C, H, W), the current latent last.
        actions: int64 (B, K), the one taken now last.
        noise: standard normal (B, C, H, W); may be None where `sampler.stochastic` is False.
        sampler: how.
        memory: what the model remembers beyond the context, see `UNet.recall`; None is what it recalls of the context.

    Returns:
        The latent float32 (B, C, H, W), and the log error that the first evaluation expected, (B, H, W).
    """
    zero = torch.zeros(len(context), device=context.device)
    remembered = {} if memory is None or not memory.numel() else {"memory": memory}

    def network(x: Tensor | None, tau: float, given: Tensor, beside: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options = remembered if beside is None else remembered | cast(UNet, model).beside(beside)
        clean, log_error = model(x, zero + tau, context, given, zero, **options)
        return clean.float(), log_error

    def predict(x: Tensor | None, tau: float) -> tuple[Tensor, Tensor]:
        clean, log_error = network(x, tau, actions)
        if sampler.guidance_scale != 1:
            unaware, _ = network(x, tau, torch.full_like(actions, NULL_ACTION), clean)
            clean = cast(UNet, model).guided(clean, unaware, sampler.guidance_scale)
        return clean, log_error

    return sample(predict, noise, sampler)
