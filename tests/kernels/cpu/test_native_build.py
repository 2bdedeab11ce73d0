"""When kernels in C++ are compiled, where they are kept, and who may have written what is loaded."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gguf_sd_kernels import writers
from gguf_sd_kernels.cpu import processor
from gguf_sd_kernels.cpu.native import build

FOUND, OPENMP = build._compiler(), build._openmp()
COMPILER = None if FOUND is None else shlex.join(FOUND)
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or COMPILER is None or OPENMP is None,
    reason="no Linux, no C++ compiler, or a torch without OpenMP",
)

FLAGS = frozenset({"sse2", "avx2", "fma", "avx512f", "avx512bw", "amx_bf16"})
SOURCE = """
#include <omp.h>
extern "C" int answer() { return 42; }
extern "C" int threads() { return omp_get_max_threads(); }
"""
BUILD = """
import sys
from pathlib import Path
from gguf_sd_kernels.cpu import processor
from gguf_sd_kernels.cpu.native import build

processor.flags = lambda: frozenset(sys.argv[2:])
build.SOURCES = Path(sys.argv[1])
print(build.built().answer())
"""


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of what is built, of a small source, for a processor that is taken to have what kernels need."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.cpp").write_text(SOURCE)
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setattr(processor, "flags", lambda: FLAGS)
    monkeypatch.setenv("GGUF_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv(build.SWITCH, raising=False)
    monkeypatch.delenv("CXX", raising=False)
    return tmp_path / "cache" / "native"


class Compiler:
    """A script that notes how it is called, does as told, and then what the real compiler does."""

    def __init__(self, folder: Path):
        self.path, self.notes = folder / "compiler", folder / "notes"
        self.notes.touch()
        self.does("")

    def does(self, first: str, version: str | None = None) -> None:
        """``first`` comes before every call but that for the version, which is the real one's unless given."""
        tell = f'exec {COMPILER} "$@"' if version is None else f"echo {version}; exit"
        self.path.write_text(
            f'#!/bin/sh\n[ "$1" = --version ] && {{ {tell}; }}\n'
            f'echo "$@" >> {self.notes}\n{first}\nexec {COMPILER} "$@"\n'
        )
        self.path.chmod(0o700)

    @property
    def calls(self) -> int:
        return len(self.notes.read_text().splitlines())


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    monkeypatch.setenv("CXX", str(tmp_path / "compiler"))
    return Compiler(tmp_path)


def answer(library: ctypes.CDLL | None) -> int:
    assert library is not None
    return int(library.answer())


def kept(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir()) if cache.exists() else []


def test_built_once(cache: Path, compiler: Compiler) -> None:
    assert answer(build.built()) == 42
    (library,) = cache.iterdir()
    assert library.suffix == ".so"
    assert not library.stat().st_mode & 0o077
    assert not cache.stat().st_mode & 0o077
    calls = compiler.calls
    assert calls == 2  # one compiles, one links
    assert answer(build.built()) == 42
    assert compiler.calls == calls


def test_once_for_all_processes(cache: Path, compiler: Compiler) -> None:
    """In each of which a set of strings has an order of its own."""
    assert answer(build.built()) == 42
    calls = compiler.calls
    with other_process() as process:
        assert process.communicate(timeout=60)[0] == "42\n"
    assert compiler.calls == calls


def test_compilers_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> None:
    monkeypatch.delenv("CXX")
    (tmp_path / "bin").mkdir()
    compiler.path.rename(tmp_path / "bin" / "g++")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert build._compiler() == (str(tmp_path / "bin" / "g++"),)


def test_torchs_threads_are_shared() -> None:
    library, before = build.built(), torch.get_num_threads()
    assert library is not None
    try:
        for threads in (3, 2):
            torch.set_num_threads(threads)
            assert library.threads() == threads
    finally:
        torch.set_num_threads(before)


def test_switched_off(monkeypatch: pytest.MonkeyPatch, cache: Path, compiler: Compiler) -> None:
    monkeypatch.setenv("GGUF_SD_NATIVE", "0")
    assert build.built() is None
    assert not compiler.calls
    assert not cache.exists()


