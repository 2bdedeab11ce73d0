"""Pictures that strangers made: read, or refused in a sentence."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import open_image, to_rgb
from gguf_sd.imaging.masks import to_mask
from gguf_sd.server.uploads import from_bytes
from tests.fuzz.file_mutators import chunk


def palette_png(alphas: int) -> bytes:
    """Of two colours and as many transparencies."""
    image, buffer = Image.new("P", (2, 1)), io.BytesIO()
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((1, 0), 1)
    image.save(buffer, "PNG", bits=1)
    before, data, after = buffer.getvalue().partition(b"IDAT")
    before, data = before[:-4], before[-4:] + data
    return before + chunk(b"tRNS", bytes(alphas)) + data + after


def test_a_palette_with_a_transparent_colour(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(palette_png(1))
    image = open_image(tmp_path / "a.png")
    assert [to_rgb(image).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]
    assert [to_mask(image).getpixel((x, 0)) for x in (0, 1)] == [255, 0]


@pytest.mark.parametrize(
    "reader", [lambda path: open_image(path), lambda path: from_bytes(path.read_bytes(), "it", 99)]
)
def test_more_transparent_colours_than_there_are(tmp_path: Path, reader: Callable[[Path], Image.Image]) -> None:
    (tmp_path / "a.png").write_bytes(palette_png(300))
    with pytest.raises(GgufSdError, match=r"cannot (read|be read)"):
        reader(tmp_path / "a.png")
