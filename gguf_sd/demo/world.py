"""The world of the demo model: one or two coloured shapes on a plain background, and what to call them.

Everything is generated: :func:`scenes` enumerates what can be said, :func:`place` chooses sizes and positions,
:func:`render` paints, and :func:`held_out` says which combinations training never sees.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64  # pixels along each side

# sRGB, 0 ... 255.
COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (40, 80, 215),
    "yellow": (245, 208, 32),
    "purple": (160, 50, 190),
    "cyan": (35, 200, 220),
}
BACKGROUNDS = {"black": (12, 12, 12), "grey": (128, 128, 128), "white": (245, 245, 245)}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
RELATIONS = {"above": "below", "below": "above", "left of": "right of", "right of": "left of"}


@dataclass(frozen=True)
class Thing:
    """One object, as a caption names it."""

    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """What a caption says: one object, or ``first`` standing in ``relation`` to ``second``.

    ``background`` is None where the caption leaves it open.
    """

    first: Thing
    relation: str | None = None
    second: Thing | None = None
    background: str | None = None

    @property
    def caption(self) -> str:
        words = str(self.first)
        if self.second is not None:
            words += f" {self.relation} {self.second}"
        return words + (f" on a {self.background} background" if self.background else "")

    @property
    def things(self) -> tuple[Thing, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    def inverse(self) -> Scene:
        """The same scene told from the second object: "a above b" -> "b below a"."""
        if self.second is None or self.relation is None:
            return self
        return Scene(self.second, RELATIONS[self.relation], self.first, self.background)


def parse(caption: str) -> Scene:
    """The scene that a caption of this world describes; raises ValueError for any other text."""
    words, background = caption.strip().lower(), None
    if words.endswith(" background"):
        words, _, background = words.removesuffix(" background").rpartition(" on a ")
    first, relation, second = words, None, None
    for name in RELATIONS:
        if f" {name} " in words:
            first, _, second = words.partition(f" {name} ")
            relation = name
    return Scene(_thing(first), relation, _thing(second) if second else None, _background(background))


def _thing(words: str) -> Thing:
    match words.split():
        case ["a", colour, shape] if colour in COLOURS and shape in SHAPES:
            return Thing(colour, shape)
    raise ValueError(f"got {words!r}, want 'a COLOUR SHAPE' of {', '.join(COLOURS)} and {', '.join(SHAPES)}")


def _background(name: str | None) -> str | None:
    if name is not None and name not in BACKGROUNDS:
        raise ValueError(f"got background {name!r}, choose from {', '.join(BACKGROUNDS)}")
    return name


def held_out(scene: Scene) -> bool:
    """Whether training leaves this scene out: about an eighth of the pairs of objects in their arrangement,
    whatever the background and from whichever object they are told, and of the single objects on their
    background."""
    if scene.second is None:
        key = f"{scene.first} on {scene.background}" if scene.background else ""
    else:
        told = scene if scene.relation in ("above", "left of") else scene.inverse()
        key = f"{told.first} {told.relation} {told.second}"
    return bool(key) and hashlib.sha256(key.encode()).digest()[0] % 8 == 0


def scenes(held: bool, objects: int) -> list[Scene]:
    """Every scene with 1 or 2 objects on the given side of the split, backgrounds always named.

    Two objects never share a colour: it is what tells them apart in a picture.
    """
    things = [Thing(c, s) for c in COLOURS for s in SHAPES]
    if objects == 1:
        every = [Scene(t, background=b) for t in things for b in BACKGROUNDS]
    else:
        every = [
            Scene(a, relation, b, background)
            for a, b in itertools.permutations(things, 2)
            if a.colour != b.colour
            for relation in RELATIONS
            for background in BACKGROUNDS
        ]
    return [s for s in every if held_out(s) is held]


def place(scene: Scene, rng: random.Random) -> list[tuple[float, float, float]]:
    """A centre x, y and a radius in pixels for each object; two objects never touch."""
    if scene.second is None:
        radius = rng.uniform(12, 17)
        return [(SIZE / 2 + rng.uniform(-8, 8), SIZE / 2 + rng.uniform(-8, 8), radius)]
    radii = rng.uniform(9.5, 12), rng.uniform(9.5, 12)
    apart = rng.uniform(sum(radii) / 2 + 3, 17)
    sign = -1 if scene.relation in ("above", "left of") else 1
    result = []
    for side, radius in zip((sign, -sign), radii, strict=True):
        along, across = SIZE / 2 + side * apart, SIZE / 2 + rng.uniform(-7, 7)
        vertical = scene.relation in ("above", "below")
        result.append((across, along, radius) if vertical else (along, across, radius))
    return result


def coverage(shape: Tensor, x: Tensor, y: Tensor, radius: Tensor, size: int = SIZE) -> Tensor:
    """How much of each pixel a shape covers, from signed distances.

    shape [B] (index into SHAPES), centre x, y [B] and radius [B] in pixels -> [B, size, size] in 0 ... 1.
    """
    at = torch.arange(size, dtype=torch.float32) + 0.5
    dx = (at[None, None, :] - x[:, None, None]).expand(-1, size, -1)
    dy = (at[None, :, None] - y[:, None, None]).expand(-1, -1, size)
    r = radius[:, None, None]
    distance = (dx**2 + dy**2).sqrt()
    ax, ay = dx.abs(), dy.abs()
    bar = 0.36 * r
    every = torch.stack(
        [
            distance - r,
            torch.maximum(ax, ay) - 0.88 * r,
            torch.maximum(dy - 0.85 * r, 0.894 * ax - 0.447 * dy - 0.42 * r),
            torch.minimum(torch.maximum(ax - r, ay - bar), torch.maximum(ay - r, ax - bar)),
            (distance - 0.74 * r).abs() - 0.26 * r,
        ]
    )
    signed = every[shape, torch.arange(len(shape))]
    return (0.5 - signed).clamp(0, 1)


def render(todo: Sequence[Scene], rng: random.Random) -> Tensor:
    """Paints the scenes at random places -> float32 [B, 3, SIZE, SIZE] in -1 ... 1.

    Where a scene leaves the background open, one is drawn.
    """
    backgrounds = [BACKGROUNDS[s.background or rng.choice(list(BACKGROUNDS))] for s in todo]
    picture = torch.tensor(backgrounds, dtype=torch.float32)[:, :, None, None].repeat(1, 1, SIZE, SIZE)
    layers: list[list[tuple[int, Thing, tuple[float, float, float]]]] = [[], []]
    for i, scene in enumerate(todo):
        for layer, thing, where in zip(layers, scene.things, place(scene, rng), strict=False):
            layer.append((i, thing, where))
    for layer in filter(None, layers):
        rows = torch.tensor([i for i, _, _ in layer])
        x, y, radius = torch.tensor([where for _, _, where in layer]).unbind(1)
        shape = torch.tensor([SHAPES.index(t.shape) for _, t, _ in layer])
        colour = torch.tensor([COLOURS[t.colour] for _, t, _ in layer], dtype=torch.float32)
        alpha = coverage(shape, x, y, radius)[:, None]
        picture[rows] = torch.lerp(picture[rows], colour[:, :, None, None].expand(-1, -1, SIZE, SIZE), alpha)
    return picture / 127.5 - 1


class Sampler:
    """Draws scenes for training: ``pairs`` of them with two objects, ``named`` of the backgrounds said."""

    def __init__(self, seed: int, pairs: float = 0.75, named: float = 0.7, held: bool = False):
        self.rng = random.Random(seed)
        self.pairs, self.named = pairs, named
        self.choices = {n: scenes(held=held, objects=n) for n in (1, 2)}

    def draw(self, count: int) -> list[tuple[Scene, str]]:
        """``count`` scenes, backgrounds always known, each with the caption it is to be told by."""
        result = []
        for _ in range(count):
            scene = self.rng.choice(self.choices[2 if self.rng.random() < self.pairs else 1])
            told = scene if self.rng.random() < self.named else Scene(scene.first, scene.relation, scene.second)
            result.append((scene, told.caption))
        return result
