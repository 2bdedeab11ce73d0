"""What the shipped model makes of what it is told of a picture's making: originals of fewer pixels, and crops.

python -m tools.demo_model.turbo.told -o docs/turbo-sizes.png
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from PIL import Image

from gguf_sd import Pipeline
from gguf_sd.demo import turbo_folder
from gguf_sd.demo.check_large import as_tensor, read
from gguf_sd.demo.world_large import ORIGINALS, SIZE
from gguf_sd.imaging.save_png import save_png
from gguf_sd_convert.convert import ConvertOptions, convert
from tools.demo_model.turbo.sizes import steepest

CAPTIONS = (
    "a large red circle on a white background",
    "a large blue square on a white background",
    "a large cyan cross on a white background",
    "a red ring above a blue cross on a grey background",
    "two small yellow squares on a checkered black background",
)
SEED, CROP = 4, 24


def edges(pictures: list[Image.Image]) -> list[int]:
    """Of each the steepest edge, of 255 a pixel."""
    return [round(edge) for edge in steepest(torch.stack([as_tensor(p) for p in pictures]) / 127.5 - 1).tolist()]


def moved(engine: Pipeline, caption: str, seed: int) -> tuple[float, float]:
    """Pixels to the left and up that the first object stands further, told that CROP were cut off."""
    before, after = (read(engine(caption, seed=seed, crop=crop)[0]).objects[0] for crop in ((0, 0), (CROP, CROP)))
    return before.x - after.x, before.y - after.y


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "-o", "--output", type=Path, required=True, help="PNG of originals in rows, captions in columns"
    )
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        convert(turbo_folder(), Path(folder) / "turbo.gguf", ConvertOptions(type="f16"), quiet=True)
        engine = Pipeline.load(Path(folder) / "turbo.gguf", "cpu", "float32")
        originals = sorted((SIZE, *ORIGINALS), reverse=True)
        sheet = Image.new("RGB", (SIZE * len(CAPTIONS), SIZE * len(originals)))
        for column, caption in enumerate(CAPTIONS):
            pictures = [engine(caption, seed=SEED, original_size=(n, n))[0] for n in originals]
            for row, picture in enumerate(pictures):
                sheet.paste(picture, (column * SIZE, row * SIZE))
            steep = ", ".join(f"{edge} ({n})" for edge, n in zip(edges(pictures), originals, strict=True))
            print(f"{caption}: steepest edge, of 255 a pixel, by the original's pixels: {steep}")
        save_png(sheet, chosen.output)
        left, up = zip(*(moved(engine, CAPTIONS[0], seed) for seed in range(8)), strict=True)
    print(f"crop {CROP}x{CROP}: {min(left):.0f} to {max(left):.0f} px to the left, {min(up):.0f} to {max(up):.0f} up")


if __name__ == "__main__":
    main()
