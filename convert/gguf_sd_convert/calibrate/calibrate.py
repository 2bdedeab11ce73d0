"""Calibration of a model: its weights rounded so that the UNet's output suffers least.

Each layer is rounded for the inputs that it will have once all before it are rounded, and first takes the change of
its weight that makes good, in the least squares, what those did wrong: with H = E[x x^T] and C = E[d x^T]
(:mod:`gguf_sd_convert.calibrate.walk`) that is C (H + ridge)^-1. The bias, where there is one, takes up the means.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gguf_sd.bench.calls import Samples
from gguf_sd.checkpoint.assign import Deferred
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.models.unet import UNet
from gguf_sd_convert.calibrate.compensate import round_compensated
from gguf_sd_convert.calibrate.fixed_grid import round_on_grid
from gguf_sd_convert.calibrate.moments import Moments, matrix
from gguf_sd_convert.calibrate.walk import Walk
from gguf_sd_convert.quantize.policy import Stored
from gguf_sd_convert.quantize.quantizers import quantize
from gguf_sd_kernels import ops
from gguf_sd_kernels.formats import FORMATS, BlockFormat

# Of the mean second moment of a layer's inputs, added to each before what came before is made good: 0.01 follows the
# calls recorded too closely, 1 makes good less than could be.
RIDGE = 0.1


@dataclass
class Calibrated:
    """What calibration made, by the tensors' canonical names: rows of blocks as the file takes them, and biases; and
    the relative error of the UNet's output on the calls, root mean square, weighted."""

    blocks: dict[str, Tensor] = field(default_factory=dict)
    biases: dict[str, Tensor] = field(default_factory=dict)
    importance: dict[str, Tensor] = field(default_factory=dict)  # mean square of each column's input, in file order
    error: float = 0.0


def calibrate(
    unet: UNet,
    samples: Samples,
    plan: list[Stored],
    progress: Callable[[str], object] = lambda name: None,
    deferred: Mapping[str, Deferred] | None = None,
) -> Calibrated:
    """Rounds all layers of the plan whose type has blocks, for the calls recorded. ``deferred``: weights of the UNet
    that are still to be read."""
    layers = calibrated_layers(plan)
    result = Calibrated()

    def rounder(name: str, weight: Tensor, bias: Tensor | None, moments: Moments) -> tuple[Tensor, Tensor | None]:
        stored = layers[name]
        mean_x, mean_d = moments.means()
        spans, order = moments.spans, _file_order(stored)
        squares = torch.cat([xx.diagonal() for xx in moments.xx]) / moments.count
        result.importance[stored.name] = squares if order is None else squares[order]
        xx, dx = moments.about(centre=bias is not None)
        wished = weight + _making_good(xx, dx) if len(spans) == 1 else weight
        blocks, values = _rounded(wished, xx, spans, stored)
        result.blocks[stored.name] = blocks
        if bias is not None:
            bias = bias + mean_d - (values - weight) @ mean_x
            result.biases[stored.name.removesuffix("weight") + "bias"] = bias
        return values, bias

    full, rounded = Walk(unet, samples, layers, rounder, progress, deferred).run()
    result.error = relative_error(rounded, full, samples.weights)
    return result


def calibrated_layers(plan: list[Stored]) -> Mapping[str, Stored]:
    """The quantised layers of the UNet by their modules' names."""
    return {
        stored.name.removeprefix(UNET).removesuffix(".weight"): stored
        for stored in plan
        if stored.name.startswith(UNET) and stored.type in FORMATS
    }


def round_by_importance(weight: Tensor, importance: Tensor, stored: Stored) -> Tensor:
    """Blocks of a weight [out, in, …] whose scales are chosen by the mean squares of the columns' inputs, in the order
    of the file."""
    order = _file_order(stored)
    rows = matrix(weight.reshape(stored.logical)).contiguous()
    rows = rows.flatten(1) if order is None else rows[:, order]
    fmt = FORMATS[stored.type]
    if not isinstance(fmt, BlockFormat):
        return quantize(rows, stored.type)
    return round_compensated(rows, importance, stored.type).blocks


def relative_error(got: Tensor, wanted: Tensor, weights: Tensor) -> float:
    """Root of the weighted mean square of predictions' errors [N, …] over that of what they should be."""
    weight = weights.view(-1, *[1] * (got.dim() - 1))
    return float((((got - wanted).square() * weight).sum() / (wanted.square() * weight).sum()).sqrt())


def _making_good(xx: list[Tensor], dx: Tensor) -> Tensor:
    """The change of the weight that comes nearest to the changes of the output that are wished for."""
    if not bool(dx.any()):
        return dx
    diagonal = xx[0].diagonal()
    before = diagonal.clone()
    diagonal.add_(RIDGE * float(before.mean()))
    factor = torch.linalg.cholesky(xx[0])
    diagonal.copy_(before)
    return torch.cholesky_solve(dx.T, factor).T


def _rounded(weight: Tensor, xx: list[Tensor], spans: list[slice], stored: Stored) -> tuple[Tensor, Tensor]:
    """Blocks in the order of the file, and values in tap-major order, of a weight [rows, cols] in the latter. The
    moments are used up: nobody holds them while the half gigabytes are made that rounding takes."""
    order = _file_order(stored)
    blocked = isinstance(FORMATS[stored.type], BlockFormat)
    whole = len(spans) == 1
    if not whole and (order is not None or not blocked):  # a block mixes columns that were not seen together
        blocks = quantize(weight if order is None else weight[:, order], stored.type)
        return blocks, _put_back(ops.dequantize(blocks, stored.type), order)
    round_ = round_compensated if blocked else round_on_grid
    if whole:
        if order is not None:
            weight, xx[0] = weight[:, order], xx[0][order[:, None], order]
        rounded = round_(weight, xx.pop(), stored.type)
        return rounded.blocks, _put_back(rounded.values, order)
    parts = [round_(weight[:, s], xx.pop(0), stored.type) for s in spans]
    return torch.cat([p.blocks for p in parts], 1), torch.cat([p.values for p in parts], 1)


def _file_order(stored: Stored) -> Tensor | None:
    """The tap-major column that stands at each place of a row of the file; None where they are the same."""
    if len(stored.logical) != 4 or stored.tap_major:
        return None
    _, channels, kh, kw = stored.logical
    return torch.arange(kh * kw * channels).view(kh * kw, channels).T.flatten() if kh * kw > 1 else None


def _put_back(values: Tensor, order: Tensor | None) -> Tensor:
    if order is None:
        return values
    back = torch.empty_like(values)
    back[:, order] = values
    return back
