"""What pictures are worth by recorded play, and dreams that end by it."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from agents.critic import CriticConfig, main, returns_to_go, train_critic
from agents.train import train
from agents.worlds import dream_world
from dreamenv.bundle import load_bundle
from dreamenv.data import Dataset, DatasetWriter
from dreamenv.data.reader import Shard
from dreamenv.errors import ConfigError, DatasetError
from dreamenv.policies.agent import load_agent
from dreamenv.policies.simple import make_policy
from dreamenv.vector import DreamVectorEnv
from dreamenv.wrappers import TerminalValue
from tests.agents.common import config

LENGTH, EPISODES = 8, 64


def columns(rng: np.random.Generator, highest: int, paying: bool = True) -> dict[str, np.ndarray]:
    """Episodes of eight steps that pay 10 at the end where the pictures are bright, each on a level of its own."""
    steps = LENGTH * EPISODES
    bright = np.repeat(rng.random(EPISODES) < 0.5, LENGTH)
    last = np.arange(steps) % LENGTH == LENGTH - 1
    frames = np.broadcast_to(np.where(bright, 200, 50).astype(np.uint8)[:, None, None, None], (steps, 64, 64, 3))
    return {
        "frames": frames.copy(),
        "actions": np.zeros(steps, np.uint8),
        "rewards": np.where(last & bright & paying, 10, 0).astype(np.float32),
        "terminated": last,
        "truncated": np.zeros(steps, bool),
        "first": np.arange(steps) % LENGTH == 0,
        "level_seeds": np.repeat(np.linspace(0, highest, EPISODES).astype(np.int32), LENGTH),
        "policies": np.zeros(steps, np.uint8),
    }


def write(folder: Path, highest: int = 999, paying: bool = True, **facts: Any) -> Path:
    writer = DatasetWriter(folder, {"game": "coinrun", "num_shards": 1, "distribution_mode": "easy"} | facts)
    writer.commit(writer.write_shard(0, columns(np.random.default_rng(0), highest, paying)))
    return folder


def tiny(data: Path, out: Path, **changes: Any) -> CriticConfig:
    settings = {"channels": (4, 8), "features": 16, "steps": 60, "batch_size": 32, "val_ratio": 0.25, "device": "cpu"}
    return CriticConfig(data, out, **cast(Any, settings | changes))


def shard(rewards: list[float], terminated: list[int], truncated: list[int], first: list[int]) -> Shard:
    n, flags = len(rewards), (np.array(x, bool) for x in (terminated, truncated, first))
    zeros = np.zeros(n, np.int32)
    return Shard("s", zeros, zeros, np.array(rewards, np.float32), *flags, zeros, zeros, {})


def test_a_return_is_what_follows_in_the_same_episode() -> None:
    # an episode that ends, one that its limit cuts off, and one that goes on after the shard
    told = shard([0, 1, 4, 0, 2, 8, 8], [0, 0, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0], [1, 0, 0, 1, 0, 1, 0])
    found = returns_to_go(told, 0.5)
    assert found[:5].tolist() == [0 + 0.5 * 1 + 0.25 * 4, 1 + 0.5 * 4, 4, 0 + 0.5 * 2, 2]
    assert np.isnan(found[5:]).all()
    cut = shard([1, 1, 1], [0, 0, 1], [0, 0, 0], [0, 1, 0])  # its first episode goes on in no shard
    assert np.isnan(returns_to_go(cut, 0.5)[0]) and returns_to_go(cut, 0.5)[1:].tolist() == [1.5, 1]


@pytest.mark.slow
def test_it_learns_what_pictures_are_worth(tmp_path: Path, precision: str) -> None:
    found = train_critic(tiny(write(tmp_path / "data"), tmp_path / "run", precision=precision))
    critic = load_agent(found["agent"], "fp32")
    dark, bright = critic.values(np.stack([np.full((64, 64, 3), shade, np.uint8) for shade in (50, 200)]))
    assert dark == pytest.approx(0, abs=0.7) and bright == pytest.approx(np.mean(10 * 0.99 ** np.arange(8)), abs=0.7)
    assert found["explained"] > 0.9 and found["correlation"] > 0.95 and found["steps"] == 60
    chances, _ = critic.probabilities(np.zeros((2, 64, 64, 3), np.uint8))
    assert np.allclose(chances, 1 / 15), "it plays at random"
    make_policy(f"agent:{found['agent']}")
    again = train_critic(tiny(tmp_path / "data", tmp_path / "again", precision=precision))
    assert again | {"agent": ""} == found | {"agent": ""}


def test_play_it_cannot_learn_from_is_refused(tmp_path: Path) -> None:
    for name, options, words in (
        ("held", {"highest": 10_000}, "level 10000; levels from 10000 on are held out"),
        ("poor", {"paying": False}, "nobody earned anything"),
    ):
        with pytest.raises(DatasetError, match=words):
            train_critic(tiny(write(tmp_path / name, **cast(Any, options)), tmp_path / "run"))
    good = write(tmp_path / "good")
    with pytest.raises(DatasetError, match="is of coinrun, not of maze"):
        train_critic(tiny(good, tmp_path / "run", game="maze"))
    games: dict[str, Any] = {"games": {game: {"max_steps": 9} for game in ("coinrun", "maze")}, "num_shards": 2}
    writer = DatasetWriter(tmp_path / "both", {"game": "coinrun", "distribution_mode": "easy"} | games)
    for k, game in enumerate(games["games"]):
        writer.commit(writer.write_shard(k, columns(np.random.default_rng(k), 999)) | {"game": game})
    with pytest.raises(DatasetError, match="is of coinrun, maze; say which by --game"):
        train_critic(tiny(tmp_path / "both", tmp_path / "run"))
    assert train_critic(tiny(tmp_path / "both", tmp_path / "maze", game="maze", steps=1))["steps"] == 1
    with pytest.raises(DatasetError, match="too few whole episodes"):
        train_critic(tiny(good, tmp_path / "run", val_ratio=1e-9))
    assert not (tmp_path / "run" / "agent").exists()
    for wrong in ({"minutes": 0}, {"steps": 0}, {"discount": 1}, {"lr": 0}, {"val_ratio": 1}, {"precision": "x"}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} "):
            tiny(good, tmp_path / "run", **wrong)


@pytest.mark.parametrize("mode", ["NextStep", "SameStep"])
def test_what_is_cut_off_pays_what_it_was_still_worth(toy_bundle: Path, mode: str) -> None:
    options: dict[str, Any] = {"bundle": toy_bundle, "max_episode_steps": 3, "autoreset_mode": mode}
    plain = DreamVectorEnv(3, **options)
    envs = TerminalValue(DreamVectorEnv(3, **options), lambda seen: seen.astype(float).mean((1, 2, 3)), 0.5)
    plain.reset(seed=0), envs.reset(seed=0)
    ended = 0
    for t in range(9):
        seen, rewards, terminated, truncated, infos = plain.step(np.full(3, t))
        shown, more, over, cut, told = envs.step(np.full(3, t))
        last = infos["final_obs"] if mode == "SameStep" and (terminated | truncated).any() else seen
        paid = truncated & ~terminated
        worth = [0.5 * np.mean(last[i]) if paid[i] else 0.0 for i in range(3)]
        assert np.array_equal(seen, shown) and np.allclose(more, rewards + worth)
        assert np.array_equal(over, terminated | truncated) and not cut[paid].any()
        assert np.array_equal(told["paid"], rewards)
        ended += int(paid.sum())
    assert ended >= 3
    for wrong in (-0.1, 1.1, "x", None, True):
        with pytest.raises(ConfigError, match="discount"):
            TerminalValue(plain, len, wrong)  # pyright: ignore[reportArgumentType]


@pytest.mark.slow
def test_an_agent_learns_from_dreams_that_end_by_a_critic(toy_bundle: Path, tmp_path: Path) -> None:
    critic = Path(train_critic(tiny(write(tmp_path / "data"), tmp_path / "critic", steps=2))["agent"])
    bundle = load_bundle(toy_bundle, "cpu")
    world = dream_world(bundle, 3, horizon=2, critic=critic)
    calm = dream_world(bundle, 3, horizon=2)
    for each in (world, calm):
        each.seed(4)
        each.reset()
    values = load_agent(critic).values
    for t in range(2):
        _, rewards, dones, infos = world.step(np.zeros(3, int))
        _, plain, _, ended = calm.step(np.zeros(3, int))
        for i in range(3):
            cut = ended[i]["TimeLimit.truncated"]
            worth = 0.99 * values(ended[i]["terminal_observation"][None])[0] if cut else 0.0
            assert rewards[i] == pytest.approx(plain[i] + worth, abs=1e-6) and not infos[i]["TimeLimit.truncated"]
        assert dones.all() == (t == 1)
    with pytest.raises(ConfigError, match=r"critic .*: discounts by 0.99, the agent by 0.9;"):
        dream_world(bundle, 3, horizon=2, critic=critic, discount=0.9)
    both = dream_world(bundle, 3, horizon=1, critic=critic, penalty=0.5)
    both.seed(4)
    both.reset()
    _, _, _, infos = both.step(np.zeros(3, int))
    calm.seed(4)
    calm.reset()
    plain = calm.step(np.zeros(3, int))[1]
    assert [info["paid"] for info in infos] == list(plain), "what the dream paid, without either"
    whole = train(config(tmp_path, toy_bundle, out=tmp_path / "whole", critic=critic, horizon=4))
    train(config(tmp_path, toy_bundle, out=tmp_path / "parts", critic=critic, horizon=4, steps=128))
    parts = train(config(tmp_path, toy_bundle, out=tmp_path / "parts", critic=critic, horizon=4, resume=True))
    one, two = (Path(run["agent"]) / "agent.safetensors" for run in (whole, parts))
    assert one.read_bytes() == two.read_bytes()
    with pytest.raises(ConfigError, match="critic .*: is for dreams"):
        config(tmp_path, toy_bundle, world="real", horizon=None, critic=critic)


def test_it_is_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "data")
    main(["--data", str(data), "--out", str(tmp_path / "run"), "--steps", "2", "--channels", "4", "--device", "cpu"])
    assert f'"agent": "{tmp_path / "run" / "agent"}"' in capsys.readouterr().out.splitlines()[-1]
    assert len(Dataset(data)) == LENGTH * EPISODES
    with pytest.raises(SystemExit):
        main(["--data", str(tmp_path / "none"), "--out", str(tmp_path / "run"), "--steps", "2"])
