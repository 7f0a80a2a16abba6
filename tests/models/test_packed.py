"""Weights of few bits: they come back as they were, and damaged ones are refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from torch import nn

from dreamenv.errors import BundleError
from dreamenv.models.io import fill, packed


@pytest.mark.parametrize("bits", range(5, 13))
def test_each_number_of_bits_comes_back(bits: int) -> None:
    """Whole multiples of a scale that half precision has come back as they were, however many there are."""
    most = 2 ** (bits - 1) - 1
    for rows, columns in ((1, 2), (3, 7), (5, 1 + 2 * most)):
        numbers = torch.randint(-most, most + 1, (rows, columns), generator=torch.Generator().manual_seed(bits))
        numbers[:, 0] = torch.tensor([most, -most] * rows)[:rows]
        layer = nn.Linear(columns, rows, bias=False)
        fill(layer, save(packed({"weight": numbers * 0.25}, bits)), Path("here"))
        assert torch.equal(layer.weight.detach(), numbers * 0.25)


BITS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "no shape": lambda t: t.pop("weight:shape"),
    "no scale": lambda t: t.pop("weight:scale"),
    "no weights": lambda t: t.pop("weight"),
    "cut": lambda t: t.update({"weight": t["weight"][:-1]}),
    "other bits": lambda t: t.update({"weight:shape": torch.tensor([7, 3, 4], dtype=torch.int32)}),
    "bits of no kind": lambda t: t.update({"weight:shape": torch.tensor([72, 1, 1], dtype=torch.int32)}),
    "other shape": lambda t: t.update({"weight:shape": torch.tensor([6, 4, 3], dtype=torch.int32)}),
    "empty shape": lambda t: t.update({"weight:shape": torch.tensor([], dtype=torch.int32)}),
    "vast shape": lambda t: t.update({"weight:shape": torch.tensor([6, 2**31 - 1, 2**31 - 1], dtype=torch.int32)}),
    "negative shape": lambda t: t.update({"weight:shape": torch.tensor([6, -3, -4], dtype=torch.int32)}),
    "shape of halves": lambda t: t.update({"weight:shape": torch.tensor([6.0, 3.0, 4.0])}),
    "whole scale": lambda t: t.update({"weight:scale": torch.ones(3, dtype=torch.int32)}),
    "long scale": lambda t: t.update({"weight:scale": torch.ones(4)}),
    "scale that is not finite": lambda t: t.update({"weight:scale": torch.full((3,), torch.inf)}),
}


@pytest.mark.parametrize("damage", BITS)
def test_damaged_weights_of_few_bits_are_refused(damage: str) -> None:
    tensors = packed({"weight": torch.randn(3, 4)}, 6)
    BITS[damage](tensors)
    with pytest.raises(BundleError, match="here: tensor weight"):
        fill(nn.Linear(4, 3, bias=False), save(tensors), Path("here"))
