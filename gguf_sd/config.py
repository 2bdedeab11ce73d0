"""What a model looks like: frozen dataclasses, and the known models as literals.

Configurations travel as JSON inside the GGUF file (see :mod:`gguf_sd.checkpoint.gguf_file`), so every class here turns
into plain dictionaries with :func:`dataclasses.asdict` and comes back with ``from_dict``. A file is a stranger's:
types, ranges and lengths are declared here, field by field, and ``from_dict`` holds every value against them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Self

from gguf_sd.field_checks import Between, Items, OneOf, checked_fields, shown

SIZE_IDS = 6 * 256  # of SDXL's vector: the embeddings of six sizes, beside the pooled text

Channels = Annotated[int, Between(1, 256)]
Width = Annotated[int, Between(1, 1 << 15)]
Heads = Annotated[int, Between(1, 1 << 10)]
Depth = Annotated[int, Between(1, 128)]
Activation = Annotated[str, OneOf("quick_gelu", "gelu")]
Positive = Annotated[float, Between(1e-6, 1e6)]
Fraction = Annotated[float, Between(1e-9, 0.999999)]


@dataclass(frozen=True)
class _Config:
    """Shared (de)serialisation: what a class declares of its fields holds for every value that comes from a file."""

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Builds the config from a JSON object; lists become tuples, what is left out gets its default.

        Raises ValueError, naming field, value and what is allowed, for unknown fields, wrong types and lengths, numbers
        out of range or not finite, and fields that do not fit one another.
        """
        config: Self = checked_fields(cls, values)
        return config

    def check(self) -> None:
        """Raises ValueError where fields, each in its range, do not go together."""


def _divided(key: str, parts: int, by: str, widths: Iterable[int]) -> None:
    for width in widths:
        if width % parts:
            raise ValueError(f"{key} is {parts}; it takes a divisor of {by}, {width}")


@dataclass(frozen=True)
class UNetConfig(_Config):
    """The conditional UNet. Per-level tuples run from the highest resolution to the lowest."""

    in_channels: Channels = 4  # 9 for inpainting checkpoints: latents, mask, masked-image latents
    out_channels: Channels = 4
    block_out_channels: Annotated[tuple[Width, ...], Items(1, 8)] = (320, 640, 1280, 1280)
    layers_per_block: Annotated[int, Between(1, 16)] = 2
    transformer_layers: tuple[Annotated[int, Between(0, 64)], ...] = (1, 1, 1, 0)  # blocks a level; 0 = no attention
    mid_transformer_layers: Annotated[int, Between(1, 64)] = 1
    num_heads: tuple[Heads, ...] = (8, 8, 8, 8)  # attention heads a level; the mid block takes the last
    context_dim: Width = 768
    linear_projection: bool = False  # proj_in/proj_out: linear (SDXL) or 1x1 convolution (SD 1.x)
    vector_dim: Annotated[int, Between(0, 1 << 15)] = 0  # width of the pooled-text and size vector (SDXL: 2816)
    norm_groups: Width = 32

    @property
    def time_dim(self) -> int:
        """Width of the timestep embedding."""
        return 4 * self.block_out_channels[0]

    def check(self) -> None:
        levels = len(self.block_out_channels)
        for key in ("transformer_layers", "num_heads"):
            if len(value := getattr(self, key)) != levels:
                raise ValueError(
                    f"{key} is {shown(value)}; it takes {levels} values, one a level of block_out_channels"
                )
        _divided("norm_groups", self.norm_groups, "every width in block_out_channels", self.block_out_channels)
        if self.block_out_channels[0] % 2:
            raise ValueError(f"block_out_channels is {shown(self.block_out_channels)}; the first takes an even number")
        depths = (*self.transformer_layers[:-1], self.mid_transformer_layers)  # the mid block has the last level's
        for width, heads, depth in zip(self.block_out_channels, self.num_heads, depths, strict=True):
            if depth and width % heads:
                raise ValueError(f"num_heads is {shown(self.num_heads)}; each takes a divisor of its width, {width}")


