"""Collect real episodes: `python -m envs.collect --game coinrun --steps 1000000 --policy mix --out data/coinrun`.

Every shard is decided by (settings, shard index) alone, so a killed collection resumes without a duplicate or a hole
and ends with the same bytes, and shards may be collected by several processes.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from dreamenv.artifacts import free_bytes, only_writer
from dreamenv.config import check
from dreamenv.console import errors_in_one_line
from dreamenv.contract.games import Game, check_levels, get_game
from dreamenv.contract.noise import philox
from dreamenv.data.manifest import OPTIONAL
from dreamenv.data.windows import HELD_OUT_FROM
from dreamenv.data.writer import COLUMNS, DatasetWriter
from dreamenv.errors import StorageError
from dreamenv.policies.simple import make_policy, parse_mix
from envs.making import procgen_version

_MOST_SHARDS = 10**5
_UNSET = ("events", "most", "limit", "contingent")  # what a manifest does not name where it is 0
_LARGE = 200_000  # steps from which starting more processes pays


@dataclass(frozen=True)
class CollectConfig:
    """What to collect."""

    game: str = "coinrun"
    """Game name."""
    steps: int = 1_000_000
    """Transitions in all (rounded up to a multiple of num_envs)."""
    out: str = ""
    """Dataset folder; data/<game> by default."""
    policy: str = "mix"
    """random | sticky | biased | agent:FOLDER[:EPSILON] | mix | a mixture such as random=0.2,biased=0.8."""
    start_level: int = 0
    """First level seed."""
    num_levels: int = 10000
    """Number of levels."""
    distribution_mode: str = "easy"
    """Procgen's difficulty."""
    seed: int = 0
    """Decides levels and actions."""
    num_envs: int = 32
    """Games played side by side in one shard."""
    shard_steps: int = 1024
    """Steps of each game in one shard."""
    events: int = 0
    """Keep, of `steps`, only so many up to each reward or real end of an episode (no truncation); 0 keeps all. Coins
    and deaths are rare, and an outcome head learns from many: see `also` in `trainers.tasks.outcome`."""
    most: int = 0
    """Most events of each kind (a reward, with or without an end) that a shard keeps; 0 keeps all. Some games reward
    every tenth step."""
    limit: int = 0
    """Steps after which an episode is left for one of another level; 0 plays each to its end. Where episodes are long,
    so many steps show few levels, and a model of few levels knows only these."""
    contingent: bool = False
    """Also record which pixels of the next frame depend on the action, for the loss term of that name. Each step of the
    game is taken twice for it, once by another action, and it takes some six times as long."""
    workers: int = 0
    """Processes; 1 collects in this one, 0 is one a core, 8 at most, for 200,000 steps or more, and 1 for fewer."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        check_levels(get_game(self.game), self.start_level, self.num_levels, self.distribution_mode)
        if not self.out:
            object.__setattr__(self, "out", f"data/{self.game}")
        check(
            self.start_level >= HELD_OUT_FROM or 0 < self.num_levels <= HELD_OUT_FROM - self.start_level,
            f"levels {self.start_level}+{self.num_levels}: mix training and held-out ones; stay below {HELD_OUT_FROM}, "
            f"or start at {HELD_OUT_FROM} or above",
        )
        parse_mix(self.policy)
        for name in ("steps", "num_envs", "shard_steps"):
            check(getattr(self, name) >= 1, f"{name} {getattr(self, name)}: must be >= 1")
        shards = -(-self.steps // (self.num_envs * self.shard_steps))
        check(shards <= _MOST_SHARDS, f"steps {self.steps}: {shards} shards, at most {_MOST_SHARDS}; raise shard_steps")
        for name in ("events", "most", "limit"):
            check(getattr(self, name) >= 0, f"{name} {getattr(self, name)}: must be >= 0")
        check(self.workers >= 0, f"workers {self.workers}: must be >= 0")
        check(0 <= self.seed < 2**63, f"seed {self.seed}: must be in 0..2^63-1")

    @property
    def shard_lengths(self) -> list[int]:
        """Steps of each game, per shard."""
        total = -(-self.steps // self.num_envs)
        full, rest = divmod(total, self.shard_steps)
        return [self.shard_steps] * full + ([rest] if rest else [])

    @property
    def columns(self) -> tuple[str, ...]:
        """The optional columns: where the camera is, if it moves, and what the actions decide, if that is asked for."""
        moves = get_game(self.game).view.camera(self.distribution_mode)
        return (("camera",) if moves else ()) + (("contingent",) if self.contingent else ())

    def facts(self) -> dict[str, Any]:
        """What the manifest records: everything that decides the bytes, and the game's facts."""
        game = get_game(self.game)
        facts = {k: v for k, v in asdict(self).items() if k not in ("out", "workers") and (v or k not in _UNSET)}
        facts |= {
            "backend": f"procgen {procgen_version()}",
            "num_shards": len(self.shard_lengths),
            "seq_len": self.shard_steps,
            "policy_mix": [list(p) for p in parse_mix(self.policy)],
            "max_steps": game.max_steps,
            "action_meanings": list(game.meanings),
        }
        return facts


