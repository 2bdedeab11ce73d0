"""Whether a kernel does on this very device what plain torch does: asked before any result of it is used.

Kernels are compiled by whichever Triton and driver the user has, for cards nobody tried them on. What fails to
compile, to launch or to agree is not used, see :mod:`gguf_sd_kernels.tuning.verdicts`.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.row_parts import RowParts
from gguf_sd_kernels.tuning.launch import Launch, Product
from gguf_sd_kernels.tuning.operands import Operands, Use

# Relative, in the Euclidean norm. int8 quantises activations too; Triton's interpreter cuts float32 to bfloat16 where a
# GPU rounds.
LIMIT, INT8_LIMIT, CUT_LIMIT = 2e-3, 1e-2, 1e-2
PRODUCTS = ("linear", "geglu", "conv")
NORMS = ("group norm", "whole group norm", "layer norm")
KERNELS = (*PRODUCTS, *(f"{name} int8" for name in PRODUCTS), "ptx", "dequantize", *NORMS)
SPLITS = 3  # of K in a check: any number of them is the same code


class DisagreementError(Exception):
    """A kernel's result is not that of plain torch."""


@dataclass(frozen=True)
class Subject:
    """One compilation of a kernel: ``kernel`` is one of KERNELS, ``dtype`` that of activations, ``added`` as in
    :class:`Use`. ``sizes`` are (taps,) of a convolution; (taps, tap-major) of a weight to decode, taps a side; (C,
    groups, rows, SiLU) of a group norm, (C,) of a layer norm."""

    kernel: str
    dtype: str
    qtype: str = ""
    launch: Launch | None = None
    added: tuple[str, ...] = ()
    sizes: tuple[int, ...] = ()

    @classmethod
    def of_product(cls, use: Use, dtype: torch.dtype, launch: Launch, int8: bool = False) -> Subject:
        """The kernel that makes ``use`` with ``launch``."""
        product = use.product
        launch = replace(launch, splits=min(launch.splits, 2), ptx=launch.ptx and dtype == torch.float16)
        kernel = f"{product.op} int8" if int8 else product.op
        sizes = () if use.picture is None else (math.isqrt(product.taps),)
        return cls(kernel, _name(dtype), product.qtype, launch, use.added, sizes)

    @classmethod
    def of_decoder(cls, qtype: str, dtype: torch.dtype, shape: tuple[int, ...], tap_major: bool) -> Subject:
        """The kernel that decodes such a weight."""
        taps = shape[2] if len(shape) == 4 else 1
        return cls("dequantize", _name(dtype), qtype, sizes=(taps, int(tap_major or taps == 1)))

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def to_json(self) -> dict[str, Any]:
        """For :meth:`from_json`; without what is as by default."""
        return {name: value for name, value in asdict(self).items() if value not in ("", (), None)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Subject:
        """Raises ValueError, TypeError or KeyError for what no subject is written as."""
        values = dict(values)
        launch = values.pop("launch", None)
        added, sizes = (tuple(values.pop(name, ())) for name in ("added", "sizes"))
        return cls(**values, launch=None if launch is None else Launch.checked(launch), added=added, sizes=sizes)

    def __str__(self) -> str:
        parts = [self.kernel, self.qtype, self.dtype, *(f"+{name}" for name in self.added)]
        parts += ["x".join(map(str, self.sizes))] if self.sizes else []
        return " ".join(part for part in (*parts, str(self.launch or "")) if part)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@torch.inference_mode()
def check(subject: Subject, device: torch.device) -> None:
    """Runs the kernel on a small shape with all its masked edges, and compares.

    Raises DisagreementError for a wrong result, and whatever compiling and launching raise.
    """
    if subject.kernel in NORMS:
        _check_norm(subject, device)
    elif subject.kernel == "dequantize":
        _check_decoder(subject, device)
    elif subject.kernel == "ptx":
        _check_ptx(subject, device)
    else:
        assert subject.launch is not None
        launch = replace(subject.launch, splits=SPLITS if subject.launch.splits > 1 else 1)
        int8 = subject.kernel.endswith(" int8")
        operands = Operands(small_use(subject), subject.torch_dtype, device)
        got = operands.call(launch, int8)
        _compare(got, operands.plain(), INT8_LIMIT if int8 else 0)
        if operands.left is not None:
            _compare(operands.left.values, RowParts.of(got, operands.left.width).values)


def reason_of(problem: Exception) -> str:
    """One line that says what an exception says."""
    text = str(problem).strip().splitlines()
    return f"{type(problem).__name__}: {text[0]}" if text else type(problem).__name__


def proof_of_life(device: torch.device) -> None:
    """Raises what the device raises where a kernel has left it unusable for this process, as an illegal access does."""
    torch.ones(1, device=device).item()


def small_use(subject: Subject) -> Use:
    """A product of little more than a tile of M and of N, and a few steps along K, with what the subject adds."""
    launch, op = subject.launch, subject.kernel.removesuffix(" int8")
    assert launch is not None
    m, n, k = launch.block_m + 5, launch.block_n + 16, launch.block_k * max(2 * SPLITS, launch.stages + 2)
    if op != "conv":
        return Use(Product(op, subject.qtype, m, n, k), subject.added)
    (side,) = subject.sizes
    channels = 2 * launch.block_k if side > 1 else k
    height, batch = 7, 2
    width = max(side, -(-m // (batch * height)))
    product = Product("conv", subject.qtype, batch * height * width, n, channels * side**2, side**2)
    return Use(product, subject.added, (batch, channels, height, width), padding=side // 2)


def _compare(got: Tensor, want: Tensor, limit: float = 0) -> None:
    limit = limit or (CUT_LIMIT if got.device.type == "cpu" and got.dtype == torch.bfloat16 else LIMIT)
    error = float((got.double() - want.double()).norm() / want.double().norm())
    if not error <= limit:  # NaN too
        raise DisagreementError(f"its result is off by {error:.2g} of plain torch's, at most {limit:g} is allowed")


def _check_ptx(subject: Subject, device: torch.device) -> None:
    """Inline PTX against the portable decoder: both are exact, so results are equal to the bit."""
    assert subject.launch is not None
    linear = replace(subject, kernel="linear")
    operands = Operands(small_use(linear), subject.torch_dtype, device)
    one, other = (operands.call(replace(subject.launch, ptx=ptx, splits=1)) for ptx in (True, False))
    if not torch.equal(one, other):
        raise DisagreementError("inline PTX and the portable decoder differ")


def _check_decoder(subject: Subject, device: torch.device) -> None:
    side, tap_major = subject.sizes
    product = Product("conv" if side > 1 else "linear", subject.qtype, 1, 48, 96 * side**2, side**2)
    picture = (1, 96, side, side) if side > 1 else None
    operands = Operands(Use(product, picture=picture, tap_major=bool(tap_major)), subject.torch_dtype, device)
    _compare(operands.decoded(), operands.plain_weight())


def _check_norm(subject: Subject, device: torch.device) -> None:
    from gguf_sd_kernels.triton.norm import group_norm_silu_triton, layer_norm_triton

    dtype, channels = subject.torch_dtype, subject.sizes[0]
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(dtype)

    weight, bias = 1 + 0.1 * normal(channels), normal(channels)
    if subject.kernel == "layer norm":
        x = normal(19, channels) + 1
        want = F.layer_norm(x.double(), (channels,), weight.double(), bias.double(), 1e-5)
        _compare(layer_norm_triton(x, weight, bias, 1e-5), want.to(dtype))
        return
    _, groups, rows, silu = subject.sizes
    x = (normal(1, channels, 1, rows) + 1).contiguous(memory_format=torch.channels_last)
    want = F.group_norm(x.double(), groups, weight.double(), bias.double(), 1e-5)
    want = F.silu(want) if silu else want
    whole = subject.kernel == "whole group norm"
    _compare(group_norm_silu_triton(x, groups, weight, bias, 1e-5, bool(silu), whole), want.to(dtype))
