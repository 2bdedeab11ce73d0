"""Builds the C++ sources beside this file for this very processor, once, with the machine's own compiler.

What is built lies in the cache under a name that tells everything it depends on. It shares torch's threads: it is
linked with the OpenMP library that torch has loaded.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from gguf_sd_kernels.cache_folder import cache_folder
from gguf_sd_kernels.cpu import processor
from gguf_sd_kernels.writers import remove_stale, temporary_name

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fPIC", "-fopenmp")
OPENMP = re.compile(r"lib(gomp|iomp5|omp)\b[^/]*\.so[.0-9]*")
SECONDS = 120  # for one run of the compiler
SWITCH = "GGUF_SD_NATIVE"  # environment variable: 0 leaves everything to torch


def built() -> ctypes.CDLL | None:
    """The library, loaded; None where it cannot be had: another system, no compiler, or the environment's
    GGUF_SD_NATIVE is 0."""
    if os.environ.get(SWITCH) == "0" or sys.platform != "linux" or "avx512bw" not in (processor.flags() or ()):
        return None
    compiler, openmp = _compiler(), _openmp()
    if compiler is None or openmp is None:
        log.debug("no native kernels: %s", "no C++ compiler" if compiler is None else "torch has no OpenMP library")
        return None
    try:
        return _from_cache(compiler, openmp)
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None)
        log.debug("no native kernels: %s%s", error, f"\n{said}" if said else "")
        return None


def _compiler() -> tuple[str, ...] | None:
    """The environment's CXX, a program and perhaps its first arguments, or what is found of the usual ones."""
    named = os.environ.get("CXX", "").split()
    choices = [named] if named else [[name] for name in COMPILERS]
    return next(((found, *rest) for name, *rest in choices if (found := shutil.which(name))), None)


def _openmp() -> Path | None:
    """The OpenMP library that torch has loaded into this process."""
    torch.get_num_threads()
    for line in Path("/proc/self/maps").read_bytes().splitlines():
        path = os.fsdecode(line.partition(b"/")[2])
        if OPENMP.fullmatch(path.rpartition("/")[2]):
            return Path("/" + path)
    return None


def _from_cache(compiler: tuple[str, ...], openmp: Path) -> ctypes.CDLL:
    """Loads the library from the cache, where it is built first if need be; for this process alone, where the cache
    cannot be written to or others could have. Raises OSError or SubprocessError."""
    target = cache_folder() / "native" / f"{_name(compiler, openmp)}.so"
    if target.exists() and _is_ours(target.parent):
        if not _is_ours(target):
            raise PermissionError(f"{target} belongs to somebody else, or can be written to by others")
        try:
            return ctypes.CDLL(str(target))
        except OSError as error:
            log.debug("%s is built again: %s", target, error)
    with tempfile.TemporaryDirectory() as folder:
        own = _compile(compiler, openmp, Path(folder) / target.name)
        try:
            _keep(own, target)
        except OSError as error:
            log.debug("%s is built for this process alone: %s", target.name, error)
        return ctypes.CDLL(str(own))


def _keep(built: Path, target: Path) -> None:
    """Puts what was built into the cache, whole. Raises OSError."""
    target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _is_ours(target.parent):
        raise PermissionError(f"{target.parent} belongs to somebody else, or can be written to by others")
    remove_stale(target.parent)
    temporary = temporary_name(target)
    try:
        shutil.copy(built, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def _is_ours(path: Path) -> bool:
    """Whether nobody else could have put there what is about to run."""
    found = path.stat()
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _name(compiler: tuple[str, ...], openmp: Path) -> str:
    """A hash of the sources, the compiler, the processor's features and the library it is linked with."""
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, timeout=SECONDS).stdout
    digest = hashlib.sha256(version)
    for path in sorted([*_sources(), *SOURCES.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    digest.update(repr((compiler, FLAGS, sorted(processor.flags() or ()), str(openmp))).encode())
    return digest.hexdigest()[:24]


def _sources() -> list[Path]:
    return sorted(SOURCES.glob("*.cpp"))


def _compile(compiler: tuple[str, ...], openmp: Path, target: Path) -> Path:
    """Builds ``target``, which is returned. Raises OSError or SubprocessError."""
    with tempfile.TemporaryDirectory() as folder:
        objects = []
        for source in _sources():
            objects.append(f"{folder}/{source.stem}.o")
            _run([*compiler, *FLAGS, "-c", str(source), "-o", objects[-1]])
        # Not by -fopenmp, which might find another library, with threads of its own.
        _run([*compiler, "-shared", *objects, str(openmp), "-o", str(target)])
    target.chmod(0o700)
    return target


def _run(command: list[str]) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
