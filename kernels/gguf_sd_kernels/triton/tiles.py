"""What the product kernels share: decoding a tile of weights, the order of tiles, windows, split-K, the epilogue."""

# ruff: noqa: N803, SIM108, SIM300
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import triton
import triton.language as tl

from gguf_sd_kernels.triton.row_norm import store_row_parts

# Four bytes, eight nibbles, to eight float16 in ten instructions. 0x6400 is 1024.0 and its last mantissa bit is
# worth 1, so a nibble ored into the low bits makes 1024 + n, and one left in bits 4-7 makes 1024 + 16 n, which
# / 16 - 64 brings to n. The zero point z goes into the same two constants.
# Outputs are written once every input has been read, as registers may be shared.
# $0 $1: low nibbles of bytes 0, 1 and 2, 3; $2 $3: high nibbles; $4: the bytes. lop3 0xEA is (a & b) | c.
_NIBBLES_PTX = """{{
.reg .b32 even, odd, low, high, part;
mov.b32 low, {low};
mov.b32 high, {high};
mov.b32 part, 0x2C002C00;
prmt.b32 even, $4, 0, 0x4140;
prmt.b32 odd, $4, 0, 0x4342;
lop3.b32 $0, even, 0x000F000F, 0x64006400, 0xEA;
lop3.b32 $1, odd, 0x000F000F, 0x64006400, 0xEA;
lop3.b32 $2, even, 0x00F000F0, 0x64006400, 0xEA;
lop3.b32 $3, odd, 0x00F000F0, 0x64006400, 0xEA;
sub.f16x2 $0, $0, low;
sub.f16x2 $1, $1, low;
fma.rn.f16x2 $2, $2, part, high;
fma.rn.f16x2 $3, $3, part, high;
}}"""
NIBBLES_PTX_0 = tl.constexpr(_NIBBLES_PTX.format(low="0x64006400", high="0xD400D400"))  # z = 0: -1024, -64
NIBBLES_PTX_8 = tl.constexpr(_NIBBLES_PTX.format(low="0x64086408", high="0xD480D480"))  # z = 8: -1032, -72
# The same for four bytes of Q8_0, value + 128: minus 1024 + 128.
BYTES_PTX = tl.constexpr("""{
.reg .b32 magic, offset, even, odd;
mov.b32 magic, 0x64646464;
mov.b32 offset, 0x64806480;
prmt.b32 even, $2, magic, 0x4140;
prmt.b32 odd, $2, magic, 0x4342;
sub.f16x2 $0, even, offset;
sub.f16x2 $1, odd, offset;
}""")


@triton.jit
def _small_ints(codes, ZERO: tl.constexpr, DTYPE: tl.constexpr):
    """uint8 codes -> codes - ZERO, exactly: float16 where the weights will be, else float32.

    Without an integer conversion, which GPUs do at a quarter of their rate or less: ored into the low mantissa
    bits of 2^10 (float16) or 2^23 (float32), a code adds itself to that number.
    """
    if DTYPE == tl.float16:
        values = (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + ZERO)
    else:
        values = (codes.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608.0 + ZERO)
    return values


