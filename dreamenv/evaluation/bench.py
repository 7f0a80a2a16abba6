"""How fast and how large: frames/s of one dream and of many, for several numbers of function evaluations."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamenv.flow import SamplerConfig
from dreamenv.vector import DreamVectorEnv


def bench(
    game: str, bundle: Path | None, device: str, nfes: list[int], num_envs: int, seconds: float, precision: str = "auto"
) -> dict[str, Any]:
    """Step dreams with random actions.

    Returns:
        `rows`: one per (nfe, batch size) with steps/s and milliseconds per step; `peak_memory_mib` of the process.
    """
    rows, used = [], ""
    for nfe in nfes:
        for n in sorted({1, num_envs}):
            envs = DreamVectorEnv(n, game, bundle, device, SamplerConfig(nfe=nfe), "SameStep", precision=precision)
            used = envs.bundle.world_model.precision
            envs.reset(seed=0)
            rng = np.random.default_rng(0)
            for _ in range(3):
                envs.step(rng.integers(15, size=n))
            times = []
            began = time.perf_counter()
            while time.perf_counter() - began < seconds or len(times) < 5:
                at = time.perf_counter()
                envs.step(rng.integers(15, size=n))
                times.append(time.perf_counter() - at)
            median = float(np.median(times))
            rows.append(
                {
                    "nfe": nfe,
                    "num_envs": n,
                    "steps_per_s": n * len(times) / sum(times),
                    "ms_per_step_median": 1000 * median,
                    "ms_per_step_p95": 1000 * float(np.quantile(times, 0.95)),
                }
            )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": used,
        "rows": rows,
        "peak_memory_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),
    }
