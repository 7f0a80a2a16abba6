"""Trains the reward / termination head on (context, action), class-balanced, then calibrates it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.contract.games import named
from dreamenv.contract.noise import philox
from dreamenv.device import pick_device
from dreamenv.errors import ConfigError
from dreamenv.evaluation.metrics import average_precision
from dreamenv.models.interface import Dynamics, OutcomeHead, State
from dreamenv.models.io import initialise, load_model
from dreamenv.models.registry import build, register
from trainers.batch import Batch
from trainers.dreams import CALM, EVENT, NEAR, DreamtMoments, dream
from trainers.labels import calibrate, outcome_labels, trained_head
from trainers.latent_data import LatentDataset
from trainers.models import check_told, completed, of_game, told_apart
from trainers.moments import Moments

_AGAIN = 3  # times that an aged context was seen before
_DEPTHS = 8  # depths at which each uneventful dream is asked: there are few, and in validation they weigh much
_BEFORE = 12  # steps before a rare outcome that count as near


@dataclass(frozen=True)
class OutcomeTaskConfig:
    """What the outcome head is trained for."""

    latents: str
    """Folder of the encoded dataset."""
    also: str = ""
    """Folder of more encoded data, whose rare outcomes are drawn too; its uneventful steps are not, so it may hold only
    what leads to them (`python -m envs.collect --events 16`)."""
    init_from: str = ""
    """Model folder to start from; empty starts anew."""
    balance: float = 0.4
    """Share of each batch drawn from the rare outcomes, each in proportion to the square root of how many there are: a
    reward that is common is not drowned by what hardly ever happens, nor that by it."""
    near: float = 0.2
    """Share drawn from the last steps before a rare outcome, the hardest negatives."""
    dynamics: str = ""
    """Model folder of trained dynamics; some contexts are then dreamt, as they will be when the head is used. A head
    that is told the dynamics' hints needs them for these too."""
    drift: int = 64
    """Most steps dreamt before the head is asked."""
    dreams: int = 8192
    """How many dreams there are at a time, or more where outcomes are many; 0 for none. Three quarters lead to rare
    outcomes, by 1 to `drift` steps, each doubling as likely, of those that have so many steps before them. The others
    end anywhere and are asked at eight depths of up to `drift` steps, so that a long dream of nothing is not taken for
    one that ends. Half are drawn with two evaluations a step, unless the dynamics know no noise."""
    renewed: int = 0
    """Steps of training after which others are dreamt in their place, lest they be learnt by heart; 0 keeps them."""
    dreamt: float = 0.5
    """Share of each batch with a dreamt context."""
    context_noise: float = 0.2
    """Largest standard deviation of the noise added to the context."""
    val_ratio: float = 0.1
    """Share of levels kept for validation and calibration."""
    max_outcomes: int = 32
    """Most joint (reward, terminated) outcomes to tell apart; the rarest are merged into the nearest reward."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(0 <= self.balance < 1, f"balance {self.balance}: must be in [0, 1)")
        check(0 <= self.near < 1 - self.balance, f"near {self.near}: must be in [0, 1 - balance)")
        check(1 <= self.drift <= 64, f"drift {self.drift}: must be in 1..64")
        check(self.dreams == 0 or self.dreams >= 2, f"dreams {self.dreams}: must be 0, or 2 or more")
        check(self.renewed >= 0, f"renewed {self.renewed}: must be >= 0")
        check(0 <= self.dreamt <= 1, f"dreamt {self.dreamt}: must be in 0..1")
        check(self.context_noise >= 0, f"context_noise {self.context_noise}: must be >= 0")
        check(0 < self.val_ratio < 1, f"val_ratio {self.val_ratio}: must be in (0, 1)")
        check(self.max_outcomes >= 2, f"max_outcomes {self.max_outcomes}: must be >= 2")


@dataclass(frozen=True)
class OutcomeBatch(Batch):
    """Contexts float16 (B, K, C, H, W), actions int64 (B, K), labels and, of several, games int64 (B,).

    The first rows' contexts are dreamt, and have the hints (R, ...) of those dreams.
    """

    context: Tensor
    actions: Tensor
    labels: Tensor
    game: Tensor | None = None
    hints: dict[str, Tensor] = field(default_factory=dict)


@register("task", "outcome", OutcomeTaskConfig)
class OutcomeTask:
    """See `trainers.tasks.interface.Task`."""

    kind = "head"
    auxiliary: nn.Module | None = None

    def __init__(self, config: OutcomeTaskConfig, model: dict[str, Any], seed: int) -> None:
        self.config, self.data = config, LatentDataset(Path(config.latents), config.val_ratio)
        before = trained_head(config.init_from, "init_from") if config.init_from else None
        apart = told_apart(self.data.games)
        same = before is not None and before.config.games == apart  # else its outcomes are of another set of games
        outcomes, labels = outcome_labels(self.data, before if same else None, config.max_outcomes)
        self.outcomes = outcomes
        told: dict[str, Any] = {"rewards": [r for _, r, _ in outcomes], "terminated": [t for *_, t in outcomes]}
        if apart:
            told |= {"games": list(self.data.games), "owners": [game for game, *_ in outcomes]}
        dynamics = _fitting_dynamics(config.dynamics, self.data) if config.dynamics else None
        more = {}
        if dynamics is not None:
            more = {"context": dynamics.context} | {name: shape[0] for name, shape in dynamics.hinted.items() if shape}
        torch.manual_seed(seed)
        spec = completed("head", model, self.data.codec, **more) | told
        self.model: OutcomeHead = build("head", spec, where="model")
        found = self.model.spec
        check(found == self.data.codec.spec, f"model.latent {found}: the latents are {self.data.codec.spec}")
        if before is not None:
            initialise(self.model, config.init_from)
        self.context = self.model.config.context
        if dynamics is not None:
            check(
                dynamics.context == self.context,
                f"dynamics {config.dynamics}: has a context of {dynamics.context}, the head of {self.context}",
            )
        check(
            0 < int(self.data.validation.sum()) < len(labels),
            f"val_ratio {config.val_ratio}: leaves no levels to train on or none to validate on; collect more levels",
        )
        also = self._further() if config.also else None
        self.moments = Moments(self.data, also, labels, outcomes, self.context)
        self._train, self._val = self.moments.split(False), self.moments.split(True)
        often = np.cumsum([len(steps) ** 0.5 for steps in self._train[:-1]])
        self._odds = often / often[-1] if len(often) else often
        check(
            dynamics is not None or not self.model.hinted,
            f"dynamics {config.dynamics!r}: a {model['type']} needs them for their hints; dreams: 0 if for no more",
        )
        self._dynamics, self._seed, self._block = dynamics, seed, -1
        self.dreams: DreamtMoments | None = None
        self.val_dreams: DreamtMoments | None = None
        if dynamics is not None and config.dreams:
            device = pick_device("auto")
            dynamics.to(device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            count = config.dreams if config.renewed else config.dreams // 8 + 2
            dreamt = self._imagine(dynamics, self._val, count, philox((seed, 1)))
            uneventful = self.moments.uneventful[dreamt.steps]
            self.val_dreams = dreamt.rows(np.where(dreamt.kind == CALM, uneventful, dreamt.kind == EVENT))

    def renew(self, step: int) -> bool:
        """See `trainers.tasks.interface.Renewing`: other dreams, if it is time."""
        block = step // self.config.renewed if self.config.renewed else 0
        if self._dynamics is None or not self.config.dreams or block == self._block:
            return False
        self._block = block
        self.dreams = self._imagine(
            self._dynamics, self._train, self.config.dreams, philox((self._seed, 1), (0, 0, 0, 1 + block))
        )
        self._kinds = [np.flatnonzero(self.dreams.kind == kind) for kind in (EVENT, NEAR, CALM)]
        return True

    def _further(self) -> LatentDataset:
        also = LatentDataset(Path(self.config.also), self.config.val_ratio)
        same = also.facts["codec_sha256"] == self.data.facts["codec_sha256"]
        check(same, f"also {also.folder}: was not encoded by the codec of {self.data.folder}; encode it with that one")
        found, wanted = (named(data.dataset.modes) for data in (also, self.data))
        check(found == wanted, f"also {also.folder}: is of {found}, not of {wanted}")
        return also

    def _imagine(
        self, dynamics: Dynamics, moments: list[np.ndarray], count: int, rng: np.random.Generator
    ) -> DreamtMoments:
        """Dream from real contexts to `count` of the `moments`: the first three quarters to rare outcomes, evenly."""
        *rare, every = moments
        each = max(count * 3 // 4 // len(rare), 1) if rare else 0
        eventful, drift = each * len(rare), self.config.drift
        count = max(count, eventful + 1)
        length = (drift ** rng.random(count)).round().astype(np.int64)
        length[eventful:] = drift
        far = [self.moments.far(c, length[i * each : (i + 1) * each], rng) for i, c in enumerate(rare)]
        ends = np.concatenate([*far, rng.choice(every, count - eventful)])
        begin = np.maximum(ends - length, self.moments.start[ends])
        length = ends - begin
        before = np.maximum(length[:eventful] - rng.integers(1, _BEFORE, size=eventful), 0)
        calm = np.repeat(np.arange(eventful, count), _DEPTHS)
        row = np.concatenate([np.arange(eventful), np.arange(eventful), calm])
        depth = np.concatenate([length[:eventful], before, rng.integers(0, length[calm], endpoint=True)])
        kind = np.repeat([EVENT, NEAR, CALM], [eventful, eventful, len(calm)])
        kept = dream(dynamics, self.moments, begin, np.stack([row, depth], 1), bool(self.model.hinted), rng)
        return DreamtMoments(*kept, begin[row], depth, kind)

    def batch(self, rng: np.random.Generator, size: int) -> OutcomeBatch:
        """Draw moments, balanced between outcomes, some of their contexts dreamt."""
        config = self.config
        *rare, every = self._train
        pick, place = rng.random(size), rng.random(size)
        earlier = rng.integers(1, _BEFORE, size=size)
        now = every[rng.integers(len(every), size=size)]
        if rare:
            which = np.searchsorted(self._odds, rng.random(size)).clip(max=len(rare) - 1)
            event = np.array([rare[w][int(p * len(rare[w]))] for w, p in zip(which, place, strict=True)])
            near = np.maximum(event - earlier, self.moments.start[event])
            now = np.where(pick < config.balance, event, np.where(pick < config.balance + config.near, near, now))
        dreams, hints = self.dreams, {}
        rows = 0 if dreams is None else int(size * config.dreamt)
        context, actions = self.moments.contexts(now[rows:])
        if dreams is not None:
            near = np.where(pick[:rows] < config.balance + config.near, NEAR, CALM)
            kind = np.where(pick[:rows] < config.balance, EVENT, near)
            kind[[not len(self._kinds[k]) for k in kind]] = CALM
            row = np.array(
                [self._kinds[k][int(p * len(self._kinds[k]))] for k, p in zip(kind, place[:rows], strict=True)]
            )
            drawn = dreams.rows(row.astype(np.int64))
            now[:rows], hints = drawn.steps, drawn.hints
            context = torch.cat([drawn.contexts, context])
            actions = torch.cat([self.moments.actions(now[:rows]), actions])
        labels = torch.from_numpy(self.moments.labels[now])
        return OutcomeBatch(context, actions, labels, self.moments.game_of(now), hints)

    def loss(
        self, model: nn.Module, batch: OutcomeBatch, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cross-entropy of the joint outcomes."""
        context, labels, actions = batch.context, batch.labels, batch.actions
        level = torch.rand(len(context), generator=generator, device=context.device) * self.config.context_noise
        noise = torch.randn(context.shape, generator=generator, device=context.device)
        noised = self.data.codec.noised(context, noise * level[:, None, None, None, None])
        aged = torch.rand(len(context), generator=generator, device=context.device) < 0.5
        own = len(next(iter(batch.hints.values()))) if batch.hints else 0
        game = None if batch.game is None else batch.game[own:]
        found = self._hints(context[own:], actions[own:], game, aged[own:])
        hints = {name: torch.cat([batch.hints[name], hint]) if own else hint for name, hint in found.items()}
        state = of_game(State({"latents": noised, "actions": actions[:, :-1]}), batch.game)
        logits = self.model.masked(model(state, actions[:, -1], hints), state)
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}

    def graph_key(self, progress: float) -> int | None:
        """See `trainers.tasks.interface.Task`: one all along."""
        return 0

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Calibrate on validation levels (stored with the model), then average precision and negative log-likelihood.

        With dreams, half of the calibration's weight lies on dreamt contexts, whose figures are called `dreamt ...`.
        """
        assert isinstance(model, OutcomeHead)
        all_labels, own = self.moments.labels, len(self.data.start)
        val = self._val[-1]
        share = np.bincount(all_labels[:own][val], minlength=len(model.config.rewards)) / len(val)
        logits, labels, weights = {}, {}, {}
        for name, (now, dreamt) in self._validation_sets().items():
            logits[name] = self._logits(model, now, dreamt)
            which = all_labels[now]
            labels[name] = torch.from_numpy(which)
            found = np.bincount(which, minlength=len(share)) / len(now)
            weights[name] = torch.from_numpy((share / np.maximum(found, 1e-12))[which] / len(now))
        scale, bias, nll = calibrate(*(torch.cat(list(part.values())) for part in (logits, labels, weights)))
        model.config = replace(model.config, scale=scale, bias=tuple(bias))
        figures = {"nll": nll}
        for name in logits:
            probabilities = (scale * logits[name] + torch.tensor(bias)).softmax(1)
            for c, (game, reward, end) in enumerate(self.outcomes):
                if not reward and not end:
                    continue
                outcome = f"{self._called(game)}reward {reward:g}{' end' if end else ''}"
                figures[f"ap {name}{outcome}"] = average_precision(
                    probabilities[:, c].numpy(), (labels[name] == c).numpy(), weights[name].numpy()
                )
        return figures

    def _called(self, game: int) -> str:
        """A game's name before its figures, where there are several."""
        return f"{self.data.games[game]} " if len(self.data.games) > 1 else ""

    def _validation_sets(self) -> dict[str, tuple[np.ndarray, DreamtMoments | None]]:
        """Steps, and the dreamt moments that they are of if any."""
        *rare, val = self._val
        calm = val[self.moments.uneventful[val]]
        kept = np.random.default_rng(0).permutation(calm)[:12000]
        sets: dict[str, tuple[np.ndarray, DreamtMoments | None]] = {"": (np.concatenate([*rare, kept]), None)}
        if self.val_dreams is not None:
            sets["dreamt "] = (self.val_dreams.steps, self.val_dreams)
        return sets

    def _logits(self, head: OutcomeHead, now: np.ndarray, dreamt: DreamtMoments | None) -> Tensor:
        device = next(head.parameters()).device
        out = []
        for at in range(0, len(now), 256):
            here = now[at : at + 256]
            game = None if (found := self.moments.game_of(here)) is None else found.to(device)
            if dreamt is None:
                context, actions = self.moments.contexts(here)
            else:
                context, actions = dreamt.contexts[at : at + 256], self.moments.actions(here)
            context, actions = context.float().to(device), actions.to(device)
            state = of_game(State({"latents": context, "actions": actions[:, :-1]}), game)
            if dreamt is None:
                aged = torch.arange(len(context), device=device) % 2 == 0
                hints = self._hints(context, actions, game, aged)
            else:
                hints = {name: hint[at : at + 256].float().to(device) for name, hint in dreamt.hints.items()}
            logits = head.logits(state, actions[:, -1], hints)
            out.append(head.masked(logits, state).cpu())
        return torch.cat(out)

    def _hints(self, context: Tensor, actions: Tensor, game: Tensor | None, aged: Tensor) -> Mapping[str, Tensor]:
        """What the head is told of the next step, of a context without noise, as when it is used.

        A dream that has lasted is surer of what it has seen than one that begins: to dynamics that remember, the
        contexts of the rows `aged`, bool (B,), come after a past like themselves.
        """
        if self._dynamics is None or not self.model.hinted:
            return {}
        dynamics, before = self._dynamics.to(context.device), actions[:, :-1]
        with torch.no_grad():
            state = dynamics.begin(context, before)
            if dynamics.remembers:
                old = dynamics.begin(context, before, past=context.repeat(1, _AGAIN, 1, 1, 1))
                shape = {name: (-1, *[1] * (value.ndim - 1)) for name, value in state.items()}
                state = State({n: torch.where(aged.view(shape[n]), old[n], value) for n, value in state.items()})
            return dynamics.hints(of_game(state, game), actions[:, -1])

    def facts(self) -> dict[str, Any]:
        """Share of each joint outcome in the data, and what other data there was."""
        labels, also = self.moments.labels[: len(self.data.start)], self.moments.also
        share = np.bincount(labels, minlength=len(self.model.config.rewards)) / len(labels)
        return {
            "outcome_share": share.tolist(),
            "also": None if also is None else also.dataset.facts,
            "codec_sha256": self.data.facts["codec_sha256"],
        }


def _fitting_dynamics(folder: str, data: LatentDataset) -> Dynamics:
    dynamics, facts = load_model(folder, "dynamics")
    if facts.get("codec_sha256") != data.facts["codec_sha256"]:
        raise ConfigError(f"dynamics {folder}: is no dynamics trained on these latents")
    assert isinstance(dynamics, Dynamics)
    check_told(dynamics.games, data.games, f"dynamics {folder}")
    return dynamics.eval().requires_grad_(False)
