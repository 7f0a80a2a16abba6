"""The real Procgen as Gymnasium environments, on gym3's batched `ProcgenGym3Env` (Cobbe et al. 2020)."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from gymnasium.vector import AutoresetMode

from dreamenv.config import check, whole
from dreamenv.contract.actions import NOOP
from dreamenv.contract.frames import NATIVE, check_frame, observe
from dreamenv.contract.games import GAMES, SEED_LIMIT, Game, check_levels, get_game
from dreamenv.contract.resets import check_level, check_mask, check_options, check_seeds
from dreamenv.contract.single import SingleView
from dreamenv.contract.snapshot import check_arrays, pack, unpack
from dreamenv.contract.world import WorldVectorEnv
from dreamenv.errors import SnapshotError
from envs.making import fresh_state, make_procgen, procgen_version
from envs.states import camera_of, reseeded


class RealProcgenVectorEnv(WorldVectorEnv):
    """A batch of real Procgen games with real seeding, real resets and snapshots.

    Observations are uint8 (N, *frame_shape), actions integers (N,) in 0..14, rewards float64 (N,) of the game's own
    magnitudes. Procgen never shows a terminal frame: in NEXT_STEP and DISABLED mode the step that ends an episode
    repeats its last frame; in SAME_STEP mode the observation is already the next level's and there is no `final_obs`
    (but where `max_episode_steps` ended the episode).

    Args:
        num_envs: batch size.
        game: one of `dreamenv.contract.games.GAMES`.
        start_level: first level seed.
        num_levels: how many levels; 0 means all of them (then `start_level` must be 0).
        distribution_mode: "easy", "hard", "extreme" or "memory", as far as the game has it.
        autoreset_mode: NEXT_STEP (default), SAME_STEP or DISABLED (the caller resets finished environments with
            `reset_mask`).
        render_mode: None or "rgb_array".
        render_size: 64 for the observation's pixels, 512 for Procgen's own large rendering.
        num_threads: Procgen's worker threads; 0 steps in the calling thread, on two cores as fast.
        max_episode_steps: truncate episodes after so many steps; None leaves the game's own limit.
        frame_shape: (H, W, C) of an observation; others than (64, 64, 3) are made by `dreamenv.contract.frames`.

    Raises:
        ConfigError: an argument outside its range.
    """

    _envs: Any = None
    _helper: Any = None  # a lone instance for forced resets
    _large: Any = None  # a lone instance that draws 512 px
    _readers: ThreadPoolExecutor | None = None
    _counters = ("steps", "levels", "finished", "advanced", "pinned", "frames")
    metadata: dict[str, Any] = {**WorldVectorEnv.metadata, "games": tuple(GAMES)}

    def __init__(
        self,
        num_envs: int = 1,
        game: str = "coinrun",
        start_level: int = 0,
        num_levels: int = 10000,
        distribution_mode: str = "easy",
        autoreset_mode: AutoresetMode | str = AutoresetMode.NEXT_STEP,
        render_mode: str | None = None,
        render_size: int = 64,
        num_threads: int = 0,
        max_episode_steps: int | None = None,
        frame_shape: Sequence[int] = NATIVE,
    ) -> None:
        self.game: Game = get_game(game)
        check_levels(self.game, start_level, num_levels, distribution_mode)
        num_threads = whole(num_threads, "num_threads", 0, 1024)
        check(type(render_size) is int and render_size in (64, 512), f"render_size {render_size!r}: must be 64 or 512")
        self._frame, modes = check_frame(frame_shape), tuple(AutoresetMode)
        super().__init__(num_envs, self._frame, autoreset_mode, modes, render_mode, max_episode_steps)
        self.render_size = render_size
        options = {"start_level": start_level, "num_levels": num_levels, "distribution_mode": distribution_mode}
        self._options = {"env_name": game, **options}
        self._envs = make_procgen(num=self.num_envs, rand_seed=0, num_threads=num_threads, **self._options)
        self._buffers = [self._envs._ffi.new(f"char[{_STATE_BYTES}]") for _ in range(2)]
        self._steps = np.zeros(num_envs, np.int64)
        self._levels = np.zeros(num_envs, np.int64)
        self._pinned = np.zeros(num_envs, bool)  # at a level that `reset` was given
        self._finished = np.zeros(num_envs, bool)  # over, and not yet reset (not in SAME_STEP mode)
        self._advanced = np.zeros(num_envs, bool)  # over, and the game itself stands at its next level already

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start new episodes, in mid-episode too.

        Args:
            seed: one int (environment i gets seed + i), one int or None for each, or None to go on to the next level.
            options: `reset_mask` bool (N,): reset only these; `level`: int or ints (N,), the level seeds to play
                (an autoreset repeats the level, the next reset goes back to the environment's own range).

        Returns:
            uint8 observations (N, *frame_shape) and infos.

        Raises:
            ResetError: a seed or option of the wrong type, shape or range.
        """
        self._check_open("reset")
        options = check_options(options, ("reset_mask", "level"))
        seeds = check_seeds(seed, self.num_envs, 2**63)
        mask = check_mask(options, self.num_envs, self._started)
        levels = check_level(options, self.num_envs, SEED_LIMIT)
        if np.isscalar(seed) or isinstance(seed, np.ndarray) and seed.ndim == 0:
            super().reset(seed=seeds[0])
        for i in np.flatnonzero(mask):
            if levels is not None:
                self._set(i, self._fresh_state(int(levels[i]) % SEED_LIMIT, level=int(levels[i])))
            elif seeds[i] is not None:
                self._set(i, self._fresh_state(int(seeds[i]) % SEED_LIMIT))
            elif not self._started or self._pinned[i]:
                self._set(i, self._fresh_state(int(self.np_random.integers(SEED_LIMIT))))
            elif not self._advanced[i]:
                self._set(i, self._forced_reset(self._get(i)))
            self._steps[i], self._finished[i], self._advanced[i] = 0, False, False
            self._pinned[i] = levels is not None
        self._started = True
        frames = self._observed(self._envs.observe()[1])
        self._frames = np.where(mask[:, None, None, None], frames, self._frames)
        self._levels = np.where(mask, self._current_levels(), self._levels)
        return self._frames.copy(), self._infos()

    def step(self, actions: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Advance every environment by one action.

        Raises:
            InvalidActionError: see `dreamenv.contract.actions.check_actions`; the state is unchanged.
            ResetError: before the first reset, or (DISABLED mode) an environment is finished and not yet reset.
        """
        actions = self._check_step(actions)
        resetting = self._finished.copy()  # NEXT_STEP: this call is their reset, the action is ignored
        rewards, frames, done = self._play(actions, resetting)
        self._steps = np.where(resetting, 0, self._steps + 1)
        truncated = done & (self._steps >= self.game.max_steps)
        if truncated.any():  # Procgen merges the two; a level completed on its very last step is a termination
            info = self._envs.get_info()
            truncated &= ~np.array([bool(x["prev_level_complete"]) for x in info])
        limit = self.max_episode_steps
        cut = np.zeros(self.num_envs, bool) if limit is None else ~done & ~resetting & (self._steps >= limit)
        terminated, over = done & ~truncated, done | cut
        if self.autoreset_mode is AutoresetMode.SAME_STEP:
            infos = self._autoreset_now(frames, over, cut)
        else:
            self._frames = np.where(done[:, None, None, None], self._frames, frames)
            self._finished, self._advanced = over, done
            if resetting.any():
                self._levels = np.where(resetting, self._current_levels(), self._levels)
            infos = self._infos()
        return self._frames.copy(), rewards, terminated, truncated | cut, infos

    def _play(self, actions: np.ndarray, resetting: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Act where the game goes on and begin the next level where it does not.

        Returns:
            Rewards float64 (N,), frames uint8 (N, *frame_shape), and bool (N,): whether an episode ended.
        """
        begun = {}
        for i in np.flatnonzero(resetting):  # gym3 acts in all games or in none
            state = self._get(i)
            begun[i] = state if self._advanced[i] else self._forced_reset(state)
        self._envs.act(np.where(resetting, NOOP, actions))
        rewards, observation, first = self._envs.observe()
        done = np.asarray(first, bool) & ~resetting
        for i, state in begun.items():
            self._set(i, state)
        frames = self._observed(self._envs.observe()[1] if begun else observation)
        return np.where(resetting, 0.0, rewards.astype(np.float64)), frames, done

    def _autoreset_now(self, frames: np.ndarray, over: np.ndarray, cut: np.ndarray) -> dict[str, Any]:
        """Begin the next level where an episode is `over`; the game has not done so itself where it was `cut` short."""
        final = np.full(self.num_envs, None, dtype=object)
        for i in np.flatnonzero(cut):
            final[i] = frames[i].copy()
            self._set(i, self._forced_reset(self._get(i)))
        self._frames = self._observed(self._envs.observe()[1]) if cut.any() else frames
        steps = self._steps.copy()
        self._steps[over] = 0
        if over.any():
            self._levels = self._current_levels()
        infos = self._infos()
        if over.any():
            infos |= {"final_info": {"episode_step": steps, "_episode_step": over}, "_final_info": over}
        return infos | ({"final_obs": final, "_final_obs": cut} if cut.any() else {})

    def _observed(self, observation: dict[str, np.ndarray]) -> np.ndarray:
        """The games' pictures uint8 (N, *frame_shape)."""
        return observe(observation["rgb"], self._frame)

    @property
    def backend(self) -> str:
        """Which Procgen this is, for what is recorded of it."""
        return f"procgen {procgen_version()}"

    def camera(self) -> np.ndarray:
        """Return where the pictures' top left corners lie, in tiles, float32 (N, 2): x to the right, y downwards.

        Read from the drawing state that the game saves. Tiles begin at whole numbers, so the fraction says how far the
        picture cuts into the tile at its corner. A (N, 2) of nan for games in which nothing scrolls. A finished
        environment's state may stand at the next level already, and so does its camera.
        """
        self._check_open("camera")
        view, mode = self.game.view, self._options["distribution_mode"]
        if not view.camera(mode):
            return np.full((self.num_envs, 2), np.nan, np.float32)
        out = np.empty((self.num_envs, 2), np.float32)

        def read(k: int) -> None:
            for i in range(k, self.num_envs, len(self._buffers)):
                out[i] = camera_of(self._saved(i, self._buffers[k]), view, mode)

        if self._readers is None:
            self._readers = ThreadPoolExecutor(len(self._buffers))  # saving does not hold Python's lock
        list(self._readers.map(read, range(len(self._buffers))))
        return out

    def reseed(self, seed: int) -> None:
        """Give the games other random numbers from here on: only what chance is yet to decide becomes different.

        Args:
            seed: decides the numbers, others for each environment; in 0..2^63-1.

        Raises:
            ConfigError: another seed.
            ResetError: before the first reset.
            SnapshotError: another build of Procgen, whose random generator is not found in what it saves.
        """
        self._check_started("reseed")
        for i in range(self.num_envs):
            self._set(i, reseeded(self._get(i), (whole(seed, "seed", 0, 2**63 - 1), i)))

    def snapshot(self) -> bytes:
        """Return the whole batch's state as bytes that `restore` accepts, in another process too.

        Raises:
            ResetError: before the first reset.
        """
        self._check_started("snapshot")
        states = [np.frombuffer(self._get(i), np.uint8) for i in range(self.num_envs)]
        arrays = {f"state.{i}": s for i, s in enumerate(states)}
        arrays |= self._counter_arrays()
        return pack("real", {"num_envs": self.num_envs, "options": self._options}, arrays)

    def restore(self, data: bytes, trust: bool = False) -> np.ndarray:
        """Return to a snapshot and its observations, uint8 (N, *frame_shape).

        Args:
            data: what `snapshot` returned.
            trust: take a snapshot that this user's programs did not sign. Procgen takes over whatever is in it, so a
                forged one can end the process.

        Raises:
            SnapshotError: damaged bytes, not signed, or of another game, levels, difficulty or batch size; the state is
                unchanged.
        """
        self._check_open("restore")
        meta, arrays = unpack("real", data, trust)
        if meta.get("options") != self._options or meta.get("num_envs") != self.num_envs:
            raise SnapshotError(
                f"snapshot of {meta.get('num_envs')} x {meta.get('options')} cannot be restored into "
                f"{self.num_envs} x {self._options}; make the same environment"
            )
        if "advanced" not in arrays and "finished" in arrays:  # version 3 and before
            arrays["advanced"] = arrays["finished"]
        names = [f"state.{i}" for i in range(self.num_envs)]
        sizes = {n: arrays[n].shape if n in arrays and arrays[n].size <= _STATE_BYTES else () for n in names}
        expected = {n: (sizes[n] if len(sizes[n]) == 1 else (1,), "uint8") for n in names}
        check_arrays(arrays, expected | {n: (v.shape, str(v.dtype)) for n, v in self._counter_arrays().items()})
        for i, name in enumerate(names):
            self._set(i, arrays[name].tobytes())
        self._take_counters(arrays)
        self._started = True
        return self._frames.copy()

    def render(self) -> tuple[np.ndarray, ...] | None:
        """Return one uint8 (S, S, 3) frame per environment, S = `render_size`, or None without a render mode."""
        if self.render_mode is None or self.render_size == 64:
            return super().render()
        self._check_open("render")
        if self._large is None:
            self._large = make_procgen(num=1, rand_seed=0, render_mode="rgb_array", num_threads=0, **self._options)
        frames = []
        for i in range(self.num_envs):
            state = self._get(i)
            self._large.call_c_func("set_state", 0, state, len(state))
            frames.append(self._large.get_info()[0]["rgb"].copy())
        return tuple(frames)

    def close_extras(self, **kwargs: Any) -> None:
        """Release the games."""
        for env in (self._envs, self._helper, self._large):
            if env is not None:
                env.close()
        if self._readers is not None:
            self._readers.shutdown()

    def _infos(self) -> dict[str, Any]:
        return self._batched({"level_seed": self._levels.copy(), "episode_step": self._steps.copy()})

    def _current_levels(self) -> np.ndarray:
        return np.array([x["level_seed"] for x in self._envs.get_info()], np.int64)

    def _get(self, i: int) -> bytes:
        return bytes(self._saved(i, self._buffers[0]))

    def _saved(self, i: int, buffer: Any) -> Any:
        length = self._envs.call_c_func("get_state", int(i), buffer, _STATE_BYTES)
        return self._envs._ffi.buffer(buffer, length)

    def _set(self, i: int, state: bytes) -> None:
        self._envs.call_c_func("set_state", int(i), state, len(state))

    def _fresh_state(self, rand_seed: int, level: int | None = None) -> bytes:
        """Return the state of a new game; the levels that follow it are decided by `rand_seed` (it holds the RNG)."""
        one = {} if level is None else {"start_level": level, "num_levels": 1}
        return fresh_state(rand_seed, **self._options | one)

    def _forced_reset(self, state: bytes) -> bytes:
        if self._helper is None:
            self._helper = make_procgen(num=1, rand_seed=0, num_threads=0, **self._options)
        self._helper.set_state([state])
        self._helper.act(np.array([-1]))
        return self._helper.get_state()[0]


_STATE_BYTES = 2**20  # more than any game's state


class RealProcgenEnv(SingleView):
    """One real Procgen game: the N = 1 view of `RealProcgenVectorEnv` (same arguments, no autoreset).

    `reset` has the option `level`, the level seed to play.

    Example:
        >>> import gymnasium as gym
        >>> env = gym.make("envs:RealProcgen-v0", game="coinrun", start_level=0, num_levels=200)
        >>> observation, info = env.reset(seed=0)
    """

    def __init__(self, game: str = "coinrun", **kwargs: Any) -> None:
        super().__init__(RealProcgenVectorEnv(1, game, autoreset_mode=AutoresetMode.DISABLED, **kwargs))

    def _batch_options(self, options: Any) -> dict[str, Any]:
        return check_options(options, ("level",))
