"""A tiny model, and the command that paints with it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_sd.cli.main import main

FAST = ["--steps", "2", "--width", "32", "--height", "32", "--device", "cpu", "--dtype", "float32", "--quiet"]
Batch = Callable[..., int]


@pytest.fixture
def batch(tiny_model: Path, tmp_path: Path) -> Batch:
    """Writes a file of prompts and runs `gguf-sd batch` on it; the exit code."""

    def run(name: str, text: str, output: str, *options: str) -> int:
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return main(["batch", str(path), "-m", str(tiny_model), "-o", str(tmp_path / output), *FAST, *options])

    return run
