"""A GGUF file's UNet as a component of diffusers' pipelines: ``from_pretrained(…, unet=load_unet("sd15.gguf"))``.

It has the interface of UNet2DConditionModel as far as diffusers' text, image, inpainting, ControlNet and SDXL pipelines
use it. What it cannot do it refuses in a sentence.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DConditionModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor

from gguf_sd import keywords
from gguf_sd.adapters.lora import Active, Lora, active, as_loras, requested
from gguf_sd.adapters.lora_file import lora_table
from gguf_sd.adapters.read_lora import check_loras, layer_factors
from gguf_sd.adapters.side_path import attach, detach
from gguf_sd.adapters.targets import UNET_PART
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models.layers import GroupNorm, LayerNorm, Quantized
from gguf_sd.models.unet import timestep_embedding
from gguf_sd.prompt.conditioning import SIZE_EMBEDDING
from gguf_sd.runtime.kernel_modes import choose_kernels, make_resident, use_kernels
from gguf_sd.runtime.memory import choose_dtype
from gguf_sd.runtime.tuning import Tuning

ADAPTERS = (
    "a gguf-sd UNet takes no peft adapters; give LoRAs when it is loaded, load_unet(path, "
    "loras=['style.safetensors:0.8']), or paint with gguf-sd generate --lora"
)
ATTENTION = (
    "a gguf-sd UNet has attention of its own, which takes no other processors (IP-Adapter, PAG, fused projections)"
)
# Methods of UNet2DConditionModel that change what is inside.
REFUSED = {
    **dict.fromkeys(("load_attn_procs", "load_lora_adapter", "add_adapter", "set_adapter", "set_adapters"), ADAPTERS),
    **dict.fromkeys(
        ("enable_adapters", "disable_adapters", "enable_lora", "disable_lora", "delete_adapters"), ADAPTERS
    ),
    **dict.fromkeys(("fuse_lora", "unfuse_lora", "save_lora_adapter", "save_attn_procs"), ADAPTERS),
    **dict.fromkeys(("set_attn_processor", "fuse_qkv_projections", "_load_ip_adapter_weights"), ATTENTION),
    **dict.fromkeys(("enable_freeu", "set_attention_slice"), "a gguf-sd UNet has neither FreeU nor sliced attention"),
    "save_pretrained": "a gguf-sd UNet is a GGUF file already, which can be copied; save the pipeline without its UNet",
}


def load_unet(
    path: str | os.PathLike[str],
    dtype: str | torch.dtype = torch.float32,
    weights: str = "quantized",
    loras: Sequence[Lora | str | os.PathLike[str] | tuple[str | os.PathLike[str], float]] = (),
    kernels: str = "auto",
) -> GgufUNet:
    """The UNet of a GGUF file for diffusers' pipelines, on the CPU; ``.to`` and offloading move it.

    ``dtype``: of what is computed and of the weights that are in no blocks; a pipeline's ``.to(dtype)`` changes it.
    ``weights``: quantized, or resident (decoded once: faster, larger). ``loras``: as ``generate --lora`` takes them,
    for the UNet alone. ``kernels``: of a GPU, see :func:`gguf_sd.runtime.kernel_modes.choose_kernels`.
    Raises GgufSdError for files and settings that cannot work."""
    if weights not in ("quantized", "resident"):
        raise GgufSdError(f"unknown weights mode {weights!r}; choose from quantized, resident")
    if loras and weights == "resident":
        raise GgufSdError("LoRAs lie beside quantised weights; leave weights='resident' out")
    model = ModelFile.open(keywords.gguf_path(path))
    wanted = requested(as_loras(loras), "", None)
    for lora in wanted:
        lora_table(lora.path)
    check_loras(wanted, model.config)
    chosen = choose_dtype(dtype, torch.device("cpu"))
    return GgufUNet(model, chosen, weights, active(wanted, UNET_PART), kernels)


class GgufUNet(ModelMixin, ConfigMixin):
    """See :func:`load_unet`. ``unet`` is :class:`gguf_sd.models.unet.UNet`."""

    config_name = "config.json"
    encoder_hid_proj = None

    def __init__(self, model: ModelFile, dtype: torch.dtype, weights: str, loras: tuple[Active, ...], kernels: str):
        super().__init__()
        self.register_to_config(**diffusers_config(model.config))
        self.model_config, self.loras = model.config, loras
        self.unet = model.load_unet(dtype)
        if weights == "resident":
            make_resident(self.unet, dtype)
            model.file.forget_pages()
        self._kernels, self._running = kernels, "torch"
        self._tuning = Tuning()  # of the Triton kernels, on their first use
        self._attached: tuple[Active, ...] = ()
        self._prompt: tuple[Tensor, int, Tensor] | None = None  # what the last prompt was, and its keys and values

    @property
    def add_embedding(self) -> SimpleNamespace:
        """SDXL's pipelines ask for the width of what goes in."""
        return SimpleNamespace(linear_1=SimpleNamespace(in_features=self.model_config.unet.vector_dim))

    @property
    def attn_processors(self) -> dict[str, Any]:
        return {}

    def unload_lora(self) -> None:
        """There is none of peft's."""

    def disable_freeu(self) -> None:
        """It is never on."""

    def unfuse_qkv_projections(self) -> None:
        """They are never fused."""

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float | int,
        encoder_hidden_states: Tensor,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: Mapping[str, Any] | None = None,
        added_cond_kwargs: Mapping[str, Tensor] | None = None,
        down_block_additional_residuals: Sequence[Tensor] | None = None,
        mid_block_additional_residual: Tensor | None = None,
        down_intrablock_additional_residuals: Sequence[Tensor] | None = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> UNet2DConditionOutput | tuple[Tensor]:
        """sample [B, in_channels, H, W], timestep a number or [B], encoder_hidden_states [B, M, context_dim] -> the
        prediction [B, out_channels, H, W] in the dtype of ``sample``. Raises GgufSdError for inputs that the models of
        GGUF files do not have."""
        _refuse(
            class_labels=class_labels,
            timestep_cond=timestep_cond,
            attention_mask=attention_mask,
            down_intrablock_additional_residuals=down_intrablock_additional_residuals,
            encoder_attention_mask=encoder_attention_mask,
        )
        self._settle(_lora_scale(cross_attention_kwargs))
        dtype, batch = self.dtype, len(sample)
        if self._running != "torch":
            self._tuning.before_steps(self.unet, sample.to(dtype), guided=False)  # both halves are in it
        times = torch.as_tensor(timestep, device=sample.device).expand(batch)
        control = list(down_block_additional_residuals or ())
        if (mid_block_additional_residual is None) != (down_block_additional_residuals is None):
            raise GgufSdError("a ControlNet's residuals are given for the way down and the middle, or for neither")
        if mid_block_additional_residual is not None:
            control.append(mid_block_additional_residual)
        predicted = self.unet.step(
            sample.to(dtype),
            times,
            self._projected(encoder_hidden_states),
            self._vector(added_cond_kwargs or {}, batch),
            control=[residual.to(dtype) for residual in control],
        ).to(sample.dtype)
        return UNet2DConditionOutput(sample=predicted) if return_dict else (predicted,)

    def _projected(self, context: Tensor) -> Tensor:
        """Its keys and values: those of the last call where it is the same tensor, as at every step of a picture."""
        if context.is_inference():  # nobody counts what is written to it
            return self.unet.project(context.to(self.dtype))
        last = self._prompt
        if last is None or last[0] is not context or last[1] != context._version:
            last = self._prompt = context, context._version, self.unet.project(context.to(self.dtype))
        return last[2]

    def _vector(self, added: Mapping[str, Tensor], batch: int) -> Tensor | None:
        """SDXL's: the pooled text and the embeddings of six sizes, [B, vector_dim]."""
        if not self.model_config.unet.vector_dim:
            return None
        if not {"text_embeds", "time_ids"} <= set(added):
            raise GgufSdError("an SDXL UNet takes added_cond_kwargs with text_embeds and time_ids")
        pooled, sizes = added["text_embeds"], added["time_ids"]
        embedded = timestep_embedding(sizes.flatten(), SIZE_EMBEDDING).view(batch, -1)
        return torch.cat([pooled, embedded.to(pooled)], dim=-1).to(self.dtype)

    def _settle(self, scale: float) -> None:
        """Makes the layers ready for the device that they are on, and lays the LoRAs beside them, ``scale`` times."""
        device = self.device
        kernels = running_on(device, self._kernels)
        wanted = tuple(lora._replace(weight=lora.weight * scale) for lora in self.loras if scale)
        if (kernels, wanted) == (self._running, self._attached):
            return
        self._prompt = None
        detach(self.unet)
        self._attached = ()
        if kernels != self._running:
            _hand_back(self.unet)
            if kernels != "torch":
                use_kernels(self.unet, kernels)
            self._running = kernels
        if wanted:
            with torch.no_grad():
                attach(self.unet, layer_factors(wanted, UNET_PART, self.model_config), self.dtype, device)
            self._attached = wanted

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GgufUNet:
        """Moves, as ``.to`` does, what the kernels hold, too; its types stay what they are."""
        super()._apply(fn, recurse)
        self._prompt, device = None, next(self.unet.parameters()).device
        for module in self.unet.modules():
            if isinstance(module, Quantized) and (packed := module.packed) is not None:
                mins = None if packed.mins is None else packed.mins.to(device)
                moved = replace(packed, quants=packed.quants.to(device), scales=packed.scales.to(device), mins=mins)
                module.packed, module.folded = moved, None
        return self


