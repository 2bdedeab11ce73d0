"""Scaled dot-product attention, the fastest form each device has.

On a CPU with bfloat16 instructions torch's own attention does its products in float32. Written out as two
bfloat16 matrix products around an in-place exp2 it takes 0.31-0.53 of the time; see :func:`_attention_bf16`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

# Bytes of scores alive at a time. Zen 5, 2 threads, 2 MiB L2, 32 MiB L3, time against SDPA:
# [2, 8, 4096, 40] 0.42 at 2 MiB, 0.38 at 4, 0.39 at 8, 0.43 at 16; [2, 8, 1024, 80] 0.42, 0.38, 0.39, 0.42.
SCORE_BYTES = 4 << 20
# Shift from every fourth key where there are many: 0.40 of SDPA's time against 0.49 with every key (same shape).
SAMPLE_STRIDE, SAMPLE_FROM_KEYS = 4, 512
# Exponents stay below 2^96: a row of 2^13 of them sums to 2^109, which leaves values up to 2^18 room in bfloat16.
MAX_EXPONENT = 96.0
_HAS_BF16_PRODUCTS: bool = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` for ``q [B, H, N, D]``, ``k, v [B, H, M, D]`` -> ``[B, H, N, D]``.

    Strided views are welcome: heads split from ``[B, N, H*D]`` need no copy.
    Raises ValueError on other shapes.
    """
    of_q, of_k = q.shape, k.shape
    if len(of_q) != 4 or of_k != v.shape or of_q[:2] != of_k[:2] or of_q[3] != of_k[3]:
        raise ValueError(
            f"attention takes q [B, H, N, D] with k and v [B, H, M, D], "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    if q.is_cpu and q.dtype == torch.bfloat16 and _HAS_BF16_PRODUCTS:
        return _opaque(q, k, v) if is_compiling() else _attention_bf16(q, k, v)
    return F.scaled_dot_product_attention(q, k, v)


def _opaque(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as one operator, as it looks at values on its way."""
    from gguf_sd_kernels import custom_ops

    return custom_ops.attention(q, k, v)


def _attention_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as products in bfloat16, a few heads and a chunk of queries at a time.

    Scores come out of the product rounded to bfloat16, so a score's error grows with its size. A shift close to
    the row's maximum therefore goes *into* the product, as one more column of q against a column of ones in k:
    scores that matter are then near zero and exact enough. The row's sum comes from a column of ones in v.

    The shift comes from a sample of the keys. Any shift is exact in theory; what a bad one could do is overflow
    or lose a bit of precision, and the first is excluded by |q| |k|, falling back to all keys.
    """
    batch, heads, queries, head_dim = q.shape
    keys = k.shape[2]
    scale = head_dim**-0.5 * math.log2(math.e)  # exp2 is cheaper than exp
    group, chunk = _tile(heads, queries, keys)
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    q1 = q.new_empty(group, queries, head_dim + 1)
    k1 = q.new_ones(group, keys, head_dim + 1)
    v1 = q.new_ones(group, keys, head_dim + 8)  # one column would do; eight keep rows aligned
    scores = q.new_empty(group, chunk, keys)
    for b in range(batch):
        for first in range(0, heads, group):
            part = slice(first, first + group)
            q1[..., :head_dim], k1[..., :head_dim], v1[..., :head_dim] = q[b, part], k[b, part], v[b, part]
            shift = _row_shift(q1[..., :head_dim], k1[..., :head_dim], scale, chunk)
            torch.neg(shift, out=q1[..., head_dim:])
            for start in range(0, queries, chunk):
                rows = slice(start, start + chunk)
                p = scores[:, : min(chunk, queries - start)]
                torch.baddbmm(p, q1[:, rows], k1.transpose(1, 2), beta=0, alpha=scale, out=p)
                sums = torch.bmm(p.exp2_(), v1).float()
                out[b, part, rows] = sums[..., :head_dim] / sums[..., head_dim : head_dim + 1]
    return out


def _tile(heads: int, queries: int, keys: int) -> tuple[int, int]:
    """Heads, a divisor of ``heads``, and queries to take at a time so that their scores fit SCORE_BYTES."""
    chunk = max(1, min(queries, SCORE_BYTES // (2 * keys)))
    room = max(1, SCORE_BYTES // (2 * keys * chunk))
    return next(g for g in range(min(heads, room), 0, -1) if heads % g == 0), chunk


def _row_shift(q: Tensor, k: Tensor, scale: float, chunk: int) -> Tensor:
    """About the largest unscaled score of each row, ``[G, N, D] x [G, M, D] -> [G, N, 1]`` in bfloat16."""
    stride = SAMPLE_STRIDE if k.shape[1] >= SAMPLE_FROM_KEYS else 1
    sample = k[:, ::stride].contiguous() if stride > 1 else k
    shift = torch.cat([_row_max(torch.bmm(part, sample.transpose(1, 2))) for part in q.split(chunk, 1)], 1)
    if stride > 1:
        bound = q.float().norm(dim=-1, keepdim=True) * k.float().norm(dim=-1).amax(-1)[:, None, None]
        if not bool(((bound - shift) * scale < MAX_EXPONENT).all()):
            return torch.cat([_row_max(torch.bmm(part, k.transpose(1, 2))) for part in q.split(chunk, 1)], 1)
    return shift


def _row_max(scores: Tensor) -> Tensor:
    """``amax(-1, keepdim=True)`` of bfloat16, on the bits: ten times as fast as torch's (Zen 5, 4096 wide).

    As int16, floats of a row sort upwards where any has a clear sign bit, and downwards where none has.
    """
    bits = scores.view(torch.int16)
    top = bits.amax(-1, keepdim=True)
    if bool((top < 0).any()):
        top = torch.where(top < 0, bits.amin(-1, keepdim=True), top)
    return top.view(torch.bfloat16)
