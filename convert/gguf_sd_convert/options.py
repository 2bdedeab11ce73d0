"""What a conversion is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf_sd.adapters.lora import Lora, as_loras, requested
from gguf_sd.adapters.lora_file import lora_table
from gguf_sd.config import SD15, SDXL, SDXL_TURBO, ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.calibrate.options import Calibration
from gguf_sd_convert.quantize.policy import LAYOUTS, MIXED, text_type_name, type_name
from gguf_sd_convert.quantize.requantize import AUTO

PRESETS = {"sd15": SD15, "sdxl": SDXL, "sdxl-turbo": SDXL_TURBO}


@dataclass(frozen=True)
class ConvertOptions:
    """``config``, a configuration or a diffusers folder that has one, describes a single file that is none of the known
    models; ``threads`` 0 = one a core."""

    type: str = "q8_0"  # one of quantize.policy.TYPES, in any case, or MIXED; of a GGUF source also SAME
    layout: str = "native"  # one of quantize.policy.LAYOUTS, or AUTO: a GGUF source's own, else what suits
    text_type: str = "f16"  # of the text encoders' matrices, one of quantize.policy.TEXT_TYPES
    ema: bool = False
    tokenizer: Path | None = None
    config: ModelConfig | Path | None = None
    force: bool = False
    threads: int = 0
    preset: str | None = None  # a key of PRESETS: whose schedule and defaults the file gets
    safety: bool = True  # takes the source's safety checker over, if it has one
    calibration: Calibration | None = None  # rounds for what the layers are fed, and chooses types for "mixed"
    loras: Sequence[Lora] = ()  # merged into the weights before they are quantised
    shared: bool = False  # the output is one that several processes may write at once, all the same: the cache
    unet_only: bool = False  # writes the UNet alone
    allow_requantize: bool = False  # of a GGUF source: blocks of any type may be decoded and quantised anew


def check_options(options: ConvertOptions) -> ConvertOptions:
    """The options with their names as the file will have them. Raises GgufSdError for what does not depend on the
    source."""
    if options.layout not in (*LAYOUTS, AUTO):
        raise GgufSdError(f"no layout {options.layout!r}; choose from {', '.join(LAYOUTS)}")
    if options.preset is not None and options.preset not in PRESETS:
        raise GgufSdError(f"no preset {options.preset!r}; choose from {', '.join(PRESETS)}")
    if options.threads < 0:
        raise GgufSdError(f"threads is {options.threads}; it takes 1 or more, or 0 for one a core")
    loras = requested(as_loras(options.loras), "", None)
    for lora in loras:
        lora_table(lora.path)
    qtype = type_name(options.type)
    if qtype == MIXED and options.calibration is None:
        options = replace(options, calibration=Calibration(compensate=False))
    if options.calibration is not None:
        from gguf_sd_convert.calibrate.job import check_calibration

        check_calibration(options.calibration, qtype)
    return replace(options, type=qtype, text_type=text_type_name(options.text_type), loras=loras)
