"""The IMPALA network inside Stable-Baselines3's policies: the same layers as a saved agent's, under the same names."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from sb3_contrib.ars.policies import ARSPolicy
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import Tensor, nn

from dreamenv.bundle import pick_precision
from dreamenv.models.impala import ImpalaAgent, ImpalaConfig


class ImpalaExtractor(BaseFeaturesExtractor):
    """Residual conv stages 16/32/32 and a linear layer of 256 (Espeholt et al. 2018), as Procgen's PPO has them.

    Args:
        observation_space: uint8 (3, 64, 64), as SB3 hands it after its channels-first wrapper.
        channels: width of each stage.
        features: width of the output.
        precision: "fp32", "bf16" autocast of these layers, or "auto": bf16 where the hardware has it.
    """

    def __init__(self, observation_space: gym.Space, channels: tuple[int, ...] = (16, 32, 32), features: int = 256,
                 precision: str = "auto") -> None:  # fmt: skip
        super().__init__(observation_space, features)
        self.config = ImpalaConfig(tuple(channels), features)
        self.precision = precision
        self.trunk = ImpalaAgent(self.config).trunk

    def forward(self, observations: Tensor) -> Tensor:
        """Images float32 (B, 3, 64, 64) in [0, 1] -> features float32 (B, F)."""
        device = observations.device
        with torch.autocast(device.type, torch.bfloat16, enabled=pick_precision(self.precision, device) == "bf16"):
            return self.trunk(observations.contiguous(memory_format=torch.channels_last)).float()


class ImpalaARSPolicy(ARSPolicy):
    """ARS's policy on a features extractor, which sb3-contrib's own, made for vectors, does not take.

    Args:
        observation_space: uint8 (3, 64, 64).
        action_space: discrete.
        net_arch, features_extractor_class, features_extractor_kwargs: as other policies of SB3 have them.
    """

    def __init__(self, observation_space: gym.Space, action_space: gym.Space, net_arch: list[int],
                 features_extractor_class: type[BaseFeaturesExtractor],
                 features_extractor_kwargs: dict[str, Any]) -> None:  # fmt: skip
        super().__init__(observation_space, action_space, net_arch)
        self.features_extractor_class, self.features_extractor_kwargs = features_extractor_class, features_extractor_kwargs
        self.features_extractor = self.make_features_extractor()
        self.features_dim = self.features_extractor.features_dim
        first = self.action_net[0]
        assert isinstance(first, nn.Linear)
        self.action_net[0] = nn.Linear(self.features_dim, first.out_features)
