"""What `gguf-sd demo` and `gguf-sd bench` have to know of the built-in models: their prompts, and who judges them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_sd.demo import model_folder, star_file, turbo_folder

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True)
class DemoModel:
    """A built-in model. ``stem`` begins the names of its files; ``steps`` to compare, none for its default alone."""

    stem: str
    folder: Path
    shown: tuple[str, ...]  # on the contact sheet
    steps: tuple[int, ...]
    larger: bool  # which of the worlds it paints
    lora: tuple[Path, str] | None = None  # one that ships for it, and a prompt that needs it

    @property
    def sheet(self) -> str:
        """Name of the contact sheet's file."""
        return "turbo-sheet.png" if self.larger else "sheet.png"

    def prompts(self, count: int, seed: int, held: bool = True) -> list[str]:
        """Captions of scenes that training never saw (``held``) or did: one kind of scene in turn with the others."""
        rng = random.Random(seed)
        if self.larger:
            from gguf_sd.demo.world_large import draw_scene

            kinds = ("single", "pair", "number", "pair")
            return [draw_scene(kinds[i % 4], held, rng).caption for i in range(count)]
        from gguf_sd.demo.world import scenes

        choices = {objects: scenes(held=held, objects=objects) for objects in (1, 2)}
        return [rng.choice(choices[1 if i % 4 == 0 else 2]).caption for i in range(count)]

    def share_correct(self, pictures: Sequence[Image.Image], captions: Sequence[str]) -> float | None:
        """Of the pictures, those that show what their captions say; None where captions are not all of this model's
        world or the pictures not of its size."""
        from gguf_sd.demo import check, check_large, world, world_large

        size = world_large.SIZE if self.larger else world.SIZE
        if not pictures or any(picture.size != (size, size) for picture in pictures):
            return None
        pairs = list(zip(pictures, captions, strict=True))
        try:
            if self.larger:
                large = [(picture, world_large.parse(caption)) for picture, caption in pairs]
                return sum(check_large.judge(*pair).all for pair in large) / len(pairs)
            small = [(picture, world.parse(caption)) for picture, caption in pairs]
            return sum(check.judge(*pair).all for pair in small) / len(pairs)
        except ValueError:
            return None


DEMO_MODELS = {
    "sd": DemoModel(
        stem="demo",
        folder=model_folder(),
        shown=(
            "a red circle above a blue square",
            "a yellow triangle left of a purple ring",
            "a green cross on a black background",
            "a cyan ring below a red triangle on a white background",
            "a purple square on a grey background",
            "a blue cross right of a yellow circle on a black background",
        ),
        steps=(),
        larger=False,
    ),
    "turbo": DemoModel(
        stem="turbo",
        folder=turbo_folder(),
        shown=(
            "a large red circle above a small blue square",
            "three yellow triangles on a checkered black background",
            "a purple ring left of a green cross on a white background",
            "two small cyan squares on a striped grey background",
            "a large green triangle on a checkered white background",
            "a small red ring below a large yellow circle on a striped black background",
        ),
        steps=(1, 2, 4),
        larger=True,
        lora=(star_file(), "a red star on a white background"),
    ),
}


def demo_model(folder: Path) -> DemoModel | None:
    """The built-in model of a folder, if it is one's."""
    return next((model for model in DEMO_MODELS.values() if model.folder.resolve() == folder.resolve()), None)


def share_correct(pictures: Sequence[Image.Image], captions: Sequence[str]) -> float | None:
    """As :meth:`DemoModel.share_correct`, of the model that paints pictures of this size and such captions, if any."""
    shares = (model.share_correct(pictures, captions) for model in DEMO_MODELS.values())
    return next((share for share in shares if share is not None), None)
