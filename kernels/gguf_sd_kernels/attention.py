"""Scaled dot-product attention, the fastest form each device has."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``softmax(q k^T / sqrt(D)) v`` for ``q [B, H, N, D]``, ``k, v [B, H, M, D]`` -> ``[B, H, N, D]``.

    Strided views are welcome: heads split from ``[B, N, H*D]`` need no copy.
    Raises ValueError on other shapes.
    """
    if q.ndim != 4 or k.shape != v.shape or q.shape[:2] != k.shape[:2] or q.shape[3] != k.shape[3]:
        raise ValueError(
            f"attention takes q [B, H, N, D] with k and v [B, H, M, D], "
            f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
        )
    return F.scaled_dot_product_attention(q, k, v)
