"""The embedded bundle dreams what it dreamt when its weights were stored in ten bits, and `tests/golden` written."""

from __future__ import annotations

import numpy as np
import pytest

from dreamenv.bundle import resolve_bundle
from tests.test_bundle import GOLDEN, dreamt


@pytest.mark.parametrize("nfe", [1, 2])
def test_the_embedded_bundle_dreams_what_it_dreamt(nfe: int) -> None:
    """Bytes hold on one machine; another may round otherwise, which twelve steps hardly show."""
    frames, infos = dreamt(resolve_bundle(None, "coinrun"), nfe)
    with np.load(GOLDEN / "golden.npz") as golden:
        wanted, told = golden[f"coinrun_nfe{nfe}_frames"], golden[f"coinrun_nfe{nfe}_infos"]
    off = np.abs(frames.astype(int) - wanted)
    assert (off > 2).mean() < 1e-3 and off.mean() < 0.02
    np.testing.assert_allclose(infos, told, rtol=0.02, atol=1e-4)
