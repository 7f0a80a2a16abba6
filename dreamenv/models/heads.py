"""The outcome head: what reward an action earns and whether it ends the episode."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.actions import NUM_ACTIONS
from dreamenv.config import check
from dreamenv.models.blocks import ResBlock, group_norm
from dreamenv.models.registry import register_model


@dataclass(frozen=True)
class OutcomeHeadConfig:
    """Shape of the head, and the joint outcomes it tells apart."""

    latent_channels: int = 16
    """C of the latents."""
    latent_size: int = 16
    """H = W of the latents."""
    context: int = 4
    """K latents and actions it sees: the dynamics' context."""
    width: int = 48
    """Channels."""
    rewards: tuple[float, ...] = (0.0, 0.0, 10.0)
    """Reward of each joint outcome, in the game's own magnitude."""
    terminated: tuple[bool, ...] = (False, True, True)
    """Whether each joint outcome ends the episode."""
    bias: tuple[float, ...] = ()
    """Added to the logits: the prior correction for class-balanced training (King & Zeng 2001), and calibration."""
    scale: float = 1.0
    """Multiplies the logits before the bias (calibration, Platt 1999)."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(1 <= len(self.rewards) <= 1024, f"rewards: must have 1..1024 outcomes, got {len(self.rewards)}")
        check(len(self.terminated) == len(self.rewards),
              f"terminated {self.terminated}: must have one entry per outcome, {len(self.rewards)}")
        check(len(self.bias) in (0, len(self.rewards)), f"bias {self.bias}: must be empty or one per outcome")
        check(4 <= self.latent_size <= 64 and self.latent_size % 4 == 0,
              f"latent_size {self.latent_size}: must be a multiple of 4 in 4..64")
        check(1 <= self.latent_channels <= 256, f"latent_channels {self.latent_channels}: must be 1..256")
        check(1 <= self.context <= 64, f"context {self.context}: must be 1..64")
        check(8 <= self.width <= 2048, f"width {self.width}: must be 8..2048")


@register_model("outcome_head", OutcomeHeadConfig)
class OutcomeHead(nn.Module):
    """A categorical over the joint (reward, terminated) outcomes that occur in the game.

    One joint distribution keeps them consistent (a CoinRun coin always ends the episode); the reward and termination
    probabilities are its marginals. It sees only the past and the action, because Procgen shows no terminal frame.
    """

    def __init__(self, config: OutcomeHeadConfig) -> None:
        super().__init__()
        self.config = config
        w, side = config.width, config.latent_size // 4
        self.stem = nn.Conv2d(config.latent_channels * config.context, w, 3, padding=1)
        self.action = nn.Embedding(NUM_ACTIONS + 1, 32)
        self.blocks = nn.ModuleList([ResBlock(w, w, 32 * config.context) for _ in range(3)])
        self.norm = group_norm(w)
        self.hidden = nn.Linear(w * side * side + w, 128)
        self.out = nn.Linear(128, len(config.rewards))
        self.register_buffer("reward_values", torch.tensor(config.rewards), persistent=False)
        self.register_buffer("terminal", torch.tensor(config.terminated, dtype=torch.float32), persistent=False)
        self.register_buffer("prior", torch.tensor(config.bias or (0.0,) * len(config.rewards)), persistent=False)

    def forward(self, context: Tensor, actions: Tensor) -> Tensor:
        """Context (B, K, C, H, W), actions int64 (B, K) -> uncorrected logits (B, outcomes)."""
        cond = self.action(actions).flatten(1)
        x = self.stem(context.flatten(1, 2))
        for i, block in enumerate(self.blocks):
            if i:
                x = F.max_pool2d(x, 2)
            x = block(x, cond)
        x = F.silu(self.norm(x))
        x = torch.cat([x.flatten(1), x.amax((2, 3))], 1)
        return self.out(F.silu(self.hidden(x))).float()

    def log_probabilities(self, context: Tensor, actions: Tensor) -> Tensor:
        """Calibrated log-probabilities (B, outcomes) of the joint outcomes."""
        return (self.config.scale * self(context, actions) + self.prior).log_softmax(1)
