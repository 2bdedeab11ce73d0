"""What the header of a diffusers file says of alpha: the configuration of its peft adapters, as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from gguf_sd.adapters.targets import UNET_PART, text_part
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown

METADATA = "lora_adapter_metadata"
PARTS = {UNET_PART: "unet", text_part(0): "text_encoder", text_part(1): "text_encoder_2"}
MAX_JSON = 1 << 20


def peft_scale(path: Path, metadata: Mapping[str, str], part: str, module: str, rank: int) -> float:
    """alpha / rank of ``module``, a path with underscores for dots; alpha / sqrt(rank) of a rank-stabilised LoRA
    (arXiv:2312.03732); 1 where the header says nothing. Raises GgufSdError for values of the wrong kind."""
    if METADATA not in metadata:
        return 1.0
    where, prefix = f"{path}: {METADATA} in its header", PARTS[part]
    values = _parsed(metadata[METADATA])
    if values is None:
        raise GgufSdError(f"{where} is no JSON object")
    alpha, patterns = values.get(f"{prefix}.lora_alpha"), values.get(f"{prefix}.alpha_pattern")
    if isinstance(patterns, dict):  # by the end of the path; peft takes the first that fits
        fits = (x for key, x in patterns.items() if f"_{module}".endswith("_" + key.replace(".", "_")))
        alpha = next(fits, alpha)
    if alpha is None:
        return 1.0
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise GgufSdError(f"{where} gives alpha as {shown(alpha)}; it is a number")
    return alpha / (math.sqrt(rank) if values.get(f"{prefix}.use_rslora") is True else rank)


@lru_cache(maxsize=4)
def _parsed(text: str) -> dict[str, Any] | None:
    try:
        values = json.loads(text) if len(text) <= MAX_JSON else None
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None
