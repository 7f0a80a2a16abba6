"""Settings of trained dynamics that are chosen by how well they dream, on levels kept for validation."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreamenv.config import check
from dreamenv.console import run_command_line
from dreamenv.device import pick_device
from dreamenv.models.interface import Dynamics
from dreamenv.models.io import load_model, save_model
from dreamenv.models.registry import build, spec_of
from trainers.latent_data import LatentDataset
from trainers.models import check_told, of_game

_STEPS = 20
_STILL = 0.1  # what a decibel of what stands still counts beside one of the picture
_UNSEEN = 1e-4  # share of the picture's error below which that of what stands still no longer counts


def choose(model: Path, latents: Path, out: Path, clips: int = 48, device: str = "auto") -> dict[str, list[float]]:
    """Choose the settings that dynamics leave open (`Dynamics.choices`), a value for each game.

    Each value is tried on dreams of means from real contexts of validation levels. What counts is the mean over the
    steps of the logarithm of the squared error: what decibels measure. That of what stands still, the entries that stay
    as they are in the last real latent, counts a tenth on top: the eye sees it change, and it is hardly seen in the
    error of a whole picture. A game without an episode that is long enough gets the first value.

    Args:
        model: model folder of trained dynamics.
        latents: folder of the encoded dataset they were trained on.
        out: the new model folder.
        clips: dreams of each game.
        device: auto, cpu, cuda ...

    Returns:
        setting -> the chosen values, in the order of the games.

    Raises:
        ConfigError: `clips` < 1, or the latents are not those that the model was trained on.
    """
    check(clips >= 1, f"clips {clips}: must be >= 1")
    dynamics, facts = load_model(model, "dynamics")
    assert isinstance(dynamics, Dynamics)
    data = LatentDataset(latents, facts.get("val_ratio", 0.02))
    same = facts.get("codec_sha256") == data.facts["codec_sha256"]
    check(same, f"latents {latents}: are of another codec than {model} was trained on")
    check_told(dynamics.games, data.games, f"model {model}")
    target = pick_device(device)
    windows = data.windows(dynamics.context + _STEPS, validation=True)
    check(
        len(windows) > 0, f"latents {latents}: no validation level has {dynamics.context + _STEPS} steps; collect more"
    )
    rng, found = np.random.default_rng(0), {}
    for name, values in dynamics.choices.items():
        scores = np.full((len(data.games), len(values)), np.inf)
        for game in range(len(data.games)):
            own = windows[data.game[windows] == game]
            begin = np.sort(rng.permutation(own)[:clips])
            for i, value in enumerate(values):
                tried = _with(dynamics, {name: (value,) * len(data.games)}).to(target)
                scores[game, i] = _score(tried, data, begin) if len(begin) else 0.0
        found[name] = [values[i] for i in scores.argmin(1)]
    save_model(out, _with(dynamics, {name: tuple(chosen) for name, chosen in found.items()}), facts | {"chosen": found})
    return found


def _with(dynamics: Dynamics, settings: dict[str, Any]) -> Dynamics:
    """The same network with other settings."""
    assert set(settings) <= {f.name for f in fields(dynamics.config)}
    changed = build("dynamics", spec_of(dynamics) | settings)
    changed.load_state_dict(dynamics.state_dict())
    assert changed.config == replace(dynamics.config, **settings)
    return changed.eval()


def _score(dynamics: Dynamics, data: LatentDataset, begin: np.ndarray) -> float:
    """Mean logarithm of the squared error of dreams from windows that begin at steps (B,), the lower the better."""
    k, device = dynamics.context, next(dynamics.parameters()).device
    indices = begin[:, None] + np.arange(k + _STEPS)
    actions = torch.from_numpy(data.actions[indices]).to(device)
    latents, game = data.gather(indices).float().to(device), data.game_of(begin)
    scores = []
    with torch.no_grad():
        state = of_game(dynamics.begin(latents[:, :k], actions[:, : k - 1]), None if game is None else game.to(device))
        still = torch.ones_like(latents[:, 0], dtype=torch.bool)
        for step in range(k, k + _STEPS):
            predicted = dynamics.predict(state, actions[:, step - 1]).latent
            error = (predicted - latents[:, step]).square()
            whole, still = error.mean() + 1e-9, still & (latents[:, step] == latents[:, k - 1])
            kept = error[still].mean() if still.any() else whole
            scores.append(float(whole.log() + _STILL * (kept + _UNSEEN * whole).log()))
            state = dynamics.advance(state, actions[:, step - 1], predicted)
    return float(np.mean(scores))


if __name__ == "__main__":
    print(run_command_line(choose, positional=True))
