"""Each layer of a UNet in 8 bits, beside float32 on the same input, with a prompt whose first token is an outlier.

SDXL's text encoders give the first token values up to 823, where others have about 1: activations in 8 bits would lose
all the others. So the prompt's keys and values stay in 16 bits (:mod:`gguf_sd.models.int8`). The report has the worst
layers as they are computed, and what those keys and values would lose in 8 bits, at the other tokens.

    python -m benchmarks.cpu.int8_outliers sdxl-q4_0.gguf --output benchmarks/results/int8-outliers-sdxl.json
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cpu.bench_step import cpu_name
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.models.int8 import Int8GEGLU, in_8_bits, stays_wide
from gguf_sd.models.layers import Conv2d, Linear, Quantized, resident
from gguf_sd.models.unet import UNet

OUTLIER = 823.0  # of the first token, in three of its features
FEATURES = (11, 273, 640)
TO_KEYS_AND_VALUES = (".attn2.to_k", ".attn2.to_v")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an SD 1.5 or SDXL GGUF file")
    parser.add_argument("--size", type=int, default=256, help="pixels along each side")
    parser.add_argument("--worst", type=int, default=5, help="layers to name")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args()
    unet = ModelFile.open(args.model).load_unet(torch.float32)
    unet.stack()
    narrow, wide = layer_errors(unet, args.size)
    worst = sorted(narrow.items(), key=lambda item: -item[1])[: args.worst]
    result = {
        "date": date.today().isoformat(),
        "machine": cpu_name(),
        "versions": {"torch": torch.__version__},
        "model": args.model.name,
        "outlier": OUTLIER,
        "layers_in_8_bits": len(narrow),
        "relative_error_median": round(statistics.median(narrow.values()), 5),
        "relative_error_worst": {name: round(value, 5) for name, value in worst},
        "keys_and_values_of_other_tokens": {
            way: round(max(errors[way] for errors in wide.values()), 5) for way in ("bfloat16", "int8")
        },
    }
    print(json.dumps(result, indent=2))
    if args.output:
        args.output.write_text(json.dumps(result, indent=2) + "\n")


@torch.inference_mode()
def layer_errors(unet: UNet, size: int) -> tuple[dict[str, float], dict[str, dict[str, float]]]:
    """By layer, from one step in float32 of random latents: the relative error in 8 bits of those that have them; and
    of the prompt's keys and values, at all tokens but the first, in bfloat16, as they are, and in 8 bits."""
    narrow: dict[str, float] = {}
    wide: dict[str, dict[str, float]] = {}

    def noted(name: str, module: nn.Module, compute: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            y = compute(x, *args, **kwargs)
            if name.endswith(TO_KEYS_AND_VALUES):
                assert isinstance(module, Quantized | Linear)
                half = resident(module, torch.bfloat16) if isinstance(module, Quantized) else module.bfloat16()
                in_half, in_bytes = half(x.bfloat16()).float(), in_8_bits(name, module)(x)
                wide[name] = {"bfloat16": error(in_half[:, 1:], y[:, 1:]), "int8": error(in_bytes[:, 1:], y[:, 1:])}
            elif not stays_wide(name):
                layer = in_8_bits(name, module)
                got = layer.geglu(x) if isinstance(layer, Int8GEGLU) else layer(x, *args, **kwargs)
                narrow[name] = error(got, y)
            return y

        return run

    for name, module in unet.named_modules():
        if isinstance(module, Quantized | Linear | Conv2d):
            method = "geglu" if name.endswith(".net.0.proj") else "forward"
            setattr(module, method, noted(name, module, getattr(module, method)))
    config, random = unet.config, torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, size // 8, size // 8, generator=random)
    context = torch.randn(1, 77, config.context_dim, generator=random)
    context[:, 0, FEATURES] = OUTLIER
    vector = torch.randn(1, config.vector_dim, generator=random) if config.vector_dim else None
    unet(latents, torch.tensor([500]), context, vector)
    return narrow, wide


def error(got: Tensor, want: Tensor) -> float:
    return float((got - want).norm() / want.norm())


if __name__ == "__main__":
    main()