def test_other_systems(monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert build.built() is None
    assert not compiler.calls


@pytest.mark.parametrize("flags", [None, frozenset({"sse2", "avx2"})])
def test_processors_without_wide_vectors(
    flags: frozenset[str] | None, monkeypatch: pytest.MonkeyPatch, compiler: Compiler
) -> None:
    monkeypatch.setattr(processor, "flags", lambda: flags)
    assert build.built() is None
    assert not compiler.calls


def test_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert build.built() is None
    assert not cache.exists()


def test_compiler_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever names one means that one, though there are others."""
    monkeypatch.setenv("CXX", str(tmp_path / "none"))
    assert shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    assert build.built() is None


def test_torch_without_openmp(monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> None:
    monkeypatch.setattr(build, "_openmp", lambda: None)
    assert build.built() is None
    assert not compiler.calls


WRITE_RUBBISH = 'for last; do :; done; echo rubbish > "$last"'  # where results go is the last word of a command


@pytest.mark.parametrize(
    "first",
    [
        "echo no >&2; exit 1",
        f"{WRITE_RUBBISH}; exit 1",
        f'case "$*" in *-shared*) {WRITE_RUBBISH}; exit 1;; esac',
        'case "$*" in *-shared*) kill -9 $$;; esac',
        'case "$*" in *-shared*) exit 0;; esac',
    ],
    ids=[
        "at once",
        "after writing",
        "when linking, after writing",
        "killed when linking",
        "says nothing, does nothing",
    ],
)
def test_compiler_that_fails(first: str, cache: Path, compiler: Compiler) -> None:
    compiler.does(first)
    assert build.built() is None
    assert compiler.calls
    assert kept(cache) == []


def test_compiler_that_does_not_tell_its_version(cache: Path, compiler: Compiler) -> None:
    compiler.path.write_text("#!/bin/sh\nexit 1\n")
    assert build.built() is None
    assert kept(cache) == []


def test_compiler_that_does_not_end(cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler.does("exec sleep 60")
    monkeypatch.setattr(build, "SECONDS", 0.5)
    assert build.built() is None
    assert kept(cache) == []


def test_source_that_does_not_compile(cache: Path) -> None:
    (build.SOURCES / "wrong.cpp").write_text("int answer( {")
    assert build.built() is None
    assert kept(cache) == []


def test_tried_again_after_a_failure(cache: Path, compiler: Compiler) -> None:
    compiler.does("exit 1")
    assert build.built() is None
    compiler.does("")
    assert answer(build.built()) == 42


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777])
def test_folder_that_others_may_write_to(mode: int, cache: Path, compiler: Compiler) -> None:
    """It is built for this process alone; nothing is kept, and nothing that lies there is loaded."""
    assert answer(build.built()) == 42
    (library,) = cache.iterdir()
    library.write_bytes(b"what somebody else put there")
    cache.chmod(mode)
    for calls in (4, 6):
        assert answer(build.built()) == 42
        assert compiler.calls == calls
    assert kept(cache) == [library.name]


@pytest.mark.parametrize("mode", [0o666, 0o720])
def test_file_that_others_may_write_to(mode: int, cache: Path) -> None:
    assert answer(build.built()) == 42
    (library,) = cache.iterdir()
    library.chmod(mode)
    assert build.built() is None


def test_folder_of_somebody_else(cache: Path, compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    assert answer(build.built()) == 42
    owner = cache.stat().st_uid
    if not owner:
        os.chown(cache, 12345, -1)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    calls = compiler.calls
    assert answer(build.built()) == 42
    assert compiler.calls == calls + 2


@pytest.mark.parametrize("place", ["below a file", "/proc/self/none"])
def test_cache_that_cannot_be(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiler: Compiler) -> None:
    (tmp_path / "file").touch()
    folder = place if place.startswith("/") else str(tmp_path / "file" / "cache")
    monkeypatch.setenv("GGUF_SD_CACHE", folder)
    for calls in (2, 4):
        assert answer(build.built()) == 42
        assert compiler.calls == calls
    assert (tmp_path / "file").read_bytes() == b""


def test_folder_that_cannot_be_written_to(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read_only(source: Path, target: Path) -> None:
        raise OSError(errno.EROFS, "Read-only file system", str(target))

    cache.mkdir(parents=True)
    monkeypatch.setattr(shutil, "copy", read_only)
    assert answer(build.built()) == 42
    assert not kept(cache)


def test_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("GGUF_SD_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # a number without a name, as in many containers
    build.built()


def test_names_of_other_encodings(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff"
    with open(path, "wb+") as file:
        file.write(bytes(4096))
        file.flush()
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ):
            assert answer(build.built()) == 42


def test_what_others_left_unfinished_is_removed(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    ended = subprocess.Popen(["true"])
    ended.wait()
    left = cache / f".old.so.{writers._host()}-{ended.pid}-1.0123456789ab.partial"
    left.touch()
    assert answer(build.built()) == 42
    assert not left.exists()


def other_process() -> subprocess.Popen[str]:
    """One that builds, and prints the answer."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    command = [sys.executable, "-c", BUILD, str(build.SOURCES), *FLAGS]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def test_two_processes_at_once(tmp_path: Path, cache: Path, compiler: Compiler) -> None:
    """Neither links before both do."""
    meet = f"""
case "$*" in *-shared*)
    touch {tmp_path}/linking.$$
    for i in $(seq 300); do [ $(ls {tmp_path} | grep -c linking) = 2 ] && break; sleep 0.1; done;;
esac"""
    compiler.does(meet)
    with other_process() as one, other_process() as other:
        assert [process.communicate(timeout=90)[0] for process in (one, other)] == ["42\n"] * 2
    assert compiler.calls == 4
    assert len(kept(cache)) == 1


def name(compiler: Compiler) -> str:
    return build._name((str(compiler.path),), Path("/lib/libgomp.so.1"))


def test_name_says_what_it_was_built_from(compiler: Compiler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another compiler's version or path, processor, library, source, name of one, or set of flags is another name."""
    compiler.does("", version="c++ 12.2")
    names = [name(compiler)]
    assert name(compiler) == names[0]
    compiler.does("", version="c++ 13.1")
    names.append(name(compiler))
    monkeypatch.setattr(processor, "flags", lambda: FLAGS - {"amx_bf16"})
    names.append(name(compiler))
    names.append(build._name((str(compiler.path),), Path("/lib/libiomp5.so")))
    (build.SOURCES / "answer.cpp").write_text(SOURCE.replace("42", "43"))
    names.append(name(compiler))
    (build.SOURCES / "answer.cpp").rename(build.SOURCES / "question.cpp")
    names.append(name(compiler))
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-g"))
    names.append(name(compiler))
    compiler.path = compiler.path.rename(compiler.path.with_name("other"))
    names.append(name(compiler))
    assert len(set(names)) == len(names)


def test_source_that_changed_is_built_anew(cache: Path) -> None:
    assert answer(build.built()) == 42
    (build.SOURCES / "answer.cpp").write_text(SOURCE.replace("42", "43"))
    assert answer(build.built()) == 43
    assert len(kept(cache)) == 2
