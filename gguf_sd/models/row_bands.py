"""Feature maps as bands of rows that pass one after the other, so that no map has to exist whole.

A map [1, C, H, W] is an iterator of bands [1, C, r, W], channels last, top to bottom. Operators take such an iterator
and give another. A convolution waits for the first row of the next band and keeps the last row of the one before, so
nothing is computed twice and what comes out is what the whole map would have given, but for the order of float sums.
No operator holds on to a band that it has passed on: ``made.pop()`` and ``map`` leave no name for it.
Bands keep their heights through every operator that keeps the map's height: a branch and its shortcut meet in pairs.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gguf_sd_kernels.cpu.enlarged import interleaved, phase_weights

Rows = Iterator[Tensor]
Operator = Callable[[Rows], Rows]
Pad = tuple[int, int, int, int]  # left, right, top, bottom
BOTH_SIDES: Pad = (1, 1, 1, 1)
MOMENTS_VALUES = 1 << 20  # that moments are taken of at a time: their float32 copies stay small


def bands(x: Tensor, values: int, channels: int) -> Rows:
    """A map [1, C, H, W] in bands that, with as many ``channels``, hold about ``values`` numbers; at least a row."""
    yield from x.split(max(1, values // (channels * x.shape[3])), 2)


def rebanded(rows: Rows, values: int) -> Rows:
    """The same rows in bands of about ``values`` numbers: small ones are joined, large ones split."""
    waiting: list[Tensor] = []
    held = 0
    for band in rows:
        most = max(1, values // (band.shape[1] * band.shape[3]))
        for piece in band.split(most, 2):
            if held + piece.shape[2] > most:
                yield _joined(waiting)
                waiting, held = [], 0
            waiting.append(piece)
            held += piece.shape[2]
    if waiting:
        yield _joined(waiting)


def _joined(pieces: list[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 2)


def plain_weights(conv: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight and bias of a convolution, which is run here with other edges than its own. Raises TypeError for one whose
    weights are in blocks, in 8 bits or still in a file: the memory plan gives bands an autoencoder that has none."""
    if not isinstance(conv, nn.Conv2d) or conv.weight.is_meta:
        raise TypeError(f"bands of rows take convolutions with plain weights, got {type(conv).__name__}")
    return conv.weight, conv.bias


def convolved(rows: Rows, conv: nn.Conv2d) -> Rows:
    """A 3x3 convolution of stride 1, with a pixel of zeros around the map."""
    weight, bias = plain_weights(conv)
    above = band = None
    for below in chain(rows, (None,)):
        if band is not None:
            made = [F.conv2d(_between(above, band, below), weight, bias, padding=(0, 1))]
            above, band = band[:, :, -1:].clone(), None
            yield made.pop()
        band = below


def _between(above: Tensor | None, band: Tensor, below: Tensor | None) -> Tensor:
    """The band with the row ``above`` it and the first row of the one ``below`` it; zeros where there is none."""
    zeros = band.new_zeros(1, 1, 1, 1).expand(1, band.shape[1], 1, band.shape[3])
    x = torch.cat([zeros if above is None else above, band, zeros if below is None else below[:, :, :1]], 2)
    return x.contiguous(memory_format=torch.channels_last)


def strided(rows: Rows, conv: nn.Conv2d, pad: Pad = BOTH_SIDES) -> Rows:
    """A 3x3 convolution of stride 2 of the map with ``pad`` zeros around it."""
    left, right, top, bottom = pad
    weight, bias = plain_weights(conv)
    waiting: Tensor | None = None
    for band in chain(rows, (None,)):
        if band is None:
            assert waiting is not None
            x = F.pad(waiting, (0, 0, 0, bottom))
        elif waiting is None:
            x = F.pad(band, (left, right, top, 0))
        else:
            x = torch.cat([waiting, F.pad(band, (left, right, 0, 0))], 2)
        made = (x.shape[2] - 1) // 2
        waiting = x[:, :, 2 * made :].clone()
        if made > 0:
            x = x[:, :, : 2 * made + 1].contiguous(memory_format=torch.channels_last)
            yield F.conv2d(x, weight, bias, 2)


def upsampled(rows: Rows, conv: nn.Conv2d, values: int) -> Rows:
    """Twice the size by nearest neighbours, then a 3x3 convolution, see :mod:`gguf_sd_kernels.cpu.enlarged`; bands of
    about ``values`` numbers come out."""
    weight, bias = plain_weights(conv)
    kernels = phase_weights(weight)
    small = (piece for band in rows for piece in bands(band, values, 4 * conv.out_channels))
    above = band = None
    for below in chain(small, (None,)):
        if band is not None:
            around = _between(above, band, below)
            phases = (F.conv2d(around, kernel, bias, padding=(0, 1)) for kernel in kernels)
            made = [interleaved(phases, band.shape[2], band.shape[3])]
            del around, phases
            above, band = band[:, :, -1:].clone(), None
            yield made.pop()
        band = below


