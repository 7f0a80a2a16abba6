from __future__ import annotations

import os
from collections.abc import Iterator

# toy models gain nothing from a second thread, and lose much when the machine is busy; children inherit it
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")

from pathlib import Path

import numpy as np
import pytest
import torch

from dreamenv.bundle import Bundle, GameFacts, Limits, Starts, load_bundle, save_bundle
from dreamenv.flow import SamplerConfig
from dreamenv.models.autoencoder import Autoencoder, AutoencoderConfig
from dreamenv.models.heads import OutcomeHeadConfig, PictureOutcomeHead
from dreamenv.models.latent_flow import LatentFlow, LatentFlowConfig
from dreamenv.session import Session
from dreamenv.world_model import WorldModel

MEAN = SamplerConfig(nfe=1)  # without noise, so that an environment of another seed dreams the same


LIMITS = Limits(50.0, 20.0)


def toy_world_model(seed: int = 0, calm: float = 4.0) -> WorldModel:
    """A small untrained world model whose parts all have an effect (nothing is left at its zero initialisation).

    The larger `calm`, the rarer are rewards and ends.
    """
    torch.manual_seed(seed)
    autoencoder = Autoencoder(AutoencoderConfig(latent_channels=8, width=16, blocks=1))
    autoencoder.init_pca(torch.rand(16, 3, 64, 64))
    dynamics = LatentFlow(LatentFlowConfig(latent_channels=8, channels=(16, 32), blocks=(1, 1), embedding=32, filter_bank=4,
                                           global_noise=True, gate=True))  # fmt: skip
    head = PictureOutcomeHead(OutcomeHeadConfig(latent_channels=8, width=16, bias=(calm, 0.0, 0.0)))
    for module in (autoencoder, dynamics, head):
        for parameter in module.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return WorldModel(autoencoder, dynamics, head)


def same_bytes(a: bytes, b: bytes) -> bool:
    """Compare without handing pytest a hundred kilobytes to explain: that takes it minutes."""
    return a == b


def write_toy_bundle(folder: Path, max_steps: int = 100, seed: int = 0, calm: float = 4.0,
                     limits: Limits = LIMITS) -> Path:  # fmt: skip
    rng = np.random.default_rng(seed)
    starts = Starts(rng.integers(0, 256, (5, 2, 64, 64, 3), dtype=np.uint8), np.full((5, 1), 7, np.uint8),
                    np.arange(5, dtype=np.int32))  # fmt: skip
    game = GameFacts("coinrun", "easy", max_steps, ("x",) * 15)
    return save_bundle(folder, toy_world_model(seed, calm), game, limits, starts, {"toy": True})


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_toy_bundle(tmp_path_factory.mktemp("bundle") / "toy")


@pytest.fixture(scope="session")
def calm_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return load_bundle(write_toy_bundle(tmp_path_factory.mktemp("calm") / "toy", calm=30.0), "cpu")


@pytest.fixture
def session(calm_bundle: Bundle) -> Iterator[Session]:
    session = Session(calm_bundle, MEAN, seed=1)
    session.load_real()
    session.new_start(level=5)
    yield session
    session.close()
