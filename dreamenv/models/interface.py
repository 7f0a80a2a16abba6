"""What a world model is made of: a codec, dynamics and an outcome head, and the records they hand to one another.

Shapes: B is a batch, K the context length, T time, (C, H, W) one latent. Nothing here knows a family of models; a new
one is a file that registers subclasses of these (`dreamenv.models.registry`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from dreamenv.config import to_dict
from dreamenv.contract.actions import NOOP, NUM_ACTIONS
from dreamenv.models.latents import LatentSpec, Prediction, Reconstruction, to_frames, to_images
from dreamenv.models.outcomes import OutcomeHead, OutcomeHeadConfig
from dreamenv.models.state import State

__all__ = [
    "NULL_ACTION",
    "Backbone",
    "Codec",
    "Dynamics",
    "LatentSpec",
    "OutcomeHead",
    "OutcomeHeadConfig",
    "Prediction",
    "Reconstruction",
    "State",
    "to_frames",
    "to_images",
]

NULL_ACTION = NUM_ACTIONS
"""An extra action, "not known": for classifier-free guidance and for actions hidden in training."""


class Codec(nn.Module, ABC):
    """Frames <-> latents.

    Attributes:
        spec: what a latent is.
        frame: (H, W, C) of a frame.
        columns: names of dataset columns that `encode` and `sequence` want beside the frames, where data has them.
        keeps: names of tensors of a `State` that `decode` wants beside the latent.
        autocast: whether `decode` may run under bf16 autocast (it must then keep its last layers in fp32).
        stored: dtype of latents in encoded datasets.
    """

    config: Any
    spec: LatentSpec
    frame: tuple[int, int, int] = (64, 64, 3)
    columns: ClassVar[tuple[str, ...]] = ()
    keeps: ClassVar[tuple[str, ...]] = ()
    autocast: ClassVar[bool] = False
    stored: ClassVar[torch.dtype] = torch.float16

    @property
    def games(self) -> tuple[str, ...]:
        """The games that it is told apart, none if of one; `encode` then wants `game` int64 (B,)."""
        return getattr(self.config, "games", ())

    @property
    def content_channels(self) -> int:
        """How many of the first channels are learnt content; the others, if any, hold known quantities."""
        return self.spec.shape[0] - self.spec.known

    def shared(self) -> dict[str, Any]:
        """Values that the configurations of models on its latents take over, where they have such a field."""
        return {"latent": to_dict(self.spec)}

    @abstractmethod
    def encode(self, images: Tensor, **columns: Tensor) -> Tensor:
        """Images (B, c, h, w) in [0, 1] -> latents (B, C, H, W); what no column says is read off the picture.

        Columns are values (B, ...) that datasets keep beside frames, and `game`, see `games`.
        """

    @abstractmethod
    def decode(self, latents: Tensor, **kept: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> images (B, c, h, w), about [0, 1] and not clamped."""

    def forward(self, images: Tensor, noise: Tensor) -> Reconstruction:
        """Encode and decode images (B, c, h, w), for training; `noise` (B, C, H, W) is added to the latents."""
        latents = self.encode(images)
        return Reconstruction(self.decode(latents + noise), latents, torch.zeros((), device=images.device))

    def pack(self, latents: Tensor) -> Tensor:
        """Latents as encoded datasets store them, of dtype `stored`."""
        return latents.to(self.stored)

    def unpack(self, stored: Tensor) -> Tensor:
        """Latents, float16 or as they were, of what `pack` made."""
        return stored

    def sequence(self, latents: Tensor, first: Tensor | None = None, **columns: Tensor) -> Tensor:
        """Fill in what only pictures in a row can tell.

        Args:
            latents: (B, T, C, H, W), each encoded alone.
            first: bool (B, T), where an episode begins; None: at the first only.
            columns: of `self.columns`, each (B, T, ...); without them it is worked out from the latents.
        """
        return latents

    def hold(self, latents: Tensor, repeated: Tensor) -> Tensor:
        """Latents (B, T, C, H, W) in which a picture repeats the one before where bool (B, T) says so."""
        return latents

    def noised(self, latents: Tensor, noise: Tensor) -> Tensor:
        """Latents (..., C, H, W) with noise added to their content, not to known quantities."""
        return latents + noise

    def visible(self, latents: Tensor) -> Tensor:
        """Which share of each cell the picture of latents (B, C, H, W) shows, (B, H, W)."""
        return torch.ones_like(latents[:, 0])

    def pool(self, values: Tensor, latents: Tensor) -> Tensor:
        """Means over each cell of pictures' values (B, h, w) -> (B, H, W)."""
        return nn.functional.adaptive_avg_pool2d(values[:, None], self.spec.shape[1:])[:, 0]

    def path_errors(self, dream: Tensor, real: Tensor) -> dict[str, Tensor]:
        """How far known quantities of dreams (B, T, C, H, W) are from the real ones after each step, name -> (T,)."""
        return {}

    def check_columns(self, columns: Mapping[str, np.ndarray], where: str) -> None:
        """Raise `DatasetError` if data cannot be encoded for training; `where` names it."""