def running_on(device: torch.device, kernels: str) -> str:
    """Those of a GPU, plain torch elsewhere."""
    return choose_kernels(kernels, "auto", device)[0] if device.type == "cuda" else "torch"


def _hand_back(unet: torch.nn.Module) -> None:
    """From the Triton kernels to plain torch."""
    for module in unet.modules():
        if isinstance(module, Quantized) and module.packed is not None:
            module.blocks, module.packed, module.folded = module.weight.blocks, None, None
        elif isinstance(module, GroupNorm | LayerNorm):
            module.fused = False


def _lora_scale(given: Mapping[str, Any] | None) -> float:
    others = sorted(set(given or {}) - {"scale"})
    if others:
        raise GgufSdError(
            f"cross_attention_kwargs holds {others[0]!r}; a gguf-sd UNet takes scale, of its LoRAs, alone"
        )
    return float((given or {}).get("scale", 1.0))


def _refuse(**given: object) -> None:
    for name, value in given.items():
        if value is not None:
            raise GgufSdError(f"a gguf-sd UNet takes no {name}; Stable Diffusion 1.x and XL have none")


def _refusal(sentence: str) -> Callable[..., NoReturn]:
    def refuse(*given: object, **settings: object) -> NoReturn:
        raise GgufSdError(sentence)

    return refuse


