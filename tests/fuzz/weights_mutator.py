"""Weight files that almost make sense: .safetensors with a header changed, .ckpt with foreign things in the pickle."""

from __future__ import annotations

import io
import json
import pickle
import random
import struct
import zipfile
from typing import Any

import torch

from tests.fuzz.gguf_mutator import NUMBERS, TEXTS, nasty

DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "I64", "U8", "BOOL", "F4", "", "Q4_0")


def safetensors(state: dict[str, torch.Tensor], rng: random.Random) -> bytes:
    """A .safetensors file of these tensors with one to three things wrong in its header or its length."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data, at = [], 0
    for name, tensor in state.items():
        raw = tensor.contiguous().numpy().tobytes()
        header[name] = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [at, at + len(raw)]}
        data.append(raw)
        at += len(raw)
    for _ in range(rng.choice((1, 1, 2, 3))):
        _spoil_header(header, rng)
    text = json.dumps(header).encode()
    if rng.random() < 0.1:
        text = rng.choice((b"{" * 3000, b"[]", b"", b'{"a": ' * 5000, b'{"__metadata__": 3}', text[: len(text) // 2]))
    length = rng.choice(NUMBERS) if rng.random() < 0.1 else len(text)
    raw = struct.pack("<Q", length) + text + b"".join(data)
    return raw[: rng.randrange(len(raw))] if rng.random() < 0.15 else raw


def _spoil_header(header: dict[str, Any], rng: random.Random) -> None:
    name = rng.choice(list(header))
    what = rng.randrange(7)
    entry = header[name]
    if what == 0:
        header[rng.choice(TEXTS)[:500]] = header.pop(name)
    elif what == 1:
        header[name] = nasty(rng)
    elif what == 2:
        header["__metadata__"] = rng.choice((nasty(rng), {"a": nasty(rng)}, {"modelspec.architecture": nasty(rng)}))
    elif isinstance(entry, dict) and "shape" in entry:
        if what == 3:
            entry["dtype"] = rng.choice(DTYPES)
        elif what == 4:
            entry["shape"] = rng.choice(([], [0], [-1], entry["shape"][::-1], [rng.choice(NUMBERS)], nasty(rng)))
        elif what == 5:
            entry["data_offsets"] = rng.choice(([0, rng.choice(NUMBERS)], [9, 3], nasty(rng), [-4, 4]))
        else:
            entry[rng.choice(("dtype", "shape", "data_offsets"))] = nasty(rng)


def checkpoint(state: dict[str, torch.Tensor], rng: random.Random) -> bytes:
    """A .ckpt of these tensors with something in it that is no plain tensor, or with its bytes changed."""
    content: Any = {"state_dict": dict(state), "global_step": 3}
    name = rng.choice(list(state))
    content["state_dict"][name] = rng.choice(_STRANGE)(state[name])
    if rng.random() < 0.2:
        content = rng.choice(([], None, 3, {"state_dict": 7}, {"state_dict": {3: 4}}, "x", {"a": {"b": {}}}))
    buffer = io.BytesIO()
    if rng.random() < 0.15:
        raw = rng.choice(_PICKLES)
    else:
        torch.save(content, buffer)
        raw = buffer.getvalue()
    if rng.random() < 0.4:
        at = rng.randrange(max(1, min(len(raw), 3000)))
        raw = raw[:at] + rng.randbytes(rng.choice((1, 3))) + raw[at + 1 :]
    return raw[: rng.randrange(1, len(raw) + 1)] if rng.random() < 0.15 else raw


_STRANGE = (
    lambda tensor: tensor,
    lambda tensor: torch.empty(tensor.shape, device="meta"),
    lambda tensor: torch.empty(1 << 40, device="meta"),
    lambda tensor: tensor.to_sparse(),
    lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
    lambda tensor: torch.nested.nested_tensor([tensor, tensor]),
    lambda tensor: tensor.to(torch.complex64),
    lambda tensor: tensor.flatten()[:1].expand(1 << 20),
    lambda tensor: torch.nn.Parameter(tensor),
    lambda tensor: torch.tensor(3.0),
    lambda tensor: tensor.long(),
    lambda tensor: None,
    lambda tensor: {"nested": {"deep": tensor}},
    lambda tensor: tensor.t() if tensor.dim() == 2 else tensor,
    lambda tensor: tensor.flatten()[1:],
    lambda tensor: torch.empty(0),
)


class _Evil:
    def __reduce__(self) -> Any:
        return (print, ("this must never be printed",))


def _zip_of(entries: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return buffer.getvalue()


_PICKLES = (
    pickle.dumps(_Evil()),
    pickle.dumps({"state_dict": {}}),
    b"\x80\x02]" + b"2" * 200 + b".",  # duplicates the top of the stack over and over
    b"\x80\x02(" + b"(l" * 90 + b".",
    b"\x80\x04\x95" + b"\xff" * 8 + b".",
    _zip_of({}),
    _zip_of({"archive/data.pkl": b""}),
    _zip_of({"archive/data.pkl": pickle.dumps(_Evil()), "archive/version": b"3"}),
    _zip_of({"archive/data.pkl": pickle.dumps({"state_dict": {"a": 1}}), "archive/version": b"3\n"}),
)
