"""Files of torch.save: what torch wrote is read as torch reads it, what a stranger wrote costs a sentence."""

from __future__ import annotations

import collections
import io
import pickle
import pickletools
import struct
import time
import tracemalloc
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_sd.checkpoint import pickles, torch_file
from gguf_sd.checkpoint.pickles import PickleError, read_pickle
from gguf_sd.cli.main import main
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.sources.checkpoints import open_checkpoint

FLOAT8 = torch.arange(6.0).reshape(2, 3).to(torch.float8_e4m3fn)
BASE = torch.arange(60.0).reshape(6, 10)
STATE = {
    "half": torch.arange(6.0).half().reshape(2, 3),
    "bfloat16": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "double": torch.arange(3.0).double(),
    "long": torch.arange(3),
    "bool": torch.tensor([True, False]),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "parameter": torch.nn.Parameter(torch.ones(2)),
    "transposed": BASE.t(),
    "part": BASE[2:4, 3:],
    "whole": BASE,
    "every second": BASE[::2, ::3],
    "channels last": torch.arange(16.0).reshape(1, 2, 2, 4).to(memory_format=torch.channels_last),
}
# Everything that is no plain tensor, and the words with which it is refused.
with warnings.catch_warnings(action="ignore"):  # torch's own, of what is in beta
    FOREIGN = {
        "meta": (torch.empty(3, device="meta"), "without data"),
        "sparse": (torch.eye(2).to_sparse(), "sparse"),
        "csr": (torch.eye(2).to_sparse_csr(), "sparse"),
        "complex": (torch.zeros(1, dtype=torch.complex64), "ComplexFloatStorage"),
        "uint16": (torch.zeros(1, dtype=torch.uint16), "uint16"),
    }


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_tensors_come_as_torch_wrote_them(tmp_path: Path, legacy: bool, protocol: int) -> None:
    state = collections.OrderedDict(STATE if legacy else STATE | {"float8": FLOAT8})
    path = tmp_path / "m.ckpt"
    leftovers = {"epoch": 3, "lr": 0.5, "names": ["a", ("b", {1, 2})], "size": torch.Size([2]), "dtype": torch.float16}
    torch.save(
        {"state_dict": state, **leftovers}, path, pickle_protocol=protocol, _use_new_zipfile_serialization=not legacy
    )
    entries = open_checkpoint(path).entries
    assert entries.keys() == state.keys()
    for name, expected in state.items():
        got = entries[name].load()
        assert (entries[name].shape, entries[name].dtype) == (tuple(expected.shape), expected.dtype)
        assert got.dtype == expected.dtype
        assert got.is_contiguous()
        assert torch.equal(got.double(), expected.detach().double()), name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [*FOREIGN, "quantised", "nested"])
def test_tensors_that_are_no_plain_values_are_refused(tmp_path: Path, name: str) -> None:
    if name == "quantised":
        tensor, word = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), "quantised"
    elif name == "nested":
        tensor, word = torch.nested.nested_tensor([torch.ones(2)]), "nested"
    else:
        tensor, word = FOREIGN[name]
    torch.save({"a": torch.ones(2), "odd": torch.nn.Parameter(tensor, requires_grad=False)}, tmp_path / "m.ckpt")
    with pytest.raises(GgufSdError, match=f"tensor odd is .*{word}"):
        open_checkpoint(tmp_path / "m.ckpt")


