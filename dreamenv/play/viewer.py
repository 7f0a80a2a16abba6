"""`dreamenv view`: look through the episodes of a dataset, real or imagined."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dreamenv.config import check
from dreamenv.contract.actions import NAMES
from dreamenv.data import Dataset
from dreamenv.errors import ConfigError
from dreamenv.play.recording import FilmRecorder
from dreamenv.play.screen import ACCENT, BACK, BRIGHT, FAINT, TEXT, Lines

HINT = "left right: step   up down: episode   SPACE play   HOME END   ESC quit"


@dataclass(frozen=True)
class Episode:
    """Where one episode, or the part of it that a segment holds, lies in a dataset."""

    shard: int
    start: int
    end: int


def episodes(dataset: Dataset) -> list[Episode]:
    """All episodes, in the order in which they are stored."""
    found = []
    for k, shard in enumerate(dataset.shards):
        starts = np.flatnonzero(shard.first)
        found += [Episode(k, int(a), int(b)) for a, b in zip(starts, [*starts[1:], len(shard)], strict=True)]
    return found


class Viewer:
    """What the viewer shows, and how keys move it. Draws onto any pygame surface.

    Args:
        dataset: what to look through.
        episode: where to begin.

    Raises:
        ConfigError: no such episode.
    """

    def __init__(self, dataset: Dataset, episode: int = 0) -> None:
        self.dataset, self.episodes = dataset, episodes(dataset)
        check(0 <= episode < len(self.episodes), f"episode {episode}: must be in 0..{len(self.episodes) - 1}")
        self.episode, self.step, self.playing = episode, 0, False
        self.lines = Lines()

    def __len__(self) -> int:
        """Steps of the episode."""
        return self.episodes[self.episode].end - self.episodes[self.episode].start

    def go(self, episode: int) -> None:
        """Go to the start of an episode, the nearest that exists."""
        self.episode, self.step = min(max(episode, 0), len(self.episodes) - 1), 0

    def seek(self, step: int) -> None:
        """Go to a step of this episode, the nearest that exists."""
        self.step = min(max(step, 0), len(self) - 1)

    def facts(self) -> list[tuple[str, str]]:
        """What is known of this step."""
        here = self.episodes[self.episode]
        shard, t = self.dataset.shards[here.shard], here.start + self.step
        mix = self.dataset.facts.get("policy_mix") or [["?", 1.0]]
        kind = int(shard.policies[t])
        end = "terminated" if shard.terminated[t] else "truncated" if shard.truncated[t] else "goes on"
        return [
            (f"{shard.game}, {self.dataset.facts.get('world', 'real')}", ""),
            ("episode", f"{self.episode + 1} of {len(self.episodes)}"),
            ("step", f"{self.step + 1} of {len(self)}"),
            ("level", str(int(shard.level_seeds[t]))),
            ("policy", str(mix[kind][0]) if kind < len(mix) else str(kind)),
            ("action", NAMES[int(shard.actions[t])]),
            ("reward", f"{float(shard.rewards[t]):g}"),
            ("so far", f"{float(shard.rewards[here.start : t + 1].sum()):g}"),
            ("then", end),
            ("shard", shard.name),
        ]

    @staticmethod
    def size(scale: int) -> tuple[int, int]:
        """Window size."""
        unit = max(scale / 8, 0.34)
        return 64 * scale + round(236 * unit), 64 * scale + round(64 * unit)

    def draw(self, surface: Any) -> None:
        """Draw the frame, what is known of it, and the bar to scrub."""
        import pygame

        width, height = surface.get_size()
        whole = self.size(8)
        unit = self.lines.unit = max(min(width / whole[0], height / whole[1]), 0.1)
        self.lines.texts.clear()
        surface.fill(BACK)
        gap, side = round(8 * unit), round(212 * unit)
        scale = max(min(width - side - 3 * gap, height - round(64 * unit)) // 64, 1)
        here = self.episodes[self.episode]
        frame = self.dataset.shards[here.shard].frames[here.start + self.step]
        picture = pygame.surfarray.make_surface(np.ascontiguousarray(np.asarray(frame).swapaxes(0, 1)))
        surface.blit(pygame.transform.scale(picture, (64 * scale, 64 * scale)), (gap, gap))
        row = round(24 * unit)
        for i, (name, value) in enumerate(self.facts()):
            line = pygame.Rect(width - side - gap, gap + i * row, side, row)
            cut = round(line.width * (0.4 if value else 1))
            self.lines.draw(surface, name, pygame.Rect(line.x, line.y, cut, row), 15, FAINT if i else BRIGHT)
            self.lines.draw(
                surface, value, pygame.Rect(line.x + cut, line.y, line.width - cut, row), 15, TEXT, right=True
            )
        bar = self.bar(surface.get_size())
        pygame.draw.rect(surface, (60, 60, 70), bar)
        done = pygame.Rect(bar.x, bar.y, round(bar.width * (self.step + 1) / len(self)), bar.height)
        pygame.draw.rect(surface, ACCENT, done)
        foot = pygame.Rect(gap, height - round(24 * unit), width - 2 * gap, round(20 * unit))
        self.lines.draw(surface, HINT, foot, 13, FAINT)

    def bar(self, size: tuple[int, int]) -> Any:
        """Rectangle of the scrub bar in a window of `size`."""
        import pygame

        unit = self.lines.unit
        return pygame.Rect(round(8 * unit), size[1] - round(42 * unit), size[0] - round(16 * unit), round(12 * unit))

    def handle(self, event: Any, size: tuple[int, int]) -> bool:
        """React to one event; False ends the viewer."""
        import pygame

        if event.type == pygame.QUIT:
            return False
        if event.type == pygame.KEYDOWN:
            if event.key == pygame.K_ESCAPE:
                return False
            moves = {
                pygame.K_LEFT: -1,
                pygame.K_RIGHT: 1,
                pygame.K_PAGEUP: -10,
                pygame.K_PAGEDOWN: 10,
                pygame.K_HOME: -len(self),
                pygame.K_END: len(self),
            }
            if event.key in moves:
                self.seek(self.step + moves[event.key])
            elif event.key in (pygame.K_UP, pygame.K_DOWN):
                self.go(self.episode + (1 if event.key == pygame.K_DOWN else -1))
            elif event.key == pygame.K_SPACE:
                self.playing = not self.playing
        elif event.type in (pygame.MOUSEBUTTONDOWN, pygame.MOUSEMOTION):
            held = event.button == 1 if event.type == pygame.MOUSEBUTTONDOWN else event.buttons[0]
            bar = self.bar(size)
            if held and bar.inflate(0, bar.height).collidepoint(event.pos):
                self.seek(int((event.pos[0] - bar.x) / bar.width * len(self)))
        return True

    def advance(self) -> None:
        """One step on if it plays; at the end it stops."""
        if self.playing:
            self.seek(self.step + 1)
            self.playing = self.step < len(self) - 1


def run(
    data: Path, episode: int = 0, scale: int = 8, fps: float = 15.0, headless: Path | None = None
) -> dict[str, Any]:
    """Open the viewer, or film one episode.

    Returns:
        How many episodes there are, and where it was left.

    Raises:
        ConfigError: no display, or an argument outside its range.
        DatasetError: no sound dataset there.
    """
    check(1 <= scale <= 32, f"scale {scale}: must be in 1..32")
    check(0 < fps <= 1000, f"fps {fps}: must be in 0..1000")
    viewer = Viewer(Dataset(data), episode)
    os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")
    import pygame

    if headless is not None:
        surface, recorder = pygame.Surface(Viewer.size(scale)), FilmRecorder(headless, fps)
        try:
            for step in range(len(viewer)):
                viewer.seek(step)
                viewer.draw(surface)
                recorder.add(pygame.surfarray.array3d(surface).swapaxes(0, 1))
        finally:
            recorder.close()
        return {
            "episodes": len(viewer.episodes),
            "episode": viewer.episode,
            "steps": len(viewer),
            "film": str(headless),
        }
    try:
        pygame.display.init()
        surface = pygame.display.set_mode(Viewer.size(scale), pygame.RESIZABLE)
    except pygame.error as error:
        raise ConfigError(f"display: none to open a window on ({error}); give --headless film.mp4") from None
    pygame.display.set_caption(f"dreamenv: {data}")
    pygame.key.set_repeat(300, 40)
    clock = pygame.time.Clock()
    try:
        while all([viewer.handle(event, surface.get_size()) for event in pygame.event.get()]):
            surface = pygame.display.get_surface() or surface
            viewer.advance()
            viewer.draw(surface)
            pygame.display.flip()
            clock.tick(fps)
    finally:
        pygame.quit()
    return {"episodes": len(viewer.episodes), "episode": viewer.episode, "step": viewer.step}
