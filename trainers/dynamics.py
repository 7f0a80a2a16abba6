"""Trains the latent dynamics: deterministic predictor, then unrolled, then flow. The phases differ in config only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.actions import NOOP
from dreamenv.config import check
from dreamenv.errors import ConfigError
from dreamenv.flow import SamplerConfig, interpolate
from dreamenv.metrics import detail, psnr, spearman, squared_error
from dreamenv.models.autoencoder import to_frames, to_images
from dreamenv.models.heads import OutcomeHead
from dreamenv.models.io import load_model
from dreamenv.models.latent_flow import NULL_ACTION, draw_next
from dreamenv.models.registry import build_model
from dreamenv.models.tile import arrived, crossed, exact_move, moves, phases, remember, shown
from dreamenv.models.tile_flow import TileFlow, recall
from dreamenv.report import save_grid, save_video, side_by_side
from dreamenv.world_model import Dynamics
from trainers.critic import Critic, fool, judge
from trainers.heads import trained_head
from trainers.latents import LatentDataset, channel_weights
from trainers.losses import energy_score, error_estimate_score
from trainers.outcomes import outcome_labels

_HORIZON = 10  # steps of the validation's open loop
_BEST = 1e-5  # mean squared error of a picture from which on it need not become better: 50 dB


@dataclass(frozen=True)
class DynamicsTaskConfig:
    """What the dynamics is trained for."""

    latents: str = "runs/coinrun/latents"
    """Folder of the encoded dataset."""
    init_from: str = ""
    """Model folder to start from; empty starts anew."""
    unroll: int = 1
    """Steps predicted from the model's own predictions, with gradients through all of them."""
    flow: float = 0.0
    """Weight of the flow term at tau > 0; 0 trains the deterministic predictor alone."""
    certainty: float = 0.0
    """How far cells that the model expects to know weigh more in the unrolled loss: weight (expected error) ** -certainty
    (beta-NLL, Seitzer et al. 2022). Without it what nobody can know decides nearly all of the loss."""
    picture: float = 0.0
    """Weight of what the decoder draws of one dreamt step of each sample: the mean of the pictures' PSNR, in units of -10 dB. A
    squared error is decided by the pictures that nobody could have known, their mean PSNR by all alike."""
    adversarial: float = 0.0
    """Weight of the adversarial term. Half of each batch is then unrolled through samples of two evaluations: the first
    stays the mean that the squared error makes it, the second answers to the critic and commits to one future."""
    sampled: float = 0.25
    """Weight of the squared error of those second evaluations, beside the adversarial term."""
    judged: int = 3
    """Unrolled steps of each sample that the critic sees."""
    energy: float = 0.0
    """Weight of the energy score: some samples are dreamt twice, each time going on from draws of two evaluations, and the two
    dreams are scored as an ensemble (Gneiting & Raftery 2007; for weather models Alet et al. 2025). Its optimum is the true
    distribution, so each dream commits to one future where the squared error draws the mean of all."""
    energy_from: float = 0.0
    """Part of the training after which the energy score begins: many evaluations of few samples take a GPU nearly as long
    as all others."""
    drawn: float = 0.34
    """Share of samples dreamt so, where there is an energy score; the others go on from means."""
    flow_draws: int = 1
    """Draws of (noise, tau) that each sample's flow term averages."""
    max_flow_weight: float = 5.0
    """Cap of the 1 / (1 - tau) weight."""
    context_noise: float = 0.3
    """Largest standard deviation of the noise added to the context; its level is an input."""
    importance: float = 0.5
    """How far rare-coloured cells raise the loss: weight 1 + importance * (mean rare weight - 1)."""
    head: str = ""
    """Model folder of a trained outcome head, which stays as it is; "" goes without."""
    outcome: float = 0.0
    """Weight of the head's cross-entropy at a dreamt context, through all the steps that led to it: what decides the outcome
    (a coin of three pixels) must outlive the dream, however little it counts in the squared error. In the spirit of value
    equivalence (Grimm et al. 2020) and of Dreamer's reward gradients (Hafner et al. 2020)."""
    events: float = 0.25
    """Share of samples, where there is a head, that lead to a rare outcome or to within four steps of one."""
    camera: float = 1.0
    """Weight of the error of the camera's predicted move, in tiles; only `tile_flow` predicts one."""
    drop_actions: float = 0.05
    """Share of samples whose actions are hidden, for guidance."""
    pad: float = 0.1
    """Share of samples whose context is shortened and padded, as after a reset."""
    past: int = 3
    """Earlier pictures that fill the memory of dynamics on tiles, up to `gap` steps from one to the next."""
    gap: int = 16
    """Most steps between two of them."""
    forget: float = 0.25
    """Share of samples without them, as at the start of a dream."""
    val_ratio: float = 0.02
    """Share of levels kept for validation."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(1 <= self.unroll <= 64, f"unroll {self.unroll}: must be 1..64")
        check(self.flow >= 0, f"flow {self.flow}: must be >= 0")
        check(0 <= self.certainty <= 1, f"certainty {self.certainty}: must be in 0..1")
        check(self.picture >= 0, f"picture {self.picture}: must be >= 0")
        check(self.adversarial >= 0, f"adversarial {self.adversarial}: must be >= 0")
        check(self.sampled >= 0, f"sampled {self.sampled}: must be >= 0")
        check(1 <= self.judged <= self.unroll or not self.adversarial,
              f"judged {self.judged}: must be in 1..unroll, which is {self.unroll}")
        check(self.energy >= 0, f"energy {self.energy}: must be >= 0")
        check(0 <= self.energy_from < 1, f"energy_from {self.energy_from}: must be in [0, 1)")
        check(not self.energy_from or self.energy > 0, f"energy_from {self.energy_from}: needs an energy above 0")
        check(0 < self.drawn < 1, f"drawn {self.drawn}: must be in (0, 1)")
        check(not (self.energy and self.adversarial), f"energy {self.energy}: cannot go with an adversarial term; set one to 0")
        check(1 <= self.flow_draws <= 64, f"flow_draws {self.flow_draws}: must be in 1..64")
        check(self.max_flow_weight >= 1, f"max_flow_weight {self.max_flow_weight}: must be >= 1")
        check(0 <= self.context_noise <= 2, f"context_noise {self.context_noise}: must be in 0..2")
        check(self.importance >= 0, f"importance {self.importance}: must be >= 0")
        check(self.camera >= 0, f"camera {self.camera}: must be >= 0")
        check(self.outcome >= 0, f"outcome {self.outcome}: must be >= 0")
        check(not self.outcome or bool(self.head), f"outcome {self.outcome}: needs a head, trained on the same latents")
        check(0 <= self.past <= 64, f"past {self.past}: must be in 0..64")
        check(1 <= self.gap <= 1000, f"gap {self.gap}: must be in 1..1000")
        for name in ("events", "drop_actions", "pad", "forget"):
            check(0 <= getattr(self, name) < 1, f"{name} {getattr(self, name)}: must be in [0, 1)")
        check(0 < self.val_ratio < 1, f"val_ratio {self.val_ratio}: must be in (0, 1)")


def _grown(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a model without a gate or global noise, for one that has them: an open gate, and noise without effect.

    `LatentFlow` has the gate's weights last among its outputs, and those of the noise last among the inputs of `condition`.
    """
    for name in ("out.weight", "out.bias"):
        if name in weights and own[name].shape[1:] == weights[name].shape[1:] and len(own[name]) == len(weights[name]) + 1:
            weights[name] = torch.cat([weights[name], own[name][-1:]])
    name = "condition.0.weight"
    if name in weights and (more := own[name].shape[1] - weights[name].shape[1]) > 0:
        weights[name] = F.pad(weights[name], (0, more))
    return weights


