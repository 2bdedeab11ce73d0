"""Second moments of what a layer is fed, and of what its output should be changed by."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Columns whose moments are taken together: 530 MB in float32. The rows of a wider convolution, of which SD 1.5 has
# six, are taken apart by the kernel's rows.
MAX_COLUMNS = 11520
BAND = 1920  # rows of moments that are summed up at once


def matrix(weight: Tensor) -> Tensor:
    """A weight as [rows, cols], tap-major (kh, kw, in) for convolutions."""
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1).flatten(1)


def unmatrix(values: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of :func:`matrix`."""
    if len(shape) == 2:
        return values
    out, channels, kh, kw = shape
    return values.view(out, kh, kw, channels).permute(0, 3, 1, 2)


def columns(layer: nn.Module, x: Tensor, kept: Tensor | None = None) -> Tensor:
    """A layer's input as rows of its matrix, [places, cols]: for convolutions the pixels under the kernel. ``kept``:
    the places wanted, of all."""
    if not isinstance(layer, nn.Conv2d):
        found = places(x)
        return found if kept is None else found[kept]
    assert not isinstance(layer.padding, str)
    kernel, stride, edge = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, edge, edge, edge, edge))
    batch, high, wide, channels = padded.shape
    down, across = (torch.arange(0, length - kernel + 1, stride) for length in (high, wide))
    corners = ((torch.arange(batch)[:, None, None] * high + down[:, None]) * wide + across).flatten()
    corners = corners if kept is None else corners[kept]
    pixels = padded.reshape(-1, channels)
    out = torch.empty(len(corners), kernel * kernel, channels)
    for tap in range(kernel * kernel):
        out[:, tap] = pixels[corners + tap // kernel * wide + tap % kernel]
    return out.flatten(1)


def count_places(layer: nn.Module, x: Tensor) -> int:
    """How many rows :func:`columns` makes of all of x."""
    if not isinstance(layer, nn.Conv2d):
        return x.numel() // (x.shape[1] if x.dim() == 4 else x.shape[-1])
    assert not isinstance(layer.padding, str)
    kernel, stride, edge = layer.kernel_size[0], layer.stride[0], layer.padding[0]
    high, wide = ((length + 2 * edge - kernel) // stride + 1 for length in x.shape[2:])
    return len(x) * high * wide


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


def _bands(n: int) -> list[slice]:
    return [slice(start, min(start + BAND, n)) for start in range(0, n, BAND)]


def _mirrored(xx: Tensor) -> Tensor:
    """A symmetric matrix of which the upper half is known; in place."""
    for rows in _bands(len(xx)):
        xx[rows.stop :, rows] = xx[rows, rows.stop :].T
    return xx


class Moments:
    """Weighted sums over a layer's inputs x [n, cols] and the wished-for changes d [n, rows] of its output.

    ``xx`` holds a matrix for every one of ``spans``, of which what lies above the diagonal counts, ``dx``
    [rows, cols]."""

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
            a, b = scaled[:, span], x[:, span]
            for rows in _bands(len(xx)):  # no more of what lies below the diagonal than that
                xx[rows, rows.start :].addmm_(a[:, rows].T, b[:, rows.start :])
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
        moments = [_mirrored(xx).div_(self.count) for xx in self.xx]
        cross = self.dx.div_(self.count)
        if centre:
            for span, xx in zip(self.spans, moments, strict=True):
                xx.addr_(mean_x[span], mean_x[span], alpha=-1)
            cross.addr_(mean_d, mean_x, alpha=-1)
        self.xx, self.dx = [], torch.empty(0)
        return moments, cross
