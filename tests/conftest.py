from __future__ import annotations

import os
from collections.abc import Iterator

# toy models gain nothing from a second thread, and lose much when the machine is busy; children inherit it
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ.setdefault("SDL_VIDEODRIVER", "dummy")
os.environ.setdefault("DREAMENV_PRECISION", "fp32")  # not what the machine has instructions for

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dreamenv.bundle import Bundle, GameFacts, Limits, Starts, load_bundle, save_bundle, save_bundle_of
from dreamenv.flow import SamplerConfig
from dreamenv.models.codecs.exact import ExactPatches, ExactPatchesConfig
from dreamenv.models.codecs.patches import PatchAutoencoder, PatchAutoencoderConfig
from dreamenv.models.dynamics.canvas import CanvasFlow, CanvasFlowConfig
from dreamenv.models.dynamics.flow import LatentFlow, LatentFlowConfig
from dreamenv.models.heads.features import FeatureHeadConfig, FeatureOutcomeHead
from dreamenv.models.heads.picture import PictureOutcomeHead
from dreamenv.models.interface import Dynamics, OutcomeHeadConfig, Prediction
from dreamenv.play.session import Session
from dreamenv.world_model import WorldModel

MEAN = SamplerConfig(nfe=1)  # without noise, so that an environment of another seed dreams the same


LIMITS = Limits(50.0, 20.0)


def toy_world_model(seed: int = 0, calm: float = 4.0) -> WorldModel:
    """A small untrained world model whose parts all have an effect (nothing is left at its zero initialisation).

    The larger `calm`, the rarer are rewards and ends.
    """
    torch.manual_seed(seed)
    autoencoder = PatchAutoencoder(PatchAutoencoderConfig(latent_channels=8, width=16, blocks=1))
    autoencoder.init_pca(torch.rand(16, 3, 64, 64))
    latent = autoencoder.spec
    backbone = {"type": "unet", "channels": (16, 32), "blocks": (1, 1)}
    shape = {"embedding": 32, "filter_bank": 4, "global_noise": True, "gate": True}
    dynamics = LatentFlow(LatentFlowConfig(latent=latent, backbone=backbone, **shape))
    head = PictureOutcomeHead(OutcomeHeadConfig(latent=latent, width=16, bias=(calm, 0.0, 0.0)))
    for module in (autoencoder, dynamics, head):
        for parameter in module.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
    return WorldModel(autoencoder, dynamics, head)


def same_bytes(a: bytes, b: bytes) -> bool:
    """Compare without handing pytest a hundred kilobytes to explain: that takes it minutes."""
    return a == b


def of_all(self: Any, latents: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """In the place of `Dynamics.smooth`: latents that depend on all pictures and actions before, and their number."""
    taken = torch.nn.functional.pad(actions, (1, 0)).float().cumsum(1)[..., None, None, None]
    return latents.cumsum(1) / 2 + taken / 50


def write_toy_bundle(
    folder: Path, max_steps: int = 100, seed: int = 0, calm: float = 4.0, limits: Limits = LIMITS
) -> Path:
    rng = np.random.default_rng(seed)
    starts = Starts(
        rng.integers(0, 256, (5, 2, 64, 64, 3), dtype=np.uint8),
        np.full((5, 1), 7, np.uint8),
        np.arange(5, dtype=np.int32),
    )
    game = GameFacts("coinrun", "easy", max_steps)
    return save_bundle(folder, toy_world_model(seed, calm), game, limits, starts, {"toy": True})


def write_toy_bundle_of_games(folder: Path, games: tuple[str, ...]) -> Path:
    """The same with one model that is told which of several games it dreams."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {"type": "unet", "channels": (16, 16), "blocks": (1, 1)}
    canvas = CanvasFlow(CanvasFlowConfig(backbone=shape, games=games))
    outcomes = {"rewards": (0.0, 10.0) * len(games), "terminated": (False, True) * len(games)}
    owners = tuple(i // 2 for i in range(2 * len(games)))
    head = FeatureOutcomeHead(
        FeatureHeadConfig(latent=canvas.spec, width=16, features=16, games=games, owners=owners, **outcomes)  # pyright: ignore
    )
    starts = Starts(np.zeros((2, 4, 64, 64, 3), np.uint8), np.full((2, 3), 4, np.uint8), np.arange(2, dtype=np.int32))
    facts = [GameFacts(game, "easy", 500) for game in games]
    model = WorldModel(ExactPatches(ExactPatchesConfig()), canvas, head)
    return save_bundle_of(facts, folder, model, LIMITS, dict.fromkeys(games, starts), {"toy": True}, {})


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


def predicted(
    model: Dynamics,
    context: Tensor,
    actions: Tensor,
    x: Tensor | None = None,
    tau: Tensor | None = None,
    hints: dict[str, Tensor] | None = None,
) -> Prediction:
    """One evaluation on contexts (B, K, C, H, W) and actions (B, K), the current one last."""
    return model.predict(model.begin(context, actions[:, :-1]), actions[:, -1], x, tau, hints=hints)


@pytest.fixture(params=["fp32", "bf16"])
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test that asks for it runs in both, in its subprocesses too, whatever instructions the machine has."""
    monkeypatch.setenv("DREAMENV_PRECISION", request.param)
    return request.param


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages run here instead of in processes of their own, each of which takes seconds to load."""
    from tests.here import all_here  # loads every program

    all_here(monkeypatch)
