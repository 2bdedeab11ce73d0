"""The world of the turbo demo model: the first world's shapes on 128x128 pixels, now with sizes, numbers and textures.

A picture holds one object, two that stand in a relation, or two or three of a kind in a row, on a plain, striped or
checkered ground. Colours, shapes and relations are those of :mod:`gguf_sd.demo.world`. What a caption leaves open has
its default, middle-sized and plain grey, so that a caption and four numbers, the offsets, say all about a picture.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd.demo.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, coverage

SIZE = 128  # pixels along each side
RADII = {"small": 10.5, "large": 17.5}  # pixels
MIDDLE_RADIUS = 13.5  # of an object whose size is left open
NUMBERS = {"a": 1, "two": 2, "three": 3}
TEXTURES = ("plain", "striped", "checkered")
CELL = 8  # pixels of a stripe or a square of a texture
CONTRAST = 24  # between a texture's two tones, of 255
OFFSETS = 4  # numbers in -1 ... 1 that move the objects of a picture
CROP = 32  # at most so many pixels are cut off on the left and at the top
ORIGINALS = (16, 24)  # pixels along each side of the pictures that were enlarged
PLURALS = {shape: shape + ("es" if shape.endswith("s") else "s") for shape in SHAPES}


@dataclass(frozen=True)
class Group:
    """One object, or two or three of a kind, as a caption names them; ``size`` is None where it is left open."""

    colour: str
    shape: str
    size: str | None = None
    number: int = 1

    def __str__(self) -> str:
        number = next(word for word, n in NUMBERS.items() if n == self.number)
        shape = self.shape if self.number == 1 else PLURALS[self.shape]
        return " ".join(filter(None, (number, self.size, self.colour, shape)))

    @property
    def radius(self) -> float:
        """In pixels."""
        return MIDDLE_RADIUS if self.size is None else RADII[self.size]


@dataclass(frozen=True)
class Background:
    tone: str
    texture: str = "plain"

    def __str__(self) -> str:
        return f"a {self.tone} background" if self.texture == "plain" else f"a {self.texture} {self.tone} background"


@dataclass(frozen=True)
class Scene:
    """What a caption says: a group, or one object standing in ``relation`` to another; ``background`` may be open."""

    first: Group
    relation: str | None = None
    second: Group | None = None
    background: Background | None = None

    @property
    def caption(self) -> str:
        words = str(self.first)
        if self.second is not None:
            words += f" {self.relation} {self.second}"
        return words + (f" on {self.background}" if self.background else "")

    @property
    def groups(self) -> tuple[Group, ...]:
        return (self.first,) if self.second is None else (self.first, self.second)

    @property
    def kind(self) -> str:
        """single, number or pair."""
        if self.second is not None:
            return "pair"
        return "single" if self.first.number == 1 else "number"

    def inverse(self) -> Scene:
        """The same scene told from the second object: "a above b" -> "b below a"."""
        if self.second is None or self.relation is None:
            return self
        return Scene(self.second, RELATIONS[self.relation], self.first, self.background)


KINDS = ("single", "number", "pair")


def parse(caption: str) -> Scene:
    """The scene that a caption of this world describes; raises ValueError for any other text."""
    words, background = caption.strip().lower(), None
    if words.endswith(" background"):
        words, _, said = words.removesuffix(" background").rpartition(" on a ")
        background = _background(said)
    first, relation, second = words, None, None
    for name in RELATIONS:
        if f" {name} " in words:
            first, _, second = words.partition(f" {name} ")
            relation = name
    groups = [_group(part) for part in (first, second) if part]
    if relation and [group.number for group in groups] != [1, 1]:
        raise ValueError(f"got {caption!r}; a relation takes one object on each side")
    return Scene(groups[0] if groups else _group(""), relation, groups[1] if relation else None, background)


def _group(words: str) -> Group:
    match words.split():
        case [number, *size, colour, shape] if number in NUMBERS and colour in COLOURS and len(size) <= 1:
            names = {PLURALS[name] if NUMBERS[number] > 1 else name: name for name in SHAPES}
            if shape in names and (not size or size[0] in RADII):
                return Group(colour, names[shape], size[0] if size else None, NUMBERS[number])
    raise ValueError(f"got {words!r}, want 'a COLOUR SHAPE', 'two small COLOUR SHAPEs' or the like")


def _background(words: str) -> Background:
    match words.split():
        case [tone] if tone in BACKGROUNDS:
            return Background(tone)
        case [texture, tone] if tone in BACKGROUNDS and texture in TEXTURES[1:]:
            return Background(tone, texture)
    raise ValueError(f"got background {words!r}; want one of {', '.join(BACKGROUNDS)}, before it striped or checkered")


def held_out(scene: Scene) -> bool:
    """Whether training leaves this scene out: about an eighth of the pairs in their arrangement and of the numbers of
    a kind, whatever sizes and background and from whichever object they are told, and of the single objects of a size
    on their background."""
    if scene.kind == "pair":
        told = scene if scene.relation in ("above", "left of") else scene.inverse()
        assert told.second is not None
        key = f"{_bare(told.first)} {told.relation} {_bare(told.second)}"
    elif scene.kind == "number":
        key = str(_bare(scene.first))
    else:
        key = scene.caption if scene.background else ""
    return bool(key) and hashlib.sha256(key.encode()).digest()[0] % 8 == 0


def _bare(group: Group) -> Group:
    return replace(group, size=None)


GROUNDS = tuple(Background(tone, texture) for tone in BACKGROUNDS for texture in TEXTURES)
DEFAULT_GROUND = Background("grey")


def draw_scene(kind: str, held: bool, rng: random.Random, named: float = 1.0) -> Scene:
    """A scene of a kind on the given side of the split, the background said with chance ``named``. Objects of a pair
    never share a colour: it is what tells them apart in a picture."""
    while True:
        things = [
            Group(colour, rng.choice(SHAPES), rng.choice((None, *RADII))) for colour in rng.sample(list(COLOURS), 2)
        ]
        ground = rng.choice(GROUNDS) if rng.random() < named else None
        if kind == "pair":
            scene = Scene(things[0], rng.choice(list(RELATIONS)), things[1], ground)
        else:
            scene = Scene(replace(things[0], number=rng.choice((2, 3)) if kind == "number" else 1), background=ground)
        if held_out(scene) is held:
            return scene


@dataclass(frozen=True)
class View:
    """How a picture of a scene came to be: ``original`` pixels along each side, enlarged to SIZE, ``left`` and ``top``
    pixels cut off (so that the scene moves there). What SDXL is told of its training pictures."""

    original: int = SIZE
    left: int = 0
    top: int = 0

    @property
    def time_ids(self) -> tuple[int, ...]:
        """Original height and width, crop's top and left, target height and width."""
        return self.original, self.original, self.top, self.left, SIZE, SIZE


