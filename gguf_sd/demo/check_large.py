"""Reads scenes of the larger world back out of pixels, as :mod:`gguf_sd.demo.check` does of the first.

The ground has two tones here, too near one another to be objects; which texture they make is told by comparing what
is left of the ground with each texture's pattern.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd.demo.check import SPECK, STANDS_OUT, Picture, Seen, components, identify, nearest, relation
from gguf_sd.demo.world import BACKGROUNDS
from gguf_sd.demo.world_large import (
    CONTRAST,
    KINDS,
    MIDDLE_RADIUS,
    RADII,
    SIZE,
    TEXTURES,
    Background,
    Scene,
    parse,
    pattern,
)

Paint = Callable[[list[str]], "Tensor | Sequence[Picture]"]


@dataclass(frozen=True)
class Reading:
    background: Background | None
    objects: tuple[Seen, ...]  # largest first


@dataclass(frozen=True)
class Verdict:
    """What a picture has right of its caption. ``objects``: as many as told, of the shapes told. ``colours``: as many
    as told, of the colours told. The rest counts only where the number of objects is right; ``relation`` only on
    objects of the right colours."""

    objects: bool
    colours: bool
    sizes: bool
    relation: bool
    background: bool

    @property
    def all(self) -> bool:
        return self.objects and self.colours and self.sizes and self.relation and self.background


@dataclass(frozen=True)
class Report:
    """Shares of pictures, 0 ... 1, that are right: in each respect, wholly, and wholly by kind of scene."""

    count: int
    objects: float
    colours: float
    sizes: float
    relation: float  # of the pairs
    background: float
    all: float
    by_kind: dict[str, float]

    def __str__(self) -> str:
        shares = [f"{f.name} {getattr(self, f.name):.1%}" for f in fields(self)[1:-1]]
        kinds = [f"{kind} {share:.1%}" for kind, share in self.by_kind.items()]
        return f"{self.count} prompts: {', '.join(shares)} ({', '.join(kinds)})"


def as_tensor(picture: Picture) -> Tensor:
    """A PIL image or tensor as RGB, 0 ... 255: [3, SIZE, SIZE]. Raises ValueError for another size."""
    if not isinstance(picture, Tensor):
        picture = torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1
    if picture.shape != (3, SIZE, SIZE):
        raise ValueError(f"got a picture of shape {list(picture.shape)}, want [3, {SIZE}, {SIZE}]")
    return (picture.float().clamp(-1, 1) + 1) * 127.5


def ground_of(rgb: Tensor) -> tuple[Tensor, Tensor]:
    """The mean colour [3] of the ground of a picture in 0 ... 255, and each pixel's distance from it [SIZE, SIZE]."""
    edge = torch.cat(
        [rgb[:, :2].flatten(1), rgb[:, -2:].flatten(1), rgb[:, :, :2].flatten(1), rgb[:, :, -2:].flatten(1)], 1
    )
    middle = edge.median(dim=1).values  # of one of the tones
    near = (edge - middle[:, None]).norm(dim=0) < STANDS_OUT + CONTRAST
    ground = edge[:, near].mean(dim=1)
    return ground, (rgb - ground[:, None, None]).norm(dim=0)


def read(picture: Picture) -> Reading:
    """What stands in a picture: a PIL image, or a tensor [3, SIZE, SIZE] in -1 ... 1."""
    rgb = as_tensor(picture)
    ground, away = ground_of(rgb)
    found = [identify(rgb, ground, away, part) for part in components(away > STANDS_OUT)]
    found.sort(key=lambda pair: -pair[0])
    objects = tuple(seen for area, seen in found if area >= SPECK)
    return Reading(_background(rgb, ground, away), objects)


def _background(rgb: Tensor, ground: Tensor, away: Tensor) -> Background | None:
    """The ground's tone and texture, from the pixels that belong to no object."""
    objects = F.max_pool2d((away > STANDS_OUT).float()[None, None], 5, stride=1, padding=2)[0, 0]
    free = objects == 0
    if free.sum() < SIZE:
        return None
    light = rgb.mean(0)
    scores = {"plain": CONTRAST / 2}
    for texture in TEXTURES[1:]:
        second = pattern(texture) > 0
        if not bool((free & second).any()) or not bool((free & ~second).any()):
            return None
        scores[texture] = float((light[free & second].mean() - light[free & ~second].mean()).abs())
    texture = max(scores, key=scores.__getitem__)
    tones = {name: tuple(c + _middle(name, texture) for c in rgb) for name, rgb in BACKGROUNDS.items()}
    tone = nearest(ground, tones)
    return None if tone is None else Background(tone, texture)


def _middle(tone: str, texture: str) -> float:
    """How far a textured ground's mean is from its first tone."""
    if texture == "plain":
        return 0
    return -CONTRAST / 2 if tone == "white" else CONTRAST / 2


def judge(picture: Picture, scene: Scene) -> Verdict:
    """Compares a picture with what its caption says. Raises ValueError for one that is not SIZE x SIZE."""
    reading = read(picture)
    wanted = [group for group in scene.groups for _ in range(group.number)]
    ground = reading.background is not None and scene.background in (None, reading.background)
    if len(reading.objects) != len(wanted):
        return Verdict(False, False, False, False, ground)
    shapes = Counter(seen.shape for seen in reading.objects) == Counter(group.shape for group in wanted)
    colours = Counter(seen.colour for seen in reading.objects) == Counter(group.colour for group in wanted)
    if scene.second is None or not colours:
        sizes = all(scene.first.size in (None, size_of(seen)) for seen in reading.objects)
        return Verdict(shapes, colours, sizes and scene.second is None, scene.second is None, ground)
    by_colour = {seen.colour: seen for seen in reading.objects}
    first, second = by_colour[scene.first.colour], by_colour[scene.second.colour]
    bound = (first.shape, second.shape) == (scene.first.shape, scene.second.shape)
    sizes = all(group.size in (None, size_of(seen)) for group, seen in ((scene.first, first), (scene.second, second)))
    related = relation(second.x - first.x, second.y - first.y) == scene.relation
    return Verdict(bound, True, sizes, related, ground)


def size_of(seen: Seen) -> str | None:
    """small, large or, between them, None."""
    sizes = [(None, MIDDLE_RADIUS), *RADII.items()]
    return min(sizes, key=lambda size: abs(seen.radius - size[1]))[0]


def summary(scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> Report:
    """Shares of what is right; of nothing they are not a number."""

    def share(of: Sequence[Verdict], what: str) -> float:
        return sum(getattr(v, what) for v in of) / len(of) if of else float("nan")

    by_kind = {kind: [v for v, s in zip(verdicts, scenes, strict=True) if s.kind == kind] for kind in KINDS}
    return Report(
        count=len(verdicts),
        objects=share(verdicts, "objects"),
        colours=share(verdicts, "colours"),
        sizes=share(verdicts, "sizes"),
        relation=share(by_kind["pair"], "relation"),
        background=share(verdicts, "background"),
        all=share(verdicts, "all"),
        by_kind={kind: share(of, "all") for kind, of in by_kind.items()},
    )


def evaluate(paint: Paint, prompts: list[str], batch: int = 50) -> Report:
    """Has every prompt painted, up to ``batch`` at a time, and counts what is right.

    Raises ValueError for a caption that is not of this world.
    """
    scenes = [parse(prompt) for prompt in prompts]
    verdicts: list[Verdict] = []
    for i in range(0, len(prompts), batch):
        for scene, picture in zip(scenes[i : i + batch], paint(prompts[i : i + batch]), strict=True):
            verdicts.append(judge(picture, scene))
    return summary(scenes, verdicts)
