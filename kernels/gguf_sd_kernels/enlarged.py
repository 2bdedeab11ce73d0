"""Convolutions of a picture enlarged to its nearest neighbours, which is then never written."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.checks import conv_key, conv_product, conv_sizes, doubles
from gguf_sd_kernels.dispatch import ConvRun, conv2d_packed
from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.tuning.launch import Prepared
from gguf_sd_kernels.tuning.operands import Use
from gguf_sd_kernels.tuning.ways import fused_launch

_prepared: Prepared[tuple[ConvRun | None]] = Prepared()


def conv2d_enlarged(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, size: tuple[int, int], padding: int, mode: str
) -> Tensor:
    """As :func:`gguf_sd_kernels.dispatch.conv2d_packed` of ``x [B, IC, H, W]`` enlarged to ``size`` as
    ``torch.nn.functional.interpolate`` does it: in the same launch where the size is twice x's, or one less, ``mode``
    takes the fused kernel and that is not set aside on this GPU."""
    key = conv_key((mode, size), (1, padding), x, weight, bias, None, None)
    (run,) = _prepared.get(key) or _prepared.keep(key, (_prepare(x, weight, bias, size, padding, mode),))
    if run is None:
        return conv2d_packed(F.interpolate(x, size=size), weight, bias, 1, padding, mode=mode)
    return run(x, weight, bias, None, None)


def _prepare(
    x: Tensor, weight: PackedWeight, bias: Tensor | None, size: tuple[int, int], padding: int, mode: str
) -> ConvRun | None:
    if not doubles((x.shape[2], x.shape[3]), size):
        return None
    added = ("enlarge",) if bias is None else ("bias", "enlarge")
    picture = x.shape[0], x.shape[1], *size
    use = Use(conv_product(x, weight, 1, padding, size), added, picture, 1, padding, weight.tap_major)
    launch = fused_launch(use, weight, x.dtype, mode)
    if launch is None:
        return None
    from gguf_sd_kernels.triton.conv import PreparedConv

    sizes = conv_sizes(x, weight, bias, 1, padding, residual=None, emb=None, enlarged=size)
    return PreparedConv(sizes, x, launch, enlarge=True)
