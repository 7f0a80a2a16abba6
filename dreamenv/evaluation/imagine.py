"""Dreams from real contexts under given actions."""

from __future__ import annotations

import numpy as np
import torch

from dreamenv.contract.noise import draw_step
from dreamenv.flow import SamplerConfig
from dreamenv.types import Clips
from dreamenv.world_model import WorldModel


class CachedEncoder(WorldModel):
    """A world model that encodes no picture twice: measures begin dreams at the same few contexts again and again.

    For one program that encodes the same pictures in the same order only, for which pictures come first decides in what
    company they are encoded, and so their last bits. It keeps all of them, 40 KiB each.
    """

    def __init__(self, model: WorldModel) -> None:
        self.__dict__.update(model.__dict__)
        self._known: dict[bytes, torch.Tensor] = {}

    def encode(self, frames: np.ndarray | torch.Tensor) -> torch.Tensor:
        """See `WorldModel.encode`."""
        each = [frame.tobytes() for frame in np.asarray(frames)]
        new = {key: i for i, key in enumerate(each) if key not in self._known}
        if new:
            self._known.update(zip(new, super().encode(frames[list(new.values())]), strict=True))
        return torch.stack([self._known[key] for key in each])


def imagine(
    model: WorldModel,
    frames: np.ndarray,
    history: np.ndarray,
    actions: np.ndarray,
    sampler: SamplerConfig,
    seed: int = 0,
    batch: int = 64,
    keys: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Dream on from real contexts under given actions.

    Args:
        model: the world model.
        frames: uint8 (N, T, h, w, c), real context.
        history: integers (N, T - 1), the actions between them.
        actions: integers (N, H), the actions to dream under.
        sampler: how it is drawn.
        seed: decides the noise, together with each row's key.
        batch: rows dreamt at once; it decides nothing.
        keys: integers (N,), rows of one key share their noise; by default each row has its own.

    Returns:
        uint8 frames (N, H, h, w, c), and the uncertainty float32 (N, H).
    """
    n, horizon = actions.shape
    keys = np.arange(n) if keys is None else keys
    dream = np.empty((n, horizon, *model.frame_shape), np.uint8)
    uncertainty = np.empty((n, horizon), np.float32)
    for at in range(0, n, batch):
        rows = slice(at, min(at + batch, n))
        state = model.start(frames[rows], history[rows])
        for h in range(horizon):
            imagined = model.step(state, actions[rows, h], step_noise(model, sampler, seed, keys[rows], h), sampler)
            state = imagined.state
            dream[rows, h] = model.render(state).numpy()
            uncertainty[rows, h] = imagined.uncertainty.float().cpu().numpy()
    return dream, uncertainty


def open_loop(model: WorldModel, clips: Clips, sampler: SamplerConfig, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """`imagine` each clip's future from its context, under its own actions."""
    k = clips.context
    return imagine(model, clips.frames[:, :k], clips.actions[:, : k - 1], clips.actions[:, k - 1 :], sampler, seed)


def step_noise(model: WorldModel, sampler: SamplerConfig, seed: int, keys: np.ndarray, step: int) -> np.ndarray | None:
    """Standard normal float32 (B, C, h, w) of the keys (B,) at one step; None if the sampler needs none."""
    if not sampler.stochastic(model.dynamics):
        return None
    each = [draw_step(seed + int(i), 0, 0, step, model.latent_shape)[1] for i in keys]
    return np.stack(each)
