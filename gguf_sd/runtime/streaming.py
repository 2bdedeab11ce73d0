"""Parts whose weights are not held: each stage's come from the mapped file when it runs.

A stage is a residual block, a transformer block or another layer; one or two of them are in memory. On a GPU blocks go
through pinned memory on a stream of their own, one stage ahead of the computing, and are repacked for the kernels on
the device: that costs two bytes of its memory traffic for each byte that crosses the bus, a small part of the time,
where packed copies would double the weights in host memory, and packing on the host would take longer than the bus.
On a CPU blocks are used where the file is mapped, and their pages given back behind each stage; what is stored in 16
bits is cast into memory that the next stage's weights overwrite.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import cycle

import torch
from torch import Tensor, nn

from gguf_sd.checkpoint.assign import Deferred
from gguf_sd.checkpoint.control_file import ControlFile
from gguf_sd.checkpoint.finite import cast
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.models.layers import Quantized
from gguf_sd.models.text import TokenEmbedding
from gguf_sd.models.unet import UNet, UNetEncoder
from gguf_sd.runtime.kernel_modes import use_kernels
from gguf_sd.runtime.lanes import Lane, laid_out, lane_to
from gguf_sd.runtime.stages import Meter, Slot, Stage, Stream, Weight
from gguf_sd_kernels.repack import PackedWeight, repack_into

# Called from outside of the block that it lies in: the prompt's keys and values are made once a picture.
APART = re.compile(r"\.attn2\.to_[kv]+$")
# What runs before the blocks, wherever it was registered.
FIRST = re.compile(r"time_embed|label_emb|emb_layers$")
ALIGNMENT = 256  # bytes, of every weight; what CUDA's own allocations begin at


@dataclass
class Streamed:
    """A part and what brings its weights. ``nbytes``: what they take on the device, with the tensors that are held."""

    part: nn.Module
    stream: Stream
    nbytes: int


@dataclass
class StreamedUNet:
    """Stands for ``unet``, and counts what its steps stream."""

    unet: UNet
    meter: Meter

    def project(self, context: Tensor) -> Tensor:
        """As :meth:`gguf_sd.models.unet.UNet.project`."""
        return self.unet.project(context)

    def step(
        self,
        latents: Tensor,
        timesteps: Tensor,
        projected: Tensor,
        vector: Tensor | None = None,
        *,
        control: Sequence[Tensor] = (),
    ) -> Tensor:
        """As :meth:`gguf_sd.models.unet.UNet.step`."""
        before = self.meter.nbytes
        result = self.unet.step(latents, timesteps, projected, vector, control=control)
        self.meter.steps, self.meter.step_bytes = self.meter.steps + 1, self.meter.nbytes - before
        return result


def load_streamed(
    model: ModelFile | ControlFile, name: str, device: torch.device, dtype: torch.dtype, kernels: str, meter: Meter
) -> Streamed:
    """The part ``name`` (text 0, text 1, unet, safety) of a model, or a ControlNet, without its weights, ready to run
    on ``device`` as it would resident: the same kernels (see :mod:`gguf_sd.runtime.kernel_modes`; "" for parts but UNet
    and ControlNet), the same values."""
    deferred: dict[str, Deferred] = {}
    part = _without_weights(model, name, dtype, deferred)
    model.file.forget_pages()
    in_place = used_in_place(device, kernels)
    for owner, weight in deferred.items():
        module = part.get_submodule(owner)
        if isinstance(module, TokenEmbedding):
            module.gather = _Rows(model, weight, dtype)
            module.weight = nn.Parameter(torch.empty(0, dtype=dtype), requires_grad=False)
            continue
        module.origins = (owner,)  # type: ignore[assignment]
        if isinstance(module, Quantized) and not in_place:
            module.blocks = torch.empty_like(module.blocks, device="meta")
    if kernels not in ("", "torch"):
        assert isinstance(part, UNetEncoder)
        use_kernels(part, kernels, device)
    held = sum(p.nbytes for p in part.parameters() if not p.is_meta)
    members = {
        name: _member(module, [deferred[origin] for origin in origins], dtype, in_place)
        for name, module in part.named_modules()
        if (origins := getattr(module, "origins", ()))
    }
    largest = max((source.stored().nbytes for member in members.values() for source in member.sources), default=0)
    lane = lane_to(device, largest)
    stages, nbytes = _placed(_by_stage(part, members), lane)
    stream = Stream(stages, lane, model.file, meter, drop=device.type == "cpu")
    for stage in stages:
        stream.attach(part.get_submodule(stage.name), stage)
    return Streamed(part.to(device), stream, nbytes + lane.nbytes + held)


def used_in_place(device: torch.device, kernels: str) -> bool:
    """Whether blocks are decoded from where the file is mapped."""
    return device.type == "cpu" and kernels in ("", "torch")


def _without_weights(
    model: ModelFile | ControlFile, name: str, dtype: torch.dtype, deferred: dict[str, Deferred]
) -> nn.Module:
    if isinstance(model, ControlFile):
        return model.load(dtype, deferred)
    if name == "unet":
        return model.load_unet(dtype, deferred)
    if name == "safety":
        return model.load_safety(dtype, deferred)
    return model.load_text(int(name.removeprefix("text ")), dtype, deferred)


@dataclass
class _Rows:
    """Looks rows of a table up in the file."""

    model: ModelFile | ControlFile
    table: Deferred
    dtype: torch.dtype

    def __call__(self, ids: Tensor) -> Tensor:
        """int64 [B, N] -> [B, N, D], on the device of ``ids``."""
        stored, rows = self.table.stored(), ids.flatten().cpu()
        if isinstance(stored, QuantTensor):
            some: Tensor | QuantTensor = replace(
                stored, blocks=stored.blocks[rows], shape=(len(rows), *stored.shape[1:])
            )
        else:
            some = stored[rows]
        found = cast(some, self.dtype, self.table.name, self.table.where)
        self.model.file.forget_pages([stored.blocks if isinstance(stored, QuantTensor) else stored])
        return found.view(*ids.shape, -1).to(ids.device)


@dataclass
class _Member:
    """A module whose weights are streamed: where their rows come from, in order, and the arrays that take them, without
    values; none where they are used in the file."""

    module: nn.Module
    sources: list[Deferred]
    arrays: list[Tensor]

    def settle(self, views: Sequence[Tensor]) -> list[Weight]:
        """Has the module take its weights from ``views``, like ``arrays``; what brings them there."""
        if not views:
            return [Weight(source, None) for source in self.sources]
        module, packed = self.module, None
        if isinstance(module, Quantized) and module.packed is not None:
            quants, scales, *mins = views
            packed = replace(module.packed, quants=quants, scales=scales, mins=mins[0] if mins else None)
            module.packed, module.blocks = packed, quants.new_empty(0)
        elif isinstance(module, Quantized):
            module.blocks = views[0]
        else:
            module.weight = nn.Parameter(views[0], requires_grad=False)
        weights, row = [], 0
        for source in self.sources:
            rows = slice(row, row + source.shape[0])
            weights.append(Weight(source, _Unpacked(packed, row) if packed else _Copied(source, views[0][rows])))
            row = rows.stop
        return weights


@dataclass
class _Unpacked:
    """Places blocks as the Triton kernels take them."""

    packed: PackedWeight
    row: int

    def __call__(self, blocks: Tensor) -> Tensor:
        repack_into(blocks, self.packed, self.row)
        return self.packed.quants


@dataclass
class _Copied:
    """Places blocks as they are, and everything else cast, or decoded where it is to be a plain weight."""

    source: Deferred
    target: Tensor

    def __call__(self, stored: Tensor) -> Tensor:
        if stored.dtype == torch.uint8 and self.target.dtype != torch.uint8:
            blocks = self.source.stored()
            assert isinstance(blocks, QuantTensor)
            stored = replace(blocks, blocks=stored).dequantize(self.target.dtype)
        return self.target.copy_(stored)


def _member(module: nn.Module, sources: list[Deferred], dtype: torch.dtype, in_place: bool) -> _Member:
    if isinstance(module, Quantized):
        packed = module.packed
        arrays = [module.blocks] if packed is None else [packed.quants, packed.scales, packed.mins]
        return _Member(module, sources, [] if in_place else [array for array in arrays if array is not None])
    first = sources[0].stored()
    if len(sources) > 1 or isinstance(first, QuantTensor):
        like = torch.empty(sum(s.shape[0] for s in sources), *sources[0].shape[1:], dtype=dtype, device="meta")
    else:
        like = torch.empty_like(first, dtype=dtype, device="meta")  # in its order: some are stored transposed
    return _Member(module, sources, [like.contiguous(memory_format=torch.channels_last) if like.dim() == 4 else like])


def _by_stage(part: nn.Module, members: Mapping[str, _Member]) -> dict[str, list[_Member]]:
    """The members of each stage, in the order in which stages run: a stage is an element of a list of modules that
    holds no list itself, or a module outside of such."""
    found: dict[str, list[_Member]] = {}
    modules = dict(part.named_modules())
    for name, member in members.items():
        levels = name.split(".")
        outer = [".".join(levels[: n + 1]) for n in range(1, len(levels))]
        stages = [at for at in outer if _is_stage(modules, at)]
        found.setdefault(stages[0] if stages and not APART.search(name) else name, []).append(member)
    return dict(sorted(found.items(), key=lambda item: (not APART.search(item[0]), not FIRST.match(item[0]))))


def _is_stage(modules: Mapping[str, nn.Module], name: str) -> bool:
    parent = name.rpartition(".")[0]
    inside = modules[name].modules()
    return isinstance(modules[parent], nn.ModuleList) and not any(isinstance(m, nn.ModuleList) for m in inside)


def _placed(members: Mapping[str, list[_Member]], lane: Lane) -> tuple[list[Stage], int]:
    """The stages, each with weights that have their places, and the bytes of the slots: neighbours take turns at them,
    so that one can be filled while the other serves."""
    slots = [Slot() for _ in range(lane.slots)]
    turns, sizes = cycle(slots), dict.fromkeys(slots, 0)
    stages = [Stage(name) for name in members]
    for stage in stages:
        if nbytes := sum(_room(array) for member in members[stage.name] for array in member.arrays):
            stage.slot = next(turns)
            sizes[stage.slot] = max(sizes[stage.slot], nbytes)
    memory = {slot: lane.room(nbytes) for slot, nbytes in sizes.items()}
    for stage in stages:
        start = 0
        for member in members[stage.name]:
            views = []
            for array in member.arrays:
                assert stage.slot is not None
                views.append(laid_out(memory[stage.slot][start:], array))
                start += _room(array)
            stage.weights += member.settle(views)
    return stages, sum(sizes.values())


def _room(array: Tensor) -> int:
    return -(-array.nbytes // ALIGNMENT) * ALIGNMENT
