"""How fast and how large: frames/s of one dream and of many, for several numbers of function evaluations."""

from __future__ import annotations

import multiprocessing
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamenv.config import check, whole
from dreamenv.flow import SamplerConfig
from dreamenv.vector import DreamVectorEnv

_Options = tuple[str, Path | None, str, str, str]  # game, bundle, device, precision, observations


def bench(
    game: str,
    bundle: Path | None,
    device: str,
    nfes: list[int],
    num_envs: int,
    seconds: float,
    precision: str = "auto",
    processes: int = 1,
    observations: str = "pixels",
) -> dict[str, Any]:
    """Step dreams with random actions.

    Args:
        game: which embedded bundle, or which game of `bundle`.
        bundle: a folder instead.
        device: where.
        nfes: numbers of function evaluations a step.
        num_envs: the large batch.
        seconds: of each measurement.
        precision: of the networks.
        processes: more than 1 also measures so many programs at once, on the same cores.
        observations: "pixels" or "latent", see `DreamVectorEnv`.

    Returns:
        `rows`: one per (nfe, batch size, processes) with steps/s of all processes together and milliseconds per step;
        `peak_memory_mib` of this process.

    Raises:
        ConfigError: a number outside its range.
    """
    processes = whole(processes, "processes", 1, 256)
    check(0 < seconds <= 3600, f"seconds {seconds}: must be in 0..3600")
    options: _Options = (game, bundle, device, precision, observations)
    rows, used = [], ""
    for nfe in nfes:
        for n in sorted({1, num_envs}):
            used, times = _measure(options, nfe, n, seconds, time.time())
            rows.append(_row(nfe, n, [times]))
    if processes > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, context) as pool:
            list(pool.map(_warm, [options] * processes))
            for nfe in nfes:
                for n in sorted({1, num_envs}):
                    begin = time.time() + 1.0  # all at the same time
                    asked = [pool.submit(_measure, options, nfe, n, seconds, begin) for _ in range(processes)]
                    rows.append(_row(nfe, n, [job.result()[1] for job in asked]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": used,
        "observations": observations,
        "rows": rows,
        "peak_memory_mib": peak / (2**20 if sys.platform == "darwin" else 2**10),
    }


def _warm(options: _Options) -> str:
    """Load what is measured; a short sleep gives each process of a pool one of these."""
    used, _ = _measure(options, 1, 1, 0.2, time.time() + 0.5)
    return used


def _measure(options: _Options, nfe: int, n: int, seconds: float, begin: float) -> tuple[str, list[float]]:
    """The precision, and the seconds of each step, from the time `begin` on."""
    game, bundle, device, precision, shown = options
    sampler = SamplerConfig(nfe=nfe)
    envs = DreamVectorEnv(n, game, bundle, device, sampler, "SameStep", precision=precision, observations=shown)
    envs.reset(seed=0)
    rng = np.random.default_rng(0)
    for _ in range(3):
        envs.step(rng.integers(15, size=n))
    time.sleep(max(begin - time.time(), 0))
    times: list[float] = []
    began = time.perf_counter()
    while time.perf_counter() - began < seconds or len(times) < 5:
        at = time.perf_counter()
        envs.step(rng.integers(15, size=n))
        times.append(time.perf_counter() - at)
    envs.close()
    return envs.bundle.world_model.precision, times


def _row(nfe: int, n: int, times: list[list[float]]) -> dict[str, Any]:
    every = np.concatenate(times)
    return {
        "nfe": nfe,
        "num_envs": n,
        "processes": len(times),
        "steps_per_s": sum(n * len(own) / sum(own) for own in times),
        "ms_per_step_median": 1000 * float(np.median(every)),
        "ms_per_step_p95": 1000 * float(np.quantile(every, 0.95)),
    }
