"""A GGUF file: its header at once, its tensors when they are asked for. Reading the header needs no torch."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.checkpoint.gguf_header import MAX_DIMS, read_header
from gguf_sd.checkpoint.metadata_keys import COMFY_SHAPE, SHAPES
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.json_text import MAX_TABLE, json_object

if TYPE_CHECKING:
    from torch import Tensor

    from gguf_sd.checkpoint.gguf_tensors import MappedTensors
    from gguf_sd.checkpoint.quant_tensor import QuantTensor


class GGUFFile:
    """A GGUF file's metadata and tensors. Raises GgufSdError for anything that is not a whole, sane GGUF."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        header = read_header(self.path)
        self.size, self.metadata, self.tensors = header.size, header.metadata, header.tensors
        ours = self._claimed(self.json(SHAPES) if SHAPES in self.metadata else {})
        theirs = {k.removeprefix(COMFY_SHAPE): v for k, v in self.metadata.items() if k.startswith(COMFY_SHAPE)}
        self._shapes = ours | self._claimed(theirs)
        self._tap_major = frozenset(name for name, shape in ours.items() if len(shape) == 4)

    def _error(self, what: str) -> GgufSdError:
        return GgufSdError(f"{self.path} {what}")

    def _claimed(self, shapes: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes, from our metadata or ComfyUI-GGUF's, of tensors that lie reshaped in the file."""
        result = {}
        for name, shape in shapes.items():
            if (info := self.tensors.get(name)) is None:
                continue
            whole = isinstance(shape, list) and 1 <= len(shape) <= MAX_DIMS
            whole = whole and all(type(n) is int and n > 0 for n in shape)
            if not whole or prod(shape) != prod(info.shape):
                raise self._error(f"is damaged: {name} lies as {list(info.shape)} but claims shape {shown(shape)}")
            result[name] = tuple(shape)
        return result

    def json(self, key: str) -> dict[str, Any]:
        """The JSON object stored as text under ``key``."""
        return json_object(self.metadata[key], f"{self.path} has damaged metadata: {key}", MAX_TABLE)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's logical shape, torch order."""
        return self._shapes.get(name, self.tensors[name].shape)

    @cached_property
    def _mapped(self) -> MappedTensors:
        from gguf_sd.checkpoint.gguf_tensors import MappedTensors

        return MappedTensors(self.path, self.size)

    def tensor(self, name: str) -> Tensor | QuantTensor:
        """The tensor, backed by the mapped file. Types outside gguf_sd_kernels.formats.FORMATS, and shapes whose
        rows are no whole number of blocks, are dequantised to F16 here."""
        return self._mapped.tensor(self.tensors[name], self.shape(name), name in self._tap_major)

    def forget_pages(self, tensors: Iterable[Tensor] | None = None) -> None:
        """Gives the memory behind everything read so far back, or behind these tensors; what is touched again is read
        again."""
        if "_mapped" in self.__dict__:
            self._mapped.forget_pages(tensors)

    def expect(self, tensors: Iterable[Tensor]) -> None:
        """Has the system begin to read these tensors, where they are not in its cache."""
        self._mapped.expect(tensors)

    def holds(self, tensor: Tensor) -> bool:
        """Whether the tensor is a view of the mapped file."""
        return self._mapped.holds(tensor)
