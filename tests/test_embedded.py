"""The shipped bundle, held against the real game on levels it never saw; the bounds leave room for a small sample."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env

import dreamenv
from agents.evaluate import evaluate
from dreamenv.bundle import Bundle, bundled_agent, load_bundle, resolve_bundle
from dreamenv.contract.games import GAMES
from dreamenv.evaluation.card import fidelity_table
from dreamenv.evaluation.clips import cut_clips, play_real
from dreamenv.evaluation.controllability import branch_accuracy, branch_dream, branch_real
from dreamenv.evaluation.metrics import colour_frequencies
from dreamenv.evaluation.open_loop import compare_open_loop
from dreamenv.evaluation.outcomes import outcome_figures, outcome_scores
from dreamenv.flow import SamplerConfig
from dreamenv.models.codecs.tiles import TileAutoencoder
from dreamenv.models.tiles.grid import phase_of
from dreamenv.types import Segment
from dreamenv.vector import DreamVectorEnv
from envs.procgen import RealProcgenVectorEnv

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(resolve_bundle(None, "coinrun"), "cpu")


@pytest.fixture(scope="module")
def play() -> Segment:
    return play_real("coinrun", 700, 32, seed=11)


def test_it_is_small_and_never_saw_the_held_out_levels(bundle: Bundle) -> None:
    assert sum(p.stat().st_size for p in bundle.folder.iterdir()) < 6.1 * 2**20
    assert len(bundle.starts.frames) == 2000 and len(np.unique(bundle.starts.level_seeds)) > 1000
    data = bundle.provenance["data"]
    assert data["start_level"] + data["num_levels"] <= 10000 and bundle.starts.level_seeds.max() < 10000


def test_it_is_faithful_on_held_out_levels(bundle: Bundle, play: Segment) -> None:
    assert play.level_seeds.min() >= 10000
    model, clips = bundle.world_model, cut_clips(play, 48, bundle.world_model.context, 10)
    figures = compare_open_loop(model, clips, colour_frequencies(play.frames[:, ::7]), SamplerConfig(nfe=1)).figures
    figures |= outcome_figures(model, outcome_scores(model, play, SamplerConfig(nfe=1), negatives=1500))
    assert figures["autoencoder_psnr"] > 42 and figures["autoencoder_psnr_rare"] > 30
    assert figures["psnr_frames"] > 35.5
    assert figures["psnr_1"] > max(30, figures["copy_psnr_1"] + 5)
    assert figures["psnr_10"] > max(17.5, figures["copy_psnr_10"] + 6)  # 48 clips scatter by some two dB
    assert figures["reward_10_events"] > 20 and figures["reward_10_ap"] > 0.9
    assert figures["death_events"] > 15 and figures["death_ap"] > 0.85
    assert figures["end_calibration_error"] < 0.05


def test_phases_are_read_to_a_part_of_a_pixel(bundle: Bundle) -> None:
    codec = bundle.world_model.codec
    assert isinstance(codec, TileAutoencoder)
    envs = RealProcgenVectorEnv(24, start_level=20_000, num_levels=500)
    frames, _ = envs.reset(seed=5)
    for action in (7, 7, 8, 7, 5, 7, 8):
        frames, *_ = envs.step(np.full(24, action))
    true = phase_of(torch.from_numpy(envs.camera())).float()
    envs.close()
    images = torch.from_numpy(frames).movedim(-1, 1).float() / 255
    with torch.inference_mode():
        off = ((codec.read_phase(images) - true + 0.5) % 1 - 0.5).abs() * 64 / codec.config.grid.view
    assert off.median() < 0.01 and off.mean() < 0.02 and off.max() < 0.5


def test_coins_and_deaths_outlive_eight_dreamt_steps(bundle: Bundle, play: Segment) -> None:
    model = bundle.world_model
    figures = outcome_figures(model, outcome_scores(model, play, SamplerConfig(nfe=1), drift=8, negatives=400))
    assert (
        figures["reward_10_ap"] > 0.9 and figures["death_ap"] > 0.6
    )  # an earlier model without the outcome term: 0.75, 0.04


def test_most_branches_are_nearest_their_own_real_one(bundle: Bundle) -> None:
    branches = branch_real(bundle.game, 16, bundle.world_model.context, 4, seed=3)
    dreamt = branch_dream(bundle.world_model, branches, SamplerConfig(nfe=1))
    accuracy = branch_accuracy(branches.real[:, :, -1], dreamt[:, :, -1])
    assert accuracy["accuracy"] > 0.75 > 2 * accuracy["chance"]


def test_the_docs_show_what_the_card_says(bundle: Bundle) -> None:
    root, card = Path(__file__).parents[1], bundle.card
    table = fidelity_table(card, bundle.game.name)
    assert "| reward 10: average precision |" in table and "| reward: " not in table, "it has no other"
    assert table in (root / "docs" / "fidelity.md").read_text(encoding="utf-8"), "make fidelity"
    unknown = fidelity_table(card, "maze").splitlines()  # nobody published figures of it
    assert "published" in table and unknown == [line.rpartition(" | ")[0] + " |" for line in table.splitlines()]
    readme = (root / "README.md").read_text(encoding="utf-8")
    for h in (1, 10, 50):
        assert f"| {card[f'psnr_{h}']:.2f} | {card[f'copy_psnr_{h}']:.2f} |" in readme
    for name in ("reward_10", "death"):
        assert f"| {card[f'drifted_{name}_ap']:.3f} |" in readme
    assert f"| {card['branch_accuracy'] * 100:.1f} % |" in readme and f"| {card['closed_loop_pearson']:.2f} |" in readme


def test_actions_matter(bundle: Bundle) -> None:
    """Running right and running left from one start lead to different places; the same action to the same one."""
    envs = DreamVectorEnv(3, bundle=bundle, autoreset_mode="Disabled", sampler={"temperature": 0})
    envs.reset(seed=0, options={"start": 1})
    for _ in range(8):
        frames, _, terminated, *_ = envs.step(np.array([7, 1, 7]))
        if terminated.any():
            break
    difference = np.abs(frames[0].astype(int) - frames[1]).mean()
    assert difference > 5 and np.abs(frames[0].astype(int) - frames[2]).max() <= 2


def test_environment_checks_and_seeds(bundle: Bundle) -> None:
    env = gym.make("DreamProcgen-v0", game="coinrun", render_mode="rgb_array", device="cpu")
    check_env(env.unwrapped)

    def digest(seed: int) -> str:
        out = hashlib.sha256(env.reset(seed=seed)[0].tobytes())
        for action in np.random.default_rng(0).integers(15, size=60):
            frame, reward, terminated, truncated, _ = env.step(int(action))
            out.update(frame.tobytes() + repr((reward, terminated, truncated)).encode())
            if terminated or truncated:
                env.reset()
        return out.hexdigest()

    assert digest(5) == digest(5) != digest(6)


@pytest.mark.parametrize("n", [3, 8, 64])
def test_one_step_is_the_same_in_any_batch(bundle: Bundle, n: int) -> None:
    actions = np.random.default_rng(0).integers(15, size=n)
    fast = DreamVectorEnv(n, bundle=bundle)
    exact = DreamVectorEnv(n, bundle=bundle, exact=True)
    fast.reset(seed=100)
    exact.reset(seed=100)
    a, b = fast.step(actions)[0], exact.step(actions)[0]
    assert (np.abs(a.astype(int) - b) <= 1).mean() >= 0.999
    alone = DreamVectorEnv(1, bundle=bundle)
    alone.reset(seed=100 + n - 1)
    assert np.array_equal(alone.step(actions[-1:])[0][0], b[-1])


def test_tracked_files_stay_small() -> None:
    root = Path(dreamenv.__file__).parent.parent
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [root / name for name in listed.stdout.decode().split("\0") if name]
    assert sum(f.stat().st_size for f in files if f.exists()) < 20 * 2**20


def test_the_agent_that_ships_with_it_plays_better_than_chance() -> None:
    """In the real game, on levels nobody trained on; it learnt in the dream alone."""
    folder = resolve_bundle(None, "coinrun")
    agent = bundled_agent(folder, "coinrun")
    assert agent is not None and sum(p.stat().st_size for p in agent.iterdir()) < 2 * 2**20
    facts = json.loads((agent / "agent.json").read_text())["facts"]
    assert facts["world"] == "dream" and facts["levels"] == [0, 10000]
    returns = {
        name: evaluate(name, episodes=64, limit=250, seed=5).figures["mean_return"] for name in ("bundled", "random")
    }
    assert returns["bundled"] > returns["random"] + 1


def test_every_agent_that_ships_learnt_in_dreams_of_its_game_and_beat_a_random_player() -> None:
    """`agents.ship` asked the game; here: whose it is, that it plays as `bundled`, and what all take together."""
    shipped = {game: bundled_agent(resolve_bundle(None, game), game) for game in GAMES}
    sizes = 0
    for game, agent in shipped.items():
        if agent is None:
            continue
        facts = json.loads((agent / "agent.json").read_text())["facts"]
        assert (facts["world"], facts["levels"]) == ("dream", [0, 10000])
        assert facts["game"] == game and facts["real_return"] > facts["random_return"]
        assert evaluate("bundled", game=game, episodes=2, limit=5).figures["mean_length"] <= 5
        sizes += sum(p.stat().st_size for p in agent.iterdir())
    assert {game for game in shipped if shipped[game]} >= {"coinrun", "dodgeball", "fruitbot", "ninja", "starpilot"}
    assert sizes < 3 * 2**20
