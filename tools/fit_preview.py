"""Fits the linear maps from latents to colours that `gguf_sd/preview.py` holds, and prints them.

    python tools/fit_preview.py ../shared/data/taesd

The folder holds TAESD and TAESDXL as published (https://github.com/madebyollin/taesd). Photographs of scikit-image go
through each encoder; each latent is paired with the mean colour of the 8x8 pixels that it stands for, and least
squares gives the map. Each photograph enters in its own colours and, with a twentieth of the weight, in the five other
orders of its channels: a map that has seen few colours errs on others, one that has seen all equally errs on the usual.

R² is on the photographs' own colours. "held out" is the PSNR, in dB, of a photograph's colours by the map fitted to all
others: 19.5 (sd1) and 19.8 (sdxl) on average, against 19.4 and 19.8 without other orders and 18.8 and 19.0 with equal
weights; on other orders of a photograph that was held out, 18.3 and 18.2 against 17.4 and 17.6.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage.data
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gguf_sd.checkpoint.vae_file import load_vae_file
from gguf_sd.imaging.images import resized, to_tensor
from gguf_sd.models.tiny_vae import TinyAutoencoder
from gguf_sd.models.vae import Autoencoder

FILES = {"sd1": "taesd_decoder.safetensors", "sdxl": "taesdxl_decoder.safetensors"}
PHOTOGRAPHS: dict[str, Callable[[], np.ndarray]] = {
    "astronaut": skimage.data.astronaut,
    "cat": skimage.data.chelsea,
    "coffee": skimage.data.coffee,
    "galaxies": skimage.data.hubble_deep_field,
    "tissue": skimage.data.immunohistochemistry,
    "motorcycle": lambda: skimage.data.stereo_motorcycle()[0],
    "retina": skimage.data.retina,
    "rocket": skimage.data.rocket,
}
SIZE, CELL = 256, 8  # pixels
ORDERS = list(itertools.permutations(range(3)))  # the first leaves the colours as they are
WEIGHTS = [1.0] + [0.05] * 5

Pairs = tuple[Tensor, Tensor]  # latents [n, 5] and colours [n, 3]


@torch.inference_mode()
def samples(vae: Autoencoder | TinyAutoencoder, picture: Image.Image, order: tuple[int, ...]) -> Pairs:
    """Latents and a one [n, 5], and the colours [n, 3] in 0 … 1 that belong to them."""
    pixels = to_tensor(resized(picture, SIZE, SIZE, "crop"))[:, list(order)]
    latents, _ = vae.encode(pixels)
    colours = F.avg_pool2d(pixels / 2 + 0.5, CELL)
    rows = latents[0].flatten(1).T.double()
    return torch.cat([rows, torch.ones(len(rows), 1)], 1), colours[0].flatten(1).T.double()


def fit(photographs: list[list[Pairs]]) -> Tensor:
    """The map [5, 3]: a row for each latent channel, then the constant."""
    weighted = [
        (math.sqrt(weight) * latents, math.sqrt(weight) * colours)
        for orders in photographs
        for (latents, colours), weight in zip(orders, WEIGHTS, strict=True)
    ]
    latents, colours = (torch.cat(part) for part in zip(*weighted, strict=True))
    return torch.linalg.lstsq(latents, colours).solution


def r_squared(found: Tensor, data: list[Pairs]) -> float:
    """The share of the colours' variance that the map explains."""
    latents, colours = (torch.cat(part) for part in zip(*data, strict=True))
    left = (latents @ found - colours).square().sum()
    return float(1 - left / (colours - colours.mean(0)).square().sum())


def psnr(found: Tensor, data: Pairs) -> float:
    latents, colours = data
    return -10 * math.log10(float((latents @ found - colours).square().mean()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the tiny autoencoders lie")
    folder = parser.parse_args().folder
    pictures = {name: Image.fromarray(read()) for name, read in PHOTOGRAPHS.items()}
    for name, file in FILES.items():
        vae = load_vae_file(folder / file, torch.float32)
        data = {key: [samples(vae, picture, order) for order in ORDERS] for key, picture in pictures.items()}
        found = fit(list(data.values()))
        print(f'    "{name}": (  # R² {r_squared(found, [orders[0] for orders in data.values()]):.2f}')
        for row in found.tolist():
            print(f"        ({', '.join(f'{value:.4f}' for value in row)}),")
        print("    ),")
        for key, orders in data.items():
            others = fit([rest for other, rest in data.items() if other != key])
            print(f"    # {key}: {psnr(found, orders[0]):.1f} dB, held out {psnr(others, orders[0]):.1f} dB")


if __name__ == "__main__":
    main()
