"""The examples run, and paint what they say."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gguf_sd.demo.check import judge
from gguf_sd.demo.world import parse

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "caption"),
    [
        ("text_to_image", "a red circle above a blue square"),
        ("image_to_image", "a yellow cross on a black background"),
        ("inpainting", "a red circle left of a green ring on a white background"),
        ("own_sampling_loop", "a cyan ring below a red triangle"),
    ],
)
def test_a_picture_shows_its_caption(name: str, caption: str, tmp_path: Path) -> None:
    target = tmp_path / "picture.png"
    main = load(name).main
    path = main(None, str(target)) if name == "text_to_image" else main(str(target))
    pixels = np.asarray(Image.open(path).convert("RGB"))
    assert judge(Image.fromarray(pixels), parse(caption)).all


def test_types_are_compared(tmp_path: Path) -> None:
    found = load("compare_types").main(str(tmp_path))
    sizes, decibels = zip(*found.values(), strict=True)
    assert list(sizes) == sorted(sizes, reverse=True)
    assert decibels[0] == float("inf")
    assert decibels[1] > 50 > decibels[3] > 30


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {
        "text_to_image", "image_to_image", "inpainting", "compare_types", "own_sampling_loop",
    }  # fmt: skip
