"""What several tests of agents use."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from agents.adapter import NativeVecEnv
from agents.train import TrainConfig
from dreamenv.vector import DreamVectorEnv


def dreams(bundle: Path, n: int = 3, **options: Any) -> NativeVecEnv:
    return NativeVecEnv(DreamVectorEnv(n, bundle=bundle, **{"autoreset_mode": "SameStep"} | options))


SMALL = {"channels": [4, 8], "features": 16}


SETTINGS: dict[str, dict[str, Any]] = {
    "PPO": {"n_steps": 8, "batch_size": 8, "n_epochs": 1},
    "A2C": {"n_steps": 4},
    "TRPO": {"n_steps": 8, "batch_size": 8},
    "MaskablePPO": {"n_steps": 8, "batch_size": 8, "n_epochs": 1},
    "RecurrentPPO": {"n_steps": 8, "batch_size": 8, "n_epochs": 1},
    "DQN": {"buffer_size": 64, "learning_starts": 8, "train_freq": 4, "batch_size": 8},
    "QRDQN": {"buffer_size": 64, "learning_starts": 8, "train_freq": 4, "batch_size": 8},
    "ARS": {"n_delta": 2},
}


def config(tmp_path: Path, bundle: Path, **changes: Any) -> TrainConfig:
    (tmp_path / "ppo.yaml").write_text(
        json.dumps(
            {
                "algorithm": "PPO",
                "num_envs": 4,
                "network": SMALL,
                "settings": {"n_steps": 16, "batch_size": 32, "n_epochs": 2, "gamma": 0.99},
            }
        )
    )
    settings = {
        "out": tmp_path / "run",
        "config": tmp_path / "ppo.yaml",
        "bundle": bundle,
        "steps": 256,
        "eval_episodes": 2,
        "checkpoint_every": 1,
        "device": "cpu",
        "horizon": 30,
    }
    return TrainConfig(**cast(Any, settings | changes))
