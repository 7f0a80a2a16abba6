"""The main job, headless: the dream beside the real game, from the same held-out start under the same actions."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from dreamenv.artifacts import write_json
from dreamenv.bundle import Bundle, bundled_agent, embedded_games, load_bundle, resolve_bundle
from dreamenv.config import check, each_once
from dreamenv.contract.games import get_game
from dreamenv.errors import BundleError, ConfigError
from dreamenv.evaluation.clips import cut_clips, play_real
from dreamenv.evaluation.figures import save_grid, save_horizon_plot, side_by_side
from dreamenv.evaluation.imagine import open_loop
from dreamenv.evaluation.metrics import colour_frequencies
from dreamenv.evaluation.open_loop import compare_open_loop
from dreamenv.evaluation.outcomes import outcome_figures, outcome_scores
from dreamenv.flow import SamplerConfig
from dreamenv.types import Clips, Segment
from dreamenv.video import save_video


def demo(
    out: Path,
    game: str = "coinrun",
    bundle: Path | None = None,
    clips: int = 256,
    horizon: int = 30,
    film_steps: int = 60,
    play_steps: int = 60_000,
    sampler: SamplerConfig | None = None,
    device: str = "auto",
    seed: int = 0,
) -> dict[str, Any]:
    """Measure a bundle against the real game and film the two side by side.

    Writes `side_by_side.mp4` and `.gif`, `film_strip.png`, `horizon.png` and `metrics.json` into `out`.

    Returns:
        The contents of `metrics.json`.
    """
    sampler = sampler or SamplerConfig()
    loaded = load_bundle(resolve_bundle(bundle, game), device, game=game)
    facts = loaded.game
    envs = 32
    print(f"playing {play_steps} steps of the real {facts.name} on held-out levels ...", flush=True)
    model = loaded.world_model
    play = _play(loaded, -(-play_steps // envs), envs, "mix", seed)
    print(f"dreaming {clips} clips of {horizon} steps and scoring the heads ...", flush=True)
    frequencies = colour_frequencies(play.frames[:, :: max(play.frames.shape[1] // 128, 1)])
    cut = cut_clips(play, clips, model.context, horizon, seed)
    result = compare_open_loop(model, cut, frequencies, sampler, seed, samples=1)
    scores = outcome_scores(model, play, sampler, negatives=4000, seed=seed)
    scored = outcome_figures(model, scores, death=get_game(facts.name).death)
    agent = _agent(loaded)
    shown = play if agent is None else _play(loaded, 8 * film_steps, 16, agent, seed)
    film = _liveliest(cut_clips(shown, 64, model.context, film_steps, seed + 1), 3)
    began = time.perf_counter()
    dreams, _ = open_loop(model, film, sampler, seed)
    speed = dreams.shape[0] * dreams.shape[1] / (time.perf_counter() - began)

    start, real = film.frames[:, : film.context], film.frames[:, film.context :]
    for i, name in enumerate(["side_by_side.mp4", "side_by_side.gif"]):
        columns = {"real": np.concatenate([start[0], real[0]]), "dream": np.concatenate([start[0], dreams[0]])}
        save_video(out / name, side_by_side(columns, scale=(6, 3)[i]))
    steps = np.unique(np.linspace(0, film_steps - 1, 10).astype(int))
    save_grid(out / "film_strip.png", [rows[i][steps] for i in range(len(real)) for rows in (real, dreams)])
    save_horizon_plot(
        out / "horizon.png", result.curves, f"{facts.name}, held-out levels, {clips} clips, {sampler.nfe} NFE"
    )
    figures = result.figures | scored | {"film_frames_per_s": speed, "film_level_seeds": film.level_seeds.tolist()}
    curves = {name: [round(float(v), 3) for v in curve] for name, curve in result.curves.items()}
    metrics = {"game": facts.name, "bundle": loaded.identity, "seed": seed, "figures": figures, "curves": curves}
    write_json(out / "metrics.json", metrics)
    return metrics


_ACROSS = 4  # games beside one another
_LEAD = 4  # pictures of the last real frame before the dream begins


def mosaic(
    out: Path,
    games: tuple[str, ...] = (),
    steps: int = 60,
    sampler: SamplerConfig | None = None,
    device: str = "auto",
    seed: int = 0,
    scale: int = 2,
) -> dict[str, Any]:
    """Film several embedded games at once, each beside its dream, from the same held-out start under the same actions.

    The real game is played by the agent that ships with its bundle, or else by the players of `compare`'s clips.
    Writes `mosaic.mp4` and `.gif`, and `mosaic.png`: each game's real pictures above the dream's.

    Args:
        out: folder.
        games: which; all that are embedded by default.
        steps: how many are filmed; a game whose episodes are shorter stands still at its end.
        sampler: how the dreams are drawn.
        device: auto, cpu, cuda ...
        seed: decides levels, actions and noise.
        scale: how many times larger the pictures of the film are.

    Returns:
        `games`, and `steps` filmed of each.

    Raises:
        BundleError: a game is not embedded.
        ConfigError: `steps` < 4, or a game named twice.
    """
    check(steps >= 4, f"steps {steps}: must be >= 4")
    games = games or tuple(embedded_games())
    if not games:
        raise BundleError("no bundle is embedded; train one, and film it with --bundle")
    each_once(games, "games")
    folders = {game: resolve_bundle(None, game) for game in games}
    panels, rows, filmed = [], [], {}
    for game, folder in folders.items():
        print(f"dreaming of {game} ...", flush=True)
        loaded = load_bundle(folder, device, game=game)
        film = _one_clip(loaded, steps, seed)
        dream, _ = open_loop(loaded.world_model, film, sampler or SamplerConfig(), seed)
        start, real = film.frames[0, film.context - 1 : film.context], film.frames[0, film.context :]
        start = start.repeat(_LEAD, 0)
        shown = [np.concatenate([start, frames]) for frames in (real, dream[0])]
        length = steps + _LEAD
        shown = [np.concatenate([f, np.repeat(f[-1:], length - len(f), 0)]) for f in shown]
        panels.append(side_by_side({game: shown[0], "dream": shown[1]}, scale=scale))
        at = np.unique(np.linspace(0, len(real) - 1, 8).astype(int))
        rows += [frames[at] for frames in (real, dream[0])]
        filmed[game] = len(real)
    panels += [np.full_like(panels[0], 24)] * (-len(panels) % min(_ACROSS, len(panels)))
    lines = [np.concatenate(panels[i : i + _ACROSS], 2) for i in range(0, len(panels), _ACROSS)]
    for name in ("mosaic.mp4", "mosaic.gif"):
        save_video(out / name, np.concatenate(lines, 1))
    width = max(len(row) for row in rows)
    padded = [np.concatenate([row, np.zeros((width - len(row), *row.shape[1:]), row.dtype)]) for row in rows]
    save_grid(out / "mosaic.png", padded)
    return {"games": list(filmed), "steps": filmed}


def _agent(bundle: Bundle) -> str | None:
    """The policy that the agent which ships with a bundle is; None if none ships."""
    shipped = bundled_agent(bundle.folder, bundle.game.name)
    return None if shipped is None else f"agent:{shipped}"


def _play(bundle: Bundle, steps: int, num_envs: int, policy: str, seed: int) -> Segment:
    """Play the real game of a bundle, in its difficulty and as large as it shows it."""
    shown = {"distribution_mode": bundle.game.distribution_mode, "frame": bundle.world_model.frame_shape}
    return play_real(bundle.game.name, steps, num_envs, policy, seed=seed, **shown)


def _one_clip(bundle: Bundle, steps: int, seed: int) -> Clips:
    """A clip of the real game in which much moves, shorter than `steps` where no episode is as long."""
    play = _play(bundle, 300, 32, _agent(bundle) or "mix", seed)
    for horizon in (steps, steps // 2, steps // 4):
        try:
            return _liveliest(cut_clips(play, 32, bundle.world_model.context, horizon, seed), 1)
        except ConfigError:
            if horizon == steps // 4:
                raise
    raise AssertionError("the loop returns or raises")


def _liveliest(clips: Clips, count: int) -> Clips:
    """The clips in which most moves: a player who stands still shows nothing."""
    motion = np.abs(np.diff(clips.frames[:, ::4].astype(np.int16), axis=1)).mean((1, 2, 3, 4))
    best = np.argsort(-motion, kind="stable")[:count]
    return Clips(clips.frames[best], clips.actions[best], clips.level_seeds[best], clips.context)
