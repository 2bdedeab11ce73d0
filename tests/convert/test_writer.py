"""The target appears whole or not at all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_sd.cli.main import main
from gguf_sd.errors import GgufSdError
from gguf_sd_convert import convert as converter
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.quantize.policy import Stored
from gguf_sd_convert.writer import GGUFSink

Make = Callable[..., Any]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, GgufSdError, SystemExit])
@pytest.mark.parametrize("existing", [False, True])
def test_failure_half_way(
    tiny_pipeline: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException], existing: bool
) -> None:
    target = tmp_path / "x.gguf"
    if existing:
        target.write_bytes(b"precious")
    count = 0
    write = GGUFSink.write

    def failing(self: GGUFSink, name: str, data: torch.Tensor) -> None:
        nonlocal count
        count += 1
        if count == 50:
            assert len(list(tmp_path.iterdir())) == 1 + existing  # the temporary file is there
            raise error("half way")
        write(self, name, data)

    monkeypatch.setattr(GGUFSink, "write", failing)
    with pytest.raises(error, match="half way"):
        convert(tiny_pipeline(), target, ConvertOptions(force=True))
    assert count == 50
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([b"precious"] if existing else [])


def test_failure_of_the_last_rename(tiny_pipeline: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*args: Any) -> None:
        raise OSError("no rename")

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(GgufSdError, match=r"cannot write .*x\.gguf: no rename"):
        convert(tiny_pipeline(), tmp_path / "x.gguf", ConvertOptions(force=True))
    assert not list(tmp_path.iterdir())


def test_sigterm(tiny_pipeline: Make, tmp_path: Path) -> None:
    script = f"""
import time
from gguf_sd_convert import convert as c
encode = c.encode
def slow(*a):
    time.sleep(0.05)
    return encode(*a)
c.encode = slow
c.convert({str(tiny_pipeline())!r}, {str(tmp_path / "x.gguf")!r})
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not list(tmp_path.iterdir()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert list(tmp_path.iterdir())
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # ours was never touched


def test_existing_target(tiny_pipeline: Make, tmp_path: Path) -> None:
    target = tmp_path / "x.gguf"
    target.write_bytes(b"precious")
    with pytest.raises(GgufSdError, match="exists; --force replaces it"):
        convert(tiny_pipeline(), target)
    assert target.read_bytes() == b"precious"
    convert(tiny_pipeline(), target, ConvertOptions(force=True))
    assert target.read_bytes()[:4] == b"GGUF"


def test_targets_that_cannot_be(tiny_pipeline: Make, tmp_path: Path) -> None:
    for target, match in ((tmp_path, "is a folder"), (tmp_path / "no" / "x.gguf", "is no folder")):
        with pytest.raises(GgufSdError, match=match):
            convert(tiny_pipeline(), target, ConvertOptions(force=True))


def test_unwritable_folder(tiny_pipeline: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *args: False)  # root may write everywhere, so a mode will not do
    with pytest.raises(GgufSdError, match="permission denied"):
        convert(tiny_pipeline(), tmp_path / "x.gguf")


def test_full_disk_is_seen_beforehand(tiny_pipeline: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    monkeypatch.setattr(converter, "encode", lambda *args: pytest.fail("began to write"))
    with pytest.raises(GgufSdError, match="GB free, the file takes"):
        convert(tiny_pipeline(), tmp_path / "x.gguf")
    assert not list(tmp_path.iterdir())


def test_full_disk_while_writing(tiny_pipeline: Make, tmp_path: Path) -> None:
    """A limit on file size stands in for the disk."""
    resource = pytest.importorskip("resource")
    script = f"""
import resource, signal
from gguf_sd.cli.main import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
raise SystemExit(main(["convert", {str(tiny_pipeline())!r}, "-o", {str(tmp_path / "x.gguf")!r}, "--quiet"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
    assert resource


def test_mode_follows_the_umask(tiny_pipeline: Make, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        convert(tiny_pipeline(), tmp_path / "x.gguf")
    finally:
        os.umask(before)
    assert (tmp_path / "x.gguf").stat().st_mode & 0o777 == 0o640


def test_sink_checks_what_it_is_given(tmp_path: Path) -> None:
    tensors = [Stored("a", "F32", (3,), (3,)), Stored("b", "F32", (2,), (2,))]
    for name, count in (("b", 2), ("a", 2)):
        with pytest.raises(RuntimeError, match="was next"), GGUFSink(tmp_path / "x", "sd1", {}, tensors) as sink:
            sink.write(name, torch.zeros(count))
    unfinished = pytest.raises(RuntimeError, match="1 tensors were not written")
    with unfinished, GGUFSink(tmp_path / "x", "sd1", {}, tensors) as sink:
        sink.write("a", torch.zeros(3))
    assert not list(tmp_path.iterdir())


def test_long_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(GgufSdError, match="more than 127 bytes"):
        GGUFSink(tmp_path / "x", "sd1", {}, [Stored("n" * 128, "F32", (3,), (3,))]).__enter__()
    assert not list(tmp_path.iterdir())


def test_cli(
    tiny_pipeline: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)  # bars are for terminals
    target = tmp_path / "x.gguf"
    arguments = ["convert", str(tiny_pipeline()), "-o", str(target), "--type", "q4_0"]
    assert main(arguments) == 0
    shown = capsys.readouterr()
    for text in ("Q4_0", "norms and biases", "timestep embedding", "of F16", "native layout"):
        assert text in shown.out
    assert "converting" in shown.err
    assert main(arguments) == 2
    assert "--force" in capsys.readouterr().err
    assert main([*arguments, "--force", "--quiet"]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([*arguments, "--force", "--json"]) == 0
    shown = capsys.readouterr()
    import json

    assert json.loads(shown.out)["nbytes"] == target.stat().st_size


def test_cli_config_for_a_single_file(tiny_pipeline: Make, single_file: Make, tmp_path: Path) -> None:
    path = single_file().save(tmp_path / "m.safetensors")
    folder = tiny_pipeline()
    arguments = ["convert", str(path), "-o", str(tmp_path / "x.gguf"), "--quiet", "--config", str(folder)]
    assert main([*arguments, "--tokenizer", str(folder / "tokenizer")]) == 0
    assert main(["convert", str(folder), "-o", str(tmp_path / "y.gguf"), "--config", str(folder)]) == 2
