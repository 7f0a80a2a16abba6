"""What the window shows: views, panel, overlays. Draws onto a pygame surface; knows nothing of events or threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dreamenv.contract.actions import NAMES
from dreamenv.contract.frames import as_rgb
from dreamenv.flow import SamplerConfig
from dreamenv.play.moment import Moment
from dreamenv.play.timeline import futures_grid

BACK, PANEL, FAINT, TEXT, BRIGHT = (18, 18, 22), (30, 30, 38), (120, 120, 132), (190, 190, 200), (240, 240, 245)
ACCENT, WARN = (120, 190, 255), (255, 180, 90)
KEYS = (
    ("arrows", "move; two at once are a diagonal"),
    ("D A W S Q E", "the game's other actions"),
    ("TAB", "both worlds / dream / real"),
    ("R", "dream on from the real frames"),
    ("F", "follow the real game / drift"),
    ("N", "new start"),
    ("P", "pause"),
    ("O", "one step, then pause"),
    ("BACKSPACE", "rewind, hold for more"),
    ("F5  F9", "save / load this moment"),
    ("B", "nine imagined futures"),
    ("G", "controls: you / agent / random"),
    ("[  ]", "fewer / more evaluations"),
    (",  .", "noise: less / more"),
    ("9  0", "guidance: less / more"),
    ("-  =", "slower / faster"),
    ("V", "film the window; shift: as GIF"),
    ("X", "record the episode as data"),
    ("M", "games and bundles"),
    ("H", "this help"),
    ("F11", "full screen"),
    ("ESC", "close, or quit"),
)
"""The window's keys, and what they do."""


@dataclass
class View:
    """Everything that is drawn."""

    moment: Moment
    shown: tuple[str, ...]
    game: str
    bundle: str
    player: str = "human"
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    meanings: Sequence[str] = ()
    target_fps: float = 15.0
    fps: float = 0.0
    latency: float | None = None
    slow: bool = False
    paused: bool = False
    following: bool = False
    rewind: float = 0.0
    filming: int | None = None
    recording: int | None = None
    message: str = ""
    uncertainty: Sequence[float] = ()
    overlay: str = ""
    futures: np.ndarray | None = None
    tick: int = 0
    chosen: int = 4
    menu: Sequence[tuple[str, str]] = ()
    selected: int = 0
    noisy: bool = False


class Lines:
    """Draws lines of text that stay inside their boxes.

    Attributes:
        unit: how large everything is drawn; 1 is the design.
        texts: since the last clearing, each text with its rectangle and that of its box.
    """

    def __init__(self) -> None:
        import pygame

        self._pygame = pygame
        pygame.font.init()
        self.unit = 1.0
        self._fonts: dict[int, Any] = {}
        self.texts: list[tuple[str, Any, Any]] = []

    def draw(self, surface: Any, text: str, box: Any, size: int, colour: Any, right: bool = False) -> None:
        """Draw one line inside `box`, in a smaller font if it would not fit."""
        if not text:
            return
        points = max(round(size * self.unit * 1.15), 3)
        while points > 3 and (
            self._font(points).size(text)[0] > box.width or self._font(points).get_height() > box.height
        ):
            points -= 1
        picture = self._font(points).render(text, True, colour)
        place = picture.get_rect(centery=box.centery)
        place.x = box.right - place.width if right else box.x
        surface.blit(picture, place)
        self.texts.append((text, place, box))

    def _font(self, points: int) -> Any:
        if not self._pygame.font.get_init():  # a window was closed since
            self._pygame.font.init()
            self._fonts.clear()
        if points not in self._fonts:
            self._fonts[points] = self._pygame.font.Font(None, points)
        return self._fonts[points]


