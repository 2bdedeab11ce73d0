"""What becomes of tensors that are quantised already: blocks of the wanted type and order are copied, others are
decoded, and quantised anew only where that costs next to nothing or is asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from typing import Any

import gguf
from torch import Tensor

from gguf_sd.checkpoint.finite import check_blocks
from gguf_sd.checkpoint.ggml_types import GGML_TYPES, PLAIN
from gguf_sd.checkpoint.metadata_keys import TYPE
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.quantize.policy import SAME, TYPES, Stored
from gguf_sd_convert.sources.entries import Entry
from gguf_sd_kernels.formats import FORMATS

EXACT = ("Q8_0",)  # what is near enough to the original to quantise from
DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16", "torch.float64": "F32"}
BLOCK_SIZES = {kind.name: kind.block_size for kind in GGML_TYPES.values()}
AUTO = "auto"  # the layout that goes with the source
COPIED = "quantised in the source, copied"


def settled(
    stored: Iterable[Stored], entries: Mapping[str, Entry], qtype: str, layout: str, allow: bool, where: object
) -> list[Stored]:
    """The plan for a GGUF source: ``stored`` is what the policy would do with a checkpoint's tensors, ``qtype`` the
    type that was asked for, ``allow`` whether blocks may be decoded and quantised again whatever their type.

    Raises GgufSdError, naming the file (``where``) and a tensor, for what would lose too much unasked."""
    return [_settled(tensor, entries[tensor.name], qtype, layout, allow, where) for tensor in stored]


def copies(tensor: Stored, entry: Entry) -> bool:
    """Whether the tensor's bytes in the file are those of the source."""
    blocks = entry.blocks
    if blocks is None or blocks.read is None or tensor.type != blocks.type:
        return False
    return len(tensor.logical) < 4 or blocks.tap_major == tensor.tap_major or _one_tap(tensor)


def copied(tensor: Stored, entry: Entry) -> Tensor:
    """The source's bytes of a tensor. Raises GgufSdError where a scale of its blocks is no number."""
    assert entry.blocks is not None
    assert entry.blocks.read is not None
    data = entry.blocks.read()
    if tensor.type in FORMATS:
        check_blocks(QuantTensor(data.view(1, -1), tensor.type, tensor.logical), tensor.name, "the source")
    return data


def _one_tap(tensor: Stored) -> bool:
    return prod(tensor.logical[2:]) == 1


def _settled(tensor: Stored, entry: Entry, qtype: str, layout: str, allow: bool, where: object) -> Stored:
    blocks = entry.blocks
    if blocks is None:
        return _plain(tensor, entry) if qtype == SAME else tensor
    if len(tensor.logical) < 2:
        return replace(tensor, type="F32", shape=tensor.logical)

    # Decoded: to a plain type that is wanted, or because others could not read the blocks.
    ours = tensor.name.startswith(UNET)
    wanted = blocks.type if qtype == SAME or not ours else tensor.type
    if wanted in PLAIN:
        return tensor
    if layout == "linear" and not _row_by_row(tensor, blocks.type):
        return replace(tensor, type="F16", shape=tensor.logical, tap_major=False)

    # Copied: blocks of this type in this order, untouched.
    convolution, native = len(tensor.logical) == 4, layout == "native"
    in_order = not convolution or _one_tap(tensor) or blocks.tap_major == native or not ours
    if wanted == blocks.type and in_order and blocks.read is not None:
        return replace(
            tensor,
            type=blocks.type,
            shape=_rows(tensor, blocks.type) or blocks.shape,
            tap_major=convolution and (native if _one_tap(tensor) else blocks.tap_major),
            reason="" if qtype == SAME or wanted == tensor.type else COPIED,
        )

    # Made anew of decoded values.
    only_order = wanted == blocks.type and blocks.read is not None
    if not allow and (only_order or blocks.type not in EXACT):
        raise GgufSdError(_refusal(tensor, entry, wanted, layout, where))
    if wanted.lower() not in TYPES:
        raise GgufSdError(f"{where}: gguf-sd writes no {wanted} (tensor {tensor.name}); choose a --type")
    if (flat := _rows(tensor, wanted)) is None:
        return replace(tensor, type="F16", shape=tensor.logical, tap_major=False)
    return replace(tensor, type=wanted, shape=flat, tap_major=convolution and native)


def _refusal(tensor: Stored, entry: Entry, wanted: str, layout: str, where: object) -> str:
    blocks = entry.blocks
    assert blocks is not None
    again = "--allow-requantize decodes them and quantises again, at a loss; better convert the original"
    if blocks.read is None:
        return f"{where}: a LoRA would change {tensor.name}, which lies there as {blocks.type} blocks; {again}"
    if wanted == blocks.type:
        return (
            f"{where}: in the native layout {blocks.type} blocks hold values of one tap of a convolution, in comfy's "
            f"values across taps, so those of {tensor.name} cannot be brought into the {layout} layout; {again}"
        )
    return f"{where} lies in {blocks.type} already (tensor {tensor.name}), and {wanted} would be made of that; {again}"


def _row_by_row(tensor: Stored, kind: str) -> bool:
    """Whether a tensor is a matrix whose rows are whole blocks, as tools know it that read no shape metadata."""
    return len(tensor.logical) == 2 and _rows(tensor, kind) is not None


def _rows(tensor: Stored, kind: str) -> tuple[int, int] | None:
    """The shape of a tensor with its rows in whole blocks; None where blocks go over the ends of rows."""
    row = prod(tensor.logical[1:])
    return (tensor.logical[0], row) if row % BLOCK_SIZES[kind] == 0 else None


def _plain(tensor: Stored, entry: Entry) -> Stored:
    """As it lies in the source."""
    return replace(tensor, type=DTYPES.get(str(entry.dtype), "F16"), shape=tensor.logical, tap_major=False, reason="")


def own_layout(entries: Iterable[Entry]) -> str | None:
    """The layout that a GGUF source's convolutions lie in; None where none is quantised."""
    convolutions = [e.blocks for e in entries if e.blocks and len(e.shape) == 4 and prod(e.shape[2:]) > 1]
    if not convolutions:
        return None
    return "native" if any(blocks.tap_major for blocks in convolutions) else "comfy"


def type_label(stored: Iterable[Stored], said: Mapping[str, Any]) -> str:
    """What to call the type of a UNet: as its file ``said``, if that is one of its types, else the quantised type of
    most bytes, or the plain one."""
    nbytes: Counter[str] = Counter()
    for tensor in stored:
        if tensor.name.startswith(UNET):
            nbytes[tensor.type] += tensor.nbytes
    if isinstance(own := said.get(TYPE), str) and own.upper() in nbytes:
        return own
    quantised = {kind: count for kind, count in nbytes.items() if kind not in PLAIN}
    return max(quantised or nbytes or {"F16": 0}, key=lambda kind: nbytes[kind]).lower()


def file_type(qtype: str) -> int:
    """llama.cpp's number of a file whose tensors are mostly ``qtype``."""
    names = (f"MOSTLY_{qtype.upper()}{size}" for size in ("", "_S", "_M"))
    found = next((name for name in names if name in gguf.LlamaFileType.__members__), None)
    return int(gguf.LlamaFileType[found] if found else gguf.LlamaFileType.GUESSED)
