"""Augmented random search (Mania et al. 2018) with the IMPALA network, on a batch of environments."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import sb3_contrib
from sb3_contrib.ars.policies import ARSPolicy
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor
from torch import nn


class ImpalaARSPolicy(ARSPolicy):
    """ARS's policy on a features extractor, which sb3-contrib's own, made for vectors, does not take.

    Args:
        observation_space: uint8 (3, 64, 64).
        action_space: discrete.
        net_arch, features_extractor_class, features_extractor_kwargs: as other policies of SB3 have them.
    """

    def __init__(
        self,
        observation_space: gym.Space,
        action_space: gym.Space,
        net_arch: list[int],
        features_extractor_class: type[BaseFeaturesExtractor],
        features_extractor_kwargs: dict[str, Any],
    ) -> None:
        super().__init__(observation_space, action_space, net_arch)
        self.features_extractor_class, self.features_extractor_kwargs = (
            features_extractor_class,
            features_extractor_kwargs,
        )
        self.features_extractor = self.make_features_extractor()
        self.features_dim = self.features_extractor.features_dim
        first = self.action_net[0]
        assert isinstance(first, nn.Linear)
        self.action_net[0] = nn.Linear(self.features_dim, first.out_features)


class ARS(sb3_contrib.ARS):
    """sb3-contrib's, but `num_timesteps` counts each step of the batch once.

    Its own is told of a step once by every environment still at play, and adds the whole batch each time.
    """

    _last = -1  # the environment that told last; a step's tellings come in rising order

    def _trigger_callback(
        self, _locals: dict[str, Any], _globals: dict[str, Any], callback: BaseCallback, n_envs: int
    ) -> None:
        if _locals["i"] <= self._last or self._last < 0:
            super()._trigger_callback(_locals, _globals, callback, n_envs)
        self._last = _locals["i"]
