"""The composed world model: context -> state, step(state, action, noise), render. Batched and functional."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dreamenv.config import check
from dreamenv.flow import SamplerConfig, sample
from dreamenv.models.interface import Codec, Dynamics, OutcomeHead, State, to_frames, to_images
from dreamenv.types import Transition


class WorldModel:
    """Codec + dynamics + outcome head on one device, without any state of its own.

    Args:
        codec, dynamics, head: the three networks.
        device: where they run.
        precision: "fp32", or "bf16" autocast of dynamics and head, and of a codec's decoder that allows it; the rest of
            a codec is always fp32, for bf16 has no more digits than a pixel.
        game: which of the games that dynamics and head are told apart it is to dream, counted from 0.
        second: other dynamics of that kind on the same latents, as of another training. How far the two disagree on
            the next latent is the model's uncertainty then, in place of the error that the first expects: an ensemble
            as in MOReL (Kidambi et al. 2020). Each step is the first's alone, and costs both.

    Raises:
        ConfigError: the parts disagree on what a latent is, how many a state holds, or which games there are.
    """

    def __init__(
        self,
        codec: Codec,
        dynamics: Dynamics,
        head: OutcomeHead,
        device: torch.device | str = "cpu",
        precision: str = "fp32",
        game: int = 0,
        second: Dynamics | None = None,
    ) -> None:
        alike = second is None or (type(second) is type(dynamics) and second.spec == dynamics.spec)
        alike = alike and (second is None or (second.context, second.games) == (dynamics.context, dynamics.games))
        check(alike, f"second: {type(second).__name__} cannot go on from the states of {type(dynamics).__name__}")
        for name, part in (("dynamics", dynamics), ("head", head)):
            check(
                part.spec == codec.spec, f"{name}: disagrees with the codec on the latents, {part.spec}, {codec.spec}"
            )
        told = (dynamics.context, head.config.context)
        check(told[0] == told[1], f"context: dynamics and head disagree, {told[0]} and {told[1]}")
        names = dynamics.games
        check(names == head.config.games, f"games: dynamics and head disagree, {names} and {head.config.games}")
        check(codec.games in ((), names), f"games: dynamics and codec disagree, {names} and {codec.games}")
        hints = dynamics.hinted
        short = [name for name, shape in head.hinted.items() if hints.get(name) != shape]
        check(not short, f"head: needs the hints {head.hinted} of the dynamics, which hint {hints or 'nothing'}")
        count = max(len(names), 1)
        check(0 <= game < count, f"game {game}: must be one of the {count} that the model knows, from 0")
        self.device, self.game = torch.device(device), game
        self.precision = precision
        self.codec, self.dynamics, self.head, self.second = codec, dynamics, head, second
        for model in (codec, dynamics, head, *(() if second is None else (second,))):
            model.to(device=self.device)
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            model.eval().requires_grad_(False)
        self.context = dynamics.context
        self.latent_shape = codec.spec.shape
        self.frame_shape = codec.frame
        own = [i for i, owner in enumerate(head.config.owners) if owner == game] if names else slice(None)
        self._own = own  # the outcomes of this game
        self.rewards = np.asarray(head.config.rewards, np.float64)[own]
        self.terminated = np.asarray(head.config.terminated, bool)[own]

    def _autocast(self, wanted: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted and self.precision == "bf16")

    def with_second(self, other: WorldModel) -> WorldModel:
        """This model with the dynamics of another one as its `second`.

        Raises:
            ConfigError: the other's latents are made by another codec, or its dynamics are of another kind.
        """
        own, its = self.codec.state_dict(), other.codec.state_dict()
        same = own.keys() == its.keys() and all(torch.equal(own[k], its[k].to(own[k].device)) for k in own)
        check(same, "second: the two models' codecs differ, so their latents do; trainers.finetune keeps a codec")
        networks = (self.codec, self.dynamics, self.head)
        return WorldModel(*networks, self.device, self.precision, self.game, other.dynamics)

    @torch.inference_mode()
    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """Frames uint8 (B, h, w, c) -> latents float32 (B, C, H, W)."""
        images = to_images(torch.as_tensor(frames).to(self.device)).contiguous(memory_format=torch.channels_last)
        told = {"game": torch.full((len(images),), self.game, device=self.device)} if self.codec.games else {}
        return self.codec.encode(images, **told).contiguous()

    @torch.inference_mode()
    def decode(self, latents: Tensor, **kept: Tensor) -> Tensor:
        """Latents (B, C, H, W), and what the codec keeps of a state -> frames uint8 (B, h, w, c) on the CPU."""
        with self._autocast(self.codec.autocast):
            images = self.codec.decode(latents.contiguous(memory_format=torch.channels_last), **kept)
        return to_frames(images).cpu()

    def render(self, state: State) -> Tensor:
        """The current frames of a state, uint8 (B, h, w, c) on the CPU."""
        return self.decode(state.latents[:, -1], **{name: state[name] for name in self.codec.keeps})

    def start(self, frames: np.ndarray | Tensor, actions: np.ndarray | Tensor) -> State:
        """Build a state from real history.

        Args:
            frames: uint8 (B, T, h, w, c), T >= 1; the last K count, a shorter history repeats its first frame.
            actions: integers (B, T - 1), the action between each two frames; padding is no-ops.
        """
        frames, actions = torch.as_tensor(frames), torch.as_tensor(actions).long()
        b, t = frames.shape[:2]
        frames, actions = frames[:, -self.context :], actions[:, max(t - self.context, 0) :].to(self.device)
        return self.begin(self.encode(frames.flatten(0, 1)).unflatten(0, (b, frames.shape[1])), actions)

    @torch.inference_mode()
    def begin(self, latents: Tensor, actions: Tensor) -> State:
        """Build a state from encoded history: latents (B, T, C, H, W), T in 1..K, and actions int64 (B, T - 1)."""
        return self._begin(self.dynamics.smooth(self.codec.sequence(latents), actions), actions)

    def _begin(self, latents: Tensor, actions: Tensor) -> State:
        """The dynamics' state, which says the game where they know several."""
        state = self.dynamics.begin(latents, actions)
        if not self.dynamics.games:
            return state
        return state.replace(game=torch.full((len(latents),), self.game, dtype=torch.int64, device=self.device))

    @torch.inference_mode()
    def blank(self, size: int) -> State:
        """A state of `size` rows of zeros, to be filled."""
        latents = torch.zeros(size, self.context, *self.latent_shape, device=self.device)
        return self._begin(latents, torch.zeros(size, self.context - 1, dtype=torch.int64, device=self.device))

    @torch.inference_mode()
    def step(
        self, state: State, actions: np.ndarray | Tensor, noise: np.ndarray | Tensor | None, sampler: SamplerConfig
    ) -> Transition:
        """Imagine one step.

        Args:
            state: (B,) states.
            actions: int64 (B,) in 0..14.
            noise: standard normal float32 (B, C, H, W); may be None where `sampler.stochastic(dynamics)` is False.
            sampler: how the next latent is drawn.
        """
        action = torch.as_tensor(actions, device=self.device).long()
        noise = None if noise is None else torch.as_tensor(noise, device=self.device)
        with self._autocast():
            prediction = sample(self.dynamics, state, action, noise, sampler)
            other = None if self.second is None else sample(self.second, state, action, noise, sampler)
        following = self.dynamics.advance(state, action, prediction.latent)
        with self._autocast():
            outcomes = self.head.log_probabilities(state, action, prediction.hints)[:, self._own]
        error = prediction.log_error.exp().mean((1, 2))
        if other is not None:
            error = (other.latent - prediction.latent).float().square().mean((1, 2, 3))
        return Transition(following, outcomes, error.sqrt())

    @torch.inference_mode()
    def outcomes(self, state: State, actions: np.ndarray | Tensor) -> Tensor:
        """Log-probabilities float32 (B, outcomes) of what the actions int64 (B,) would bring at `state`."""
        action = torch.as_tensor(actions, device=self.device).long()
        hints = self.dynamics.hints(state, action) if self.head.hinted else {}
        with self._autocast():
            return self.head.log_probabilities(state, action, hints)[:, self._own]
