"""A prompt to a picture: convert once, load, paint, save.

    python examples/text_to_image.py [MODEL] [OUTPUT.png]

MODEL is a .gguf file; without one, the built-in demo model is quantised to 4 bits first.
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf_sd
from gguf_sd.demo import model_folder


def main(model: str | None = None, output: str = "text_to_image.png") -> Path:
    if model is None:
        model = str(Path(output).with_name("demo-q4_0.gguf"))
        if not Path(model).exists():
            gguf_sd.convert(model_folder(), model, type="q4_0")
    pipeline = gguf_sd.Pipeline.load(model)
    picture = pipeline("a red circle above a blue square", seed=7)[0]
    picture.save(output)
    return Path(output)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