@triton.jit
def decode_nibbles(packed, ZERO: tl.constexpr, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """uint8 [R, 16 * blocks] -> [R, blocks, 32] of nibble - ZERO, in the order of the weight's values."""
    R: tl.constexpr = packed.shape[0]
    BLOCKS: tl.constexpr = packed.shape[1] // 16
    if PTX and DTYPE == tl.float16:
        low, high = tl.inline_asm_elementwise(
            NIBBLES_PTX_8 if ZERO == 8 else NIBBLES_PTX_0,
            "=r,=r,=r,=r,r",
            [packed],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=4,
        )
    else:
        low = _small_ints(packed & 0x0F, ZERO, DTYPE)
        high = _small_ints(packed >> 4, ZERO, DTYPE)
    pairs = tl.join(low, high).reshape(R, BLOCKS, 16, 2)
    return tl.permute(pairs, (0, 1, 3, 2)).reshape(R, BLOCKS, 32)


@triton.jit
def decode_bytes(packed, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """uint8 [R, 32 * blocks] of value + 128 -> [R, blocks, 32] of values."""
    if PTX and DTYPE == tl.float16:
        values = tl.inline_asm_elementwise(BYTES_PTX, "=r,=r,r", [packed], dtype=tl.float16, is_pure=True, pack=4)
    else:
        values = _small_ints(packed, 128, DTYPE)
    return values.reshape(packed.shape[0], packed.shape[1] // 32, 32)


@triton.jit
def decode_tile(
    quants,
    scales,
    mins,
    gain,
    rows,
    k,
    K,
    QTYPE: tl.constexpr,
    DTYPE: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Weights of ``rows`` [R], columns k to k + BLOCK_K -> [R, BLOCK_K] of DTYPE; times ``gain`` [K], or None.

    float16 is computed in float16: value * scale is rounded once either way, value * scale + min in one fused
    multiply-add, and the gain is a rounding of its own. bfloat16 goes through float32, as bfloat16 holds neither the
    codes of Q8_0 nor the scales.
    """
    BLOCKS: tl.constexpr = BLOCK_K // 32
    if QTYPE == "Q8_0":
        packed = tl.load(quants + rows[:, None] * K + k + tl.arange(0, BLOCK_K)[None, :])
        codes = decode_bytes(packed, DTYPE, PTX)
    else:
        packed = tl.load(quants + rows[:, None] * (K // 2) + k // 2 + tl.arange(0, BLOCK_K // 2)[None, :])
        codes = decode_nibbles(packed, 8 if QTYPE == "Q4_0" else 0, DTYPE, PTX)
    blocks = rows[:, None] * (K // 32) + k // 32 + tl.arange(0, BLOCKS)[None, :]
    weights = codes * tl.load(scales + blocks)[:, :, None].to(codes.dtype)
    if QTYPE == "Q4_1":
        weights += tl.load(mins + blocks)[:, :, None].to(codes.dtype)
    if gain is not None:
        column = tl.arange(0, BLOCKS)[None, :, None] * 32 + tl.arange(0, 32)[None, None, :]
        weights *= tl.load(gain + k + column).to(codes.dtype)
    return weights.to(DTYPE).reshape(rows.shape[0], BLOCK_K)


@triton.jit
def tile_position(tiles_m, tiles_n, GROUP_M: tl.constexpr):
    """This program's tile: (tile along M, tile along N).

    GROUP_M tiles of M are walked before the next of N, so that programs running together share both operands
    in the L2 cache.
    """
    pid = tl.program_id(0)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    height = tl.minimum(tiles_m - first, GROUP_M)
    within = pid % (GROUP_M * tiles_n)
    return first + within % height, within // height


@triton.jit
def weight_rows(tile_n, N, BLOCK_N: tl.constexpr, GEGLU: tl.constexpr):
    """Rows of the weight that tile ``tile_n`` reads, [BLOCK_N], clamped to the last.

    With GEGLU, N rows are values and gates, N/2 each, and a tile takes them in turn: value, gate, value, …
    """
    if GEGLU:
        index = tl.arange(0, BLOCK_N)
        column = tl.minimum(tile_n * (BLOCK_N // 2) + index // 2, N // 2 - 1)
        rows = column + (index % 2) * (N // 2)
    else:
        rows = tl.minimum(tile_n * BLOCK_N + tl.arange(0, BLOCK_N), N - 1)
    return rows


@triton.jit
def split_range(steps, K, STEP: tl.constexpr, SPLIT: tl.constexpr):
    """(start, stop) of this program's part of K: ``steps`` of STEP, or all of K where it is not split."""
    start, stop = 0, K
    if SPLIT:
        start = tl.program_id(1) * steps * STEP
        stop = tl.minimum(start + steps * STEP, K)
    return start, stop


@triton.jit
def windows(tile_m, M, H, W, OH, OW, stride, padding, BLOCK_M: tl.constexpr):
    """(top, left, pixel) of the windows that a tile's output pixels see of x [B, H, W, IC], each [BLOCK_M].

    ``pixel`` numbers the upper left one through all pictures; it may lie outside its picture.
    """
    index = tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1)  # clamped: the epilogue masks
    picture, within = index // (OH * OW), index % (OH * OW)
    top = within // OW * stride - padding
    left = within % OW * stride - padding
    return top, left, (picture * H + top) * W + left


@triton.jit
def tap_at(k, top, left, H, W, IC, TAPS_W: tl.constexpr):
    """(shift, inside) of the tap that value k of a weight's row belongs to.

    What the value is multiplied with lies at ``(pixel + shift) * IC + k`` of x. ``inside``, [BLOCK_M], tells whether
    that is in the picture.
    """
    tap = k // IC
    down, right = tap // TAPS_W, tap % TAPS_W
    # Unsigned: one comparison a side, as what lies above or left of the picture becomes huge.
    inside = ((top + down).to(tl.uint32) < H.to(tl.uint32)) & ((left + right).to(tl.uint32) < W.to(tl.uint32))
    return down * W + right - tap, inside


@triton.jit
def first_row(tile_m, M, H, pixels, BLOCK_M: tl.constexpr):
    """The row, counted through all pictures [B, H, …], at which the picture of each of a tile's output pixels starts:
    [BLOCK_M]. There are so many output ``pixels`` a picture."""
    return tl.minimum(tile_m * BLOCK_M + tl.arange(0, BLOCK_M), M - 1) // pixels * H


@triton.jit
def enlarged_at(k, above, top, left, W, IC, TAPS_W: tl.constexpr):
    """Where in x [B, H, W, IC] lies what value k of a weight's row is multiplied with, [BLOCK_M], if the windows of
    :func:`windows` are over x enlarged to twice its size; ``above`` is from :func:`first_row`."""
    tap = k // IC
    row, column = (top + tap // TAPS_W) >> 1, (left + tap % TAPS_W) >> 1
    return ((above + row) * W + column) * IC + (k - tap * IC)


@triton.jit
def multiply(values, weights, acc, SWAP: tl.constexpr, WIDEN: tl.constexpr):
    """acc + values [M, K] . weights [N, K]^T: acc is [M, N], or with SWAP [N, M].

    WIDEN is for the interpreter, whose product does not know bfloat16.
    """
    if WIDEN:
        values, weights = values.to(tl.float32), weights.to(tl.float32)
    if SWAP:
        acc = tl.dot(weights, values.T, acc)
    else:
        acc = tl.dot(values, weights.T, acc)
    return acc


@triton.jit
def add_splits(acc, partials, counters, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Sums a tile over the programs that split its K: ([BLOCK_M, BLOCK_N], whether this program is to store it).

    Every program writes its part to ``partials``, float32 [splits, tiles, BLOCK_M, BLOCK_N]; the last to arrive,
    by the tile's counter, adds all of them in the order of K, so the result does not depend on who came last.
    It leaves the counter at zero for the next launch.
    """
    tile, tiles = tl.program_id(0), tl.num_programs(0)
    split, splits = tl.program_id(1), tl.num_programs(1)
    inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    tl.store(partials + (split * tiles + tile) * (BLOCK_M * BLOCK_N) + inside, acc)
    tl.debug_barrier()  # every thread's part is written before one of them says so
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == splits - 1
    if last:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for other in range(splits):
            # .cg: past the L1 cache, which is not coherent with other multiprocessors
            acc += tl.load(partials + (other * tiles + tile) * (BLOCK_M * BLOCK_N) + inside, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return acc, last


@triton.jit
def _add_and_store(acc, out, residual, emb, emb_stride, parts, m, first, M, columns, rows_per_emb):
    n = first + tl.arange(0, acc.shape[1])
    mask = (m < M)[:, None] & (n < columns)[None, :]
    at = m[:, None] * columns + n[None, :]
    if emb is not None:
        of_row = emb + (m // rows_per_emb)[:, None] * emb_stride + n[None, :]
        acc += tl.load(of_row, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        acc += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + at, rounded, mask=mask)
    if parts is not None:
        store_row_parts(parts, rounded.to(tl.float32), first, m, M, columns)


@triton.jit
def store_tile(
    acc,
    out,
    bias,
    residual,
    emb,
    emb_stride,
    parts,
    tile_m,
    tile_n,
    M,
    N,
    rows_per_emb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GEGLU: tl.constexpr,
):
    """The epilogue, in float32: + bias [N], GEGLU, + emb [M / rows_per_emb, columns] with rows ``emb_stride``
    apart, + residual [M, columns]; then rounds into ``out`` [M, columns], and leaves in ``parts`` what row_norm takes.
    There are N columns, N/2 with GEGLU. Absent operands are None."""
    WIDTH: tl.constexpr = BLOCK_N // 2 if GEGLU else BLOCK_N
    columns = N // 2 if GEGLU else N
    if bias is not None:
        acc += tl.load(bias + weight_rows(tile_n, N, BLOCK_N, GEGLU)).to(tl.float32)[None, :]
    if GEGLU:
        value, gate = tl.split(acc.reshape(BLOCK_M, WIDTH, 2))
        acc = value * (0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)))
    m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if BLOCK_M * WIDTH > 16384:  # in halves: as a whole it does not fit the registers that acc leaves
        HALF: tl.constexpr = WIDTH // 2
        left, right = tl.split(tl.permute(acc.reshape(BLOCK_M, 2, HALF), (0, 2, 1)))
        first = tile_n * WIDTH
        _add_and_store(left, out, residual, emb, emb_stride, parts, m, first, M, columns, rows_per_emb)
        _add_and_store(right, out, residual, emb, emb_stride, parts, m, first + HALF, M, columns, rows_per_emb)
    else:
        _add_and_store(acc, out, residual, emb, emb_stride, parts, m, tile_n * WIDTH, M, columns, rows_per_emb)


@triton.jit
def finish_tile(
    acc,
    out,
    bias,
    residual,
    emb,
    emb_stride,
    parts,
    partials,
    counters,
    tile_m,
    tile_n,
    M,
    N,
    rows_per_emb,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GEGLU: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """store_tile, where K is split of the sum over all programs of the tile."""
    last = True
    if SPLIT:
        acc, last = add_splits(acc, partials, counters, BLOCK_M, BLOCK_N)
    if last:
        store_tile(
            acc,
            out,
            bias,
            residual,
            emb,
            emb_stride,
            parts,
            tile_m,
            tile_n,
            M,
            N,
            rows_per_emb,
            BLOCK_M,
            BLOCK_N,
            GEGLU,
        )
