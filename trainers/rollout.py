"""Unrolled predictions: what loss terms look at. A rollout goes on from the dynamics' own predictions."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, nn

from dreamenv.config import check
from dreamenv.flow import interpolate
from dreamenv.models.blocks import fp32
from dreamenv.models.interface import NULL_ACTION, Codec, Dynamics, Prediction, State
from trainers.batch import Batch
from trainers.models import of_game


@dataclass(frozen=True)
class DynamicsBatch(Batch):
    """Samples of K + U steps, K of context and U to predict.

    Attributes:
        latents: (B, K + U, C, H, W), float16 until it is on a device.
        actions: int64 (B, K + U), entry t taken at latent t.
        importance: uint8 (B, U, H, W), 16 x the mean rare-colour weight of each cell's pixels.
        live: bool (B, U), which of the steps to predict exist: a sample may run past its episode's end.
        past: (B, P, C, H, W), earlier latents, for dynamics that remember.
        columns: the codec's columns at the past moments and at the context's first, each (B, P + 1, ...).
        extra: what terms want besides, by their own names.
        game: int64 (B,), which of several games each sample is of; None where there is but one.
        weight: float32 (B,), how much each sample's errors count; None is 1.
        rim: bool (B, H, W), cells that are not predicted but go on from the truth: what is beside them, outside a part
            of a picture, is not known. None where pictures are whole.
    """

    latents: Tensor
    actions: Tensor
    importance: Tensor
    live: Tensor
    past: Tensor | None = None
    columns: dict[str, Tensor] = field(default_factory=dict)
    extra: dict[str, Tensor] = field(default_factory=dict)
    game: Tensor | None = None
    weight: Tensor | None = None
    rim: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One predicted step of a rollout.

    Attributes:
        state: the states before it; action: int64 (B,).
        target: (B, C, H, W), the true next latents; hints: with which a prediction is comparable with them.
        prediction: of one evaluation; draw: of a second one from noise and the first, where the rollout goes on from
            draws.
        error: (B, H, W), the first's squared error, channels weighted, where it counts.
        live: (B, H, W), which share of each cell counts; cells: (B, H, W), how much a cell weighs.
    """

    state: State
    action: Tensor
    target: Tensor
    hints: Mapping[str, Tensor]
    prediction: Prediction
    draw: Prediction | None
    error: Tensor
    live: Tensor
    cells: Tensor


@dataclass(frozen=True)
class Rollout:
    """Steps that go on from one another.

    Attributes:
        steps: U of them.
        trail: (B, K + U, C, H, W), the context with its noise and then what was predicted (or drawn), from which the
            rollout goes on unless it is to go on from the truth.
        actions: int64 (B, K + U), the true ones; given: those that the dynamics saw, some hidden.
        level: (B,), or (B, K) of dynamics with `frame_levels`: the standard deviation of the noise in the context.
        copies: how many rollouts there are of each sample, one after the other along the batch.
    """

    steps: list[Step]
    trail: Tensor
    actions: Tensor
    given: Tensor
    level: Tensor
    copies: int


@dataclass(frozen=True)
class RolloutConfig:
    """How samples are unrolled."""

    unroll: int
    """U."""
    context_noise: float
    """Largest standard deviation of the noise added to the context; its level is an input."""
    importance: float
    """How far rare-coloured cells weigh more."""
    drop_actions: float
    """Share of samples whose actions are hidden, for guidance."""
    own: float
    """Probability that a step goes on from the model's own prediction instead of the truth."""


