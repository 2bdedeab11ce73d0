"""Group normalisation with SiLU on channels-last maps, and layer normalisation, on the GPU.

Group norm is one launch where a group of a picture is small enough for one program to go over it twice, the second
time in the multiprocessor's own cache. Where it is larger it is two launches over the same tiles of pixels: the first
writes each tile's mean and sum of squared deviations a group, the second joins them (Chan, Golub and LeVeque 1983) and
normalises. Unlike E[x^2] - E[x]^2 either loses nothing where a group's mean is large against its deviation.
"""

# ruff: noqa: N803
# mypy: allow-untyped-defs, allow-incomplete-defs

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from gguf_sd_kernels.checks import described
from gguf_sd_kernels.triton.launcher import PreparedLaunch, allocator, channels_last, in_order
from gguf_sd_kernels.tuning.launch import Prepared

# Untuned: values a program holds at a time, 16 a thread (32 a thread spill), and programs a picture at most.
TILE_VALUES, MAX_TILES, WARPS = 4096, 64, 8
WHOLE_VALUES, WHOLE_WARPS = 8192, 16  # the same of a program that has a group for itself
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@triton.jit
def _tile(x, picture, first, stop, rows, G, C, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """Pixels ``first`` to ``stop`` of x [B, rows, G, C]: (float32 [ROWS, GROUPS, WIDTH], mask, offsets)."""
    row = first + tl.arange(0, ROWS)
    group = tl.arange(0, GROUPS)
    channel = tl.arange(0, WIDTH)
    mask = (row < stop)[:, None, None] & (group < G)[None, :, None] & (channel < C)[None, None, :]
    at = (picture * rows + row)[:, None, None] * (G * C) + group[None, :, None] * C + channel[None, None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32), mask, at


@triton.jit(do_not_specialize=["rows", "rows_a_tile"])
def group_stats_kernel(
    x, means, deviations, rows, rows_a_tile, G, C, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr
):
    """means, deviations float32 [B, tiles, GROUPS]: of x [B, rows, G, C]. Grid: (tiles, B).

    Sums are taken of x less the mean of the tile's first pixel, which is near enough to the tile's mean.
    """
    tile, picture = tl.program_id(0), tl.program_id(1)
    start = tile * rows_a_tile
    stop = tl.minimum(start + rows_a_tile, rows)
    near, mask, _ = _tile(x, picture, start, start + 1, rows, G, C, ROWS, GROUPS, WIDTH)
    near = tl.sum(tl.sum(near, 2), 0) / C
    sums = tl.zeros((ROWS, GROUPS, WIDTH), tl.float32)
    squares = tl.zeros((ROWS, GROUPS, WIDTH), tl.float32)
    for first in range(start, stop, ROWS):
        values, mask, _ = _tile(x, picture, first, stop, rows, G, C, ROWS, GROUPS, WIDTH)
        offset = tl.where(mask, values - near[None, :, None], 0.0)
        sums += offset
        squares += offset * offset
    n = ((stop - start) * C).to(tl.float32)
    sum_of_group = tl.sum(tl.sum(sums, 2), 0)
    mean = near + sum_of_group / n
    deviation = tl.sum(tl.sum(squares, 2), 0) - sum_of_group * sum_of_group / n
    at = (picture * tl.num_programs(0) + tile) * GROUPS + tl.arange(0, GROUPS)
    tl.store(means + at, mean)
    tl.store(deviations + at, tl.maximum(deviation, 0.0))


@triton.jit(do_not_specialize=["rows", "rows_a_tile"])
def group_apply_kernel(
    x,
    means,
    deviations,
    weight,
    bias,
    out,
    rows,
    rows_a_tile,
    G,
    C,
    eps,
    SILU: tl.constexpr,
    TILES: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """out = SiLU((x - mean) / deviation * weight + bias), x [B, rows, G, C], weight and bias [G, C].

    Grid: (tiles, B); TILES is the next power of two, tiles are joined in order, so every program gets the same.
    """
    tile, picture = tl.program_id(0), tl.program_id(1)
    tiles = tl.num_programs(0)
    of_tile = tl.arange(0, TILES)
    at = (picture * tiles + of_tile)[:, None] * GROUPS + tl.arange(0, GROUPS)[None, :]
    there = (of_tile < tiles)[:, None]
    n = tl.maximum(tl.minimum(rows - of_tile * rows_a_tile, rows_a_tile), 0).to(tl.float32)[:, None] * C
    total = rows.to(tl.float32) * C
    tile_means = tl.load(means + at, mask=there, other=0.0)
    mean = tl.sum(tile_means * n, 0) / total
    offset = tl.where(there, tile_means - mean[None, :], 0.0)
    squares = tl.sum(tl.load(deviations + at, mask=there, other=0.0) + n * offset * offset, 0)
    scale = tl.rsqrt(squares / total + eps)
    group, channel = tl.arange(0, GROUPS), tl.arange(0, WIDTH)
    real = (group < G)[:, None] & (channel < C)[None, :]
    parameter = group[:, None] * C + channel[None, :]
    gain = tl.load(weight + parameter, mask=real, other=0.0).to(tl.float32) * scale[:, None]
    shift = tl.load(bias + parameter, mask=real, other=0.0).to(tl.float32) - mean[:, None] * gain
    start = tile * rows_a_tile
    stop = tl.minimum(start + rows_a_tile, rows)
    for first in range(start, stop, ROWS):
        values, mask, where = _tile(x, picture, first, stop, rows, G, C, ROWS, GROUPS, WIDTH)
        values = values * gain[None, :, :] + shift[None, :, :]
        if SILU:
            values = values * tl.sigmoid(values)
        tl.store(out + where, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _rows_of_group(x, first, rows, G, C, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """Pixels from ``first`` on of the group that starts at x: (float32 [ROWS, WIDTH], mask, offsets)."""
    row, channel = first + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (row < rows)[:, None] & (channel < C)[None, :]
    at = row[:, None] * (G * C) + channel[None, :]
    return tl.load(x + at, mask=mask, other=0.0).to(tl.float32), mask, at


@triton.jit(do_not_specialize=["rows"])
def group_norm_kernel(
    x, weight, bias, out, rows, G, C, eps, SILU: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr
):
    """As both kernels above, in one. Grid: (G, B). Sums are taken of x less the mean of the group's first pixel."""
    group, picture = tl.program_id(0), tl.program_id(1)
    start = picture * rows * (G * C) + group * C
    near, mask, _ = _rows_of_group(x + start, 0, 1, G, C, ROWS, WIDTH)
    near = tl.sum(tl.sum(near, 1), 0) / C
    sums = tl.zeros((ROWS, WIDTH), tl.float32)
    squares = tl.zeros((ROWS, WIDTH), tl.float32)
    for first in range(0, rows, ROWS):
        values, mask, _ = _rows_of_group(x + start, first, rows, G, C, ROWS, WIDTH)
        offset = tl.where(mask, values - near, 0.0)
        sums += offset
        squares += offset * offset
    n = rows.to(tl.float32) * C
    mean = tl.sum(tl.sum(sums, 1), 0) / n
    scale = tl.rsqrt(tl.maximum(tl.sum(tl.sum(squares, 1), 0) / n - mean * mean, 0.0) + eps)
    channel = tl.arange(0, WIDTH)
    gain = tl.load(weight + group * C + channel, mask=channel < C, other=0.0).to(tl.float32) * scale
    shift = tl.load(bias + group * C + channel, mask=channel < C, other=0.0).to(tl.float32) - (near + mean) * gain
    for first in range(0, rows, ROWS):
        values, mask, at = _rows_of_group(x + start, first, rows, G, C, ROWS, WIDTH)
        values = values * gain[None, :] + shift[None, :]
        if SILU:
            values = values * tl.sigmoid(values)
        tl.store(out + start + at, values.to(out.dtype.element_ty), mask=mask)


@triton.jit
def layer_norm_kernel(x, weight, bias, out, C, eps, WIDTH: tl.constexpr):
    """out [M, C] = (x - mean) / deviation * weight + bias, by rows. Grid: (M,)."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDTH)
    mask = column < C
    values = tl.load(x + row * C + column, mask=mask, other=0.0).to(tl.float32)
    offset = tl.where(mask, values - tl.sum(values, 0) / C, 0.0)
    normal = offset * tl.rsqrt(tl.sum(offset * offset, 0) / C + eps)
    gain = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * C + column, (normal * gain + shift).to(out.dtype.element_ty), mask=mask)


class PreparedGroupNorm:
    """Group normalisation, ready for operands of the shapes and dtypes of those it was prepared with; in one launch if
    ``whole``.

    Raises ValueError as :func:`group_norm_silu_triton` does.
    """

    def __init__(self, x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, whole: bool):
        channels = x.shape[1] if x.ndim == 4 else 0
        if not channels or groups < 1 or channels % groups or weight.shape != (channels,) or bias.shape != (channels,):
            raise ValueError(
                f"group norm of {list(x.shape)} in {groups} groups takes weight and bias [{channels}] and groups that "
                f"divide it, got weight {list(weight.shape)}, bias {list(bias.shape)}"
            )
        if x.dtype not in DTYPES or x.numel() >= 2**31:
            raise ValueError(f"group norm takes fewer than 2^31 float values, got {x.numel()} of {x.dtype}")
        self.device, self.empty = x.device, not x.numel()
        self.result = allocator(x.shape, x.dtype, x.device, torch.channels_last)
        if self.empty:
            return
        batch, rows, width = x.shape[0], x.shape[2] * x.shape[3], channels // groups
        group_slots, channel_slots = triton.next_power_of_2(groups), triton.next_power_of_2(width)
        self.whole: PreparedLaunch | None = None
        if whole:
            step = min(max(1, WHOLE_VALUES // channel_slots), triton.next_power_of_2(rows))
            slots, numbers = {"SILU": silu, "ROWS": step, "WIDTH": channel_slots}, (rows, groups, width, eps)
            options = {"num_warps": WHOLE_WARPS}
            self.whole = PreparedLaunch(group_norm_kernel, (groups, batch), x.device, numbers, slots, **options)
            return
        step = max(1, TILE_VALUES // (group_slots * channel_slots))  # a power of two
        step = min(step, triton.next_power_of_2(rows))
        rows_a_tile = triton.cdiv(triton.cdiv(rows, MAX_TILES), step) * step
        tiles = triton.cdiv(rows, rows_a_tile)
        self.parts = 2, batch, tiles, group_slots
        slots = {"ROWS": step, "GROUPS": group_slots, "WIDTH": channel_slots}
        grid, counts = (tiles, batch), (rows, rows_a_tile, groups, width)
        self.stats = PreparedLaunch(group_stats_kernel, grid, x.device, counts, slots, num_warps=WARPS)
        slots = {"SILU": silu, "TILES": triton.next_power_of_2(tiles)} | slots
        self.apply = PreparedLaunch(group_apply_kernel, grid, x.device, (*counts, eps), slots, num_warps=WARPS)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = self.result()
        if self.empty:
            return out
        pixels = channels_last(x)
        if self.whole is not None:
            self.whole(pixels, in_order(weight), in_order(bias), out)
        else:
            means, deviations = torch.empty(self.parts, dtype=torch.float32, device=self.device).unbind()
            self.stats(pixels, means, deviations)
            self.apply(pixels, means, deviations, in_order(weight), in_order(bias), out)
        return out


class PreparedLayerNorm:
    """Layer normalisation, ready for operands of the shapes and dtypes of those it was prepared with.

    Raises ValueError as :func:`layer_norm_triton` does.
    """

    def __init__(self, x: Tensor, weight: Tensor, bias: Tensor, eps: float):
        width = x.shape[-1] if x.ndim else 0
        if not 0 < width <= 16384 or weight.shape != (width,) or bias.shape != (width,) or x.dtype not in DTYPES:
            raise ValueError(
                f"layer norm of {x.dtype} {list(x.shape)} takes weight and bias [{width}] of at most 16384, "
                f"got weight {list(weight.shape)}, bias {list(bias.shape)}"
            )
        self.result = allocator(x.shape, x.dtype, x.device)
        rows, slots = x.numel() // width, triton.next_power_of_2(width)
        constants, warps = {"WIDTH": slots}, max(1, min(8, slots // 256))
        self.start = PreparedLaunch(layer_norm_kernel, (rows,), x.device, (width, eps), constants, num_warps=warps)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = self.result()
        if out.numel():
            self.start(in_order(x), in_order(weight), in_order(bias), out)
        return out


_prepared: Prepared[PreparedGroupNorm] = Prepared()
_prepared_layer: Prepared[PreparedLayerNorm] = Prepared()


def group_norm_silu_triton(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float = 1e-5,
    silu: bool = True,
    whole: bool = False,
) -> Tensor:
    """Group normalisation of ``x [B, C, H, W]`` with ``weight, bias [C]``, then SiLU when ``silu`` is set; in one
    launch if ``whole``, which is for groups of :func:`gguf_sd_kernels.tuning.ways.whole_groups`.

    Any float dtype, computed in float32; the result is channels-last, and so should x be, or it is copied.
    Raises ValueError when the groups do not divide the channels or the parameters do not fit.
    """
    key = x.device, described(x), groups, described(weight), described(bias), eps, silu, whole
    run = _prepared.get(key) or _prepared.keep(key, PreparedGroupNorm(x, groups, weight, bias, eps, silu, whole))
    return run(x, weight, bias)


def layer_norm_triton(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Layer normalisation of ``x [..., C]`` with ``weight, bias [C]``, computed in float32, in x's dtype.

    Raises ValueError when the parameters do not fit or C is above 16384.
    """
    key = x.device, described(x), described(weight), described(bias), eps
    run = _prepared_layer.get(key) or _prepared_layer.keep(key, PreparedLayerNorm(x, weight, bias, eps))
    return run(x, weight, bias)
