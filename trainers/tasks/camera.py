"""Trains the camera's motion of dynamics on tiles over its own path.

Errors of a move add up twice, in the speed and in the place, and single steps from true moves do not show that.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dreamenv.config import check
from dreamenv.contract.noise import philox
from dreamenv.device import pick_device, pick_precision
from dreamenv.models.dynamics.tiles import TileFlow
from dreamenv.models.registry import register
from dreamenv.models.tiles.grid import exact_move, moves, phases
from dreamenv.models.tiles.player import place_in_tile, surroundings
from trainers.prefetch import pick_workers, prefetch
from trainers.rollout import DynamicsBatch
from trainers.tasks.dynamics import DynamicsTask, DynamicsTaskConfig

_AHEAD = 6  # steps by which the dreams are longer than what is unrolled
_NEAR = 3  # tiles that the player may be from a place from which all around was in the picture
_CLOSE = 0.005  # tiles from where on an error counts in proportion
_LOST = 0.1  # tiles from the true path from which on a camera's path is another one


@dataclass(frozen=True)
class CameraTaskConfig:
    """What the camera's motion is trained for; the rest of the dynamics stays as it is."""

    latents: str
    """Folder of the encoded dataset."""
    init_from: str = ""
    """Model folder to start from; empty starts anew."""
    unroll: int = 6
    """Steps of a path, each of which begins where the one before arrived."""
    dreams: int = 0
    """Dreams that half of each batch comes from, dreamt once before training along true paths: what surrounds the
    player should be taken for what it is although it is dreamt. 0 goes without."""
    hard: float = 0.0
    """Share of samples that lead to a move that was hard to predict before training: what a player bumps into."""
    misread: float = 0.001
    """Largest standard deviation of the error, in tiles, with which a path begins. Little: of moves as the phase reader
    misreads them no exact law can be learnt; `TileFlow.smooth` corrects those."""
    context_noise: float = 0.05
    """Largest standard deviation of the noise added to the codes around the player."""
    pad: float = 0.25
    """Share of samples whose context is shortened and padded, as after a reset."""
    val_ratio: float = 0.02
    """Share of levels kept for validation."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(1 <= self.unroll <= 64, f"unroll {self.unroll}: must be 1..64")
        check(self.dreams >= 0, f"dreams {self.dreams}: must be >= 0")
        check(self.misread >= 0, f"misread {self.misread}: must be >= 0")
        check(0 <= self.context_noise <= 2, f"context_noise {self.context_noise}: must be in 0..2")
        for name in ("hard", "pad"):
            check(0 <= getattr(self, name) < 1, f"{name} {getattr(self, name)}: must be in [0, 1)")
        check(0 < self.val_ratio < 1, f"val_ratio {self.val_ratio}: must be in (0, 1)")


@register("task", "camera", CameraTaskConfig)
class CameraTask:
    """See `trainers.tasks.interface.Task`."""

    kind = "dynamics"
    auxiliary: nn.Module | None = None

    def __init__(self, config: CameraTaskConfig, model: dict[str, Any], seed: int) -> None:
        self.config = config
        same = {name: getattr(config, name) for name in ("latents", "init_from", "unroll", "pad", "val_ratio")}
        self.task = task = DynamicsTask(DynamicsTaskConfig(**same, past=0), model, seed)
        check(
            isinstance(task.model, TileFlow), f"model.type {model['type']}: has no camera; the task trains a tile_flow"
        )
        self.model = task.model
        device = pick_device("auto")
        network = task.model.to(device, memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]
        self._whole = np.zeros(len(task.data.start), bool)
        self._whole[task.train] = True
        self.hard = self._surprises(network).cumsum() if config.hard else None
        self._dreamt = self._imagine(network, config.dreams, philox((seed, 1))) if config.dreams else None

    def moments(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Draw training steps int64 (B,), some of them just before a move that the model found hard."""
        now = self.task.moments(rng, size)
        if self.hard is None or not self.hard[-1]:  # nothing is hard if the camera never turned
            return now
        step = np.searchsorted(self.hard, rng.random(size) * self.hard[-1], side="right")
        step = np.maximum(step - rng.integers(0, self.config.unroll, size=size), 0)
        return np.where((rng.random(size) < self.config.hard) & self._whole[step], step, now)

    def _surprises(self, model: TileFlow) -> np.ndarray:
        """How far off the model is at each training step's move, squared, float64 (N,), up to where a path is lost."""
        data, k, device = self.task.data, self.task.context, pick_device("auto")
        error = np.zeros(len(data.start))
        parts = np.array_split(np.flatnonzero(self._whole), max(self._whole.sum() // 1024, 1))

        def load(now: np.ndarray) -> tuple[np.ndarray, Tensor, Tensor]:
            indices, actions = data.contexts(now, k, 1)
            return now, data.gather(indices), torch.from_numpy(actions[:, :k])

        loaded = prefetch(load, parts, pick_workers(None, device), device)
        for now, latents, taken in tqdm(loaded, desc="look for hard moves", unit="k", total=len(parts)):
            latents, taken = latents.to(device), taken.to(device)
            context = latents[:, :k]
            with torch.no_grad():
                found = model.next_move(context, taken, phases(context[:, -1]), moves(context)[:, 1:])
            error[now] = (found - exact_move(context[:, -1], latents[:, k])).norm(dim=1).clamp_max(_LOST).cpu()
        return error

    def _imagine(self, model: TileFlow, count: int, rng: np.random.Generator) -> dict[str, Tensor]:
        """Dream along true paths: latents float16 (D, K + S, C, H, W), actions int64 (D, K + S) and live bool (D, S).

        A step is live if the episode goes on and the context showed all that surrounds the player.
        """
        data, k, device = self.task.data, self.task.context, pick_device("auto")
        out: dict[str, list[Tensor]] = {"latents": [], "actions": [], "live": []}
        length, bf16 = self.config.unroll + _AHEAD, pick_precision("auto", device) == "bf16"
        for at in tqdm(range(0, count, 128), desc="dream", unit="batch"):
            now = self.moments(rng, min(128, count - at))
            indices, actions = data.contexts(now, k, length)
            live = data.start[np.minimum(indices, len(data.start) - 1)] == data.start[now][:, None]
            live &= indices < len(data.start)
            indices = np.where(live, indices, now[:, None])
            place = data.columns["camera"][indices]
            near = np.abs(place[:, k:, None] - place[:, None, :k]).max(-1).min(-1) <= _NEAR
            latents = data.gather(indices).float().to(device)
            taken = torch.from_numpy(actions).to(device)
            dream = list(latents[:, :k].unbind(1))
            with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                state = model.begin(latents[:, :k], taken[:, : k - 1])
                for u in range(length):
                    action, target = taken[:, k - 1 + u], latents[:, k + u]
                    prediction = model.predict(state, action, hints=model.truth(state, target))
                    dream.append(model.align(prediction.latent, target))
                    state = model.advance(state, action, dream[-1])
            out["latents"].append(torch.stack(dream, 1).half().cpu())
            out["actions"].append(torch.from_numpy(actions))
            out["live"].append(torch.from_numpy((live[:, k:] & near).cumprod(1).astype(bool)))
        return {name: torch.cat(parts) for name, parts in out.items()}

    def batch(self, rng: np.random.Generator, size: int) -> DynamicsBatch:
        """That of the dynamics, with parts of dreams as its first half where there are dreams."""
        batch = self.task.batch(rng, size, self.moments(rng, size))
        if self._dreamt is None:
            return batch
        rows = len(batch.actions) // 2
        which = torch.from_numpy(rng.integers(len(self._dreamt["actions"]), size=rows))[:, None]
        begin = torch.from_numpy(rng.integers(0, _AHEAD, size=rows, endpoint=True))[:, None]
        mixed = {}
        for name, context in (("latents", self.task.context), ("actions", self.task.context), ("live", 0)):
            part = self._dreamt[name][which, begin + torch.arange(context + self.config.unroll)]
            mixed[name] = torch.cat([part, getattr(batch, name)[rows:]])
        return DynamicsBatch(**mixed, importance=batch.importance)

    def loss(
        self, model: nn.Module, batch: DynamicsBatch, generator: torch.Generator, progress: float
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """How far from its true path the camera gets on its own moves, seeing what surrounds the true one.

        It begins where the phase reader may have misread it. One step at first, then a third of `unroll`, then all:
        through many steps of a beginner's moves gradients say little. Nor do they once a path has left the true one:
        what it meets then is not what is around the player.
        """
        check(isinstance(model, TileFlow), f"model {type(model).__name__}: trains in one process; go without torchrun")
        assert isinstance(model, TileFlow)
        latents, k, grid = batch.latents, self.task.context, model.config.grid
        device, size = latents.device, len(latents)

        def normal(*shape: int, most: float) -> Tensor:
            """Noise (B, ...), of a standard deviation up to `most` that differs between samples."""
            level = torch.rand(size, *(1 for _ in shape), generator=generator, device=device) * most
            return torch.randn(size, *shape, generator=generator, device=device) * level

        misread = normal(k, 2, most=self.config.misread)
        away, before = misread[:, -1], moves(latents[:, 1:k]) + misread.diff(dim=1)
        total, metrics, counts = torch.zeros((), device=device), {}, torch.ones(size, device=device)
        reach = self._reach(progress)
        for u in range(reach):
            now = latents[:, u : u + k]
            game = grid.game_of(now[:, -1])
            tile, place = place_in_tile(grid, phases(now[:, -1]) + away, game)
            around = surroundings(grid, now, tile)
            around = around + normal(*around.shape[1:], most=self.config.context_noise)
            move = model.motion(around, place, before, batch.actions[:, u : u + k], grid.told(game))
            away = away + move - exact_move(now[:, -1], latents[:, u + k])
            before = torch.cat([before[:, 1:], move[:, None]], 1)
            error = F.smooth_l1_loss(away, torch.zeros_like(away), beta=_CLOSE, reduction="none").sum(1)
            counts = counts * batch.live[:, u]
            total = total + (error * counts).mean() / reach
            if u in (0, reach - 1):
                metrics[f"away_{u + 1}"] = (away.detach().norm(dim=1) * counts).sum() / counts.sum().clamp_min(1)
            counts = counts * (away.detach().norm(dim=1) < _LOST)
        return total, metrics | {"lost": 1 - counts.mean()}

    def _reach(self, progress: float) -> int:
        """How many steps a path has now."""
        return 1 if progress < 0.05 else -(-self.config.unroll // 3) if progress < 0.15 else self.config.unroll

    def graph_key(self, progress: float) -> int | None:
        """See `trainers.tasks.interface.Task`: how many steps a path has now."""
        return self._reach(progress)

    def validate(self, model: nn.Module, folder: Path, step: int) -> dict[str, float]:
        """See `trainers.tasks.dynamics.DynamicsTask.validate`."""
        return self.task.validate(model, folder, step)

    def facts(self) -> dict[str, Any]:
        """See `trainers.tasks.dynamics.DynamicsTask.facts`."""
        return self.task.facts()
