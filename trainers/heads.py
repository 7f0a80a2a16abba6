"""Trains the reward / termination head on (context, action), class-balanced, then calibrates it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dreamenv.bundle import pick_device, pick_precision
from dreamenv.config import check
from dreamenv.errors import ConfigError
from dreamenv.flow import SamplerConfig
from dreamenv.metrics import average_precision
from dreamenv.models.heads import OutcomeHead, TileOutcomeHead
from dreamenv.models.io import load_model
from dreamenv.models.latent_flow import LatentFlow, draw_next
from dreamenv.models.registry import build_model
from dreamenv.models.tile_flow import TileFlow
from dreamenv.noise import philox
from dreamenv.world_model import Dynamics
from trainers.latents import LatentDataset
from trainers.outcomes import calibrate, outcome_labels

_TOGETHER = {"cpu": 128, "cuda": 1024}  # dreams dreamt at once
_DEPTHS = 8  # depths at which each uneventful dream of the validation is asked: there are few, and they weigh much


@dataclass(frozen=True)
class HeadsTaskConfig:
    """What the outcome head is trained for."""

    latents: str = "runs/coinrun/latents"
    """Folder of the encoded dataset."""
    also: str = ""
    """Folder of more encoded data, whose rare outcomes are drawn too; its uneventful steps are not, so it may hold ends of
    episodes only (`python -m envs.collect --ends 16`)."""
    init_from: str = ""
    """Model folder to start from; empty starts anew."""
    balance: float = 0.4
    """Share of each batch drawn from the rare outcomes, evenly between them."""
    near: float = 0.2
    """Share drawn from the last steps before a rare outcome, the hardest negatives."""
    dynamics: str = ""
    """Model folder of trained dynamics; some contexts are then dreamt, as they will be when the head is used. A head on tiles
    needs them for the player's next move too."""
    drift: int = 64
    """Most steps dreamt before the head is asked."""
    dreams: int = 8192
    """How many dreams there are, dreamt once before training; 0 for none. Three quarters end in rare outcomes, after 1 to
    `drift` steps, each doubling as likely, of those that have so many steps before them; the others are `drift` steps long, so
    that a long dream of nothing is not taken for an ending one. Half are drawn with two evaluations a step instead of one."""
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
        check(0 <= self.dreamt <= 1, f"dreamt {self.dreamt}: must be in 0..1")
        check(self.context_noise >= 0, f"context_noise {self.context_noise}: must be >= 0")
        check(0 < self.val_ratio < 1, f"val_ratio {self.val_ratio}: must be in (0, 1)")
        check(self.max_outcomes >= 2, f"max_outcomes {self.max_outcomes}: must be >= 2")


