"""Reading GGUF files: what gguf-py writes comes back, and damaged or hostile files cost a sentence."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.errors import GgufSdError

RNG = np.random.default_rng(5)
TYPES = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]


def write(path: Path, tensors: dict[str, tuple[np.ndarray, str]], metadata: dict[str, str] | None = None) -> Path:
    """A GGUF of float arrays, each in the named type."""
    writer = gguf.GGUFWriter(path, "gguf_sd")
    for key, value in (metadata or {}).items():
        writer.add_string(key, value)
    for name, (values, kind) in tensors.items():
        qtype = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, gguf.quants.quantize(values, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("kind", TYPES)
def test_quantised_tensors_stay_blocks(tmp_path: Path, kind: str) -> None:
    values = normal(6, 96)
    tensor = GGUFFile(write(tmp_path / "a.gguf", {"w": (values, kind)})).tensor("w")
    assert isinstance(tensor, QuantTensor)
    assert (tensor.qtype, tensor.shape) == (kind, (6, 96))
    number = gguf.GGMLQuantizationType[kind]
    expected = gguf.quants.dequantize(gguf.quants.quantize(values, number), number)
    assert np.array_equal(tensor.dequantize().numpy(), expected)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_plain_tensors(tmp_path: Path, kind: str) -> None:
    values = normal(3, 5, 7)
    tensor = GGUFFile(write(tmp_path / "a.gguf", {"w": (values, kind)})).tensor("w")
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, torch.from_numpy(values).to(dtype))


def test_types_without_a_kernel_and_odd_shapes_become_float16(tmp_path: Path) -> None:
    norm = normal(64)  # stable-diffusion.cpp quantises 1-D norms
    path = write(tmp_path / "a.gguf", {"norm": (norm, "Q4_0")})
    tensor = GGUFFile(path).tensor("norm")
    assert isinstance(tensor, torch.Tensor)
    expected = gguf.quants.dequantize(gguf.quants.quantize(norm, gguf.GGMLQuantizationType.Q4_0), 2)
    assert torch.equal(tensor, torch.from_numpy(expected).half())


def write_blocks(path: Path, blocks: np.ndarray, kind: str) -> Path:
    """A GGUF with one tensor, ``w``, of these bytes."""
    writer = gguf.GGUFWriter(path, "sd1")
    writer.add_tensor("w", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_k_quants_stay_blocks(tmp_path: Path) -> None:
    blocks = RNG.integers(0, 256, (4, 2 * 210), dtype=np.uint8)  # Q6_K: 256 values in 210 bytes
    blocks[:, 208:210] = blocks[:, 418:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    tensor = GGUFFile(write_blocks(tmp_path / "k.gguf", blocks, "Q6_K")).tensor("w")
    assert isinstance(tensor, QuantTensor)
    assert (tensor.qtype, tensor.shape, tensor.nbytes) == ("Q6_K", (4, 512), blocks.size)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q6_K)
    assert np.array_equal(tensor.dequantize().numpy(), expected)


def test_other_types_of_gguf_py_become_float16(tmp_path: Path) -> None:
    blocks = RNG.integers(0, 256, (4, 66), dtype=np.uint8)  # TQ2_0: 256 values in 66 bytes
    blocks[:, 64:] = np.frombuffer(np.float16(0.01).tobytes(), np.uint8)
    tensor = GGUFFile(write_blocks(tmp_path / "t.gguf", blocks, "TQ2_0")).tensor("w")
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.TQ2_0)
    assert isinstance(tensor, torch.Tensor)
    assert torch.equal(tensor, torch.from_numpy(expected).half())


def test_reshaped_convolutions(tmp_path: Path) -> None:
    """The native order (taps first) by our shapes, ComfyUI-GGUF's by its orig_shape."""
    weight = normal(4, 32, 3, 3)
    native = weight.transpose(0, 2, 3, 1).reshape(4, -1)
    path = write(tmp_path / "n.gguf", {"w": (native, "Q8_0")}, {"gguf_sd.shapes": json.dumps({"w": [4, 32, 3, 3]})})
    tensor = GGUFFile(path).tensor("w")
    assert isinstance(tensor, QuantTensor)
    assert tensor.tap_major
    assert np.abs(tensor.dequantize().numpy() - weight).max() < 0.02

    writer = gguf.GGUFWriter(tmp_path / "c.gguf", "sd1")
    writer.add_array("comfy.gguf.orig_shape.w", [4, 32, 3, 3])
    q8 = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("w", gguf.quants.quantize(weight.reshape(-1, 128), q8), raw_dtype=q8)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tensor = GGUFFile(tmp_path / "c.gguf").tensor("w")
    assert isinstance(tensor, QuantTensor)
    assert (tensor.shape, tensor.tap_major) == ((4, 32, 3, 3), False)
    assert np.abs(tensor.dequantize().numpy() - weight).max() < 0.02


