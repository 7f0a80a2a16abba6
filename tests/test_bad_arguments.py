"""Every argument of both constructors, given what nobody should: a typed error, or it is taken."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreamenv.bundle import Bundle
from dreamenv.errors import DreamenvError
from dreamenv.flow import SamplerConfig
from dreamenv.vector import DreamVectorEnv
from envs.procgen import RealProcgenVectorEnv

BAD: dict[str, Any] = {
    "an object": object(),
    "nothing in a list": [],
    "nothing in a dict": {},
    "a nested list": [[1], [2, 3]],
    "no text": "",
    "some text": "no such thing",
    "a null byte": "a\0b",
    "a path": Path("no/such/thing"),
    "bytes": b"\x80",
    "-1": -1,
    "2^70": 2**70,
    "nan": float("nan"),
    "infinity": float("inf"),
    "a NumPy float": np.float64(2.5),
    "an array": np.array([1, 2]),
    "a tensor without data": torch.empty(2, device="meta"),
    "a complex number": 1j,
    "a class": dict,
}
CASES = [
    (world, name)
    for world in (DreamVectorEnv, RealProcgenVectorEnv)
    for name in inspect.signature(world.__init__).parameters
    if name != "self"
]


@pytest.mark.parametrize(("world", "name"), CASES, ids=[f"{w.__name__}-{n}" for w, n in CASES])
def test_a_bad_argument_is_refused_by_its_name(world: type, name: str, calm_bundle: Bundle) -> None:
    refused = 0
    for what, value in BAD.items():
        options: dict[str, Any] = {}
        if world is DreamVectorEnv and name not in ("bundle", "game"):  # a folder, for what decides how it is loaded
            options["bundle"] = calm_bundle.folder if name in ("device", "precision") else calm_bundle
        try:
            world(**options, **{name: value}).close()
        except DreamenvError as error:
            assert str(error).strip() and "\n" not in str(error), what
            refused += 1
    assert refused >= 8, "most of these are no value of any argument"


@pytest.mark.parametrize("name", inspect.signature(SamplerConfig).parameters)
def test_a_bad_setting_of_the_sampler_is_refused(name: str, calm_bundle: Bundle) -> None:
    refused = 0
    for value in BAD.values():
        try:
            DreamVectorEnv(bundle=calm_bundle, sampler={name: value}).close()
        except DreamenvError as error:
            assert name in str(error)
            refused += 1
    assert refused >= 14
