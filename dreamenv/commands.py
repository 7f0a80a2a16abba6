"""The subcommands of `dreamenv`: their options, and what they print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dreamenv.evaluation.compare import CompareConfig
from dreamenv.flow import SamplerConfig
from dreamenv.play.run import PlayConfig
from dreamenv.play.run import run as run_play

_COMPARE, _PLAY, _SAMPLER = CompareConfig(), PlayConfig(), SamplerConfig()


def _sampler(
    nfe: int, solver: str = "euler", temperature: float = 1.0, guidance: float = 1.0, file: Path | None = None
) -> Any:
    from dreamenv.config import from_dict, load_yaml

    given = {"nfe": nfe, "solver": solver, "temperature": temperature, "guidance_scale": guidance}
    return from_dict(SamplerConfig, given if file is None else load_yaml(file), "" if file is None else str(file))


def _folder(bundle: Path | None, game: str, distribution_mode: str | None) -> Path:
    """The bundle that was asked for; raises `ConfigError` if it is of another difficulty."""
    from dreamenv.bundle import bundle_mode, check_mode, resolve_bundle

    folder = resolve_bundle(bundle, game, distribution_mode)
    check_mode(bundle_mode(folder, game), distribution_mode)
    return folder


def demo(
    out: Path = Path("out/demo"),
    game: str = "",
    games: tuple[str, ...] = (),
    bundle: Path | None = None,
    distribution_mode: str | None = None,
    clips: int = 256,
    horizon: int = 30,
    nfe: int = _SAMPLER.nfe,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Film all embedded games beside their dreams, or film and measure one; on held-out levels, headless.

    Args:
        out: folder for mosaic.mp4, .gif and .png; of one game for side_by_side.mp4 and .gif, film_strip.png,
            horizon.png and metrics.json.
        game: which embedded game, or which game of a bundle of several; by default all, or the only one.
        games: several embedded games, in easy mode, which are filmed and not measured.
        bundle: a bundle folder instead.
        distribution_mode: Procgen's difficulty, which decides the embedded bundle; easy by default.
        clips: how many real clips of one game, each of which the model continues.
        horizon: steps dreamt in each.
        nfe: network function evaluations per step.
        device: auto, cpu, cuda ...
        seed: decides levels, actions and noise.
    """
    from dreamenv.bundle import bundle_games, embedded_games
    from dreamenv.config import check
    from dreamenv.evaluation.demo import demo as run
    from dreamenv.evaluation.demo import mosaic

    several = not game and bundle is None and distribution_mode in (None, "easy")
    check(several or not games, "games: takes no --game, no --bundle and no --distribution-mode hard; drop those")
    if games or (several and len(embedded_games()) > 1):
        filmed = mosaic(out, games, sampler=_sampler(nfe), device=device, seed=seed)
        print(f"{len(filmed['games'])} games, each beside its dream; one alone, measured: dreamenv demo --game NAME")
        print(f"written to {out}/: mosaic.mp4, mosaic.gif, mosaic.png")
        return
    named = embedded_games(distribution_mode or "easy") if bundle is None else bundle_games(bundle)
    if bundle is not None and distribution_mode is not None:
        named = [name for name, mode in bundle_games(bundle).items() if mode == distribution_mode] or named
    game = game or next(iter(named), "")
    folder = _folder(bundle, game, distribution_mode)
    figures = run(out, game, folder, clips, horizon, sampler=_sampler(nfe), device=device, seed=seed)["figures"]
    _print_figures(figures)
    print(f"written to {out}/: side_by_side.mp4, side_by_side.gif, film_strip.png, horizon.png, metrics.json")


def _print_figures(figures: dict[str, Any]) -> None:
    """What was measured of one game, in lines."""
    print(f"\n{'steps dreamt':>14} {'PSNR dB':>9} {'copy last':>9}")
    for h in (1, 5, 10, 30, 50, 100):
        if f"psnr_{h}" in figures:
            print(f"{h:>14} {figures[f'psnr_{h}']:>9.2f} {figures[f'copy_psnr_{h}']:>9.2f}")
    print(
        f"{'autoencoder':>14} {figures['autoencoder_psnr']:>9.2f}   rare colours {figures['autoencoder_psnr_rare']:.2f}"
    )
    for name in sorted(k[:-3] for k in figures if k.endswith("_ap")):
        precision = figures[f"{name}_ap"]
        print(
            f"{name:>14} average precision {'unknown' if precision is None else format(precision, '.3f')} "
            f"(base rate {figures[f'{name}_base_rate']:.4f}, {figures[f'{name}_events']} events)"
        )
    print(
        f"end calibration error {figures['end_calibration_error']:.4f}; "
        f"dreaming at {figures['film_frames_per_s']:.0f} frames/s, three at a time"
    )


