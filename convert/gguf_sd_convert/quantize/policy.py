"""Which tensor is stored in which type and shape, and why."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from math import prod

from gguf_sd.checkpoint.ggml_types import GGML_TYPES
from gguf_sd.checkpoint.tensor_names import CONTROL, SAFETY, UNET
from gguf_sd.errors import GgufSdError
from gguf_sd_kernels.formats import FORMATS

TYPES = ("f16", "bf16", "q8_0", "q6_k", "q5_k", "q5_1", "q5_0", "q4_k", "iq4_nl", "q4_1", "q4_0")
TEXT_TYPES = ("f16", "q8_0")
# What rows take that super-blocks of 256 do not fill: blocks of 32 whose error is no larger.
FALLBACKS = {"Q4_K": "Q4_1", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
LAYOUTS = ("native", "comfy", "linear")
SMALL_BLOCK = 32  # values, of all types that are written but the K-quants
MIXED = "mixed"  # each layer of the UNet has a type of its own
SAME = "same"  # of a GGUF source: every tensor keeps its type
KINDS = {kind.name: kind for kind in GGML_TYPES.values()}


def type_name(name: str) -> str:
    """The type called so in any case, or SAME or MIXED; raises GgufSdError for a name that is none of TYPES."""
    if (found := str(name).lower()) not in (*TYPES, SAME, MIXED):
        raise GgufSdError(f"no type {name!r}; choose from {', '.join(TYPES)}")
    return found


def text_type_name(name: str) -> str:
    """As :func:`type_name`, of TEXT_TYPES."""
    if (found := str(name).lower()) not in TEXT_TYPES:
        raise GgufSdError(f"no type {name!r} for text encoders; choose from {', '.join(TEXT_TYPES)}")
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
    shapes: Mapping[str, tuple[int, ...]],
    qtype: str,
    layout: str,
    outside_f16: Collection[str] = (),
    text_type: str = "f16",
    own: Mapping[str, str] | None = None,
) -> list[Stored]:
    """The plan for tensors of these canonical names and shapes, in their order.

    ``qtype`` from TYPES, ``layout`` from LAYOUTS; ``outside_f16`` names tensors with values that float16 cannot hold,
    ``text_type`` is that of the text encoders' matrices, and ``own`` gives tensors of the UNet a type of their own.
    """
    policy = _Policy(qtype.upper(), layout, text_type.upper(), own or {})
    return [policy.place(name, shape, name in outside_f16) for name, shape in shapes.items()]


@dataclass(frozen=True)
class _Policy:
    qtype: str
    layout: str
    text_type: str
    own: Mapping[str, str]

    def place(self, name: str, shape: tuple[int, ...], outside_f16: bool) -> Stored:
        if len(shape) < 2:
            return Stored(name, "F32", shape, shape, reason="norms and biases")
        if outside_f16:
            return Stored(name, "F32", shape, shape, reason="values outside the range of F16")
        if reason := self._kept(name, shape):
            return Stored(name, "F16", shape, shape, reason=reason)
        if not name.startswith((UNET, CONTROL)):
            return Stored(name, self.text_type, shape, shape, reason=f"text encoder, in {self.text_type}")
        qtype, reason = self.own.get(name, self.qtype), ""
        if qtype not in FORMATS:
            return Stored(name, qtype, shape, shape)
        if prod(shape[1:]) % FORMATS[qtype].block_size:
            reason = f"rows that blocks of {FORMATS[qtype].block_size} do not fill, in {FALLBACKS[qtype]}"
            qtype = FALLBACKS[qtype]
        flat = (shape[0], prod(shape[1:]))
        return Stored(name, qtype, flat, shape, len(shape) == 4 and self.layout == "native", reason)

    def _kept(self, name: str, shape: tuple[int, ...]) -> str:
        """Why a matrix or convolution stays F16; empty where it does not."""
        if name.startswith(SAFETY):
            return "safety checker"
        if name.startswith("first_stage_model."):
            return "autoencoder"
        if not name.startswith((UNET, CONTROL)):
            return _kept_of_text(name, shape, self.text_type)
        if self.qtype not in FORMATS:
            return ""
        inner = name.removeprefix(UNET).removeprefix(CONTROL)
        for part, reason in PROTECTED.items():
            if inner.startswith(part):
                return reason
        if len(shape) == 4 and self.layout == "linear":
            return "convolutions in the linear layout"
        if prod(shape[1:]) % SMALL_BLOCK:
            return f"rows that blocks of {SMALL_BLOCK} do not fill"
        return ""


def _kept_of_text(name: str, shape: tuple[int, ...], text_type: str) -> str:
    """Why a matrix of a text encoder stays F16: positions are few and seen by every token, and a projection may stand
    either way round, which readers tell by its use."""
    if text_type not in FORMATS:
        return "text encoder"
    if "position" in name or "text_projection" in name:
        return "positions and projection of the text encoder"
    return f"rows that blocks of {SMALL_BLOCK} do not fill" if shape[-1] % SMALL_BLOCK or len(shape) > 2 else ""
