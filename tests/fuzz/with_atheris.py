"""Coverage-guided fuzzing of the GGUF reader and of the prompt parser, with libFuzzer:

    pip install atheris
    python -m tests.fuzz.with_atheris gguf -max_total_time=600
    python -m tests.fuzz.with_atheris prompt -max_total_time=600

What follows the name goes to libFuzzer. Ends at the first input that ends in anything but success or GgufSdError, and
keeps it in a file. The other mutators know the formats; this one knows which branches were not taken yet.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def reader(atheris: Any, folder: Path) -> Callable[[bytes], None]:
    with atheris.instrument_imports(include=["gguf_sd"]):
        from gguf_sd.checkpoint.gguf_file import GGUFFile
        from gguf_sd.errors import GgufSdError

    writer = gguf.GGUFWriter(folder / "corpus" / "seed", "sd1")
    writer.add_array("comfy.gguf.orig_shape.x", [2, 2])
    writer.add_array("words", ["a", "b"])
    writer.add_string("gguf_sd.shapes", '{"x": [4]}')
    writer.add_tensor("x", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    path = folder / "m.gguf"

    def one(data: bytes) -> None:
        path.write_bytes(data)
        with contextlib.suppress(GgufSdError):
            GGUFFile(path)

    return one


def prompts(atheris: Any, folder: Path) -> Callable[[bytes], None]:
    with atheris.instrument_imports(include=["gguf_sd"]):
        from gguf_sd.imaging.infotext import compose, decompose
        from gguf_sd.prompt.prompts import parse, unsupported

    (folder / "corpus" / "seed").write_text(
        "((a:1.2) [b] \\( BREAK <lora:x:1>\nNegative prompt: x\nSteps: 3, Size: 8x8"
    )

    def one(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        assert all(part.text is None or part.text for part in parse(text))
        list(unsupported(text))
        written = compose(text, text, {"Steps": 1})
        assert decompose(written)[:2] == (text, text), "a prompt comes back as it was"

    return one


def main() -> None:
    import atheris

    kinds = {"gguf": reader, "prompt": prompts}
    if len(sys.argv) < 2 or sys.argv[1] not in kinds:
        sys.exit(f"give one of {', '.join(kinds)}, then libFuzzer's own arguments")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "corpus").mkdir()
        target = kinds[sys.argv[1]](atheris, folder)
        atheris.Setup([sys.argv[0], *sys.argv[2:], str(folder / "corpus")], target)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
