"""Which way a product is made, of those whose kernels were found right on this GPU: fused -> dequantize -> torch.

"auto" takes the faster of fused and dequantize by what was measured, see :mod:`gguf_sd_kernels.tuning.launch`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from gguf_sd_kernels.checks import DTYPES
from gguf_sd_kernels.devices import Gpu, gpu_of
from gguf_sd_kernels.repack import PackedWeight
from gguf_sd_kernels.triton.workspace import MAX_TILES
from gguf_sd_kernels.tuning.launch import UNTUNED, Launch, Product, choose, measured, tiles, untuned
from gguf_sd_kernels.tuning.launch_int8 import choose_int8, int8_supported
from gguf_sd_kernels.tuning.operands import Use
from gguf_sd_kernels.tuning.self_check import Subject
from gguf_sd_kernels.tuning.verdicts import self_check_on, trusted

MODES = ("auto", "fused", "dequantize", "int8")
# What "auto" does with a product that nobody measured. Not itself measured: arithmetic says that decoding first
# costs a quarter of an SD 1.5 step and three quarters of an SDXL step at 512 pixels on the fastest cards.
UNMEASURED = "fused"


@dataclass(frozen=True)
class Way:
    """How a product is made: "fused" and "int8" with their launch, "dequantize", or "torch"."""

    name: str
    launch: Launch | None = None


def way_of(use: Use, weight: PackedWeight, dtype: torch.dtype, mode: str) -> Way:
    """The way ``mode`` takes, or where a kernel of that is set aside the next one. Raises ValueError for a mode outside
    MODES."""
    if mode not in MODES:
        raise ValueError(f"no mode {mode!r} for packed weights; choose from {', '.join(MODES)}")
    device = weight.device
    asked = _asked(use, weight, dtype, mode)
    if asked == "int8":
        launch = choose_int8(use.product, gpu_of(device))
        if trusted(Subject.of_product(use, dtype, launch, int8=True), device):
            return Way("int8", launch)
        asked = "fused"
    if asked == "fused":
        for launch in launches(use.product, gpu_of(device)):
            if launch_trusted(use, dtype, launch, device):
                return Way("fused", launch)
    decoder = Subject.of_decoder(weight.qtype, dtype, weight.shape, weight.tap_major)
    return Way("dequantize" if trusted(decoder, device) else "torch")


def fused_launch(use: Use, weight: PackedWeight, dtype: torch.dtype, mode: str) -> Launch | None:
    """With what the fused kernel makes ``use``; None where ``mode`` takes another, or it is set aside. Raises
    ValueError for a mode outside MODES."""
    if mode not in MODES:
        raise ValueError(f"no mode {mode!r} for packed weights; choose from {', '.join(MODES)}")
    if _asked(use, weight, dtype, mode) != "fused":
        return None
    found = launches(use.product, gpu_of(weight.device))
    return next((launch for launch in found if launch_trusted(use, dtype, launch, weight.device)), None)


def _asked(use: Use, weight: PackedWeight, dtype: torch.dtype, mode: str) -> str:
    product, gpu = use.product, gpu_of(weight.device)
    in_order = weight.tap_major or product.taps == 1
    if product.op == "conv" and not (in_order and weight.shape[1] % 32 == 0):
        return "dequantize"
    if dtype not in DTYPES or gpu.family is None:
        return "dequantize"
    if mode == "int8":
        return "int8" if int8_supported(weight, weight.device) else "fused"
    if mode == "auto":
        known = measured(product, gpu)
        return known.fastest if known else UNMEASURED
    return mode


def launches(product: Product, gpu: Gpu) -> Iterator[Launch]:
    """Launches for ``product`` in the order in which they are tried, each as it fits: the chosen one, the family's,
    and both without inline PTX."""
    first = [fitted(launch, product) for launch in (choose(product, gpu), untuned(product, gpu))]
    yield from dict.fromkeys([*first, *(replace(launch, ptx=False) for launch in first)])


def fitted(launch: Launch, product: Product) -> Launch:
    """``launch`` with steps that divide a tap's channels, and K split for no more tiles than can be."""
    if product.step_multiple % launch.block_k:
        launch = replace(launch, block_k=32)
    if launch.splits > 1 and tiles(product, launch) > MAX_TILES:
        launch = replace(launch, splits=1)
    return launch


def launch_trusted(use: Use, dtype: torch.dtype, launch: Launch, device: torch.device) -> bool:
    """Whether the fused kernel with ``launch`` is right on ``device``, the inline PTX it may have included."""
    subject = Subject.of_product(use, dtype, launch)
    decoder = ptx_subject(subject, device)
    return (decoder is None or trusted(decoder, device)) and trusted(subject, device)


def ptx_subject(subject: Subject, device: torch.device) -> Subject | None:
    """The comparison of inline PTX with the portable decoder that stands for ``subject``'s; None without PTX, which is
    so where it is not compiled in either."""
    family = gpu_of(device).family
    if subject.launch is None or not subject.launch.ptx or device.type != "cuda" or torch.version.hip or not family:
        return None
    _, launch = UNTUNED[family][0]
    return Subject("ptx", subject.dtype, subject.qtype, replace(launch, ptx=True, splits=1))


# Values of a picture's group that one program normalises, its channels rounded up to a power of two [model]: so many
# stay in a multiprocessor's own cache, 64 KiB in 16 bits. Larger groups gain more by more programs than by one launch.
WHOLE_GROUP = 1 << 15


def whole_groups(shape: tuple[int, ...], groups: int) -> bool:
    """Whether groups of ``[B, C, H, W]`` are normalised in one launch, by a program each."""
    width = -(-shape[1] // groups)
    return shape[2] * shape[3] * (1 << (width - 1).bit_length()) <= WHOLE_GROUP


def group_norm_way(x: torch.Tensor, groups: int, silu: bool) -> str:
    """How groups of ``x [B, C, H, W]`` are normalised: "whole" in one launch, in "halves", or by "torch" where our
    kernels are set aside."""
    whole = whole_groups(tuple(x.shape), groups)
    if not self_check_on(x.device):
        return "whole" if whole else "halves"
    subject = norm_subject(tuple(x.shape), x.dtype, groups, silu)
    if whole and trusted(subject, x.device):
        return "whole"
    return "halves" if trusted(replace(subject, kernel="group norm"), x.device) else "torch"


def layer_norm_trusted(x: torch.Tensor) -> bool:
    """Whether our kernel is right for the rows of ``x [..., C]``."""
    return not self_check_on(x.device) or trusted(norm_subject(tuple(x.shape), x.dtype), x.device)


def norm_subject(shape: tuple[int, ...], dtype: torch.dtype, groups: int = 0, silu: bool = False) -> Subject:
    """The kernel that normalises groups of ``[B, C, H, W]``, or without groups the rows of ``[..., C]``."""
    name = str(dtype).removeprefix("torch.")
    if not groups:
        return Subject("layer norm", name, sizes=(shape[-1],))
    kernel = "whole group norm" if whole_groups(shape, groups) else "group norm"
    return Subject(kernel, name, sizes=(shape[1], groups, shape[2] * shape[3], int(silu)))
