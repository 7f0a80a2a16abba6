"""Trains a critic on recorded play: what each picture was still worth to those who played.

`python -m agents.critic --data data/coinrun --out runs/critic`. With `--critic runs/critic/agent --horizon 16`,
`agents.train` cuts dreams off after sixteen steps and pays what their last picture was still worth. So an agent learns
from dreams too short to go astray what only pays much later.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from torch import Tensor
from tqdm import tqdm

from agents.train import load_resumable
from agents.worlds import training_shards
from dreamenv.artifacts import only_writer
from dreamenv.config import check, whole
from dreamenv.console import errors_in_one_line
from dreamenv.contract.noise import philox
from dreamenv.data import Dataset, Shard
from dreamenv.data.windows import split_levels
from dreamenv.device import keep_freed_memory, pick_device, pick_precision
from dreamenv.errors import DatasetError
from dreamenv.models.interface import to_images
from dreamenv.policies.agent import ImpalaAgent, ImpalaConfig, save_agent
from dreamenv.stages import program

_CHECKED = 4096


@dataclass(frozen=True)
class CriticConfig:
    """One training."""

    data: Path
    """Dataset folder of real play, of training levels only. Whose play it is decides what a picture is worth."""
    out: Path = Path("runs/critic")
    """Run folder: `agent/`, whose values are the critic. It plays at random."""
    game: str = ""
    """Which of the dataset's games; only needed where it has several."""
    minutes: float = 6.0
    """Training time; about 700 pictures a second are seen on one core with bf16."""
    steps: int | None = None
    """Optimiser steps, instead of minutes."""
    discount: float = 0.99
    """What a step's wait leaves of a reward; that of the agents it is for."""
    batch_size: int = 256
    """Pictures a step."""
    lr: float = 1e-3
    """Learning rate at the beginning (AdamW); it falls linearly to a hundredth."""
    channels: tuple[int, ...] = (16, 32, 32)
    """Width of each stage of the IMPALA network."""
    features: int = 128
    """Width of its last hidden layer."""
    val_ratio: float = 0.05
    """Share of the levels that are left out, to judge it."""
    device: str = "auto"
    """auto, cpu, cuda ..."""
    precision: str = "auto"
    """The network's: fp32, bf16, or auto: bf16 where the hardware has it."""
    seed: int = 0
    """Decides the weights it begins with, the levels that are left out and the order of the pictures."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check(self.minutes > 0, f"minutes {self.minutes}: must be > 0")
        whole(1 if self.steps is None else self.steps, "steps", 1)
        whole(self.batch_size, "batch_size", 1)
        check(0 <= self.discount < 1, f"discount {self.discount}: must be in 0..1, below 1")
        check(0 < self.lr < math.inf, f"lr {self.lr}: must be > 0 and finite")
        check(0 < self.val_ratio < 1, f"val_ratio {self.val_ratio}: must be between 0 and 1")
        check(0 <= self.seed < 2**31, f"seed {self.seed}: must be in 0..2^31-1")
        ImpalaConfig(self.channels, self.features)  # raises
        pick_precision(self.precision, pick_device(self.device))  # raises


def check_minutes(minutes: float) -> None:
    """Raise `ConfigError` for minutes of a critic's training that are no length of time; 0 is no critic."""
    check(0 <= minutes < math.inf, f"critic_minutes {minutes}: must be >= 0 and finite")


def critic_command(
    data: Path, out: Path, minutes: float, algorithm: Path, seed: int = 0, device: str = "auto"
) -> list[str]:
    """The command that trains a critic for the dreams in which an algorithm is to learn.

    Args:
        data: dataset folder of the recorded play.
        out: run folder; the critic is `<out>/agent`.
        minutes: of training.
        algorithm: YAML file of the algorithm, whose discount is the critic's.
        seed: decides everything but the wall clock.
        device: where it is trained: auto, cpu, cuda ...

    Raises:
        ConfigError: no such algorithm.
    """
    discount = load_resumable(algorithm).discount
    return program("agents.critic", data=data, out=out, minutes=minutes, discount=discount, seed=seed, device=device)


def returns_to_go(shard: Shard, discount: float) -> np.ndarray:
    """What each step of a shard was still worth: its reward and the discounted ones after it in the same episode.

    Args:
        shard: of S steps.
        discount: what a step's wait leaves of a reward, in 0..1.

    Returns:
        float64 (S,) in the game's rewards; NaN in episodes that the shard's end cuts off. What comes after a step limit
        counts nothing.
    """
    rewards, over = np.asarray(shard.rewards, np.float64), np.asarray(shard.terminated | shard.truncated)
    cut = np.append(shard.first[1:], True) & ~over  # the last step of an episode that goes on elsewhere
    returns, rest = np.empty(len(rewards)), math.nan
    for t in range(len(rewards) - 1, -1, -1):
        rest = math.nan if cut[t] else rewards[t] + (0.0 if over[t] else discount * rest)
        returns[t] = rest
    return returns


