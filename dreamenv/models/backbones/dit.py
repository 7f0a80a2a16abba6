"""The diffusion transformer, conditioned by AdaLN-zero and, if asked, by attention to the actions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.models.blocks import Attention, cell_positions, modulated, zero_init
from dreamenv.models.interface import Backbone
from dreamenv.models.registry import register


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the transformer."""

    width: int = 128
    """Channels of a token."""
    depth: int = 4
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    patch: int = 2
    """Cells on a side of one token; must divide the grid."""
    features: int = 64
    """Channels of the features."""
    cross_attention: bool = False
    """Whether tokens attend to the sequence of actions too, each of which then tells its own frame from the others."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(8 <= self.width <= 4096 and self.width % 4 == 0, f"width {self.width}: must be a multiple of 4, 8..4096")
        check(1 <= self.depth <= 64, f"depth {self.depth}: must be 1..64")
        check(
            1 <= self.heads <= 64 and self.width % self.heads == 0,
            f"heads {self.heads}: must be 1..64 and divide width {self.width}",
        )
        check(1 <= self.patch <= 16, f"patch {self.patch}: must be 1..16")
        check(8 <= self.features <= 2048, f"features {self.features}: must be 8..2048")


@register("backbone", "dit", DiTConfig)
class DiT(Backbone):
    """Transformer over patches of cells (DiT, Peebles & Xie 2023): AdaLN-zero says the condition to every block.

    Positions are sines and cosines of row and column. Attention is PyTorch's `scaled_dot_product_attention`.
    """

    def __init__(self, config: DiTConfig, c_in: int, cond: int, tokens: int = 0) -> None:
        super().__init__()
        check(
            tokens > 0 or not config.cross_attention,
            "cross_attention True: these dynamics hand their backbone no sequence of actions; set it to false",
        )
        self.config, self.width, self.attends = config, config.features, config.cross_attention
        w, p = config.width, config.patch
        self.stem = nn.Conv2d(c_in, w, p, p)
        source = tokens if config.cross_attention else 0
        self.blocks = nn.ModuleList(_Block(w, config.heads, cond, source) for _ in range(config.depth))
        self.modulation = zero_init(nn.Linear(cond, 2 * w))
        self.out = nn.Linear(w, config.features * p * p)

    def forward(self, x: Tensor, cond: Tensor, tokens: Tensor | None = None) -> Tensor:
        """See `Backbone.forward`."""
        p = self.config.patch
        check(
            x.shape[2] % p == 0 and x.shape[3] % p == 0,
            f"patch {p}: must divide the grid of {x.shape[2]} x {x.shape[3]} cells",
        )
        maps = self.stem(x)
        height, width = maps.shape[2:]
        h = maps.flatten(2).transpose(1, 2)
        h = h + cell_positions(height, width, h.shape[2], h.device).to(h.dtype)
        for block in cast(list[_Block], self.blocks):
            h = block(h, cond, tokens)
        h = modulated(h, *self.modulation(cond).chunk(2, 1))
        return F.pixel_shuffle(self.out(h).transpose(1, 2).unflatten(2, (height, width)), p)


class _Block(nn.Module):
    """Attention, attention to the actions, and a perceptron; each begins as the identity (AdaLN-zero)."""

    def __init__(self, width: int, heads: int, cond: int, source: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.actions = Attention(width, heads, source) if source else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = zero_init(nn.Linear(cond, (9 if source else 6) * width))

    def forward(self, x: Tensor, cond: Tensor, tokens: Tensor | None) -> Tensor:
        parts = self.modulation(cond).unflatten(1, (-1, x.shape[2])).unbind(1)  # shift, scale, gate of each branch
        x = x + parts[2][:, None] * self.attention(modulated(x, *parts[:2]))
        if self.actions is not None:
            x = x + parts[8][:, None] * self.actions(modulated(x, *parts[6:8]), tokens)
        return x + parts[5][:, None] * self.mlp(modulated(x, *parts[3:5]))
