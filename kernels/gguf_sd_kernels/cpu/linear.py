"""Matrix products on a CPU through oneDNN, whatever library torch was built to prefer.

They call the operator torch's compiler uses, where no gradients are asked for: it adds the bias inside the
product, can apply GELU there too, and never takes MKL, which is slow on AMD processors.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.nn import functional as F

from gguf_sd_kernels.cpu.activation import geglu

# Rows of a GEGLU projection at a time: both halves of a [8192, 2560] result stay under 32 MiB, above which malloc
# returns memory to the system after every use. Between 256 and 2048 the time differs by less than 3 % (Zen 5).
GEGLU_ROWS = 2048


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` of ``x [..., in]``, ``weight [out, in]`` and ``bias [out]`` of one dtype -> ``[..., out]``.

    Zen 5, 2 threads, time against F.linear: 0.43-0.60 in float32, 0.78-1.01 in bfloat16 (13 shapes of SD 1.5;
    in bfloat16 the largest gain is [8192, 320] x [320, 2560]).
    """
    if not _in_onednn(x, weight):
        return F.linear(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def product_geglu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``geglu(F.linear(x, weight, bias))``: ``x [..., in]``, ``weight [2 F, in]`` (value, gate) -> ``[..., F]``.

    On a CPU the gate's GELU happens inside its product, and the projection never exists as a whole. Zen 5, one
    thread, bfloat16, time against the plain formula: [8192, 320] -> 1280 0.57, [2048, 640] -> 2560 0.87,
    [512, 1280] -> 5120 0.91; float32 0.41, 0.43, 0.45.
    """
    if not _in_onednn(x, weight):
        return geglu(F.linear(x, weight, bias))
    width = weight.shape[0] // 2
    (value, gate), rows = weight.split(width), x.reshape(-1, x.shape[-1])
    value_bias, gate_bias = (None, None) if bias is None else bias.split(width)
    out = rows.new_empty(len(rows), width)
    for part, result in zip(rows.split(GEGLU_ROWS), out.split(GEGLU_ROWS), strict=True):
        gates = torch.ops.mkldnn._linear_pointwise(part, gate, gate_bias, "gelu", [], "none")
        torch.mul(gates, product(part, value, value_bias), out=result)
    return out.view(*x.shape[:-1], width)


def _in_onednn(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN computes in x's dtype here, and no gradients are asked for. The compiler takes plain products, and
    chooses for itself."""
    if is_compiling() or x.device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