@dataclass(frozen=True)
class VAEConfig(_Config):
    """The KL autoencoder; it shrinks each side by ``downscale``."""

    in_channels: Channels = 3
    latent_channels: Channels = 4
    block_out_channels: Annotated[tuple[Width, ...], Items(1, 8)] = (128, 256, 512, 512)
    layers_per_block: Annotated[int, Between(1, 16)] = 2
    norm_groups: Width = 32
    scaling_factor: Positive = 0.18215
    overflows_float16: bool = False  # SDXL's: decoded in bfloat16 or float32 where the UNet runs in float16

    @property
    def downscale(self) -> int:
        """Pixels a latent covers along each side (8 for Stable Diffusion)."""
        return 2 ** (len(self.block_out_channels) - 1)

    def check(self) -> None:
        _divided("norm_groups", self.norm_groups, "every width in block_out_channels", self.block_out_channels)


@dataclass(frozen=True)
class TextConfig(_Config):
    """A CLIP text transformer, in the words of transformers' CLIPTextConfig."""

    vocab_size: Annotated[int, Between(3, 1 << 20)] = 49408
    hidden_size: Width = 768
    intermediate_size: Annotated[int, Between(1, 1 << 17)] = 3072
    num_hidden_layers: Depth = 12
    num_attention_heads: Heads = 12
    max_position_embeddings: Annotated[int, Between(3, 4096)] = 77  # start, end, and what is between them
    hidden_act: Activation = "quick_gelu"
    projection_dim: Annotated[int, Between(0, 1 << 15)] = 0  # 0 = no text projection
    bos_token_id: int = 49406
    eos_token_id: int = 49407
    pad_token_id: int = 49407

    def check(self) -> None:
        _divided("num_attention_heads", self.num_attention_heads, "hidden_size", [self.hidden_size])
        for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if not 0 <= (token := getattr(self, key)) < self.vocab_size:
                raise ValueError(f"{key} is {token}; it takes a token of the vocabulary, 0 to {self.vocab_size - 1}")


@dataclass(frozen=True)
class SchedulerConfig(_Config):
    """The training noise schedule and how the model expects to be sampled, in diffusers' words.

    What its source did not name is None; the published configuration of SD 1.5 and single files name no spacing.
    """

    num_train_timesteps: Annotated[int, Between(2, 100_000)] = 1000
    beta_start: Fraction = 0.00085
    beta_end: Fraction = 0.012
    beta_schedule: Annotated[str, OneOf("scaled_linear", "linear", "squaredcos_cap_v2")] = "scaled_linear"
    prediction_type: Annotated[str, OneOf("epsilon", "v_prediction", "sample")] = "epsilon"
    timestep_spacing: Annotated[str, OneOf("leading", "trailing", "linspace")] | None = None  # None: each sampler's own
    steps_offset: Annotated[int, Between(0, 100)] = 1
    set_alpha_to_one: bool | None = False  # None: each sampler's own


@dataclass(frozen=True)
class Defaults(_Config):
    """What `generate` uses where the user says nothing."""

    sampler: str = "pndm"
    schedule: str = "model"
    steps: Annotated[int, Between(1, 1000)] = 50
    guidance: Annotated[float, Between(0, 100)] = 7.5
    width: Annotated[int, Between(1, 1 << 14)] = 512
    height: Annotated[int, Between(1, 1 << 14)] = 512


