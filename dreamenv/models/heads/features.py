"""An outcome head that reads what the dynamics have found in the picture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.errors import ConfigError
from dreamenv.models.blocks import group_norm, zero_init
from dreamenv.models.interface import NULL_ACTION, OutcomeHead, OutcomeHeadConfig, State
from dreamenv.models.registry import register

_COARSE = 4  # parts of the picture along each axis


@dataclass(frozen=True)
class FeatureHeadConfig(OutcomeHeadConfig):
    """Shape of a head on the dynamics' features, and the joint outcomes it tells apart."""

    width: int = 64
    """Channels."""
    features: int = 64
    """Channels of the dynamics' features; training takes them from the dynamics."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        super().__post_init__()
        check(1 <= self.features <= 4096, f"features {self.features}: must be 1..4096")


@register("head", "feature_head", FeatureHeadConfig)
class FeatureOutcomeHead(OutcomeHead):
    """Convolutions over the dynamics' features and the last latent, then maxima and a mean over places.

    Rewards and ends mostly come of small things that touch, in any place. To find those things takes far more steps
    than bring an outcome; the dynamics have learnt it from every step, so the head is told what they found (the hint
    `features`, of which they make the next picture). The maximum over places lets a touch that was seen in one be
    known in all others. Where it is counts in some games, as where the player stands in the middle: two coordinates
    tell it (Liu et al. 2018), and the maxima over sixteen parts of the picture. The actions, and of several the game,
    scale and shift what is found (FiLM, Perez et al. 2018).

    Args:
        config: its shape.
    """

    several: ClassVar[bool] = True
    places: Tensor
    config: FeatureHeadConfig

    def __init__(self, config: FeatureHeadConfig) -> None:
        super().__init__(config)
        c, height, width = config.latent.shape
        down, across = (torch.linspace(-1, 1, side) for side in (height, width))
        places = torch.stack(torch.meshgrid(down, across, indexing="ij"))[None]
        self.register_buffer("places", places, persistent=False)
        w = config.width
        self.features_norm = group_norm(config.features)
        sizes = [config.features + c + 2, w, w]
        self.convs = nn.ModuleList([nn.Conv2d(size, w, 3, padding=1) for size in sizes])
        self.norms = nn.ModuleList([group_norm(w) for _ in sizes])
        self.action = nn.Embedding(NULL_ACTION + 1, 32)
        self.game = nn.Embedding(len(config.games), 32) if config.games else None
        told = 32 * (config.context + bool(config.games))
        self.films = nn.ModuleList([zero_init(nn.Linear(told, 2 * w)) for _ in sizes])
        self.hidden = nn.Linear((2 + _COARSE**2) * w, 128)
        self.out = nn.Linear(128, len(config.rewards))

    @property
    def hinted(self) -> Mapping[str, tuple[int, ...]]:
        """See `OutcomeHead.hinted`: the features, on the latents' grid."""
        return {"features": (self.config.features, *self.spec.shape[1:])}

    def logits(self, state: State, action: Tensor, hints: Mapping[str, Tensor]) -> Tensor:
        """See `OutcomeHead.logits`.

        Raises:
            ConfigError: there is no hint `features`, float (B, features, H, W).
        """
        found, wanted = hints.get("features"), self.hinted["features"]
        if found is None or found.shape[1:] != wanted:
            shape = None if found is None else tuple(found.shape[1:])
            raise ConfigError(f"hint features {shape}: the head needs {wanted} from the dynamics; use dynamics with it")
        told = self.action(torch.cat([state.actions, action[:, None]], 1)).flatten(1)
        if self.game is not None:
            told = torch.cat([told, self.game(state["game"])], 1)
        places = self.places.to(found.dtype).expand(len(found), -1, -1, -1)
        found = (
            found.contiguous()
        )  # torch 2.13 crashes in GroupNorm's backward of channels-last input without a gradient
        x = torch.cat([self.features_norm(found), state.latents[:, -1].to(found.dtype), places], 1)
        for conv, norm, film in zip(self.convs, self.norms, self.films, strict=True):
            scale, shift = film(told)[:, :, None, None].chunk(2, 1)
            x = F.relu((1 + scale) * norm(conv(x)) + shift)
        coarse = F.adaptive_max_pool2d(x, _COARSE).flatten(1)
        x = torch.cat([x.amax((2, 3)), x.mean((2, 3)), coarse], 1)
        return self.out(F.relu(self.hidden(x))).float()