class HeadsTask:
    """See `trainers.loop.Task`."""

    critic: nn.Module | None = None

    def __init__(self, config: HeadsTaskConfig, model: dict[str, Any], seed: int) -> None:
        self.config = config
        self.data = LatentDataset(Path(config.latents), config.val_ratio)
        before = trained_head(config.init_from, "init_from") if config.init_from else None
        outcomes, self.labels = outcome_labels(self.data, before, config.max_outcomes)
        torch.manual_seed(seed)
        self.model: nn.Module = build_model({
            **model, "rewards": [r for r, _ in outcomes], "terminated": [t for _, t in outcomes],
        })  # fmt: skip
        network = cast(OutcomeHead, self.model).config
        check(bool(self.data.autoencoder.camera_channels) or not isinstance(self.model, TileOutcomeHead),
              f"model {model['type']}: goes with the latents of a tile_autoencoder; use outcome_head for others")
        if before is not None:
            try:
                self.model.load_state_dict(before.state_dict())
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise ConfigError(f"init_from {config.init_from}: holds another architecture ({reason})") from None
        wanted, found = (network.latent_channels, network.latent_size), self.data.latents.shape[1:3]
        check(wanted == found, f"latent_channels, latent_size {wanted}: the latents have {found}")
        self.context = network.context
        check(0 < int(self.data.validation.sum()) < len(self.labels),
              f"val_ratio {config.val_ratio}: leaves no levels to train on or none to validate on; collect more levels")
        self._all_labels, self._start = self.labels, self.data.start
        self._also: LatentDataset | None = None
        self._added = (np.zeros(0, np.int64),) * 2  # other data's moments of training and of validation
        if config.also:
            self._take(LatentDataset(Path(config.also), config.val_ratio))
        self._train, self._val = self._moments(False), self._moments(True)
        check(bool(config.dynamics) or not isinstance(self.model, TileOutcomeHead),
              f"dynamics {config.dynamics!r}: a {model['type']} needs them for the player's move; dreams: 0 if for no more")
        self._dynamics = _fitting_dynamics(config.dynamics, self.data, self.context) if config.dynamics else None
        self._dreams: _Dreams | None = None
        self._val_dreams: _Dreams | None = None
        if self._dynamics is not None and config.dreams:
            device, rng = pick_device("auto"), philox((seed, 1))
            self._dreams = self._imagine(self._dynamics, self._train, config.dreams, rng, device)
            self._val_dreams = self._imagine(self._dynamics, self._val, config.dreams // 8 + 2, rng, device)

    def _take(self, also: LatentDataset) -> None:
        """Add other data, its steps counted on from our own; those with a whole context before them are its moments."""
        check(also.facts["autoencoder_sha256"] == self.data.facts["autoencoder_sha256"],
              f"also {also.folder}: was encoded by another autoencoder than {self.data.folder}; encode it with that one")
        network, own = cast(OutcomeHead, self.model).config, len(self.labels)
        labels = np.zeros(len(also.start), np.int64)  # outcomes that our own data does not know stay out
        for i, (reward, end) in enumerate(zip(network.rewards, network.terminated, strict=True)):
            labels[(np.round(also.rewards.astype(np.float64), 4) == reward) & (also.terminated == end)] = i
        begin = also.start + self.context - 1  # of episodes cut short the first contexts are not whole
        self._all_labels, self._start = np.concatenate([self.labels, labels]), np.concatenate([self._start, own + begin])
        whole = np.arange(len(labels)) >= begin
        self._also = also
        self._added = own + np.flatnonzero(whole & ~also.validation), own + np.flatnonzero(whole & also.validation)

    def _moments(self, validation: bool) -> list[np.ndarray]:
        """The steps int64 of each outcome in one part of the split, the uneventful last and with all others of our own data."""
        every = np.flatnonzero(self.data.validation == validation)
        steps = np.concatenate([every, self._added[validation]])
        rare = [steps[self._all_labels[steps] == c] for c in range(1, int(self._all_labels.max()) + 1)]
        return [*(c for c in rare if len(c)), every]

    def _imagine(self, dynamics: Dynamics, moments: list[np.ndarray], count: int, rng: np.random.Generator,
                 device: torch.device) -> _Dreams:  # fmt: skip
        """Dream from real contexts to `count` of the `moments`: the first three quarters to rare outcomes, evenly."""
        *rare, every = moments
        each = count * 3 // 4 // len(rare) if rare else 0
        k, drift = self.context, self.config.drift
        length = (drift ** rng.random(count)).round().astype(np.int64)
        length[each * len(rare) :] = drift
        ends = np.concatenate([*(self._far(c, length[i * each : (i + 1) * each], rng) for i, c in enumerate(rare)),
                               rng.choice(every, count - each * len(rare))])  # fmt: skip
        begin = np.maximum(ends - length, self._start[ends])
        length = ends - begin
        latents = np.zeros((count, k + drift, *self.data.latents.shape[1:]), np.float16)
        bar = tqdm(total=int(length.sum()), desc="dream", unit="step", unit_scale=True)
        dynamics, together = dynamics.to(device, memory_format=torch.channels_last), _TOGETHER.get(device.type, 128)
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=pick_precision("auto", device) == "bf16"):
            for rows, nfe in shared_out(length, together):
                sampler = SamplerConfig(nfe=nfe)
                context = self._gather(begin[rows])[0].float().to(device)
                latents[rows, :k] = context.half().cpu().numpy()
                memory = dynamics.recall(context)
                for step in range(length[rows].max()):
                    now = np.minimum(begin[rows] + step, ends[rows])
                    noise = torch.from_numpy(rng.standard_normal(context[:, 0].shape, np.float32)).to(device)
                    actions = torch.from_numpy(self._taken(now)).to(device)
                    clean, _ = draw_next(dynamics, context, actions, noise, sampler, memory)
                    memory = dynamics.remember(memory, context[:, -1], clean)
                    context = torch.cat([context[:, 1:], clean[:, None]], 1)
                    latents[rows, k + step] = clean.half().cpu().numpy()
                bar.update(int(length[rows].sum()))
        bar.close()
        return _Dreams(latents, begin, length, each * len(rare))

    def batch(self, rng: np.random.Generator, size: int) -> dict[str, Tensor]:
        """Contexts float16 (B, K, C, H, W), actions int64 (B, K), labels int64 (B,); the first rows' contexts are dreamt."""
        config = self.config
        *rare, every = self._train
        pick, place = rng.random(size), rng.random(size)
        earlier = rng.integers(1, 12, size=size, endpoint=True)
        now = every[rng.integers(len(every), size=size)]
        if rare:
            which = rng.integers(len(rare), size=size)
            event = np.array([rare[w][int(p * len(rare[w]))] for w, p in zip(which, place, strict=True)])
            near = np.maximum(event - earlier, self._start[event])
            now = np.where(pick < config.balance, event, np.where(pick < config.balance + config.near, near, now))
        dreams, rows = self._dreams, 0
        if dreams is not None:
            rows = int(size * config.dreamt)
            eventful = (pick[:rows] < config.balance + config.near) & (dreams.eventful > 0)
            first = np.where(eventful, 0, dreams.eventful)
            last = np.where(eventful, dreams.eventful, len(dreams.begin))
            row = first + (place[:rows] * (last - first)).astype(np.int64)
            steps = dreams.length[row]
            back = np.where(pick[:rows] < config.balance, 0, earlier[:rows])
            depth = np.where(eventful, np.maximum(steps - back, 0), rng.integers(0, steps, endpoint=True))
            now[:rows] = dreams.begin[row] + depth
        context, actions = self._gather(now[rows:])
        if dreams is not None:
            context = torch.cat([dreams.contexts(row, depth, self.context), context])
            actions = torch.cat([torch.from_numpy(self._taken(now[:rows])), actions])
        return {"context": context, "actions": actions, "labels": torch.from_numpy(self._all_labels[now])}

    def loss(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator,
             progress: float) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Cross-entropy of the joint outcomes."""
        context, labels = batch["context"].float(), batch["labels"]
        sigma = torch.rand(len(context), generator=generator, device=context.device) * self.config.context_noise
        noise = torch.randn(context.shape, generator=generator, device=context.device)
        if camera := self.data.autoencoder.camera_channels:
            noise[:, :, -camera:] = 0
        noised = context + noise * sigma[:, None, None, None, None]
        logits = model(noised, batch["actions"], self._ahead(context, batch["actions"]))
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}

    def stage(self, progress: float) -> int:
        """See `trainers.loop.Task`: one all along."""
        return 0

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Calibrate on validation levels (stored with the model), then average precision and negative log-likelihood.

        With dreams, half of the calibration's weight lies on dreamt contexts, whose figures are called `dreamt ...`.
        """
        head = cast(OutcomeHead, model)
        *rare, val = self._val
        kept = np.random.default_rng(0).permutation(val[self.labels[val] == 0])[:12000]
        sets = {"": (np.concatenate([*rare, kept]), None)}
        if (dreams := self._val_dreams) is not None:
            calm = np.repeat(np.arange(dreams.eventful, len(dreams.begin)), _DEPTHS)
            depth = np.random.default_rng(0).integers(0, dreams.length[calm], endpoint=True)
            row = np.concatenate([np.arange(dreams.eventful), calm])
            depth = np.concatenate([dreams.length[: dreams.eventful], depth])
            at = dreams.begin[row] + depth
            fair = (row < dreams.eventful) == (self._all_labels[at] > 0)
            sets["dreamt "] = (at[fair], dreams.contexts(row[fair], depth[fair], self.context))
        share = np.bincount(self.labels[val], minlength=len(head.config.rewards)) / len(val)
        logits, labels, weights = {}, {}, {}
        for name, (now, contexts) in sets.items():
            logits[name] = self._logits(head, now, contexts)
            which = self._all_labels[now]
            labels[name] = torch.from_numpy(which)
            found = np.bincount(which, minlength=len(share)) / len(now)
            weights[name] = torch.from_numpy((share / np.maximum(found, 1e-12))[which] / len(now))
        scale, bias, nll = calibrate(*(torch.cat(list(part.values())) for part in (logits, labels, weights)))
        head.config = replace(head.config, scale=scale, bias=tuple(bias))
        figures = {"nll": nll}
        for name in sets:
            probabilities = (scale * logits[name] + torch.tensor(bias)).softmax(1)
            for c in range(1, len(head.config.rewards)):
                outcome = f"reward {head.config.rewards[c]:g}{' end' if head.config.terminated[c] else ''}"
                figures[f"ap {name}{outcome}"] = average_precision(
                    probabilities[:, c].numpy(), (labels[name] == c).numpy(), weights[name].numpy())  # fmt: skip
        return figures

    def _logits(self, head: OutcomeHead, now: np.ndarray, contexts: Tensor | None) -> Tensor:
        device = next(head.parameters()).device
        out = []
        for at in range(0, len(now), 256):
            context, actions = self._gather(now[at : at + 256])
            if contexts is not None:
                context = contexts[at : at + 256]
            context, actions = context.float().to(device), actions.to(device)
            out.append(head(context, actions, self._ahead(context, actions)).cpu())
        return torch.cat(out)

    def _ahead(self, context: Tensor, actions: Tensor) -> Tensor | None:
        """What the head is told of the next step, of a context without noise, as when it is used."""
        if self._dynamics is None:
            return None
        with torch.no_grad():
            return self._dynamics.to(context.device).ahead(context, actions)

    def facts(self) -> dict[str, Any]:
        """Share of each joint outcome in the data, and what other data there was."""
        outcomes = len(cast(OutcomeHead, self.model).config.rewards)
        return {"outcome_share": (np.bincount(self.labels, minlength=outcomes) / len(self.labels)).tolist(),
                "also": None if self._also is None else self._also.dataset.facts,
                "autoencoder_sha256": self.data.facts["autoencoder_sha256"]}  # fmt: skip

    def _of(self, now: np.ndarray) -> list[tuple[LatentDataset, np.ndarray, np.ndarray]]:
        """Which data steps int64 (B,) belong to: each with the rows bool (B,) that are its own, and their indices in it."""
        own = len(self.labels)
        parts = [(self.data, now < own, now[now < own])]
        return parts if self._also is None else [*parts, (self._also, now >= own, now[now >= own] - own)]

    def _taken(self, now: np.ndarray) -> np.ndarray:
        """Actions int64 (B, K) of the contexts that end at steps of either data."""
        taken = np.empty((len(now), self.context), np.int64)
        for data, rows, at in self._of(now):
            taken[rows] = data.contexts(at, self.context)[1]
        return taken

    def _gather(self, now: np.ndarray) -> tuple[Tensor, Tensor]:
        """Contexts float16 (B, K, C, H, W) and actions int64 (B, K) of steps of either data."""
        context = torch.empty((len(now), self.context, *self.data.latents.shape[1:]), dtype=torch.float16)
        taken = np.empty((len(now), self.context), np.int64)
        for data, rows, at in self._of(now):
            indices, taken[rows] = data.contexts(at, self.context)
            context[rows] = data.gather(indices)
        return context, torch.from_numpy(taken)

    def _far(self, steps: np.ndarray, length: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One of `steps` for each length int64 (D,), with so many steps of its episode before it where there are such."""
        room = self._start[steps] - steps
        order = np.argsort(room, kind="stable")
        fit = np.searchsorted(room[order], -length, side="right").clip(1)
        return steps[order[(rng.random(len(length)) * fit).astype(np.int64)]]


@dataclass(frozen=True)
class _Dreams:
    """Dreams from real contexts, along the real actions.

    Attributes:
        latents: float16 (D, K + S, C, H, W): the real context, then what was dreamt.
        begin: int64 (D,), the step at which each begins; length: int64 (D,), how many of its steps are meant.
        eventful: the first so many end at a rare outcome.
    """

    latents: np.ndarray
    begin: np.ndarray
    length: np.ndarray
    eventful: int

    def contexts(self, row: np.ndarray, depth: np.ndarray, context: int) -> Tensor:
        """The contexts float16 (B, K, C, H, W) after `depth` dreamt steps."""
        return torch.from_numpy(self.latents[row[:, None], depth[:, None] + np.arange(context)])


def shared_out(length: np.ndarray, together: int) -> list[tuple[np.ndarray, int]]:
    """Share dreams of lengths int64 (D,) out to batches of up to `together`: their rows, and the evaluations a step, 1 or 2.

    Dreams of about one length are dreamt together, few on for others' sake, and half of each length with either: the long ones
    are the uneventful, and what two evaluations draw must not be taken for a sign of that.
    """
    order, batches = np.argsort(length, kind="stable"), []
    for at in range(0, len(order), 2 * together):
        block = order[at : at + 2 * together]
        batches += [(block[i::2], i + 1) for i in range(min(2, len(block)))]
    return batches


def _fitting_dynamics(folder: str, data: LatentDataset, context: int) -> Dynamics:
    dynamics, facts = load_model(folder)
    if not isinstance(dynamics, LatentFlow | TileFlow) or facts.get("autoencoder_sha256") != data.facts["autoencoder_sha256"]:
        raise ConfigError(f"dynamics {folder}: is no dynamics trained on these latents")
    check(dynamics.config.context == context,
          f"dynamics {folder}: has a context of {dynamics.config.context}, the head of {context}")
    return dynamics.eval().requires_grad_(False)


def trained_head(folder: str, option: str) -> OutcomeHead:
    """Load a trained head; raises `ConfigError`, naming the option, where the folder holds something else."""
    model, _ = load_model(folder)
    if not isinstance(model, OutcomeHead):
        raise ConfigError(f"{option} {folder}: is a {type(model).__name__}, expected an outcome head")
    return model


def dreams_for(minutes: float, steps: int | None) -> int:
    """How many dreams a training is worth that takes so many minutes in all its stages, or steps where they are given."""
    return max(min(HeadsTaskConfig.dreams, int(40 * minutes) if steps is None else 64 * steps), 2)
