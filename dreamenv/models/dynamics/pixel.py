"""The pixel world model: an encoder-decoder of pictures that predicts several next frames in one pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.models.blocks import group_norm
from dreamenv.models.interface import NULL_ACTION, Dynamics, LatentSpec, Prediction, State
from dreamenv.models.registry import register

_STAGES = 4


@dataclass(frozen=True)
class PixelWorldModelConfig:
    """Shape of the pixel world model."""

    latent: LatentSpec = LatentSpec((1, 84, 84), "pixels")
    """What the pictures are, as the codec `pixels` has them."""
    context: int = 4
    """K past frames it sees, with the K - 1 actions between them."""
    future: int = 4
    """Frames it predicts at once, each with the action that leads to it."""
    width: int = 32
    """Channels of the first stage; the others have twice and four times as many."""
    embedding: int = 32
    """Width of an action's embedding."""
    skips: bool = False
    """Whether the decoder sees the encoder's maps of its size (U-Net, Ronneberger et al. 2015)."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.latent.layout == "pixels", f"latent.layout {self.latent.layout!r}: must be 'pixels'")
        size = min(self.latent.shape[1:])
        check(size >= 16, f"latent.shape {self.latent.shape}: must have 16 or more rows and columns")
        check(1 <= self.context <= 64, f"context {self.context}: must be 1..64")
        check(1 <= self.future <= 64, f"future {self.future}: must be 1..64")
        check(8 <= self.width <= 1024, f"width {self.width}: must be 8..1024")
        check(1 <= self.embedding <= 1024, f"embedding {self.embedding}: must be 1..1024")


@register("dynamics", "pixel_world_model", PixelWorldModelConfig)
class PixelWorldModel(Dynamics):
    """Predicts frames from frames: four convolutional stages down, four up, conditioned by FiLM in every block.

    The condition is the flat row of the embeddings of past and future actions (FiLM, Perez et al. 2018); the first
    stage is shown where each pixel lies (CoordConv, Liu et al. 2018). The output are logits: a pixel is a probability,
    trained by cross-entropy. As dynamics it takes the first of its frames, with the actions of the others unknown; its
    expected squared error is that of a Bernoulli variable.
    """

    deterministic = True
    config: PixelWorldModelConfig

    def __init__(self, config: PixelWorldModelConfig) -> None:
        super().__init__()
        self.config = config
        c, k, w = config.latent.shape[0], config.context, config.width
        cond = (k - 1 + config.future) * config.embedding
        self.action_embedding = nn.Embedding(NULL_ACTION + 1, config.embedding)
        widths = [w, 2 * w, 4 * w, 4 * w]
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        for before, width in zip([c * k + 2, *widths], widths, strict=False):
            self.down.append(_Block(before, width, cond, 2))
        before = widths[-1]
        for width, larger in zip((4 * w, 2 * w, w, w), (4 * w, 2 * w, w, 0), strict=True):
            beside = larger if config.skips else 0
            self.up.append(_Block(before + beside, width, cond, 1))
            before = width
        self.out = nn.Conv2d(w, c * config.future, 3, padding=1)

    def logits(self, frames: Tensor, past: Tensor, future: Tensor) -> Tensor:
        """The next frames' logits, all in one pass.

        Args:
            frames: (B, K, c, h, w), images in [0, 1].
            past: int64 (B, K - 1), the actions between them.
            future: int64 (B, F), those that lead to the frames to predict; `NULL_ACTION` is unknown.

        Returns:
            (B, F, c, h, w).
        """
        c, h, w = self.config.latent.shape
        cond = self.action_embedding(torch.cat([past, future], 1)).flatten(1)
        rows, columns = (torch.linspace(-1, 1, n, device=frames.device, dtype=frames.dtype) for n in (h, w))
        place = torch.stack([rows[:, None].expand(h, w), columns[None].expand(h, w)])
        x = torch.cat([frames.flatten(1, 2), place.expand(len(frames), -1, -1, -1)], 1)
        maps = [x]
        for block in cast(list[_Block], self.down):
            x = block(x, cond)
            maps.append(x)
        for i, block in enumerate(cast(list[_Block], self.up)):
            larger = maps[_STAGES - 1 - i]
            x = F.interpolate(x, size=larger.shape[2:], mode="nearest")
            if self.config.skips and i < _STAGES - 1:
                x = torch.cat([x, larger], 1)
            x = block(x, cond)
        return self.out(x).float().unflatten(1, (self.config.future, c))

    def forward(self, state: State, action: Tensor, future: Tensor | None = None, **kwargs: Any) -> Any:
        """`predict`; with all future actions int64 (B, F) the `logits` of all their frames, for training."""
        if future is None:
            return self.predict(state, action, **kwargs)
        return self.logits(state.latents, state.actions, future)

    def predict(
        self,
        state: State,
        action: Tensor,
        x: Tensor | None = None,
        tau: Tensor | None = None,
        level: Tensor | None = None,
        hints: Mapping[str, Tensor] | None = None,
        span: Tensor | None = None,
    ) -> Prediction:
        """See `Dynamics.predict`: the first of the frames; it knows no noise, and has no hints."""
        future = F.pad(action[:, None], (0, self.config.future - 1), value=NULL_ACTION)
        first = self.logits(state.latents, state.actions, future)[:, 0].sigmoid()
        variance = (first * (1 - first)).mean(1)
        return Prediction(first, variance.clamp_min(1e-6).log())


class _Block(nn.Module):
    """Two convolutions, the first of which may halve the side, each with GroupNorm, FiLM and ReLU."""

    def __init__(self, c_in: int, c_out: int, cond: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(c_in, c_out, 3, stride, 1)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.norm1, self.norm2 = group_norm(c_out), group_norm(c_out)
        self.film = nn.Linear(cond, 4 * c_out)

    def forward(self, x: Tensor, cond: Tensor) -> Tensor:
        gamma1, beta1, gamma2, beta2 = self.film(cond)[:, :, None, None].chunk(4, 1)
        x = F.relu((1 + gamma1) * self.norm1(self.conv1(x)) + beta1)
        return F.relu((1 + gamma2) * self.norm2(self.conv2(x)) + beta2)
