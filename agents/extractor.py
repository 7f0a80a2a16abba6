"""The IMPALA network as an SB3 features extractor: the same layers as a saved agent's, under the same names."""

from __future__ import annotations

import gymnasium as gym
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor

from dreamenv.models.impala import ImpalaAgent, ImpalaConfig


class ImpalaExtractor(BaseFeaturesExtractor):
    """Residual conv stages 16/32/32 and a linear layer of 256 (Espeholt et al. 2018), as Procgen's PPO has them.

    Args:
        observation_space: uint8 (3, 64, 64), as SB3 hands it after its channels-first wrapper.
        channels: width of each stage.
        features: width of the output.
    """

    def __init__(self, observation_space: gym.Space, channels: tuple[int, ...] = (16, 32, 32), features: int = 256) -> None:
        super().__init__(observation_space, features)
        self.config = ImpalaConfig(tuple(channels), features)
        self.trunk = ImpalaAgent(self.config).trunk

    def forward(self, observations: Tensor) -> Tensor:
        """Images float32 (B, 3, 64, 64) in [0, 1] -> features (B, F)."""
        return self.trunk(observations)
