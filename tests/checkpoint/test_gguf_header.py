"""Reading headers: in no more memory than they have bytes, and whatever stands in them."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from gguf_sd.checkpoint import gguf_header
from gguf_sd.checkpoint.ggml_types import GGML_TYPES
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.gguf_header import is_gguf
from gguf_sd.checkpoint.safetensors_header import is_safetensors
from gguf_sd.errors import GgufSdError

TYPE = gguf.GGUFValueType


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def header(*, tensors: int = 0, keys: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body


def string_key(name: str, value: str) -> bytes:
    return text(name) + struct.pack("<I", TYPE.STRING) + text(value)


def row(name: str, shape: tuple[int, ...], kind: str = "F32", offset: int = 0) -> bytes:
    packed = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
    return text(name) + packed + struct.pack("<IQ", gguf.GGMLQuantizationType[kind], offset)


def opened(path: Path, data: bytes) -> GGUFFile:
    path.write_bytes(data)
    return GGUFFile(path)


def test_types_are_those_of_gguf_py() -> None:
    theirs = {int(t): (t.name, *gguf.GGML_QUANT_SIZES[t]) for t in gguf.GGMLQuantizationType}
    common = set(theirs) & set(GGML_TYPES)  # a later gguf-py may know more
    assert len(common) > 30
    assert {n: (t.name, t.block_size, t.type_size) for n, t in GGML_TYPES.items() if n in common} == {
        n: theirs[n] for n in common
    }


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "sd1")
    values: dict[str, tuple[Any, gguf.GGUFValueType]] = {
        "u8": (200, TYPE.UINT8), "i8": (-100, TYPE.INT8), "u16": (60000, TYPE.UINT16), "i16": (-30000, TYPE.INT16),
        "u32": (4_000_000_000, TYPE.UINT32), "i32": (-2_000_000_000, TYPE.INT32), "u64": (1 << 63, TYPE.UINT64),
        "i64": (-(1 << 62), TYPE.INT64), "f32": (0.25, TYPE.FLOAT32), "f64": (0.1, TYPE.FLOAT64),
        "yes": (True, TYPE.BOOL), "text": ("dög", TYPE.STRING),
    }  # fmt: skip
    arrays: dict[str, list[Any]] = {
        "ints": [1, -2, 3],
        "floats": [0.5, 2.0],
        "flags": [True, False],
        "words": ["a", "b"],
    }
    for key, (value, kind) in values.items():
        writer.add_key_value(key, value, kind)
    for key, items in arrays.items():
        writer.add_array(key, items)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    metadata = GGUFFile(tmp_path / "a.gguf").metadata
    expected = {key: value for key, (value, _) in values.items()} | arrays
    assert {key: metadata[key] for key in expected} == expected
    assert {key: type(metadata[key]) for key in values} == {key: type(value) for key, (value, _) in values.items()}


def test_a_tensor_without_dimensions(tmp_path: Path) -> None:
    data = header(tensors=1, body=row("scale", ()))
    data += b"\0" * (-len(data) % 32) + np.float32(3.5).tobytes()
    file = opened(tmp_path / "a.gguf", data)
    assert (file.tensors["scale"].shape, file.tensors["scale"].nbytes) == ((), 4)
    assert torch.equal(file.tensor("scale"), torch.tensor(3.5))
    with pytest.raises(GgufSdError, match=r"tensor scale of type Q8_0 has shape \[\]"):
        opened(tmp_path / "b.gguf", header(tensors=1, body=row("scale", (), "Q8_0")) + b"\0" * 64)


@pytest.mark.parametrize("count", [3, 3000, 200_000])
@pytest.mark.parametrize("kind", ["UINT8", "UINT64", "BOOL"])
def test_arrays_cost_no_more_than_they_lie_in(tmp_path: Path, kind: str, count: int) -> None:
    code = {"UINT8": "B", "UINT64": "Q", "BOOL": "?"}[kind]
    items = [i % 2 for i in range(count)] if kind == "BOOL" else [255 - i % 7 for i in range(count)]
    body = text("a") + struct.pack(f"<IIQ{count}{code}", TYPE.ARRAY, TYPE[kind], count, *items)
    (tmp_path / "a.gguf").write_bytes(header(keys=1, body=body))
    tracemalloc.start()
    value = GGUFFile(tmp_path / "a.gguf").metadata["a"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert list(value) == items
    assert peak < 2.5 * len(body) + 300_000


@pytest.mark.parametrize("claim", [1 << 20, 65 << 20, 512 << 20, 1 << 62])
def test_a_claimed_length_allocates_nothing(tmp_path: Path, claim: int) -> None:
    """A sparse file really has the bytes that its header claims."""
    path = tmp_path / "a.gguf"
    body = text("a") + struct.pack("<IQ", TYPE.STRING, claim)
    path.write_bytes(header(keys=1, body=body))
    with open(path, "r+b") as file:
        file.truncate(600 << 20)
    tracemalloc.start()
    try:
        if claim <= gguf_header.MAX_VALUE:
            assert len(GGUFFile(path).metadata["a"]) == claim
        else:
            with pytest.raises(GgufSdError, match=rf"header wants {claim} bytes"):
                GGUFFile(path)
        assert tracemalloc.get_traced_memory()[1] < 3 << 20
    finally:
        tracemalloc.stop()


def test_many_large_values_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_header, "MAX_HEADER", 10_000)
    body = b"".join(string_key(f"key{i}", "x" * 1000) for i in range(20))
    with pytest.raises(GgufSdError, match="10000 in all"):
        opened(tmp_path / "a.gguf", header(keys=20, body=body))


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (text("k" * 70_000) + struct.pack("<IB", TYPE.UINT8, 1), "wants 70000 bytes at 32, where 65536"),
        (text("a") + struct.pack("<I", 77), "metadata of unknown type 77"),
        (text("a") + struct.pack("<IIQ", TYPE.ARRAY, 77, 1), "metadata of unknown type 77"),
        (text("a") + struct.pack("<IIQ", TYPE.ARRAY, TYPE.STRING, 1 << 30), "array of 1073741824 items"),
        (text("a") + struct.pack("<I", TYPE.ARRAY) + struct.pack("<IQ", TYPE.ARRAY, 1) * 9, "depth 3"),
        (text("general.alignment") + struct.pack("<IB", TYPE.BOOL, 1), "alignment 'True'"),
        (text("general.alignment") + struct.pack("<II", TYPE.UINT32, 0), "alignment '0'"),
        (string_key("general.alignment", "32"), "alignment '32'"),
        (string_key("gguf_sd.shapes", "[" * 100_000), "gguf_sd.shapes is no JSON object that can be read"),
        (string_key("gguf_sd.shapes", "null"), "gguf_sd.shapes is no JSON object"),
    ],
)
def test_malformed_metadata_is_one_sentence(tmp_path: Path, body: bytes, message: str) -> None:
    with pytest.raises(GgufSdError, match=message) as caught:
        opened(tmp_path / "a.gguf", header(keys=1, body=body) + b"\0" * 4096)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "claim", ["[64]", "[]", "[true, 64]", "[8.0, 8]", '"64"', "64", "[-8, -8]", "[1, 1, 1, 8, 8]", "[1e400]", "{}"]
)
def test_claimed_shapes_are_checked(tmp_path: Path, claim: str) -> None:
    body = string_key("gguf_sd.shapes", f'{{"w": {claim}}}') + row("w", (8, 8))
    data = header(tensors=1, keys=1, body=body) + b"\0" * 512
    if claim == "[64]":
        file = opened(tmp_path / "a.gguf", data)
        assert file.shape("w") == (64,)
        assert file.tensor("w").shape == (64,)
    else:
        with pytest.raises(GgufSdError, match=r"damaged: w lies as \[8, 8\] but claims shape"):
            opened(tmp_path / "a.gguf", data)


def test_two_dimensional_shapes_have_no_order_of_taps(tmp_path: Path) -> None:
    body = string_key("gguf_sd.shapes", json.dumps({"w": [32, 64]})) + row("w", (64, 32), "Q8_0")
    data = header(tensors=1, keys=1, body=body)
    file = opened(tmp_path / "a.gguf", data + b"\0" * (-len(data) % 32 + 64 * 34))
    assert file.tensor("w").dequantize().shape == (32, 64)


def test_a_file_that_shrinks_is_a_sentence(tmp_path: Path) -> None:
    data = header(tensors=1, body=row("w", (8, 8)))
    file = opened(tmp_path / "a.gguf", data + b"\0" * (-len(data) % 32 + 256))
    (tmp_path / "a.gguf").write_bytes(b"")
    with pytest.raises(GgufSdError, match=r"cannot read .*a\.gguf"):
        file.tensor("w")


def array_of(kind: int, count: int, body: bytes) -> bytes:
    return struct.pack("<IIQ", TYPE.ARRAY, kind, count) + body


COSTLY = {
    "one text": (1, struct.pack("<IQ", TYPE.STRING, 2_000_000) + b"x" * 2_000_000),
    "accents": (1, struct.pack("<IQ", TYPE.STRING, 2_000_000) + "é".encode() * 1_000_000),
    "many texts": (1, array_of(TYPE.STRING, 200_000, (struct.pack("<Q", 2) + b"ab") * 200_000)),
    "no texts": (1, array_of(TYPE.STRING, 250_000, bytes(8) * 250_000)),
    "short lists of texts": (4000, array_of(TYPE.STRING, 16, (struct.pack("<Q", 2) + b"ab") * 16)),
    "short lists of numbers": (4000, array_of(TYPE.UINT16, 16, struct.pack("<16H", *range(1000, 1016)))),
    "bytes": (1, array_of(TYPE.UINT8, 2_000_000, bytes(2_000_000))),
}


@pytest.mark.parametrize("name", COSTLY)
def test_a_header_costs_little_more_than_it_has(tmp_path: Path, name: str) -> None:
    """Twice its bytes (a text beside what it was decoded from; up to four bytes a letter where it is not English), and
    what a bounded number of keys and short lists take."""
    count, value = COSTLY[name]
    body = b"".join(text(f"k{i}") + value for i in range(count))
    (tmp_path / "a.gguf").write_bytes(header(keys=count, body=body))
    tracemalloc.start()
    metadata = GGUFFile(tmp_path / "a.gguf").metadata
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(metadata) == count
    most = 4.05 if name == "accents" else 2.05
    assert peak < most * len(body) + 200_000 + 1500 * (count if count > 1 else 0)


def test_long_arrays_of_texts(tmp_path: Path) -> None:
    words = ["", "a", "dög", "x" * 300] * 20
    body = text("a") + array_of(TYPE.STRING, len(words), b"".join(text(word) for word in words))
    (tmp_path / "a.gguf").write_bytes(header(keys=1, body=body))
    value = GGUFFile(tmp_path / "a.gguf").metadata["a"]
    assert (len(value), list(value), value[2], value[-1]) == (80, words, "dög", "x" * 300)


def test_nested_arrays_have_a_number(tmp_path: Path) -> None:
    inner = array_of(TYPE.ARRAY, 16, struct.pack("<IQ", TYPE.UINT8, 0) * 16)[4:]
    body = text("a") + array_of(TYPE.ARRAY, 16, inner * 16)
    (tmp_path / "a.gguf").write_bytes(header(keys=16, body=body * 16))
    with pytest.raises(GgufSdError, match="more than 4096 metadata arrays lie in arrays"):
        GGUFFile(tmp_path / "a.gguf")


@pytest.mark.parametrize("tensors", [122, 123, 379])
def test_any_number_of_tensors_makes_no_other_kind_of_file(tmp_path: Path, tensors: int) -> None:
    """The number's lowest byte stands where safetensors' JSON begins, and 123 is "{"."""
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "sd1")
    for i in range(tensors):
        writer.add_tensor(f"t{i}", np.zeros(1, np.float32))
    for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
        write()
    writer.close()
    assert (tmp_path / "x.gguf").read_bytes()[8] == tensors % 256
    assert is_gguf(tmp_path / "x.gguf")
    assert not is_safetensors(tmp_path / "x.gguf")
    assert len(GGUFFile(tmp_path / "x.gguf").tensors) == tensors
