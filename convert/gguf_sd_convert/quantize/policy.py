"""Which tensor is stored in which type and shape, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

from gguf_sd.checkpoint.ggml_types import GGML_TYPES
from gguf_sd.checkpoint.tensor_names import CONTROL, SAFETY, UNET
from gguf_sd.errors import GgufSdError
from gguf_sd_kernels.formats import FORMATS

TYPES = ("f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
LAYOUTS = ("native", "comfy", "linear")
SAME = "same"  # of a GGUF source: every tensor keeps its type
KINDS = {kind.name: kind for kind in GGML_TYPES.values()}


def type_name(name: str) -> str:
    """The type called so in any case, or SAME; raises GgufSdError for a name that is none of TYPES."""
    if (found := str(name).lower()) not in (*TYPES, SAME):
        raise GgufSdError(f"no type {name!r}; choose from {', '.join(TYPES)}")
    return found


# Parts of the UNet, or of a ControlNet, that stay in 16 bits whatever the type, and why.
PROTECTED = {
    "input_blocks.0.0.": "first convolution",
    "out.2.": "last convolution",
    "time_embed.": "timestep embedding",
    "label_emb.": "size and pooled-text embedding",
    "input_hint_block.": "convolutions of a ControlNet's picture",
    "zero_convs.": "last convolutions of a ControlNet",
    "middle_block_out.": "last convolutions of a ControlNet",
}


@dataclass(frozen=True)
class Stored:
    """How one tensor lies in the file.

    ``type`` is a GGML type name, ``shape`` the stored shape and ``logical`` the model's, both in torch order.
    Convolutions flattened to two dimensions hold (kh, kw, in) in a row where ``tap_major``, else (in, kh, kw).
    ``reason`` says why a weight is not of the chosen type; empty where it is.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    logical: tuple[int, ...]
    tap_major: bool = False
    reason: str = ""

    @property
    def nbytes(self) -> int:
        kind = KINDS[self.type]
        return prod(self.shape) // kind.block_size * kind.type_size

    @property
    def reshaped(self) -> bool:
        return self.shape != self.logical


def plan(
    shapes: Mapping[str, tuple[int, ...]], qtype: str, layout: str, outside_f16: Collection[str] = ()
) -> list[Stored]:
    """The plan for tensors of these canonical names and shapes, in their order.

    ``qtype`` from TYPES, ``layout`` from LAYOUTS; ``outside_f16`` names tensors with values that float16 cannot hold.
    """
    return [_place(name, shape, qtype.upper(), layout, name in outside_f16) for name, shape in shapes.items()]


def _place(name: str, shape: tuple[int, ...], qtype: str, layout: str, outside_f16: bool) -> Stored:
    if len(shape) < 2:
        return Stored(name, "F32", shape, shape, reason="norms and biases")
    if outside_f16:
        return Stored(name, "F32", shape, shape, reason="values outside the range of F16")
    if reason := _kept(name, shape, qtype, layout):
        return Stored(name, "F16", shape, shape, reason=reason)
    if qtype not in FORMATS:
        return Stored(name, qtype, shape, shape)
    flat = (shape[0], prod(shape[1:]))
    return Stored(name, qtype, flat, shape, tap_major=len(shape) == 4 and layout == "native")


def _kept(name: str, shape: tuple[int, ...], qtype: str, layout: str) -> str:
    """Why a matrix or convolution stays F16; empty where it does not."""
    if name.startswith(SAFETY):
        return "safety checker"
    if not name.startswith((UNET, CONTROL)):
        return "autoencoder" if name.startswith("first_stage_model.") else "text encoder"
    if qtype not in FORMATS:
        return ""
    inner = name.removeprefix(UNET).removeprefix(CONTROL)
    for part, reason in PROTECTED.items():
        if inner.startswith(part):
            return reason
    if len(shape) == 4 and layout == "linear":
        return "convolutions in the linear layout"
    block = FORMATS[qtype].block_size
    if prod(shape[1:]) % block:
        return f"rows that blocks of {block} do not fill"
    return ""
