"""The composed world model: context -> state, step(state, action, noise), decode. Batched and functional."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dreamenv.actions import NOOP
from dreamenv.flow import SamplerConfig
from dreamenv.models.autoencoder import Autoencoder, to_frames, to_images
from dreamenv.models.heads import OutcomeHead
from dreamenv.models.latent_flow import LatentFlow, draw_next
from dreamenv.models.tile import TileAutoencoder
from dreamenv.models.tile_flow import TileFlow
from dreamenv.types import State, Transition

FrameCodec = Autoencoder | TileAutoencoder
Dynamics = LatentFlow | TileFlow


class WorldModel:
    """Autoencoder + dynamics + outcome head on one device, without any state of its own.

    Args:
        autoencoder, dynamics, head: the three networks.
        device: where they run.
        precision: "fp32", or "bf16" autocast of dynamics and head, and of the inner blocks of a tile autoencoder's decoder; the
            rest of an autoencoder is always fp32, for bf16 has no more digits than a pixel.
    """

    def __init__(self, autoencoder: FrameCodec, dynamics: Dynamics, head: OutcomeHead,
                 device: torch.device | str = "cpu", precision: str = "fp32") -> None:  # fmt: skip
        self.device = torch.device(device)
        self.precision = precision
        self.autoencoder, self.dynamics, self.head = autoencoder, dynamics, head
        for model in (autoencoder, dynamics, head):
            model.to(device=self.device)
            model.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            model.eval().requires_grad_(False)
        self.context = dynamics.config.context
        self.latent_shape = autoencoder.latent_shape
        self.rewards = np.asarray(head.config.rewards, np.float64)
        self.terminated = np.asarray(head.config.terminated, bool)

    def _autocast(self, wanted: bool = True) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=wanted and self.precision == "bf16")

    @torch.inference_mode()
    def encode(self, frames: np.ndarray | Tensor) -> Tensor:
        """Frames uint8 (B, 64, 64, 3) -> latents float32 (B, C, H, W)."""
        images = to_images(torch.as_tensor(frames).to(self.device)).contiguous(memory_format=torch.channels_last)
        return self.autoencoder.encode(images).contiguous()

    @torch.inference_mode()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, C, H, W) -> frames uint8 (B, 64, 64, 3) on the CPU."""
        with self._autocast(isinstance(self.autoencoder, TileAutoencoder)):
            images = self.autoencoder.decode(latents.contiguous(memory_format=torch.channels_last))
        return to_frames(images).cpu()

    def start(self, frames: np.ndarray | Tensor, actions: np.ndarray | Tensor) -> State:
        """Build a state from real history.

        Args:
            frames: uint8 (B, T, 64, 64, 3), T >= 1; the last K count, a shorter history repeats its first frame.
            actions: integers (B, T - 1), the action between each two frames; padding is no-ops.
        """
        frames, actions = torch.as_tensor(frames), torch.as_tensor(actions).long()
        b, t = frames.shape[:2]
        frames, actions = frames[:, -self.context :], actions[:, max(t - self.context, 0) :]
        latents = self.encode(frames.flatten(0, 1)).unflatten(0, (b, frames.shape[1]))
        latents = self._follow(latents, actions.to(self.device))
        missing = self.context - frames.shape[1]
        latents = torch.cat([latents[:, :1].expand(-1, missing, -1, -1, -1), latents], 1)
        padding = torch.full((b, missing), NOOP, dtype=torch.int64)
        return State(latents, torch.cat([padding, actions], 1).to(self.device), self._recall(latents))

    @torch.inference_mode()
    def _follow(self, latents: Tensor, actions: Tensor) -> Tensor:
        return self.dynamics.settle(self.autoencoder.track(latents), actions)

    @torch.inference_mode()
    def _recall(self, latents: Tensor) -> Tensor:
        return self.dynamics.recall(latents)

    @torch.inference_mode()
    def step(self, state: State, actions: np.ndarray | Tensor, noise: np.ndarray | Tensor | None,
             sampler: SamplerConfig) -> Transition:  # fmt: skip
        """Imagine one step.

        Args:
            state: (B,) states.
            actions: int64 (B,) in 0..14.
            noise: standard normal float32 (B, C, H, W); may be None where `sampler.stochastic` is False.
            sampler: how the next latent is drawn.
        """
        taken = self._taken(state, actions)
        noise = None if noise is None else torch.as_tensor(noise, device=self.device)
        with self._autocast():
            clean, log_error = draw_next(self.dynamics, state.latents, taken, noise, sampler, state.memory)
        latents = torch.cat([state.latents[:, 1:], clean[:, None]], 1)
        memory = self.dynamics.remember(state.memory, state.latents[:, -1], clean)
        uncertainty = log_error.exp().mean((1, 2)).sqrt()
        outcomes = self._outcomes(state.latents, taken, self.dynamics.beside(clean).get("move"))
        return Transition(State(latents, taken[:, 1:], memory), outcomes, uncertainty)

    @torch.inference_mode()
    def outcomes(self, state: State, actions: np.ndarray | Tensor) -> Tensor:
        """Log-probabilities float32 (B, outcomes) of what the actions int64 (B,) would bring at `state`."""
        taken = self._taken(state, actions)
        return self._outcomes(state.latents, taken, self.dynamics.ahead(state.latents, taken))

    def _outcomes(self, latents: Tensor, taken: Tensor, move: Tensor | None) -> Tensor:
        with self._autocast():
            return self.head.log_probabilities(latents, taken, move)

    def _taken(self, state: State, actions: np.ndarray | Tensor) -> Tensor:
        return torch.cat([state.actions, torch.as_tensor(actions, device=self.device).long()[:, None]], 1)
