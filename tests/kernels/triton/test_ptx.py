"""The inline PTX that decodes codes, executed here by a small model of the seven instructions it uses."""

from __future__ import annotations

import re

import numpy as np
import pytest

pytest.importorskip("triton")

from gguf_sd_kernels.triton.tiles import BYTES_PTX, NIBBLES_PTX_0, NIBBLES_PTX_8

Registers = dict[str, np.ndarray]


def run_ptx(ptx: str, source: str, words: np.ndarray) -> Registers:
    """Executes ``ptx`` on uint32 ``words`` in register ``source``; returns all registers, uint32 [words]."""
    registers: Registers = {source: words}

    def value(operand: str) -> np.ndarray:
        if operand in registers:
            return registers[operand]
        return np.full(len(words), int(operand, 0), np.uint32)

    for line in ptx.strip().removeprefix("{").removesuffix("}").split(";"):
        if not (line := line.strip()) or line.startswith(".reg"):
            continue
        name, _, rest = line.partition(" ")
        target, *operands = (operand.strip() for operand in rest.split(","))
        a, *others = (value(operand) for operand in operands)
        if name == "mov.b32":
            result = a
        elif name == "prmt.b32":
            result = permute(a, others[0], int(operands[2], 0))
        elif name == "lop3.b32":
            assert int(operands[3], 0) == (0xF0 & 0xCC) | 0xAA  # the table of (a & b) | c
            result = (a & others[0]) | others[1]
        elif name == "sub.f16x2":
            result = (halves(a) - halves(others[0])).view(np.uint32)
        elif name == "fma.rn.f16x2":
            exact = halves(a).astype(np.float64) * halves(others[0]) + halves(others[1])
            result = exact.astype(np.float16).view(np.uint32)
        else:
            raise AssertionError(f"no model of {name}")
        registers[target] = result.copy()
    return registers


def permute(a: np.ndarray, b: np.ndarray, selector: int) -> np.ndarray:
    """prmt.b32: each nibble of the selector picks one of the eight bytes of (b, a)."""
    pool = np.concatenate([a.view(np.uint8).reshape(-1, 4), b.view(np.uint8).reshape(-1, 4)], axis=1)
    picked = [pool[:, selector >> 4 * i & 7] for i in range(4)]
    return np.ascontiguousarray(np.stack(picked, axis=1)).view(np.uint32)[:, 0]


def halves(words: np.ndarray) -> np.ndarray:
    return words.view(np.float16)


def output(registers: Registers, *names: str) -> np.ndarray:
    """Registers of one output, in order: float16 [words, 4]."""
    return np.concatenate([halves(registers[name]).reshape(-1, 2) for name in names], axis=1)


@pytest.mark.parametrize(("ptx", "zero_point"), [(NIBBLES_PTX_0, 0), (NIBBLES_PTX_8, 8)])
def test_nibbles(ptx: object, zero_point: int) -> None:
    packed = np.random.default_rng(1).permutation(np.repeat(np.arange(256, dtype=np.uint8), 16)).reshape(-1, 4)
    registers = run_ptx(str(getattr(ptx, "value", ptx)), "$4", packed.view(np.uint32)[:, 0])
    assert np.array_equal(output(registers, "$0", "$1"), (packed & 15).astype(np.float16) - zero_point)
    assert np.array_equal(output(registers, "$2", "$3"), (packed >> 4).astype(np.float16) - zero_point)


def test_bytes() -> None:
    packed = np.random.default_rng(2).permutation(np.repeat(np.arange(256, dtype=np.uint8), 16)).reshape(-1, 4)
    registers = run_ptx(str(getattr(BYTES_PTX, "value", BYTES_PTX)), "$2", packed.view(np.uint32)[:, 0])
    assert np.array_equal(output(registers, "$0", "$1"), packed.astype(np.float16) - 128)


def test_text_is_a_complete_block() -> None:
    for ptx in (NIBBLES_PTX_0, NIBBLES_PTX_8, BYTES_PTX):
        text = str(getattr(ptx, "value", ptx))
        assert re.fullmatch(r"\{[^{}]*\}", text), text
