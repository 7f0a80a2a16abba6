"""Trains the reward / termination head on (context, action), class-balanced, then calibrates it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.errors import ConfigError
from dreamenv.flow import SamplerConfig
from dreamenv.metrics import average_precision
from dreamenv.models.heads import OutcomeHead
from dreamenv.models.io import load_model
from dreamenv.models.latent_flow import LatentFlow, draw_next
from dreamenv.models.registry import build_model
from trainers.latents import LatentDataset


@dataclass(frozen=True)
class HeadsTaskConfig:
    """What the outcome head is trained for."""

    latents: str = "runs/coinrun/latents"
    """Folder of the encoded dataset."""
    init_from: str = ""
    """Model folder to start from; empty starts anew."""
    balance: float = 0.4
    """Share of each batch drawn from the rare outcomes, evenly between them."""
    near: float = 0.2
    """Share drawn from the last steps before a rare outcome, the hardest negatives."""
    dynamics: str = ""
    """Model folder of trained dynamics; some contexts are then dreamt, as they will be when the head is used."""
    drift: int = 6
    """Most steps dreamt, with two evaluations each, before the head is asked."""
    dreamt: float = 0.25
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
        outcomes, self.labels = joint_outcomes(self.data.rewards, self.data.terminated, config.max_outcomes)
        before = _trained_head(config.init_from) if config.init_from else None
        if before is not None:  # which keeps its outcomes, in their order
            known = list(zip(before.config.rewards, before.config.terminated, strict=True))
            unknown = [o for o in outcomes if o not in known]
            check(not unknown, f"init_from {config.init_from}: its head does not know the outcomes {unknown} of this data; "
                               "train a new head")  # fmt: skip
            self.labels = np.array([known.index(o) for o in outcomes])[self.labels]
            outcomes = known
        torch.manual_seed(seed)
        self.model: nn.Module = build_model({
            **model, "rewards": [r for r, _ in outcomes], "terminated": [t for _, t in outcomes],
        })  # fmt: skip
        network = cast(OutcomeHead, self.model).config
        if before is not None:
            try:
                self.model.load_state_dict(before.state_dict())
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                raise ConfigError(f"init_from {config.init_from}: holds another architecture ({reason})") from None
        wanted, found = (network.latent_channels, network.latent_size), self.data.latents.shape[1:3]
        check(wanted == found, f"latent_channels, latent_size {wanted}: the latents have {found}")
        self.context = network.context
        self.dynamics: LatentFlow | None = None
        if config.dynamics:
            loaded, facts = load_model(config.dynamics)
            check(isinstance(loaded, LatentFlow) and facts.get("autoencoder_sha256") == self.data.facts["autoencoder_sha256"],
                  f"dynamics {config.dynamics}: is no latent_flow trained on these latents")
            self.dynamics = cast(LatentFlow, loaded).requires_grad_(False)
            check(self.dynamics.config.context == self.context,
                  f"dynamics {config.dynamics}: has a context of {self.dynamics.config.context}, the head of {self.context}")
        train = np.flatnonzero(~self.data.validation)
        check(0 < len(train) < len(self.labels),
              f"val_ratio {config.val_ratio}: leaves no levels to train on or none to validate on; collect more levels")
        self._all = train
        self._classes = [train[self.labels[train] == c] for c in range(1, len(outcomes))]
        self._classes = [c for c in self._classes if len(c)]
        rare = np.flatnonzero((self.labels > 0) & ~self.data.validation)
        earlier = (rare[:, None] - np.arange(1, 13)).ravel()
        earlier = earlier[earlier >= 0]
        self._near = np.unique(earlier[(self.labels[earlier] == 0) & ~self.data.validation[earlier]])

    def batch(self, rng: np.random.Generator, size: int) -> dict[str, Tensor]:
        """Contexts float16 (B, K, C, H, W), actions int64 (B, K), labels int64 (B,).

        With dynamics, the first D rows' contexts lie some steps back, and `roll` int64 (D, S, K) holds the actions of
        S steps to be dreamt, of which `live` bool (D, S) are meant.
        """
        pick = rng.random(size)
        now = self._all[rng.integers(len(self._all), size=size)]
        if self._classes:
            which = rng.integers(len(self._classes), size=size)
            place = rng.random(size)
            rare = np.array([self._classes[w][int(p * len(self._classes[w]))] for w, p in zip(which, place, strict=True)])
            now = np.where(pick < self.config.balance, rare, now)
        if len(self._near):
            near = self._near[rng.integers(len(self._near), size=size)]
            now = np.where((pick >= self.config.balance) & (pick < self.config.balance + self.config.near), near, now)
        _, actions = self._gather(now)
        back = np.zeros(size, np.int64)
        out = {"actions": actions, "labels": torch.from_numpy(self.labels[now])}
        if self.dynamics is not None:
            rows, steps = int(size * self.config.dreamt), int(rng.integers(1, self.config.drift, endpoint=True))
            back[:rows] = np.minimum(steps, now[:rows] - self.data.start[now[:rows]])
            ahead = np.arange(steps)[None] - steps  # -steps .. -1, relative to now
            live = -ahead <= back[:rows, None]
            moments = np.maximum(now[:rows, None] + ahead, self.data.start[now[:rows]][:, None])
            roll = self._gather(moments.ravel())[1].unflatten(0, moments.shape)
            out |= {"roll": roll, "live": torch.from_numpy(live)}
        return out | {"context": self._gather(now - back)[0]}

    def loss(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator,
             progress: float) -> tuple[Tensor, dict[str, Tensor]]:  # fmt: skip
        """Cross-entropy of the joint outcomes."""
        context, labels = batch["context"].float(), batch["labels"]
        if self.dynamics is not None and len(batch["roll"]):
            context = torch.cat([self._dream(context[: len(batch["roll"])], batch, generator), context[len(batch["roll"]) :]])
        sigma = torch.rand(len(context), generator=generator, device=context.device) * self.config.context_noise
        noise = torch.randn(context.shape, generator=generator, device=context.device)
        logits = model(context + noise * sigma[:, None, None, None, None], batch["actions"])
        accuracy = (logits.detach().argmax(1) == labels).float().mean()
        return F.cross_entropy(logits, labels), {"accuracy": accuracy}

    @torch.no_grad()
    def _dream(self, context: Tensor, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        assert self.dynamics is not None
        dynamics = self.dynamics.to(context.device)
        for step in range(batch["roll"].shape[1]):
            noise = torch.randn(context[:, 0].shape, generator=generator, device=context.device)
            clean, _ = draw_next(dynamics, context, batch["roll"][:, step], noise, SamplerConfig(nfe=2))
            moved = torch.cat([context[:, 1:], clean[:, None]], 1)
            context = torch.where(batch["live"][:, step, None, None, None, None], moved, context)
        return context

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """Calibrate on validation levels (stored with the model), then average precision and negative log-likelihood."""
        head = cast(OutcomeHead, model)
        device = next(model.parameters()).device
        val = np.flatnonzero(self.data.validation)
        rare = val[self.labels[val] > 0]
        common = val[self.labels[val] == 0]
        kept = np.random.default_rng(0).permutation(common)[:12000]
        now = np.concatenate([rare, kept])
        weights = torch.cat([torch.ones(len(rare)), torch.full((len(kept),), len(common) / max(len(kept), 1))])
        logits = []
        for at in range(0, len(now), 256):
            context, actions = self._gather(now[at : at + 256])
            logits.append(head(context.float().to(device), actions.to(device)).cpu())
        labels = torch.from_numpy(self.labels[now])
        scale, bias, nll = calibrate(torch.cat(logits), labels, weights)
        head.config = replace(head.config, scale=scale, bias=tuple(bias))
        probabilities = (scale * torch.cat(logits) + torch.tensor(bias)).softmax(1)
        figures = {"nll": nll}
        for c in range(1, len(head.config.rewards)):
            name = f"reward {head.config.rewards[c]:g}{' end' if head.config.terminated[c] else ''}"
            figures[f"ap {name}"] = average_precision(probabilities[:, c].numpy(), (labels == c).numpy(), weights.numpy())
        return figures

    def facts(self) -> dict[str, Any]:
        """Share of each joint outcome in the data."""
        outcomes = len(cast(OutcomeHead, self.model).config.rewards)
        return {"outcome_share": (np.bincount(self.labels, minlength=outcomes) / len(self.labels)).tolist(),
                "autoencoder_sha256": self.data.facts["autoencoder_sha256"]}  # fmt: skip

    def _gather(self, now: np.ndarray) -> tuple[Tensor, Tensor]:
        indices, actions = self.data.contexts(now, self.context)
        return torch.from_numpy(self.data.latents[indices]), torch.from_numpy(actions)


def _trained_head(folder: str) -> OutcomeHead:
    model, _ = load_model(folder)
    if not isinstance(model, OutcomeHead):
        raise ConfigError(f"init_from {folder}: is a {type(model).__name__}, expected an outcome_head")
    return model


def joint_outcomes(rewards: np.ndarray, terminated: np.ndarray, limit: int) -> tuple[list[tuple[float, bool]], np.ndarray]:
    """Return the joint outcomes, (0, False) first and then by frequency, and each step's label int64 (N,)."""
    pairs = np.stack([np.round(rewards.astype(np.float64), 4), terminated.astype(np.float64)], 1)
    values, inverse, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    null = (values == 0).all(1)
    order = np.argsort(np.where(null, -np.inf, -counts), kind="stable")
    if not null.any():  # an odd dataset without an uneventful step: the null outcome exists all the same
        values = np.concatenate([[[0.0, 0.0]], values])
        order, inverse = np.arange(len(values)), inverse + 1
    kept = order[:limit]
    ends = [o for o in order if values[o][1]]
    if ends and ends[0] not in kept:  # an episode must be able to end
        kept = np.append(kept[:-1], ends[0])
    new = np.zeros(len(values), np.int64)
    for old in range(len(values)):
        same = [k for k, o in enumerate(kept) if values[o][1] == values[old][1]] or [0]
        new[old] = min(same, key=lambda k: abs(values[kept[k]][0] - values[old][0]))
    return [(float(values[o][0]), bool(values[o][1])) for o in kept], new[inverse]


def calibrate(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[float, list[float], float]:
    """Fit one scale and a bias per outcome by weighted likelihood (vector-bias Platt scaling, Guo et al. 2017)."""
    with torch.enable_grad():
        log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
        x, w = logits.double(), weights.double() / weights.sum()
        optimizer = torch.optim.LBFGS([log_scale, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            nll = (F.cross_entropy(log_scale.exp() * x + bias, labels, reduction="none") * w).sum()
            nll = nll + 1e-6 * (bias**2).sum()  # an outcome absent from validation must not run away
            nll.backward()
            return nll

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        final = closure()
    bias = bias.detach() - bias.detach()[0]
    return float(log_scale.detach().exp()), [float(b) for b in bias], float(final.detach())
