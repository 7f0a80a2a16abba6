"""The camera of the six games that scroll, read from the game's state, against how its pictures moved."""

from __future__ import annotations

import numpy as np
import pytest

from dreamenv.contract.games import GAMES
from envs.procgen import RealProcgenVectorEnv

# steps between the two pictures, actions to draw from, boxes that do not scroll (the player, the game's own signs)
SCENES = {
    "coinrun": (2, (7, 8, 8, 8, 7, 5, 1, 2), [(27, 27, 38, 38)]),
    "ninja": (1, (7, 8, 8, 8, 7, 5, 1, 2), [(26, 26, 39, 39), (1, 41, 6, 62)]),
    "jumper": (2, (1, 2, 2, 7, 8, 8, 5, 4), [(26, 26, 39, 39), (46, 0, 64, 20)]),
    "caveflyer": (2, (5, 5, 5, 2, 8, 1, 7, 3), [(26, 26, 39, 39)]),
    "climber": (2, (2, 8, 2, 8, 1, 7, 5, 4), []),
    "fruitbot": (6, (1, 7, 4, 4), [(0, 53, 64, 64)]),
}
MOMENTS = 200


def soft(picture: np.ndarray) -> np.ndarray:
    """Means of 3 x 3 pixels: without them a pattern that repeats every half tile is taken for a move."""
    padded = np.pad(picture.astype(np.float32), ((1, 1), (1, 1), (0, 0)), "edge")
    return sum(padded[i : i + 64, j : j + 64] for i in range(3) for j in range(3)) / 9


def peak(cost: np.ndarray, at: int) -> float:
    """Where between its neighbours the least cost lies, by a parabola."""
    if not 0 < at < len(cost) - 1:
        return 0.0
    bend = cost[at - 1] + cost[at + 1] - 2 * cost[at]
    return 0.0 if bend <= 0 else 0.5 * (cost[at - 1] - cost[at + 1]) / bend


def shift_between(a: np.ndarray, b: np.ndarray, boxes: list[tuple[int, int, int, int]]) -> tuple[np.ndarray, float]:
    """How far the picture's frame moved over the world from `a` to `b`, in pixels (x, y), and how clear that is."""
    a, b, seen = soft(a), soft(b), np.ones((64, 64), bool)
    for x0, y0, x1, y1 in boxes:
        seen[y0:y1, x0:x1] = False
    rx, ry = 8, 14
    cost = np.empty((2 * ry + 1, 2 * rx + 1))
    for j, dy in enumerate(range(-ry, ry + 1)):
        for i, dx in enumerate(range(-rx, rx + 1)):
            p = np.s_[max(0, dy) : 64 + min(0, dy), max(0, dx) : 64 + min(0, dx)]
            q = np.s_[max(0, -dy) : 64 + min(0, -dy), max(0, -dx) : 64 + min(0, -dx)]
            both = seen[p] & seen[q]
            cost[j, i] = (np.minimum(np.abs(a[p] - b[q]).sum(-1), 120) * both).sum() / both.sum()
    j, i = np.unravel_index(cost.argmin(), cost.shape)
    best, rest = cost[j, i], cost.copy()
    rest[max(0, j - 2) : j + 3, max(0, i - 2) : i + 3] = np.inf
    found = np.array([i - rx + peak(cost[j], int(i)), j - ry + peak(cost[:, i], int(j))])
    return found, float(1 - best / max(rest.min(), 1e-6))


def pairs(game: str) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Random moments: a picture, a later one of the same episode, and the camera's move between them in pixels."""
    gap, choices, _ = SCENES[game]
    scale = 64 / GAMES[game].view.tiles["easy"]
    envs = RealProcgenVectorEnv(16, game, start_level=0, num_levels=400, autoreset_mode="SameStep")
    rng = np.random.default_rng(0)
    frames, _ = envs.reset(seed=1)
    history, age, held = [(frames, envs.camera())], np.zeros(16, int), rng.choice(choices, 16)
    found = []
    for _ in range(260):
        held = np.where(rng.random(16) < 0.2, rng.choice(choices, 16), held)
        frames, _, terminated, truncated, _ = envs.step(held)
        age = np.where(terminated | truncated, 0, age + 1)
        history = [*history, (frames, envs.camera())][-gap - 1 :]
        if len(history) > gap:
            before, corner = history[0]
            moved = (history[-1][1] - corner) * scale
            sound = (age > gap) & (np.abs(moved).max(1) > 1.5) & (np.abs(moved) < (7, 13)).all(1)
            found += [(before[i].copy(), frames[i].copy(), moved[i]) for i in np.flatnonzero(sound)]
    envs.close()
    return [found[i] for i in rng.permutation(len(found))[:MOMENTS]]


@pytest.mark.slow
@pytest.mark.parametrize("game", SCENES)
def test_the_camera_tells_how_pictures_moved(game: str) -> None:
    boxes = SCENES[game][2]
    seen, said, clear = [], [], []
    for before, after, moved in pairs(game):
        found, clarity = shift_between(before, after, boxes)
        seen.append(found)
        said.append(moved)
        clear.append(clarity > 0.1)
    clear = np.array(clear)
    assert len(clear) == MOMENTS and clear.mean() > 0.85
    seen, said = np.array(seen)[clear], np.array(said)[clear]
    off = np.abs(seen - said)
    assert (off.max(1) < 1).mean() > 0.93 and np.median(off, 0).max() < 0.5
    close = off.max(1) < 1
    for axis, scrolls in enumerate(GAMES[game].view.scrolls):
        if scrolls and np.abs(said[:, axis]).max() > 1.5:
            slope = (seen[close, axis] * said[close, axis]).sum() / (said[close, axis] ** 2).sum()
            assert 0.95 < slope < 1.05, "the number of tiles that a picture shows"
        if not scrolls:
            assert np.abs(said[:, axis]).max() == 0


@pytest.mark.parametrize("game", [name for name, game in GAMES.items() if not any(game.view.scrolls)])
def test_other_games_have_no_camera(game: str) -> None:
    envs = RealProcgenVectorEnv(2, game, num_levels=10, autoreset_mode="SameStep")
    envs.reset(seed=0)
    assert np.isnan(envs.camera()).all() and envs.camera().shape == (2, 2)
    assert not GAMES[game].view.has("camera", "easy") and not GAMES[game].view.has("player", "easy")
    envs.close()
