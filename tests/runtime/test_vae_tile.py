"""A tile that was asked for: taken from users' words, kept to by the plan, painted with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gguf_sd.errors import GgufSdError
from gguf_sd.pipeline import Pipeline
from gguf_sd.request import Request
from gguf_sd.runtime.execution import checked_tile


@pytest.mark.parametrize(
    ("given", "taken"),
    [(None, "auto"), ("AUTO", "auto"), ("on", "on"), ("off", "off"), (32, 32), ("24", 24), ("32x48", 32)],
)
def test_words_for_a_tile(given: Any, taken: int | str) -> None:
    assert checked_tile(given) == taken


@pytest.mark.parametrize("given", [0, -8, "", "big", "8x", "8x8x8", "0x9", "1.5", True, "٣", "1000000"])
def test_no_tile(given: Any) -> None:
    with pytest.raises(GgufSdError, match=r"the VAE tile .* is no size; it takes auto, on, off, or an edge"):
        checked_tile(given)


def test_the_plan_keeps_to_it(tiny_model: Path) -> None:
    request = Request("a cat", steps=1, width=80, height=64, seed=1)
    pictures = []
    for asked, planned in ((None, None), ("off", None), ("on", 8), (2, 2)):
        pipeline = Pipeline.load(tiny_model, "cpu", "float32", vae_tile=asked)
        [picture] = pipeline.paint(pipeline.prepare(request))
        assert picture.plan is not None
        assert picture.plan.vae_tile == planned
        pictures.append(np.asarray(picture.image).astype(int))
    for other in pictures[1:]:
        assert np.abs(other - pictures[0]).max() <= 1