def play(settings: Annotated[PlayConfig, tyro.conf.arg(name="")] = _PLAY) -> None:
    """Play the dream and the real game side by side; H in the window shows the keys.

    Args:
        settings: what, how and where.
    """
    print(json.dumps(run_play(settings)))


def view(
    data: Annotated[Path, tyro.conf.Positional],
    episode: int = 0,
    scale: int = 8,
    fps: float = 15.0,
    headless: Path | None = None,
) -> None:
    """Look through a dataset's episodes: arrows, SPACE plays, HOME and END jump, the mouse scrubs.

    Args:
        data: a dataset folder: collected, or recorded in the window.
        episode: where to begin.
        scale: window pixels per game pixel.
        fps: frames per second when it plays.
        headless: film the episode to this .mp4 or .gif instead of opening a window.
    """
    from dreamenv.play.viewer import run

    print(json.dumps(run(data, episode, scale, fps, headless)))


def compare(
    settings: Annotated[CompareConfig, tyro.conf.arg(name="")] = _COMPARE,
    out: Path = Path("out/compare"),
    game: str = "coinrun",
    bundle: Path | None = None,
    distribution_mode: str | None = None,
    nfe: int = _SAMPLER.nfe,
    solver: Literal["euler", "heun"] = "euler",
    temperature: float = 1.0,
    guidance: float = 1.0,
    sampler: Path | None = None,
    device: str = "auto",
    quick: bool = False,
    thorough: bool = False,
    card: bool = False,
) -> None:
    """Measure a bundle against the real game on held-out levels; the last line printed is JSON.

    Args:
        settings: how much is measured.
        out: folder for report.html, metrics.json, tables, pictures and films.
        game: which embedded bundle; of a bundle of several games, which game.
        bundle: a bundle folder instead.
        distribution_mode: Procgen's difficulty, which decides the embedded bundle; easy by default.
        nfe: network function evaluations per step.
        solver: euler or heun.
        temperature: scales the dream's noise.
        guidance: how far to push the dream towards the action; 1 is off, else each evaluation costs two.
        sampler: a YAML file of nfe, solver, temperature and guidance_scale, instead of the four.
        device: auto, cpu, cuda ...
        quick: measure less of everything and leave out the closed loop, in under a minute.
        thorough: twice the steps, negatives and so on, four long dreams; what the embedded card is measured with.
        card: store the figures in the bundle, as its card of this game.
    """
    from tqdm import tqdm

    from dreamenv.bundle import load_bundle
    from dreamenv.config import check
    from dreamenv.evaluation.compare import compare as run
    from dreamenv.evaluation.report import save_comparison
    from dreamenv.rewrite import update_card

    check(not (quick and thorough), "quick and thorough exclude each other: give one")
    settings = settings.quick() if quick else settings.thorough() if thorough else settings
    loaded = load_bundle(folder := _folder(bundle, game, distribution_mode), device, game=game)
    stages = 7 + bool(settings.drift) + settings.closed_loop + bool(settings.endless_steps)
    with tqdm(total=stages, unit="stage", bar_format="{l_bar}{bar}| {n}/{total} [{elapsed}]") as bar:

        def progress(stage: str) -> None:
            bar.update(bool(bar.desc))  # nothing is done before the first
            bar.set_description(f"{stage:>24}")

        result = run(loaded, settings, _sampler(nfe, solver, temperature, guidance, sampler), progress)
        bar.update(1)
    page = save_comparison(out, loaded, settings, result)
    figures = result.figures | {"policy": settings.policy, "levels": list(settings.levels), "seed": settings.seed}
    if card:
        update_card(folder, figures, loaded.game.name)
    print(f"written to {out}/: open {page.name} in a browser", file=sys.stderr)
    print(json.dumps(figures))


