"""One trained model as a folder: `model.json` (what it is, facts, sha256) and `model.safetensors`. No pickle."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from dreamenv.artifacts import (
    TENSORS_LIMIT,
    atomic_folder,
    parse_tensors,
    read_file,
    read_json,
    readable_folder,
    sha256_file,
    write_json,
)
from dreamenv.config import check
from dreamenv.errors import BundleError, ConfigError
from dreamenv.models import migrations
from dreamenv.models.registry import build, locate, spec_of

FORMAT_VERSION = 2
_REMEDY = "re-download or retrain"
_SCALE, _SHAPE = ":scale", ":shape"
_BITS = range(5, 13)
_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def save_model(folder: Path, model: nn.Module, facts: dict[str, Any], weights: dict[str, Tensor] | None = None) -> None:
    """Write a model folder atomically; `weights` replaces the model's own (an EMA, say)."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in (weights or model.state_dict()).items()}
    with atomic_folder(folder) as temporary:
        (temporary / "model.safetensors").write_bytes(save(tensors))
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
        facts, digest = description["facts"], str(description["sha256"])
        data = read_part(folder / "model.safetensors", digest)
        model = build_for(found, description["model"], data, "model")
    except BundleError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RuntimeError) as error:
        raise BundleError(f"{path}: is damaged ({error}); train the model again") from None
    fill(model, data, folder / "model.safetensors", version)
    return model.eval(), facts


def build_for(kind: str, spec: Any, data: bytes, where: str) -> Any:
    """Build the network that `spec` describes and `data`, a safetensors file, is to fill; global randomness stays.

    Raises:
        ConfigError: see `registry.build`; or it wants more weights than `data` has bytes.
    """
    with torch.random.fork_rng(devices=[]):
        with contextlib.suppress(NotImplementedError, RuntimeError):  # not every network can be built without memory
            with torch.device("meta"):
                size = sum(p.numel() for p in build(kind, spec, where=where).parameters())
            check(
                size * _BITS[0] <= len(data) * 8, f"{where}: describes {size} weights, its file has {len(data)} bytes"
            )
        return build(kind, spec, where=where)


def read_part(path: Path, sha256: str) -> bytes:
    """Read a file once and hold it against its checksum; raises `BundleError`, which names it."""
    return read_file(path, BundleError, _REMEDY, TENSORS_LIMIT, sha256)


def fill(model: nn.Module, data: bytes, path: Path, version: int = FORMAT_VERSION) -> None:
    """Fill `model` from the bytes of a safetensors file; half precision, and what `packed` made, becomes float32.

    Args:
        model: what to fill.
        data: the bytes; `path` is named in errors.
        path: where they are from.
        version: of the format; names of older ones are translated.

    Raises:
        BundleError: malformed, of other names or shapes, or not finite.
    """
    tensors = _unpacked(parse_tensors(load, data, path, BundleError, _REMEDY), path)
    expected = model.state_dict()
    if version == 1:
        tensors = migrations.tensors_from_1(tensors)
    grown = getattr(model, "grown", None)
    if grown is not None:
        tensors = grown(tensors)
    if missing := sorted(set(expected) - set(tensors)):
        raise BundleError(f"{path}: tensor {missing[0]} is missing; {_REMEDY}")
    if extra := sorted(set(tensors) - set(expected)):
        raise BundleError(f"{path}: tensor {extra[0]} is not part of the model; {_REMEDY}")
    for name, tensor in tensors.items():
        if tensor.shape != expected[name].shape:
            raise BundleError(
                f"{path}: tensor {name} has shape {tuple(tensor.shape)}, the model wants "
                f"{tuple(expected[name].shape)}; {_REMEDY}"
            )
        if tensor.dtype not in _DTYPES:
            known = "float16, bfloat16, float32, or whole numbers with a scale"
            raise BundleError(f"{path}: tensor {name} is {tensor.dtype}, expected {known}")
        if not torch.isfinite(tensor).all():
            raise BundleError(f"{path}: tensor {name} is not finite; {_REMEDY}")
    model.load_state_dict({k: v.to(expected[k].dtype) for k, v in tensors.items()})


