"""A part of a picture painted anew: white in the mask is repainted, the rest keeps its very pixels.

python examples/inpainting.py [OUTPUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

from PIL import Image, ImageDraw

import gguf_sd
from gguf_sd.demo import model_folder


def main(output: str = "inpainting.png") -> Path:
    model = Path(output).with_name("demo-q8_0.gguf")
    if not model.exists():
        gguf_sd.convert(model_folder(), model, type="q8_0")
    pipeline = gguf_sd.Pipeline.load(model)
    prompt = "a red circle left of a blue square on a white background"
    picture = pipeline(prompt, seed=5)[0]
    mask = Image.new("L", picture.size, 0)
    ImageDraw.Draw(mask).rectangle((picture.width // 2, 0, picture.width, picture.height), fill=255)
    changed = pipeline(prompt.replace("blue square", "green ring"), image=picture, mask=mask, seed=6)[0]
    changed.save(output)
    return Path(output)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
