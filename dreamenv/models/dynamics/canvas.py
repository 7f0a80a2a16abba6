"""Dynamics that copy: each pixel of the next picture is the last one's, the background's, or moved and drawn over."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dreamenv.config import check, check_games
from dreamenv.models.blocks import sinusoidal, zero_init
from dreamenv.models.interface import NULL_ACTION, Backbone, Dynamics, LatentSpec, Prediction, State
from dreamenv.models.registry import build, register

_VOTES = 32
"""So many pictures more must show another colour before the background is thought to be that."""
_SAME = 2 / 255  # half a step of a pixel's value, in latents: what is nearer is the same colour when shown
_MOST = 2.0  # the latent of white, and of black the other way: a dream does not leave the range of pixels
_STRETCH = 0.1
_TOGETHER = 16  # pictures moved at a time on a CPU: more want blocks so large that glibc takes them anew each time
_SELDOM = -1.0  # the logit with which moving layers apart begins


@dataclass(frozen=True)
class CanvasFlowConfig:
    """Shape of the dynamics."""

    latent: LatentSpec = LatentSpec((48, 16, 16), "pixels of patches")
    """What the latents are; training takes it from the codec."""
    context: int = 4
    """K past pictures the model sees, with the K - 1 actions between them and the current one."""
    backbone: dict[str, Any] = field(default_factory=lambda: {"type": "unet"})
    """The network that mixes cells, see `dreamenv.models.backbones`."""
    embedding: int = 128
    """Width of the conditioning vector."""
    motion: int = 0
    """How many pixels a cell's picture may be moved each way before it is drawn over; 0 moves none."""
    layered: bool = False
    """Whether what differs from the background may be moved alone, over the background."""
    rest: tuple[float, ...] = ()
    """In each game, by how many of its 256 values a pixel must change or else stays as it was; empty is 0. What stands
    still does not drift then, but nothing fades. It counts in evaluation only, and is chosen after training."""
    deterministic: bool = False
    """Whether it learns from no term that draws, so that it is a mean, however many evaluations are asked for."""
    games: tuple[str, ...] = ()
    """The games that it is told apart, none for a model of one; training takes them from the data."""

    def __post_init__(self) -> None:
        """Validate ranges; raises `ConfigError`."""
        c = self.latent.shape[0]
        sound = self.latent.layout == "pixels of patches" and c % 3 == 0 and math.isqrt(c // 3) ** 2 == c // 3
        check(sound, f"latent {self.latent}: must be of layout 'pixels of patches', three colours of each pixel")
        check(1 <= self.context <= 64, f"context {self.context}: must be 1..64")
        check(
            8 <= self.embedding <= 4096 and self.embedding % 4 == 0,
            f"embedding {self.embedding}: must be a multiple of 4 in 8..4096",
        )
        check(0 <= self.motion <= 8, f"motion {self.motion}: must be 0..8")
        check(self.motion > 0 or not self.layered, "layered: without motion nothing is moved; set motion to 1..8")
        many = max(len(self.games), 1)
        sound = len(self.rest) in (0, many) and all(0 <= value <= 256 for value in self.rest)
        check(sound, f"rest {self.rest}: must be empty, or {many} values in 0..256, one a game")
        check_games(self.games)


@register("dynamics", "canvas_flow", CanvasFlowConfig)
class CanvasFlow(Dynamics):
    """A latent flow on pixels, with two shares for each: how much of it is new, and how much of that is background.

    Both shares can be 0 and 1 exactly (the stretched and clamped sigmoid of Louizos et al. 2018), so what stands still
    stays the same to the byte for ever, and ground that is uncovered comes back as it was. The background is a vote
    over time: each pixel's colour is the one that had the majority of the pictures seen so far (Boyer & Moore 1991).

    What is drawn is a change of the last picture, whose cells are moved by whole pixels first.

    A state keeps `background` (B, C, H, W) and `votes` (B, C / 3, H, W), the majority's lead in pictures.
    """

    rest: Tensor
    remembers: ClassVar[bool] = True
    choices: ClassVar[Mapping[str, tuple[float, ...]]] = {"rest": (0.0, 4.0, 8.0, 16.0)}
    parts: ClassVar[tuple[str, ...]] = ("new",)
    config: CanvasFlowConfig

    def __init__(self, config: CanvasFlowConfig) -> None:
        super().__init__()
        c, k, e = config.latent.shape[0], config.context, config.embedding
        self.config, self.deterministic = config, config.deterministic
        self.pixels = c // 3
        self.register_buffer("rest", torch.tensor(config.rest or (0.0,)) * 2 * _SAME, persistent=False)
        seen = c * (k + 2) + self.pixels
        self.backbone: Backbone = build("backbone", config.backbone, seen, e, e // 2, where="backbone")
        self.moves = 2 * config.motion + 1 if config.motion else 0  # along each axis
        self.sizes = [c, self.pixels, self.pixels, 1, int(config.layered), 2 * self.moves]
        out = nn.Conv2d(self.backbone.width, sum(self.sizes), 3, padding=1)
        zero_init(out)
        self.out = out
        if self.moves and out.bias is not None:
            rest = out.bias[-2 * self.moves :].view(2, self.moves)[:, config.motion]
            nn.init.constant_(rest, 3.0 + math.log(self.moves - 1))  # begins at rest
            nn.init.constant_(out.bias[sum(self.sizes[:4]) : sum(self.sizes[:5])], _SELDOM)
        self.action_embedding = nn.Embedding(NULL_ACTION + 1, e // 2)
        self.game_embedding = nn.Embedding(len(config.games), e // 2) if config.games else None
        told = (k + 2 + bool(config.games)) * (e // 2)
        self.condition = nn.Sequential(nn.Linear(told, 2 * e), nn.SiLU(), nn.Linear(2 * e, e), nn.SiLU())

    @property
    def hinted(self) -> Mapping[str, tuple[int, ...]]:
        """See `Dynamics.hinted`: the features of its backbone."""
        return {"features": (self.backbone.width, *self.spec.shape[1:])}

    @property
    def local(self) -> bool:
        """See `Dynamics.local`: as its backbone."""
        return self.backbone.local

    def begin(
        self,
        latents: Tensor,
        actions: Tensor,
        past: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
        level: Tensor | None = None,
    ) -> State:
        """See `Dynamics.begin`; the background is what had the majority in the past and in the context."""
        state = super().begin(latents, actions)
        seen = state.latents if past is None else torch.cat([past.to(state.latents.dtype), state.latents], 1)
        first, *rest = seen.unbind(1)
        background, votes = first, first.new_zeros(len(first), self.pixels, *first.shape[2:])
        for latent in rest:
            background, votes = self._voted(background, votes, latent)
        return state.replace(background=background, votes=votes)

    def advance(self, state: State, action: Tensor, latent: Tensor) -> State:
        """See `Dynamics.advance`; the latent votes for its colours."""
        background, votes = self._voted(state["background"], state["votes"], latent)
        return super().advance(state, action, latent).replace(background=background, votes=votes)

    def _voted(self, background: Tensor, votes: Tensor, latent: Tensor) -> tuple[Tensor, Tensor]:
        """Background (B, C, H, W) and its lead (B, C / 3, H, W) after one more picture."""
        latent = latent.detach()
        off = (latent - background).abs().unflatten(1, (3, self.pixels)).amax(1)
        lead = torch.where(off < _SAME, (votes + 1).clamp_max(_VOTES), votes - 1)
        taken = (lead < 0).repeat(1, 3, 1, 1)
        return torch.where(taken, latent, background), lead.clamp_min(0)

    def predict(
        self,
        state: State,
        action: Tensor,
        x: Tensor | None = None,
        tau: Tensor | None = None,
        level: Tensor | None = None,
        hints: Mapping[str, Tensor] | None = None,
        span: Tensor | None = None,
    ) -> Prediction:
        """See `Dynamics.predict`; it heeds no hints, and hints its `features`.

        Its part `new` (B, C / 3, H, W) is the logit of what is new.
        """
        last, background = state.latents[:, -1], state["background"]
        features = self._features(state, action, x, tau, level)
        change, new, uncovered, log_error, apart, moves = self.out(features).float().split(self.sizes, 1)
        shown = None if self.training else (_share(new) > 0).any(1)  # elsewhere the last picture stays
        carried = self._carried(last, background, apart, moves, shown) if self.moves else last
        fresh = blend(carried + change, background, uncovered - 2)  # begins as what is drawn
        drawn = blend(last, fresh, new).float()
        if self.config.rest and not self.training:
            least = self.rest[state["game"]] if self.config.games else self.rest
            changed = (drawn - last).abs().unflatten(1, (3, self.pixels)).amax(1) >= least.view(-1, 1, 1, 1)
            drawn = torch.where(changed.repeat(1, 3, 1, 1), drawn, last)
        if not self.training:
            drawn = drawn.clamp(-_MOST, _MOST)
        return Prediction(drawn, log_error[:, 0], hints={"features": features}, parts={"new": new})

    def hints(self, state: State, action: Tensor) -> dict[str, Tensor]:
        """Its features (B, channels, H, W), of which the next picture is made."""
        return {"features": self._features(state, action, None, None, None)}

    def _features(
        self, state: State, action: Tensor, x: Tensor | None, tau: Tensor | None, level: Tensor | None
    ) -> Tensor:
        """What its backbone makes (B, channels, H, W) of what `predict` takes."""
        context = state.latents
        last, zero = context[:, -1], torch.zeros(len(context), device=context.device)
        tau = zero if tau is None or self.deterministic else tau
        level = zero if level is None else level
        noisy = torch.zeros_like(last) if x is None else x * tau[:, None, None, None]
        half = self.config.embedding // 2
        actions = self.action_embedding(torch.cat([state.actions, action[:, None]], 1))
        told = [actions.flatten(1), *(sinusoidal(s, half).to(actions.dtype) for s in (tau, level))]
        if self.game_embedding is not None:
            told.append(self.game_embedding(state["game"]))
        order = torch.linspace(0, 1, actions.shape[1], device=actions.device)
        tokens = actions + sinusoidal(order, half).to(actions.dtype) if self.backbone.attends else None
        maps = torch.cat([noisy, context.flatten(1, 2), state["background"], state["votes"] / _VOTES], 1)
        return self.backbone(maps, self.condition(torch.cat(told, 1)), tokens)

    def _carried(self, last: Tensor, background: Tensor, apart: Tensor, moves: Tensor, shown: Tensor | None) -> Tensor:
        """The last picture moved; as far as logits (B, 1, H, W) say, only what differs from the background, over it.

        Cells that are not shown, bool (B, H, W), may hold anything; None shows all.
        """
        patch = math.isqrt(self.pixels)
        whole = moved(last, moves, patch, shown)
        if not self.config.layered:
            return whole
        differs = ((last - background).abs().unflatten(1, (3, self.pixels)).amax(1) >= _SAME).to(last.dtype)
        sprite, needed = torch.cat([last * differs.repeat(1, 3, 1, 1), differs], 1), None
        if shown is not None:  # elsewhere it is nothing that is moved, or is not shown
            reach = -(-self.config.motion // patch)
            near = F.max_pool2d(differs.amax(1, keepdim=True), 2 * reach + 1, 1, reach)
            needed = (near[:, 0] > 0) & (_share(apart[:, 0]) > 0) & shown
        sprite, cover = moved(sprite, moves, patch, needed).split([last.shape[1], self.pixels], 1)
        alone = sprite + (1 - cover.repeat(1, 3, 1, 1)) * background
        return blend(whole, alone, apart.expand(-1, self.pixels, -1, -1))

    def grown(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weights of shorter moves, or of one layer; longer moves begin as likely as the least likely along their axis.

        A second layer is begun a little, so the prediction is not quite the same then.
        """
        own, weights, drawn = self.state_dict(), dict(weights), sum(self.sizes[:4])
        for name in ("out.weight", "out.bias"):
            found = weights.get(name)
            if found is None or not found.ndim or found.shape[1:] != own[name].shape[1:] or len(found) < drawn + 2:
                continue
            layers = (len(found) - drawn) % 2  # moves along one axis are as many as along the other
            apart, moves = found[drawn : drawn + layers], found[drawn + layers :].unflatten(0, (2, -1))
            further, bias = (self.moves - moves.shape[1]) // 2, found.ndim == 1
            if further < 0 or layers > self.sizes[4]:
                continue
            far = moves.amin(1, keepdim=True) if bias else torch.zeros_like(moves[:, :1])
            far = far.repeat_interleave(further, 1)
            if layers < self.sizes[4]:
                apart = found.new_full((1, *found.shape[1:]), _SELDOM if bias else 0.0)
            weights[name] = torch.cat([found[:drawn], apart, torch.cat([far, moves, far], 1).flatten(0, 1)])
        return weights


def moved(maps: Tensor, logits: Tensor, patch: int, needed: Tensor | None = None) -> Tensor:
    """Patches of maps (B, n patch^2, H, W), each cell's picture a mixture of itself moved by whole pixels.

    Sprites mostly move as they are. The mixture is of moves up to m pixels each way (dynamic neural advection, Finn et
    al. 2016), by the product of two softmaxes of logits (B, 2 (2 m + 1), H, W): of moves down and of moves across.
    Only cells that are needed, bool (B, H, W), are worked out; the others are 0.
    """
    b, c, height, width = maps.shape
    if b > _TOGETHER and maps.device.type == "cpu" and not torch.is_grad_enabled():
        given = [maps, logits, *([] if needed is None else [needed])]
        return torch.cat(
            [moved(m, g, patch, *n) for m, g, *n in zip(*(t.split(_TOGETHER) for t in given), strict=True)]
        )
    moves, planes = logits.shape[1] // 2, c // patch**2
    around = patch + moves - 1
    picture = F.pad(F.pixel_shuffle(maps, patch), (moves // 2,) * 4, mode="replicate")
    windows = picture.unfold(2, around, patch).unfold(3, around, patch).permute(0, 2, 3, 1, 4, 5)
    parts = [part.movedim(1, -1) for part in logits.split(moves, 1)]
    windows, *parts = (each.flatten(0, 2) if needed is None else each[needed] for each in (windows, *parts))
    down, across = (_shifts(part.softmax(1), patch) for part in parts)
    columns = windows.flatten(1, 2) @ across.mT.to(maps.dtype)
    out = (down[:, None].to(columns.dtype) @ columns.unflatten(1, (planes, around))).flatten(1)
    if needed is not None:
        out = out.new_zeros(b, height, width, c).masked_scatter_(needed[..., None], out)
    return out.reshape(b, height, width, c).movedim(-1, 1)


def _shifts(weights: Tensor, patch: int) -> Tensor:
    """Matrices (N, patch, patch + moves - 1) whose every row has the weights (N, moves), one further than the last."""
    moves = weights.shape[1]
    rows = F.pad(weights[:, None].expand(-1, patch, -1), (0, patch)).flatten(1)
    return rows[:, : patch * (patch + moves - 1)].unflatten(1, (patch, patch + moves - 1))


def blend(first: Tensor, second: Tensor, logit: Tensor) -> Tensor:
    """Colours (B, C, H, W) between two pictures, by one share for each pixel, (B, C / 3, H, W) before its sigmoid.

    Beyond some logit either way it is the one or the other to the bit; the gradient does not know of that.
    """
    share = _share(logit).repeat(1, 3, 1, 1)
    mixed = first + share * (second - first)
    return torch.where(share.detach() >= 1, second.detach() + (mixed - mixed.detach()), mixed)


def _share(logit: Tensor) -> Tensor:
    """The stretched and clamped sigmoid, with the gradient of the stretched one."""
    open_share = (1 + 2 * _STRETCH) * logit.sigmoid() - _STRETCH
    return open_share + (open_share.clamp(0, 1) - open_share).detach()