for _name, _sentence in REFUSED.items():
    setattr(GgufUNet, _name, _refusal(_sentence))


def diffusers_config(config: ModelConfig) -> dict[str, Any]:
    """What UNet2DConditionModel's configuration would be."""
    parameters = inspect.signature(UNet2DConditionModel.__init__).parameters.values()
    values = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    unet, factor = config.unet, config.vae.downscale
    height, width = config.defaults.height // factor, config.defaults.width // factor
    depths = unet.transformer_layers
    down = ["CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in depths]
    layers = [*(depth or 1 for depth in depths[:-1]), unet.mid_transformer_layers]  # the middle has the last level's
    values |= {
        "sample_size": width if width == height else [height, width],
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "down_block_types": tuple(down),
        "up_block_types": tuple(kind.replace("Down", "Up") for kind in reversed(down)),
        "block_out_channels": unet.block_out_channels,
        "layers_per_block": unet.layers_per_block,
        "cross_attention_dim": unet.context_dim,
        "transformer_layers_per_block": tuple(layers),
        "attention_head_dim": unet.num_heads,
        "use_linear_projection": unet.linear_projection,
        "norm_num_groups": unet.norm_groups,
    }
    if unet.vector_dim:
        values |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_EMBEDDING,
            "projection_class_embeddings_input_dim": unet.vector_dim,
        }
    return values
