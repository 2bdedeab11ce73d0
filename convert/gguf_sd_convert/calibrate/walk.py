"""Walking recorded calls through a UNet, block by block, in two streams: through its weights as they are, and through
what they have been rounded to.

The features between two blocks, and the skips, are kept for all calls, so nothing is run again for what lies before.
Inside a block the layers follow in the order in which they run; for each the moments of its inputs x' in the rounded
stream are taken, and with x and r (what the product is added to) from the other stream, what its output there lacks:
d = W (x - x') + (r - r').
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gguf_sd.bench.calls import Samples
from gguf_sd.checkpoint.assign import Deferred
from gguf_sd.models.unet import UNet, timestep_embedding
from gguf_sd_convert.calibrate.moments import Moments, columns, count_places, matrix, places, spans, unmatrix
from gguf_sd_convert.calibrate.pieces import Inputs, Piece, pieces
from gguf_sd_convert.calibrate.watch import Seen, in_order, watch

BATCH_POSITIONS = 8192  # of latents, run at once
MAX_PLACES = 32768  # of a layer's inputs, over all calls: more of them tell little that is new
MANY = 256  # places of a feature map
CROSS = ("attn2.to_k", "attn2.to_v")  # read the prompt alone, before all blocks

T = TypeVar("T", bound=nn.Module)


class Rounder(Protocol):
    """Rounds one layer: of its name, weight [rows, cols], bias and moments makes new values of weight and bias."""

    def __call__(
        self, name: str, weight: Tensor, bias: Tensor | None, moments: Moments
    ) -> tuple[Tensor, Tensor | None]: ...


class _Stream:
    """The features of all calls, batch by batch, at one place of the UNet."""

    def __init__(self, h: list[Tensor], projected: Tensor):
        self.h, self.projected = h, projected
        self.skips: list[list[Tensor]] = []


class Walk:
    """One walk. ``layers``: the names of the modules to be rounded, each by ``rounder``; ``progress`` is called after
    each with its name. Each block is computed in float32; its weights may be ``deferred``, and are then read when its
    turn comes (:func:`gguf_sd.checkpoint.assign.assign`), so that no more than a block's are in memory."""

    def __init__(
        self,
        unet: UNet,
        samples: Samples,
        layers: Mapping[str, object],
        rounder: Rounder,
        progress: Callable[[str], object] = lambda name: None,
        deferred: Mapping[str, Deferred] | None = None,
    ):
        self.deferred = deferred or {}
        self.unet, self.samples, self.rounder, self.progress = unet, samples, rounder, progress
        self.layers = set(layers)
        positions = samples.latents.shape[2] * samples.latents.shape[3]
        batch = max(1, BATCH_POSITIONS // positions)
        self.parts = [slice(i, min(i + batch, len(samples))) for i in range(0, len(samples), batch)]

    @torch.inference_mode()
    def run(self) -> tuple[Tensor, Tensor]:
        """Rounds all layers; returns the predictions of the full and of the rounded UNet, [N, out_channels, h, w]."""
        s = self.samples
        self.emb = F.silu(self._embedding())
        full, rounded = self._project()
        latents = s.latents.float().contiguous(memory_format=torch.channels_last)
        self.streams = [_Stream([latents[part] for part in self.parts], p) for p in (full, rounded)]
        for i, block in enumerate(self.unet.input_blocks):
            self._stage(f"input_blocks.{i}", block)
            for stream in self.streams:
                stream.skips.append([kept(h) for h in stream.h])
        self._stage("middle_block", self.unet.middle_block)
        for i, block in enumerate(self.unet.output_blocks):
            for stream in self.streams:
                skip = stream.skips.pop()
                stream.h = [torch.cat([h, x.float()], 1) for h, x in zip(stream.h, skip, strict=True)]
            self._stage(f"output_blocks.{i}", block)
        out = self._full(self.unet.out, "out")
        first, second = (torch.cat([out(h) for h in stream.h]) for stream in self.streams)
        return first, second

    def _project(self) -> tuple[Tensor, Tensor]:
        """The prompts' keys and values. Their layers have the same inputs in both streams."""
        s = self.samples
        weights = torch.zeros(len(s.contexts)).index_add_(0, s.prompt, s.weights)
        x, weights = places(s.contexts.float()), weights.repeat_interleave(s.contexts.shape[1])
        names = {module: name for name, module in self.unet.named_modules()}
        full, rounded = [], []
        for attention in self.unet.cross_attentions:
            for layer in (attention.to_k, attention.to_v):
                name = names[layer]
                weight: Tensor = self._full(layer, name).weight
                full.append(s.contexts.float() @ weight.T)
                if name in self.layers:
                    moments = Moments(len(weight), spans(layer, weight.shape[1]))
                    moments.add(x, None, weights)
                    weight, _ = self.rounder(name, weight, None, moments)
                    self.progress(name)
                rounded.append(s.contexts.float() @ weight.T)
        return torch.cat(full, -1), torch.cat(rounded, -1)

    def _stage(self, name: str, stage: nn.Module) -> None:
        skips = self.streams[0].skips
        size = (skips[-1][0].shape[2], skips[-1][0].shape[3]) if skips else (0, 0)
        for i, layer in enumerate(stage.children()):
            self._unit(f"{name}.{i}", layer, size)

    def _unit(self, name: str, unit: nn.Module, size: tuple[int, int]) -> None:
        """One residual block, transformer or resampling."""
        modules = [self._full(unit, name)]
        modules.append(copy.deepcopy(modules[0]))
        made = [list(stream.h) for stream in self.streams]
        own = {n.removeprefix(f"{name}.") for n in self.layers if n.startswith(f"{name}.") and not n.endswith(CROSS)}
        for beginnings, piece in pieces(modules[0]):

            def call(which: int, i: int, piece: Piece = piece) -> Tensor:
                stream, part = self.streams[which], self.parts[i]
                projected = stream.projected[self.samples.prompt[part]]
                return piece(modules[which], Inputs(stream.h[i], self.emb[part], projected, size), made[which][i])

            inside = {n for n in own if n.startswith(beginnings)}
            for group in in_order(modules[0], inside, lambda call=call: call(0, 0)) if inside else []:  # type: ignore
                self._group(name, group, modules, call)
            for i in range(len(self.parts)):
                for which in range(2):
                    made[which][i] = call(which, i)
        for stream, h in zip(self.streams, made, strict=True):
            stream.h = h

    def _full(self, module: T, name: str) -> T:
        """A copy of a module of the UNet, in float32."""
        copied = copy.deepcopy(module).float()
        for inner, layer in copied.named_modules():
            weight = self.deferred.get(f"{name}.{inner}" if inner else name)
            if weight is not None:
                stored = weight.stored()
                full = stored.float() if isinstance(stored, Tensor) else stored.dequantize()
                layer.weight = nn.Parameter(full, requires_grad=False)
        return copied

    def _embedding(self) -> Tensor:
        """Of the timesteps, and of SDXL's vectors, before the SiLU, [N, time_dim]."""
        s, unet = self.samples, self.unet
        emb: Tensor = self._full(unet.time_embed, "time_embed")(
            timestep_embedding(s.timesteps, unet.config.block_out_channels[0])
        )
        if s.vectors is not None:
            emb = emb + self._full(unet.label_emb, "label_emb")(s.vectors[s.prompt].float())
        return emb

    def _group(self, unit: str, group: list[str], modules: list[nn.Module], call: Callable[[int, int], Tensor]) -> None:
        """Layers that are given the same input."""
        full = {name: modules[0].get_submodule(name) for name in group}
        sums: dict[str, Moments] = {}
        for i, part in enumerate(self.parts):
            wanted, got = (
                watch(module, group, lambda which=which, i=i: call(which, i))  # type: ignore[misc]
                for which, module in enumerate(modules)
            )
            for name, layer in full.items():
                count = count_places(layer, got[name].x)
                each = count // (part.stop - part.start)
                kept = self._kept(count, part)
                x, other = columns(layer, got[name].x, kept), columns(layer, wanted[name].x, kept)
                if name not in sums:
                    sums[name] = Moments(len(matrix(layer.weight)), spans(layer, x.shape[1]))  # type: ignore[arg-type]
                d = _lacking(layer, other - x, wanted[name], got[name], kept, each)
                sums[name].add(x, d, self.samples.weights[part][kept // each])
        for name, layer in full.items():
            whole = f"{unit}.{name}"
            values, bias = self.rounder(whole, matrix(layer.weight), layer.bias, sums.pop(name))  # type: ignore
            rounded = modules[1].get_submodule(name)
            rounded.weight = nn.Parameter(unmatrix(values, layer.weight.shape), requires_grad=False)  # type: ignore
            if bias is not None:
                rounded.bias = nn.Parameter(bias, requires_grad=False)
            self.progress(whole)

    def _kept(self, rows: int, part: slice) -> Tensor:
        """Which of a batch's places are looked at: all, or an even share of MAX_PLACES."""
        share = MAX_PLACES * (part.stop - part.start) // len(self.samples)
        return torch.arange(rows) if rows <= share else torch.randperm(rows, generator=_seeded(part.start))[:share]


def kept(h: Tensor) -> Tensor:
    """Features as they wait for the way up: in float16 where they are many."""
    return h.half() if h.shape[2] * h.shape[3] >= MANY else h


def _lacking(layer: nn.Module, x: Tensor, wanted: Seen, got: Seen, kept: Tensor, each: int) -> Tensor:
    """What the layer's output lacks at the places ``kept``, [places, rows], its input's difference there being x
    [places, cols]; a picture has ``each`` places."""
    d = x @ matrix(layer.weight).T  # type: ignore[arg-type]
    if wanted.residual is not None and got.residual is not None:
        d += places(wanted.residual)[kept] - places(got.residual)[kept]
    if wanted.emb is not None and got.emb is not None:
        d += (wanted.emb - got.emb)[kept // each]
    return d


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
