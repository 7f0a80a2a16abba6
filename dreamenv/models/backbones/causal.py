"""A transformer over tokens of successive frames: space within each, time causally."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.models.blocks import Attention, cell_positions, modulated, zero_init


class CausalTransformer(nn.Module):
    """Blocks of attention in a frame, attention back in time at each place, and a perceptron (AdaLN-zero).

    Args:
        width: of a token.
        depth: blocks.
        heads: attention heads.
        window: how many frames back a frame attends.
    """

    def __init__(self, width: int, depth: int, heads: int, window: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(_Block(width, heads, window) for _ in range(depth))
        self.modulation = zero_init(nn.Linear(width, 2 * width))

    def forward(
        self, tokens: Tensor, cond: Tensor, grid: tuple[int, int], keys: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One pass over new frames.

        Args:
            tokens: (B, T, N, width), of T successive frames of N = rows x columns tokens.
            cond: (B, T, width).
            grid: rows and columns.
            keys: (B, S, blocks, N, 2 width), keys and values of the frames before, the newest last; or None.

        Returns:
            Tokens (B, T, N, width), and their own keys and values (B, T, blocks, N, 2 width).
        """
        h = tokens + cell_positions(*grid, tokens.shape[3], tokens.device).to(tokens.dtype)
        made = []
        for i, block in enumerate(cast(list[_Block], self.blocks)):
            h, own = block(h, cond, None if keys is None else keys[:, :, i])
            made.append(own)
        return modulated(h, *self.modulation(cond).chunk(2, 2)), torch.stack(made, 2)


class _Block(nn.Module):
    """Three residual branches, each of which begins as the identity."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.space = Attention(width, heads)
        self.time = _TimeAttention(width, heads, window)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))
        self.modulation = zero_init(nn.Linear(width, 9 * width))

    def forward(self, x: Tensor, cond: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, N, width), conditions (B, T, width), keys (B, S, N, 2 width) -> tokens, their keys."""
        b, width = x.shape[0], x.shape[3]
        parts = self.modulation(cond).unflatten(2, (9, width)).unbind(2)  # shift, scale, gate of each branch
        here = self.space(modulated(x, *parts[:2]).flatten(0, 1)).unflatten(0, (b, -1))
        x = x + parts[2].unsqueeze(2) * here
        back, own = self.time(modulated(x, *parts[3:5]), keys)
        x = x + parts[5].unsqueeze(2) * back
        return x + parts[8].unsqueeze(2) * self.mlp(modulated(x, *parts[6:8])), own


class _TimeAttention(nn.Module):
    """Attention of each token to those at its place, in its own frame and in up to `window` frames before.

    Keys are told how far back they are by an embedding of the distance (Shaw et al. 2018), so that they can be kept
    while time goes on.
    """

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.query, self.key_value = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.distance = nn.Embedding(window + 1, width)
        nn.init.normal_(self.distance.weight, std=0.02)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, keys: Tensor | None) -> tuple[Tensor, Tensor]:
        """Tokens (B, T, N, width), keys and values (B, S, N, 2 width) of before -> tokens, keys and values of these."""
        b, t, n, width = x.shape
        own = self.key_value(x)
        pairs = own if keys is None else torch.cat([keys.to(own.dtype), own], 1)
        s = pairs.shape[1]
        q, k, v = (
            y.transpose(1, 2).reshape(b * n, -1, self.heads, width // self.heads).transpose(1, 2)
            for y in (self.query(x), *pairs.chunk(2, -1))
        )
        back = torch.arange(s - t, s, device=x.device)[:, None] - torch.arange(s, device=x.device)  # (T, S)
        seen = (back >= 0) & (back <= self.window)
        distances = self.distance.weight.view(-1, self.heads, width // self.heads).transpose(0, 1)
        bias = q @ distances.to(q.dtype).transpose(1, 2) / math.sqrt(q.shape[-1])  # (B N, heads, T, window + 1)
        index = back.clamp(0, self.window).expand(*bias.shape[:2], -1, -1)
        bias = bias.gather(3, index).masked_fill(~seen, -torch.inf)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.to(q.dtype))
        out = out.transpose(1, 2).flatten(2).unflatten(0, (b, n)).transpose(1, 2)
        return self.out(out), own
