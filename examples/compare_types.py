"""What a type costs: bytes of the file, and decibels between its picture and the one from F16.

python examples/compare_types.py [FOLDER]
"""

from __future__ import annotations

import sys
from pathlib import Path

import gguf_sd
from gguf_sd.demo import model_folder
from gguf_sd.quality import psnr

TYPES = ("f16", "q8_0", "q4_1", "q4_0")
PROMPT = "a yellow triangle left of a purple ring"


def main(folder: str = ".") -> dict[str, tuple[int, float]]:
    """Type -> (bytes of the file, PSNR in dB)."""
    pictures, found = {}, {}
    for kind in TYPES:
        model = Path(folder) / f"demo-{kind}.gguf"
        if not model.exists():
            gguf_sd.convert(model_folder(), model, type=kind)
        pictures[kind] = gguf_sd.Pipeline.load(model, dtype="float32")(PROMPT, seed=1)[0]
        found[kind] = (model.stat().st_size, psnr(pictures[kind], pictures["f16"]))
    return found


if __name__ == "__main__":
    for name, (nbytes, decibels) in main(*sys.argv[1:]).items():
        print(f"{name:5} {nbytes:>12,} bytes  {decibels:5.1f} dB")
