"""What a way to run a job costs in time, on a nominal machine: for comparing ways, not for predicting seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from gguf_sd.runtime.part_bytes import CONTROL, PartBytes

STEPS = 20  # of a picture
# Multiplications of a UNet step for each weight and latent pixel: SD 1.5 has 0.057, SDXL 0.07. Of the VAE for each
# latent pixel, at the UNet's rate: at 512x512 it takes as long as 1.3 guided steps of SD 1.5 (bfloat16, Zen 4).
STEP_PRODUCTS, DECODE_PRODUCTS = 0.06, 1.7e8
# What tiles cost of a whole decode, and a band of a few rows more than a large one. In bfloat16, 512x512, with tiles of
# 48, 32, 24, 16, 12 and 8: 0.31, 0.32, 0.23, 0.61, 0.69, 0.57 (Zen 4, 2 threads); in float32 with AVX2 less.
TILE_EXTRA, TILE_EDGE = 0.2, 4.0
# Of a step on a CPU, with memory that goes back at once and weights decoded in parts: SD 1.5 guided at 512x512 0.28
# alone, 0.5 in four steps of generate; most of it are pages that come anew, and differ from run to run.
FRUGAL_EXTRA = 0.4
SAVED_IN_INT8 = 0.3  # of a step on a CPU, in 8 bits


@dataclass(frozen=True)
class Speed:
    """Rates a second of a nominal machine."""

    read: float  # bytes of a part from the file into its place
    decoded: float  # weights dequantised
    products: float  # multiplications
    second_pass: float  # share of a step that guidance in two passes adds


CPU = Speed(read=2e9, decoded=2.5e9, products=1e11, second_pass=0.03)
GPU = Speed(read=6e9, decoded=2e11, products=1.5e13, second_pass=0.15)


@dataclass(frozen=True)
class Sizes:
    """How much there is to compute."""

    pixels: int  # of a picture's latents
    pictures: int
    halves: int  # of guidance
    gpu: bool


def seconds(
    parts: Mapping[str, PartBytes],
    placement: Mapping[str, str],
    weights: str,
    passes: int,
    tile: int | None,
    frugal: bool,
    sizes: Sizes,
) -> float:
    """Seconds that a way adds to one picture: parts read again, weights decoded, guidance in ``passes``, tiles, pages
    that come anew where it is ``frugal``."""
    speed = GPU if sizes.gpu else CPU
    total = sum(_reading(name, parts[name], how, passes) for name, how in placement.items()) / speed.read
    decodes = STEPS * passes if weights == "quantized" else 0 if placement["unet"] == "resident" else 1
    values = sum(part.values for name, part in parts.items() if name == "unet" or name.startswith(CONTROL))
    total += decodes * values / speed.decoded
    pixels = sizes.pixels * sizes.pictures
    step = STEP_PRODUCTS * parts["unet"].values * pixels * sizes.halves / speed.products
    if passes > 1:
        total += STEPS * speed.second_pass * step
    if frugal:
        total += STEPS * FRUGAL_EXTRA * step
    if weights != "int8" and not sizes.gpu:
        total += STEPS * SAVED_IN_INT8 * step
    if tile is not None:
        total += (TILE_EXTRA + TILE_EDGE / tile) * DECODE_PRODUCTS * pixels / speed.products
    return total


def _reading(name: str, part: PartBytes, placement: str, passes: int) -> float:
    """Bytes read for a picture."""
    if placement == "resident":
        return 0.0
    if placement == "staged":
        return float(part.stored)
    return float(part.stored) * (STEPS * passes if name == "unet" or name.startswith(CONTROL) else 2)