class Sampler:
    """Draws scenes for training, kinds in ``shares``, ``named`` of the backgrounds said, and views of them, of which
    the share ``enlarged`` is."""

    def __init__(
        self,
        seed: int,
        shares: Sequence[float] = (0.2, 0.25, 0.55),
        named: float = 0.85,
        held: bool = False,
        enlarged: float = 0.12,
    ):
        self.rng = random.Random(seed)
        self.shares, self.named, self.held, self.enlarged = shares, named, held, enlarged

    def draw(self, count: int) -> list[Scene]:
        kinds = self.rng.choices(KINDS, self.shares, k=count)
        return [draw_scene(kind, self.held, self.rng, self.named) for kind in kinds]

    def view(self) -> View:
        """A picture of eight is cut; if it is not enlarged either, it is as it should be."""
        chance = self.rng.random()
        if chance < self.enlarged:
            return View(original=self.rng.choice(ORIGINALS))
        if chance < self.enlarged + 0.13:
            return View(left=self.rng.randrange(CROP + 1), top=self.rng.randrange(CROP + 1))
        return View()


def place(scene: Scene, offsets: Sequence[float]) -> list[tuple[Group, float, float]]:
    """Each object with its centre x, y in pixels, moved by OFFSETS numbers in -1 ... 1; objects never touch."""
    middle, first = SIZE / 2, scene.first
    if scene.second is None and first.number == 1:
        return [(first, middle + 10 * offsets[0], middle + 10 * offsets[1])]
    if scene.second is None:
        across = (-30, 30) if first.number == 2 else (-40, 0, 40)
        return [(first, middle + x, middle + 8 * move) for x, move in zip(across, offsets, strict=False)]
    apart, sign = 28 + 2 * offsets[2], -1 if scene.relation in ("above", "left of") else 1
    result = []
    for group, side, move in zip((first, scene.second), (sign, -sign), offsets, strict=False):
        along, aside = middle + side * apart, middle + 8 * move
        vertical = scene.relation in ("above", "below")
        result.append((group, aside, along) if vertical else (group, along, aside))
    return result


