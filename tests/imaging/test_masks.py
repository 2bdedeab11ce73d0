"""Masks as editors save them, thin ones, and how mask and picture stay together."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import open_image, resized, resized_like, to_rgb
from gguf_sd.imaging.masks import fitted_mask, latent_mask, pasted, to_mask

SIZE = (64, 48)


def left_half(size: tuple[int, int] = SIZE) -> Image.Image:
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    return mask


@pytest.mark.parametrize("mode", ["L", "1", "P", "RGB", "RGBA", "LA", "I;16", "I", "F"])
def test_opaque_masks_of_every_mode_are_read_by_brightness(mode: str) -> None:
    mask = left_half()
    if mode in ("I;16", "I"):
        image = Image.fromarray(np.asarray(mask).astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    elif mode == "F":
        image = Image.fromarray(np.asarray(mask).astype(np.float32) / 255)
    else:
        image = mask.convert(mode)
    assert image.mode == mode
    assert np.array_equal(np.asarray(to_mask(image)), np.asarray(mask))


def test_transparency_rules_where_there_is_some() -> None:
    clear = Image.new("RGBA", SIZE, "white")
    clear.putalpha(Image.eval(left_half(), lambda value: 255 - value))
    assert np.array_equal(np.asarray(to_mask(clear)), np.asarray(left_half()))
    palette = left_half().convert("P")
    palette.info["transparency"] = bytes(255 - i for i in range(256))  # index 255, the left half, is clear
    assert np.array_equal(np.asarray(to_mask(palette)) > 0, np.asarray(left_half()) > 0)
    opaque = left_half().convert("P")
    opaque.info["transparency"] = bytes([255] * 256)
    assert np.array_equal(np.asarray(to_mask(opaque)), np.asarray(left_half()))


def test_deep_pictures_are_scaled(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16)[None].repeat(8, 0)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    got = np.asarray(to_rgb(open_image(tmp_path / "deep.png")))[0, :, 0].astype(int)
    assert np.abs(got - np.linspace(0, 255, 64)).max() <= 1
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "deep.tiff")
    got = np.asarray(to_rgb(open_image(tmp_path / "deep.tiff")))[0, :, 0].astype(int)
    assert np.abs(got - np.linspace(0, 255, 64)).max() <= 1
    with pytest.raises(GgufSdError, match="not finite"):
        to_rgb(Image.fromarray(np.full((8, 8), np.nan, np.float32)))


@pytest.mark.parametrize("mode", ["crop", "fit", "stretch"])
@pytest.mark.parametrize("scale", [0.5, 1, 2])
@pytest.mark.parametrize("target", [(64, 64), (96, 32), (32, 96)])
def test_mask_and_picture_stay_together(mode: str, scale: float, target: tuple[int, int]) -> None:
    """A mask of another size covers the same part of the picture afterwards, even where its proportions differ."""
    picture = Image.new("L", (200, 100))
    picture.paste(255, (60, 30, 140, 80))
    small = (round(200 * scale), round(80 * scale))
    mask = picture.resize(small, Image.Resampling.BOX)
    expected = np.asarray(resized(picture, *target, mode)) >= 128
    got = np.asarray(fitted_mask(mask, picture.size, *target, mode)) >= 128
    assert (got != expected).mean() < 0.03
    assert 0.02 < expected.mean() < 0.9
    assert resized_like(mask, picture.size, *target, mode).size == target


@pytest.mark.parametrize("image", [Image.new("L", SIZE), Image.new("RGBA", SIZE, (0, 0, 0, 255))])
def test_a_mask_that_selects_nothing(image: Image.Image) -> None:
    with pytest.raises(GgufSdError, match="the mask selects nothing: no part is white or transparent"):
        fitted_mask(image, SIZE, *SIZE, "crop")
    edge = Image.new("L", (200, 50))
    edge.paste(255, (0, 0, 20, 50))
    with pytest.raises(GgufSdError, match="the mask selects nothing at 48 x 48: its white part was cut off"):
        fitted_mask(edge, (200, 50), 48, 48, "crop")


@pytest.mark.parametrize("blur", [4, 64])
@pytest.mark.parametrize("width", [1, 2, 3, 7, 8])
def test_thin_lines_survive_the_blur(blur: int, width: int) -> None:
    mask = Image.new("L", SIZE)
    mask.paste(255, (0, 20, SIZE[0], 20 + width))
    black, white = Image.new("RGB", SIZE), Image.new("RGB", SIZE, "white")
    rows = np.asarray(pasted(white, black, mask, blur))[:, 32, 0]
    assert rows.max() == 255
    assert not rows[:20].any()
    assert not rows[20 + width :].any()
    assert (rows[20 : 20 + width] > 0).all()


def test_the_blur_rises_over_its_pixels() -> None:
    mask = left_half((256, 48))
    black, white = Image.new("RGB", mask.size), Image.new("RGB", mask.size, "white")
    row = np.asarray(pasted(white, black, mask, 16))[24, :, 0].astype(int)
    assert row[111] == 255
    assert (np.diff(row[110:129]) <= 0).all()
    assert 0 < row[127] < 32
    assert abs(row[119] - 128) < 16
    assert not row[128:].any()


def test_a_large_blur_takes_no_longer_than_its_pixels() -> None:
    mask = Image.new("L", (512, 512))
    mask.paste(255, (50, 50, 460, 460))
    started = time.process_time()
    pasted(Image.new("RGB", mask.size), Image.new("RGB", mask.size), mask, 64)
    assert time.process_time() - started < 1.5  # 0.06 s; 5.8 s where each pixel looks at its whole square


def test_a_line_between_the_latents_is_repainted() -> None:
    hole = torch.zeros(1, 1, 64, 64)
    hole[..., 9:12, :] = 1
    mask = latent_mask(hole, (8, 8))
    assert mask[0, 0, :, 0].tolist() == [0, 1, 0, 0, 0, 0, 0, 0]


def png_header(width: int, height: int) -> bytes:
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_huge_foreign_and_broken_pictures(tmp_path: Path) -> None:
    def refused(name: str, data: bytes, message: str) -> None:
        (tmp_path / name).write_bytes(data)
        with pytest.raises(GgufSdError, match=message) as raised:
            open_image(tmp_path / name)
        assert "\n" not in str(raised.value)

    refused("huge.png", png_header(12000, 11000), "huge.png has 12000 x 11000 pixels; gguf-sd takes up to")
    refused("broken.png", png_header(8, 8), "cannot read the picture .*broken.png")
    refused("page.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "it is none of PNG, JPEG")
    Image.new("RGB", (64, 64), "red").save(tmp_path / "whole.webp")
    refused("cut.webp", (tmp_path / "whole.webp").read_bytes()[:40], "cannot read the picture .*cut.webp")
    with pytest.raises(GgufSdError, match="is no file"):
        open_image(tmp_path)