def test_a_meta_tensor_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its pages were given back to the system: our own memory, at the address that such a tensor claims."""
    torch.save({"a": torch.empty(1 << 20, device="meta")}, tmp_path / "m.ckpt")
    for command in (["inspect"], ["convert", "-o", str(tmp_path / "o.gguf")], ["generate", "-p", "a"]):
        assert main([command[0], str(tmp_path / "m.ckpt"), *command[1:]]) == 2
        assert "without data (meta)" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["m.ckpt"]


def archive(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(f"m/{name}", data)
    return path


def members_of(state: object) -> dict[str, bytes]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    with zipfile.ZipFile(buffer) as file:
        return {name.partition("/")[2]: file.read(name) for name in file.namelist()}


def tensor_pickle(shape: bytes, stride: bytes, offset: bytes = b"K\x00", count: bytes = b"K\x04") -> bytes:
    """{"x": tensor}, written by hand."""
    storage = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu" + count + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + offset + shape + stride + b"\x89Nt" + b"R"
    return b"\x80\x02}X\x01\x00\x00\x00x" + rebuilt + b"s."


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (tensor_pickle(b"K\x04\x85", b"K\x01\x85"), ""),
        (tensor_pickle(b"K\x05\x85", b"K\x01\x85"), "larger than its storage of 4 values"),
        (tensor_pickle(b"J\xff\xff\xff\x7f\x85", b"K\x00\x85"), "larger than its storage"),
        (tensor_pickle(b"K\x02K\x02\x86", b"J\xff\xff\xff\x7fK\x01\x86"), "larger than its storage"),
        (tensor_pickle(b"K\x04\x85", b"K\x01\x85", b"K\x01"), "larger than its storage"),
        (tensor_pickle(b"K\x04\x85", b"K\x01\x85", b"J\xff\xff\xff\xff"), "damaged"),
        (tensor_pickle(b"J\xff\xff\xff\xff\x85", b"K\x01\x85"), "negative or no numbers"),
        (tensor_pickle(b"G" + bytes(8) + b"\x85", b"K\x01\x85"), "negative or no numbers"),
        (tensor_pickle(b"K\x04\x85", b"K\x01K\x01\x86"), "its shape is"),
        (tensor_pickle(b"N", b"N"), "its shape or stride is NoneType"),
        (tensor_pickle(b"K\x04\x85", b"K\x01\x85", count=b"K\x05"), "not in the file"),
        (tensor_pickle(b"K\x04\x85", b"K\x01\x85", count=b"\x8a\x09" + b"\xff" * 8 + b"\x00"), "not in the file"),
        (tensor_pickle(b"(" + b"K\x01" * 9 + b"t", b"(" + b"K\x01" * 9 + b"t"), "its shape or stride is tuple"),
    ],
)
def test_strides_stay_within_their_storage(tmp_path: Path, data: bytes, message: str) -> None:
    path = archive(tmp_path / "m.ckpt", {"data.pkl": data, "data/0": struct.pack("<4f", 1, 2, 3, 4)})
    if not message:
        assert open_checkpoint(path).entries["x"].load().tolist() == [1, 2, 3, 4]
        return
    with pytest.raises(GgufSdError, match=message):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data.pkl": None}, "no data.pkl"),
        ({"data/0": None}, "not in the file"),
        ({"data/0": b"123"}, "not in the file"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"constants.pkl": b""}, "TorchScript"),
        ({"data.pkl": b"\x80\x02" + b"0" * 10}, "damaged one"),
        ({"data.pkl": bytes(17 << 20)}, "its table of tensors has"),
    ],
)
def test_damaged_archives(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    members = {k: v for k, v in (members_of({"x": torch.ones(4)}) | change).items() if v is not None}
    with pytest.raises(GgufSdError, match=message):
        open_checkpoint(archive(tmp_path / "m.ckpt", members))


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    members = members_of({"x": torch.ones(4)})
    with pytest.raises(GgufSdError, match=r"no data\.pkl"):
        open_checkpoint(archive(tmp_path / "m.ckpt", members, zipfile.ZIP_DEFLATED))


def refused_cheaply(path: Path, seconds: float = 1.0, megabytes: int = 60) -> None:
    started = time.process_time()
    tracemalloc.start()
    try:
        with pytest.raises(GgufSdError):
            open_checkpoint(path)
        assert tracemalloc.get_traced_memory()[1] < megabytes << 20
    finally:
        tracemalloc.stop()
    assert time.process_time() - started < 4 * seconds, "tracing takes most of it"


def nested_tuples(depth: int) -> bytes:
    """A tuple of two of itself, and so on, as the key of a dictionary: hashing it takes 2^depth steps."""
    body = b"\x80\x02})" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(depth))
    return body + b"K\x01s."


HOSTILE = {
    "nothing": b"\x80\x02.",
    "exponential key": nested_tuples(200),
    "deep": b"\x80\x02" + b")" + b"\x85" * 12_000 + b".",
    "deep lists": b"\x80\x02" + b"]" * 12_000 + b"a" * 11_999 + b".",
    "many": b"\x80\x02" + b"}" * 12_000 + b".",
    "long claim": b"\x80\x02\x8d" + struct.pack("<Q", 1 << 62) + b"x.",
    "bytes claim": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b"x.",
    "large number": b"\x80\x02L" + b"9" * 100_000 + b"L\n.",
    "numpy array": b"\x80\x02cnumpy\nndarray\n(J\xff\xff\xff\x7ftR.",
    "bytearray": b"\x80\x02cbuiltins\nbytearray\n(J\xff\xff\xff\x7ftR.",
    "storage": b"\x80\x02ctorch\nFloatStorage\n(\x8a\x05\xff\xff\xff\xff\x7ftR.",
    "extension": b"\x80\x02\x82\x01.",
    "bad mark": b"\x80\x02K\x01(t0000.",
    "recursion": b"\x80\x02]q\x00h\x00a.",
}


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("zipped", [True, False])
def test_streams_that_would_hang_or_fill_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, zipped: bool
) -> None:
    monkeypatch.setattr(pickles, "MAX_INSTRUCTIONS", 11_000)
    path = tmp_path / "m.ckpt"
    if zipped:
        archive(path, {"data.pkl": HOSTILE[name]})
    else:
        parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True})]
        path.write_bytes(b"".join(parts) + HOSTILE[name] + pickle.dumps([], 2))
    if name == "exponential key":  # it is forgotten, and what is left is a checkpoint of nothing
        assert open_checkpoint(path).entries == {}
    else:
        refused_cheaply(path)


def test_a_table_of_contents_has_a_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_file, "MAX_DIRECTORY", 100_000)
    path = archive(tmp_path / "m.ckpt", {f"{i:0200}": b"" for i in range(500)})
    refused_cheaply(path)


@pytest.mark.parametrize(
    "name",
    ["os.system", "builtins.eval", "torch.load", "torch.hub.load", "torch._utils._rebuild_x.__globals__", "a.b"],
)
def test_names_that_no_checkpoint_needs(name: str) -> None:
    module, _, function = name.rpartition(".")
    for stream in (
        b"\x80\x02c" + module.encode() + b"\n" + function.encode() + b"\n.",
        b"\x80\x04\x8c" + bytes([len(module)]) + module.encode() + b"\x8c" + bytes([len(function)]) + function.encode()
        + b"\x93.",
    ):  # fmt: skip
        assert pickletools.genops(stream)
        with pytest.raises(PickleError):
            read_pickle(io.BytesIO(stream))


def test_a_length_that_begins_as_a_pickle_does(tmp_path: Path) -> None:
    """A safetensors header of 128 bytes, or of 384, 640, …: one published file in 32 has such."""
    text = b'{"x":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(0x80)
    path = tmp_path / "m.safetensors"
    path.write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<f", 3))
    assert open_checkpoint(path).entries["x"].load().tolist() == [3]
