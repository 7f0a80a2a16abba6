"""A flow by a causal transformer over time, which keeps what it made of past frames instead of computing it anew."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.models.backbones.causal import CausalTransformer
from dreamenv.models.blocks import sinusoidal, zero_init
from dreamenv.models.interface import NULL_ACTION, Dynamics, LatentSpec, Prediction, State
from dreamenv.models.registry import register


@dataclass(frozen=True)
class CausalFlowConfig:
    """Shape of the causal flow."""

    latent: LatentSpec = LatentSpec((16, 16, 16))
    """What the latents are; training takes it from the codec."""
    context: int = 8
    """K past latents that a frame attends to."""
    width: int = 128
    """Channels of a token."""
    depth: int = 4
    """Blocks."""
    heads: int = 4
    """Attention heads."""
    patch: int = 2
    """Cells on a side of one token; must divide the grid."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(not self.latent.known, f"latent.known {self.latent.known}: must be 0, it predicts learnt content only")
        check(1 <= self.context <= 64, f"context {self.context}: must be 1..64")
        check(8 <= self.width <= 4096 and self.width % 4 == 0, f"width {self.width}: must be a multiple of 4, 8..4096")
        check(1 <= self.depth <= 64, f"depth {self.depth}: must be 1..64")
        check(
            1 <= self.heads <= 64 and self.width % self.heads == 0,
            f"heads {self.heads}: must be 1..64 and divide width {self.width}",
        )
        check(1 <= self.patch <= 16, f"patch {self.patch}: must be 1..16")


@register("dynamics", "causal_flow", CausalFlowConfig)
class CausalFlow(Dynamics):
    """Each frame is a set of tokens with a noise level of its own and the action that led to it.

    Tokens attend to those of their frame, and to those at the same place in the K frames before. What the past frames
    are attended to with, keys and values of every block, is kept in the state (`keys`, a KV cache) and grows by one
    frame a step while the oldest leaves. So a step costs one frame's tokens, however long the context, and the state
    carries more than K frames: each of them was computed while it still saw the K before itself.

    Guidance hides the action taken now; those before it are in the keys.

    Source: diffusion forcing (Chen et al. 2024) for levels by frame; attention factorised over space and time (ViViT,
    Arnab et al. 2021); relative positions in time (Shaw et al. 2018).
    """

    frame_levels = True
    config: CausalFlowConfig

    def __init__(self, config: CausalFlowConfig) -> None:
        super().__init__()
        self.config = config
        c, w, p = config.latent.shape[0], config.width, config.patch
        divides = all(size % p == 0 for size in config.latent.shape[1:])
        check(divides, f"patch {p}: must divide the grid of {config.latent.shape[1:]} cells")
        self.stem = nn.Conv2d(c, w, p, p)
        self.action_embedding = nn.Embedding(NULL_ACTION + 1, w)
        self.condition = nn.Sequential(nn.Linear(3 * w, 2 * w), nn.SiLU(), nn.Linear(2 * w, w), nn.SiLU())
        self.transformer = CausalTransformer(w, config.depth, config.heads, config.context)
        self.out = zero_init(nn.Linear(w, (c + 1) * p * p))

    def begin(
        self,
        latents: Tensor,
        actions: Tensor,
        past: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        level: Tensor | None = None,
    ) -> State:
        """See `Dynamics.begin`; `keys` float32 (B, K, blocks, N, 2 width) are those of the context's frames."""
        state = super().begin(latents, actions)
        b, k = state.latents.shape[:2]
        before = F.pad(state.actions, (1, 0), value=NULL_ACTION)
        tau = torch.ones(b, k, device=latents.device)
        levels = torch.zeros_like(tau) if level is None else level.view(b, -1)
        levels = torch.cat([levels[:, :1].expand(b, k - levels.shape[1]), levels], 1)
        _, keys = self.frames(state.latents, before, tau, levels)
        return state.replace(keys=keys)

    def frames(
        self, x: Tensor, actions: Tensor, tau: Tensor, level: Tensor, keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """What the network says of successive frames.

        Args:
            x: (B, T, C, H, W), each at its `tau` on the path from noise.
            actions: int64 (B, T), each the one that led to its frame.
            tau: (B, T) in [0, 1].
            level: (B, T), the standard deviation of noise added to clean latents.
            keys: (B, S, blocks, N, 2 width), of the frames before; None: there are none.

        Returns:
            Of each frame the change it makes to the latent before it, and one channel more, the log of its expected
            squared error, (B, T, C + 1, H, W); and the frames' keys (B, T, blocks, N, 2 width).
        """
        b, t = actions.shape
        w, p = self.config.width, self.config.patch
        rows, columns = (size // p for size in self.config.latent.shape[1:])
        tokens = self.stem(x.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (b, t))
        scalars = [sinusoidal(value.flatten(), w).view(b, t, w).to(tokens.dtype) for value in (tau, level)]
        cond = self.condition(torch.cat([self.action_embedding(actions).to(tokens.dtype), *scalars], 2))
        tokens, made = self.transformer(tokens, cond, (rows, columns), keys)
        maps = self.out(tokens).transpose(2, 3).unflatten(3, (rows, columns))
        return F.pixel_shuffle(maps.flatten(0, 1), p).unflatten(0, (b, t)), made

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
        """See `Dynamics.predict`; the context's noise is in the keys already, and it has no hints."""
        last = state.latents[:, -1]
        tau = torch.zeros(len(last), device=last.device) if tau is None else tau
        noisy = torch.zeros_like(last) if x is None else x * tau[:, None, None, None]
        out, _ = self.frames(noisy[:, None], action[:, None], tau[:, None], 0 * tau[:, None], state["keys"])
        change, log_error = out[:, 0].split([last.shape[1], 1], 1)
        return Prediction((last + change).float(), log_error[:, 0].float())

    def advance(self, state: State, action: Tensor, latent: Tensor) -> State:
        """See `Dynamics.advance`: the keys of the new frame take the place of the oldest's."""
        one = torch.ones(len(action), 1, device=latent.device)
        _, made = self.frames(latent[:, None], action[:, None], one, 0 * one, state["keys"])
        keys = torch.cat([state["keys"][:, 1:].to(made.dtype), made], 1)
        return super().advance(state, action, latent).replace(keys=keys)
