"""Pictures that strangers made: read, or refused in a sentence."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gguf_sd.errors import GgufSdError
from gguf_sd.imaging import images
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


@pytest.mark.parametrize("mode", ["P", "L", "LA", "RGBA", "I;16", "I", "F"])
def test_strips_make_the_picture_that_a_whole_one_makes(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(0).integers(0, 256, (23, 17, 4), np.uint8)
    if mode in ("I;16", "I", "F"):
        kinds = {"I;16": np.uint16, "I": np.int32, "F": np.float32}
        image = Image.fromarray(values[..., 0].astype(kinds[mode]) * 100)
    else:
        image = Image.fromarray(values).convert(mode)
        if mode in ("P", "L"):
            image.info["transparency"] = 3
    whole = to_rgb(image)
    monkeypatch.setattr(images, "STRIP", 50)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(whole))
    assert len(set(np.asarray(whole).ravel().tolist())) > 50


@pytest.mark.parametrize("size", [(1, images.MAX_SIDE + 1), (images.MAX_SIDE + 1, 1), (8192, 4097)])
def test_pictures_that_are_too_long_or_too_large(size: tuple[int, int], tmp_path: Path) -> None:
    Image.new("1", size).save(tmp_path / "a.png")
    with pytest.raises(GgufSdError, match=rf"has {size[0]} x {size[1]} pixels; gguf-sd takes up to"):
        open_image(tmp_path / "a.png")
