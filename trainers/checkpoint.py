"""Checkpoints of a training: a folder from which it goes on to the same weights, on a CPU bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from dreamenv import checkpoints
from dreamenv.artifacts import checksum, parse_tensors
from dreamenv.config import check, from_dict
from dreamenv.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from trainers.loop import Loop

FORMAT_VERSION = 3
_FREE = ("log_every", "wandb", "workers", "cuda_graphs", "best", "keep_every")  # settings that change no weight
_LATER = {"schedule": "cosine", "optimizer": "adamw"}  # settings that came later, and what older trainings had
_MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # what AdamW keeps of a parameter
_MOMENTUM = {"momentum_buffer"}  # what Muon does


def identity_of(settings: dict[str, Any]) -> str:
    """sha256 of what of a configuration decides the weights."""
    loop = {k: v for k, v in settings.get("loop", {}).items() if k not in _FREE and _LATER.get(k) != v}
    return checksum(settings | {"loop": loop})


def save_checkpoint(loop: Loop) -> None:
    """Write <folder>/checkpoint, atomically: weights, their averages, the optimiser's moments, and where it stands."""
    moments: dict[str, Tensor] = {}
    for index, parameter in enumerate(loop.parameters):
        for name, value in loop.optimizer.state.get(parameter, {}).items():
            moments[f"{index}.{name}"] = value
    tensors = {"model": loop.model.state_dict(), "ema": loop.ema, "optimizer": moments}
    if loop.auxiliary is not None:
        tensors["auxiliary"] = loop.auxiliary.state_dict()
    parts = {n: save({k: v.detach().cpu().contiguous() for k, v in part.items()}) for n, part in tensors.items()}
    state = {"step": loop.step, "elapsed": loop.elapsed}
    checkpoints.write(loop.folder / "checkpoint", FORMAT_VERSION, identity_of(loop.settings), state, parts)


def load_checkpoint(loop: Loop) -> None:
    """Go on from <folder>/checkpoint, or from the one before where that is damaged.

    Raises:
        CheckpointError: it is damaged, of another version or of another configuration; the loop is unchanged then.
    """
    folder = loop.folder / "checkpoint"
    names = ("model", "ema", "optimizer") + (() if loop.auxiliary is None else ("auxiliary",))
    state, parts = checkpoints.read(folder, FORMAT_VERSION, identity_of(loop.settings), names)
    try:
        stand = from_dict(_Stand, {name: state.get(name) for name in ("step", "elapsed")}, "state")
    except ConfigError as error:
        raise CheckpointError(f"{folder}: {error}; {checkpoints.REMEDY}") from None
    tensors = {n: parse_tensors(load, d, folder / n, CheckpointError, checkpoints.REMEDY) for n, d in parts.items()}
    networks: dict[str, nn.Module] = {"model": loop.model, "ema": loop.model}
    if loop.auxiliary is not None:
        networks["auxiliary"] = loop.auxiliary
    for name, network in networks.items():
        _check_fits(f"{folder}/{name}", tensors[name], network.state_dict())
    kernels = {id(p) for group in loop.optimizer.param_groups if group.get("muon") for p in group["params"]}
    expected = {
        f"{i}.{n}": torch.zeros(()) if n == "step" else p
        for i, p in enumerate(loop.parameters)
        for n in (_MOMENTUM if id(p) in kernels else _MOMENTS)
    }
    known = {k: v for k, v in expected.items() if k in tensors["optimizer"]}
    _check_fits(f"{folder}/optimizer", tensors["optimizer"], known)

    loop.model.load_state_dict(tensors["model"])
    if loop.auxiliary is not None:
        loop.auxiliary.load_state_dict(tensors["auxiliary"])
    loop.ema = {k: v.to(loop.device) for k, v in tensors["ema"].items()}
    for index, parameter in enumerate(loop.parameters):
        prefix = f"{index}."
        values = {k[len(prefix) :]: v for k, v in tensors["optimizer"].items() if k.startswith(prefix)}
        if values:
            loop.optimizer.state[parameter] = {
                k: v.to(loop.device) if k == "step" else v.to(loop.device).to(memory_format=_format(parameter))
                for k, v in values.items()
            }
    loop.step, loop.elapsed = stand.step, stand.elapsed


@dataclass(frozen=True)
class _Stand:
    """Where a training stands."""

    step: int
    elapsed: float

    def __post_init__(self) -> None:
        check(self.step >= 0, f"step {self.step}: must be >= 0")
        check(self.elapsed >= 0, f"elapsed {self.elapsed}: must be >= 0")


def _check_fits(where: str, found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Raise `CheckpointError` unless tensors have the names, shapes and dtypes that they should have."""
    for name in sorted(set(found) ^ set(expected)):
        raise CheckpointError(f"{where}: tensor {name} does not belong to this model; {checkpoints.REMEDY}")
    for name, tensor in found.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            raise CheckpointError(
                f"{where}: tensor {name} is {tensor.dtype} {tuple(tensor.shape)}, the model's "
                f"{expected[name].dtype} {tuple(expected[name].shape)}; {checkpoints.REMEDY}"
            )
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{where}: tensor {name} is not finite; {checkpoints.REMEDY}")


def _format(parameter: Tensor) -> torch.memory_format:
    return torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
