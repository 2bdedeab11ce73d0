"""A GGUF file: its header at once, its tensors when they are asked for. Reading the header needs no torch."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import Any

from gguf_sd.checkpoint.gguf_header import MAX_DIMS, read_header
from gguf_sd.checkpoint.mapped_file import MappedFile
from gguf_sd.checkpoint.metadata_keys import COMFY_SHAPE, SHAPES
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown


class GGUFFile(MappedFile):
    """A GGUF file's metadata and tensors. Raises GgufSdError for anything that is not a whole, sane GGUF."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        header = read_header(self.path)
        self.size, self.metadata, self.tensors = header.size, header.metadata, header.tensors
        ours = self._claimed(self.json(SHAPES) if SHAPES in self.metadata else {})
        theirs = {k.removeprefix(COMFY_SHAPE): v for k, v in self.metadata.items() if k.startswith(COMFY_SHAPE)}
        self.reshaped = ours | self._claimed(theirs)
        self.tap_major = frozenset(name for name, shape in ours.items() if len(shape) == 4)

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
