"""A family that the library has never heard of trains, is saved, loaded, dreamt and played; no file is touched."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils.env_checker import check_env

from dreamenv.bundle import load_bundle
from dreamenv.models.io import load_model
from dreamenv.play.run import PlayConfig, run
from envs.collect import CollectConfig, collect
from tests.toys import ToyCodec, ToyDynamics, ToyHead
from trainers.encode import encode_dataset
from trainers.pipeline import make_bundle
from trainers.train import train


def test_a_toy_family_from_the_real_game_to_the_window(tmp_path: Path, precision: str) -> None:
    data = tmp_path / "data"
    settings = CollectConfig(out=str(data), steps=3000, num_envs=8, game="maze", num_levels=40, policy="biased")
    collect(settings, progress=False)
    loop = {"steps": 6, "batch_size": 8, "val_every": 100}
    task = {"type": "codec", "data": str(data), "val_ratio": 0.2}
    train({"model": {"type": "toy_codec"}, "task": task, "loop": loop}, tmp_path / "codec")
    encode_dataset(data, tmp_path / "codec" / "model", tmp_path / "latents", "cpu")
    both = {"latents": str(tmp_path / "latents"), "val_ratio": 0.2}
    terms = {"squared": {}, "flow": {}, "energy": {}, "toy_term": {}}
    task = {"type": "dynamics", "terms": terms, "unroll": 2, **both}
    train({"model": {"type": "toy_dynamics"}, "task": task, "loop": loop}, tmp_path / "dynamics")
    assert (tmp_path / "dynamics" / "checkpoint" / "auxiliary.safetensors").exists(), "the term's own network"
    assert ",toy," in (tmp_path / "dynamics" / "metrics.csv").read_text()
    moving = {"dynamics": str(tmp_path / "dynamics" / "model"), "dreams": 8, "drift": 3}
    task = {"type": "outcome", **both, **moving}
    train({"model": {"type": "toy_head"}, "task": task, "loop": loop}, tmp_path / "head")
    dynamics, _ = load_model(tmp_path / "dynamics" / "model", "dynamics")
    assert isinstance(dynamics, ToyDynamics) and dynamics.config.latent.shape == (5, 8, 8)
    stages = {"codec": "codec", "dynamics": "dynamics", "head": "head"}
    bundle = load_bundle(make_bundle(tmp_path, data, 4, stages, "toys"), "cpu")
    model = bundle.world_model
    assert isinstance(model.codec, ToyCodec) and isinstance(model.head, ToyHead) and bundle.game.name == "maze"
    assert model.precision == precision
    env = gym.make("DreamProcgen-v0", bundle=str(bundle.folder), render_mode="rgb_array", device="cpu")
    check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=1)
    snapshot = env.unwrapped.snapshot()
    ahead = [env.step(a)[0] for a in (1, 7, 4)]
    env.unwrapped.restore(snapshot)
    assert all(np.array_equal(env.step(a)[0], seen) for a, seen in zip((1, 7, 4), ahead, strict=True))
    state = model.start(bundle.starts.frames, bundle.starts.actions)
    assert set(state) == {"latents", "actions", "mean"}
    with torch.inference_mode():
        plain, kept = model.decode(state.latents[:, -1]), model.render(state)
    assert not torch.equal(plain, kept), "the decoder sees what the state keeps for it"
    film = run(
        PlayConfig(bundle=bundle.folder, world="dream", headless=tmp_path / "film.gif", steps=5, scale=1, device="cpu")
    )
    assert Path(film["film"]).stat().st_size > 500
