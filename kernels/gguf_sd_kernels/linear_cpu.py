"""Matrix products on a CPU through oneDNN, whatever library torch was built to prefer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of ``x [..., in]``, ``weight [out, in]`` and ``bias [out]`` of one dtype -> ``[..., out]``.

    Without gradients it calls the operator torch's compiler uses, which adds the bias inside the product and
    never takes MKL, slow on AMD processors: on Zen 5, 2 threads, it needs 0.43-0.60 of F.linear's time in float32
    and 0.78-1.01 in bfloat16 (13 shapes of SD 1.5; the largest gain is [8192, 320] x [320, 2560]).
    """
    if not _in_onednn(x) or (torch.is_grad_enabled() and x.requires_grad):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _in_onednn(x: Tensor) -> bool:
    """Whether oneDNN computes in x's dtype here."""
    if x.device.type != "cpu" or x.ndim < 2 or not x.numel() or not torch.backends.mkldnn.is_available():
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
