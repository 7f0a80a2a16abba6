"""Checkpoints of a training: a folder from which it goes on to the same weights, on a CPU bit for bit."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamenv.artifacts import atomic_folder, read_json, sha256_file, write_json
from dreamenv.errors import CheckpointError

if TYPE_CHECKING:
    from trainers.loop import Loop

FORMAT_VERSION = 2
_REMEDY = "delete the checkpoint to start anew"
_FREE = ("log_every", "wandb", "workers", "cuda_graphs")  # settings of the loop that change no weight


def identity_of(settings: dict[str, Any]) -> str:
    """sha256 of what of a configuration decides the weights."""
    loop = {k: v for k, v in settings.get("loop", {}).items() if k not in _FREE}
    return hashlib.sha256(json.dumps(settings | {"loop": loop}, sort_keys=True).encode()).hexdigest()


def save_checkpoint(loop: Loop) -> None:
    """Write <folder>/checkpoint, atomically: weights, their averages, the optimiser's moments, and where it stands."""
    moments: dict[str, Tensor] = {}
    for index, parameter in enumerate(loop.parameters):
        for name, value in loop.optimizer.state.get(parameter, {}).items():
            moments[f"{index}.{name}"] = value.detach().cpu().contiguous()
    files = {"model": loop.model.state_dict(), "ema": loop.ema, "optimizer": moments}
    if loop.auxiliary is not None:
        files["auxiliary"] = loop.auxiliary.state_dict()
    with atomic_folder(loop.folder / "checkpoint") as temporary:
        for name, tensors in files.items():
            plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
            save_file(plain, temporary / f"{name}.safetensors")
        state = {
            "format_version": FORMAT_VERSION,
            "step": loop.step,
            "elapsed": loop.elapsed,
            "identity": identity_of(loop.settings),
            "sha256": {name: sha256_file(temporary / f"{name}.safetensors") for name in files},
        }
        write_json(temporary / "state.json", state | {"checksum": _checksum(state)})


def load_checkpoint(loop: Loop) -> None:
    """Go on from <folder>/checkpoint.

    Raises:
        CheckpointError: it is damaged, of another version or of another configuration; the loop is unchanged then.
    """
    folder = loop.folder / "checkpoint"
    path = folder / "state.json"
    names = ["model", "ema", "optimizer"] + ([] if loop.auxiliary is None else ["auxiliary"])
    state = read_json(path, CheckpointError, _REMEDY)
    if state.get("format_version", 1) != FORMAT_VERSION:
        found = state.get("format_version", 1)
        raise CheckpointError(f"{path}: format_version {found!r}; this release resumes {FORMAT_VERSION}; {_REMEDY}")
    if state.pop("checksum", None) != _checksum(state):
        raise CheckpointError(f"{path}: its contents do not match its checksum, it was altered; {_REMEDY}")
    if state["identity"] != identity_of(loop.settings):
        raise CheckpointError(f"{folder}: was made with another configuration; use the same one, or another --out")
    parts: dict[str, dict[str, Tensor]] = {}
    for name in names:
        file = folder / f"{name}.safetensors"
        if not file.exists() or sha256_file(file) != state["sha256"].get(name):
            raise CheckpointError(f"{file}: missing, or its sha256 differs from state.json; {_REMEDY}")
        try:
            parts[name] = load_file(file)
        except SafetensorError as error:
            raise CheckpointError(f"{file}: is not a safetensors file ({error}); {_REMEDY}") from None
    try:
        loop.model.load_state_dict(parts["model"])
        if loop.auxiliary is not None:
            loop.auxiliary.load_state_dict(parts["auxiliary"])
    except RuntimeError as error:
        raise CheckpointError(
            f"{folder}: holds another architecture ({str(error).splitlines()[-1]}); {_REMEDY}"
        ) from None
    loop.ema = {k: v.to(loop.device) for k, v in parts["ema"].items()}
    for index, parameter in enumerate(loop.parameters):
        prefix = f"{index}."
        values = {k[len(prefix) :]: v for k, v in parts["optimizer"].items() if k.startswith(prefix)}
        if values:
            loop.optimizer.state[parameter] = {
                k: v.to(loop.device) if k == "step" else v.to(loop.device).to(memory_format=_format(parameter))
                for k, v in values.items()
            }
    loop.step, loop.elapsed = state["step"], state["elapsed"]


def _checksum(state: dict[str, Any]) -> str:
    """sha256 of the state's own values."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _format(parameter: Tensor) -> torch.memory_format:
    return torch.channels_last if parameter.ndim == 4 else torch.contiguous_format
