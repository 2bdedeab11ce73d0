"""Every type that gguf-py knows: those that it decodes are read, the others are named."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from gguf_sd.checkpoint.ggml_types import GGML_TYPES
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.sources.gguf_source import gguf_entry
from gguf_sd_kernels.formats import FORMATS

DECODED = [*gguf.quants._type_traits, GGMLQuantizationType.F32, GGMLQuantizationType.F16]
ROWS, BLOCKS = 3, 2


def stored(path: Path, kind: GGMLQuantizationType) -> np.ndarray:
    """A GGUF with one tensor, ``w``, of random bytes, three rows of two blocks; returns those."""
    size = gguf.GGML_QUANT_SIZES[kind][1]
    plain = kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16)
    data = np.random.default_rng(kind).integers(0, 256, (ROWS, 64 * size if plain else BLOCKS * size), dtype=np.uint8)
    if plain:
        data = data.view(np.float32 if kind == GGMLQuantizationType.F32 else np.float16)
    writer = gguf.GGUFWriter(path, "sd1")
    writer.add_tensor("w", data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return data


@pytest.mark.parametrize("kind", DECODED, ids=lambda kind: kind.name)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning", "ignore:overflow:RuntimeWarning")
def test_decoded(tmp_path: Path, kind: GGMLQuantizationType) -> None:
    """As gguf-py decodes it, NaN and infinity included: bit for bit where blocks are kept, else rounded to float16."""
    expected = torch.from_numpy(np.array(gguf.quants.dequantize(stored(tmp_path / "a.gguf", kind), kind)))
    file = GGUFFile(tmp_path / "a.gguf")
    tensor = file.tensor("w")
    assert isinstance(tensor, QuantTensor) == (kind.name in FORMATS)
    got = tensor.dequantize(torch.float32) if isinstance(tensor, QuantTensor) else tensor.float()
    rounded = expected if isinstance(tensor, QuantTensor) else expected.to(tensor.dtype).float()
    assert equal(got, rounded)
    assert equal(gguf_entry(file, "w").load().float(), expected), "the converter rounds nothing"


def equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(7e7, 8e7, 9e7), b.nan_to_num(7e7, 8e7, 9e7))


def test_the_others_are_named(tmp_path: Path) -> None:
    others = [kind for kind in GGMLQuantizationType if kind not in DECODED]
    assert others
    for kind in others:
        stored(tmp_path / "a.gguf", kind)
        if kind == GGMLQuantizationType.F64:
            continue  # which torch has
        with pytest.raises(GgufSdError, match=f"holds tensor w as {kind.name}, which cannot be read"):
            GGUFFile(tmp_path / "a.gguf").tensor("w")


def test_the_table_is_gguf_pys() -> None:
    ours = {kind.name: (kind.number, kind.block_size, kind.type_size) for kind in GGML_TYPES.values()}
    theirs = {kind.name: (kind.value, *gguf.GGML_QUANT_SIZES[kind]) for kind in GGMLQuantizationType}
    assert ours.items() >= theirs.items()
