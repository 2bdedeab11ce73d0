"""Weight files and pictures that almost make sense: real ones taken apart, something changed, put together again."""

from __future__ import annotations

import io
import itertools
import json
import pickletools
import random
import struct
import zipfile
import zlib
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tests.fuzz.gguf_mutator import NUMBERS, TEXTS, mutated_json, nasty
from tests.fuzz.text_mutator import mutated_settings

# Instructions of pickle that a stranger may put anywhere.
INSTRUCTIONS = (
    b"N", b"(", b"t", b"0", b"1", b"2", b"}", b"]", b")", b"\x85", b"\x86", b"\x87", b"s", b"u", b"a", b"e", b"R", b"b",
    b"Q", b"\x81", b"\x94", b"q\x00", b"h\x00", b"h\xff", b"j\xff\xff\xff\xff", b"K\x00", b"J\xff\xff\xff\xff",
    b"\x8a\x08" + b"\xff" * 8, b"G" + struct.pack(">d", float("nan")), b"X\x04\x00\x00\x00\xff\xff\xff\xff",
    b"X\xff\xff\xff\x7f", b"\x8d" + b"\xff" * 8, b"cos\nsystem\n", b"cbuiltins\neval\n", b"ctorch\nFloatStorage\n",
    b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_sparse_tensor\n", b"L" + b"9" * 5000 + b"L\n", b"\xff",
    b"I01\n", b"Vtext\n", b"\x8f", b"\x90", b"\x91", b"\x93", b"d", b"l", b".", b"ctorch\nSize\n", b"\x80\x05",
)  # fmt: skip
LEAVES = ("alpha", "lora_down.weight", "lora_up.weight", "lora_mid.weight", "hada_w1_a", "hada_t1", "lokr_w1_b",
          "lokr_t2", "diff", "diff_b", "dora_scale", "lora_A.weight", "oft_blocks", "clip_g")  # fmt: skip
