"""How much each layer's rounding changes what the UNet predicts, measured.

A layer's weights are rounded alone, the UNet runs on recorded calls, and the squared change of its output is taken,
weighted by what it does to the finished picture. For small changes that grows as the squared change of the weights,
so one type is measured and the others follow from how much more or less of the weights they keep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gguf_sd.bench.calls import Samples
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.models.unet import UNet
from gguf_sd_convert.calibrate.moments import matrix, unmatrix
from gguf_sd_convert.quantize.policy import plan
from gguf_sd_convert.quantize.quantizers import quantize
from gguf_sd_kernels import ops
from gguf_sd_kernels.formats import FORMATS

MEASURED = "Q4_0"
MOST, FEWEST = 64, 4  # calls on which each layer is measured
POSITIONS = 1 << 14  # of latents in all of them, as far as FEWEST allow


@dataclass(frozen=True)
class Sensitivity:
    """Of one group of layers that keep one type: their modules' names, weights, and by type the relative squared error
    of the UNet's output when they alone are of it."""

    names: tuple[str, ...]
    values: int
    errors: dict[str, float]


def groups(names: Sequence[str]) -> list[tuple[str, ...]]:
    """Layers that the engine stacks into one product, and so should share a type, together: self-attention's three
    projections, and all residual blocks' projections of the timestep's embedding."""
    found: dict[str, list[str]] = {}
    for name in names:
        head, _, leaf = name.rpartition(".")
        if head.endswith("attn1") and leaf in ("to_q", "to_k", "to_v"):
            found.setdefault(f"{head}.to_qkv", []).append(name)
        elif name.endswith("emb_layers.1"):
            found.setdefault("emb_layers", []).append(name)
        else:
            found[name] = [name]
    return [tuple(members) for members in found.values()]


def measurable_layers(unet: UNet) -> list[str]:
    """The modules of a UNet whose weights would be quantised."""
    shapes = {
        f"{UNET}{name}.weight": tuple(module.weight.shape)
        for name, module in unet.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d)
    }
    stored = plan(shapes, MEASURED.lower(), "native")
    return [s.name.removeprefix(UNET).removesuffix(".weight") for s in stored if s.type == MEASURED]


def usable_types(types: Sequence[str], cols: Sequence[int]) -> list[str]:
    """Those of the types whose blocks fill rows of all these widths."""
    return [t for t in types if all(c % FORMATS[t].block_size == 0 for c in cols)]


def measured_calls(samples: Samples) -> Samples:
    """As many calls as tell the layers apart, evenly by timestep: the UNet runs through all of them for every layer."""
    positions = samples.latents.shape[2] * samples.latents.shape[3]
    count = min(len(samples), max(FEWEST, min(MOST, POSITIONS // positions)))
    middles = (torch.arange(count) * 2 + 1) * len(samples) // (2 * count)
    return samples.subset(samples.timesteps.argsort(stable=True)[middles])


@torch.inference_mode()
def sensitivities(
    unet: UNet,
    samples: Samples,
    names: Sequence[str],
    types: Sequence[str],
    progress: Callable[[str], object] = lambda name: None,
) -> list[Sensitivity]:
    """Of every group of the layers named, for the types of ``types`` (as in FORMATS) that their rows fit. ``unet``
    holds its weights in full; they are changed meanwhile, and put back."""
    wanted = _predict(unet, samples)
    scale = float((wanted.square() * _per_call(samples)).sum())
    result = []
    for members in groups(names):
        layers = [unet.get_submodule(name) for name in members]
        weights = [layer.weight for layer in layers]
        fitting = usable_types(types, [matrix(w).shape[1] for w in weights])  # type: ignore[arg-type]
        changes = {t: sum(_change(w, t)[1] for w in weights) for t in {MEASURED, *fitting}}  # type: ignore
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = nn.Parameter(_change(weight, MEASURED)[0], requires_grad=False)  # type: ignore[arg-type]
        try:
            moved = ((_predict(unet, samples) - wanted).square() * _per_call(samples)).sum()
        finally:
            for layer, weight in zip(layers, weights, strict=True):
                layer.weight = weight
        gain = float(moved) / scale / max(changes[MEASURED], 1e-30)
        values = sum(w.numel() for w in weights)  # type: ignore[operator,misc]
        result.append(Sensitivity(members, values, {t: gain * changes[t] for t in fitting}))
        progress(members[0])
    return result


def _change(weight: Tensor, qtype: str) -> tuple[Tensor, float]:
    """A weight rounded to the nearest, and the squared change."""
    full = matrix(weight).float()
    values = ops.dequantize(quantize(full, qtype), qtype)
    return unmatrix(values, weight.shape).to(weight.dtype), float((values - full).square().sum())


def _per_call(samples: Samples) -> Tensor:
    return samples.weights.view(-1, 1, 1, 1)


def _predict(unet: UNet, samples: Samples, batch: int = 64) -> Tensor:
    parts = [slice(i, i + batch) for i in range(0, len(samples), batch)]
    dtype = next(unet.parameters()).dtype
    made = []
    for part in parts:
        prompt = samples.prompt[part]
        vectors = None if samples.vectors is None else samples.vectors[prompt].to(dtype)
        latents, context = samples.latents[part].to(dtype), samples.contexts[prompt].to(dtype)
        made.append(unet(latents, samples.timesteps[part], context, vectors).float())
    return torch.cat(made)