def _same(band: Tensor) -> Tensor:
    return band


def residual(rows: Rows, branch: Operator, shortcut: Callable[[Tensor], Tensor] = _same) -> Rows:
    """``branch(x) + shortcut(x)``; a band waits for what the branch makes of it."""
    waiting: deque[Tensor] = deque()

    def add(band: Tensor) -> Tensor:
        return band.add_(shortcut(waiting.popleft()))

    return map(add, branch(noted(rows, waiting)))


def noted(rows: Rows, waiting: deque[Tensor], shortcut: Callable[[Tensor], Tensor] = _same) -> Rows:
    """The rows as they come, with ``shortcut`` of each band left in ``waiting``."""

    def note(band: Tensor) -> Tensor:
        waiting.append(shortcut(band))
        return band

    return map(note, rows)


def added(rows: Rows, waiting: deque[Tensor]) -> Rows:
    """Each band added to the one that has waited longest, in its memory: what lives long stays where it is, and leaves
    no holes in the heap."""

    def add(band: Tensor) -> Tensor:
        return waiting.popleft().add_(band)

    return map(add, rows)


class Moments:
    """Mean and variance of each group of channels of a map, from its bands: sums of x - s and of its square, with s
    the first pixel, so that channels far from zero lose no digits."""

    def __init__(self) -> None:
        self.count = 0
        self.shift = self.total = self.squares = torch.empty(0)

    def add(self, band: Tensor) -> None:
        x = band.permute(0, 2, 3, 1).flatten(0, 2)  # [pixels, C], a view
        if not self.count:
            self.shift = x[0].to(torch.promote_types(x.dtype, torch.float32), copy=True)
            self.total, self.squares = torch.zeros_like(self.shift).double(), torch.zeros_like(self.shift).double()
        self.count += len(x)
        for part in x.split(max(1, MOMENTS_VALUES // x.shape[1])):
            shifted = part.to(self.shift.dtype) - self.shift
            self.total += shifted.sum(0)
            self.squares += shifted.square_().sum(0)

    def of_groups(self, groups: int) -> tuple[Tensor, Tensor]:
        """Mean and variance [C], the same for all channels of a group."""
        mean = self.total / self.count
        variance = self.squares / self.count - mean.square()
        mean = (mean + self.shift).view(groups, -1)
        center = mean.mean(1, keepdim=True)
        spread = (variance.view(groups, -1) + (mean - center).square()).mean(1, keepdim=True)
        return tuple(x.expand_as(mean).flatten().float() for x in (center, spread))  # type: ignore[return-value]


def normed(rows: Rows, moments: Moments, norm: nn.GroupNorm, silu: bool = True) -> Rows:
    """Group norm with the whole map's statistics, then SiLU."""
    mean, variance = moments.of_groups(norm.num_groups)
    weight, bias = norm.weight.to(mean), norm.bias.to(mean)

    def apply(band: Tensor) -> Tensor:
        y = F.batch_norm(band, mean, variance, weight, bias, eps=norm.eps)
        return F.silu(y, inplace=True) if silu else y

    return map(apply, rows)


class StoredMap:
    """A map in memory, as bands. ``rows`` are computed when it is made, with their moments."""

    def __init__(self, rows: Iterable[Tensor]):
        self.moments = Moments()
        self._bands: deque[Tensor] = deque()
        for band in rows:
            self.moments.add(band)
            self._bands.append(band)

    def rows(self) -> Rows:
        return iter(tuple(self._bands))

    def drain(self) -> Rows:
        """The rows for the last time: a band that was passed on is no longer held."""
        while self._bands:
            yield self._bands.popleft()


class DerivedMap:
    """A map that is computed anew from another on every pass."""

    def __init__(self, source: Map, operator: Operator):
        self._source, self._operator = source, operator
        self._moments: Moments | None = None

    @property
    def moments(self) -> Moments:
        """Takes a pass, the first time."""
        if self._moments is None:
            self._moments = Moments()
            for band in self.rows():
                self._moments.add(band)
                del band
        return self._moments

    def rows(self) -> Rows:
        return self._operator(self._source.rows())

    def drain(self) -> Rows:
        return self._operator(self._source.drain())


Map = StoredMap | DerivedMap
