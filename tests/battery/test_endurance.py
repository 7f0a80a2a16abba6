"""Long runs: no NaN, no leak of memory, descriptors or threads; the same bytes in another process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode

from dreamenv.bundle import EMBEDDED, embedded_games
from dreamenv.vector import DreamVectorEnv
from envs.procgen import RealProcgenVectorEnv
from tests.battery.common import many, marks, record

pytestmark = [*marks, pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads /proc")]


def resident() -> float:
    """This process's resident set, in MiB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20


def threads() -> int:
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("Threads:")).split()[1])


def watch(envs: Any, steps: int) -> dict[str, Any]:
    """Step with random actions; returns what the process held on the way."""
    rng = np.random.default_rng(0)
    envs.reset(seed=0)
    n, rows, over = envs.num_envs, [], np.zeros(envs.num_envs, bool)
    for t in range(steps):
        if envs.autoreset_mode is AutoresetMode.DISABLED and over.any():
            envs.reset(options={"reset_mask": over})
        frames, rewards, terminated, truncated, infos = envs.step(rng.integers(15, size=n))
        over = terminated | truncated
        assert np.isfinite(rewards).all()
        assert not any(np.isnan(infos[k]).any() for k in ("uncertainty", "expected_reward") if k in infos)
        if t % max(steps // 50, 1) == 0:
            rows.append((t * n, resident(), len(os.listdir("/proc/self/fd")), threads()))
    table = np.array(rows)
    warm = table[len(table) // 5 :]
    slope = np.polyfit(warm[:, 0], warm[:, 1], 1)[0] * 100_000
    return {
        "steps": steps * n,
        "mib_per_100000_steps": float(slope),
        "growth_mib": float(warm[-1, 1] - warm[0, 1]),
        "descriptors": [int(warm[:, 2].min()), int(warm[:, 2].max())],
        "threads": [int(warm[:, 3].min()), int(warm[:, 3].max())],
    }


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=lambda m: m.value)
@pytest.mark.parametrize("world", ["dream", "dream on two cores", "real"])
def test_nothing_grows(world: str, mode: AutoresetMode, toy_bundle: Path) -> None:
    if world == "real":
        envs: Any = RealProcgenVectorEnv(64, num_levels=0, autoreset_mode=mode)
    else:
        envs = DreamVectorEnv(64, bundle=toy_bundle, autoreset_mode=mode)
    before = torch.get_num_threads()
    torch.set_num_threads(1 + (world == "dream on two cores"))
    try:
        figures = watch(envs, many(15_625, 60))
    finally:
        torch.set_num_threads(before)
    envs.close()
    record(f"endurance-{world}-{mode.value}".replace(" ", "-"), **figures)
    assert figures["descriptors"][0] == figures["descriptors"][1]
    assert figures["threads"][0] == figures["threads"][1]
    limit = 1.0 if many(1, 0) else 200.0  # few steps say little of a slope
    assert figures["mib_per_100000_steps"] <= limit and figures["growth_mib"] < 20


def test_resets_leak_nothing_of_the_real_game() -> None:
    envs = RealProcgenVectorEnv(1)
    for i in range(40):
        envs.reset(seed=i)
    before, count = resident(), many(8_000, 400)
    for i in range(count // 2):
        envs.reset(seed=i)
        envs.reset(options={"level": i})
    grown = (resident() - before) * 1024 / count
    envs.close()
    record("resets", resets=count, kib_per_reset=grown)
    assert grown < 2.0, "KiB a reset; it was 9 to 30"


PROGRAM = """
    import hashlib, sys
    import numpy as np
    from dreamenv.vector import DreamVectorEnv
    folder, seed, steps = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    envs = DreamVectorEnv(4, bundle=folder, device="cpu", precision="fp32", sampler={"nfe": 2})
    rng = np.random.default_rng(seed)
    digest = hashlib.sha256(envs.reset(seed=seed)[0].tobytes())
    for _ in range(steps // 4):
        for x in envs.step(rng.integers(15, size=4))[:4]:
            digest.update(np.ascontiguousarray(x).tobytes())
    print(digest.hexdigest())
"""


@pytest.mark.parametrize("game", embedded_games())
def test_another_process_dreams_the_same(game: str) -> None:
    import textwrap

    for seed in range(many(3, 1)):
        steps = str(many(10_000, 80))
        command = [sys.executable, "-c", textwrap.dedent(PROGRAM), str(EMBEDDED / game), str(seed), steps]
        seen = {subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)}
        assert len(seen) == 1 and len(seen.pop()) == 65
    record(f"determinism-{game}", seeds=many(3, 1), steps=many(10_000, 80))
