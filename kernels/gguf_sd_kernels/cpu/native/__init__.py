"""Kernels in C++ for what torch has no operator for, or a slower one: attention and products of bytes in AMX's tiles,
norms that end in 8 bits.

They are built on first use where there is a compiler (:mod:`~gguf_sd_kernels.cpu.native.build`). Whoever calls them
asks first whether they are there, and has a way through torch where they are not.
"""

from __future__ import annotations

import ctypes
import logging
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from gguf_sd_kernels.cpu import processor
from gguf_sd_kernels.cpu.native.build import built

log = logging.getLogger(__name__)

WIDTH = 16  # values in a vector: norms take multiples of it
MAX_HEAD, MAX_THREADS = 256, 256
BLOCK, DEPTH = 32, 64  # columns of a product's weight come in blocks of so many, and what it sums over
BEHIND = BLOCK + 2  # pixels behind a map with a margin that its last block may read
TOLERANCE = 1e-2  # of attention, in what is tried before it is used

_pointer, _int64, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES: dict[str, tuple[list[type], type | None]] = {
    "quantize": ([_pointer, *[_int64] * 3, _int, _pointer, _pointer, _int], None),
    "layer_norm_quantize": ([_pointer, _int64, _int64, *[_pointer] * 2, _float, *[_pointer] * 3, _int], None),
    "group_norm_quantize": ([_pointer, *[_int64] * 4, *[_pointer] * 2, _float, _int, *[_pointer] * 3, _int], None),
    "encode": ([_pointer, _int64, _int64, ctypes.c_int32, _pointer, _pointer, _int], None),
    "pack": ([_pointer, _int64, _int64, _pointer, _pointer, _int], None),
    "product": ([_pointer, _pointer, _pointer, _int], None),
    "tiles_allowed": ([], _int),
    "attention_scratch": ([_int64] * 4, _int64),
    "attention": ([*[_pointer] * 5, *[_int64] * 5, _float, _pointer, _int], None),
}


class Code(ctypes.Structure):
    """A value is ``scale * (code - zero)``; the scale is NaN where one was not finite."""

    _fields_ = (("scale", ctypes.c_float), ("zero", ctypes.c_int32))
    scale: float
    zero: int


class Input(ctypes.Structure):
    """See products.cpp; so the two below."""

    _fields_ = (
        *((("x", _pointer), ("rows", _int64), ("stride", _int64), ("depth", _int64), ("taps", _int64))),
        *((("starts", _pointer), ("scale", _float), ("zero", ctypes.c_int32))),
    )


class Weights(ctypes.Structure):
    _fields_ = (("packed", _pointer), ("columns", _int64), ("scales", _pointer), ("sums", _pointer), ("bias", _pointer))


class Output(ctypes.Structure):
    _fields_ = (
        *((("out", _pointer), ("residual", _pointer), ("across", _int64), ("width", _int64))),
        *((("line_step", _int64), ("step", _int64), ("after", ctypes.c_int32))),
    )


ENCODED = {"Q4_0": (0, 18), "Q4_1": (1, 20), "Q8_0": (2, 34)}  # how `encode` calls a type, and bytes of its 32 weights
NOTHING, GELU, GATE = range(3)  # what comes after a product


class Coded(NamedTuple):
    """uint8, and what they stand for."""

    values: Tensor
    scale: float
    zero: int


class Packed(NamedTuple):
    """A weight of ``columns`` results, int8 in tiles, and the sum of each column's values, int32."""

    values: Tensor
    sums: Tensor


@cache
def _library() -> ctypes.CDLL | None:
    library = built()
    if library is None:
        return None
    for name, (takes, returns) in _SIGNATURES.items():
        if hasattr(library, name):
            function = getattr(library, name)
            function.argtypes, function.restype = takes, returns
    return library


def is_there() -> bool:
    """Whether the kernels can be called now."""
    return not is_compiling() and _library() is not None