def collect_shard(config: CollectConfig, index: int, envs: Any = None) -> dict[str, np.ndarray]:
    """Play one shard and return its columns (see `dreamenv.data.writer`).

    Args:
        config: the collection.
        index: which shard; decides all its randomness.
        envs: a `RealProcgenVectorEnv` to reuse.
    """
    from envs.procgen import RealProcgenVectorEnv

    n, length = config.num_envs, config.shard_lengths[index]
    rng, tries = philox((config.seed, index)), philox((config.seed, index), (0, 0, 0, 1))
    envs = envs or make_envs(config)
    assert isinstance(envs, RealProcgenVectorEnv)
    game = get_game(config.game)
    policy, others = make_policy(config.policy, np.asarray(game.bias)), _others(game)
    wanted = COLUMNS | {name: OPTIONAL[name] for name in config.columns}
    columns = {name: np.zeros((n, length, *shape), dtype) for name, (dtype, shape) in wanted.items()}
    first = np.ones(n, bool)
    frames, infos = envs.reset(seed=rng.integers(2**31 - 1, size=n).tolist())
    for t in range(length):
        actions = policy.act(frames, first, rng)
        columns["frames"][:, t] = frames
        columns["first"][:, t] = first
        columns["actions"][:, t] = actions
        columns["level_seeds"][:, t] = infos["level_seed"]
        columns["policies"][:, t] = policy.component
        if "camera" in config.columns:
            columns["camera"][:, t] = envs.camera()
        other = _other(envs, actions, others, tries) if config.contingent else None
        frames, rewards, terminated, truncated, infos = envs.step(actions)
        columns["rewards"][:, t] = rewards
        columns["terminated"][:, t] = terminated
        columns["truncated"][:, t] = truncated
        first = terminated | truncated
        if other is not None:
            differs = (frames != other[0]).any(-1) & ~(first | other[1])[:, None, None]
            columns["contingent"][:, t] = np.packbits(differs.reshape(n, -1), axis=1)
    if config.events:
        kept = _before_events(columns["rewards"], columns["terminated"], columns["truncated"], config, rng)
        kept[0, 0] |= not kept.any()  # no shard is empty
        columns["first"][:, 1:] |= ~kept[:, :-1]
        return {k: v[kept] for k, v in columns.items()}
    return {k: v.reshape(n * length, *v.shape[2:]) for k, v in columns.items()}


def _other(envs: Any, actions: np.ndarray, others: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, ...]:
    """Frames that actions drawn of `others` show, see `_others`, and whether these end episodes; the games stay."""
    moment, tried = envs.snapshot(), others[actions, rng.integers(others.shape[1], size=len(actions))]
    frames, _, terminated, truncated, _ = envs.step(tried)
    envs.restore(moment)
    return frames, terminated | truncated


def _others(game: Game) -> np.ndarray:
    """For each of the 15 actions one of each other meaning that the game knows, int64 (15, M - 1)."""
    meanings = np.array(game.meanings)
    distinct, first = np.unique(meanings, return_index=True)
    return np.stack([first[distinct != meaning] for meaning in meanings])


