"""Scaled dot-product attention, the fastest form each device has.

torch's own attention does its products in float32 where a CPU has no AMX. Where bfloat16's are faster, it is written
out as two of them, with the exponential inside the first: 0.55 of the time on a Zen 4 ([2, 8, 4096, 40]); see
:func:`_attention_bf16`. Where they are not, torch's is given float32: 0.6 to 0.7 of its time with bfloat16 on an
Emerald Rapids without AMX. With AMX torch's own is the fastest: 0.2 to 0.3 of the time of those two products.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from gguf_sd_kernels.cpu import native, processor

# Bytes of weights alive at a time. Zen 4, 2 threads, 2 MiB L2, 32 MiB L3, [2, 8, 4096, 40]: 225 ms at 2 MiB, 198 at 4,
# 219 at 8.
WEIGHT_BYTES = 4 << 20
# The sigmoid of -9 and less is the exponential, to 1.2e-4; of -88 and less it is zero in float32.
BELOW, REACH = 9.0, 70.0


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
    if not q.is_cpu or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v)
    if processor.has_tiles():
        if native.attends(q, k, v):
            return native.attention(q, k, v)
        return F.scaled_dot_product_attention(q, k, v)
    if processor.multiplies_bfloat16_fast():
        return _opaque(q, k, v) if is_compiling() else _attention_bf16(q, k, v)
    if len(q) == 1:
        return _attention_float32(q, k, v)
    return torch.cat([_attention_float32(*one) for one in zip(q.split(1), k.split(1), v.split(1), strict=True)])


def _opaque(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same as one operator, as it looks at values on its way."""
    from gguf_sd_kernels import custom_ops

    return custom_ops.attention(q, k, v)


def _attention_float32(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.float(), k.float(), v.float()).to(q.dtype)


def _attention_bf16(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention as products in bfloat16, a head and a chunk of queries at a time.

    oneDNN applies a sigmoid to sums before it rounds them. Where its argument is below -9 that is the exponential, and
    softmax is the same whatever is subtracted from a row. What brings a row's scores there goes into the product, as
    one more column of q against a column of ones in k; the row's sum comes from a column of ones in v.
    """
    batch, heads, queries, head_dim = q.shape
    keys, scale = k.shape[2], head_dim**-0.5
    chunk = max(1, min(queries, WEIGHT_BYTES // (2 * keys)))
    out = q.new_empty(batch, queries, heads, head_dim).transpose(1, 2)
    q1, k1 = q.new_empty(heads, queries, head_dim + 1), k.new_ones(heads, keys, head_dim + 1)
    v1 = v.new_ones(heads, keys, _width(head_dim))
    sums = q.new_empty(heads, queries, v1.shape[2])
    for b in range(batch):
        k1[..., :head_dim], v1[..., :head_dim] = k[b], v[b]
        torch.mul(q[b], scale, out=q1[..., :head_dim])
        q1[..., head_dim:] = -BELOW - _row_bound(q1[..., :head_dim], k1[..., :head_dim], chunk)
        for h in range(heads):
            for start in range(0, queries, chunk):
                rows = slice(start, start + chunk)
                weights = torch.ops.mkldnn._linear_pointwise(q1[h, rows], k1[h], None, "sigmoid", [], "")
                torch.bmm(weights[None], v1[h : h + 1], out=sums[h : h + 1, rows])
        torch.div(sums[..., :head_dim], sums[..., head_dim : head_dim + 1], out=out[b])
    return out


def _width(head_dim: int) -> int:
    """Columns of the values with those of ones: oneDNN is fastest with whole vectors, and beyond 48 with pairs of them.
    [1024, 1024] x [1024, N], Zen 4: 40 columns 258 us, 48 249; 81 691, 88 681, 96 513."""
    step = 16 if head_dim < 48 else 32
    return (head_dim // step + 1) * step


def _row_bound(q: Tensor, k: Tensor, chunk: int) -> Tensor:
    """What no score of a row exceeds, and its largest hardly falls short of: ``[H, N, D] x [H, M, D] -> [H, N, 1]`` in
    float32.

    A score is that of the mean key, which the largest exceeds, and at most |q| times a key's distance from the mean
    more. Where that leaves too much room, the largest scores themselves are looked for.
    """
    wide, keys = q.float(), k.float()
    mean = keys.mean(1, keepdim=True)
    farthest = (keys - mean).norm(dim=2).amax(1)
    room = wide.norm(dim=2, keepdim=True) * farthest[:, None, None]
    bound = torch.baddbmm(room, wide, mean.transpose(1, 2))
    for h, fits in enumerate((room < REACH).all(1).squeeze(1).tolist()):
        if not fits:  # nor where a value is not finite
            bound[h] = torch.cat([_row_max(torch.mm(part, k[h].t())) for part in q[h].split(chunk)])
    return bound


def _row_max(scores: Tensor) -> Tensor:
    """``amax(-1, keepdim=True)`` of bfloat16, on the bits: ten times as fast as torch's (Zen 5, 4096 wide).

    As int16, floats of a row sort upwards where any has a clear sign bit, and downwards where none has.
    """
    bits = scores.view(torch.int16)
    top = bits.amax(-1, keepdim=True)
    if bool((top < 0).any()):
        top = torch.where(top < 0, bits.amin(-1, keepdim=True), top)
    return top.view(torch.bfloat16)
