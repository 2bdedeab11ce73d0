"""The names of a LoRA's tensors: which layer of the model one is for, and what of it.

Read are the names of kohya's sd-scripts (``lora_unet_down_blocks_0_….lora_down.weight``, and for SDXL those with the
original checkpoint's blocks), of LyCORIS (``….hada_w1_a``, ``….lokr_w2``, and ``….diff``, a difference in full, which
ComfyUI writes too), of diffusers and peft (``unet.down_blocks.0.….lora_A.weight``), and those that diffusers wrote
earlier (``….processor.to_q_lora.down.weight``, ``….lora_linear_layer.up.weight``).
"""

from __future__ import annotations

import re
from typing import NamedTuple

from gguf_sd.adapters.targets import UNET_PART, text_part

PREFIXES = {
    "lora_unet_": UNET_PART,
    "lora_te1_": text_part(0),
    "lora_te2_": text_part(1),
    "lora_te_": text_part(0),
    "unet.": UNET_PART,
    "text_encoder_2.": text_part(1),
    "text_encoder.": text_part(0),
    "base_model.model.": UNET_PART,  # peft alone
    "model.diffusion_model.": UNET_PART,
    "diffusion_model.": UNET_PART,
    "lycoris_": UNET_PART,
}
LEAF = re.compile(
    r"(?:\.lora_(?P<kohya>down|up|mid)|\.lora_(?P<peft>[AB])(?:\.[^.]+)?|[._]lora(?:_linear_layer)?\.(?P<old>down|up))"
    r"\.weight$|\.(?P<other>alpha|hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2|diff)$"
)
PEFT = {"A": "down", "B": "up"}
ATTENTION_OLD = re.compile(r"(?<=self_attn_)to_(q|k|v|out)$")
# Relatives that compute something else, by the end of a tensor's name.
REFUSED = {
    "DoRA": re.compile(r"\.(dora_scale|lora_magnitude_vector(\..*)?)$"),
    "OFT": re.compile(r"\.(oft_blocks|oft_diag|oft_r(\..*)?)$"),
    "IA3": re.compile(r"\.(on_input|ia3_l(\..*)?)$"),
    "LoRA that changes biases or norms": re.compile(r"\.(diff_b|w_norm|b_norm)$"),
    "GLoRA": re.compile(r"\.(a1|a2|b1|b2)\.weight$"),
}


class Name(NamedTuple):
    """A tensor's name taken apart."""

    part: str  # unet, text 0 or text 1
    module: str  # the layer's path, with underscores for dots
    leaf: str  # down, up, mid, alpha, hada_w1_a, …


def split(key: str) -> Name | None:
    """None for a tensor that is none of a LoRA's, a LoHa's or a LoKr's, and no difference."""
    match = LEAF.search(key)
    if match is None:
        return None
    leaf = match["kohya"] or match["old"] or match["other"] or PEFT[match["peft"]]
    stem = key[: match.start()]
    prefix = next((prefix for prefix in PREFIXES if stem.startswith(prefix)), "")
    module = stem.removeprefix(prefix).replace(".processor", "").replace(".", "_")
    module = ATTENTION_OLD.sub(r"\1_proj", module)
    if module.endswith("_to_out"):
        module += "_0"
    return Name(PREFIXES.get(prefix, UNET_PART), module, leaf)


def refused(key: str) -> str | None:
    """The kind of adapter that a tensor gives away, of those that are not taken."""
    return next((kind for kind, pattern in REFUSED.items() if pattern.search(key)), None)
