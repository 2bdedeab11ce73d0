"""Killed at any moment, a command leaves whole files or none, and the next run is right and tidies up."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
from PIL import Image

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.imaging.png_metadata import read_parameters
from gguf_sd_convert.convert import ConvertOptions, convert
from tests.fuzz.material import SMALL
from tests.killed import kill, start

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and asks /proc")
COMMANDS = ("convert", "generate", "cache", "resume", "batch", "tune")
SIZE = ["--steps", "1", "--width", "32", "--height", "32", "--device", "cpu", "--safety", "off"]


class Killer:
    """Runs a command to its end once, then kills it at random moments of that time."""

    def __init__(self, source: Path, folder: Path):
        self.source, self.folder = source, folder
        self.whole = folder.parent / "whole.gguf"
        convert(source, self.whole, ConvertOptions(type="q4_0"))
        os.utime(self.whole)
        self.environment = {
            "GGUF_SD_CACHE": str(folder),
            "GGUF_SD_NATIVE": "0",
            "TRITON_INTERPRET": "1",
            "GGUF_SD_SELF_CHECK": "1",
        }
        prompts = folder.parent / "prompts.txt"
        prompts.write_text("a cat\n" * 4)
        whole, count = str(self.whole), ["--count", "4", "--seed", "1"]
        self.commands = {
            "convert": ["convert", str(source), "-o", "m.gguf", "--type", "q4_0", "--force"],
            "generate": ["generate", whole, "-p", "a cat", *count, *SIZE],
            "cache": ["generate", str(source), "-p", "a cat", "-o", "x.png", "--force", "--seed", "1", *SIZE],
            "resume": ["generate", whole, "-p", "a cat", "-o", "y.png", "--batch", "2", "--resume", *count, *SIZE],
            "batch": ["batch", str(prompts), "-m", whole, "-o", "pictures", "--batch", "2", "--resume", *SIZE],
            "tune": ["tune", whole, "--device", "cpu", "--size", "64x64", "--seconds", "off", "--dtype", "float16"],
        }
        self.seconds = {name: self.run(name) for name in self.commands}
        self.pictures = self.painted()
        assert len(self.pictures) == 4 + 1 + 4 + 4
        assert tuple(self.commands) == COMMANDS
        self.clear()

    def run(self, name: str) -> float:
        started = time.monotonic()
        process = self.start(name)
        process.join(200)
        assert process.exitcode == 0, name
        return time.monotonic() - started

    def start(self, name: str, killed_at: int = 0) -> BaseProcess:
        return start(self.commands[name], str(self.folder), self.environment, killed_at)

    def clear(self) -> None:
        for path in self.folder.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def painted(self) -> dict[str, bytes]:
        return {str(path.relative_to(self.folder)): path.read_bytes() for path in sorted(self.folder.rglob("*.png"))}

    def check(self) -> int:
        """Looks at what lies there; the number of unfinished files."""
        for path in self.folder.rglob("*"):
            if path.suffix == ".gguf":
                assert path.read_bytes() == self.whole.read_bytes() or ModelFile.open(path).config
            elif path.suffix == ".png":
                Image.open(path).load()
                assert read_parameters(path)["prompt"] == "a cat"
            elif path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                *lines, _ = path.read_text().split("\n")  # the last may be cut short
                assert all(json.loads(line)["file"] for line in lines)
            else:
                assert path.suffix in (".partial", ".lock") or path.is_dir(), path
        return len(list(self.folder.rglob(".*.partial")))

    def kill(self, count: int) -> tuple[int, int]:
        """How many were killed in time, and how many unfinished files they left."""
        rng, killed, left = random.Random(0), 0, 0
        for index in range(count):
            name = list(self.commands)[index % len(self.commands)]
            killed += kill(self.start(name), self.seconds[name] * rng.random())
            left += self.check()
        for name in self.commands:
            self.run(name)
        assert self.check() == 0, "the next run removes what a killed one left"
        assert (self.folder / "m.gguf").read_bytes() == self.whole.read_bytes()
        found = self.painted()
        same = [name for name in self.pictures if name == "out-0001.png" or not name.startswith("out-")]
        assert [found.get(name) == self.pictures[name] for name in same] == [True] * 10, "as if nothing had been"
        return killed, left


@pytest.fixture(scope="module")
def shared_killer(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Killer:
    folder = tmp_path_factory.mktemp("kills") / "folder"
    folder.mkdir()
    return Killer(tiny_pipeline(**SMALL), folder)


@pytest.fixture
def killer(shared_killer: Killer) -> Killer:
    shared_killer.clear()
    return shared_killer


def test_ten_kills(killer: Killer) -> None:
    killed, _ = killer.kill(10)
    assert killed >= 5


@pytest.mark.slow
def test_two_hundred_kills(killer: Killer) -> None:
    killed, left = killer.kill(200)
    print(f"{killed} of 200 killed in time, {left} unfinished files seen on the way")
    assert killed > 100


def kill_at(killer: Killer, name: str, number: int) -> bool:
    """Kills a command before its so many-th change of a file, then runs it to its end; False where it has fewer."""
    process = killer.start(name, number)
    process.join(600)
    if process.exitcode == 0:
        return False
    assert process.exitcode == -signal.SIGKILL, (name, number)
    killer.check()
    killer.run(name)
    assert killer.check() == 0, f"{name}, killed before change {number}, left what the next run has not removed"
    return True


@pytest.mark.parametrize("name", [name for name in COMMANDS if name != "tune"])  # tuning takes its time
def test_kills_between_two_calls(killer: Killer, name: str) -> None:
    """The second and the third of a command's: where it has just made the first file."""
    assert kill_at(killer, name, 2)
    killer.clear()
    kill_at(killer, name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_a_kill_before_each_call(killer: Killer, name: str) -> None:
    number = 1
    while kill_at(killer, name, number):
        killer.clear()
        number += 1
    print(f"{name}: killed at {number - 1} moments")
    assert number > 4