def generate(
    out: Path = Path("out/clips"),
    game: str = "coinrun",
    bundle: Path | None = None,
    distribution_mode: str | None = None,
    form: Literal["video", "dataset", "grid", "futures"] = "video",
    clips: int = 8,
    steps: int = 100,
    policy: str = "mix",
    nfe: int = _SAMPLER.nfe,
    solver: Literal["euler", "heun"] = "euler",
    temperature: float = 1.0,
    guidance: float = 1.0,
    sampler: Path | None = None,
    device: str = "auto",
    seed: int = 0,
) -> None:
    """Dream clips of any bundle and write them as films, a dataset or a picture; needs no real game.

    Args:
        out: folder for clip-0000.mp4 and so on, for the dataset, for grid.png or futures.png.
        game: which embedded bundle; of a bundle of several games, which game.
        bundle: a bundle folder instead.
        distribution_mode: Procgen's difficulty, which decides the embedded bundle; easy by default.
        form: video; dataset, which says that it is of a dream; grid, eight dreams from fixed starts under
            fixed actions; or futures, four dreams of one start under the same actions.
        clips: how many clips.
        steps: most frames of each; a clip ends with its episode.
        policy: who acts, see `python -m envs.collect --help`.
        nfe: network function evaluations per step.
        solver: euler or heun.
        temperature: scales the dream's noise.
        guidance: how far to push the dream towards the action; 1 is off, else each evaluation costs two.
        sampler: a YAML file of nfe, solver, temperature and guidance_scale, instead of the four.
        device: auto, cpu, cuda ...
        seed: decides starts, actions and noise.
    """
    from dreamenv.bundle import load_bundle
    from dreamenv.evaluation import generate as module

    chosen = _sampler(nfe, solver, temperature, guidance, sampler)
    loaded = load_bundle(_folder(bundle, game, distribution_mode), device, game=game)
    if form in ("grid", "futures"):
        path = out / f"{form}.png"
        if form == "grid":
            module.save_qualitative_grid(path, loaded, chosen)
        else:
            module.save_futures(path, loaded, chosen, seed)
        print(json.dumps({"written": str(path)}))
        return
    made = module.generate(loaded, clips, steps, policy, chosen, seed)
    if form == "video":
        module.save_films(out, made)
    else:
        module.save_dataset(out, made, loaded, policy, chosen, seed)
    print(json.dumps({"written": str(out), "clips": int(made.first.sum()), "frames": len(made.first)}))


def bench(
    game: str = "coinrun",
    bundle: Path | None = None,
    distribution_mode: str | None = None,
    nfe: str = "1,2,4",
    num_envs: int = 64,
    seconds: float = 5.0,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    device: str = "auto",
    processes: int = 1,
    observations: Literal["pixels", "latent"] = "pixels",
) -> None:
    """Measure frames/s of one dream and of many, and peak memory; the last line printed is JSON.

    Args:
        game: which embedded bundle; of a bundle of several games, which game.
        bundle: a bundle folder instead.
        distribution_mode: Procgen's difficulty, which decides the embedded bundle; easy by default.
        nfe: numbers of function evaluations, separated by commas.
        num_envs: the large batch.
        seconds: time per measurement.
        precision: fp32, bf16, or auto: bf16 where the hardware has it.
        device: auto, cpu, cuda ...
        processes: more than 1 also measures so many programs at once, on the same cores.
        observations: what is shown: pixels, or latent, for which nothing is drawn.
    """
    from dreamenv.errors import ConfigError
    from dreamenv.evaluation.bench import bench as run

    try:
        nfes = [int(x) for x in nfe.split(",")]
    except ValueError:
        raise ConfigError(f"nfe {nfe!r}: expected integers separated by commas, e.g. 1,2,4") from None
    folder = _folder(bundle, game, distribution_mode)
    result = run(game, folder, device, nfes, num_envs, seconds, precision, processes, observations)
    print(f"{'NFE':>4} {'envs':>5} {'processes':>9} {'steps/s':>9} {'ms/step':>9} {'p95':>7}")
    for row in result["rows"]:
        print(
            f"{row['nfe']:>4} {row['num_envs']:>5} {row['processes']:>9} {row['steps_per_s']:>9.1f} "
            f"{row['ms_per_step_median']:>9.2f} {row['ms_per_step_p95']:>7.2f}"
        )
    print(f"peak memory {result['peak_memory_mib']:.0f} MiB")
    print(json.dumps(result))


def info(game: str = "coinrun", bundle: Path | None = None, distribution_mode: str | None = None) -> None:
    """Verify a bundle and print what it is, where it comes from and how faithful it was measured to be.

    Args:
        game: which embedded bundle; of a bundle of several games, which game.
        bundle: a bundle folder instead.
        distribution_mode: Procgen's difficulty, which decides the embedded bundle; easy by default.
    """
    from dreamenv.artifacts import read_json
    from dreamenv.bundle import NETWORKS, bundled_agent, load_bundle
    from dreamenv.config import to_dict
    from dreamenv.errors import PolicyError

    loaded = load_bundle(_folder(bundle, game, distribution_mode), "cpu", game=game)
    model = loaded.world_model
    parameters = {n: sum(p.numel() for p in getattr(model, n).parameters()) for n in NETWORKS}
    size = sum(p.stat().st_size for p in loaded.folder.iterdir() if p.is_file())
    shipped = bundled_agent(loaded.folder, loaded.game.name)
    agent = None if shipped is None else read_json(shipped / "agent.json", PolicyError, "re-download").get("facts")
    print(
        json.dumps(
            {
                "folder": str(loaded.folder),
                "identity": loaded.identity,
                "bytes": size,
                "parameters": parameters,
                "game": to_dict(loaded.game),
                "context": model.context,
                "latent_shape": list(model.latent_shape),
                "starts": len(loaded.starts.frames),
                "agent": agent,
                "provenance": loaded.provenance,
                "card": loaded.card,
            },
            indent=1,
        )
    )
