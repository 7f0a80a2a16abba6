"""Playing without the window: both worlds in step, whoever is at the controls, time in both directions."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np

from dreamenv.bundle import Bundle
from dreamenv.config import check
from dreamenv.contract.actions import NOOP
from dreamenv.contract.frames import NATIVE
from dreamenv.contract.noise import philox
from dreamenv.env import DreamEnv
from dreamenv.errors import ConfigError
from dreamenv.evaluation.metrics import squared_error
from dreamenv.flow import SamplerConfig
from dreamenv.play.moment import Moment, Past, mean_psnr
from dreamenv.play.recording import EpisodeRecorder
from dreamenv.play.timeline import Timeline
from dreamenv.policies.simple import AgentPolicy, StickyPolicy, VectorPolicy

MODES = ("both", "dream", "real")
Mode = Literal["both", "dream", "real"]


class Session(Timeline):
    """One person's play: the dream and the real game from one start under one sequence of actions.

    Both worlds are always stepped, so that switching between them costs nothing and the dream can be measured at any
    time; `mode` says only which are shown. The real game is optional: `load_real` may be called later, from another
    thread. Every other method belongs to one thread.

    Args:
        bundle: the dream's.
        sampler: how it is drawn.
        mode: "both", "dream" or "real".
        agent: a saved agent's folder; None leaves a person and the random policy.
        levels: first level and number of levels of the real game.
        seed: decides levels, noise and the random policy.
        memory: steps that can be taken back; a step takes about 0.13 MB, and more of dynamics whose state is large.

    Raises:
        ConfigError: an argument outside its range.
        PolicyError: the agent cannot be loaded.
    """

    def __init__(
        self,
        bundle: Bundle,
        sampler: SamplerConfig | None = None,
        mode: Mode = "both",
        agent: str | None = None,
        levels: tuple[int, int] = (0, 10000),
        seed: int = 0,
        memory: int = 600,
    ) -> None:
        check(mode in MODES, f"mode {mode!r}: must be one of {', '.join(MODES)}")
        check(memory >= 1, f"memory {memory}: must be >= 1")
        self.bundle, self.mode, self.levels, self.seed = bundle, mode, levels, seed
        self._frame_shape = bundle.world_model.frame_shape
        self.players: dict[str, VectorPolicy | None] = {"human": None}
        if agent is not None:
            self.players["agent"] = AgentPolicy(agent)
        self.players["random"] = StickyPolicy(0.75)
        self.player = "human"
        self.following = False
        self.recorder: EpisodeRecorder | None = None
        self.dream = DreamEnv(bundle=bundle, sampler=sampler)
        self.real: Any = None
        self.real_problem = ""
        self._waiting: Any = None  # a real game that another thread has loaded, not yet in step
        self._lock = threading.Lock()
        self._closed = False
        self._rng = philox((seed, 0x91A7))
        self._past: deque[Past] = deque(maxlen=memory)
        self.moment = self.new_start()

    # -- the real game -------------------------------------------------------------------------------------------------

    def load_real(self, game: str | None = None) -> None:
        """Load the real game; may run in another thread, the next call of any method takes it in.

        Args:
            game: a Procgen game, by default the bundle's; another one is played alone, with no dream.

        Where it cannot be loaded `real_problem` says why, and the session goes on without it.
        """
        facts = self.bundle.game
        mode = facts.distribution_mode if game in (None, facts.name) else "easy"
        wanted, frame = game or facts.name, self._frame_shape
        options: dict[str, Any] = {"game": wanted, "distribution_mode": mode, "frame_shape": frame}
        options |= {"start_level": self.levels[0], "num_levels": self.levels[1]}
        try:
            env = gym.make("envs:RealProcgen-v0", disable_env_checker=True, **options)
        except (ImportError, OSError, RuntimeError, gym.error.Error, ConfigError) as error:
            self.real_problem = f"no real game: {error}"
            return
        with self._lock:
            stale, self._waiting = (env, None) if self._closed else (self._waiting, env.unwrapped)
        if stale is not None:
            stale.close()

    @property
    def paired(self) -> bool:
        """Whether the real game is the one dreamt of."""
        return self.real is not None and self.real.vector.game.name == self.bundle.game.name

    @property
    def noisy(self) -> bool:
        """Whether noise reaches the dream."""
        return self.sampler.stochastic(self.bundle.world_model.dynamics)

    @property
    def action_meanings(self) -> tuple[str, ...]:
        """What each of the 15 actions does in the game on show."""
        return self.bundle.game.action_meanings if self.real is None else self.real.vector.game.meanings

    @property
    def game(self) -> str:
        """Name of the game on show."""
        return self.bundle.game.name if self.real is None else self.real.vector.game.name

    def _swap(self) -> bool:
        """Take a freshly loaded real game in the place of the old; returns whether there was one."""
        with self._lock:
            env, self._waiting = self._waiting, None
        if env is None:
            return False
        if self.recorder is not None and env.vector.game.name != self.game:  # a dataset is of one game
            self.stop_recording()
        if self.real is not None:
            self.real.close()
        self.real = env
        return True

    def look(self) -> Moment:
        """The present moment, with a real game that has been loaded meanwhile."""
        self._take_real_in()
        return self.moment

    def _take_real_in(self) -> None:
        """Bring a freshly loaded real game to where the dream is: its level, and the same actions since."""
        alone = self.real is not None and not self.paired
        if not self._swap():
            return
        real: Any = self.real
        same = not alone and self.paired and self.levels[0] <= self._level < sum(self.levels)
        frame = real.reset(options={"level": self._level})[0] if same else None
        if frame is None or not np.array_equal(frame, self.bundle.starts.frames[self._start, -1]):
            self.new_start()  # the dream began later in its level, or in one that was not asked for
            return
        frames, total, ended = [frame], 0.0, ""
        for action in self._taken:
            if ended:
                break
            frame, reward, terminated, truncated, _ = real.step(action)
            total += float(reward)
            ended = _end(terminated, truncated)
            if not ended:
                frames.append(frame)
        k = self.bundle.world_model.context
        self._frames = deque(frames[-k:], maxlen=k)
        self._actions = deque(self._taken[: len(frames) - 1][-(k - 1) :], maxlen=k - 1)
        self._past.clear()
        self._errors = (0.0, 0)
        m = self.moment
        self.moment = replace(m, real=frame, rewards=m.rewards | {"real": total}, ended=m.ended | {"real": ended})

    # -- moving on -----------------------------------------------------------------------------------------------------

    def new_start(self, level: int | None = None) -> Moment:
        """Begin anew: both worlds at the first frame of a level, a random one unless given (it needs the real game)."""
        self._swap()
        starts = self.bundle.starts
        if self.real is not None:
            self._level = int(self._rng.integers(self.levels[0], sum(self.levels))) if level is None else level
            real, _ = self.real.reset(options={"level": self._level})
            options: dict[str, Any] = {"frames": real[None]} if self.paired else {}
        else:
            check(level is None, f"level {level}: needs the real game, which is not loaded")
            self._start = int(self._rng.integers(len(starts.frames)))
            self._level, real, options = int(starts.level_seeds[self._start]), None, {"start": self._start}
        dream, _ = self.dream.reset(seed=int(self._rng.integers(2**63)), options=options)
        k = self.bundle.world_model.context
        self._frames: deque[np.ndarray] = deque([] if real is None else [real], maxlen=k)
        self._actions: deque[int] = deque(maxlen=k - 1)
        self._taken: list[int] = []
        self._errors = (0.0, 0)
        self._past.clear()
        if self.recorder is not None:
            self.recorder.cut()
        self.moment = Moment(dream, real)
        return self.moment

    @property
    def shown(self) -> tuple[str, ...]:
        """The worlds on show."""
        if self.real is None:
            return ("dream",)
        return ("real",) if not self.paired else ("real", "dream") if self.mode == "both" else (self.mode,)

    @property
    def over(self) -> bool:
        """Whether every world on show has ended."""
        return all(self.moment.ended[world] for world in self.shown)

    def step(self, action: int = NOOP) -> Moment:
        """One step of both worlds under `action`, or under what the player chooses if that is no person.

        A world that has ended stays as it is. Once every world on show has, the next step is a new start.
        """
        self._take_real_in()
        if self.over:
            return self.new_start()
        m = self.moment
        policy = self.players[self.player]
        if policy is not None:
            world = next((w for w in self.shown if not m.ended[w]), self.shown[0])
            seen = m.real if world == "real" else m.dream
            action = int(policy.act(np.asarray(seen)[None], np.array([m.step == 0]), self._rng)[0])
        self._past.append(self._now())
        before = m.dream
        if self.following:
            before = self._synchronise()
            m = self.moment
            if self.recorder is not None and self.recorder.world == "dream":
                self.recorder.cut()
        rewards, ended, earned = dict(m.rewards), dict(m.ended), {"dream": 0.0, "real": 0.0}
        dream, real, outlook = m.dream, m.real, (m.reward_probability, m.end_probability, m.uncertainty)
        if not ended["dream"] and (self.real is None or self.paired):
            dream, earned["dream"], terminated, truncated, info = self.dream.step(action)
            ended["dream"] = "diverged" if info["diverged"] else _end(terminated, truncated)
            outlook = info["reward_probability"], info["end_probability"], min(info["uncertainty"], 99.0)
        if self.real is not None and not ended["real"]:
            real, earned["real"], terminated, truncated, _ = self.real.step(action)
            ended["real"] = _end(terminated, truncated)
            if not ended["real"]:  # Procgen shows no last frame
                self._frames.append(real)
                self._actions.append(action)
                if self.paired and not ended["dream"]:
                    total, count = self._errors
                    self._errors = total + float(squared_error(dream, real).mean()), count + 1
        for world in rewards:
            rewards[world] += earned[world]
        if self.recorder is not None and not m.ended[world := self.recorder.world]:
            self.recorder.add(m.real if world == "real" else before, action, earned[world], ended[world], self._level)
        self._taken.append(action)
        self.moment = Moment(dream, real, action, m.step + 1, rewards, ended, *outlook, mean_psnr(self._errors))
        return self.moment

    def synchronise(self) -> Moment:
        """Let the dream go on from the real game's last frames; its error is counted anew.

        Raises:
            ConfigError: there is no real game, or it has ended.
        """
        self._take_real_in()
        check(self.paired, "synchronise: " + (self.real_problem or "there is no real game of the dream's kind yet"))
        check(not self.moment.ended["real"], "synchronise: the real game is over; start anew")
        dream = self._synchronise()
        if self.recorder is not None and self.recorder.world == "dream":
            self.recorder.cut()
        self._errors = (0.0, 0)
        self.moment = replace(self.moment, dream=dream, psnr=None)
        return self.moment

    def follow(self, following: bool) -> None:
        """Let the dream go on from the real frames at every step, or drift; its error is counted anew."""
        self.following, self._errors = following, (0.0, 0)

    def _synchronise(self) -> np.ndarray:
        """Put the dream's state on the real game's last frames; returns how it draws the last of them."""
        if not self.paired or self.moment.ended["real"]:
            return self.moment.dream
        history = {"frames": np.stack(self._frames), "actions": np.array(self._actions, np.int64)}
        dream, _ = self.dream.reset(options=history)
        self.moment = replace(self.moment, ended=self.moment.ended | {"dream": ""})
        return dream

    # -- recording -----------------------------------------------------------------------------------------------------

    def record(self, folder: Path) -> None:
        """Record the first world on show, step by step, until `stop_recording`."""
        self._take_real_in()
        world, facts = self.shown[0], self.bundle.game
        shape = self._frame_shape
        check(shape == NATIVE, f"frames {shape}: a dataset holds {NATIVE} frames, so these cannot be recorded")
        own = world == "dream" or self.paired
        self.recorder = EpisodeRecorder(
            folder,
            world,
            {
                "game": self.game,
                "distribution_mode": facts.distribution_mode if own else "easy",
                "max_steps": facts.max_steps if own else self.real.vector.game.max_steps,
                "action_meanings": list(self.action_meanings),
                "backend": f"bundle {self.bundle.identity[:12]}" if world == "dream" else self.real.vector.backend,
            },
            self.levels,
        )

    def stop_recording(self) -> Path | None:
        """Write what was recorded as a dataset folder and return it; None if there was nothing."""
        path = None if self.recorder is None else self.recorder.save()
        self.recorder = None
        return path

    # -- controls ------------------------------------------------------------------------------------------------------

    @property
    def sampler(self) -> SamplerConfig:
        """How the dream is drawn; may be set at any time."""
        return self.dream.vector.sampler

    @sampler.setter
    def sampler(self, sampler: SamplerConfig) -> None:
        self.dream.vector.sampler = sampler

    def next_player(self) -> str:
        """Hand the controls on: human, agent if there is one, random policy."""
        names = list(self.players)
        self.player = names[(names.index(self.player) + 1) % len(names)]
        return self.player

    def next_mode(self) -> str:
        """Show the next of: both worlds, the dream, the real game."""
        self._take_real_in()
        if self.paired:
            self.mode = MODES[(MODES.index(self.mode) + 1) % len(MODES)]  # pyright: ignore[reportAttributeAccessIssue]
        return self.mode

    def close(self) -> None:
        """Release both worlds; a recording that was not stopped is lost."""
        with self._lock:
            self._closed, waiting = True, self._waiting
            self._waiting = None
        self.dream.close()
        for env in (self.real, waiting):
            if env is not None:
                env.close()


def _end(terminated: bool, truncated: bool) -> str:
    return "the end" if terminated else "time is up" if truncated else ""
