"""A dataset encoded by a toy codec."""

from __future__ import annotations

from pathlib import Path

import pytest

from envs.collect import CollectConfig, collect
from trainers.encode import encode_dataset
from trainers.train import train


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("latents")
    data = collect(
        CollectConfig(out=str(root / "d"), steps=4000, num_envs=8, shard_steps=250, policy="biased"), progress=False
    )
    model = {"type": "patch_autoencoder", "latent_channels": 8, "width": 16, "blocks": 1}
    train(
        {
            "model": model,
            "task": {"type": "codec", "data": str(data), "val_ratio": 0.2},
            "loop": {"steps": 2, "batch_size": 4},
        },
        root / "ae",
    )
    return encode_dataset(data, root / "ae" / "model", root / "latents", "cpu")
