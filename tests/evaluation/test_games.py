"""The films and tables of all games."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamenv.bundle import bundled_agent, embedded_games, load_bundle, resolve_bundle
from dreamenv.commands import demo
from dreamenv.errors import BundleError, ConfigError
from dreamenv.evaluation.clips import play_real
from dreamenv.evaluation.demo import mosaic
from dreamenv.evaluation.games import PICTURES, SETTINGS, SHORT, Goal, games_table, goals_table, main, measure_all
from dreamenv.evaluation.metrics import still_pixels
from dreamenv.evaluation.pages import write_tables
from dreamenv.flow import SamplerConfig


def test_easy_asked_for_is_the_mosaic_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []

    def filmed(out: Path, games: tuple[str, ...], **_: object) -> dict[str, list[str]]:
        asked.append(" ".join(games) or "all")
        return {"games": []}

    monkeypatch.setattr("dreamenv.evaluation.demo.mosaic", filmed)
    monkeypatch.setattr("dreamenv.evaluation.demo.demo", lambda out, game, *_, **__: asked.append(game) or 1 / 0)
    for mode in (None, "easy"):
        demo(out=tmp_path, distribution_mode=mode)
    with pytest.raises(ZeroDivisionError):
        demo(out=tmp_path, distribution_mode="hard")
    demo(out=tmp_path, games=("maze", "ninja"))
    assert asked == ["all", "all", "coinrun", "maze ninja"]
    wrongs: list[dict[str, Any]] = [{"game": "maze"}, {"bundle": tmp_path}, {"distribution_mode": "hard"}]
    for wrong in wrongs:
        with pytest.raises(ConfigError, match="games: takes no"):
            demo(out=tmp_path, games=("ninja",), **wrong)


def test_a_mosaic_shows_every_game_beside_its_dream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the agent that ships plays, where there is one."""
    games, players = ("dodgeball", "maze"), []
    monkeypatch.setattr(
        "dreamenv.evaluation.demo.play_real", lambda *a, **more: players.append(a[3]) or play_real(*a, **more)
    )
    filmed = mosaic(tmp_path, games, steps=8, device="cpu")
    shipped = bundled_agent(resolve_bundle(None, "dodgeball"), "dodgeball")
    assert shipped is not None and players == [f"agent:{shipped}", "mix"]
    assert filmed["games"] == list(games) and set(filmed["steps"].values()) == {8}
    assert {path.name for path in tmp_path.iterdir()} == {"mosaic.mp4", "mosaic.gif", "mosaic.png"}
    picture = np.asarray(Image.open(tmp_path / "mosaic.png"))
    assert picture.shape == (2 * 64 * 2 * len(games), 2 * 64 * 8, 3)
    real, dream = picture[:128, :128].astype(int), picture[128:256, :128].astype(int)
    assert np.abs(real - dream).mean() < 8, "the first step is nearly right"
    for games, message in ((("maze", "tetris"), "tetris"), (("maze", "maze"), "games: maze is named twice")):
        with pytest.raises((BundleError, ConfigError), match=message):
            mosaic(tmp_path / "none", games)
    assert not (tmp_path / "none").exists()
    with pytest.raises(ConfigError, match="steps 3"):
        mosaic(tmp_path, games, steps=3)


def test_still_pixels_are_those_that_never_changed_since() -> None:
    film = np.zeros((1, 3, 64, 64, 3), np.uint8)
    film[0, 1, 5, 6, 2] = 1  # changes and comes back
    still = still_pixels(film, np.zeros((1, 1, 64, 64, 3), np.uint8))
    assert still[0, 0].all()
    for t in (1, 2):
        assert np.argwhere(~still[0, t]).tolist() == [[5, 6]]


