"""Every linear and convolution of a UNet step with its sizes, taken from the models themselves on the meta device.

python -m benchmarks.lib.shapes            # a table for each workload
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.config import SD15, SDXL, ModelConfig, UNetConfig
from gguf_sd.models.unet import UNet
from gguf_sd_convert.quantize.policy import plan


@dataclass(frozen=True)
class Layer:
    """A product x [M, K] . w [N, K]^T that a step makes with a quantised weight, ``geglu`` with that epilogue.

    A convolution has M = B * OH * OW and K = taps * IC; ``picture`` is (B, IC, H, W) of its input.
    """

    op: str  # "linear", "geglu" or "conv"
    m: int
    n: int
    k: int
    taps: int = 1
    stride: int = 1
    padding: int = 0
    picture: tuple[int, ...] = ()

    @property
    def gmac(self) -> float:
        """Multiply-accumulates, 10^9."""
        return self.m * self.n * self.k / 1e9

    def __str__(self) -> str:
        size = f"{self.m}x{self.n}x{self.k}"
        return f"{self.op} {size}" + (f" {self.picture[2]}x{self.picture[3]}/{self.stride}" if self.picture else "")


@dataclass(frozen=True)
class Workload:
    """One UNet step: a model, how many pictures go through it at a time, and their side in pixels."""

    config: ModelConfig
    batch: int
    size: int


WORKLOADS = {
    "sd15-512": Workload(SD15, 2, 512),  # with guidance
    "sdxl-512": Workload(SDXL, 1, 512),  # Turbo
    "sdxl-1024": Workload(SDXL, 1, 1024),
}


TINY = UNetConfig(
    block_out_channels=(32,),
    layers_per_block=1,
    transformer_layers=(0,),
    num_heads=(4,),
    context_dim=32,
    norm_groups=8,
)
TINY_WORKLOADS = {"tiny": Workload(ModelConfig(unet=TINY), 1, 16)}  # for Triton's interpreter


def workloads(device: torch.device) -> dict[str, Workload]:
    """What is measured on ``device``."""
    return WORKLOADS if device.type == "cuda" else TINY_WORKLOADS


def step_layers(work: Workload) -> Counter[Layer]:
    """How often each product with a quantised weight occurs in a step; what the converter keeps in F16 is left out."""
    return _recorded(work).layers


def step_gmac(work: Workload) -> float:
    """All multiply-accumulates of a step, 10^9: linears, convolutions and attention, quantised or not."""
    return _recorded(work).macs / 1e9


@cache
def _recorded(work: Workload) -> _Recorder:
    config = work.config.unet
    with torch.device("meta"):
        unet = UNet(config)
        side = work.size // work.config.vae.downscale
        inputs: list[Tensor] = [
            torch.empty(work.batch, config.in_channels, side, side),
            torch.empty(work.batch),
            torch.empty(work.batch, 77, config.context_dim),
        ]
        if config.vector_dim:
            inputs.append(torch.empty(work.batch, config.vector_dim))
    shapes = {UNET + name: tuple(p.shape) for name, p in unet.named_parameters()}
    quantised = {stored.name for stored in plan(shapes, "q4_0", "native") if stored.type == "Q4_0"}
    unet.stack()  # as the GPU kernels run it; a stacked weight stands for its parts, of which the names are gone
    quantised = {re.sub(r"attn1\.to_[qkv]\.", "attn1.to_qkv.", name) for name in quantised}
    quantised = {re.sub(r"(?<=diffusion_model\.).*\.emb_layers\.1\.", "emb_layers.", name) for name in quantised}
    names = {id(p): UNET + name for name, p in unet.named_parameters()}
    with torch.inference_mode(), _Recorder(names, quantised) as recorder:
        unet(*inputs)
    if len(recorder.seen) < len(quantised):
        raise RuntimeError(f"a step used {len(recorder.seen)} of {len(quantised)} quantised weights")
    return recorder


class _Recorder(TorchFunctionMode):
    """Counts the arithmetic, and notes every F.linear and F.conv2d whose weight is in ``quantised``, by its name."""

    def __init__(self, names: dict[int, str], quantised: set[str]):
        super().__init__()
        self.names, self.quantised = names, quantised
        self.layers: Counter[Layer] = Counter()
        self.seen: set[str] = set()
        self.macs = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.nn.functional.linear, torch.conv2d, torch.nn.functional.conv2d):
            self.macs += result.numel() * args[1][0].numel()
            self._note(args, result)
        elif func is torch.nn.functional.scaled_dot_product_attention:
            query, key = args[:2]
            self.macs += 2 * query.numel() * key.shape[-2]
        return result

    def _note(self, args: tuple[Any, ...], result: Tensor) -> None:
        x, weight = args[:2]
        name = self.names.get(id(weight))
        if name not in self.quantised:
            return
        self.seen.add(name)
        n, k = weight.shape[0], weight[0].numel()
        if weight.ndim == 4:
            stride, padding = (v if isinstance(v, int) else v[0] for v in args[3:5])
            taps = weight.shape[2] * weight.shape[3]
            layer = Layer("conv", result.numel() // n, n, k, taps, stride, padding, tuple(x.shape))
        else:
            geglu = name.endswith("ff.net.0.proj.weight")
            layer = Layer("geglu" if geglu else "linear", x.numel() // k, n, k)
        self.layers[layer] += 1


def main() -> None:
    for name, work in WORKLOADS.items():
        layers = step_layers(work)
        total = sum(layer.gmac * count for layer, count in layers.items())
        print(f"{name}: {sum(layers.values())} layers, {len(layers)} shapes, {total:.0f} of {step_gmac(work):.0f} GMAC")
        for layer, count in sorted(layers.items(), key=lambda item: -item[0].gmac * item[1]):
            print(f"  {count:4} x {layer!s:40} {layer.gmac * count:8.2f} GMAC")


if __name__ == "__main__":
    main()
