"""Reads scenes back out of pixels, and counts how often pictures show what their captions say.

No network is involved: objects are what stands out from the border's colour, their colour is the nearest of the
palette, their shape the template that covers them best, their place the centre of their pixels.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gguf_sd.demo.world import BACKGROUNDS, COLOURS, SHAPES, SIZE, Scene, coverage, parse, scenes

STANDS_OUT = 45.0  # distance in RGB (0 ... 255) from the background's colour at which a pixel belongs to an object
SPECK = 20.0  # area in pixels below which something is not counted as an object
NEAR = 75.0  # distance in RGB within which a colour of the palette is recognised
OVERLAP = 0.72  # intersection over union with its template that a shape must reach

Picture = Image.Image | Tensor
Paint = Callable[[list[str]], "Tensor | Sequence[Picture]"]


@dataclass(frozen=True)
class Seen:
    """An object found in a picture; colour and shape are None where they are none of the world's."""

    colour: str | None
    shape: str | None
    x: float  # centre, in pixels
    y: float
    radius: float  # in pixels, by its area as the shape that it is nearest to


@dataclass(frozen=True)
class Reading:
    background: str | None
    objects: tuple[Seen, ...]  # largest first


@dataclass(frozen=True)
class Verdict:
    """What a picture has right of its caption. ``shapes`` and ``relation`` count only on objects of the right
    colour; pictures with an object too many or too few have nothing right."""

    colours: bool
    shapes: bool
    relation: bool
    background: bool

    @property
    def all(self) -> bool:
        return self.colours and self.shapes and self.relation and self.background


@dataclass(frozen=True)
class Report:
    """Shares of pictures, 0 ... 1: single objects wholly right, and what is right of two objects."""

    singles: int
    single: float
    pairs: int
    colours: float
    shapes: float
    relation: float
    pair: float  # colours, shapes, relation and background, all of them

    def __str__(self) -> str:
        return (
            f"{self.singles} single objects: all right {self.single:.1%}; {self.pairs} pairs: colours "
            f"{self.colours:.1%}, shapes {self.shapes:.1%}, relation {self.relation:.1%}, all right {self.pair:.1%}"
        )


def read(picture: Picture) -> Reading:
    """What stands in a picture: a PIL image, or a tensor [3, SIZE, SIZE] in -1 ... 1."""
    if not isinstance(picture, Tensor):
        pixels = np.array(picture.convert("RGB"))
        picture = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    if picture.shape != (3, SIZE, SIZE):
        raise ValueError(f"got a picture of shape {list(picture.shape)}, want [3, {SIZE}, {SIZE}]")
    rgb = (picture.float().clamp(-1, 1) + 1) * 127.5
    edge = torch.cat(
        [rgb[:, :2].flatten(1), rgb[:, -2:].flatten(1), rgb[:, :, :2].flatten(1), rgb[:, :, -2:].flatten(1)], 1
    )
    ground = edge.median(dim=1).values
    away = (rgb - ground[:, None, None]).norm(dim=0)
    found = [identify(rgb, ground, away, part) for part in components(away > STANDS_OUT)]
    found.sort(key=lambda pair: -pair[0])
    return Reading(nearest(ground, BACKGROUNDS), tuple(seen for area, seen in found if area >= SPECK))


def components(mask: Tensor) -> list[Tensor]:
    """The 8-connected parts of a mask [H, W], specks left out: each pixel takes the largest number in reach until
    none changes."""
    labels = torch.arange(1, mask.numel() + 1, dtype=torch.float32).view(mask.shape) * mask
    while True:
        spread = F.max_pool2d(labels[None, None], 3, stride=1, padding=1)[0, 0] * mask
        if torch.equal(spread, labels):
            numbers, sizes = labels.unique(return_counts=True)
            return [labels == n for n, size in zip(numbers, sizes, strict=True) if n and size >= SPECK / 2]
        labels = spread


def identify(rgb: Tensor, ground: Tensor, away: Tensor, part: Tensor) -> tuple[float, Seen]:
    """Area in pixels, and what a connected part is."""
    inside = part & (away >= away[part].median())
    colour = rgb[:, inside].median(dim=1).values
    direction = colour - ground
    alpha = ((rgb - ground[:, None, None]) * direction[:, None, None]).sum(0) / direction.square().sum()
    near_part = F.max_pool2d(part[None, None].float(), 3, stride=1, padding=1)[0, 0]
    alpha = alpha.clamp(0, 1) * near_part
    area = float(alpha.sum())
    at = torch.arange(alpha.shape[-1], dtype=torch.float32) + 0.5
    x, y = float((alpha * at[None, :]).sum() / area), float((alpha * at[:, None]).sum() / area)
    return area, Seen(nearest(colour, COLOURS), *_shape(alpha, area, x, y))