@dataclass(frozen=True)
class SafetyConfig(_Config):
    """A safety checker: a CLIP vision transformer in the words of transformers' CLIPVisionConfig, and how pictures are
    prepared for it. The literals are those of the checker published with Stable Diffusion 1.x."""

    hidden_size: Width = 1024
    intermediate_size: Annotated[int, Between(1, 1 << 17)] = 4096
    num_hidden_layers: Depth = 24
    num_attention_heads: Heads = 16
    image_size: Annotated[int, Between(1, 4096)] = 224  # pixels along each side of the square that it sees
    patch_size: Annotated[int, Between(1, 4096)] = 14
    hidden_act: Activation = "quick_gelu"
    projection_dim: Width = 768
    concepts: Annotated[int, Between(1, 10_000)] = 17
    special_care: Annotated[int, Between(1, 10_000)] = 3
    resize: Annotated[int, Between(1, 4096)] = 224  # pixels of the picture's shorter side, before the square is cut out
    rescale: Positive = 1 / 255  # from 8-bit values
    mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)  # RGB, after rescaling
    std: tuple[Positive, Positive, Positive] = (0.26862954, 0.26130258, 0.27577711)

    def check(self) -> None:
        _divided("num_attention_heads", self.num_attention_heads, "hidden_size", [self.hidden_size])
        if not self.patch_size <= self.image_size <= self.resize:
            raise ValueError(
                f"patch_size is {self.patch_size}, image_size {self.image_size}, resize {self.resize}; "
                "none may be greater than the next"
            )


@dataclass(frozen=True)
class ControlConfig(_Config):
    """A ControlNet: a copy of a UNet's way down and middle, and the convolutions that a picture comes in through."""

    name: Annotated[str, OneOf("sd1", "sdxl")] = "sd1"  # of the models that it is for
    unet: UNetConfig = field(default_factory=UNetConfig)
    picture_channels: Channels = 3
    hint_channels: Annotated[tuple[Annotated[int, Between(1, 4096)], ...], Items(1, 8)] = (16, 32, 96, 256)

    @property
    def downscale(self) -> int:
        """Pixels of the picture that a latent stands for along each side."""
        return 2 ** (len(self.hint_channels) - 1)

    def misfit(self, model: ModelConfig) -> str:
        """Why this is no ControlNet for a model; empty where it is one."""
        for what in ("block_out_channels", "layers_per_block", "context_dim", "vector_dim"):
            own, wanted = getattr(self.unet, what), getattr(model.unet, what)
            if own != wanted:
                shown = [list(x) if isinstance(x, tuple) else x for x in (own, wanted)]
                return f"its {what} is {shown[0]}, the model's {shown[1]}"
        if (self.unet.in_channels, self.downscale) != (model.vae.latent_channels, model.vae.downscale):
            return f"it takes {self.unet.in_channels} channels and shrinks pictures by {self.downscale}"
        return ""


@dataclass(frozen=True)
class ModelConfig(_Config):
    """A whole text-to-image model."""

    name: Annotated[str, OneOf("sd1", "sdxl")] = "sd1"  # general.architecture
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: Annotated[tuple[TextConfig, ...], Items(1, 2)] = (TextConfig(),)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    defaults: Defaults = field(default_factory=Defaults)
    zero_empty_negative: bool = False  # an empty negative prompt is all zeros, not an encoded empty text (SDXL)
    safety: SafetyConfig | None = None  # of the safety checker in the file, if there is one

    def check(self) -> None:
        unet, latents, texts = self.unet, self.vae.latent_channels, self.text
        if unet.in_channels not in (latents, 2 * latents + 1) or unet.out_channels != latents:
            raise ValueError(
                f"unet.in_channels is {unet.in_channels}, out_channels {unet.out_channels}; they take {latents} and "
                f"{latents}, vae.latent_channels, or {2 * latents + 1} in for inpainting"
            )
        if unet.context_dim != (width := sum(text.hidden_size for text in texts)):
            raise ValueError(
                f"unet.context_dim is {unet.context_dim}; it takes the text encoders' hidden_size, {width}"
            )
        if len(texts) != (encoders := 2 if self.name == "sdxl" else 1):
            raise ValueError(f"text has {len(texts)} items; {self.name} takes {encoders}")
        if unet.vector_dim != (vector := texts[1].projection_dim + SIZE_IDS if len(texts) == 2 else 0):
            raise ValueError(f"unet.vector_dim is {unet.vector_dim}; this model takes {vector}")


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
