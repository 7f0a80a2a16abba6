"""One trained model as a folder: `model.json` (what it is, facts, sha256) and `model.safetensors`. No pickle."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import Tensor, nn

from dreamenv.artifacts import atomic_folder, read_json, readable_folder, sha256_file, write_json
from dreamenv.errors import BundleError, ConfigError
from dreamenv.models import migrations
from dreamenv.models.registry import build, locate, spec_of

FORMAT_VERSION = 2
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def save_model(folder: Path, model: nn.Module, facts: dict[str, Any], weights: dict[str, Tensor] | None = None) -> None:
    """Write a model folder atomically; `weights` replaces the model's own (an EMA, say)."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in (weights or model.state_dict()).items()}
    with atomic_folder(folder) as temporary:
        save_file(tensors, temporary / "model.safetensors")
        write_json(
            temporary / "model.json",
            {
                "format_version": FORMAT_VERSION,
                "kind": locate(model)[0],
                "model": spec_of(model),
                "facts": facts,
                "sha256": sha256_file(temporary / "model.safetensors"),
            },
        )


def load_model(folder: str | Path, kind: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """Return (model in eval mode, facts) of a model folder.

    Args:
        folder: where `model.json` is; one of an older version is read as what it was.
        kind: "codec", "dynamics" or "head", if it must be that.

    Raises:
        BundleError: missing, altered, of another kind, or not matching its own description; names the file.
    """
    folder = readable_folder(folder)
    path = folder / "model.json"
    description = read_json(path, BundleError, "train the model first")
    version = description.get("format_version", 1)
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version <= FORMAT_VERSION:
        raise BundleError(
            f"{path}: format_version {version!r}; this release reads 1..{FORMAT_VERSION}; upgrade dreamenv"
        )
    try:
        if version == 1:
            description = migrations.model_from_1(description)
        found = description["kind"]
        if kind is not None and found != kind:
            raise BundleError(f"{folder}: is a {found} ({description['model'].get('type')}), expected a {kind}")
        model = build(found, description["model"], where="model")
        facts, digest = description["facts"], description["sha256"]
    except BundleError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BundleError(f"{path}: is damaged ({error}); train the model again") from None
    load_weights(model, folder / "model.safetensors", digest, version)
    return model.eval(), facts


def read_part(path: Path, sha256: str) -> bytes:
    """Read a file once and hold it against its checksum; raises `BundleError`, which names it."""
    if not path.is_file():
        raise BundleError(f"{path}: missing; re-download or retrain")
    data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != sha256:
        raise BundleError(f"{path}: sha256 differs from its description; re-download or retrain")
    return data


def load_weights(model: nn.Module, path: Path, sha256: str, version: int = FORMAT_VERSION) -> None:
    """Fill `model` from a safetensors file whose sha256 is known, see `fill`; raises `BundleError`."""
    fill(model, read_part(path, sha256), path, version)


def fill(model: nn.Module, data: bytes, path: Path, version: int = FORMAT_VERSION) -> None:
    """Fill `model` from the bytes of a safetensors file; half precision is widened to float32.

    Args:
        model: what to fill.
        data: the bytes; `path` is named in errors.
        path: where they are from.
        version: of the format; names of older ones are translated.

    Raises:
        BundleError: malformed, of other names or shapes, or not finite.
    """
    try:
        tensors = load(data)
    except SafetensorError as error:
        raise BundleError(f"{path}: is not a safetensors file ({error}); re-download or retrain") from None
    expected = model.state_dict()
    if version == 1:
        tensors = migrations.tensors_from_1(tensors)
    grown = getattr(model, "grown", None)
    if grown is not None:
        tensors = grown(tensors)
    if missing := sorted(set(expected) - set(tensors)):
        raise BundleError(f"{path}: tensor {missing[0]} is missing; re-download or retrain")
    if extra := sorted(set(tensors) - set(expected)):
        raise BundleError(f"{path}: tensor {extra[0]} is not part of the model; re-download or retrain")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise BundleError(
                f"{path}: tensor {name} has shape {tuple(tensor.shape)}, the model wants "
                f"{tuple(expected[name].shape)}; re-download or retrain"
            )
        if tensor.dtype not in _DTYPES:
            raise BundleError(f"{path}: tensor {name} is {tensor.dtype}, expected float16, bfloat16 or float32")
        if not torch.isfinite(tensor).all():
            raise BundleError(f"{path}: tensor {name} is not finite; re-download or retrain")
    model.load_state_dict({k: v.to(expected[k].dtype) for k, v in tensors.items()})


def initialise(model: nn.Module, folder: str, option: str = "init_from") -> dict[str, Any]:
    """Start a model from another one's weights; a smaller configuration is grown where that changes nothing.

    Returns:
        The facts of the model folder.

    Raises:
        ConfigError: it holds another architecture; the message names the option.
    """
    other, facts = load_model(folder, locate(model)[0])
    weights = other.state_dict()
    grown = getattr(model, "grown", None)
    try:
        model.load_state_dict(weights if grown is None else grown(weights))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ConfigError(f"{option} {folder}: holds another architecture ({reason})") from None
    return facts