def pattern(texture: str, left: int = 0, top: int = 0) -> Tensor:
    """Where a texture has its second tone: [SIZE, SIZE] of 0 and 1."""
    rows = (torch.arange(SIZE) + top) // CELL % 2
    columns = (torch.arange(SIZE) + left) // CELL % 2
    if texture == "plain":
        return torch.zeros(SIZE, SIZE)
    if texture == "striped":
        return rows[:, None].expand(SIZE, SIZE).float()
    return (rows[:, None] != columns[None, :]).float()


def ground_picture(background: Background, view: View) -> Tensor:
    """[3, SIZE, SIZE] in 0 ... 255."""
    tone = torch.tensor(BACKGROUNDS[background.tone], dtype=torch.float32)
    second = -CONTRAST if background.tone == "white" else CONTRAST
    return tone[:, None, None] + second * pattern(background.texture, view.left, view.top)


def render(todo: Sequence[Scene], offsets: Tensor, views: Sequence[View] | None = None) -> Tensor:
    """Paints the scenes, moved by offsets [B, OFFSETS] -> float32 [B, 3, SIZE, SIZE] in -1 ... 1."""
    views = views or [View()] * len(todo)
    grounds = [ground_picture(s.background or DEFAULT_GROUND, v) for s, v in zip(todo, views, strict=True)]
    picture = torch.stack(grounds)
    layers: list[list[tuple[int, Group, float, float, float]]] = [[], [], []]
    for i, (scene, view, moves) in enumerate(zip(todo, views, offsets.tolist(), strict=True)):
        for layer, (group, left, top) in zip(layers, place(scene, moves), strict=False):
            layer.append((i, group, left - view.left, top - view.top, group.radius))
    for layer in filter(None, layers):
        rows = torch.tensor([i for i, *_ in layer])
        x, y, radius = torch.tensor([where for _, _, *where in layer]).unbind(1)
        shape = torch.tensor([SHAPES.index(group.shape) for _, group, *_ in layer])
        colour = torch.tensor([COLOURS[group.colour] for _, group, *_ in layer], dtype=torch.float32)
        alpha = coverage(shape, x, y, radius, SIZE)[:, None]
        picture[rows] = torch.lerp(picture[rows], colour[:, :, None, None].expand(-1, -1, SIZE, SIZE), alpha)
    for i, view in enumerate(views):
        if view.original < SIZE:
            picture[i : i + 1] = enlarged(picture[i : i + 1], view.original)
    return picture / 127.5 - 1


def enlarged(pictures: Tensor, original: int) -> Tensor:
    """What is left of pictures [B, 3, SIZE, SIZE] when ``original`` pixels along each side are enlarged to SIZE."""
    small = F.interpolate(pictures, size=(original, original), mode="area")
    return F.interpolate(small, size=(SIZE, SIZE), mode="bilinear", align_corners=False)


def held_out_prompts(count: int, seed: int = 0) -> list[str]:
    """Captions of scenes that training never saw, backgrounds named: of each five one single object, one number and
    three pairs."""
    rng = random.Random(seed)
    kinds = ("single", "number", "pair", "pair", "pair")
    return [draw_scene(kinds[i % len(kinds)], True, rng).caption for i in range(count)]