def nearest(colour: Tensor, palette: Mapping[str, Sequence[float]]) -> str | None:
    """The colour of the palette that is nearest, if it is within NEAR."""
    distances = {name: float((colour - torch.tensor(rgb)).norm()) for name, rgb in palette.items()}
    name = min(distances, key=distances.__getitem__)
    return name if distances[name] <= NEAR else None


@cache
def _moments() -> tuple[Tensor, Tensor]:
    """Of each shape with radius 1: its area, and how far below its centre the centroid lies."""
    index, middle = torch.arange(len(SHAPES)), torch.full((len(SHAPES),), 128.0)
    cover = coverage(index, middle, middle, torch.full((len(SHAPES),), 100.0), size=256)
    area = cover.sum((1, 2))
    rows = torch.arange(256, dtype=torch.float32) + 0.5
    return area / 1e4, ((cover.sum(2) * rows).sum(1) / area - 128) / 100


def _shape(alpha: Tensor, area: float, x: float, y: float) -> tuple[str | None, float, float, float]:
    """The shape whose template of the same area and centroid overlaps coverage alpha [H, H] best, None if badly; the
    centroid; and that shape's radius."""
    unit_area, below = _moments()
    radius = (area / unit_area).sqrt()
    templates = coverage(torch.arange(len(SHAPES)), torch.full_like(radius, x), y - below * radius, radius, len(alpha))
    overlap = torch.minimum(templates, alpha).sum((1, 2)) / torch.maximum(templates, alpha).sum((1, 2))
    best = int(overlap.argmax())
    return SHAPES[best] if overlap[best] >= OVERLAP else None, x, y, float(radius[best])


def judge(picture: Picture, scene: Scene) -> Verdict:
    """Compares a picture with what its caption says. Raises ValueError for one that is not SIZE x SIZE."""
    reading = read(picture)
    background = scene.background in (None, reading.background) and reading.background is not None
    by_colour = {seen.colour: seen for seen in reading.objects}
    wanted = {thing.colour: thing for thing in scene.things}
    if len(reading.objects) != len(wanted) or by_colour.keys() != wanted.keys():
        return Verdict(False, False, False, background)
    shapes = all(by_colour[colour].shape == thing.shape for colour, thing in wanted.items())
    related = True
    if scene.second is not None:
        first, second = by_colour[scene.first.colour], by_colour[scene.second.colour]
        related = relation(second.x - first.x, second.y - first.y) == scene.relation
    return Verdict(True, shapes, related, background)


def relation(dx: float, dy: float) -> str:
    """How the first object stands to a second that is dx to its right and dy below it."""
    if abs(dx) > abs(dy):
        return "left of" if dx > 0 else "right of"
    return "above" if dy > 0 else "below"


def held_out_prompts(singles: int, pairs: int, seed: int = 0) -> list[str]:
    """Captions of scenes that training never saw: first one object each, then two."""
    rng = random.Random(seed)
    one, two = scenes(held=True, objects=1), scenes(held=True, objects=2)
    drawn = [one[i % len(one)] for i in range(singles)] + rng.sample(two, min(pairs, len(two)))
    return [scene.caption for scene in drawn]


def evaluate(paint: Paint, prompts: list[str], batch: int = 32) -> Report:
    """Has every prompt painted and counts what is right.

    ``paint`` takes up to ``batch`` captions and returns as many pictures: PIL images, or a tensor
    [B, 3, SIZE, SIZE] in -1 ... 1. Raises ValueError for a caption that is not of this world.
    """
    told = [parse(prompt) for prompt in prompts]
    single: list[Verdict] = []
    pair: list[Verdict] = []
    for i in range(0, len(prompts), batch):
        for scene, picture in zip(told[i : i + batch], paint(prompts[i : i + batch]), strict=True):
            (single if scene.second is None else pair).append(judge(picture, scene))

    def share(verdicts: list[Verdict], what: str) -> float:
        return sum(getattr(v, what) for v in verdicts) / len(verdicts) if verdicts else float("nan")

    shares = [share(pair, what) for what in ("colours", "shapes", "relation", "all")]
    return Report(len(single), share(single, "all"), len(pair), *shares)
