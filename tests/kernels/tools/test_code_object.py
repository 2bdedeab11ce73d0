"""Reading code objects and packing kernel arguments, against what the compiler's own assembly says of the kernel."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gguf_sd_kernels.tools.code_object import (
    Argument,
    CodeObject,
    pack_kernargs,
    parse_code_object,
    unpack_message,
)

COMPILE = """
import sys
from pathlib import Path
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from gguf_sd_kernels.triton.norm import layer_norm_kernel as kernel

types = {"x": "*fp16", "weight": "*fp16", "bias": "*fp16", "out": "*fp16", "C": "i32", "eps": "fp32"}
source = ASTSource(kernel, types | {"WIDTH": "constexpr"}, {"WIDTH": 512})
built = triton.compile(source, target=GPUTarget("hip", "gfx1100", 32), options={"num_warps": 2})
folder = Path(sys.argv[1])
(folder / "kernel.elf").write_bytes(built.asm["hsaco"])
(folder / "kernel.s").write_text(built.asm["amdgcn"])
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, str]:
    """Layer norm's code object and assembly for gfx1100; in a process that does not interpret."""
    pytest.importorskip("triton")
    folder = tmp_path_factory.mktemp("code")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(Path(__file__).parents[3] / "kernels"), "TRITON_CACHE_DIR": str(folder)}
    subprocess.run([sys.executable, "-c", COMPILE, str(folder)], env=environment, check=True)
    return (folder / "kernel.elf").read_bytes(), (folder / "kernel.s").read_text()


def number(assembly: str, field: str) -> int:
    found = re.search(rf"{re.escape(field)}:?\s+(\d+)", assembly)
    assert found
    return int(found[1])


def test_a_code_object_is_what_the_assembly_says(compiled: tuple[bytes, str]) -> None:
    elf, assembly = compiled
    code = parse_code_object(elf, "layer_norm_kernel")
    assert code.kernarg_size == number(assembly, ".kernarg_segment_size")
    assert code.scratch == number(assembly, ".private_segment_fixed_size") == 0
    assert code.rsrc2 >> 1 & 0x1F == number(assembly, ".amdhsa_user_sgpr_count")
    assert code.rsrc2 >> 7 & 1 == number(assembly, ".amdhsa_system_sgpr_workgroup_id_x")
    assert bool(code.properties & 8) == number(assembly, ".amdhsa_user_sgpr_kernarg_segment_ptr")
    assert code.preload == 0
    declared = re.findall(r"\.offset:\s+(\d+)\s+\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", assembly)
    assert [(str(a.offset), str(a.size), a.kind) for a in code.arguments] == declared
    assert struct.pack("<I", 0xBFB00000) in code.image[code.entry :]  # s_endpgm


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda elf: b"PK" + elf[2:], "ELF"),
        (lambda elf: elf.replace(b"layer_norm_kernel.kd", b"layer_norm_kernel.xx"), "no symbol layer_norm_kernel.kd"),
        (lambda elf: elf.replace(b"amdhsa.kernels", b"amdhsa.colonel"), "metadata"),
    ],
)
def test_what_is_no_code_object_is_refused(compiled: tuple[bytes, str], change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_code_object(change(compiled[0]), "layer_norm_kernel")


def code(*arguments: Argument, size: int = 64) -> CodeObject:
    return CodeObject(b"", 0, 0, 0, 8, 0, size, arguments)


def test_kernargs_lie_where_the_metadata_says() -> None:
    arguments = (
        Argument(0, 8, "global_buffer"),
        Argument(8, 4, "by_value"),
        Argument(12, 4, "by_value"),
        Argument(16, 8, "global_buffer"),  # the compiler's own
        Argument(24, 4, "hidden_block_count_x"),
        Argument(28, 4, "hidden_block_count_y"),
        Argument(36, 2, "hidden_group_size_x"),
        Argument(38, 2, "hidden_group_size_y"),
        Argument(48, 8, "hidden_hostcall_buffer"),
    )
    packed = pack_kernargs(code(*arguments), [("*fp16", 0xABCDEF0123), ("i32", -7), ("fp32", 0.25)], (5, 3, 1), 256)
    assert struct.unpack_from("<QifQII", packed) == (0xABCDEF0123, -7, 0.25, 0, 5, 3)
    assert struct.unpack_from("<HH", packed, 36) == (256, 1)
    assert packed[40:] == bytes(24)


@pytest.mark.parametrize(
    "values",
    [
        [("i32", 1)],  # for a pointer
        [("*fp16", 1), ("i64", 1)],  # too wide
        [("*fp16", 1), ("*fp16", 1)],
        [("*fp16", 1), ("i32", 1), ("i32", 1)],  # one too many
        [("*fp16", 1)],  # one too few: the compiler adds pointers, not numbers
        [("*fp16", 1), ("tensordesc", 1)],
    ],
)
def test_other_kernargs_are_refused(values: list[tuple[str, int]]) -> None:
    with pytest.raises(ValueError, match=r"argument|cannot be"):
        pack_kernargs(code(Argument(0, 8, "global_buffer"), Argument(8, 4, "by_value")), values, (1, 1, 1), 32)


@pytest.mark.parametrize(
    ("message", "value"),
    [
        ("93 01 ff cc c8", [1, -1, 200]),
        ("82 a1 61 c0 a1 62 c3", {"a": None, "b": True}),
        ("cd 01 00", 256),
        ("ce 00 01 00 00", 65536),
        ("d1 ff 00", -256),
        ("cf 00 00 00 01 00 00 00 00", 1 << 32),
        ("cb 3f f8 00 00 00 00 00 00", 1.5),
        ("d9 03 61 62 63", "abc"),
        ("dc 00 02 02 03", [2, 3]),
        ("de 00 01 a1 6b 90", {"k": []}),
    ],
)
def test_messages(message: str, value: object) -> None:
    """Bytes written by hand from the MessagePack specification."""
    data = bytes.fromhex(message)
    assert unpack_message(data) == (value, len(data))


def test_an_unknown_message_is_refused() -> None:
    with pytest.raises(ValueError, match="0xc4"):
        unpack_message(bytes.fromhex("c4 01 00"))
