"""Which model a set of tensors is, told from canonical names and shapes alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.checkpoint.what_is_it import what_is
from gguf_sd.config import SD15, SDXL, ModelConfig
from gguf_sd.errors import GgufSdError

FIRST_CONV = UNET + "input_blocks.0.0.weight"
SD1_CONTEXT = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
SDXL_CONTEXT = UNET + "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight"
XL_VECTOR = UNET + "label_emb.0.0.weight"
MARKERS = ("v_pred", "ztsnr")  # tensors that trainers leave in single files, empty: what the weights do not show


def identify(shapes: Mapping[str, Sequence[int]], source: str) -> ModelConfig:
    """The configuration of SD 1.x, SD 1.5 inpainting or SDXL whose UNet has these shapes (canonical names, torch
    order). ``source`` names the file in the error raised for anything else."""
    first = shapes.get(FIRST_CONV)
    if first is None:
        raise GgufSdError(_foreign(shapes, source))
    context = next((_columns(shapes[n]) for n in (SD1_CONTEXT, SDXL_CONTEXT) if n in shapes), 0)
    vector = _columns(shapes.get(XL_VECTOR, ()))
    for config in (SD15, SDXL):
        unet = config.unet
        if len(first) != 4 or first[1] not in (4, 9):
            break
        if (first[0], context, vector) == (unet.block_out_channels[0], unet.context_dim, unet.vector_dim):
            config = replace(config, unet=replace(unet, in_channels=first[1]))
            return marked(config, [name for name in MARKERS if name in shapes], source)
    known = {1024: "Stable Diffusion 2", 1280: "the SDXL refiner"}.get(context)
    what = f"{source} holds {known}" if known else f"{source} holds a UNet of an unknown shape"
    raise GgufSdError(
        f"{what} (first convolution {list(first)}, context width {context}); "
        "SD 1.x, SD 1.5 inpainting and SDXL are supported, other widths only as a diffusers folder"
    )


def marked(config: ModelConfig, markers: Iterable[str], source: str) -> ModelConfig:
    """The configuration with what the MARKERS among ``markers`` say of how the model was trained.

    Raises GgufSdError for a noise schedule of zero terminal signal-to-noise ratio (Lin et al. 2023, arXiv:2305.08891),
    whose last sigma is infinite: without it such a model paints grey fog, and no sampler here starts there.
    """
    markers = set(markers)
    if "ztsnr" in markers:
        raise GgufSdError(
            f"{source} was trained with zero terminal SNR (it holds a tensor ztsnr), which gguf-sd does not sample; "
            "take a model without it"
        )
    if "v_pred" in markers:
        return replace(config, scheduler=replace(config.scheduler, prediction_type="v_prediction"))
    return config


def _columns(shape: Sequence[int]) -> int:
    return shape[-1] if shape else 0


def _foreign(shapes: Mapping[str, Sequence[int]], source: str) -> str:
    if (kind := what_is(shapes)) is not None:
        return f"{source} is {kind.name}; {kind.advice}"
    return (
        f"{source} holds no Stable Diffusion UNet (no tensor {FIRST_CONV.removeprefix(UNET)}); "
        "gguf-sd takes Stable Diffusion 1.x and XL checkpoints"
    )
