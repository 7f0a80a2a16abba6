"""Many games by one command; which samples of them are drawn, how much each counts, and where their dreams start."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import trainers.choose
from dreamenv.bundle import load_bundle
from dreamenv.contract.frames import NATIVE
from dreamenv.contract.games import get_game
from dreamenv.data import Dataset
from dreamenv.data.merge import merge
from dreamenv.errors import ConfigError, DatasetError
from dreamenv.models.codecs.exact import ExactPatches, ExactPatchesConfig
from dreamenv.models.dynamics.canvas import CanvasFlow, CanvasFlowConfig
from dreamenv.models.io import load_model, save_model
from dreamenv.stages import begun
from dreamenv.starts import pack_starts
from envs.collect import CollectConfig, collect
from tests.here import brief
from trainers.bank import start_bank
from trainers.choose import choose
from trainers.encode import encode_dataset
from trainers.games import GamesConfig, main, mixed
from trainers.latent_data import Joined, LatentDataset
from trainers.tasks.dynamics import DynamicsTask, DynamicsTaskConfig

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
CANVAS = {"type": "canvas_flow", "backbone": {"type": "unet", "channels": [16, 16], "blocks": [1, 1]}}
GAMES = ("fruitbot", "maze")  # all of one picture moves, hardly anything of the other
_SHAPES = [f"{s}:model.backbone.{v}" for s in ("predictor", "dynamics") for v in ("channels=[16, 16]", "blocks=[1, 1]")]
_SMALL = ["loop.batch_size=4", "task.val_ratio=0.2", "head:model.width=16", *_SHAPES, *brief("canvas")]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("games")
    shared = {"steps": 1600, "num_envs": 8, "shard_steps": 200, "num_levels": 60, "policy": "biased"}
    return [collect(CollectConfig(game=g, out=str(folder / g), **shared), progress=False) for g in GAMES]  # pyright: ignore


@pytest.fixture(scope="module")
def latents(parts: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latents")
    save_model(folder / "codec", ExactPatches(ExactPatchesConfig()), {"step": 0})
    return encode_dataset(merge(parts, folder / "data", several=True), folder / "codec", folder / "latents", "cpu")


def task(latents: Path, **options: float) -> DynamicsTask:
    config = DynamicsTaskConfig(latents=str(latents), terms={"squared": {}}, val_ratio=0.2, pad=0.0, **options)  # pyright: ignore
    return DynamicsTask(config, CANVAS, 0)


def test_pixels_are_stored_as_bytes_and_come_back_exactly(latents: Path) -> None:
    data = LatentDataset(latents)
    assert data.stored.dtype == np.uint8
    chosen = np.arange(0, len(data.stored), 97)
    shown = data.codec.decode(data.latents_at(chosen).float()).clamp(0, 1).mul(255).round().byte()
    assert np.array_equal(shown.permute(0, 2, 3, 1).numpy(), data.frames(chosen))


def test_arrays_one_after_the_other_read_as_one() -> None:
    rng = np.random.default_rng(0)
    parts = [rng.random((n, 2, 3)) for n in (3, 1, 5)]
    whole, joined = np.concatenate(parts), Joined(parts)
    assert joined.shape == whole.shape and len(joined) == 9 and joined.dtype == whole.dtype
    for indices in (
        slice(None),
        slice(1, None, 3),
        np.array([[8, 0], [3, 3]]),
        np.zeros(0, int),
        np.int64(4),
        whole[:, 0, 0] > 0.5,
    ):
        assert np.array_equal(joined[indices], whole[indices])


def test_what_changes_is_drawn_more_often_and_games_as_often_as_before(latents: Path) -> None:
    even, changing = task(latents), task(latents, changes=1.0)
    rng = np.random.default_rng(0)
    drawn = {name: t.moments(rng, 4000) for name, t in {"even": even, "changing": changing}.items()}
    data = even.data
    for game in range(2):
        own = {name: now[data.game[now] == game] for name, now in drawn.items()}
        assert len(own["changing"]) == pytest.approx(2000, abs=150)
        cost = {name: data.changes(now, even.channels).mean() for name, now in own.items()}
        assert cost["changing"] > (1.0, 1.5)[game] * cost["even"], "in the one all steps change about as much"
    still = data.changes(even.train, even.channels) == 0
    assert not np.isin(drawn["changing"], even.train[still]).any()


def test_several_games_errors_count_alike(latents: Path) -> None:
    wholly = task(latents, even=1.0)
    data, now = wholly.data, wholly.train
    cost = data.changes(now, wholly.channels)
    frames = [data.frames(now[data.game[now] == g][:50, None] + np.arange(2)) / 255.0 for g in range(2)]
    moved = [16 * float(np.square(np.diff(f, axis=1)).mean()) for f in frames]  # latents are four times the pixels
    assert [cost[data.game[now] == g][:50].mean() for g in range(2)] == pytest.approx(moved, rel=1e-2)
    assert moved[0] > 20 * moved[1]
    weights = wholly.batch(np.random.default_rng(0), 64).weight
    assert weights is not None
    each = np.array([(cost * (data.game[now] == g)).sum() / (data.game[now] == g).sum() for g in range(2)])
    assert (wholly.weights.numpy() * each) == pytest.approx([each.mean()] * 2, rel=1e-3)  # pyright: ignore
    assert task(latents).batch(np.random.default_rng(0), 4).weight is None


def test_the_shares_are_told_which_pixels_change(latents: Path) -> None:
    plain = {"val_ratio": 0.2, "pad": 0.0, "drop_actions": 0.0, "context_noise": 0.0}
    terms = {"changed": {"weight": 2.0, "least": 16.5 * 4 / 255}}
    both = DynamicsTask(DynamicsTaskConfig(str(latents), terms, **plain), CANVAS, 0)  # pyright: ignore
    now = both.train[:: len(both.train) // 50]
    batch = both.batch(np.random.default_rng(0), len(now), now).to(torch.device("cpu"))
    chance = 0.3
    nn.init.zeros_(both.model.out.weight)  # type: ignore[union-attr, arg-type]
    nn.init.constant_(both.model.out.bias, np.log(chance / (1 - chance)))  # type: ignore[union-attr, arg-type]
    loss, metrics = both.loss(both.model, batch, torch.Generator().manual_seed(0), 0.0)
    pair = both.data.frames(now[:, None] + np.arange(2)).astype(np.int64)
    changed = (np.abs(pair[:, 1] - pair[:, 0]).max(-1) > 16).mean()
    assert 0.02 < changed < 0.9
    expected = -(changed * np.log(chance) + (1 - changed) * np.log(1 - chance))
    assert float(metrics["changed_1"]) == pytest.approx(expected, rel=1e-4)
    assert loss.item() == pytest.approx(2 * expected, rel=1e-4)


def test_what_is_left_open_is_chosen_by_how_it_dreams(
    latents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = CanvasFlow(CanvasFlowConfig(backbone=CANVAS["backbone"], games=GAMES))  # pyright: ignore
    assert model.out.bias is not None
    with torch.no_grad():  # every pixel becomes brighter by three values a step
        model.out.bias[:48], model.out.bias[48:64], model.out.bias[64:80] = 3 * 4 / 255, 9, -9
    digest = json.loads((latents / "latents.json").read_text())["codec_sha256"]
    save_model(tmp_path / "model", model, {"step": 7, "codec_sha256": digest, "val_ratio": 0.2})
    found = choose(tmp_path / "model", latents, tmp_path / "chosen", 8, "cpu")
    assert found["rest"][GAMES.index("maze")] == 4.0, "the least with which nothing changes"
    chosen, facts = load_model(tmp_path / "chosen", "dynamics")
    assert chosen.config.rest == tuple(found["rest"]) and facts["step"] == 7 and facts["chosen"] == found
    again = choose(tmp_path / "chosen", latents, tmp_path / "again", 8, "cpu")
    assert again == found, "what was chosen before does not count"
    scores = {0.0: 1.02, 4.0: 1.0, 8.0: 1.05, 16.0: 1.06}
    with monkeypatch.context() as patch:
        patch.setattr(trainers.choose, "_score", lambda tried, *_: scores[tried.config.rest[0]])
        assert set(choose(tmp_path / "model", latents, tmp_path / "best", 8, "cpu")["rest"]) == {4.0}
    data = LatentDataset(latents, 0.2)
    begin = data.windows(model.context + trainers.choose._STEPS, validation=True)
    begin = begin[data.game[begin] == GAMES.index("maze")][:6]
    seen = data.gather(begin[:, None] + np.arange(model.context - 1, model.context + trainers.choose._STEPS)).numpy()
    whole = np.square(seen[:, 1:].astype(float) - seen[:, :1]).mean((0, 2, 3, 4))  # of a dream in which nothing moves
    copied = trainers.choose._score(trainers.choose._with(model.eval(), {"rest": (256.0,) * len(GAMES)}), data, begin)
    assert copied == pytest.approx((1.1 * np.log(whole) + 0.1 * np.log(1e-4)).mean(), abs=1e-3), (
        "what stands still does"
    )
    assert copied < trainers.choose._score(model, data, begin)
    with pytest.raises(ConfigError, match="clips 0"):
        choose(tmp_path / "model", latents, tmp_path / "none", 0, "cpu")
    save_model(tmp_path / "other", model, {"step": 7, "codec_sha256": "x"})
    with pytest.raises(ConfigError, match="another codec"):
        choose(tmp_path / "other", latents, tmp_path / "none", 8, "cpu")


def test_only_dynamics_that_say_so_have_such_shares(latents: Path) -> None:
    config = DynamicsTaskConfig(str(latents), {"changed": {}}, val_ratio=0.2)
    with pytest.raises(ConfigError, match="LatentPredictor does not say which pixels are new"):
        DynamicsTask(config, CANVAS | {"type": "latent_predictor"}, 0)


def test_a_mean_learns_from_no_draws(latents: Path) -> None:
    config = DynamicsTaskConfig(str(latents), {"squared": {}, "energy": {}}, val_ratio=0.2)
    with pytest.raises(ConfigError, match="energy: want draws"):
        DynamicsTask(config, CANVAS | {"deterministic": True}, 0)


def test_a_game_without_training_steps_is_named(parts: list[Path], tmp_path: Path) -> None:
    few = collect(CollectConfig(game="heist", out=str(tmp_path / "few"), steps=8, num_envs=8), progress=False)
    save_model(tmp_path / "codec", ExactPatches(ExactPatchesConfig()), {"step": 0})
    data = merge([*parts, few], tmp_path / "data", several=True)
    folder = encode_dataset(data, tmp_path / "codec", tmp_path / "latents", "cpu")
    with pytest.raises(ConfigError, match="no training step is of heist"):
        task(folder, even=0.75)


def test_latents_of_an_older_release_are_encoded_anew(latents: Path, tmp_path: Path) -> None:
    shutil.copytree(latents, folder := tmp_path / "latents")
    marker = json.loads((folder / "identity.json").read_text())
    assert marker.pop("stored") == "uint8"
    (folder / "identity.json").write_text(json.dumps(marker))
    with pytest.raises(DatasetError, match="encode again"):
        LatentDataset(folder)
    for path in folder.glob("latents-*.npy"):
        path.write_bytes(b"old")
    facts = json.loads((folder / "latents.json").read_text())
    encode_dataset(Path(facts["data"]), Path(facts["codec"]), folder, "cpu")
    assert np.array_equal(LatentDataset(folder).stored[:], LatentDataset(latents).stored[:])


def test_dreams_start_late_too_where_episodes_are_long(tmp_path: Path) -> None:
    shared = {"num_envs": 8, "shard_steps": 400, "steps": 3200, "num_levels": 60, "policy": "random"}
    shared["limit"] = GamesConfig.limit
    for game, late in (("plunder", 10), ("fruitbot", 0)):  # a random player lives long, or runs into a wall soon
        data = Dataset(collect(CollectConfig(game=game, out=str(tmp_path / game), **shared), progress=False))  # pyright: ignore
        bank = start_bank(data, 20)
        shard = data.shards[0]
        firsts = {frame.tobytes() for frame in shard.frames[np.flatnonzero(shard.first)]}
        begun = [frame.tobytes() in firsts for frame in bank.frames[:, 0]]
        assert late * 0.8 <= sum(not b for b in begun) <= late, "some late pictures are as at first"
        assert len(bank.frames) == 20 == len(bank.level_seeds)
        assert len(set(bank.level_seeds[: 20 - late].tolist())) == 20 - late, "first frames are of different levels"


def test_a_bank_fits_into_its_room(parts: list[Path]) -> None:
    data = Dataset(parts[1])
    whole = start_bank(data, 12, NATIVE, "maze")
    part = start_bank(data, 12, NATIVE, "maze", 6)
    assert len(whole.frames) == len(start_bank(data, 12).frames) > len(part.frames) >= 1
    assert len(pack_starts(part)) <= 6 * 1024 < len(pack_starts(whole))
    assert len(start_bank(data, 12, NATIVE, "maze", 1).frames) == 1, "one at least"


def test_where_levels_are_dear_their_later_moments_fill_the_bank(tmp_path: Path) -> None:
    """Bossfight's skies do not pack: eight moments of a level cost little more than one."""
    shared = {"num_envs": 16, "shard_steps": 300, "steps": 4800, "num_levels": 500, "policy": "random"}
    data = Dataset(collect(CollectConfig(game="bossfight", out=str(tmp_path / "b"), **shared), progress=False))  # pyright: ignore
    bank = start_bank(data, 400, kib=60)
    assert len(pack_starts(bank)) <= 60 * 1024
    levels, counts = np.unique(bank.level_seeds, return_counts=True)
    assert 2 <= len(levels) <= 12 and (counts == 8).all()
    shard = data.shards[0]
    begins = np.flatnonzero(shard.first).tolist()
    longest: dict[int, tuple[int, int]] = {}
    for begin, end in zip(begins, [*begins[1:], len(shard)], strict=True):
        level = int(shard.level_seeds[begin])
        longest[level] = max(longest.get(level, (0, 0)), (end - begin, begin))
    for level in levels:
        length, begin = longest[int(level)]
        own = bank.frames[bank.level_seeds == level][:, 0]
        assert all(np.array_equal(own[j], shard.frames[begin + length * j // 8]) for j in range(len(own)))
    assert np.array_equal(bank.level_seeds[: len(levels)], levels), "first frames first"


def test_one_command_makes_one_bundle_of_several_games(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    agent = tmp_path / "ppo.yaml"
    agent.write_text(
        "algorithm: PPO\nnum_envs: 4\nnetwork: {channels: [4, 4, 4], features: 8}\n"
        "settings: {n_steps: 16, batch_size: 32, n_epochs: 1}\n"
    )
    options = ["--games", *GAMES, "--shared", "--recipe", "canvas", "--out", str(tmp_path / "g")]
    options += ["--steps", "1600", "--agent-steps", "64", "--event-steps", "6400"]
    options += ["--agent-config", str(agent), "--starts", "6", "--stage-steps", "2"]
    options += ["--set", *_SMALL]

    def made() -> list[str]:
        main(options)
        return json.loads(capsys.readouterr().out.splitlines()[-1])["bundles"]

    (folder,) = made()
    for game in GAMES:
        bundle = load_bundle(folder, "cpu", game=game)
        assert bundle.games == GAMES and len(bundle.starts.frames) == 6
        assert bundle.game.max_steps == get_game(game).max_steps
    events = Dataset(tmp_path / "g" / "all-events")
    assert events.games == GAMES and events.facts["events"] == 8 and 0 < len(events) < 12800
    assert load_bundle(folder, "cpu", game="maze").provenance["heads_also"] == events.facts
    assert "contingent" in Dataset(tmp_path / "g" / "all-data").manifest["columns"]
    for name in ("predictor", "dynamics"):
        terms = yaml.safe_load((tmp_path / "g" / "all" / f"{name}.yaml").read_text())["task"]["terms"]
        assert set(terms) == {"squared", "changed", "contingent"}
    players = dict(Dataset(tmp_path / "g" / "maze" / "data").facts["policy_mix"])
    assert players[f"agent:{tmp_path}/g/maze/agent/agent:0.1"] == pytest.approx(0.4) and len(players) == 4
    written = (tmp_path / "g" / "all" / "bundle" / "bundle.json").stat().st_mtime_ns
    assert made() == [folder], "all stages are done"
    assert (tmp_path / "g" / "all" / "bundle" / "bundle.json").stat().st_mtime_ns == written


def test_one_command_makes_a_bundle_of_each_game(
    tmp_path: Path, in_process: None, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        ["--games", *GAMES, "--out", str(tmp_path), "--agent-steps", "0", "--event-steps", "0", "--steps", "1600"]
        + ["--starts", "6", "--stage-steps", "2", "--set", *_SMALL]
    )
    made = json.loads(capsys.readouterr().out.splitlines()[-1])["bundles"]
    assert made == [str(tmp_path / game / "model" / "bundle") for game in GAMES]
    for game, folder in zip(GAMES, made, strict=True):
        bundle = load_bundle(folder, "cpu")
        assert bundle.games == (game,) and bundle.provenance["recipe"] == get_game(game).recipe
        assert bundle.provenance["data"]["game"] == game and len(bundle.starts.frames) == 6


def test_a_model_a_game_shares_the_time(tmp_path: Path) -> None:
    config = GamesConfig(games=GAMES, minutes=10.0, out=tmp_path)
    assert [config.run(game).minutes for game in GAMES] == [5.0, 5.0]
    assert config.run("maze").out == tmp_path / "maze" / "model"
    assert GamesConfig(games=GAMES, minutes=10.0, shared=True, recipe="canvas").run("maze").minutes == 10.0


def test_events_are_collected_as_the_recipe_says_if_it_does(tmp_path: Path) -> None:
    each = GamesConfig(games=("coinrun", "maze"), out=tmp_path)
    assert (each.events("coinrun")["events"], each.events("maze")["events"]) == (16, 8)
    assert GamesConfig(games=GAMES, recipe="pixels_rgb", out=tmp_path).events("maze") == {}
    assert GamesConfig(games=GAMES, event_steps=0, out=tmp_path).events("maze") == {}


def test_the_mix_keeps_its_proportions() -> None:
    assert mixed("random=0.1,biased=0.3", "agent:a:0.1", 0.5) == "random=0.125,biased=0.375,agent:a:0.1=0.5"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"games": ("maze", "maze")}, "named twice"),
        ({"games": ("mase",)}, "did you mean 'maze'"),
        ({"games": ()}, "name one"),
        ({"agent_share": 1.0}, "agent_share 1.0"),
        ({"agent_steps": -1}, "agent_steps -1"),
        ({"event_steps": -1}, "event_steps -1"),
        ({"starts": 0}, "starts 0"),
        ({"recipe": "tiles"}, "needs a known camera"),
        ({"shared": True, "recipe": "pixels_rgb"}, "cannot be told games"),
        ({"shared": True}, "needs one, such as canvas"),
        ({"seed": 2**31 - 1}, "seed 2147483647"),
        ({"agent_config": Path("none.yaml")}, "no such file"),
        ({"set": ("predictor:loop.lrr=1",)}, "lrr"),
    ],
)
def test_bad_settings_are_refused_at_once(options: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        GamesConfig(**options)  # pyright: ignore


def test_a_run_folder_of_an_older_release_goes_on(tmp_path: Path) -> None:
    with begun(tmp_path, {"seed": "0"}):
        pass
    with begun(tmp_path, {"seed": "0", "bank_kib": "None"}):  # a setting that it did not know, unset
        pass
    with pytest.raises(ConfigError, match="bank_kib"), begun(tmp_path, {"seed": "0", "bank_kib": "4"}):
        pass
