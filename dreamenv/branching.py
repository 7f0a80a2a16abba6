"""Snapshots of a batch of dreams, and what is made of them: restored, fanned out, a part gone on with."""

from __future__ import annotations

from abc import abstractmethod
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dreamenv.bundle import Bundle
from dreamenv.config import whole
from dreamenv.contract.noise import branch_stream
from dreamenv.contract.snapshot import check_arrays, check_range, pack, unpack
from dreamenv.contract.world import MAX_ENVS, WorldVectorEnv
from dreamenv.errors import ConfigError, SnapshotError
from dreamenv.flow import SamplerConfig
from dreamenv.models.interface import NULL_ACTION, State

if TYPE_CHECKING:
    from dreamenv.vector import DreamVectorEnv

_STATE = "state."
"""How a snapshot calls the tensors of the state, which families name as they like."""
_MOST = 2**48  # episodes, or steps, of one seed


class Branching(WorldVectorEnv):
    """The part of `DreamVectorEnv` that copies moments; see there for what the attributes are."""

    _counters = ("frames", "seeds", "streams", "episodes", "steps", "starts", "finished")
    bundle: Bundle
    _sampler: SamplerConfig
    exact: bool
    observations: str
    truncate_above: float | None
    _state: State
    _bank: dict[int, tuple[State, np.ndarray]]
    _draw: bool

    def snapshot(self) -> bytes:
        """Return the whole batch's state as bytes that `restore` accepts, in another process too.

        Raises:
            ResetError: before the first reset.
        """
        self._check_started("snapshot")
        self._drawn()
        arrays = {f"{_STATE}{name}": value for name, value in self._state.arrays().items()}
        arrays |= self._counter_arrays()
        return pack("dream", {"bundle": self.bundle.identity, "num_envs": self.num_envs}, arrays)

    def restore(self, data: bytes) -> np.ndarray:
        """Return to a snapshot and its observations, of whichever kind this env shows.

        Raises:
            SnapshotError: damaged bytes, another bundle, or another number of environments.
        """
        self._check_open("restore")
        arrays = self._unpack(data)
        if len(arrays["frames"]) != self.num_envs:
            raise SnapshotError(
                f"snapshot of {len(arrays['frames'])} environments cannot be restored into "
                f"{self.num_envs}; make as many, or use branch()"
            )
        device = self.bundle.world_model.device
        kept = {name.removeprefix(_STATE): value for name, value in arrays.items() if name.startswith(_STATE)}
        self._state = State.from_arrays(kept, device)
        self._take_counters(arrays)
        self._started = True
        return self._shown()

    def render(self) -> tuple[np.ndarray, ...] | None:
        """See `WorldVectorEnv.render`; where observations are latents, this draws them."""
        if self.render_mode is not None and self._started:
            self._drawn()
        return super().render()

    def _drawn(self) -> None:
        """Draw what is not drawn at every step."""
        if self.observations == "latent":
            with self._settings():
                self._frames = self._render(self._state)

    @abstractmethod
    def _shown(self) -> np.ndarray: ...

    @abstractmethod
    def _render(self, state: State) -> np.ndarray: ...

    @abstractmethod
    def _settings(self) -> AbstractContextManager[None]: ...

    def branch(self, data: bytes, n: int, index: int = 0) -> DreamVectorEnv:
        """Branch one snapshot into n futures: a new vector env whose environments all stand at the same moment.

        Branch 0 goes on as the original would; the others draw other noise. Everything else is as in this env.

        Args:
            data: a snapshot.
            n: number of futures.
            index: which environment of the snapshot.

        Raises:
            SnapshotError: damaged bytes, another bundle, or no such environment.
            ConfigError: n < 1.
        """
        self._check_open("branch")
        n = whole(n, "n", 1, MAX_ENVS)
        arrays = self._unpack(data)
        size = len(arrays["frames"])
        if isinstance(index, bool) or not isinstance(index, (int, np.integer)) or not 0 <= index < size:
            raise SnapshotError(f"index {index!r}: the snapshot holds environments 0..{size - 1}")
        envs = self._like(n)
        fanned = {k: np.repeat(v[index : index + 1], n, 0) for k, v in arrays.items()}
        parent = int(arrays["streams"][index])
        fanned["streams"] = np.array([branch_stream(parent, k) for k in range(n)], np.uint64)
        envs.restore(pack("dream", {"bundle": self.bundle.identity, "num_envs": n}, fanned))
        return envs

    def select(self, rows: Any, draw: bool = True) -> DreamVectorEnv:
        """Return a new vector env of some of this one's environments, which go on there as they would have here.

        For callers that drop episodes which have ended, or that do not need the pictures, which cost a third of a step.

        Args:
            rows: integers (n,), which of them, n >= 1.
            draw: whether the new one, and whatever is selected or branched from it, draws what it dreams; if not, it
                goes on showing the pictures of now, or of a later start.

        Raises:
            ResetError: before the first reset.
            ConfigError: no environment, or one that does not exist.
        """
        self._check_started("select")
        rows = self._check_rows(rows)
        envs = self._like(len(rows))
        chosen = torch.from_numpy(rows.astype(np.int64)).to(self.bundle.world_model.device)
        envs._state, envs._bank, envs._started = self._state.rows(chosen), self._bank, True
        envs._draw = self._draw and draw
        envs._take_counters({name: values[rows] for name, values in self._counter_arrays().items()})
        return envs

    def _check_rows(self, rows: Any) -> np.ndarray:
        message = f"rows {rows!r}: expected one or more integers in 0..{self.num_envs - 1}"
        try:
            array = np.asarray(rows)
        except (ValueError, TypeError, RuntimeError):
            raise ConfigError(message) from None
        sound = array.ndim == 1 and array.size > 0 and array.dtype.kind in "iu"
        if not sound or array.min() < 0 or array.max() >= self.num_envs:
            raise ConfigError(message)
        return array

    def _like(self, n: int) -> DreamVectorEnv:
        cls: Any = type(self)
        envs: Any = cls(
            n,
            bundle=self.bundle,
            sampler=self._sampler,
            autoreset_mode=self.autoreset_mode,
            render_mode=self.render_mode,
            exact=self.exact,
            truncate_above=self.truncate_above,
            max_episode_steps=self.max_episode_steps,
            observations=self.observations,
        )
        envs._draw = self._draw
        return envs

    def _unpack(self, data: bytes) -> dict[str, np.ndarray]:
        """The arrays of a snapshot, held against what this environment's own would be."""
        meta, arrays = unpack("dream", data)
        if meta.get("bundle") != self.bundle.identity:
            raise SnapshotError(
                f"snapshot of bundle {str(meta.get('bundle'))[:12]}, this env dreams with {self.bundle.identity[:12]}; "
                "load the bundle it was taken with"
            )
        rows = len(arrays["frames"]) if "frames" in arrays and arrays["frames"].ndim else 0
        if not 1 <= rows <= MAX_ENVS:
            raise SnapshotError(f"snapshot of {rows} environments: expected 1..{MAX_ENVS}; take it again")
        own = {f"{_STATE}{name}": value for name, value in self._state.items()}
        known = {n: ((rows, *v.shape[1:]), str(v.dtype).removeprefix("torch.")) for n, v in own.items()}
        known |= {n: ((rows, *v.shape[1:]), str(v.dtype)) for n, v in self._counter_arrays().items()}
        check_arrays(arrays, known)
        for name, values in arrays.items():
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise SnapshotError(f"snapshot: {name} is not finite; take it again")
        check_range("state.actions", arrays["state.actions"], 0, NULL_ACTION)
        if "state.game" in arrays:
            game = self.bundle.world_model.game
            check_range("state.game", arrays["state.game"], game, game)
        check_range("starts", arrays["starts"], -1, len(self.bundle.starts.frames) - 1)
        for name in ("episodes", "steps"):
            check_range(name, arrays[name], 0, _MOST)
        return arrays
