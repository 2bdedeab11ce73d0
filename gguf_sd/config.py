"""What a model looks like: frozen dataclasses, and the known models as literals.

Configurations travel as JSON inside the GGUF file (see :mod:`gguf_sd.checkpoint.gguf_file`), so every class here turns
into plain dictionaries with :func:`dataclasses.asdict` and comes back with ``from_dict``.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, Self


@dataclass(frozen=True)
class _Config:
    """Shared (de)serialisation: unknown keys are refused, lists become tuples."""

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Builds the config from a JSON object; raises ValueError on a key it does not know."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"{cls.__name__} has no field {unknown[0]!r}; it has {', '.join(sorted(known))}")
        return cls(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


@dataclass(frozen=True)
class UNetConfig(_Config):
    """The conditional UNet. Per-level tuples run from the highest resolution to the lowest."""

    in_channels: int = 4  # 9 for inpainting checkpoints: latents, mask, masked-image latents
    out_channels: int = 4
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int = 2
    transformer_layers: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks a level; 0 = no attention there
    mid_transformer_layers: int = 1
    num_heads: tuple[int, ...] = (8, 8, 8, 8)  # attention heads a level; the mid block takes the last
    context_dim: int = 768
    linear_projection: bool = False  # proj_in/proj_out: linear (SDXL) or 1x1 convolution (SD 1.x)
    vector_dim: int = 0  # width of the pooled-text and size vector (SDXL: 2816), 0 = none
    norm_groups: int = 32

    @property
    def time_dim(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.block_out_channels[0]


@dataclass(frozen=True)
class VAEConfig(_Config):
    """The KL autoencoder; it shrinks each side by ``downscale``."""

    in_channels: int = 3
    latent_channels: int = 4
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_groups: int = 32
    scaling_factor: float = 0.18215
    overflows_float16: bool = False  # SDXL's: decoded in bfloat16 or float32 where the UNet runs in float16

    @property
    def downscale(self) -> int:
        """Pixels a latent covers along each side (8 for Stable Diffusion)."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class TextConfig(_Config):
    """A CLIP text transformer, in the words of transformers' CLIPTextConfig."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    projection_dim: int = 0  # 0 = no text projection
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 49407


@dataclass(frozen=True)
class SchedulerConfig(_Config):
    """The training noise schedule and how the model expects to be sampled, in diffusers' words.

    What its source did not name is None; the published configuration of SD 1.5 and single files name no spacing.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"  # or "linear", "squaredcos_cap_v2"
    prediction_type: str = "epsilon"  # or "v_prediction", "sample"
    timestep_spacing: str | None = None  # "leading", "trailing", "linspace"; None: each sampler's own
    steps_offset: int = 1
    set_alpha_to_one: bool | None = False  # None: each sampler's own


@dataclass(frozen=True)
class Defaults(_Config):
    """What `generate` uses where the user says nothing."""

    sampler: str = "pndm"
    schedule: str = "model"
    steps: int = 50
    guidance: float = 7.5
    width: int = 512
    height: int = 512


@dataclass(frozen=True)
class SafetyConfig(_Config):
    """A safety checker: a CLIP vision transformer in the words of transformers' CLIPVisionConfig, and how pictures are
    prepared for it. The literals are those of the checker published with Stable Diffusion 1.x."""

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    image_size: int = 224  # pixels along each side of the square that it sees
    patch_size: int = 14
    hidden_act: str = "quick_gelu"
    projection_dim: int = 768
    concepts: int = 17
    special_care: int = 3
    resize: int = 224  # pixels that the picture's shorter side is brought to, before the square is cut out
    rescale: float = 1 / 255  # from 8-bit values
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # RGB, after rescaling
    std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ModelConfig(_Config):
    """A whole text-to-image model."""

    name: str = "sd1"  # general.architecture: sd1 or sdxl
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: tuple[TextConfig, ...] = (TextConfig(),)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    defaults: Defaults = field(default_factory=Defaults)
    zero_empty_negative: bool = False  # an empty negative prompt is all zeros, not an encoded empty text (SDXL)
    safety: SafetyConfig | None = None  # of the safety checker in the file, if there is one

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        parts: dict[str, Any] = {
            "unet": UNetConfig.from_dict,
            "vae": VAEConfig.from_dict,
            "text": lambda texts: tuple(TextConfig.from_dict(t) for t in texts),
            "scheduler": SchedulerConfig.from_dict,
            "defaults": Defaults.from_dict,
            "safety": lambda safety: None if safety is None else SafetyConfig.from_dict(safety),
        }
        return super().from_dict({k: parts[k](v) if k in parts else v for k, v in values.items()})


SD15 = ModelConfig()
SD15_INPAINT = replace(SD15, unet=replace(SD15.unet, in_channels=9))

OPENCLIP_G = TextConfig(
    hidden_size=1280,
    intermediate_size=5120,
    num_hidden_layers=32,
    num_attention_heads=20,
    hidden_act="gelu",
    projection_dim=1280,
    pad_token_id=0,
)
SDXL = ModelConfig(
    name="sdxl",
    unet=UNetConfig(
        block_out_channels=(320, 640, 1280),
        transformer_layers=(0, 2, 10),
        mid_transformer_layers=10,
        num_heads=(5, 10, 20),
        context_dim=2048,
        linear_projection=True,
        vector_dim=2816,
    ),
    vae=VAEConfig(scaling_factor=0.13025, overflows_float16=True),
    text=(TextConfig(), OPENCLIP_G),
    scheduler=SchedulerConfig(timestep_spacing="leading"),
    defaults=Defaults(sampler="euler", guidance=5.0, width=1024, height=1024),
    zero_empty_negative=True,
)
SDXL_TURBO = replace(
    SDXL,
    scheduler=replace(SDXL.scheduler, timestep_spacing="trailing"),
    defaults=Defaults(sampler="euler_a", steps=1, guidance=0.0),
)
