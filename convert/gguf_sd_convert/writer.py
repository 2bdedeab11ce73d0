"""Streaming, atomic GGUF writing: a temporary file beside the target, synced, then renamed.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the header is gguf-py's.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from gguf_sd.atomic_write import put_if_free, put_in_place, temporary_beside
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.quantize.policy import Stored

ALIGNMENT = 32
MAX_NAME = 127  # bytes; ggml's limit


class GGUFSink:
    """Writes the header when it is entered, then takes the tensors one by one; renames the file into place when it is
    left, or removes it when an exception leaves it. Raises GgufSdError for whatever the disk refuses."""

    def __init__(
        self,
        target: Path,
        architecture: str,
        metadata: Mapping[str, Any],
        tensors: Sequence[Stored],
        replace: bool = True,
    ):
        """metadata values: str, bool, int (as UINT32), float or a list of int (as INT32). Unless it may ``replace``
        what is there, a target that appears meanwhile is kept, and GgufSdError raised."""
        self.replace = replace
        self.target, self.metadata, self.tensors = target, metadata, tensors
        self.architecture = architecture
        self.nbytes = 0  # of the whole file; known once it is entered
        self._left = list(reversed(tensors))
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> GGUFSink:
        with contextlib.ExitStack() as stack:
            stack.enter_context(terminable())
            self._temporary = stack.enter_context(temporary_beside(self.target))
            self._write_header()
            size = self._temporary.stat().st_size
            self.nbytes = size + sum(_padded(tensor.nbytes) for tensor in self.tensors)
            check_space(self.target.parent, self.nbytes - size)
            self._file: BinaryIO = stack.enter_context(open(self._temporary, "r+b"))
            self._file.seek(0, os.SEEK_END)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: Any) -> bool | None:
        if exception[0] is not None:
            return self._stack.__exit__(*exception)
        with self._stack:
            if self._left:
                raise RuntimeError(f"{len(self._left)} tensors were not written, the first is {self._left[-1].name}")
            self._file.close()
            try:
                (put_in_place if self.replace else put_if_free)(self._temporary, self.target)
            except FileExistsError:
                raise GgufSdError(
                    f"{self.target} has appeared while it was converted and was kept; choose another output, or --force"
                ) from None
        return None

    def _write_header(self) -> None:
        writer = gguf.GGUFWriter(self._temporary, self.architecture)
        for key, value in self.metadata.items():
            _add(writer, key, value)
        for tensor in self.tensors:
            if len(tensor.name.encode()) > MAX_NAME:
                raise GgufSdError(f"tensor name {tensor.name} has more than {MAX_NAME} bytes, which GGUF does not take")
            kind = gguf.GGMLQuantizationType[tensor.type]
            # Not uint8, which would make gguf-py take the shape for one of bytes.
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=kind)
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
        finally:
            writer.close()
        with open(self._temporary, "ab") as file:
            file.write(bytes(_padded(file.tell()) - file.tell()))

    def write(self, name: str, data: Tensor) -> None:
        """The next tensor's bytes, as a contiguous tensor of any dtype."""
        expected = self._left.pop()
        raw: np.ndarray = data.view(-1).view(torch.uint8).numpy()
        if name != expected.name or raw.nbytes != expected.nbytes:
            raise RuntimeError(f"got {name}, {raw.nbytes} bytes; {expected.name}, {expected.nbytes} bytes was next")
        self._file.write(raw.data)
        self._file.write(bytes(_padded(raw.nbytes) - raw.nbytes))

    def patch(self, placeholder: str, value: str) -> None:
        """Replaces the one occurrence of ``placeholder`` in the header by a value of the same length."""
        end = self._file.tell()
        self._file.seek(0)
        header = self._file.read(end - sum(_padded(tensor.nbytes) for tensor in self.tensors))
        if len(value) != len(placeholder) or header.count(placeholder.encode()) != 1:
            raise RuntimeError("the header does not hold the placeholder once")
        self._file.seek(header.index(placeholder.encode()))
        self._file.write(value.encode())
        self._file.seek(end)


def check_space(folder: Path, nbytes: int) -> None:
    """Raises GgufSdError where fewer than ``nbytes`` are free in ``folder``."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise GgufSdError(f"{folder} has {free / 1e9:.2f} GB free, the file takes {nbytes / 1e9:.2f} GB")


def _padded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM unwinds the stack like an exception, so that what is cleaned up on exceptions is on it, too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