def _error(predicted: Tensor, target: Tensor, channels: Tensor) -> Tensor:
    """Squared error of latents (B, C, H, W) in each cell (B, H, W), channels weighted."""
    return ((predicted.float() - target).square() * channels).mean(1)


def _fit(log_error: Tensor, error: Tensor, live: Tensor) -> Tensor:
    """The error estimate's own loss, over the samples that are live; so small that it does not weigh on the predictions."""
    return 0.003 * (error_estimate_score(log_error, error) * live).mean()


class DynamicsTask:
    """See `trainers.loop.Task`."""

    def __init__(self, config: DynamicsTaskConfig, model: dict[str, Any], seed: int) -> None:
        self.config = config
        self.data = LatentDataset(Path(config.latents), config.val_ratio)
        check(not self.data.dataset.facts.get("ends"),
              f"latents {config.latents}: hold ends of episodes only; collect whole ones, or give them to heads as task.also")
        self.autoencoder = self.data.autoencoder.requires_grad_(False)
        torch.manual_seed(seed)
        self.model: nn.Module = build_model(model)
        network = cast(Dynamics, self.model).config
        check(isinstance(self.model, TileFlow) == bool(self.autoencoder.camera_channels),
              f"model {model['type']}: tile_flow goes with the latents of a tile_autoencoder, latent_flow with others")
        check(network.latent_channels == self.data.latents.shape[1],
              f"latent_channels {network.latent_channels}: the latents have {self.data.latents.shape[1]}")
        if config.init_from:
            weights = _grown(load_model(config.init_from)[0].state_dict(), self.model.state_dict())
            try:
                self.model.load_state_dict(weights)
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise ConfigError(f"init_from {config.init_from}: holds another architecture ({reason})") from None
        check(network.context >= 2 or not config.adversarial, "adversarial: needs a context of 2 or more")
        self.critic = Critic(network.latent_channels) if config.adversarial else None
        self.context = network.context
        self.head: OutcomeHead | None = None
        if config.outcome:
            self.head = trained_head(config.head, "head").requires_grad_(False)
            takes, gives = self.head.config, (self.context, network.latent_channels)
            check((takes.context, takes.latent_channels) == gives,
                  f"head {config.head}: takes (context, channels) {takes.context, takes.latent_channels}, the dynamics {gives}")
            _, self._labels = outcome_labels(self.data, self.head, len(self.head.config.rewards))
            self._rare = [np.flatnonzero((self._labels == c) & ~self.data.validation) for c in range(1, self._labels.max() + 1)]
            self._rare = [steps for steps in self._rare if len(steps)]
        self.train = self.data.windows(self.context + config.unroll, validation=False) + self.context - 1
        self._val = self.data.windows(self.context + _HORIZON, validation=True)
        check(len(self.train) > 0 and len(self._val) > 0,
              f"latents {config.latents}: too few steps for windows of {self.context} + {max(config.unroll, _HORIZON)} "
              "in both parts of the split; collect more")
        starts = np.flatnonzero(self.data.first & ~self.data.validation)
        self._starts = starts[starts + config.unroll < len(self.data.start)]
        self._starts = self._starts[self.data.start[self._starts + config.unroll] == self._starts]
        probe = np.random.default_rng(0).choice(len(self.data.latents), 256)
        self._channels = channel_weights(self.autoencoder, torch.from_numpy(self.data.latents[np.sort(probe)]).float())

    def moments(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Draw training steps int64 (B,) with a whole context before them and `unroll` steps after."""
        return self.train[rng.integers(len(self.train), size=size)]

    def batch(self, rng: np.random.Generator, size: int, now: np.ndarray | None = None) -> dict[str, Tensor]:
        """Samples that begin at `now` (B,), by default at `moments`.

        Latents float16 (B, K + U, C, H, W), actions int64 (B, K + U), importance uint8 (B, U, H, W), live bool (B, U).

        Of tiles also `past` float16 (B, P, C, H, W), earlier latents, and `past_by` float32 (B, P, 2): by how many tiles the
        window after each of them, in the end the context's first, is ahead of its own.
        `live` tells which of the steps to predict exist: a sample may run past its episode's end if that is a rare outcome.
        With a head also `asked` int64 (B,), after how many dreamt steps it is, 1..U, and `labels` int64 (B,), the answer.
        """
        k, u, config = self.context, self.config.unroll, self.config
        now = self.moments(rng, size) if now is None else now
        at_start = rng.random(size) < config.pad / 2
        if len(self._starts):
            now = np.where(at_start, self._starts[rng.integers(len(self._starts), size=size)], now)
        asked, last = rng.integers(1, u, size=size, endpoint=True), now + u
        out: dict[str, Tensor] = {}
        if self.head is not None:
            if self._rare:
                which, place = rng.integers(len(self._rare), size=size), rng.random(size)
                event = np.array([self._rare[w][int(p * len(self._rare[w]))] for w, p in zip(which, place, strict=True)])
                moment = event - np.where(rng.random(size) < 2 / 3, 0, rng.integers(1, 4, size=size, endpoint=True))
                led = (rng.random(size) < config.events) & (moment - asked >= self.data.start[event])
                now, last = np.where(led, moment - asked, now), np.where(led, event, last)
            out |= {"asked": torch.from_numpy(asked), "labels": torch.from_numpy(self._labels[now + asked])}
        indices, actions = self.data.contexts(now, k, u)
        live = indices[:, k:] <= last[:, None]
        indices = np.minimum(indices, last[:, None])
        shortened = rng.random(size) < config.pad / 2  # a context cut short in mid-episode
        keep = np.where(shortened, rng.integers(1, k, size=size, endpoint=True), k)[:, None]
        cut = np.arange(k + u)[None, :] < k - keep
        kept = ~shortened & (rng.random(size) >= config.forget)
        indices = np.where(cut, np.take_along_axis(indices, k - keep, 1), indices)
        actions = np.where(cut, NOOP, actions)
        if self.autoencoder.camera_channels and config.past:
            gaps = rng.integers(1, config.gap, size=(size, config.past), endpoint=True) * kept[:, None]
            begin = indices[:, :1]
            past = np.maximum(begin - gaps.cumsum(1)[:, ::-1], self.data.start[begin])
            past = np.concatenate([past, begin], 1)
            corner = np.floor(self.data.camera[past])
            out |= {"past": self.data.gather(past[:, :-1]), "past_by": torch.from_numpy(corner[:, 1:] - corner[:, :-1])}
        if config.picture:
            drawn = rng.integers(1, u, size=size, endpoint=True)
            step = np.arange(size), k - 1 + drawn
            out |= {"drawn": torch.from_numpy(drawn), "drawn_live": torch.from_numpy(live[np.arange(size), drawn - 1]),
                    "frames": torch.from_numpy(self.data.frames(indices[step]))}  # fmt: skip
        out |= {
            "latents": self.data.gather(indices),
            "actions": torch.from_numpy(actions),
            "importance": torch.from_numpy(self.data.importance[indices[:, k:]]),
            "live": torch.from_numpy(live),
        }
        return out

    def loss(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator,
             progress: float) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """The terms of the dreams that go on from means and, with an energy score, of those that go on from draws."""
        size = len(batch["actions"])
        n = size - max(round(size * self.config.drawn), 1) if self.config.energy else size
        check(n > 0, f"batch_size {size}: too small to share with the energy score, needs 2 or more")
        if not self.config.energy or progress < self.config.energy_from:
            return self._from_means(model, batch, generator, progress)
        total, metrics = self._from_means(model, {name: value[:n] for name, value in batch.items()}, generator, progress)
        score, others = self._from_draws(model, {name: value[n:] for name, value in batch.items()}, generator)
        return total + score, metrics | others

    def _from_draws(self, model: nn.Module, batch: dict[str, Tensor],
                    generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Energy score of two dreams of each sample, score of their error estimates, and what the outcome head says in them."""
        config, k = self.config, self.context
        latents = batch["latents"].float()
        live = self._live(batch, latents)
        device = latents.device
        channels, cells = self._weights(device), self._cells(batch)
        context, sigma = self._noised(latents[:, :k], generator)
        rolled, actions, sigma = context.repeat(2, 1, 1, 1, 1), batch["actions"].repeat(2, 1), sigma.repeat(2)
        zero, half = torch.zeros_like(sigma), torch.full_like(sigma, 0.5)
        total, metrics, trail = torch.zeros((), device=device), {}, list(rolled.unbind(1))
        memory = self._recall(batch, context)
        memory = None if memory is None else memory.repeat(2, 1, 1, 1)
        for u in range(config.unroll):
            now = actions[:, u : u + k]
            known = self._beside(latents, u, memory, 2)
            mean, log_error = model(None, zero, rolled, now, sigma, **known)
            e = _error(mean, latents[:, k + u].repeat(2, 1, 1, 1), channels)
            noise = torch.randn(mean.shape, generator=generator, device=device)
            draw, _ = model(interpolate(noise, mean.detach().float(), half), half, rolled, now, sigma, **known)
            first, second = draw.float().chunk(2)
            score, spread = energy_score(first, second, latents[:, k + u], channels, cells[:, u] * live[:, u])
            estimate = _fit(log_error, e, live[:, u].repeat(2, 1, 1))
            total = total + (config.energy * score + config.drawn * estimate) / config.unroll
            if u in (0, config.unroll - 1):
                metrics |= {f"energy_{u + 1}": score.detach(), f"spread_{u + 1}": spread.detach()}
            draw = self._arrived(draw.to(rolled.dtype), latents[:, k + u])
            memory = self._next(memory, rolled[:, -1], draw)
            rolled = torch.cat([rolled[:, 1:], draw[:, None]], 1)
            trail.append(rolled[:, -1])
        if self.head is not None:
            both = {name: batch[name].repeat(2) for name in ("asked", "labels")}
            outcome = self._answer(torch.stack(trail, 1), actions, both)
            total = total + config.outcome * outcome * config.drawn
            metrics["drawn_outcome"] = outcome.detach()
        return total, metrics

    def _recall(self, batch: dict[str, Tensor], context: Tensor) -> Tensor | None:
        """What dynamics on tiles remember after a context (B, K, C, H, W); None for others."""
        if not self.autoencoder.camera_channels:
            return None
        if "past" not in batch:
            return recall(context)
        by, memory = batch["past_by"], None
        for i, latent in enumerate(batch["past"].unbind(1)):
            memory = remember(memory, latent, by[:, max(i - 1, 0)])
        return recall(context, memory, by[:, -1])

    def _next(self, memory: Tensor | None, last: Tensor, latent: Tensor) -> Tensor | None:
        return None if memory is None else remember(memory, latent, crossed(phases(last), moves(latent), phases(latent)))

    def _noised(self, context: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The context (B, K, C, H, W) with noise, and its standard deviation (B,), drawn anew for each sample."""
        sigma = torch.rand(len(context), generator=generator, device=context.device) * self.config.context_noise
        noise = torch.randn(context.shape, generator=generator, device=context.device) * sigma[:, None, None, None, None]
        if camera := self.autoencoder.camera_channels:
            noise[:, :, -camera:] = 0
        return context + noise, sigma

    def _live(self, batch: dict[str, Tensor], latents: Tensor) -> Tensor:
        """What counts of the steps to predict, (B, U, 1 or H, 1 or W): those that exist, and of a tile the share in view."""
        live = batch["live"].float()[:, :, None, None]
        if not self.autoencoder.camera_channels:
            return live
        phase = phases(latents[:, self.context :])
        return live * shown(phase.flatten(0, 1))[:, 0].unflatten(0, phase.shape[:2])

    def _beside(self, latents: Tensor, u: int, memory: Tensor | None, times: int = 1) -> dict[str, Tensor]:
        """What dynamics on tiles take beside: the camera's true move to step u, (B, 2), and what is remembered."""
        if memory is None:
            return {}
        move = exact_move(latents[:, self.context + u - 1], latents[:, self.context + u])
        return {"move": move.repeat(times, 1), "memory": memory}

    def _arrived(self, clean: Tensor, target: Tensor) -> Tensor:
        return arrived(clean, target) if self.autoencoder.camera_channels else clean

    def _weights(self, device: torch.device) -> Tensor:
        """The weight of each channel's square, (C, 1, 1)."""
        self._channels = self._channels.to(device)
        return self._channels[:, None, None]

    def _cells(self, batch: dict[str, Tensor]) -> Tensor:
        """The weight of each cell of the steps to predict, (B, U, H, W)."""
        return 1 + self.config.importance * (batch["importance"].float() / 16 - 1).clamp_min(0)

    def _answer(self, trail: Tensor, actions: Tensor, batch: dict[str, Tensor]) -> Tensor:
        """Cross-entropy of the head's answers in dreams `trail` (B, K + U, C, H, W), each asked where the batch says."""
        assert self.head is not None
        rows = torch.arange(len(trail), device=trail.device)[:, None]
        steps = batch["asked"][:, None] + torch.arange(self.context, device=trail.device)
        context, taken = trail[rows, steps], actions[rows, steps]
        with torch.no_grad():  # the head's answer must not bend the player's path
            move = cast(Dynamics, self.model).ahead(context, taken)
        return F.cross_entropy(self.head.to(trail.device)(context, taken, move), batch["labels"])

    def _from_means(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator,
                    progress: float) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Squared error of the unrolled predictions, the score of their estimates of it; flow, outcome, adversarial terms."""
        config, k = self.config, self.context
        latents, actions = batch["latents"].float(), batch["actions"]
        device, size = latents.device, len(latents)
        channels, cells = self._weights(device), self._cells(batch)

        def uniform() -> Tensor:
            return torch.rand(size, generator=generator, device=device)

        def normal(shape: torch.Size) -> Tensor:
            return torch.randn(shape, generator=generator, device=device)

        def known(log_error: Tensor) -> Tensor:
            weight = (-config.certainty * log_error.detach().clamp(-8, 2)).exp()
            return weight / weight.mean()

        live = self._live(batch, latents)
        taken = actions
        actions = actions.masked_fill(uniform()[:, None] < config.drop_actions, NULL_ACTION)
        context, sigma = self._noised(latents[:, :k], generator)
        zero = torch.zeros(size, device=device)
        metrics: dict[str, Tensor] = {}
        total = torch.zeros((), device=device)
        memory = self._recall(batch, context)
        for _ in range(config.flow_draws if config.flow > 0 else 0):
            target, tau = latents[:, k], uniform()
            noisy = interpolate(normal(target.shape), target, tau)
            clean, log_error = model(noisy, tau, context, actions[:, :k], sigma, **self._beside(latents, 0, memory))
            weight = (1 / (1 - tau).clamp_min(1e-6)).clamp_max(config.max_flow_weight)
            e = _error(clean, target, channels) * live[:, 0]
            flow = (e * cells[:, 0] * weight[:, None, None]).mean()
            total = total + (config.flow * flow + _fit(log_error, e, live[:, 0])) / config.flow_draws
            metrics["flow"] = flow.detach()
        rolled, trail = context, list(context.unbind(1))
        m = -(-size // 2) if self.critic is not None else 0  # the last m rows go on from their samples, the others from means
        drawn = slice(size - m, size)
        sequence = [latents[drawn, k - 2], latents[drawn, k - 1]]  # what the critic sees before the first sample is real
        for u in range(config.unroll):
            target = latents[:, k + u]
            beside = self._beside(latents, u, memory)
            clean, log_error = model(None, zero, rolled, actions[:, u : u + k], sigma, **beside)
            if beside and config.camera:
                off = F.smooth_l1_loss(moves(clean), beside["move"], beta=0.02, reduction="none").sum(1)
                total = total + config.camera * (off * batch["live"][:, u]).mean() / config.unroll
                metrics[f"camera_{u + 1}"] = off.detach().mean()
            e = _error(clean, target, channels) * live[:, u]
            weighted = (e * cells[:, u] * known(log_error)).mean()
            total = total + (weighted + _fit(log_error, e, live[:, u])) / config.unroll
            if u in (0, config.unroll - 1):
                metrics |= {f"error_{u + 1}": e.detach().mean(), f"weighted_{u + 1}": weighted.detach()}
            if m:
                halfway = torch.full((m,), 0.5, device=device)
                x = interpolate(normal(clean[drawn].shape), clean[drawn].detach().float(), halfway)
                given = {name: value[drawn] for name, value in beside.items()}
                sharp, log_error = model(x, halfway, rolled[drawn], actions[drawn, u : u + k], sigma[drawn], **given)
                e = _error(sharp, target[drawn], channels) * live[drawn, u]
                weighted = (e * cells[drawn, u] * known(log_error)).mean()
                total = total + config.sampled * weighted / config.unroll
                if u in (0, config.unroll - 1):
                    metrics[f"sampled_{u + 1}"] = e.detach().mean()
                clean = torch.cat([clean[: size - m], sharp])
                sequence.append(sharp.float())
            arrived = self._arrived(clean.to(rolled.dtype), target)
            memory = self._next(memory, rolled[:, -1], arrived)
            rolled = torch.cat([rolled[:, 1:], arrived[:, None]], 1)
            trail.append(rolled[:, -1])
        if config.picture:
            rows = torch.arange(size, device=device)
            images = self.autoencoder.to(device).decode(torch.stack(trail, 1)[rows, k - 1 + batch["drawn"]].float())
            mse = (images.float() - to_images(batch["frames"])).square().mean((1, 2, 3))
            drawn_live = batch["drawn_live"].float()
            picture = ((mse + _BEST).log10() * drawn_live).sum() / drawn_live.sum().clamp_min(1)
            total = total + config.picture * picture
            metrics["picture"] = picture.detach()
        if self.head is not None:
            outcome = self._answer(torch.stack(trail, 1), taken, batch)
            total = total + config.outcome * outcome
            metrics["outcome"] = outcome.detach()
        if self.critic is not None:
            rows = torch.arange(m, device=device)[:, None]
            order = torch.rand(m, config.unroll, generator=generator, device=device).argsort(1)
            step = order[:, : config.judged]
            now = actions[drawn][rows, k - 1 + step].flatten()
            imagined, real = (
                torch.stack([x[rows, offset + i + step] for i in range(3)], 2).flatten(0, 1)
                for x, offset in ((torch.stack(sequence, 1), 0), (latents[drawn], k - 2))
            )
            fooled = fool(self.critic, imagined, now)
            judged, right = judge(self.critic, real, imagined, now)
            # the critic's own loss reaches only the critic: its weight here cannot matter to the dynamics
            total = total + config.adversarial * min(1.0, 20 * progress) * fooled + judged
            metrics |= {"fooled": fooled.detach(), "critic": judged.detach(), "critic_right": right}
        return total, metrics

    def stage(self, progress: float) -> int | None:
        """See `trainers.loop.Task`: without and with the energy score; with a critic, whose weight grows, none."""
        return int(progress >= self.config.energy_from) if self.critic is None else None

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Open-loop PSNR (of the mean squared error, against real frames) at 1, 5, 10 steps; writes a strip and a video.

        Also how well the error expected of the first step ranks the true one (Spearman). With an adversarial term or an energy
        score the same for samples of two evaluations, and how much detail they keep (1 is all).
        """
        k, horizon, device = self.context, _HORIZON, next(model.parameters()).device
        chosen = self._val[np.random.default_rng(0).choice(len(self._val), min(128, len(self._val)), replace=False)]
        indices = chosen[:, None] + np.arange(k + horizon)
        start = self.data.gather(indices[:, :k]).float().to(device)
        actions = torch.from_numpy(self.data.actions[indices]).to(device)
        real = self.data.frames(indices[:, k:])
        autoencoder = self.autoencoder.to(device)
        figures, shown = {}, {"real": real[:4]}
        for nfe in (1, 2) if self.critic is not None or self.config.energy else (1,):
            context, dream, path, expected = start, [], [], torch.zeros(())
            memory = cast(Dynamics, model).recall(start)
            generator = torch.Generator(device).manual_seed(0)
            for h in range(horizon):
                noise = torch.randn(start[:, 0].shape, generator=generator, device=device)
                clean, log_error = draw_next(model, context, actions[:, h : h + k], noise, SamplerConfig(nfe=nfe), memory)
                memory = cast(Dynamics, model).remember(memory, context[:, -1], clean)
                expected = log_error.exp().mean((1, 2)) if h == 0 else expected
                context = torch.cat([context[:, 1:], clean[:, None]], 1)
                path.append(moves(clean))
                dream.append(to_frames(autoencoder.decode(clean)).cpu().numpy())
            frames = np.stack(dream, 1)
            errors = squared_error(frames, real)
            prefix = "" if nfe == 1 else "sampled_"
            figures |= {f"{prefix}psnr_{h}": float(psnr(errors[:, h - 1].mean())) for h in (1, 5, 10)}
            if autoencoder.camera_channels and nfe == 1:
                true = moves(self.data.gather(indices[:, k:])).cumsum(1)
                off = (torch.stack(path, 1).cumsum(1).cpu() - true).norm(dim=2).mean(0)
                figures |= {f"camera_{h}": float(off[h - 1]) for h in (1, 5, 10)}
            figures[f"{prefix}uncertainty"] = spearman(expected.cpu().numpy(), errors[:, 0].mean((1, 2)))
            if nfe > 1:
                figures["sampled_detail_10"] = float(detail(frames[:, -1]).mean() / detail(real[:, -1]).mean())
            shown[f"dream, {nfe} NFE"] = frames[:4]
        save_grid(folder / f"prediction-{step:07d}.png", [rows[i] for i in range(len(real[:4])) for rows in shown.values()])
        save_video(folder / f"rollout-{step:07d}.gif", side_by_side({n: rows[0] for n, rows in shown.items()}), fps=5)
        return figures

    def facts(self) -> dict[str, Any]:
        """The data it was trained on and the latents' range, beyond which a dream has diverged."""
        sample = self.data.latents[:: max(len(self.data.latents) // 4096, 1)].astype(np.float32)
        return {
            "data": self.data.dataset.facts, "autoencoder_sha256": self.data.facts["autoencoder_sha256"],
            "latent_max": float(np.abs(sample).max()), "latent_rms": float(np.sqrt((sample**2).mean())),
            "latent_rms_max": float(np.sqrt((sample**2).mean((1, 2, 3))).max()),
        }  # fmt: skip
