"""`gguf-sd batch`, killed at any moment and resumed, ends as if nothing had been."""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

import pytest

from tests.batch.conftest import FAST
from tests.killed import kill, start

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks")]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_killed_and_resumed(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("\n".join(f"a cat {i}" for i in range(12)))
    command = ["batch", "p.txt", "-m", str(tiny_model), "--batch", "3", "--resume", *FAST]

    def run(folder: str) -> float:
        began = time.monotonic()
        process = start([*command, "-o", folder], str(tmp_path))
        process.join(100)
        assert process.exitcode == 0
        return time.monotonic() - began

    run("whole")  # starts the server that forks, too
    seconds, rng, killed = run("again"), random.Random(0), 0
    for index in range(6):
        name = f"out-{index}"
        for _ in range(3):
            killed += kill(start([*command, "-o", name], str(tmp_path)), seconds * rng.random() * 0.7)
        run(name)
        assert contents(tmp_path / name) == contents(tmp_path / "whole")
    assert killed > 6
