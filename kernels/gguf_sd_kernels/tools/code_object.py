"""What an AMD code object (an ELF file that holds a kernel's machine code) says of the kernel: where its code lies,
which registers and memory it wants, and how its arguments are laid out.

Source: LLVM's "User Guide for AMDGPU Backend", sections Code Object, Kernel Descriptor and Code Object Metadata; the
ELF-64 format; the MessagePack specification.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

PT_LOAD, PT_NOTE, SHT_RELA, SHT_DYNSYM = 1, 4, 4, 11
NT_AMDGPU_METADATA = 32
# Formats of struct for the types of Triton's signatures; pointers are addresses.
NUMBERS = {
    "i1": "<?",
    "u1": "<?",
    "i8": "<b",
    "i16": "<h",
    "i32": "<i",
    "i64": "<q",
    "u8": "<B",
    "u16": "<H",
    "u32": "<I",
    "u64": "<Q",
    "fp16": "<e",
    "fp32": "<f",
    "fp64": "<d",
}


@dataclass(frozen=True)
class Argument:
    """One argument in the kernarg segment. ``kind`` as in the metadata: "by_value", "global_buffer", "hidden_…"."""

    offset: int
    size: int
    kind: str


@dataclass(frozen=True)
class CodeObject:
    """A kernel as the loader sees it. Offsets are into ``image``, the file's segments where they belong."""

    image: bytes
    entry: int  # first instruction
    rsrc2: int  # COMPUTE_PGM_RSRC2: user registers and which of the work group's numbers follow them
    scratch: int  # bytes of private memory a lane, 0 where nothing is spilled
    properties: int  # which user registers are set up, in the order of the bits
    preload: int  # KERNARG_PRELOAD: arguments that lie in registers
    kernarg_size: int
    arguments: tuple[Argument, ...]


def parse_code_object(elf: bytes, name: str) -> CodeObject:
    """The kernel ``name`` of a code object of version 4 or newer.

    Raises ValueError where that is no such file, has no such kernel, or needs relocations.
    """
    if elf[:6] != b"\x7fELF\x02\x01":
        raise ValueError("a code object is a little-endian 64-bit ELF file, this is none")
    image, notes = _segments(elf)
    start = _symbol(elf, f"{name}.kd")
    scratch, kernarg_size = struct.unpack_from("<II", image, start + 4)
    (code,) = struct.unpack_from("<q", image, start + 16)
    _, rsrc2, properties, preload = struct.unpack_from("<IIHH", image, start + 48)
    kernels = _metadata(notes)["amdhsa.kernels"]
    arguments = next((kernel[".args"] for kernel in kernels if kernel[".name"] == name), None)
    if arguments is None:
        raise ValueError(f"the code object's metadata has no kernel {name}, it has {[k['.name'] for k in kernels]}")
    return CodeObject(
        image=image,
        entry=start + code,
        rsrc2=rsrc2,
        scratch=scratch,
        properties=properties,
        preload=preload,
        kernarg_size=kernarg_size,
        arguments=tuple(Argument(a[".offset"], a[".size"], a[".value_kind"]) for a in arguments),
    )


def pack_kernargs(
    code: CodeObject, values: Sequence[tuple[str, int | float]], grid: Sequence[int], threads: int
) -> bytes:
    """The kernarg segment for a launch of ``grid`` work groups of ``threads`` in a row.

    ``values`` are (type, value) of the kernel's arguments, types as in Triton's signatures; a pointer's value is its
    address. Arguments that the compiler added after them (Triton's own scratch memory) are null pointers. Raises
    ValueError where the values are not those the kernel takes.
    """
    segment = bytearray(code.kernarg_size)
    visible = [a for a in code.arguments if not a.kind.startswith("hidden_")]
    added = visible[len(values) :]
    if len(values) > len(visible) or any(a.kind != "global_buffer" for a in added):
        raise ValueError(f"the kernel takes {len(visible)} arguments, got {len(values)}")
    for argument, (kind, value) in zip(visible, values, strict=False):
        pointer = kind.startswith("*")
        form = "<Q" if pointer else NUMBERS.get(kind, "")
        if not form or struct.calcsize(form) != argument.size or pointer != (argument.kind == "global_buffer"):
            raise ValueError(f"{argument} cannot be a {kind}")
        struct.pack_into(form, segment, argument.offset, value)
    sizes = (threads, 1, 1)
    for i, axis in enumerate("xyz"):
        hidden = {
            f"hidden_block_count_{axis}": ("<I", grid[i]),
            f"hidden_group_size_{axis}": ("<H", sizes[i]),
            f"hidden_remainder_{axis}": ("<H", 0),
        }
        for argument in code.arguments:
            if argument.kind in hidden:
                form, number = hidden[argument.kind]
                struct.pack_into(form, segment, argument.offset, number)
    return bytes(segment)


