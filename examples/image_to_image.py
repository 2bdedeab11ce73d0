"""One picture to another: noised part of the way, and painted from there.

    python examples/image_to_image.py [OUTPUT.png]

A quarter of the steps is skipped at a strength of 0.75: what the noise left of the first picture shows in the second.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf_sd
from gguf_sd.demo import model_folder


def main(output: str = "image_to_image.png") -> Path:
    model = Path(output).with_name("demo-q8_0.gguf")
    if not model.exists():
        gguf_sd.convert(model_folder(), model, type="q8_0")
    pipeline = gguf_sd.Pipeline.load(model)
    first = pipeline("a green cross on a black background", seed=3)[0]
    second = pipeline("a yellow cross on a black background", image=first, strength=0.75, seed=4)[0]
    second.save(output)
    return Path(output)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
