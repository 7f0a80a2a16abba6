"""The IMPALA network inside Stable-Baselines3's policies: the same layers as a saved agent's, under the same names."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from dreamenv.device import pick_precision
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig


class ImpalaExtractor(BaseFeaturesExtractor):
    """Residual conv stages 16/32/32 and a linear layer of 256 (Espeholt et al. 2018), as Procgen's PPO has them.

    Args:
        observation_space: uint8 (c, h, w), as SB3 hands it after its channels-first wrapper; or float32 (C, H, W), of
            latents.
        channels: width of each stage.
        features: width of the output.
        precision: "fp32", "bf16" autocast of these layers, or "auto": bf16 where the hardware has it.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        channels: tuple[int, ...] = (16, 32, 32),
        features: int = 256,
        precision: str = "auto",
    ) -> None:
        super().__init__(observation_space, features)
        c, h, w = observation_space.shape or (3, 64, 64)
        if observation_space.dtype == np.uint8:
            self.config = ImpalaConfig(tuple(channels), features, frame=(h, w, c))
        else:
            self.config = ImpalaConfig(tuple(channels), features, latent=(c, h, w))
        self.precision = precision
        self.trunk = ImpalaAgent(self.config).trunk

    def forward(self, observations: Tensor) -> Tensor:
        """Images float32 (B, c, h, w) in [0, 1], or latents -> features float32 (B, F)."""
        device = observations.device
        with torch.autocast(device.type, torch.bfloat16, enabled=pick_precision(self.precision, device) == "bf16"):
            return self.trunk(observations.contiguous(memory_format=torch.channels_last)).float()
