"""One trained model as a folder: `model.json` (type, config, facts, sha256) + `model.safetensors`. No pickle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from dreamenv.artifacts import atomic_folder, read_json, readable_folder, sha256_file, write_json
from dreamenv.errors import BundleError, ConfigError
from dreamenv.models.registry import build_model, model_spec


def save_model(folder: Path, model: nn.Module, facts: dict[str, Any], weights: dict[str, Tensor] | None = None) -> None:
    """Write a model folder atomically; `weights` replaces the model's own (an EMA, say)."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in (weights or model.state_dict()).items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors")
        write_json(temporary / "model.json", {
            "model": model_spec(model), "facts": facts, "sha256": sha256_file(temporary / "model.safetensors"),
        })  # fmt: skip


def load_model(folder: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Return (model in eval mode, facts) of a model folder.

    Raises:
        BundleError: missing, altered, or not matching its own description; names the file.
    """
    folder = readable_folder(folder)
    description = read_json(folder / "model.json", BundleError, "train the model first")
    try:
        model = build_model(description["model"])
        facts, digest = description["facts"], description["sha256"]
    except (ValueError, KeyError, TypeError, ConfigError) as error:
        raise BundleError(f"{folder / 'model.json'}: is damaged ({error}); train the model again") from None
    load_weights(model, folder / "model.safetensors", digest)
    return model.eval(), facts


def load_weights(model: nn.Module, path: Path, sha256: str) -> None:
    """Fill `model` from a safetensors file whose sha256 is known; half precision is widened to float32.

    Raises:
        BundleError: missing, altered, malformed, of other names or shapes, or not finite; names the file.
    """
    if not path.exists():
        raise BundleError(f"{path}: missing; re-download or retrain")
    if sha256_file(path) != sha256:
        raise BundleError(f"{path}: sha256 differs from its description; re-download or retrain")
    try:
        tensors = load(path.read_bytes())
    except SafetensorError as error:
        raise BundleError(f"{path}: is not a safetensors file ({error}); re-download or retrain") from None
    expected = model.state_dict()
    if (grown := getattr(model, "grown", None)) is not None:
        tensors = grown(tensors)
    if missing := sorted(set(expected) - set(tensors)):
        raise BundleError(f"{path}: tensor {missing[0]} is missing; re-download or retrain")
    if extra := sorted(set(tensors) - set(expected)):
        raise BundleError(f"{path}: tensor {extra[0]} is not part of the model; re-download or retrain")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise BundleError(f"{path}: tensor {name} has shape {tuple(tensor.shape)}, the model wants "
                              f"{tuple(expected[name].shape)}; re-download or retrain")  # fmt: skip
        if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
            raise BundleError(f"{path}: tensor {name} is {tensor.dtype}, expected float16, bfloat16 or float32")
        if not torch.isfinite(tensor).all():
            raise BundleError(f"{path}: tensor {name} is not finite; re-download or retrain")
    model.load_state_dict({k: v.to(expected[k].dtype) for k, v in tensors.items()})
