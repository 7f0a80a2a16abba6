"""What a world model makes of the pictures that a game has shown so far, for many games side by side."""

from __future__ import annotations

import numpy as np
import torch

from dreamenv.contract.actions import NOOP
from dreamenv.device import own_settings
from dreamenv.world_model import WorldModel


class LatentHistory:
    """The last K pictures of each of N games, encoded, and the actions that led to them.

    Args:
        model: whose codec looks at them.
        size: N.
    """

    def __init__(self, model: WorldModel, size: int) -> None:
        self.size, self._model = size, model
        self._latents = torch.zeros((size, model.context, *model.latent_shape), device=model.device)
        self._actions = torch.full((size, model.context), NOOP, device=model.device)  # each led to its latent
        self._known = np.zeros(size, np.int64)  # how many of them there are, the last ones
        self._threads = 1 if size == 1 else None

    def arrays(self) -> dict[str, np.ndarray]:
        """All that it knows, by name, for a snapshot."""
        return {"latents": self._latents.cpu().numpy(), "actions": self._actions.cpu().numpy(), "known": self._known}

    def take(self, arrays: dict[str, np.ndarray]) -> None:
        """Know what `arrays` returned, which has been checked."""
        self._latents = torch.from_numpy(arrays["latents"].copy()).to(self._model.device)
        self._actions = torch.from_numpy(arrays["actions"].copy()).to(self._model.device)
        self._known = arrays["known"].copy()

    def forget(self, which: np.ndarray) -> None:
        """New episodes begin where bool (N,) says so."""
        self._known[which] = 0

    def look(self, frames: np.ndarray, actions: np.ndarray, which: np.ndarray | None = None) -> None:
        """See one more picture of each game.

        Args:
            frames: uint8 (N, h, w, c).
            actions: integers (N,), which led there; of no account in an episode's first picture.
            which: bool (N,), of which games there is one; None: of all.
        """
        which = np.ones(self.size, bool) if which is None else which
        if not which.any():
            return
        rows = torch.from_numpy(np.flatnonzero(which)).to(self._model.device)
        with own_settings(self._model.device, self._threads):
            latents = self._model.encode(frames[which]).clone()
        led = torch.from_numpy(actions[which].astype(np.int64)).to(rows.device)
        self._latents[rows] = torch.cat([self._latents[rows, 1:], latents[:, None]], 1)
        self._actions[rows] = torch.cat([self._actions[rows, 1:], led[:, None]], 1)
        self._known[which] = np.minimum(self._known[which] + 1, self._model.context)

    def latents(self) -> np.ndarray:
        """Latents float32 (N, C, H, W) of the last pictures, those with which a dream of each history would begin."""
        out = np.empty((self.size, *self._model.latent_shape), np.float32)
        with own_settings(self._model.device, self._threads):
            for known in np.unique(self._known):
                rows = np.flatnonzero(self._known == known)
                of = torch.from_numpy(rows).to(self._model.device)
                taken = self._actions[of][:, len(self._actions[0]) - known + 1 :]
                state = self._model.begin(self._latents[of, -known:], taken)
                out[rows] = state.latents[:, -1].float().cpu().numpy()
        return out