@cache
def _has_tiles() -> bool:
    """Whether attention in tiles is there, allowed, and right."""
    library = _library()
    if library is None or not processor.has_tiles() or not hasattr(library, "attention") or library.tiles_allowed():
        return False
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, n, 40, generator=random).bfloat16() for n in (40, 77, 77))
    want = F.scaled_dot_product_attention(q.float(), k.float(), v.float())
    if (attention(q, k, v) - want).norm() < TOLERANCE * want.norm():
        return True
    log.warning("attention as built by this machine's compiler is wrong: torch's is used")  # pragma: no cover
    return False  # pragma: no cover


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether :func:`attention` takes such operands, here and now."""
    if is_compiling() or not 0 < q.shape[-1] <= MAX_HEAD or not k.shape[2]:
        return False
    for x in (q, k, v):
        if x.dtype != torch.bfloat16 or not x.is_cpu or (x.requires_grad and torch.is_grad_enabled()):
            return False
    return _has_tiles()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As :func:`gguf_sd_kernels.cpu.attention.attention`, of bfloat16; heads with gaps within a row are copied."""
    library = _library()
    assert library is not None
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    batch, heads, queries, dim = q.shape
    out = q.new_empty(batch, queries, heads, dim).transpose(1, 2)
    scratch = q.new_empty(library.attention_scratch(batch, heads, k.shape[2], dim))
    strides = (_int64 * 12)(*(x.stride(i) for x in (q, k, v, out) for i in range(3)))
    library.attention(
        *(x.data_ptr() for x in (q, k, v, out)),
        strides,
        *(batch, heads, queries, k.shape[2], dim),
        dim**-0.5,
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def encodes(blocks: Tensor, qtype: str) -> bool:
    """Whether :func:`encode` takes blocks uint8 ``[rows, bytes]`` of this type, here and now."""
    if qtype not in ENCODED or not is_there() or not hasattr(_library(), "encode"):
        return False
    return blocks.is_cpu and blocks.is_contiguous() and blocks.shape[1] % ENCODED[qtype][1] == 0


def encode(blocks: Tensor, qtype: str) -> tuple[Tensor, Tensor]:
    """The weights of blocks in 8 bits, int8 ``[rows, columns]``, and each row's scale, float32 ``[rows]``."""
    library = _library()
    assert library is not None
    kind, nbytes = ENCODED[qtype]
    columns = blocks.shape[1] // nbytes * 32
    values, scales = torch.empty(len(blocks), columns, dtype=torch.int8), torch.empty(len(blocks))
    operands = blocks.data_ptr(), len(blocks), columns, kind, values.data_ptr(), scales.data_ptr()
    library.encode(*operands, torch.get_num_threads())
    return values, scales


def quantizes(x: Tensor, width: int = WIDTH) -> bool:
    """Whether the functions below take ``x``, whose rows are of ``width`` values, here and now."""
    return x.dtype == torch.bfloat16 and x.is_cpu and x.numel() > 0 and width % WIDTH == 0 and is_there()


def quantize(x: Tensor, silu: bool, margin: bool = False) -> Coded:
    """``x``, or SiLU of it, in 8 bits: bfloat16 without gaps, of any shape; with a ``margin``, see :func:`_map`, a
    picture [H, W, C]."""
    width, line = (x.shape[-1], x.shape[1]) if margin else (x.shape[-1] if x.dim() else 1, 0)
    out, places, code = *_map(x, margin), Code()
    _call("quantize", x.data_ptr(), x.numel() // width, width, line, silu, places.data_ptr(), code)
    return Coded(out, code.scale, code.zero)


def _map(x: Tensor, margin: bool) -> tuple[Tensor, Tensor]:
    """uint8 of x's shape, and the memory that it lies in. For x [H, W, C] that can have a margin of one pixel all
    around, which convolutions read, and behind it so much that they may read on."""
    if not margin:
        plain = torch.empty(x.shape, dtype=torch.uint8)
        return plain, plain
    height, width, channels = x.shape
    pixels = (height + 2) * (width + 2)
    memory = torch.empty((pixels + BEHIND) * channels, dtype=torch.uint8)
    around = memory[: pixels * channels].view(height + 2, width + 2, channels)
    return around[1:-1, 1:-1], memory


def with_margin(x: Tensor, zero: int) -> Tensor:
    """uint8 ``x [H, W, C]`` with a margin of ``zero``."""
    out, memory = _map(x, True)
    memory.fill_(zero)
    return out.copy_(x)


def layer_norm_quantize(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Coded:
    """The layer norm of ``x [..., C]``, in 8 bits: bfloat16, ``weight, bias [C]`` float32, none with gaps."""
    width = x.shape[-1]
    out, code, scratch = torch.empty(x.shape, dtype=torch.uint8), Code(), torch.empty(2 * x.numel() // width)
    operands = x.data_ptr(), x.numel() // width, width, weight.data_ptr(), bias.data_ptr(), eps
    _call("layer_norm_quantize", *operands, scratch.data_ptr(), out.data_ptr(), code)
    return Coded(out, code.scale, code.zero)


def group_norm_quantize(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, margin: bool = False
) -> Coded:
    """The group norm, or SiLU of it, of one picture ``x [H, W, C]``, in 8 bits: bfloat16, ``weight, bias [C]`` float32,
    none with gaps; with a ``margin`` as :func:`quantize` has it."""
    channels = x.shape[-1]
    out, places, code = *_map(x, margin), Code()
    scratch = torch.empty(8 * channels * torch.get_num_threads())
    sizes = x.numel() // channels, channels, x.shape[1] if margin else 0, groups
    operands = x.data_ptr(), *sizes, weight.data_ptr(), bias.data_ptr(), eps, silu
    _call("group_norm_quantize", *operands, scratch.data_ptr(), places.data_ptr(), code)
    return Coded(out, code.scale, code.zero)


def _call(name: str, *arguments: object) -> None:
    """Calls a kernel whose last arguments are the code that it fills, and the threads."""
    library, (*operands, code) = _library(), arguments
    assert library is not None
    assert isinstance(code, Code)
    getattr(library, name)(*operands, ctypes.byref(code), min(torch.get_num_threads(), MAX_THREADS))


@cache
def _multiplies() -> bool:
    """Whether products in tiles are there, allowed, and right."""
    library = _library()
    if library is None or not processor.has_byte_tiles() or not hasattr(library, "product") or library.tiles_allowed():
        return False
    random = torch.Generator().manual_seed(0)
    codes = torch.randint(256, (40, 2 * DEPTH), generator=random, dtype=torch.uint8)
    weight = torch.randint(-127, 128, (BLOCK, 2 * DEPTH), generator=random, dtype=torch.int8)
    want = (codes.float() - 100) @ weight.t().float()
    got = linear(Coded(codes, 1.0, 100), pack(weight), torch.ones(BLOCK), None)
    if (got - want).norm() < TOLERANCE * want.norm():
        return True
    log.warning("products as built by this machine's compiler are wrong: torch's are used")  # pragma: no cover
    return False  # pragma: no cover


def multiplies(columns: int, depth: int, dtype: torch.dtype) -> bool:
    """Whether the functions below take a weight with ``columns`` results, each of which sums over ``depth`` values at a
    time, for results of ``dtype``, here and now."""
    fits = columns % BLOCK == 0 and depth % DEPTH == 0 and columns > 0 < depth and dtype == torch.bfloat16
    return fits and not is_compiling() and _multiplies()


def pack(weight: Tensor) -> Packed:
    """Of int8 ``[columns, depth]`` without gaps."""
    library = _library()
    assert library is not None
    columns, depth = weight.shape
    packed = Packed(torch.empty_like(weight), torch.empty(columns, dtype=torch.int32))
    library.pack(
        *(weight.data_ptr(), columns, depth, packed.values.data_ptr(), packed.sums.data_ptr()),
        torch.get_num_threads(),
    )
    return packed


def linear(
    x: Coded,
    weight: Packed,
    scales: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    after: int = NOTHING,
) -> Tensor:
    """``x [rows, in]`` without gaps times the weight, by ``scales`` and plus ``bias``, float32 ``[out]`` -> bfloat16
    ``[rows, out]``: with GELU of it, or plus a ``residual`` bfloat16 ``[rows, out]`` without gaps. With GATE the
    weight's blocks of 32 columns hold 16 values and 16 gates, and ``value * gelu(gate)`` is left, ``[rows, out / 2]``.
    """
    rows, depth = x.values.shape
    columns = len(weight.sums)
    out = torch.empty(rows, columns // 2 if after == GATE else columns, dtype=torch.bfloat16)
    if not rows:
        return out
    input_ = Input(x.values.data_ptr(), rows, depth, depth, 1, None, x.scale, x.zero)
    output = Output(out.data_ptr(), _address(residual), rows, rows, 0, out.shape[1], after)
    _multiply(input_, [0], weight, scales, bias, output)
    return out


def convolve(x: Coded, weight: Packed, scales: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
    """A picture ``x [H, W, in]`` with a margin convolved with a weight of 3x3 taps, plus what :func:`linear` adds,
    ``[H, W, out]`` -> bfloat16 ``[H, W, out]``."""
    height, width, _ = x.values.shape
    out = torch.empty(height, width, len(weight.sums), dtype=torch.bfloat16)
    places = _places(out, residual)
    _convolve(x, weight, [(down, right) for down in range(3) for right in range(3)], scales, bias, places)
    return out


def convolve_enlarged(x: Coded, weights: list[Packed], scales: list[Tensor], bias: Tensor | None) -> Tensor:
    """The same of the picture enlarged to twice its size, ``[2 H, 2 W, out]``: by the weights of 2x2 taps that each of
    its four phases meets, in the order of (y, x)."""
    height, width, _ = x.values.shape
    out = torch.empty(2 * height, 2 * width, len(weights[0].sums), dtype=torch.bfloat16)
    for phase, (weight, own) in enumerate(zip(weights, scales, strict=True)):
        down, right = divmod(phase, 2)
        taps = [(down + i, right + j) for i in range(2) for j in range(2)]
        _convolve(x, weight, taps, own, bias, _places(out[down::2, right::2], None))
    return out


def _places(out: Tensor, residual: Tensor | None) -> Output:
    """Of results [H, W, out] in memory that may have gaps between pixels and lines."""
    line_step, step, _ = out.stride()
    return Output(out.data_ptr(), _address(residual), out.shape[1] + 2, out.shape[1], line_step, step, NOTHING)


def _convolve(
    x: Coded, weight: Packed, taps: list[tuple[int, int]], scales: Tensor, bias: Tensor | None, output: Output
) -> None:
    height, width, channels = x.values.shape
    across = width + 2
    corner = x.values.data_ptr() - (across + 1) * channels  # of the margin
    rows = (height - 1) * across + width
    input_ = Input(corner, rows, channels, channels, len(taps), None, x.scale, x.zero)
    _multiply(input_, [(down * across + right) * channels for down, right in taps], weight, scales, bias, output)


def _multiply(
    input_: Input, starts: list[int], weight: Packed, scales: Tensor, bias: Tensor | None, output: Output
) -> None:
    library = _library()
    assert library is not None
    kept = (_int64 * len(starts))(*starts)
    input_.starts = ctypes.addressof(kept)
    weights = Weights(
        *(weight.values.data_ptr(), len(weight.sums), scales.data_ptr(), weight.sums.data_ptr()), _address(bias)
    )
    library.product(*(ctypes.byref(part) for part in (input_, weights, output)), torch.get_num_threads())


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
