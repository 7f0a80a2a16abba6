"""Steps environments for long and prints what the process held on the way, as JSON; for `test_endurance.py`."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AutoresetMode

from dreamenv.vector import DreamVectorEnv
from envs.making import make_procgen
from envs.procgen import RealProcgenVectorEnv


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


class Procgen:
    """The game without anything of ours, to be watched beside it."""

    num_envs, autoreset_mode = 64, AutoresetMode.NEXT_STEP

    def __init__(self) -> None:
        self._games = make_procgen(
            num=64,
            rand_seed=0,
            num_threads=0,
            env_name="coinrun",
            num_levels=0,
            start_level=0,
            distribution_mode="easy",
        )

    def reset(self, seed: int) -> None:
        """It begins by itself."""

    def step(self, actions: np.ndarray) -> tuple[Any, ...]:
        self._games.act(actions.astype(np.int32))
        rewards, observations, first = self._games.observe()
        return observations["rgb"], rewards, first, np.zeros_like(first), {}

    def close(self) -> None:
        self._games.close()


def endure(world: str, mode: str, steps: int, cores: int, bundle: str) -> dict[str, Any]:
    """`watch` 64 environments of a world on so many of torch's threads."""
    if world == "procgen":
        envs: Any = Procgen()
    elif world == "real":
        envs = RealProcgenVectorEnv(64, num_levels=0, autoreset_mode=mode)
    else:
        envs = DreamVectorEnv(64, bundle=bundle, device="cpu", autoreset_mode=mode)
    before = torch.get_num_threads()
    torch.set_num_threads(cores)
    try:
        return watch(envs, steps)
    finally:
        torch.set_num_threads(before)
        envs.close()


if __name__ == "__main__":  # WORLD MODE STEPS CORES BUNDLE, in a process that has done nothing before
    print(json.dumps(endure(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]), sys.argv[5])))
