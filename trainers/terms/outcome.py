"""What a trained outcome head says in dreams: what decides a reward or an end must outlive the dream."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.config import check
from dreamenv.models.interface import State
from dreamenv.models.registry import register
from trainers.labels import outcome_labels, trained_head, uneventful
from trainers.models import check_told, of_game
from trainers.rollout import DynamicsBatch, Rollout, Rollouts
from trainers.terms.interface import Setting, Term


@dataclass(frozen=True)
class OutcomeConfig:
    """Settings of the outcome term."""

    head: str
    """Model folder of a trained outcome head, which stays as it is."""
    weight: float = 0.01
    """Its weight."""
    events: float = 0.25
    """Share of samples that lead to a rare outcome or to within four steps of one."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.weight >= 0, f"weight {self.weight}: must be >= 0")
        check(0 <= self.events < 1, f"events {self.events}: must be in [0, 1)")


@register("term", "outcome", OutcomeConfig)
class Outcome(Term):
    """The head's cross-entropy at one dreamt context of each sample, through all the steps that led to it.

    What decides the outcome (a coin of three pixels) must outlive the dream, however little it counts in the squared
    error. In the spirit of value equivalence (Grimm et al. 2020) and of Dreamer's reward gradients (Hafner et al.
    2020).
    """

    config: OutcomeConfig

    def __init__(self, config: OutcomeConfig, setting: Setting) -> None:
        super().__init__(config, setting)
        head = trained_head(config.head, "outcome.head").requires_grad_(False)
        check(
            head.spec == setting.dynamics.spec and head.config.context == setting.dynamics.context,
            f"outcome.head {config.head}: takes {head.spec}, context {head.config.context}, the dynamics "
            f"{setting.dynamics.spec}, {setting.dynamics.context}",
        )
        check_told(head.config.games, setting.data.games, f"outcome.head {config.head}")
        self._head, data = [head], setting.data  # in a list: its weights are none of this term's
        outcomes, self._labels = outcome_labels(data, head)
        eventful = np.flatnonzero(~uneventful(outcomes))
        rare = [np.flatnonzero((self._labels == c) & ~data.validation) for c in eventful]
        self._rare, self._start = [steps for steps in rare if len(steps)], data.start
        self._query: np.ndarray | None = None

    def choose(self, rng: np.random.Generator, now: np.ndarray, last: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Some samples lead to an event; after how many dreamt steps each is asked is drawn here."""
        size = len(now)
        self._query = query = rng.integers(1, self.unroll, size=size, endpoint=True)
        if self._rare:
            which, place = rng.integers(len(self._rare), size=size), rng.random(size)
            event = np.array([self._rare[w][int(p * len(self._rare[w]))] for w, p in zip(which, place, strict=True)])
            moment = event - np.where(rng.random(size) < 2 / 3, 0, rng.integers(1, 4, size=size, endpoint=True))
            led = (rng.random(size) < self.config.events) & (moment - query >= self._start[event])
            now, last = np.where(led, moment - query, now), np.where(led, event, last)
        return now, last

    def extra(self, rng: np.random.Generator, indices: np.ndarray, live: np.ndarray) -> dict[str, Tensor]:
        """After how many dreamt steps the head is asked, 1..U, and the right answer."""
        assert self._query is not None
        now = indices[:, indices.shape[1] - live.shape[1] - 1]
        labels = self._labels[now + self._query]
        return {"outcome.query": torch.from_numpy(self._query), "outcome.labels": torch.from_numpy(labels)}

    def forward(self, rollouts: Rollouts, batch: DynamicsBatch, progress: float) -> tuple[Tensor, dict[str, Tensor]]:
        """See `Term.forward`."""
        outcome = self._answer(rollouts, rollouts.mean, rollouts.batch)
        total, metrics = self.config.weight * outcome, {"outcome": outcome.detach()}
        if rollouts.draw is not None:
            drawn, share = self._answer(rollouts, rollouts.draw, rollouts.drawn_batch), rollouts.share
            total = total + self.config.weight * share * drawn
            metrics["drawn_outcome"] = drawn.detach()
        return total, metrics

    def _answer(self, rollouts: Rollouts, rollout: Rollout, batch: DynamicsBatch) -> Tensor:
        """Cross-entropy of the head's answers in a rollout, each asked where the batch says."""
        k = rollouts.dynamics.context
        query, labels = (batch.extra[f"outcome.{name}"].repeat(rollout.copies) for name in ("query", "labels"))
        rows = torch.arange(len(query), device=query.device)[:, None]
        steps = query[:, None] + torch.arange(k, device=query.device)
        taken = rollout.actions[rows, steps]
        game = None if batch.game is None else batch.game.repeat(rollout.copies)
        state = of_game(State({"latents": rollout.trail[rows, steps], "actions": taken[:, :-1]}), game)
        head, hints = self._head[0].to(query.device), {}
        if head.hinted:
            with torch.no_grad():  # the head's answer must not bend the player's path
                begun = rollouts.dynamics.begin(state.latents, state.actions)
                hints = rollouts.dynamics.hints(of_game(begun, game), taken[:, -1])
        logits = head.logits(state, taken[:, -1], hints)
        return F.cross_entropy(logits if game is None else head.masked(logits, state), labels)
