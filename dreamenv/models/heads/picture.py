"""An outcome head that looks at the whole picture."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.models.blocks import ResBlock, group_norm
from dreamenv.models.interface import NULL_ACTION, OutcomeHead, OutcomeHeadConfig, State
from dreamenv.models.registry import register


@register("head", "picture_head", OutcomeHeadConfig)
class PictureOutcomeHead(OutcomeHead):
    """Convolutions over the past latents, conditioned on the actions; it heeds no hints.

    Args:
        config: its shape; latents must be square, of 4..128 cells a side, up to 32 of them a multiple of 4. Larger ones
            are made about 16 a side first.
    """

    several: ClassVar[bool] = True

    def __init__(self, config: OutcomeHeadConfig) -> None:
        super().__init__(config)
        c, size, width = config.latent.shape
        step = size // 16 if size > 32 else 1
        check(
            size == width and 4 <= size <= 128 and (step > 1 or size % 4 == 0),
            f"latent.shape {config.latent.shape}: a picture head needs a square of 4..128, up to 32 a multiple of 4",
        )
        w, side = config.width, size // step // 4
        self.stem = nn.Conv2d(c * config.context, w, step + 2, step, padding=1)
        self.action = nn.Embedding(NULL_ACTION + 1, 32)
        several = bool(config.games)
        self.game = nn.Embedding(len(config.games), 32) if several else None
        self.blocks = nn.ModuleList([ResBlock(w, w, 32 * (config.context + several)) for _ in range(3)])
        self.norm = group_norm(w)
        self.hidden = nn.Linear(w * side * side + w, 128)
        self.out = nn.Linear(128, len(config.rewards))

    def logits(self, state: State, action: Tensor, hints: Mapping[str, Tensor]) -> Tensor:
        """See `OutcomeHead.logits`."""
        cond = self.action(torch.cat([state.actions, action[:, None]], 1)).flatten(1)
        if self.game is not None:
            cond = torch.cat([cond, self.game(state["game"])], 1)
        x = self.stem(state.latents.flatten(1, 2))
        for i, block in enumerate(self.blocks):
            if i:
                x = F.max_pool2d(x, 2)
            x = block(x, cond)
        x = F.silu(self.norm(x))
        x = torch.cat([x.flatten(1), x.amax((2, 3))], 1)
        return self.out(F.silu(self.hidden(x))).float()