def _before_events(
    rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray, config: CollectConfig, rng: np.random.Generator
) -> np.ndarray:
    """Bool (N, T): the last `config.events` steps of an episode up to each event, itself included.

    Of each kind of event there are `config.most`, drawn at random. Rewards and flags are (N, T).
    """
    event = (rewards != 0) | terminated
    if config.most:
        env, t = np.nonzero(event)
        kinds = np.stack([rewards[env, t], terminated[env, t]], 1)
        _, kind = np.unique(kinds, axis=0, return_inverse=True)
        for which in range(kind.max(initial=-1) + 1):
            found = np.flatnonzero(kind.reshape(-1) == which)
            dropped = rng.permutation(found)[config.most :]
            event[env[dropped], t[dropped]] = False
    over, kept = terminated | truncated, event.copy()
    for _ in range(config.events - 1):
        earlier = kept[:, 1:] & ~over[:, :-1]
        kept[:, :-1] |= earlier
    return kept


def make_envs(config: CollectConfig) -> Any:
    """Return the vector environment of one collection."""
    from envs.procgen import RealProcgenVectorEnv

    return RealProcgenVectorEnv(
        config.num_envs,
        config.game,
        config.start_level,
        config.num_levels,
        config.distribution_mode,
        AutoresetMode.SAME_STEP,
        max_episode_steps=config.limit or None,
    )


def _worker(config: CollectConfig, index: int, parent: int) -> dict[str, Any]:
    if os.getppid() != parent:
        os._exit(1)  # orphaned by a kill: another run may own the folder now
    columns = collect_shard(config, index)
    if os.getppid() != parent:
        os._exit(1)
    return DatasetWriter(config.out, config.facts(), config.columns).write_shard(index, columns)


def collect(config: CollectConfig, progress: bool = True) -> Path:
    """Collect (or finish collecting) a dataset and return its folder.

    Raises:
        ConfigError, PolicyError: bad settings.
        DatasetError: `config.out` holds a dataset collected with other settings.
        BusyError: another process is writing `config.out`.
        StorageError: it cannot be written, or there is no room for the dataset.
    """
    with only_writer(config.out):
        return _collect(config, progress)


def _check_room(config: CollectConfig, steps: int) -> None:
    """Raise `StorageError` if so many steps do not fit."""
    columns = COLUMNS | {name: OPTIONAL[name] for name in config.columns}
    step = sum(np.dtype(dtype).itemsize * int(np.prod(shape)) for dtype, shape in columns.values())
    if not config.events and steps * step > (free := free_bytes(config.out)):
        raise StorageError(
            f"{config.out}: {steps} steps need {steps * step / 2**20:.0f} MiB, {free / 2**20:.0f} MiB are free; "
            "collect fewer, or into another folder"
        )


def _collect(config: CollectConfig, progress: bool) -> Path:
    from tqdm import tqdm

    writer = DatasetWriter(config.out, config.facts(), config.columns)
    writer.recover()
    lengths = config.shard_lengths
    missing = [i for i in range(len(lengths)) if i not in writer.done]
    total = sum(lengths) * config.num_envs
    _check_room(config, sum(lengths[i] for i in missing) * config.num_envs)
    bar = tqdm(
        total=total,
        initial=total - sum(lengths[i] for i in missing) * config.num_envs,
        unit="step",
        unit_scale=True,
        desc=f"collect {config.game}",
        disable=not progress,
        file=sys.stderr,
    )

    def commit(future: Future[dict[str, Any]]) -> None:
        entry = future.result()
        writer.commit(entry)
        bar.update(lengths[entry["index"]] * config.num_envs)

    large = sum(lengths[i] for i in missing) * config.num_envs >= _LARGE
    workers = config.workers or (min(os.cpu_count() or 1, 8) if large else 1)
    if workers > 1:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(workers, mp_context=context) as pool:
            for future in as_completed([pool.submit(_worker, config, i, os.getpid()) for i in missing]):
                commit(future)
    elif missing:
        envs = make_envs(config)
        with ThreadPoolExecutor(1) as pool:  # one shard is written while the next is played
            pending: Future[dict[str, Any]] | None = None
            for index in missing:
                columns = collect_shard(config, index, envs)
                if pending is not None:
                    commit(pending)
                pending = pool.submit(writer.write_shard, index, columns)
            if pending is not None:
                commit(pending)
        envs.close()
    bar.close()
    return Path(config.out)


def main(arguments: list[str] | None = None) -> None:
    """Command line: every field of `CollectConfig` is an option."""
    import tyro

    with errors_in_one_line():
        config = tyro.cli(CollectConfig, args=arguments, description=__doc__)
        collect(config)


if __name__ == "__main__":
    main()
