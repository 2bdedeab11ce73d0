"""Killed at any moment, a command leaves whole files or none, and the next run is right and tidies up."""

from __future__ import annotations

import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.imaging.png_metadata import read_parameters
from gguf_sd_convert.convert import ConvertOptions, convert
from tests.killed import kill, start

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and asks /proc")
SIZE = ["--steps", "1", "--width", "32", "--height", "32", "--device", "cpu", "--safety", "off"]


class Killer:
    """Runs a command to its end once, then kills it at random moments of that time."""

    def __init__(self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.source, self.folder = source, folder
        self.whole = folder.parent / "whole.gguf"
        convert(source, self.whole, ConvertOptions(type="q4_0"))
        os.utime(self.whole)
        monkeypatch.setenv("GGUF_SD_CACHE", str(folder))
        self.commands = {
            "convert": ["convert", str(source), "-o", "m.gguf", "--type", "q4_0", "--force"],
            "generate": ["generate", str(self.whole), "-p", "a cat", "--count", "4", "--seed", "1", *SIZE],
            "cache": ["generate", str(source), "-p", "a cat", "-o", "x.png", "--force", "--seed", "1", *SIZE],
        }
        self.seconds = {name: self.run(name) for name in self.commands}
        self.picture = (folder / "out-0001.png").read_bytes()
        self.clear()

    def run(self, name: str) -> float:
        started = time.monotonic()
        process = start(self.commands[name], str(self.folder))
        process.join(100)
        assert process.exitcode == 0, name
        return time.monotonic() - started

    def clear(self) -> None:
        for path in self.folder.iterdir():
            path.unlink()

    def check(self) -> int:
        """Looks at what lies there; the number of unfinished files."""
        for path in self.folder.iterdir():
            if path.suffix == ".gguf":
                assert path.read_bytes() == self.whole.read_bytes() or ModelFile.open(path).config
            elif path.suffix == ".png":
                Image.open(path).load()
                assert read_parameters(path)["prompt"] == "a cat"
            else:
                assert path.suffix in (".partial", ".json")
        return len(list(self.folder.glob(".*.partial")))

    def kill(self, count: int) -> tuple[int, int]:
        """How many were killed in time, and how many unfinished files they left."""
        rng, killed, left = random.Random(0), 0, 0
        for index in range(count):
            name = list(self.commands)[index % len(self.commands)]
            killed += kill(start(self.commands[name], str(self.folder)), self.seconds[name] * rng.random())
            left += self.check()
        for name in self.commands:
            self.run(name)
        assert self.check() == 0, "the next run removes what a killed one left"
        assert (self.folder / "m.gguf").read_bytes() == self.whole.read_bytes()
        assert (self.folder / "x.png").exists()
        assert (self.folder / "out-0001.png").read_bytes() == self.picture
        return killed, left


@pytest.fixture
def killer(tiny_pipeline: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Killer:
    folder = tmp_path / "folder"
    folder.mkdir()
    return Killer(tiny_pipeline(), folder, monkeypatch)


def test_ten_kills(killer: Killer) -> None:
    killed, _ = killer.kill(10)
    assert killed >= 5


@pytest.mark.slow
def test_two_hundred_kills(killer: Killer) -> None:
    killed, left = killer.kill(200)
    print(f"{killed} of 200 killed in time, {left} unfinished files seen on the way")
    assert killed > 100
