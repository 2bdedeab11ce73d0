"""A weight file whose tensors stay mapped, and several of them seen as one. None needs torch to be opened."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.checkpoint.ggml_types import GGML_TYPES, GGMLType
from gguf_sd.checkpoint.gguf_header import TensorInfo
from gguf_sd.checkpoint.safetensors_header import read_table
from gguf_sd.json_text import MAX_TABLE, json_object

if TYPE_CHECKING:
    from torch import Tensor

    from gguf_sd.checkpoint.gguf_tensors import MappedTensors
    from gguf_sd.checkpoint.quant_tensor import QuantTensor

# safetensors' names of what can be a weight; GGUF has no float8, so those have no number.
FLOATS = {kind.name: kind for kind in GGML_TYPES.values() if kind.name in ("F64", "F32", "F16", "BF16")}
FLOATS |= {name: GGMLType(-1, name, 1, 1) for name in ("F8_E4M3", "F8_E5M2")}


class MappedFile:
    """Metadata and tensors of a file. Who makes one fills in ``path``, ``size``, ``metadata`` and ``tensors``, and the
    shapes of tensors that lie reshaped."""

    path: Path
    size: int  # bytes of the whole file
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    reshaped: Mapping[str, tuple[int, ...]] = {}
    tap_major: frozenset[str] = frozenset()  # convolutions whose rows hold (kh, kw, in)

    def json(self, key: str) -> dict[str, Any]:
        """The JSON object stored as text under ``key``."""
        return json_object(self.metadata[key], f"{self.path} has damaged metadata: {key}", MAX_TABLE)

    def shape(self, name: str) -> tuple[int, ...]:
        """The tensor's logical shape, torch order."""
        return self.reshaped.get(name, self.tensors[name].shape)

    @cached_property
    def _mapped(self) -> MappedTensors:
        from gguf_sd.checkpoint.gguf_tensors import MappedTensors

        return MappedTensors(self.path, self.size)

    def tensor(self, name: str) -> Tensor | QuantTensor:
        """The tensor, backed by the mapped file. Types outside gguf_sd_kernels.formats.FORMATS, and shapes whose
        rows are no whole number of blocks, are dequantised to F16 here."""
        return self._mapped.tensor(self.tensors[name], self.shape(name), name in self.tap_major)

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
        return "_mapped" in self.__dict__ and self._mapped.holds(tensor)


class SafetensorsFile(MappedFile):
    """A .safetensors file; its tensors of integers are left out. Raises GgufSdError where it is damaged."""

    def __init__(self, path: Path):
        table = read_table(path)
        self.path, self.size, self.metadata = path, table.size, dict(table.metadata)
        self.tensors = {
            name: TensorInfo(name, kind, stored.shape, stored.offset, stored.nbytes)
            for name, stored in table.tensors.items()
            if (kind := FLOATS.get(stored.dtype)) is not None
        }


class JoinedFile(MappedFile):
    """Tensors of several files under new names: ``places``, new name -> file, and name in that file. Path and metadata
    are those of ``main``, ``metadata`` is added."""

    def __init__(
        self, main: MappedFile, places: Mapping[str, tuple[MappedFile, str]], metadata: Mapping[str, Any] | None = None
    ):
        self.path, self.metadata = main.path, main.metadata | dict(metadata or {})
        self.places = dict(places)
        self.files = list({id(file): file for file, _ in places.values()}.values())
        self.size = sum(file.size for file in self.files)
        self.tensors = {new: replace(file.tensors[name], name=new) for new, (file, name) in places.items()}
        self.reshaped = {new: file.shape(name) for new, (file, name) in places.items() if name in file.reshaped}
        self.tap_major = frozenset(new for new, (file, name) in places.items() if name in file.tap_major)

    def tensor(self, name: str) -> Tensor | QuantTensor:
        file, own = self.places[name]
        return file.tensor(own)

    def forget_pages(self, tensors: Iterable[Tensor] | None = None) -> None:
        for file in self.files:
            file.forget_pages(tensors)

    def expect(self, tensors: Iterable[Tensor]) -> None:
        tensors = list(tensors)
        for file in self.files:
            if own := [tensor for tensor in tensors if file.holds(tensor)]:
                file.expect(own)

    def holds(self, tensor: Tensor) -> bool:
        return any(file.holds(tensor) for file in self.files)