def test_no_gguf(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"PK\x03\x04 a zip, say")
    with pytest.raises(GgufSdError, match="is not a GGUF file"):
        GGUFFile(tmp_path / "a.gguf")
    with pytest.raises(GgufSdError, match=r"cannot read .*missing.gguf: No such file"):
        GGUFFile(tmp_path / "missing.gguf")
    with pytest.raises(GgufSdError, match="cannot read"):
        GGUFFile(tmp_path)


def test_every_truncation_is_noticed(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.gguf", {"w": (normal(2, 32), "Q8_0")}, {"key": "value"}).read_bytes()
    data = 2 * 34  # what follows the tensors is padding
    end = whole.rindex(b"\0" * (-data % 32)) if data % 32 else len(whole)
    for size in range(end):
        (tmp_path / "b.gguf").write_bytes(whole[:size])
        with pytest.raises(GgufSdError, match=r"b\.gguf"):
            GGUFFile(tmp_path / "b.gguf")


@pytest.mark.parametrize("field", ["tensors", "keys", "string", "array", "dimension", "offset"])
def test_absurd_sizes_allocate_nothing(tmp_path: Path, field: str) -> None:
    huge = 1 << 62
    count = {"tensors": (huge, 0), "keys": (0, huge), "string": (0, 1), "array": (0, 1)}.get(field, (1, 0))
    body = b"GGUF" + struct.pack("<IQQ", 3, *count)
    if field == "string":
        body += struct.pack("<Q", huge)
    if field == "array":
        body += struct.pack("<Q1sIIQ", 1, b"a", gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT8, 1 << 24)
    if field in ("dimension", "offset"):
        size, offset = (huge, 0) if field == "dimension" else (32, huge)
        body += struct.pack("<Q1sIQIQ", 1, b"w", 1, size, gguf.GGMLQuantizationType.F32, offset)
    (tmp_path / "a.gguf").write_bytes(body + b"\0" * 4096)
    with pytest.raises(GgufSdError, match=r"damaged|truncated"):
        GGUFFile(tmp_path / "a.gguf")


def test_random_damage_never_escapes_as_another_error(tmp_path: Path) -> None:
    whole = bytearray(write(tmp_path / "a.gguf", {"w": (normal(2, 32), "Q8_0")}, {"key": "value"}).read_bytes())
    for _ in range(300):
        broken = bytearray(whole)
        for position in RNG.integers(0, 160, 3):
            broken[position] = RNG.integers(0, 256)
        (tmp_path / "b.gguf").write_bytes(broken)
        try:
            file = GGUFFile(tmp_path / "b.gguf")
            for name in file.tensors:
                file.tensor(name)
        except GgufSdError:
            pass


def test_unknown_type_and_version(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", {"w": (normal(1, 32), "F32")})
    data = bytearray(path.read_bytes())
    data[4:8] = struct.pack("<I", 99)
    path.write_bytes(data)
    with pytest.raises(GgufSdError, match="GGUF version 99; versions 2 and 3"):
        GGUFFile(path)
    data[4:8] = struct.pack("<I", 3)
    at = data.index(b"w", 24) + 1 + 4 + 16
    data[at : at + 4] = struct.pack("<I", 77)
    path.write_bytes(data)
    with pytest.raises(GgufSdError, match="tensor w in the unknown type 77"):
        GGUFFile(path)