class Dynamics(nn.Module, ABC):
    """Latents and an action -> the next latent. `predict` is one differentiable evaluation; all else is bookkeeping.

    Attributes:
        remembers: whether `begin` makes something of pictures from before the context.
        learning_rates: parameter name -> factor, for those that learn faster and do not decay.
        deterministic: whether it knows no noise: `x` and `tau` are not looked at, and every evaluation says the same.
        frame_levels: whether `begin` takes a noise level for each latent, instead of one for all.
        parts: names of the parts that its predictions have.
        precise: names with which those weights begin that keep 16 bits where a bundle rounds the others to 8, for
            their errors add up from step to step.
        choices: settings of the configuration that are chosen after training, a number for each game, and which numbers
            are tried; see `trainers.choose`.
    """

    config: Any
    remembers: ClassVar[bool] = False
    choices: ClassVar[Mapping[str, tuple[float, ...]]] = {}
    parts: ClassVar[tuple[str, ...]] = ()
    precise: ClassVar[tuple[str, ...]] = ()
    learning_rates: ClassVar[dict[str, float]] = {}
    deterministic: bool = False
    frame_levels: ClassVar[bool] = False

    @property
    def spec(self) -> LatentSpec:
        """What its latents are."""
        return self.config.latent

    @property
    def context(self) -> int:
        """K, how many latents a state holds."""
        return self.config.context

    @property
    def games(self) -> tuple[str, ...]:
        """The games that it is told apart, none if of one; states then have `game` int64 (B,), which it is."""
        return getattr(self.config, "games", ())

    @property
    def hinted(self) -> Mapping[str, tuple[int, ...]]:
        """The shapes of what it hints of a step, by name, without the batch."""
        return {}

    @property
    def local(self) -> bool:
        """Whether a part of a picture is to it as a smaller picture is."""
        return False

    @property
    def sees_noise(self) -> bool:
        """Whether what it says at tau = 0 depends on the noise `x`."""
        return False

    @property
    def spans(self) -> tuple[float, ...]:
        """Lengths of long steps along the path that it learns, 1 first: one evaluation from noise is a draw then."""
        return ()

    def smooth(self, latents: Tensor, actions: Tensor) -> Tensor:
        """What these dynamics make of latents (B, T, C, H, W), T <= K, that were read off real pictures."""
        return latents

    def begin(
        self,
        latents: Tensor,
        actions: Tensor,
        past: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        level: Tensor | None = None,
    ) -> State:
        """Make a state of real history.

        Args:
            latents: (B, T, C, H, W), T <= K; a shorter history repeats its first, as an environment does after reset.
            actions: int64 (B, T - 1), those between them; padding is no-ops.
            past: (B, P, C, H, W), earlier latents, for dynamics that remember.
            columns: the codec's columns at the P past moments and at the context's first, each (B, P + 1, ...).
            level: (B,), or (B, T) for dynamics with `frame_levels`: the standard deviation of noise in the latents, for
                dynamics that keep more of them than the latents; None is 0.
        """
        missing = self.context - latents.shape[1]
        if missing:
            latents = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], 1)
            actions = nn.functional.pad(actions, (missing, 0), value=NOOP)
        return State({"latents": latents, "actions": actions})

    @abstractmethod
    def predict(
        self,
        state: State,
        action: Tensor,
        x: Tensor | None = None,
        tau: Tensor | None = None,
        level: Tensor | None = None,
        hints: Mapping[str, Tensor] | None = None,
        span: Tensor | None = None,
    ) -> Prediction:
        """Predict the next latent: one evaluation, differentiable.

        Args:
            state: (B,) states.
            action: int64 (B,), the one taken now; `NULL_ACTION` is unknown.
            x: (B, C, H, W), the point at `tau` on the path from noise to the next latent; None means tau = 0.
            tau: (B,) in [0, 1); None is 0.
            level: (B,), the standard deviation of noise in the state's latents; None is 0.
            hints: of another prediction, or of `truth`, with which this one is to be comparable cell by cell.
            span: (B,), how far along the path one step will go with what is predicted, for dynamics with `spans`; None
                is 0, an infinitely short one.
        """

    def forward(self, *args: Any, **kwargs: Any) -> Prediction:
        """`predict`, by the name under which data-parallel training calls it."""
        return self.predict(*args, **kwargs)

    def hints(self, state: State, action: Tensor) -> dict[str, Tensor]:
        """What `predict` would hint, where that is cheaper to know alone."""
        return {}

    def advance(self, state: State, action: Tensor, latent: Tensor) -> State:
        """The state one step on, when `action` (B,) led to `latent` (B, C, H, W)."""
        return state.replace(
            latents=torch.cat([state.latents[:, 1:], latent[:, None]], 1),
            actions=torch.cat([state.actions, action[:, None]], 1)[:, 1:],
        )

    def truth(self, state: State, target: Tensor) -> dict[str, Tensor]:
        """Hints with which a prediction is comparable with the true next latent (B, C, H, W): for training."""
        return {}

    def align(self, latent: Tensor, target: Tensor) -> Tensor:
        """A prediction (n B, C, H, W) made with `truth`, its known quantities those of the target (B, C, H, W)."""
        return latent

    def guide(self, aware: Prediction, unaware: Prediction, scale: float) -> Prediction:
        """Classifier-free guidance (Ho & Salimans 2022): what the action changed, `scale` times."""
        return replace(aware, latent=unaware.latent + scale * (aware.latent - unaware.latent))

    def goes_on_from(self, other: Dynamics) -> bool:
        """Whether weights of others of its class mean in it what they meant there; shapes are checked apart."""
        return True

    def grown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of an older or smaller configuration, made to fit this one where that changes nothing."""
        return weights


class Backbone(nn.Module, ABC):
    """A part that mixes cells. Made as `cls(config, c_in, cond, tokens)`.

    Args:
        config: its shape.
        c_in: channels of the maps it is given.
        cond: width of the conditioning vector.
        tokens: width of the sequence of actions it may attend to; 0 where there is none.

    Attributes:
        width: channels of its features.
        attends: whether it looks at the sequence of actions.
        local: whether it knows a cell's place only from where the picture ends.
    """

    width: int
    attends: bool = False
    local: ClassVar[bool] = False

    @abstractmethod
    def forward(self, x: Tensor, cond: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Maps (B, c_in, H, W), conditions (B, cond), actions (B, n, tokens) -> features (B, width, H, W)."""
