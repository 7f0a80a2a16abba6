"""The records that stages hand to one another, their shapes and dtypes documented once.

B or N is a batch, K the context length, H a horizon, T time, (C, h, w) one latent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dreamenv.models.interface import State


@dataclass(frozen=True)
class Transition:
    """One imagined step.

    Attributes:
        state: the state after it.
        log_probabilities: float32 (B, outcomes) of the joint (reward, terminated) outcomes.
        uncertainty: float32 (B,), root mean squared latent error the model expects of itself (1 = the latents'
            standard deviation).
    """

    state: State
    log_probabilities: Tensor
    uncertainty: Tensor

    @staticmethod
    def cat(transitions: list[Transition]) -> Transition:
        """Concatenate along the batch."""
        if len(transitions) == 1:
            return transitions[0]
        return Transition(
            State.cat([t.state for t in transitions]),
            torch.cat([t.log_probabilities for t in transitions]),
            torch.cat([t.uncertainty for t in transitions]),
        )


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of N real games.

    Attributes:
        frames: uint8 (N, T, 64, 64, 3).
        actions: int64 (N, T), taken at each frame.
        rewards: float32 (N, T), what each action earned.
        terminated, truncated: bool (N, T), whether it ended the episode.
        first: bool (N, T), an episode starts at this frame.
        level_seeds: int64 (N, T).
    """

    frames: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    first: np.ndarray
    level_seeds: np.ndarray


@dataclass(frozen=True)
class Clips:
    """N real clips that stay inside one episode.

    Attributes:
        frames: uint8 (N, K + H, 64, 64, 3): K of context, H to be predicted.
        actions: int64 (N, K + H - 1): entry t leads from frame t to frame t + 1.
        level_seeds: int64 (N,).
        context: K.
    """

    frames: np.ndarray
    actions: np.ndarray
    level_seeds: np.ndarray
    context: int

    @property
    def horizon(self) -> int:
        """H."""
        return self.frames.shape[1] - self.context