class Screen:
    """Draws a `View`, everything in proportion to the window; pixels of the game are enlarged by whole numbers."""

    GAP, HEADER, FOOTER, SIDE = 8, 24, 24, 236

    def __init__(self) -> None:
        import pygame

        self._pygame = pygame
        self.lines = Lines()

    @classmethod
    def size(cls, scale: int, views: int) -> tuple[int, int]:
        """Window size in which `views` pictures are enlarged `scale` times."""
        unit = max(scale / 6, 0.34)
        width = views * 64 * scale + round(((views + 2) * cls.GAP + cls.SIDE) * unit)
        return width, max(64 * scale, round(396 * unit)) + round((2 * cls.GAP + cls.HEADER + cls.FOOTER) * unit)

    def draw(self, surface: Any, view: View) -> None:
        """Draw all of it."""
        self.lines.texts.clear()
        width, height = surface.get_size()
        n = max(len(view.shown), 1)
        whole = self.size(6, n)
        unit = max(min(width / whole[0], height / whole[1]), 0.1)
        self.lines.unit = unit
        gap, header, footer, side = (round(x * unit) for x in (self.GAP, self.HEADER, self.FOOTER, self.SIDE))
        surface.fill(BACK)
        rect = self._pygame.Rect
        room = (width - (n + 2) * gap - side) // n, height - 2 * gap - header - footer
        scale = max(min(room) // 64, 1)
        edge = 64 * scale
        left = gap + max((width - side - (n + 2) * gap - n * edge) // 2, 0)
        for i, world in enumerate(view.shown):
            box = rect(left + i * (edge + gap), gap + header, edge, edge)
            self._world(surface, view, world, box, header)
        panel = rect(width - side - gap, gap, side, height - 2 * gap - footer)
        self._panel(surface, view, panel)
        foot = rect(gap, height - footer - gap // 2, width - 2 * gap, footer)
        over = [world for world in view.shown if view.moment.ended[world]]
        usual = "H help   TAB worlds   N new start   B futures   ESC quit"
        hint = f"the {over[0]} game is over: N starts anew" if over else usual
        self.lines.draw(surface, view.message or hint, foot, 13, WARN if view.message or over else FAINT)
        if view.overlay:
            shade = self._pygame.Surface((width, height), self._pygame.SRCALPHA)
            shade.fill((*BACK, 250))
            surface.blit(shade, (0, 0))
            whole_window = rect(gap, gap, width - 2 * gap, height - 2 * gap)
            self.lines.texts.clear()  # what lies under the shade is not read
            getattr(self, f"_{view.overlay}")(surface, view, whole_window)

    # -- parts ---------------------------------------------------------------------------------------------------------

    def _world(self, surface: Any, view: View, world: str, box: Any, header: int) -> None:
        frame = view.moment.dream if world == "dream" else view.moment.real
        if frame is None:
            frame = np.zeros_like(view.moment.dream)
        self._picture(surface, frame, box)
        end = view.moment.ended[world]
        name = f"{world}: {end}" if end else "dream, following" if world == "dream" and view.following else world
        title = self._pygame.Rect(box.x, box.y - header, box.width, header)
        half = self._pygame.Rect(title.x, title.y, title.width // 2, header)
        self.lines.draw(surface, name, half, 15, WARN if end else BRIGHT)
        rest = self._pygame.Rect(half.right, title.y, title.width - half.width, header)
        self.lines.draw(surface, f"reward {view.moment.rewards[world]:g}", rest, 15, TEXT, right=True)

    def _panel(self, surface: Any, view: View, box: Any) -> None:
        self._pygame.draw.rect(surface, PANEL, box, border_radius=max(round(4 * self.lines.unit), 1))
        m, s, unit = view.moment, view.sampler, self.lines.unit
        rows: list[tuple[str, str, tuple[int, int, int]]] = [
            (view.game, view.bundle, BRIGHT),
            ("controls", {"human": "you"}.get(view.player, view.player), TEXT),
            ("action", NAMES[m.action], TEXT),
            ("step", f"{m.step}", TEXT),
            ("frames/s", f"{view.fps:.1f} of {view.target_fps:g}", WARN if view.slow else TEXT),
            ("key to picture", "-" if view.latency is None else f"{1000 * view.latency:.0f} ms", TEXT),
            ("chance of reward", f"{100 * m.reward_probability:.1f} %", TEXT),
            ("chance of the end", f"{100 * m.end_probability:.1f} %", TEXT),
            ("against the real game", "-" if m.psnr is None else f"{m.psnr:.1f} dB", TEXT),
            ("evaluations (NFE)", f"{s.nfe}", TEXT),
            ("noise", f"{s.temperature:.1f}" + ("" if view.noisy else " (unused)"), TEXT),
            ("guidance", f"{s.guidance_scale:.1f}", TEXT),
            ("can rewind", f"{view.rewind:.0f} s", TEXT),
        ]
        state = ["paused"] if view.paused else ["too slow: press [ or -"] if view.slow else []
        if view.filming is not None:
            state.append(f"filming {view.filming}")
        if view.recording is not None:
            state.append(f"recording {view.recording}")
        pad, row = round(8 * unit), round(19.5 * unit)
        inner = box.inflate(-2 * pad, -2 * pad)
        for i, (name, value, colour) in enumerate(rows):
            line = self._pygame.Rect(inner.x, inner.y + i * row, inner.width, row)
            share = round(line.width * 0.62)
            self.lines.draw(surface, name, self._pygame.Rect(line.x, line.y, share, row), 14, FAINT if i else BRIGHT)
            rest = self._pygame.Rect(line.x + share, line.y, line.width - share, row)
            self.lines.draw(surface, value, rest, 14, colour, right=True)
        at = inner.y + len(rows) * row
        half = self._pygame.Rect(inner.x, at, inner.width // 2, row)
        rest = self._pygame.Rect(half.right, at, inner.width - half.width, row)
        self.lines.draw(surface, "uncertainty", half, 14, FAINT)
        self.lines.draw(surface, f"{m.uncertainty:.2f}", rest, 14, TEXT, right=True)
        plot = self._pygame.Rect(inner.x, at + row, inner.width, round(52 * unit))
        self._pygame.draw.rect(surface, BACK, plot)
        values = list(view.uncertainty)[-150:]
        if len(values) > 1:
            top = max(0.5, *values)
            across = (plot.width - 1) / 149
            points = [
                (plot.right - 1 - (len(values) - 1 - i) * across, plot.bottom - 1 - v / top * (plot.height - 2))
                for i, v in enumerate(values)
            ]
            self._pygame.draw.lines(surface, ACCENT, False, points, max(round(unit), 1))
        below = self._pygame.Rect(inner.x, plot.bottom + round(3 * unit), inner.width, row)
        self.lines.draw(surface, "   ".join(state), below, 14, WARN)

    # -- overlays ------------------------------------------------------------------------------------------------------

    def _help(self, surface: Any, view: View, box: Any) -> None:
        self._title(surface, "keys", box)
        left, right = self._columns(box)
        row = min(left.height // (len(KEYS) + 1), round(21 * self.lines.unit))
        for i, (key, what) in enumerate(KEYS):
            line = self._pygame.Rect(left.x, left.y + i * row, left.width, row)
            self._pair(surface, key, what, line, 0.27)
        doing: dict[str, list[str]] = {}
        for name, meaning in zip(NAMES, view.meanings, strict=False):
            if meaning != "nothing":
                doing.setdefault(meaning, []).append(name)
        self.lines.draw(surface, f"in {view.game}", self._pygame.Rect(right.x, right.y, right.width, row), 14, ACCENT)
        for i, (meaning, names) in enumerate(doing.items()):
            line = self._pygame.Rect(right.x, right.y + (i + 1) * row, right.width, row)
            self._pair(surface, " / ".join(names), meaning, line, 0.5)

    def _menu(self, surface: Any, view: View, box: Any) -> None:
        self._title(surface, "what to play: up and down, ENTER, ESC", box)
        body = self._body(box)
        row = round(21 * self.lines.unit)
        fit = max(body.height // row, 1)
        first = max(0, min(view.selected - fit // 2, len(view.menu) - fit))
        for i, (name, what) in enumerate(view.menu[first : first + fit]):
            line = self._pygame.Rect(body.x, body.y + i * row, body.width, row)
            if first + i == view.selected:
                self._pygame.draw.rect(surface, (50, 70, 100), line)
            self._pair(surface, name, what, line.inflate(-round(8 * self.lines.unit), 0), 0.4)

    def _branches(self, surface: Any, view: View, box: Any) -> None:
        self._title(surface, "nine imagined futures: arrows and ENTER or a click to live one, B to close", box)
        names = list(futures_grid(view.meanings).values())
        for i, cell in enumerate(self.cells(box)):
            label = self._pygame.Rect(cell.x, cell.bottom - self._label(), cell.width, self._label())
            frames = np.asarray(view.futures)[i]
            self._picture(surface, frames[view.tick % len(frames)], cell)
            self._pygame.draw.rect(surface, BACK, label)
            self.lines.draw(surface, names[i], label, 12, BRIGHT if i == view.chosen else TEXT)
            if i == view.chosen:
                self._pygame.draw.rect(surface, ACCENT, cell.inflate(4, 4), 2)

    def cells(self, box: Any) -> list[Any]:
        """Rectangles of the nine futures inside `box`."""
        body, gap = self._body(box), round(6 * self.lines.unit)
        scale = max(min((body.width - 2 * gap) // 3, (body.height - 2 * gap) // 3) // 64, 1)
        edge = 64 * scale
        left = body.x + (body.width - 3 * edge - 2 * gap) // 2
        return [
            self._pygame.Rect(left + (i % 3) * (edge + gap), body.y + (i // 3) * (edge + gap), edge, edge)
            for i in range(9)
        ]

    def cell_at(self, size: tuple[int, int], position: tuple[int, int]) -> int | None:
        """The future under the mouse, in a window of `size`."""
        gap = round(self.GAP * self.lines.unit)
        box = self._pygame.Rect(gap, gap, size[0] - 2 * gap, size[1] - 2 * gap)
        return next((i for i, cell in enumerate(self.cells(box)) if cell.collidepoint(position)), None)

    # -- pieces --------------------------------------------------------------------------------------------------------

    def _label(self) -> int:
        return round(17 * self.lines.unit)

    def _body(self, box: Any) -> Any:
        top = round(30 * self.lines.unit)
        return self._pygame.Rect(box.x, box.y + top, box.width, box.height - top)

    def _columns(self, box: Any) -> tuple[Any, Any]:
        body, gap = self._body(box), round(20 * self.lines.unit)
        half = (body.width - gap) // 2
        rect = self._pygame.Rect
        return rect(body.x, body.y, half, body.height), rect(body.x + half + gap, body.y, half, body.height)

    def _title(self, surface: Any, text: str, box: Any) -> None:
        self.lines.draw(
            surface, text, self._pygame.Rect(box.x, box.y, box.width, round(26 * self.lines.unit)), 16, BRIGHT
        )

    def _pair(self, surface: Any, key: str, what: str, line: Any, share: float) -> None:
        cut = round(line.width * share)
        self.lines.draw(surface, key, self._pygame.Rect(line.x, line.y, cut, line.height), 14, ACCENT)
        self.lines.draw(surface, what, self._pygame.Rect(line.x + cut, line.y, line.width - cut, line.height), 14, TEXT)

    def _picture(self, surface: Any, frame: np.ndarray, box: Any) -> None:
        picture = self._pygame.surfarray.make_surface(np.ascontiguousarray(as_rgb(frame).swapaxes(0, 1)))
        surface.blit(self._pygame.transform.scale(picture, box.size), box)


class Meter:
    """Rates and delays of the last few dozen events, seconds."""

    def __init__(self, size: int = 240) -> None:
        self.values: deque[float] = deque(maxlen=size)

    def add(self, value: float) -> None:
        """Append one."""
        self.values.append(value)

    def quantile(self, q: float) -> float | None:
        """Their quantile; None without any."""
        return float(np.quantile(np.array(self.values), q)) if self.values else None