def packed(weights: Mapping[str, Tensor], bits: int, precise: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Weights as a bundle stores them, on the CPU.

    With fewer than 16 bits each row of a matrix or kernel (an output's weights) is stored as whole multiples of a
    scale, its largest weight by 2^(bits - 1) - 1, which stands beside it as `<name>:scale`, float16. Eight bits are
    int8 of the tensor's shape. Others are stored as uint8, the bits of one after the other, 2^(bits - 1) more than they
    are; `<name>:shape`, int32, says how many bits, and then the shape.

    Args:
        weights: by name.
        bits: 5..12, or 16: as float16.
        precise: beginnings of names of those that are stored as float16 all the same.

    Raises:
        ConfigError: other bits.
    """
    check(bits in (*_BITS, 16), f"bits {bits}: must be 5..12 or 16")
    out: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        tensor = tensor.detach().cpu().float()
        if bits == 16 or tensor.ndim < 2 or name.startswith(precise):
            out[name] = tensor.half().contiguous()
            continue
        most = 2 ** (bits - 1) - 1
        scale = (tensor.flatten(1).abs().amax(1) / most).clamp_min(2**-24).half()  # the least above 0 that half has
        rows = (tensor.flatten(1) / scale.float()[:, None]).round().clamp(-most, most)
        if bits == 8:
            out[name] = rows.to(torch.int8).view_as(tensor).contiguous()
        else:
            places = (rows + most + 1).to(torch.int32).numpy().ravel()[:, None] >> np.arange(bits)[::-1]
            out[name] = torch.from_numpy(np.packbits(places.astype(np.uint8) & 1))
            out[f"{name}{_SHAPE}"] = torch.tensor([bits, *tensor.shape], dtype=torch.int32)
        out[f"{name}{_SCALE}"] = scale
    return out


def _unpacked(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """What `packed` stored, as float32; raises `BundleError` where a scale or a shape is missing or does not fit."""
    scales = {name: tensors.pop(name) for name in list(tensors) if name.endswith(_SCALE)}
    shapes = {name: tensors.pop(name) for name in list(tensors) if name.endswith(_SHAPE)}
    for name, scale in scales.items():
        inner = name.removesuffix(_SCALE)
        tensor, shape = tensors.get(inner), shapes.pop(f"{inner}{_SHAPE}", None)
        if tensor is not None and (shape is not None or tensor.dtype != torch.int8):
            tensor = _counted(tensor, shape)
        fits = tensor is not None and tensor.ndim > 1 and scale.shape == tensor.shape[:1]
        if tensor is None or not fits or not scale.is_floating_point():
            raise BundleError(f"{path}: tensor {inner} does not fit its scale; {_REMEDY}")
        tensors[inner] = (tensor.float().flatten(1) * scale.float()[:, None]).view(tensor.shape)
    if shapes:
        raise BundleError(f"{path}: tensor {next(iter(shapes))} has no scale; {_REMEDY}")
    return tensors


def _counted(tensor: Tensor, shape: Tensor | None) -> Tensor | None:
    """The whole numbers int32 that `packed` stored as uint8 (B,); None where the two do not fit."""
    if shape is None or shape.dtype != torch.int32 or shape.ndim != 1 or len(shape) < 2 or int(shape.min()) < 1:
        return None
    bits, *wanted = shape.tolist()
    size = math.prod(wanted)
    if bits not in _BITS or tensor.dtype != torch.uint8 or tensor.shape != ((bits * size + 7) // 8,):
        return None
    places = np.zeros((size, 16), np.uint8)
    places[:, 16 - bits :] = np.unpackbits(tensor.numpy(), count=size * bits).reshape(size, bits)
    numbers = np.packbits(places).view(">u2").astype(np.int32) - 2 ** (bits - 1)
    return torch.from_numpy(numbers).view(wanted)


def initialise(model: nn.Module, folder: str, option: str = "init_from") -> dict[str, Any]:
    """Start a model from another one's weights; a smaller configuration is grown where that changes little.

    Returns:
        The facts of the model folder.

    Raises:
        ConfigError: it holds another architecture; the message names the option.
    """
    other, facts = load_model(folder, locate(model)[0])
    told = [getattr(getattr(m, "config", None), "games", ()) for m in (other, model)]
    found, wanted = (", ".join(games) or "one game" for games in told)
    unlike = f"{option} {folder}: is of {found}, not of {wanted}; start anew"
    check(not told[0] or told[0] == told[1], unlike)  # what knows one game may begin what is told several apart
    own = model.state_dict()
    anew = () if told[0] == told[1] else getattr(model, "of_outcomes", ())
    weights = other.state_dict() | {name: own[name] for name in anew}
    grown, same = getattr(model, "grown", None), getattr(model, "goes_on_from", None)
    if same is not None and type(other) is type(model) and not same(other):
        raise ConfigError(f"{option} {folder}: its weights mean something else in this configuration; start anew")
    try:
        model.load_state_dict(weights if grown is None else grown(weights))
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        other_shape = f"{option} {folder}: holds another architecture ({reason})"
        raise ConfigError(other_shape if told[0] == told[1] else unlike) from None
    return facts
