"""The cache: what decides a key, what is noticed, what is listed and cleared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gguf_sd.checkpoint import cache
from gguf_sd.cli.cache import model_config, model_path
from gguf_sd.cli.main import main
from gguf_sd.errors import GgufSdError

Make = Callable[..., Path]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUF_SD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_all_that_decides_a_conversion_is_in_its_key(
    tiny_pipeline: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_pipeline(), model)
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(model / "tokenizer", tokenizer)
    settings: dict[str, Any] = {"type": "q8_0", "layout": "native", "ema": False, "preset": None, "safety": True}
    changes: list[dict[str, Any]] = [
        {},
        {"type": "q4_0"},
        {"layout": "comfy"},
        {"ema": True},
        {"preset": "sd15"},
        {"safety": False},
    ]
    paths = [cache.conversion_path(model, settings | change, ()) for change in changes]
    paths.append(cache.conversion_path(model, settings, [tokenizer]))
    (tokenizer / "merges.txt").write_text("#version: 0.2\nc a\n")
    paths.append(cache.conversion_path(model, settings, [tokenizer]))
    monkeypatch.setattr(cache, "converter_version", lambda: "of tomorrow")
    paths.append(cache.conversion_path(model, settings, ()))
    monkeypatch.undo()
    (model / "unet" / "config.json").write_text((model / "unet" / "config.json").read_text() + " ")
    paths.append(cache.conversion_path(model, settings, ()))
    assert len({path.name for path in paths}) == len(paths)


def test_types_in_any_case_are_one_conversion(tiny_pipeline: Make) -> None:
    first = model_path(tiny_pipeline(), "Q4_0", quiet=True)
    before = first.stat().st_mtime_ns
    assert model_path(tiny_pipeline(), "q4_0", quiet=True) == first
    assert first.stat().st_mtime_ns == before
    with pytest.raises(GgufSdError, match="choose from"):
        model_path(tiny_pipeline(), "Q4_0.gguf", quiet=True)


@pytest.mark.parametrize("damage", ["truncated", "no record", "garbled record", "list for a record"])
def test_damage_is_noticed_and_made_good(tiny_pipeline: Make, folder: Path, damage: str) -> None:
    path = model_path(tiny_pipeline(), "q8_0", quiet=True)
    whole, record = path.read_bytes(), folder / f"{path.name}.json"
    if damage == "truncated":
        path.write_bytes(whole[:-10])
    elif damage == "no record":
        record.unlink()
    else:
        record.write_text("{" if damage == "garbled record" else "[1]")
    (folder / cache.HASHES).write_text("[7")
    assert model_path(tiny_pipeline(), "q8_0", quiet=True) == path
    assert path.read_bytes() == whole
    assert cache.is_whole(path)


def test_a_source_is_checked_before_it_is_converted(tiny_pipeline: Make) -> None:
    assert model_config(tiny_pipeline()).unet.block_out_channels == (32, 64)
    path = model_path(tiny_pipeline(), None, quiet=True)
    assert model_config(path).unet == model_config(tiny_pipeline()).unet


def test_two_processes_at_once(tiny_pipeline: Make, folder: Path) -> None:
    code = f"""
from pathlib import Path
from gguf_sd.cli.cache import model_path
print(model_path(Path({str(tiny_pipeline())!r}), "q4_0", quiet=True))
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    paths = {process.communicate(timeout=120)[0].strip() for process in running}
    assert [process.returncode for process in running] == [0, 0]
    (path,) = paths
    assert cache.is_whole(Path(path))
    assert not list(folder.glob(".*"))


def test_listing_and_clearing(tiny_pipeline: Make, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = model_path(tiny_pipeline(), "q4_0", quiet=True)
    new = model_path(tiny_pipeline(), "f16", quiet=True)
    week = time.time() - 7 * cache.DAY
    os.utime(folder / f"{old.name}.json", (week, week))
    (folder / ".cut.gguf.x.partial").touch()
    os.utime(folder / ".cut.gguf.x.partial", (week, week))
    assert main(["cache"]) == 0
    text = capsys.readouterr().out
    assert text.index(new.name) < text.index(old.name)
    assert str(tiny_pipeline().resolve()) in text
    assert main(["cache", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert [row["file"] for row in facts["files"]] == [new.name, old.name]
    assert facts["bytes"] == old.stat().st_size + new.stat().st_size
    assert main(["cache", "clear", "--older-than", "3"]) == 0
    assert not old.exists()
    assert not (folder / ".cut.gguf.x.partial").exists()
    assert main(["cache", "clear", "../elsewhere"]) == 2
    assert main(["cache", "clear", new.stem]) == 0
    assert cache.conversions() == []
    assert {path.name for path in folder.iterdir()} <= {cache.HASHES}


@pytest.mark.parametrize("arguments", [["list", "x"], ["--older-than", "1"], ["clear", "--older-than", "-1"],
                                       ["clear", "--older-than", "nan"]])  # fmt: skip
def test_arguments_that_make_no_sense(arguments: list[str]) -> None:
    assert main(["cache", *arguments]) == 2


def test_listing_needs_no_torch() -> None:
    code = "import sys, gguf_sd.cli.main as m; m.main(['cache']); sys.exit('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=environment, check=False).returncode == 0
