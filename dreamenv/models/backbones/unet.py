"""The U-Net, and the parts of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.models.blocks import ResBlock, group_norm
from dreamenv.models.interface import Backbone
from dreamenv.models.registry import register


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the U-Net."""

    channels: tuple[int, ...] = (64, 96, 128)
    """Width per resolution level; each level halves the grid."""
    blocks: tuple[int, ...] = (1, 2, 2)
    """Residual blocks per level, on the way down and (but for the last level) up."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(1 <= len(self.channels) <= 5, f"channels {self.channels}: must have 1..5 levels")
        check(
            len(self.blocks) == len(self.channels),
            f"blocks {self.blocks}: must have one entry per level, {len(self.channels)}",
        )
        check(8 <= min(self.channels) and max(self.channels) <= 2048, f"channels {self.channels}: must be 8..2048 each")
        check(1 <= min(self.blocks) and max(self.blocks) <= 64, f"blocks {self.blocks}: must be 1..64 each")


@register("backbone", "unet", UNetConfig)
class UNet(Backbone):
    """U-Net (Ronneberger et al. 2015) of `ResBlock`s, each level half the grid before, conditioned by a vector."""

    local: ClassVar[bool] = True

    def __init__(self, config: UNetConfig, c_in: int, cond: int, tokens: int = 0) -> None:
        super().__init__()
        self.config = config
        widths, blocks = config.channels, config.blocks
        self.stem = nn.Conv2d(c_in, widths[0], 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        width = widths[0]
        for w, n in zip(widths, blocks, strict=True):
            self.down.append(nn.ModuleList(ResBlock(width if i == 0 else w, w, cond) for i in range(n)))
            width = w
        for level in range(len(widths) - 2, -1, -1):
            w = widths[level]
            self.up.append(nn.ModuleList(ResBlock(width + w if i == 0 else w, w, cond) for i in range(blocks[level])))
            width = w
        self.out_norm = group_norm(width)
        self.width = width

    def forward(self, x: Tensor, cond: Tensor, tokens: Tensor | None = None) -> Tensor:
        """See `Backbone.forward`."""
        halvings = 2 ** (len(self.config.channels) - 1)
        check(
            x.shape[2] % halvings == 0 and x.shape[3] % halvings == 0,
            f"channels {self.config.channels}: so many levels need a grid of a multiple of {halvings} cells, not "
            f"{x.shape[2]} x {x.shape[3]}",
        )
        x = self.stem(x)
        skips = []
        for level, blocks in enumerate(cast(list[nn.ModuleList], self.down)):
            if level:
                x = F.avg_pool2d(x, 2)
            for block in blocks:
                x = block(x, cond)
            skips.append(x)
        skips.pop()
        for blocks in cast(list[nn.ModuleList], self.up):
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
            x = torch.cat([x, skips.pop()], 1)
            for block in blocks:
                x = block(x, cond)
        return F.silu(self.out_norm(x))
