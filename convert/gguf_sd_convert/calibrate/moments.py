"""Second moments of what a layer is fed, and of what its output should be changed by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gguf_sd.models.layers import Pointwise

# Columns whose moments are taken together: 530 MB in float32. The rows of a wider convolution, of which SD 1.5 has
# six, are taken apart by the kernel's rows.
MAX_COLUMNS = 11520


def matrix(weight: Tensor) -> Tensor:
    """A weight as [rows, cols], tap-major (kh, kw, in) for convolutions."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def unmatrix(values: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`matrix`."""
    if len(shape) == 2:
        return values
    out, channels, kh, kw = shape
    return values.view(out, kh, kw, channels).permute(0, 3, 1, 2)


def columns(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's input as rows of its matrix, [places, cols]: for convolutions the pixels under the kernel."""
    if isinstance(layer, nn.Conv2d):
        assert not isinstance(layer.padding, str)
        taps, channels = layer.kernel_size[0] ** 2, x.shape[1]
        patches = F.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride)  # [B, (in, kh, kw), L]
        return patches.view(len(x), channels, taps, -1).permute(0, 3, 2, 1).reshape(-1, taps * channels)
    return places(x) if isinstance(layer, Pointwise) else x.reshape(-1, x.shape[-1])


def places(x: Tensor) -> Tensor:
    """[B, C, H, W], or [B, N, C], as [places, C]."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]) if x.dim() == 4 else x.reshape(-1, x.shape[-1])


def spans(layer: nn.Module, cols: int) -> list[slice]:
    """The columns of a layer's matrix that are taken together."""
    if cols <= MAX_COLUMNS:
        return [slice(0, cols)]
    kernel = layer.kernel_size[0] if isinstance(layer, nn.Conv2d) else -(-cols // MAX_COLUMNS)
    step = cols // kernel
    return [slice(start, start + step) for start in range(0, cols, step)]


class Moments:
    """Weighted sums over a layer's inputs x [n, cols] and the wished-for changes d [n, rows] of its output.

    ``xx`` holds a matrix for every one of ``spans``, ``dx`` [rows, cols]."""

    def __init__(self, rows: int, spans: list[slice]):
        cols = spans[-1].stop
        self.spans = spans
        self.xx = [torch.zeros(s.stop - s.start, s.stop - s.start) for s in spans]
        self.dx, self.x, self.d = torch.zeros(rows, cols), torch.zeros(cols), torch.zeros(rows)
        self.count = 0.0

    def add(self, x: Tensor, d: Tensor | None, weights: Tensor) -> None:
        """Inputs, with the changes wished for (None: none) and the weight of each, [n]."""
        scaled = x * weights[:, None]
        for span, xx in zip(self.spans, self.xx, strict=True):
            xx.addmm_(scaled[:, span].T, x[:, span])
        self.x += scaled.sum(0)
        if d is not None:
            self.dx.addmm_(d.T, scaled)
            self.d += d.T @ weights
        self.count += float(weights.sum())

    def means(self) -> tuple[Tensor, Tensor]:
        """Of x and of d."""
        return self.x / self.count, self.d / self.count

    def about(self, centre: bool) -> tuple[list[Tensor], Tensor]:
        """E[x x^T] of every span and E[d x^T]; the covariances where ``centre``, which is what counts where a bias
        takes up the means. The sums are used up."""
        mean_x, mean_d = self.means()
        moments = [xx.div_(self.count) for xx in self.xx]
        cross = self.dx.div_(self.count)
        if centre:
            for span, xx in zip(self.spans, moments, strict=True):
                xx.addr_(mean_x[span], mean_x[span], alpha=-1)
            cross.addr_(mean_d, mean_x, alpha=-1)
        self.xx, self.dx = [], torch.empty(0)
        return moments, cross