def test_a_table_has_a_line_a_game_and_the_medians(tmp_path: Path) -> None:
    cards = {"a": {"psnr_1": 20.04, "reward_ap": None}, "b": {"psnr_1": 30.0}, "c": {"psnr_1": 26.0, "reward_ap": 0.5}}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in games_table(cards, SHORT).splitlines()]
    assert [line[0] for line in lines] == ["game", "---", "a", "b", "c", "median"]
    columns = {title: [line[i + 1] for line in lines[2:]] for i, (title, _) in enumerate(SHORT.values())}
    assert columns["PSNR, dB, 1 step"] == ["20.0", "30.0", "26.0", "26.0"]
    assert columns["reward AP"] == ["", "", "0.50", "0.50"] and columns["values: Pearson"] == [""] * 4
    page = tmp_path / "page.md"
    page.write_text("x\n<!-- games-short -->\nold\n<!-- /games-short -->\ny\n")
    write_tables(page, {"games-short": "new", "games-pictures": games_table(cards, PICTURES)})
    assert page.read_text() == "x\n<!-- games-short -->\nnew\n<!-- /games-short -->\ny\n"
    page.write_text("<!-- /games-short -->\n<!-- games-short -->\n")
    with pytest.raises(ConfigError, match="needs one"):
        write_tables(page, {"games-short": "new"})
    page.write_text("nothing")
    with pytest.raises(ConfigError, match="needs one"):
        write_tables(page, {"games-short": "new"})
    with pytest.raises(ConfigError, match="cannot be read"):
        write_tables(tmp_path / "none.md", {"games-short": "new"})


def test_again_leaves_cards_of_more_steps_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("dreamenv.evaluation.games.measure_all", lambda wanted, *_: asked.append(list(wanted)))
    page = tmp_path / "page.md"
    page.write_text("<!-- games-goals -->\n<!-- /games-goals -->\n")
    main([page])
    main([page], again=True)
    main([page], games=("coinrun",))
    assert asked == [[], [game for game in embedded_games() if game != "coinrun"], ["coinrun"]]
    assert "| reached |" not in page.read_text() and "of 16 |" in page.read_text()


def test_goals_name_the_games_that_miss_them_the_worst_first() -> None:
    cards = {
        "maze": {"psnr_1": 30.0, "copy_psnr_1": 29.0, "psnr_still_30": 45.0, "reward_ap": 0.8, "endless_detail": 1.0}
        | {"chance_psnr_1": 100.0, "chance_copy_psnr_1": 28.0},
        "ninja": {"psnr_1": 30.0, "copy_psnr_1": 27.0, "psnr_still_30": 20.0, "reward_ap": None, "endless_detail": 2.5},
        "heist": {"psnr_1": 30.0, "copy_psnr_1": 30.5, "psnr_still_30": 41.26, "reward_ap": 0.1}
        | {"chance_psnr_1": 33.4, "chance_copy_psnr_1": 30.5},
    }
    assert Goal("x", "psnr_1", 3, "copy_psnr_1").values(cards) == {"maze": 1.0, "ninja": 3.0, "heist": -0.5}
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in goals_table(cards).splitlines()]
    found = {line[0]: line[1:] for line in lines[2:]}
    assert found["PSNR over copying, 1 step, dB"] == [
        "at least 3",
        "1.00",
        "1 of 3",
        "1 of 2",
        "heist -0.50, maze 1.00",
    ]
    still = found["still pixels where the camera stands, 30 steps, dB"]
    assert still[2:] == ["1 of 2", "", "heist 41.3"], "ninja's camera moves"
    assert found["average precision of rewards"] == ["at least 0.8", "0.45", "1 of 2", "", "heist 0.10"]
    detail = next(line for title, line in found.items() if title.startswith("detail"))
    assert detail == ["at most 2", "1.75", "1 of 2", "", "ninja 2.50"]
    assert found["Pearson of policies' values"] == ["at least 0.95", "", "0 of 0", "", ""]


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_games_measured_at_a_time_have_the_figures_of_games_measured_alone(tmp_path: Path) -> None:
    games = ("maze", "leaper")
    few = {"clips": 2, "horizon": 6, "random_clips": 2, "examined": 1, "steps": 320, "samples": 1, "branches": 2}
    little = {"negatives": 8, "events": 4, "drift": 1, "policies": ("random", "sticky"), "episodes": 1, "limit": 4}
    config = replace(SETTINGS, **few, **little, endless_steps=4)
    cards = []
    for jobs in (1, 2):
        folder = tmp_path / f"jobs{jobs}"
        wanted = {game: Path(shutil.copytree(embedded_games()[game], folder / game)) for game in games}
        measure_all(wanted, config, SamplerConfig(nfe=1), tmp_path / "out", jobs)
        cards.append({game: load_bundle(wanted[game], "cpu", game=game).card for game in games})
    for game in games:
        alone, together = (card[game] for card in cards)
        assert alone["psnr_1"] == pytest.approx(together["psnr_1"], abs=0.01) and alone["clips"] == 2
        assert alone.keys() == together.keys() and alone["copy_psnr_1"] == together["copy_psnr_1"]