class Rollouts:
    """The rollouts of one batch, each made when a term first asks for it.

    Args:
        model: the dynamics, or data-parallel training's wrapper of them: what is evaluated.
        dynamics, codec: the networks themselves.
        channels: (C, 1, 1), the weight of each channel's square.
        batch: on the device.
        config: how samples are unrolled.
        draws: share of the samples that go on from draws, and the number of rollouts of each of these; None for none.
        generator: of all noise.

    Attributes:
        batch: the samples of `mean`; drawn_batch: those of `draw`; share: which part these are.

    Raises:
        ConfigError: the batch is too small to be shared.
    """

    def __init__(
        self,
        model: nn.Module,
        dynamics: Dynamics,
        codec: Codec,
        channels: Tensor,
        batch: DynamicsBatch,
        config: RolloutConfig,
        draws: tuple[float, int] | None,
        generator: torch.Generator,
    ) -> None:
        self.model, self.dynamics, self.codec, self.channels = model, dynamics, codec, channels
        self.config, self.generator = config, generator
        size = len(batch.actions)
        self.share, self._copies = draws or (0.0, 0)
        n = size - max(round(size * self.share), 1) if draws else size
        check(n > 0, f"batch_size {size}: too small to share with dreams that go on from draws, needs 2 or more")
        self.batch, self.drawn_batch = batch.rows(slice(0, n)), batch.rows(slice(n, size))

    @cached_property
    def mean(self) -> Rollout:
        """The rollout that goes on from means, of `self.batch`."""
        return self._roll(self.batch, 0)

    @cached_property
    def draw(self) -> Rollout | None:
        """The rollout that goes on from draws of two evaluations, where a term wants one."""
        return self._roll(self.drawn_batch, self._copies) if self._copies else None

    def uniform(self, size: int) -> Tensor:
        """Uniform noise (size,)."""
        return torch.rand(size, generator=self.generator, device=self.channels.device)

    def normal(self, shape: torch.Size) -> Tensor:
        """Standard normal noise."""
        return torch.randn(shape, generator=self.generator, device=self.channels.device)

    def decoded(self, latents: Tensor) -> Tensor:
        """The images float32 (B, c, h, w) of latents (B, C, H, W), in [0, 1], not clamped."""
        latents = latents.float()
        with contextlib.nullcontext() if self.codec.autocast else fp32(latents):
            return self.codec.decode(latents).float()

    def error(self, predicted: Tensor, target: Tensor) -> Tensor:
        """Squared error of latents (B, C, H, W) in each cell (B, H, W), channels weighted."""
        return ((predicted.float() - target).square() * self.channels).mean(1)

    def noised(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """The context (B, K, C, H, W) with noise, and its standard deviation, drawn anew for each sample (B,).

        Of dynamics with a level for each frame it is drawn for each frame, (B, K).
        """
        b, k = context.shape[:2]
        many = self.dynamics.frame_levels
        level = self.uniform(b * k).view(b, k) if many else self.uniform(b)
        level = level * self.config.context_noise
        return self.codec.noised(context, self.normal(context.shape) * level.view(b, -1, 1, 1, 1)), level

    def _roll(self, batch: DynamicsBatch, copies: int) -> Rollout:
        """Unroll from means (no copies), or that many times from draws."""
        k, dynamics, times = self.dynamics.context, self.dynamics, max(copies, 1)
        given = batch.actions
        if not copies:
            hidden = self.uniform(len(given))[:, None] < self.config.drop_actions
            given = given.masked_fill(hidden, NULL_ACTION)
        context, level = self.noised(batch.latents[:, :k])
        state = of_game(dynamics.begin(context, given[:, : k - 1], batch.past, batch.columns, level), batch.game)
        if times > 1:
            state = state.apply(lambda value: value.repeat(times, *(1,) * (value.ndim - 1)))
        level = level.repeat(times, *(1,) * (level.ndim - 1))
        actions = batch.actions.repeat(times, 1)
        given = given.repeat(times, 1)
        cells = 1 + self.config.importance * (batch.importance.float() / 16 - 1).clamp_min(0)
        cells = cells if batch.weight is None else cells * batch.weight[:, None, None, None]
        rim = None if batch.rim is None else batch.rim.repeat(times, 1, 1)
        steps, trail = [], list(state.latents.unbind(1))
        half = torch.full((len(given),), 0.5, device=given.device)
        for u in range(self.config.unroll):
            action, target = given[:, k - 1 + u], batch.latents[:, k + u]
            target = target.repeat(times, 1, 1, 1)
            live = batch.live[:, u].float()[:, None, None].repeat(times, 1, 1) * self.codec.visible(target)
            live = live if rim is None else live * ~rim
            hints = dynamics.truth(state, target)
            prediction = self.model(state, action, level=level, hints=hints)
            draw, going = None, prediction.latent
            if copies:
                x = interpolate(self.normal(going.shape), going.detach().float(), half)
                draw = self.model(state, action, x=x, tau=half, level=level, hints=hints)
                going = draw.latent
            error = self.error(prediction.latent, target) * live
            weights = cells[:, u].repeat(times, 1, 1)
            steps.append(Step(state, action, target, hints, prediction, draw, error, live, weights))
            following = dynamics.align(going.to(state.latents.dtype), target)
            if rim is not None:
                following = torch.where(rim[:, None], target.to(following.dtype), following)
            trail.append(following)
            if self.config.own < 1:
                own = self.uniform(len(following)) < self.config.own
                following = torch.where(own[:, None, None, None], following, target.to(following.dtype))
            state = dynamics.advance(state, action, following)
        return Rollout(steps, torch.stack(trail, 1), actions, given, level, times)
