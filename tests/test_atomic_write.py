"""Every way in which writing can fail ends in one sentence and leaves no file, and dead processes' leavings go."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gguf_sd import atomic_write
from gguf_sd.atomic_write import put_if_free, put_in_place, temporary_beside
from gguf_sd.checkpoint import cache
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.save_png import save_png
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_kernels import writers

Make = Callable[..., Path]
PICTURE = Image.effect_noise((64, 64), 90)


def write(how: str, source: Path, target: Path, progress: Any = None) -> None:
    if how == "convert":
        convert(source, target, ConvertOptions(type="f16", force=True, threads=1), progress)
    elif how == "picture":
        save_png(PICTURE, target, {"parameters": "x"})
    elif how == "new picture":
        save_png(PICTURE, target, replace=False)
    else:
        cache._write_json(target, {"a": "b" * 3000})


@contextmanager
def largest_file(nbytes: int) -> Iterator[None]:
    """Of this process, as by `ulimit -f`: writing more fails, at whatever write it is."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


HOWS = ("convert", "picture", "new picture", "record")


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("old", [True, False])
def test_a_disk_that_is_full_sooner_or_later(tiny_pipeline: Make, tmp_path: Path, how: str, old: bool) -> None:
    source, target = tiny_pipeline(), tmp_path / "target"
    write(how, source, target)
    size = target.stat().st_size
    before = target.read_bytes() if old else b""
    target.unlink()
    if old and how != "new picture":
        target.write_bytes(before)
    for limit in (0, 100, size // 2, size - 1):
        with pytest.raises(GgufSdError, match=r"cannot write .*target: File too large"), largest_file(limit):
            write(how, source, target)
        assert [path.read_bytes() for path in tmp_path.iterdir()] == ([before] if target.exists() else [])


CALLS = {"replace": ("convert", "picture", "record"), "fsync": HOWS, "open": HOWS}


@pytest.mark.parametrize(("call", "how"), [(call, how) for call, hows in CALLS.items() for how in hows])
def test_whatever_call_is_refused(
    tiny_pipeline: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, call: str
) -> None:
    source = tiny_pipeline()
    monkeypatch.setattr(atomic_write.os, call, refuse)
    with pytest.raises(GgufSdError, match=r"cannot write .*: No space left on device"):
        write(how, source, tmp_path / "target")
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == []


def refuse(*args: object, **kwargs: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_file_system_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_write.os, "link", refuse)
    write("new picture", tmp_path, tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]
    with pytest.raises(FileExistsError):
        write("new picture", tmp_path, tmp_path / "target")
    (tmp_path / "target").unlink()
    monkeypatch.setattr(atomic_write.os, "replace", refuse)
    with pytest.raises(GgufSdError, match="No space left"):
        write("new picture", tmp_path, tmp_path / "target")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("how", ["convert", "picture"])
def test_a_folder_that_vanishes(tiny_pipeline: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    folder, source = tmp_path / "folder", tiny_pipeline()
    folder.mkdir()
    sync = atomic_write._sync

    def vanish(path: Path) -> None:
        sync(path)
        shutil.rmtree(folder)

    monkeypatch.setattr(atomic_write, "_sync", vanish)
    with pytest.raises(GgufSdError, match=r"cannot write .*target: No such file"):
        write(how, source, folder / "target")
    with pytest.raises(GgufSdError, match=r"cannot write to|is no folder"):
        write(how, source, folder / "target")


def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems refuse, and Windows opens none: what was written is there all the same."""
    opened = os.open
    for name in ("nt", os.name):

        def refuse(path: Any, *args: Any) -> int:
            if Path(path).is_dir():
                assert os.name != "nt", "no folder is opened there"
                raise OSError(errno.EINVAL, "Invalid argument")
            return opened(path, *args)

        with monkeypatch.context() as patch, temporary_beside(tmp_path / "a") as temporary:
            patch.setattr(atomic_write.os, "open", refuse)
            patch.setattr(atomic_write.os, "name", name)
            put_in_place(temporary, tmp_path / "a")
        assert (tmp_path / "a").exists()


def test_the_umask_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It belongs to the whole process, other threads too; files get what it says all the same."""
    before = os.umask(0o027)
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("set the umask"))
    try:
        save_png(PICTURE, tmp_path / "a.png")
        assert (tmp_path / "a.png").stat().st_mode & 0o777 == 0o640
    finally:
        monkeypatch.undo()
        os.umask(before)


def partial_of_another(target: Path, wait: bool) -> tuple[Path, subprocess.Popen[str]]:
    """A process that begins to write a target, and then waits or is killed."""
    code = "import sys, time; from pathlib import Path; from gguf_sd.atomic_write import temporary_beside\n"
    code += "with temporary_beside(Path(sys.argv[1])) as path: print(path, flush=True); time.sleep(60)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(target)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    path = Path(process.stdout.readline().strip())
    if not wait:
        process.send_signal(signal.SIGKILL)
        process.wait()
    return path, process


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes there are")
def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    left, _ = partial_of_another(tmp_path / "m.png", wait=False)
    other = tmp_path / left.name.replace("m.png", "n.png", 1)
    other.touch()
    stranger = tmp_path / ".m.png.partial"  # no name of ours
    stranger.touch()
    reused = tmp_path / left.name.replace(left.name.split("-")[1], str(os.getpid()))  # our number, another start
    reused.touch()
    assert left.exists()
    save_png(PICTURE, tmp_path / "m.png")
    assert {path.name for path in tmp_path.iterdir()} == {"m.png", stranger.name}


def test_files_of_another_machine_are_left_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "m.png"
    with monkeypatch.context() as patch:
        patch.setattr(writers, "_host", lambda: "0" * 8)
        theirs = writers.temporary_name(target)
    theirs.touch()
    save_png(PICTURE, target)
    assert theirs.exists()
    os.utime(theirs, (0, 0))
    save_png(PICTURE, target)
    assert not theirs.exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="asks /proc which processes there are")
def test_the_second_writer_of_a_target_is_told(tiny_pipeline: Make, tmp_path: Path) -> None:
    source, target = tiny_pipeline(), tmp_path / "m.gguf"
    left, process = partial_of_another(target, wait=True)
    try:
        with pytest.raises(GgufSdError, match=rf"process {process.pid} is writing .*m\.gguf already; wait for it"):
            convert(source, target, ConvertOptions(force=True))
        assert list(tmp_path.iterdir()) == [left]
        convert(source, target, ConvertOptions(force=True, shared=True))
    finally:
        process.kill()
        process.wait()
    convert(source, target, ConvertOptions(force=True))
    assert [path.name for path in tmp_path.iterdir()] == ["m.gguf"]


def test_what_appears_while_it_is_converted_is_kept(tiny_pipeline: Make, tmp_path: Path) -> None:
    target = tmp_path / "m.gguf"

    def progress(done: int, total: int, what: str) -> None:
        target.write_text("a stranger's")

    with pytest.raises(GgufSdError, match="has appeared while it was converted and was kept"):
        convert(tiny_pipeline(), target, ConvertOptions(), progress)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["a stranger's"]
    convert(tiny_pipeline(), target, ConvertOptions(force=True), progress)
    assert target.read_bytes()[:4] == b"GGUF"


def test_a_name_that_is_taken_stays(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileExistsError), temporary_beside(tmp_path / "a") as temporary:
        put_if_free(temporary, tmp_path / "a")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
