"""The outcome head: what an action brings, as one distribution over the outcomes that occur in the game."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from dreamenv.config import check, check_games
from dreamenv.models.latents import LatentSpec
from dreamenv.models.state import State

_NEVER = -1e4  # a logit whose probability is 0


@dataclass(frozen=True)
class OutcomeHeadConfig:
    """Shape of a head, and the joint outcomes it tells apart."""

    latent: LatentSpec = LatentSpec((16, 16, 16))
    """What the latents are; training takes it from the codec."""
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
    games: tuple[str, ...] = ()
    """The games that it is told apart, none for a head of one; training takes them from the data."""
    owners: tuple[int, ...] = ()
    """Which of the games each outcome is of; each game has its own."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(1 <= len(self.rewards) <= 1024, f"rewards: must have 1..1024 outcomes, got {len(self.rewards)}")
        check(
            len(self.terminated) == len(self.rewards),
            f"terminated {self.terminated}: must have one entry per outcome, {len(self.rewards)}",
        )
        check(len(self.bias) in (0, len(self.rewards)), f"bias {self.bias}: must be empty or one per outcome")
        check(1 <= self.context <= 64, f"context {self.context}: must be 1..64")
        check(8 <= self.width <= 2048, f"width {self.width}: must be 8..2048")
        check_games(self.games)
        wanted = len(self.rewards) if self.games else 0
        check(
            len(self.owners) == wanted,
            f"owners: {len(self.owners)}, must be one per outcome of several games, else none",
        )
        check(
            set(self.owners) == set(range(len(self.games))),
            f"owners {self.owners[:16]}: must count the games from 0, and each must have an outcome",
        )


class OutcomeHead(nn.Module, ABC):
    """A categorical over the joint (reward, terminated) outcomes that occur in the game.

    One joint distribution keeps them consistent (a coin that ends the episode always does); the probabilities of reward
    and end are its marginals. It sees only the past and the action, because Procgen shows no terminal frame.

    Attributes:
        several: whether it can be told which of several games a state is of.
        of_outcomes: names of the weights that have a row for each outcome; training begins them anew where a head of
            one game lends its weights to one of several.
    """

    several: ClassVar[bool] = False
    of_outcomes: ClassVar[tuple[str, ...]] = ()
    prior: Tensor
    owners: Tensor

    def __init__(self, config: OutcomeHeadConfig) -> None:
        super().__init__()
        check(
            self.several or not config.games, f"games {', '.join(config.games)}: this head cannot be told which it is"
        )
        self.config = config
        prior = torch.tensor(config.bias or (0.0,) * len(config.rewards))
        self.register_buffer("prior", prior, persistent=False)
        self.register_buffer("owners", torch.tensor(config.owners, dtype=torch.int64), persistent=False)

    @property
    def spec(self) -> LatentSpec:
        """What its latents are."""
        return self.config.latent

    @property
    def hinted(self) -> Mapping[str, tuple[int, ...]]:
        """The hints of the dynamics that it cannot do without: their shapes by name, see `Dynamics.hinted`."""
        return {}

    @abstractmethod
    def logits(self, state: State, action: Tensor, hints: Mapping[str, Tensor]) -> Tensor:
        """Uncorrected logits float32 (B, outcomes) of what `action` int64 (B,) brings at `state`."""

    def forward(self, state: State, action: Tensor, hints: Mapping[str, Tensor]) -> Tensor:
        """`logits`, by the name under which data-parallel training calls it."""
        return self.logits(state, action, hints)

    def log_probabilities(self, state: State, action: Tensor, hints: Mapping[str, Tensor]) -> Tensor:
        """Calibrated log-probabilities (B, outcomes) of the joint outcomes; takes what `logits` takes."""
        return self.masked(self.config.scale * self.logits(state, action, hints) + self.prior, state).log_softmax(1)

    def masked(self, logits: Tensor, state: State) -> Tensor:
        """Logits (B, outcomes), those of other games than the states' own without a chance."""
        if not self.config.games:
            return logits
        return logits.masked_fill(self.owners != state["game"][:, None], _NEVER)

    def grown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of an older or smaller configuration, made to fit this one where that changes nothing."""
        return weights
