"""Which outcome each step of a dataset has, where a trained head already knows some."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dreamenv.errors import ConfigError
from dreamenv.models.heads.picture import PictureOutcomeHead
from dreamenv.models.interface import OutcomeHeadConfig
from trainers.labels import outcome_labels

_KNOWN = [(0, 0.0, False), (0, 1.0, False), (0, 0.0, True), (1, 0.0, False), (1, 10.0, True)]


def _head() -> PictureOutcomeHead:
    owners, rewards, terminated = zip(*_KNOWN, strict=True)
    return PictureOutcomeHead(
        OutcomeHeadConfig(width=8, games=("maze", "chaser"), owners=owners, rewards=rewards, terminated=terminated)
    )


def _data(*steps: tuple[int, int, float, bool]) -> Any:
    """So many steps each of a game, with a reward and an end."""
    counts, games, rewards, terminated = zip(*steps, strict=True)
    return SimpleNamespace(
        games=["maze", "chaser"],
        game=np.repeat(games, counts),
        rewards=np.repeat(np.array(rewards, np.float32), counts),
        terminated=np.repeat(terminated, counts),
    )


def test_a_heads_outcomes_keep_their_numbers_however_often_they_occur() -> None:
    data = _data((50, 1, 10.0, True), (40, 0, 1.0, False), (3, 0, 0.0, True), (9, 0, 0.0, False), (30, 1, 0.0, False))
    outcomes, labels = outcome_labels(data, _head())
    assert outcomes == _KNOWN
    assert labels.tolist() == [4] * 50 + [1] * 40 + [2] * 3 + [0] * 9 + [3] * 30


def test_a_rare_outcome_that_the_head_does_not_know_counts_as_the_nearest_one() -> None:
    many = (30_000, 0, 0.0, False), (30_000, 1, 0.0, False)
    _, labels = outcome_labels(_data(*many, (1, 0, 2.0, False), (1, 0, -4.0, False), (1, 0, 3.0, True)), _head())
    assert labels[-3:].tolist() == [1, 0, 2]


def test_a_head_of_the_commonest_outcomes_takes_the_data_that_it_was_made_from() -> None:
    """Of three outcomes a head may have been given the two that are common."""
    data = _data((900, 0, 0.0, False), (60, 0, 5.0, True), (40, 0, 9.0, True))
    data.games = ["maze"]
    found, first = outcome_labels(data, None, 2)
    rewards, terminated = zip(*(outcome[1:] for outcome in found), strict=True)
    head = PictureOutcomeHead(OutcomeHeadConfig(width=8, rewards=rewards, terminated=terminated))
    again, second = outcome_labels(data, head)
    assert found == again == [(0, 0.0, False), (0, 5.0, True)]
    assert np.array_equal(first, second) and second[-1] == 1


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ((10, 0, 2.0, False), r"reward 2.0, terminated False \(10 of 1010 steps\) of the data's game 0"),
        ((1, 0, 2.0, True), r"reward 2.0, terminated True \(1 of 1001 steps\)"),
        ((1, 1, 2.0, False), r"reward 2.0, terminated False \(1 of 1 steps\) of the data's game 1"),
    ],
)
def test_a_common_one_is_refused(steps: tuple[int, int, float, bool], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        outcome_labels(_data((1000, 0, 0.0, False), steps), _head())


def test_one_that_has_no_like_is_refused_however_rare() -> None:
    head = PictureOutcomeHead(OutcomeHeadConfig(width=8, rewards=(0.0, 1.0), terminated=(False, False)))
    data = _data((30_000, 0, 0.0, False), (1, 0, 0.0, True))
    data.games = ["maze"]
    with pytest.raises(ConfigError, match="terminated True"):
        outcome_labels(data, head)