class _Pictures:
    """The steps of a game whose return is known, split by level.

    Attributes:
        train, val: int64 (N, 2), shard and row of each step.
        steps: of the game that were recorded, those too whose return is not known.
    """

    def __init__(self, config: CriticConfig) -> None:
        data = Dataset(config.data)
        game = config.game or data.games[0]
        if not config.game and len(data.games) > 1:
            raise DatasetError(f"{config.data}: is of {', '.join(data.games)}; say which by --game")
        self.shards = training_shards(data, game)
        self.returns = [returns_to_go(shard, config.discount) for shard in self.shards]
        self.steps = sum(len(returns) for returns in self.returns)
        parts: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])
        for k, shard in enumerate(self.shards):
            left_out = split_levels(shard.level_seeds, config.val_ratio, config.seed)
            for part, of_it in zip(parts, (~left_out, left_out), strict=True):
                rows = np.flatnonzero(of_it & np.isfinite(self.returns[k]))
                part.append(np.stack([np.full(len(rows), k), rows], 1))
        self.train, self.val = (np.concatenate(part) for part in parts)
        if not len(self.train) or not len(self.val):
            raise DatasetError(
                f"{config.data}: too few whole episodes to train on some and judge by others; collect more"
            )

    def returns_of(self, steps: np.ndarray) -> np.ndarray:
        """Float64 (B,)."""
        return np.array([self.returns[k][row] for k, row in steps])

    def images_of(self, steps: np.ndarray, device: torch.device) -> Tensor:
        """Float32 (B, c, h, w) in [0, 1]."""
        return to_images(torch.as_tensor(np.stack([self.shards[k].frames[row] for k, row in steps])).to(device))


def train_critic(config: CriticConfig, progress: bool = False) -> dict[str, Any]:
    """Regress a network on the returns of recorded play (mean squared error) and save it as `<out>/agent`.

    Returns:
        `agent` (its folder), `steps`, and on the levels left out `explained` (share of the returns' variance that it
        explains) and `correlation`.

    Raises:
        DatasetError: a damaged dataset, of several games, of held-out levels, without whole episodes or any reward.
        BusyError: another process is writing `config.out`.
        StorageError: it cannot be written.
    """
    with only_writer(config.out):
        pictures, device = _Pictures(config), pick_device(config.device)
        scale = float(np.abs(pictures.returns_of(pictures.train)).max())
        if scale == 0:
            raise DatasetError(f"{config.data}: nobody earned anything there; collect with players who do")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            network = ImpalaAgent(ImpalaConfig(config.channels, config.features), config.precision)
        torch.nn.init.zeros_(network.policy.weight)
        torch.nn.init.zeros_(network.policy.bias)
        network.to(device)
        steps = _fit(config, network, pictures, scale, device, progress)
        figures = _judged(network, pictures, scale, device)
        known = {"pictures": len(pictures.train) + len(pictures.val), "real_steps": pictures.steps}
        told = {"discount": config.discount, "steps": steps, **known}
        facts = {"reward_scale": scale, "critic": figures | told}
        return {"agent": str(save_agent(config.out / "agent", network, facts)), "steps": steps, **figures}


def _fit(
    config: CriticConfig, network: ImpalaAgent, pictures: _Pictures, scale: float, device: torch.device, progress: bool
) -> int:
    """Train for the minutes, or the steps; returns the steps."""
    optimiser = torch.optim.AdamW(network.parameters(), config.lr, weight_decay=1e-3)
    rng, began, step, done = philox((config.seed, 0xC217)), time.perf_counter(), 0, 0.0
    with tqdm(
        total=1000, desc="critic", disable=not progress, bar_format="{desc}: {percentage:3.1f}% {elapsed}"
    ) as bar:
        while done < 1:
            optimiser.param_groups[0]["lr"] = config.lr * (1 - 0.99 * done)
            drawn = pictures.train[rng.integers(len(pictures.train), size=config.batch_size)]
            wanted = torch.as_tensor(pictures.returns_of(drawn) / scale, dtype=torch.float32, device=device)
            _, value, _ = network(pictures.images_of(drawn, device))
            optimiser.zero_grad(set_to_none=True)
            (value - wanted).square().mean().backward()
            optimiser.step()
            step += 1
            done = step / config.steps if config.steps else (time.perf_counter() - began) / (60 * config.minutes)
            bar.update(round(1000 * min(done, 1.0)) - bar.n)
    return step


def _judged(network: ImpalaAgent, pictures: _Pictures, scale: float, device: torch.device) -> dict[str, float | None]:
    """How well it foretells the returns on the levels left out; None where these do not differ."""
    chosen = pictures.val[:: math.ceil(len(pictures.val) / _CHECKED)]
    with torch.inference_mode():
        parts = np.array_split(chosen, math.ceil(len(chosen) / 256))
        found = (
            np.concatenate([network(pictures.images_of(p, device))[1].double().cpu().numpy() for p in parts]) * scale
        )
    wanted = pictures.returns_of(chosen)
    if wanted.std() == 0 or found.std() == 0:
        return {"explained": None, "correlation": None}
    explained = 1 - float(((found - wanted) ** 2).mean() / wanted.var())
    return {"explained": explained, "correlation": float(np.corrcoef(found, wanted)[0, 1])}


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `CriticConfig` is an option; the last line printed is JSON."""
    with errors_in_one_line():
        config = tyro.cli(CriticConfig, args=arguments, description=__doc__)
        keep_freed_memory()
        print(json.dumps(train_critic(config, progress=True)))


if __name__ == "__main__":
    main()
