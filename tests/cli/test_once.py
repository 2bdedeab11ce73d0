"""Notes that are told once a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from gguf_sd.cli.once import REMEMBERED, TOLD, first_time


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GGUF_SD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_once_a_note_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = tmp_path / "a.gguf", tmp_path / "b.gguf"
    assert [first_time("safety", path) for path in (a, b, a, b)] == [True, True, False, False]
    assert first_time("speed", a)
    monkeypatch.chdir(tmp_path)
    assert not first_time("safety", Path("a.gguf"))


@pytest.mark.parametrize("content", ["", "{", "[" * 100_000, '{"a": 1}', "[1, null]"])
def test_a_damaged_memory_is_made_anew(cache: Path, content: str) -> None:
    cache.mkdir()
    (cache / TOLD).write_text(content)
    assert [first_time("safety", Path("m.gguf")) for _ in range(2)] == [True, False]
    assert [path.name for path in cache.iterdir()] == [TOLD]


def test_what_is_remembered_is_bounded(cache: Path) -> None:
    for number in range(3):
        assert first_time("safety", Path(f"{number}.gguf"))
    (cache / TOLD).write_text("[" + ", ".join(f'"{n}"' for n in range(REMEMBERED)) + "]")
    assert first_time("safety", Path("new.gguf"))
    assert len((cache / TOLD).read_text().splitlines()) == REMEMBERED + 2


def test_without_a_cache_it_is_told_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("GGUF_SD_CACHE", str(tmp_path / "file" / "cache"))
    assert [first_time("safety", Path("m.gguf")) for _ in range(2)] == [True, True]