def _segments(elf: bytes) -> tuple[bytes, list[bytes]]:
    """(loadable segments at their addresses, note segments)."""
    (offset,) = struct.unpack_from("<Q", elf, 32)
    size, count = struct.unpack_from("<HH", elf, 54)
    image, notes = bytearray(), []
    for i in range(count):
        kind, _, at, address, _, filled, whole, _ = struct.unpack_from("<IIQQQQQQ", elf, offset + i * size)
        if kind == PT_LOAD:
            image.extend(bytes(max(0, address + whole - len(image))))
            image[address : address + filled] = elf[at : at + filled]
        elif kind == PT_NOTE:
            notes.append(elf[at : at + filled])
    return bytes(image), notes


def _symbol(elf: bytes, name: str) -> int:
    """The address of a symbol of the dynamic symbol table."""
    (offset,) = struct.unpack_from("<Q", elf, 40)
    size, count = struct.unpack_from("<HH", elf, 58)
    sections = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + i * size) for i in range(count)]
    if any(kind == SHT_RELA and length for _, kind, _, _, _, length, *_ in sections):
        raise ValueError("the code object needs relocations, which are not supported")
    found = []
    for _, kind, _, _, at, length, link, *_ in sections:
        if kind == SHT_DYNSYM:
            strings = sections[link][4]
            for entry in range(at, at + length, 24):
                where, _, _, _, value, _ = struct.unpack_from("<IBBHQQ", elf, entry)
                symbol = elf[strings + where : elf.index(0, strings + where)].decode()
                if symbol == name:
                    return int(value)
                found.append(symbol)
    raise ValueError(f"the code object has no symbol {name}, it has {', '.join(filter(None, found))}")


def _metadata(notes: Sequence[bytes]) -> dict[str, Any]:
    for note in notes:
        at = 0
        while at < len(note):
            owner, length, kind = struct.unpack_from("<III", note, at)
            start = at + 12 + -(-owner // 4) * 4
            if kind == NT_AMDGPU_METADATA and note[at + 12 : at + 12 + owner].rstrip(b"\0") == b"AMDGPU":
                value, _ = unpack_message(note[start : start + length])
                if isinstance(value, dict) and "amdhsa.kernels" in value:
                    return value
            at = start + -(-length // 4) * 4
    raise ValueError("the code object has no metadata of AMDGPU kernels")


# First byte of a MessagePack value -> struct's format of its number, or of the length that follows.
_NUMBER_FORMS = {
    0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h", 0xD2: ">i",
    0xD3: ">q",
}  # fmt: skip
_LENGTH_FORMS = {
    0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I"), 0xDC: ("array", ">H"), 0xDD: ("array", ">I"),
    0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip


def unpack_message(data: bytes, at: int = 0) -> tuple[Any, int]:
    """(value at ``at`` of a MessagePack message, where it ends): what code objects' metadata is written in, so without
    byte strings and extensions, for which ValueError is raised."""
    first = data[at]
    at += 1
    if first < 0x80 or first >= 0xE0:
        return first - (256 if first >= 0xE0 else 0), at
    if first in (0xC0, 0xC2, 0xC3):
        return {0xC0: None, 0xC2: False, 0xC3: True}[first], at
    if form := _NUMBER_FORMS.get(first):
        return struct.unpack_from(form, data, at)[0], at + struct.calcsize(form)
    if first < 0x90:
        return _unpack_several(data, at, "map", first & 0x0F)
    if first < 0xA0:
        return _unpack_several(data, at, "array", first & 0x0F)
    if first < 0xC0:
        return _unpack_several(data, at, "str", first & 0x1F)
    if first not in _LENGTH_FORMS:
        raise ValueError(f"no metadata has MessagePack values of type {first:#x}")
    kind, form = _LENGTH_FORMS[first]
    return _unpack_several(data, at + struct.calcsize(form), kind, struct.unpack_from(form, data, at)[0])


def _unpack_several(data: bytes, at: int, kind: str, count: int) -> tuple[Any, int]:
    if kind == "str":
        return data[at : at + count].decode(), at + count
    values = []
    for _ in range(2 * count if kind == "map" else count):
        value, at = unpack_message(data, at)
        values.append(value)
    return (dict(zip(values[::2], values[1::2], strict=True)) if kind == "map" else values), at
