"""What check_gpu.py checks: each function here yields the comparisons of one check, against float64 unless it says so.

Products are those of :class:`shapes.Layer`, with random weights and activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.lib.random_weights import packed_weight, random_blocks, random_unet, unet_inputs
from benchmarks.lib.shapes import Layer
from gguf_sd.config import UNetConfig
from gguf_sd_kernels.devices import gpu_family, multiprocessors
from gguf_sd_kernels.tuning.launch import Launch, Product, candidates

LIMITS = {torch.float16: 2e-3, torch.bfloat16: 1e-2}
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
LIBRARY_LIMIT = 5e-3  # cuBLAS and cuDNN may add parts in 16 bits, or transform what they convolve
INT8_LIMIT = 2e-2  # against products of the activations as they were before they were quantised
UNET_LIMIT, INT8_UNET_LIMIT = 1e-2, 1e-1  # of a whole step, against plain torch in float32
# What the layers of a UNet have added to their products.
EPILOGUES = {"linear": ("none", "bias", "residual"), "geglu": ("bias",), "conv": ("bias", "emb", "residual")}


@dataclass(frozen=True)
class Result:
    """One comparison: ``error`` is relative, in the Euclidean norm."""

    name: str
    error: float
    limit: float

    @property
    def ok(self) -> bool:
        return self.error <= self.limit  # False for NaN


@dataclass(frozen=True)
class Job:
    """A call of one of the functions here."""

    check: str
    device: torch.device
    arguments: tuple[Any, ...]
    seed: int = 0

    def __str__(self) -> str:
        return " ".join([self.check, *(str(argument) for argument in self.arguments)])


def run_job(job: Job) -> list[Result]:
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False  # of whole steps in float32, which others are held against
    torch.manual_seed(job.seed)
    with torch.inference_mode():
        return list(globals()[job.check](job.device, *job.arguments))


def error(got: Tensor, want: Tensor) -> float:
    if got.shape != want.shape:
        raise ValueError(f"a result is {list(got.shape)}, expected {list(want.shape)}")
    return float((got.double() - want.double()).norm() / want.double().norm())


def equal(name: str, one: Tensor, other: Tensor) -> Result:
    return Result(name, float(not torch.equal(one, other)), 0.0)


class Problem:
    """A layer with its operands, ``weight`` in float64."""

    def __init__(self, layer: Layer, qtype: str, device: torch.device, dtype: torch.dtype = torch.float16):
        shape: tuple[int, ...] = (layer.n, layer.k)
        if layer.op == "conv":
            side = {1: 1, 9: 3}[layer.taps]
            shape = (layer.n, layer.k // layer.taps, side, side)
        self.qtype, self.device, self.dtype = qtype, device, dtype
        self.packed, self.weight = packed_weight(qtype, shape, device)
        self.bias = torch.randn(layer.n, device=device, dtype=dtype)
        self.resize(layer)

    def resize(self, layer: Layer) -> None:
        """Other activations for the same weight."""
        self.layer = layer
        self.x = torch.randn(*(layer.picture or (layer.m, layer.k)), device=self.device, dtype=self.dtype)
        if layer.op == "conv":
            self.x = self.x.contiguous(memory_format=torch.channels_last)
        self.product = self.want("none")  # float64
        self.residual = torch.randn(self.product.shape, device=self.device, dtype=self.dtype)
        if layer.op == "conv":
            self.residual = self.residual.contiguous(memory_format=torch.channels_last)
            self.emb = torch.randn(len(self.x), layer.n, device=self.device, dtype=self.dtype)

    def want(self, epilogue: str, x: Tensor | None = None) -> Tensor:
        """The right result, float64; of other activations ``x`` than the problem's own where given."""
        layer = self.layer
        if layer.op == "conv":
            y = self.product if x is None and epilogue != "none" else self._convolved(self.x if x is None else x)
            if epilogue != "none":
                y = y + self.bias[:, None, None].double()
            if epilogue == "emb":
                y = y + self.emb[:, :, None, None]
        else:
            y = F.linear((self.x if x is None else x).double(), self.weight)
            if epilogue != "none":
                y = y + self.bias.double()
            if layer.op == "geglu":
                value, gate = y.chunk(2, dim=-1)
                y = value * F.gelu(gate)
        return y + self.residual if epilogue == "residual" else y

    def _convolved(self, x: Tensor) -> Tensor:
        """A tap at a time: cuDNN's float64 convolutions may want more memory than there is."""
        layer = self.layer
        batch, _, height, width = x.shape
        taps = self.weight.shape[2]
        padded = F.pad(x.double(), (layer.padding,) * 4)
        oh, ow = ((size + 2 * layer.padding - taps) // layer.stride + 1 for size in (height, width))
        total = torch.zeros(batch, oh, ow, layer.n, dtype=torch.float64, device=x.device)
        for i in range(taps):
            for j in range(taps):
                part = padded[:, :, i :: layer.stride, j :: layer.stride][:, :, :oh, :ow]
                total += part.permute(0, 2, 3, 1) @ self.weight[:, :, i, j].T
        return total.permute(0, 3, 1, 2)

    def call(self, way: str, epilogue: str = "bias", **options: Any) -> Tensor:
        """The product made by ``way``: "fused", "int8" or "packed"."""
        linear, conv2d = _ways(way)
        layer = self.layer
        bias = None if epilogue == "none" else self.bias
        residual = self.residual if epilogue == "residual" else None
        if layer.op == "conv":
            emb = self.emb if epilogue == "emb" else None
            return conv2d(self.x, self.packed, bias, layer.stride, layer.padding, residual=residual, emb=emb, **options)
        return linear(self.x, self.packed, bias, residual, geglu=layer.op == "geglu", **options)

    def quantised_x(self) -> Tensor:
        """The activations as products in 8 bits see them, float64."""
        from gguf_sd_kernels.triton.quantize import quantize_activations

        rows = self.x.permute(0, 2, 3, 1) if self.layer.op == "conv" else self.x
        channels = rows.shape[-1]
        quantised = quantize_activations(rows.reshape(-1, channels))
        blocks = quantised.codes.view(-1, channels // 32, 32) * quantised.scales[..., None].double()
        values = blocks.view(rows.shape)
        return values.permute(0, 3, 1, 2) if self.layer.op == "conv" else values

    def __str__(self) -> str:
        batch = f" batch {self.layer.picture[0]}" if self.layer.picture else ""
        return f"{self.qtype} {NAMES[self.dtype]} {self.layer}{batch}"


def _ways(way: str) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    if way == "packed":
        from gguf_sd_kernels.dispatch import conv2d_packed, linear_packed

        return linear_packed, conv2d_packed
    if way == "int8":
        from gguf_sd_kernels.triton.int8 import conv2d_int8, linear_int8

        return linear_int8, conv2d_int8
    from gguf_sd_kernels.triton.conv import conv2d_fused
    from gguf_sd_kernels.triton.linear import linear_fused

    return linear_fused, conv2d_fused


def launch_name(launch: Launch) -> str:
    """ "128x64x64 8w 3s", "swap", "ptx", and "x5" where K is split in five."""
    flags = [flag for flag, on in (("swap", launch.swap), ("ptx", launch.ptx)) if on]
    flags += [f"x{launch.splits}"] if launch.splits > 1 else []
    tile = f"{launch.block_m}x{launch.block_n}x{launch.block_k} {launch.warps}w {launch.stages}s"
    return " ".join([tile, *flags])


def dequantize(device: torch.device, qtype: str, shape: tuple[int, int, int, int]) -> Iterator[Result]:
    """Against the plain-torch decoder on the CPU, which the tests hold against gguf-py: equal, not close."""
    from gguf_sd_kernels.reference import products as reference
    from gguf_sd_kernels.repack import repack, unpack
    from gguf_sd_kernels.triton.dequantize import dequantize_packed

    oc, ic, kh, kw = shape
    blocks = random_blocks(qtype, oc, ic * kh * kw, device)
    yield equal(f"repack {qtype}", unpack(repack(blocks, qtype)), blocks)
    # bfloat16 is unknown to the interpreter's stores
    for dtype in LIMITS if device.type == "cuda" else (torch.float16,):
        for tap_major in (True, False):
            want = reference.conv_weight(blocks.cpu(), qtype, shape, dtype, tap_major=tap_major)
            got = dequantize_packed(repack(blocks, qtype, shape, tap_major=tap_major), dtype)
            name = f"dequantize {qtype} {NAMES[dtype]} {'tap' if tap_major else 'channel'}-major"
            yield equal(name, got.cpu(), want)


def norms(device: torch.device, channels: int, groups: int, height: int, width: int) -> Iterator[Result]:
    from gguf_sd_kernels.triton.norm import group_norm_silu_triton, layer_norm_triton

    for dtype, limit in LIMITS.items():
        x = torch.randn(2, channels, height, width, device=device, dtype=dtype) + 1
        x = x.contiguous(memory_format=torch.channels_last)
        weight, bias = torch.randn(2, channels, device=device, dtype=dtype)
        name = f"{NAMES[dtype]} {channels} channels {height}x{width}"
        for silu, eps in ((True, 1e-5), (False, 1e-6)):
            want = F.group_norm(x.double(), groups, weight.double(), bias.double(), eps)
            got = group_norm_silu_triton(x, groups, weight, bias, eps, silu)
            yield Result(
                f"group norm {name}{' SiLU' if silu else ''}", error(got, F.silu(want) if silu else want), limit
            )
        rows = x.permute(0, 2, 3, 1).contiguous()
        want = F.layer_norm(rows.double(), (channels,), weight.double(), bias.double(), 1e-5)
        yield Result(f"layer norm {name}", error(layer_norm_triton(rows, weight, bias), want), limit)


def ptx(device: torch.device, qtype: str, layer: Layer, launch: Launch) -> Iterator[Result]:
    """Both decoders are exact, so the results are equal to the bit."""
    problem = Problem(layer, qtype, device)
    one, other = (problem.call("fused", launch=replace(launch, ptx=on)) for on in (True, False))
    yield equal(f"PTX against portable {problem} {launch_name(launch)}", one, other)


def launch(
    device: torch.device, way: str, qtype: str, layer: Layer, chosen: Launch, epilogue: str, bfloat16: bool = False
) -> Iterator[Result]:
    """One compilation of a kernel, "fused" or "int8": its result, and the same again on each repetition."""
    dtype = torch.bfloat16 if bfloat16 else torch.float16
    problem = Problem(layer, qtype, device, dtype)
    name = f"{way} {problem} {epilogue} {launch_name(chosen)}"
    first = problem.call(way, epilogue, launch=chosen)
    x = problem.quantised_x() if way == "int8" else None
    yield Result(name, error(first, problem.want(epilogue, x)), LIMITS[dtype])
    again = [problem.call(way, epilogue, launch=chosen) for _ in range(3)]
    yield Result(f"{name}, repeated", float(not all(torch.equal(y, first) for y in again)), 0.0)


def sizes(device: torch.device, qtype: str, layers: tuple[Layer, ...]) -> Iterator[Result]:
    """Every mode on one weight and activations of several sizes, and the weight decoded once; bfloat16 as well."""
    from gguf_sd_kernels.dispatch import MODES
    from gguf_sd_kernels.triton.dequantize import dequantize_packed

    problem = Problem(layers[0], qtype, device)
    full = dequantize_packed(problem.packed, torch.float16)
    for layer in layers:
        problem.resize(layer)
        for epilogue in EPILOGUES[layer.op]:
            want = problem.want(epilogue)
            for mode in MODES:
                limit = {"int8": INT8_LIMIT, "dequantize": LIBRARY_LIMIT}.get(mode, LIMITS[torch.float16])
                got = problem.call("packed", epilogue, mode=mode)
                yield Result(f"{mode} {problem} {epilogue}", error(got, want), limit)
        if layer.op == "conv":
            y = F.conv2d(problem.x, full, problem.bias, layer.stride, layer.padding)
        else:
            y = F.linear(problem.x, full, problem.bias)
        if layer.op != "geglu":
            yield Result(f"resident {problem}", error(y, problem.want("bias")), LIBRARY_LIMIT)
    wide = Problem(layers[-1], qtype, device, torch.bfloat16)
    for mode in ("fused", "dequantize") if device.type == "cuda" else ("fused",):
        yield Result(f"{mode} {wide}", error(wide.call("packed", mode=mode), wide.want("bias")), LIMITS[torch.bfloat16])


def product(device: torch.device, qtype: str, layer: Layer) -> Iterator[Result]:
    """A product of a workload at its true size: all launches that would be measured for it."""
    from gguf_sd_kernels.tuning.launch_int8 import int8_candidates, int8_supported

    problem = Problem(layer, qtype, device)
    sized = Product(layer.op, qtype, layer.m, layer.n, layer.k, layer.taps)
    family, processors = gpu_family(device) or "", multiprocessors(device)
    want = problem.want("bias")
    for chosen in candidates(sized, family, processors):
        got = problem.call("fused", launch=chosen)
        yield Result(f"fused {problem} {launch_name(chosen)}", error(got, want), LIMITS[torch.float16])
    if int8_supported(problem.packed, device):
        want = problem.want("bias", problem.quantised_x())
        for chosen in int8_candidates(sized, family, processors):
            got = problem.call("int8", launch=chosen)
            yield Result(f"int8 {problem} {launch_name(chosen)}", error(got, want), LIMITS[torch.float16])


def unet(device: torch.device, qtype: str, config: UNetConfig, height: int, width: int, mode: str) -> Iterator[Result]:
    """A whole step in ``mode`` against plain torch in float32, and its replay from a CUDA graph: equal to the bit."""
    from benchmarks.lib.modes import capture_on, set_mode
    from gguf_sd.runtime.cuda_graph import GraphedUNet, Graphing

    plain = random_unet(config, qtype, torch.float32, device)
    ours = set_mode(random_unet(config, qtype, torch.float16, device), mode)
    latents, timesteps, context, *vector = unet_inputs(config, 2, 2, torch.float16, device)
    latents = torch.randn(2, latents.shape[1], height, width, device=device, dtype=torch.float16)
    want = plain(latents.float(), timesteps, context.float(), *(x.float() for x in vector))
    name = f"UNet step {qtype} {mode}"
    projected = ours.project(context)
    got = ours.step(latents, timesteps, projected, *vector)
    yield Result(name, error(got, want), INT8_UNET_LIMIT if mode == "int8" else UNET_LIMIT)
    graphed = GraphedUNet(ours, capture_on(device), Graphing("on"))
    graphed.step(torch.randn_like(latents), timesteps, projected, *vector)  # captured on other latents
    yield equal(f"{name} from a CUDA graph", graphed.step(latents, timesteps, projected, *vector), got)
