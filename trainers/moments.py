"""Steps of one or two datasets at which a head is asked, balanced between outcomes."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from trainers.labels import JointOutcome, uneventful
from trainers.latent_data import LatentDataset


class Moments:
    """Steps of one or two datasets that share a codec, counted on from the first one's.

    Args:
        data: the main one.
        also: another, whose rare outcomes are used too; or None.
        labels: int64 (N,), the outcome of each step of the main one.
        outcomes: of each label.
        context: K.

    Attributes:
        labels: int64 (M,), of all steps; those of outcomes that the main data does not know are uneventful.
        uneventful: bool (M,), steps without a reward that end nothing.
        start: int64 (M,), the first step of each one's episode that has a whole context where it matters.
    """

    def __init__(
        self,
        data: LatentDataset,
        also: LatentDataset | None,
        labels: np.ndarray,
        outcomes: list[JointOutcome],
        context: int,
    ) -> None:
        self.data, self.also, self.context, self._own = data, also, context, len(labels)
        self.labels, self.start = labels, data.start
        quiet = uneventful(outcomes)
        self._added = (np.zeros(0, np.int64),) * 2  # the other data's moments of training and of validation
        if also is not None:
            none = {outcomes[i][0]: i for i in np.flatnonzero(quiet)[::-1]}  # the first of each game
            further = np.array([none[game] for game in range(len(data.games))])[also.game]
            for i, (game, reward, end) in enumerate(outcomes):
                same = (np.round(also.rewards.astype(np.float64), 4) == reward) & (also.terminated == end)
                further[same & (also.game == game)] = i
            begin = also.start + context - 1  # of episodes cut short the first contexts are not whole
            self.labels = np.concatenate([labels, further])
            self.start = np.concatenate([self.start, self._own + begin])
            whole = np.arange(len(further)) >= begin
            parts = (whole & ~also.validation, whole & also.validation)
            self._added = (self._own + np.flatnonzero(parts[0]), self._own + np.flatnonzero(parts[1]))

        self.uneventful = quiet[self.labels]

    def split(self, validation: bool) -> list[np.ndarray]:
        """The steps int64 of each outcome in one part, the uneventful last and with all others of the main data."""
        every = np.flatnonzero(self.data.validation == validation)
        steps = np.concatenate([every, self._added[validation]])
        rare = [steps[self.labels[steps] == c] for c in np.unique(self.labels[~self.uneventful])]
        return [*(c for c in rare if len(c)), every]

    def _of(self, now: np.ndarray) -> list[tuple[LatentDataset, np.ndarray, np.ndarray]]:
        """Which data steps (B,) belong to: each with the rows bool (B,) that are its own, and their indices in it."""
        parts = [(self.data, now < self._own, now[now < self._own])]
        rest = now >= self._own
        return parts if self.also is None else [*parts, (self.also, rest, now[rest] - self._own)]

    def taken(self, now: np.ndarray) -> np.ndarray:
        """Actions int64 (B,) at steps (B,)."""
        taken = np.empty(len(now), np.int64)
        for data, rows, at in self._of(now):
            taken[rows] = data.actions[at]
        return taken

    def actions(self, now: np.ndarray) -> Tensor:
        """Actions int64 (B, K) of the contexts that end at steps (B,)."""
        taken = np.empty((len(now), self.context), np.int64)
        for data, rows, at in self._of(now):
            taken[rows] = data.contexts(at, self.context)[1]
        return torch.from_numpy(taken)

    def contexts(self, now: np.ndarray) -> tuple[Tensor, Tensor]:
        """Contexts float16 (B, K, C, H, W) and actions int64 (B, K) of steps (B,)."""
        shape = self.data.stored.shape[1:]
        context = torch.empty((len(now), self.context, *shape), dtype=torch.float16)
        taken = np.empty((len(now), self.context), np.int64)
        for data, rows, at in self._of(now):
            indices, taken[rows] = data.contexts(at, self.context)
            context[torch.from_numpy(rows)] = data.gather(indices)
        return context, torch.from_numpy(taken)

    def game_of(self, now: np.ndarray) -> Tensor | None:
        """Which games the steps (B,) are of, int64 (B,); None where there is but one."""
        if len(self.data.games) == 1:
            return None
        game = np.empty(len(now), np.int64)
        for data, rows, at in self._of(now):
            game[rows] = data.game[at]
        return torch.from_numpy(game)

    def far(self, steps: np.ndarray, length: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One of `steps` for each length (D,), with so many steps of its episode before it where there are such."""
        room = self.start[steps] - steps
        order = np.argsort(room, kind="stable")
        fit = np.searchsorted(room[order], -length, side="right").clip(1)
        return steps[order[(rng.random(len(length)) * fit).astype(np.int64)]]