PICTURE_FORMATS = ("PNG", "PNG", "PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "ICO", "PCX", "TGA")


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Cut short or with a few bytes changed, now and then."""
    if rng.random() < 0.1:
        raw = raw[: rng.randrange(len(raw) + 1)]
    if raw and rng.random() < 0.2:
        at = rng.randrange(len(raw))
        raw = raw[:at] + rng.randbytes(rng.choice((1, 2, 8))) + raw[at + rng.choice((0, 1, 8)) :]
    return raw


def mutated_safetensors(header: dict[str, Any], rng: random.Random) -> tuple[bytes, int]:
    """The beginning of a file, and its size: the data are zeros."""
    rows = json.loads(json.dumps(header))
    size = max((row["data_offsets"][1] for row in rows.values() if "data_offsets" in row), default=0)
    for _ in range(rng.choice((1, 1, 2))):
        row = rows[rng.choice(list(rows))]
        what = rng.randrange(6)
        if what == 0 and isinstance(row, dict):
            row[rng.choice(("dtype", "shape", "data_offsets"))] = nasty(rng)
        elif what == 1 and isinstance(row, dict):
            row["shape"] = rng.choice(([], [0], [1], [rng.choice(NUMBERS)] * 2, [2] * 9, [1.0, 2]))
        elif what == 2 and isinstance(row, dict):
            row["dtype"] = rng.choice(("F64", "F16", "F4", "C64", "U8", "X", "BOOL", 7))
        elif what == 3:
            del rows[rng.choice(list(rows))]
        elif what == 4:
            rows[rng.choice(TEXTS)] = rows[rng.choice(list(rows))]
        else:
            rows["__metadata__"] = {rng.choice(TEXTS): nasty(rng)} if rng.random() < 0.5 else nasty(rng)
        if not rows:
            break
    text = mutated_json(rows, rng) if rows and rng.random() < 0.3 else json.dumps(rows)
    raw = damaged(text.encode("utf-8", "surrogatepass"), rng)
    length = len(raw) if rng.random() < 0.9 else rng.choice(NUMBERS)
    size = size + 8 + len(raw) - (rng.randrange(100) if rng.random() < 0.1 else 0)
    return struct.pack("<Q", length) + raw, size


def mutated_state(state: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """A sound file's tensors, one or two of them of another name, shape, type or value."""
    state = dict(state)
    for _ in range(rng.choice((0, 1, 1, 1, 2))):
        name, what = rng.choice(list(state)), rng.randrange(6)
        tensor = state[name]
        if what == 0:
            del state[name]
        elif what == 1:
            stem, _, leaf = name.rpartition(".")
            state[rng.choice((f"{stem}.{rng.choice(LEAVES)}", f"x{name}", f"{name}.{leaf}", leaf))] = state.pop(name)
        elif what == 2:
            shapes = ([0], [1], [2, 3], [1] * 9, [*tensor.shape, 1], [*tensor.shape[::-1]], [*tensor.shape[:-1], 7])
            state[name] = torch.ones(rng.choice(shapes))
        elif what == 3:
            state[name] = tensor.to(rng.choice((torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn)))
        elif what == 4:
            state[name] = torch.full_like(tensor.float(), rng.choice((float("nan"), float("inf"), -1e38, 0.0)))
        else:
            state[f"{name.rpartition('.')[0]}.{rng.choice(LEAVES)}"] = tensor
        if not state:
            break
    return {name: tensor.clone().contiguous() for name, tensor in state.items()}


def instructions(pickled: bytes) -> list[bytes]:
    """A pickle taken apart."""
    at = [position for _, _, position in pickletools.genops(pickled)] + [len(pickled)]
    return [pickled[a:b] for a, b in itertools.pairwise(at)]


def mutated_pickle(parts: list[bytes], rng: random.Random) -> bytes:
    parts = list(parts)
    for _ in range(rng.choice((1, 1, 2, 5))):
        at, what = rng.randrange(len(parts)), rng.randrange(5)
        if what == 0:
            del parts[at]
        elif what == 1:
            parts.insert(at, rng.choice(INSTRUCTIONS) * rng.choice((1, 1, 1, 1000)))
        elif what == 2:
            parts[at] = rng.choice(INSTRUCTIONS)
        elif what == 3:
            other = rng.randrange(len(parts))
            parts[at], parts[other] = parts[other], parts[at]
        else:
            parts[at] = parts[at][:1] + rng.randbytes(max(len(parts[at]) - 1, 0))
        if not parts:
            break
    return b"".join(parts)


def mutated_archive(members: dict[str, bytes], table: list[bytes], rng: random.Random) -> bytes:
    """A zip archive of torch.save's, its table of tensors or something else wrong."""
    members = members | {"m/data.pkl": mutated_pickle(table, rng)}
    if rng.random() < 0.1:
        members.pop(rng.choice(list(members)))
    if rng.random() < 0.1:
        name = rng.choice(list(members))
        members[name] = damaged(members[name], rng)[: rng.randrange(200)]
    kind = zipfile.ZIP_DEFLATED if rng.random() < 0.05 else zipfile.ZIP_STORED
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", kind) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return damaged(buffer.getvalue(), rng)


def picture(kind: str, rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    mode = rng.choice(("RGB", "L", "P", "1", "RGBA", "I;16")) if kind in ("PNG", "TIFF") else "RGB"
    Image.new(mode, (rng.randrange(1, 9), rng.randrange(1, 9))).save(buffer, kind)
    return buffer.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _text_chunk(rng: random.Random) -> bytes:
    text = (mutated_settings(rng) if rng.random() < 0.8 else rng.choice(TEXTS)).encode("utf-8", "surrogatepass")
    kind = rng.randrange(4)
    if kind == 0:
        return chunk(b"tEXt", b"parameters\0" + text)
    if kind == 1:
        return chunk(b"iTXt", b"parameters\0\0\0\0\0" + text)
    if kind == 2:
        return chunk(b"zTXt", b"parameters\0\0" + zlib.compress(text * rng.choice((1, 1, 200))))
    return chunk(rng.choice((b"eXIf", b"iCCP", b"tRNS", b"PLTE", b"acTL", b"IDAT", b"gAMA")), text[:2000])


def mutated_picture(rng: random.Random) -> bytes:
    """A small picture with strange texts, sizes or damage; its checksums are right where they can be."""
    kind = rng.choice(PICTURE_FORMATS)
    raw = picture(kind, rng)
    if kind != "PNG":
        return damaged(damaged(raw, rng), rng)
    begin, rest = raw[:33], raw[33:]
    if rng.random() < 0.2:
        size = struct.pack(">II", rng.choice(NUMBERS) % 2**32, rng.choice(NUMBERS) % 2**32)
        begin = raw[:8] + chunk(
            b"IHDR", size + bytes((rng.choice((1, 8, 16, 99)), rng.choice((0, 2, 3, 6, 7)), 0, 0, 0))
        )
    texts = b"".join(_text_chunk(rng) for _ in range(rng.randrange(3)))
    return damaged(begin + texts + rest, rng)
