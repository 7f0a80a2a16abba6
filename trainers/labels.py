"""Joint outcomes of a dataset, their labels, and the calibration of what a head says of them."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dreamenv.config import check
from dreamenv.errors import BundleError, ConfigError
from dreamenv.models.interface import OutcomeHead
from dreamenv.models.io import load_model
from trainers.latent_data import LatentDataset

_RARE = 1e-4  # share of steps from which an outcome is one of its own
JointOutcome = tuple[int, float, bool]
"""Which game, the reward, and whether it ends the episode."""


def outcome_labels(
    data: LatentDataset, head: OutcomeHead | None, limit: int = 0
) -> tuple[list[JointOutcome], np.ndarray]:
    """The outcomes of a dataset, `joint_outcomes` of each of its games, and each step's label int64 (N,).

    Where there is a trained head they are its own, in its order. What it does not know counts as the nearest reward
    that it knows of those that end an episode too, or of those that do not, if it is rare: of fewer than one step in
    ten thousand of its game, or of fewer than any that the head knows (which may have been made for the commonest).

    Args:
        data: whose outcomes.
        head: a trained head of the same games.
        limit: most outcomes of each game where there is no head.

    Raises:
        ConfigError: the data holds an outcome that the head does not know, and it is not rare.
    """
    outcomes: list[JointOutcome] = []
    labels = np.zeros(len(data.rewards), np.int64)
    if head is not None:
        owners = head.config.owners or (0,) * len(head.config.rewards)
        outcomes = list(zip(owners, head.config.rewards, head.config.terminated, strict=True))
    for game in range(len(data.games)):
        own = data.game == game
        rewards, terminated = data.rewards[own], data.terminated[own]
        if head is not None:
            labels[own] = _known_labels(outcomes, game, rewards, terminated)
            continue
        found, places = joint_outcomes(rewards, terminated, limit)
        labels[own] = places + len(outcomes)
        outcomes += [(game, *outcome) for outcome in found]
    return outcomes, labels


def _known_labels(known: list[JointOutcome], game: int, rewards: np.ndarray, terminated: np.ndarray) -> np.ndarray:
    """Which of the known outcomes each step (N,) of a game has, int64 (N,)."""
    places, labels = np.arange(len(known)), np.zeros(len(rewards), np.int64)
    owner, worth, ends = (np.array(column) for column in zip(*known, strict=True))
    seen = dict.fromkeys(places[owner == game].tolist(), 0)
    unknown: dict[tuple[float, bool], int] = {}
    for end in (False, True):
        mine, steps = places[(owner == game) & (ends == end)], terminated == end
        for reward in np.unique(np.round(rewards[steps].astype(np.float64), 4)).tolist():
            same = steps & (np.abs(rewards - reward) < 1e-4)
            off = np.abs(worth[mine] - reward)
            if len(mine):
                labels[same] = mine[off.argmin()]
            if len(mine) and off.min() < 1e-4:
                seen[int(mine[off.argmin()])] += int(same.sum())
            else:
                unknown[reward, end] = int(same.sum())
    most = max(_RARE * len(rewards), min(seen.values(), default=0))
    refused = {outcome: n for outcome, n in unknown.items() if n >= most or outcome[1] not in ends[owner == game]}
    told = ", ".join(f"reward {r}, terminated {t} ({n} of {len(rewards)} steps)" for (r, t), n in refused.items())
    check(not refused, f"head: does not know the outcomes {told} of the data's game {game}; train a new one")
    return labels


def uneventful(outcomes: list[JointOutcome]) -> np.ndarray:
    """Bool (outcomes,): those without a reward that end nothing."""
    return np.array([not reward and not end for _, reward, end in outcomes])


def joint_outcomes(
    rewards: np.ndarray, terminated: np.ndarray, limit: int
) -> tuple[list[tuple[float, bool]], np.ndarray]:
    """Return the joint outcomes, (0, False) first and then by frequency, and each step's label int64 (N,)."""
    pairs = np.stack([np.round(rewards.astype(np.float64), 4), terminated.astype(np.float64)], 1)
    values, inverse, counts = np.unique(pairs, axis=0, return_inverse=True, return_counts=True)
    inverse = inverse.reshape(-1)
    null = (values == 0).all(1)
    order = np.argsort(np.where(null, -np.inf, -counts), kind="stable")
    if not null.any():  # an odd dataset without an uneventful step: the null outcome exists all the same
        values = np.concatenate([[[0.0, 0.0]], values])
        order, inverse = np.arange(len(values)), inverse + 1
    kept = order[:limit]
    ends = [o for o in order if values[o][1]]
    if ends and ends[0] not in kept:  # an episode must be able to end
        kept = np.append(kept[:-1], ends[0])
    new = np.zeros(len(values), np.int64)
    for old in range(len(values)):
        same = [k for k, o in enumerate(kept) if values[o][1] == values[old][1]] or [0]
        new[old] = min(same, key=lambda k: abs(values[kept[k]][0] - values[old][0]))
    return [(float(values[o][0]), bool(values[o][1])) for o in kept], new[inverse]


def calibrate(logits: Tensor, labels: Tensor, weights: Tensor) -> tuple[float, list[float], float]:
    """Fit one scale and a bias per outcome by weighted likelihood (vector-bias Platt scaling, Guo et al. 2017)."""
    with torch.enable_grad():
        log_scale = torch.zeros((), dtype=torch.float64, requires_grad=True)
        bias = torch.zeros(logits.shape[1], dtype=torch.float64, requires_grad=True)
        x, w = logits.double(), weights.double() / weights.sum()
        optimizer = torch.optim.LBFGS([log_scale, bias], max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            nll = (F.cross_entropy(log_scale.exp() * x + bias, labels, reduction="none") * w).sum()
            nll = nll + 1e-6 * (bias**2).sum()  # an outcome absent from validation must not run away
            nll.backward()
            return nll

        optimizer.step(closure)  # pyright: ignore[reportArgumentType]
        final = closure()
    bias = bias.detach() - bias.detach()[0]
    return float(log_scale.detach().exp()), [float(b) for b in bias], float(final.detach())


def trained_head(folder: str, option: str) -> OutcomeHead:
    """Load a trained head; raises `ConfigError`, naming the option, where the folder holds something else."""
    try:
        model, _ = load_model(folder, "head")
    except BundleError as error:
        raise ConfigError(f"{option} {folder}: is no trained outcome head ({error})") from None
    assert isinstance(model, OutcomeHead)
    return model
