"""Trains dynamics on encoded data: which terms and how far they are unrolled is configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreamenv.config import check, whole
from dreamenv.contract.actions import NOOP
from dreamenv.evaluation.figures import save_grid, side_by_side
from dreamenv.evaluation.metrics import detail, psnr, spearman, squared_error
from dreamenv.flow import SamplerConfig, sample
from dreamenv.models.interface import Codec, Dynamics, to_frames
from dreamenv.models.io import initialise
from dreamenv.models.registry import build, register
from dreamenv.video import check_film, save_video
from trainers.crop import cropped
from trainers.latent_data import LatentDataset, channel_weights
from trainers.models import check_told, completed, of_game, told_apart
from trainers.rollout import DynamicsBatch, RolloutConfig, Rollouts
from trainers.terms.interface import Setting, Term

_HORIZON = 10  # steps of the validation's open loop


@dataclass(frozen=True)
class DynamicsTaskConfig:
    """What dynamics are trained for."""

    latents: str
    """Folder of the encoded dataset."""
    terms: dict[str, dict[str, Any]] = field(default_factory=lambda: {"squared": {}, "hints": {}})
    """Terms of the loss, by name, with their settings; see `trainers.terms`."""
    init_from: str = ""
    """Model folder to start from; empty starts anew."""
    unroll: int = 1
    """Steps predicted from the model's own predictions, with gradients through all of them."""
    own_inputs: tuple[float, float] = (1.0, 1.0)
    """Probability that an unrolled step goes on from the model's own prediction and not from the truth, at the
    training's start and at its end, linear between: (1, 1) unrolls fully, (0, 0) is teacher forcing, (0, 1) scheduled
    sampling (Bengio et al. 2015)."""
    context_noise: float = 0.3
    """Largest standard deviation of the noise added to the context; its level is an input."""
    importance: float = 0.5
    """How far rare-coloured cells raise the loss: weight 1 + importance * (mean rare weight - 1)."""
    drop_actions: float = 0.05
    """Share of samples whose actions are hidden, for guidance."""
    pad: float = 0.1
    """Share of samples whose context is shortened and padded, as after a reset."""
    past: int = 3
    """Earlier latents given to dynamics that remember, up to `gap` steps from one to the next."""
    gap: int = 16
    """Most steps between two of them."""
    forget: float = 0.25
    """Share of samples without them, as at the start of a dream."""
    changes: float = 0.0
    """Share of samples drawn the more often, the more their first step changes, of each game as many; the others are
    drawn evenly."""
    crop: int = 0
    """Rows and columns of cells of the part of each picture that is learnt from, 0 for whole pictures: that costs so
    much less, and much of a picture mostly stands still. The share `changes` of the parts is laid around what changes.
    Their outermost cells, but for a picture's own edge, go on from the truth and do not count."""
    even: float = 0.0
    """How far several games' errors count alike: each is divided by what copying the last latent costs in that game, to
    this power. 0 leaves them as they are: games in which much moves decide nearly all of the loss."""
    val_ratio: float = 0.02
    """Share of levels kept for validation."""
    val_windows: int = 128
    """Most moments of them that a validation dreams from, ten steps each."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        whole(self.val_windows, "val_windows", 4)
        check(1 <= self.unroll <= 64, f"unroll {self.unroll}: must be 1..64")
        check(bool(self.terms), "terms: must name one or more")
        check(
            all(0 <= p <= 1 for p in self.own_inputs),
            f"own_inputs {self.own_inputs}: must be two probabilities in 0..1",
        )
        check(0 <= self.context_noise <= 2, f"context_noise {self.context_noise}: must be in 0..2")
        check(self.importance >= 0, f"importance {self.importance}: must be >= 0")
        check(0 <= self.past <= 64, f"past {self.past}: must be in 0..64")
        check(1 <= self.gap <= 1000, f"gap {self.gap}: must be in 1..1000")
        check(self.crop == 0 or 4 <= self.crop <= 256, f"crop {self.crop}: must be 0, or 4..256")
        check(0 <= self.changes <= 1, f"changes {self.changes}: must be in 0..1")
        check(0 <= self.even <= 1, f"even {self.even}: must be in 0..1")
        for name in ("drop_actions", "pad", "forget"):
            check(0 <= getattr(self, name) < 1, f"{name} {getattr(self, name)}: must be in [0, 1)")
        check(0 < self.val_ratio < 1, f"val_ratio {self.val_ratio}: must be in (0, 1)")


@register("task", "dynamics", DynamicsTaskConfig)
class DynamicsTask:
    """See `trainers.tasks.interface.Task`."""

    kind = "dynamics"

    def __init__(self, config: DynamicsTaskConfig, model: dict[str, Any], seed: int) -> None:
        self.config = config
        check_film(Path("rollout.gif"))  # which every validation writes, the last too
        self.data = LatentDataset(Path(config.latents), config.val_ratio)
        events = self.data.dataset.facts.get("events")
        check(
            not events,
            f"latents {config.latents}: hold what leads to events only; collect whole ones, or give them to a head",
        )
        self.codec: Codec = self.data.codec.requires_grad_(False)
        torch.manual_seed(seed)
        wanted = completed("dynamics", model, self.codec, games=told_apart(self.data.games))
        self.model: Dynamics = build("dynamics", wanted, where="model")
        check_told(self.model.games, self.data.games, f"model.type {model.get('type')!r}")
        spec = self.model.spec
        check(spec == self.codec.spec, f"model.latent {spec}: the latents of {config.latents} are {self.codec.spec}")
        if config.init_from:
            initialise(self.model, config.init_from)
        self.context = self.model.context
        setting = Setting(self.data, self.codec, self.model, config.unroll)
        self.terms: dict[str, Term] = {
            name: build("term", {"type": name, **values}, setting, where=f"task.terms.{name}")
            for name, values in config.terms.items()
        }
        wanted = [name for name, term in self.terms.items() if term.draws is not None]
        check(len(wanted) <= 1, f"terms {', '.join(wanted)}: each wants dreams drawn in its own way; leave one out")
        fits = not wanted or not self.model.deterministic
        check(fits, f"terms {', '.join(wanted)}: want draws, and the dynamics know no noise; leave them out")
        networks = nn.ModuleDict({name: term for name, term in self.terms.items() if list(term.parameters())})
        self.auxiliary: nn.Module | None = networks if len(networks) else None
        self._check_crop()
        self._split()
        self.channels = channel_weights(self.codec, self.data.probed())[:, None, None]
        self._weigh()

    def _check_crop(self) -> None:
        """Raise `ConfigError` if parts of pictures are wanted and something needs whole ones."""
        crop, fits = self.config.crop, min(self.codec.spec.shape[1:])
        if not crop:
            return
        check(crop <= fits, f"crop {crop}: the latents of {self.config.latents} have {fits} cells; use 0..{fits}")
        whole = [name for name, term in self.terms.items() if type(term).extra is not Term.extra]
        check(not whole, f"crop {crop}: terms {', '.join(whole)} want whole pictures; leave them out, or set crop to 0")
        sound = self.model.local and not self.codec.columns and not self.codec.keeps
        check(sound, f"crop {crop}: {type(self.model).__name__} wants whole pictures; set crop to 0")

    def _weigh(self) -> None:
        """How often each training step is drawn, and how much its game's errors count."""
        config, self._often, self.weights = self.config, None, None
        if not config.changes and not config.even:
            return
        cost, names = self.data.changes(self.train, self.channels), self.data.games
        games = self.data.game[self.train]
        steps = np.bincount(games, minlength=len(names))
        without = [name for name, n in zip(names, steps, strict=True) if not n]
        check(not without, f"latents {config.latents}: no training step is of {', '.join(without)}; collect more of it")
        sums, mean = np.bincount(games, cost**0.5), np.bincount(games, cost) / steps
        often = np.cumsum(cost**0.5 / np.maximum(sums, 1e-12)[games])  # each game as often as any other
        self._often = often / often[-1] if config.changes and often[-1] > 0 else None
        weights = np.maximum(mean, 1e-3 * mean.max() + 1e-12) ** -config.even
        weights *= max(mean.sum(), 1e-12) / max((weights * mean).sum(), 1e-12)  # the loss keeps its size
        self.weights = torch.from_numpy(weights).float() if config.even else None

    def _split(self) -> None:
        """Where samples may begin."""
        config, data = self.config, self.data
        self.train = data.windows(self.context + config.unroll, validation=False) + self.context - 1
        self._val = data.windows(self.context + max(config.unroll, _HORIZON), validation=True)
        check(
            len(self.train) > 0 and len(self._val) > 0,
            f"latents {config.latents}: too few steps for windows of {self.context} + {max(config.unroll, _HORIZON)} "
            "in both parts of the split; collect more",
        )
        starts = np.flatnonzero(data.first & ~data.validation)
        starts = starts[starts + config.unroll < len(data.start)]
        self._starts = starts[data.start[starts + config.unroll] == starts]

    def moments(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Draw training steps int64 (B,) with a whole context before them and `unroll` steps after."""
        evenly = rng.integers(len(self.train), size=size)
        if self._often is None:
            return self.train[evenly]
        changing = np.searchsorted(self._often, rng.random(size)).clip(max=len(self.train) - 1)
        return self.train[np.where(rng.random(size) < self.config.changes, changing, evenly)]

    def batch(self, rng: np.random.Generator, size: int, now: np.ndarray | None = None) -> DynamicsBatch:
        """Samples that begin at `now` (B,), by default at `moments`."""
        u, config = self.config.unroll, self.config
        now = self.moments(rng, size) if now is None else now
        at_start = rng.random(size) < config.pad / 2
        if len(self._starts):
            now = np.where(at_start, self._starts[rng.integers(len(self._starts), size=size)], now)
        last = now + u
        for term in self.terms.values():
            now, last = term.choose(rng, now, last)
        batch = self._gathered(rng, now, last)
        return cropped(rng, batch, self.context, config.crop, config.changes) if config.crop else batch

    def _gathered(self, rng: np.random.Generator, now: np.ndarray, last: np.ndarray) -> DynamicsBatch:
        """Samples that begin at `now` (B,) and of which the steps up to `last` (B,) exist."""
        k, u, config, size = self.context, self.config.unroll, self.config, len(now)
        indices, actions = self.data.contexts(now, k, u)
        live = indices[:, k:] <= last[:, None]
        indices = np.minimum(indices, last[:, None])
        shortened = rng.random(size) < config.pad / 2  # a context cut short in mid-episode
        keep = np.where(shortened, rng.integers(1, k, size=size, endpoint=True), k)[:, None]
        cut = np.arange(k + u)[None, :] < k - keep
        kept = ~shortened & (rng.random(size) >= config.forget)
        indices = np.where(cut, np.take_along_axis(indices, k - keep, 1), indices)
        actions = np.where(cut, NOOP, actions)
        past, columns = self._past(rng, indices[:, :1], kept)
        extra: dict[str, Tensor] = {}
        for term in self.terms.values():
            extra |= term.extra(rng, indices, live)
        return DynamicsBatch(
            latents=self.data.gather(indices),
            actions=torch.from_numpy(actions),
            importance=torch.from_numpy(self.data.importance[indices[:, k:]]),
            live=torch.from_numpy(live),
            past=past,
            columns=columns,
            extra=extra,
            game=self.data.game_of(now),
            weight=None if self.weights is None else self.weights[self.data.game[now]],
        )

    def _past(
        self, rng: np.random.Generator, begin: np.ndarray, kept: np.ndarray
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Latents from before the contexts' first steps (B, 1), if the dynamics remember, and the codec's columns."""
        config = self.config
        if not self.model.remembers or not config.past:
            return None, {}
        gaps = rng.integers(1, config.gap, size=(len(begin), config.past), endpoint=True) * kept[:, None]
        past = np.maximum(begin - gaps.cumsum(1)[:, ::-1], self.data.start[begin])
        columns = {n: torch.from_numpy(v[np.concatenate([past, begin], 1)]) for n, v in self.data.columns.items()}
        return self.data.gather(np.concatenate([past, begin], 1)[:, :-1]), columns

    def loss(
        self, model: nn.Module, batch: DynamicsBatch, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The sum of the terms."""
        device, config = batch.actions.device, self.config
        self.codec, self.channels = self.codec.to(device), self.channels.to(device)
        first, last = config.own_inputs
        own = first + (last - first) * progress
        how = RolloutConfig(config.unroll, config.context_noise, config.importance, config.drop_actions, own)
        drawn = [term for term in self.terms.values() if term.draws is not None]
        active = [term.draws for term in drawn if term.graph_key(progress) != 0]
        draws = active[0] if active else None
        rollouts = Rollouts(model, self.model, self.codec, self.channels, batch, how, draws, generator)
        total, metrics = torch.zeros((), device=device), {}
        for term in self.terms.values():
            loss, figures = term(rollouts, batch, progress)
            total, metrics = total + loss, metrics | figures
        return total, metrics

    def graph_key(self, progress: float) -> int | None:
        """See `trainers.tasks.interface.Task`: that of all terms together; none while a probability changes."""
        if self.config.own_inputs[0] != self.config.own_inputs[1]:
            return None
        keys = [term.graph_key(progress) for term in self.terms.values()]
        return None if None in keys else sum((key or 0) << i for i, key in enumerate(keys))

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """The loss, and open-loop PSNR (of the mean squared error) at 1, 5, 10 steps; writes a strip and a video.

        Also how well the error expected of the first step ranks the true one (Spearman). With a term that draws the
        same for samples of two evaluations, and how much detail they keep (1 is all).
        """
        assert isinstance(model, Dynamics)
        k, device = self.context, next(model.parameters()).device
        rng = np.random.default_rng(0)
        chosen = self._val[rng.choice(len(self._val), min(self.config.val_windows, len(self._val)), replace=False)]
        indices = chosen[:, None] + np.arange(k + _HORIZON)
        real = self.data.frames(indices[:, k:])
        figures, shown = {"loss": self._validation_loss(model, chosen)}, {"real": real[:4]}
        sampled = any(term.draws is not None for term in self.terms.values())
        for nfe in (1, 2) if sampled else (1,):
            frames, latents, expected = self._dream(model, indices, SamplerConfig(nfe=nfe), device)
            errors = squared_error(frames, real)
            prefix = "" if nfe == 1 else "sampled_"
            figures |= {f"{prefix}psnr_{h}": float(psnr(errors[:, h - 1].mean())) for h in (1, 5, 10)}
            if nfe == 1:
                off = self.codec.path_errors(latents.cpu(), self.data.gather(indices[:, k:]))
                figures |= {f"{name}_{h}": float(value[h - 1]) for name, value in off.items() for h in (1, 5, 10)}
            figures[f"{prefix}uncertainty"] = spearman(expected.cpu().numpy(), errors[:, 0].mean((1, 2)))
            if nfe > 1:
                figures["sampled_detail_10"] = float(detail(frames[:, -1]).mean() / detail(real[:, -1]).mean())
            shown[f"dream, {nfe} NFE"] = frames[:4]
        strips = [rows[i] for i in range(len(real[:4])) for rows in shown.values()]
        save_grid(folder / f"prediction-{step:07d}.png", strips)
        film = side_by_side({n: rows[0] for n, rows in shown.items()})
        save_video(folder / f"rollout-{step:07d}.gif", film, fps=5)
        return figures

    def _validation_loss(self, model: Dynamics, chosen: np.ndarray) -> float:
        """The loss at the end of training of samples that begin with the windows `chosen` (N,)."""
        device, rng, total = next(model.parameters()).device, np.random.default_rng(1), 0.0
        generator = torch.Generator(device).manual_seed(1)
        for term in self.terms.values():
            term.eval()
        for part in np.array_split(chosen, -(-len(chosen) // 32)):
            now = part + self.context - 1
            last = now + self.config.unroll
            for term in self.terms.values():
                term.choose(rng, now, last)  # what it draws for itself; the samples stay
            batch = self._gathered(rng, now, last).to(device)
            total += float(self.loss(model, batch, generator, 1.0)[0]) * len(part) / len(chosen)
        for term in self.terms.values():
            term.train()
        return total

    def _dream(
        self, model: Dynamics, indices: np.ndarray, sampler: SamplerConfig, device: torch.device
    ) -> tuple[np.ndarray, Tensor, Tensor]:
        """Frames uint8 (B, H, ...) and latents (B, H, ...) of dreams, and the error (B,) expected of the first step."""
        k, codec = self.context, self.codec.to(device)
        actions = torch.from_numpy(self.data.actions[indices]).to(device)
        game = self.data.game_of(indices[:, 0])
        state = model.begin(self.data.gather(indices[:, :k]).float().to(device), actions[:, : k - 1])
        state = of_game(state, None if game is None else game.to(device))
        generator = torch.Generator(device).manual_seed(0)
        frames, latents, expected = [], [], torch.zeros(())
        for h in range(indices.shape[1] - k):
            noise = torch.randn(state.latents[:, 0].shape, generator=generator, device=device)
            action = actions[:, h + k - 1]
            prediction = sample(model, state, action, noise, sampler)
            state = model.advance(state, action, prediction.latent)
            expected = prediction.log_error.exp().mean((1, 2)) if h == 0 else expected
            kept = {name: state[name] for name in codec.keeps}
            frames.append(to_frames(codec.decode(prediction.latent, **kept)).cpu().numpy())
            latents.append(prediction.latent)
        return np.stack(frames, 1), torch.stack(latents, 1), expected

    def facts(self) -> dict[str, Any]:
        """The data it was trained on and the latents' range, beyond which a dream has diverged."""
        sample = self.data.latents_at(slice(None, None, max(len(self.data.stored) // 4096, 1))).float().numpy()
        return {
            "data": self.data.dataset.facts,
            "codec_sha256": self.data.facts["codec_sha256"],
            "val_ratio": self.config.val_ratio,
            "latent_max": float(np.abs(sample).max()),
            "latent_rms": float(np.sqrt((sample**2).mean())),
            "latent_rms_max": float(np.sqrt((sample**2).mean((1, 2, 3))).max()),
        }
