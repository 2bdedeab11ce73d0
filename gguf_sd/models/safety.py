"""The safety checker: which pictures come too close to a list of concepts that their model's makers wish not to show.

A CLIP vision transformer (transformers') embeds the picture; its cosine similarity with 17 concepts is held against a
threshold for each. Three further concepts, of special care, lower all thresholds a little when one of them is found.
The concepts are published as embeddings only; Rando et al. 2022 (arXiv:2210.04610) describe the rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor, nn

from gguf_sd.checkpoint.assign import Deferred, Source, assign
from gguf_sd.config import SafetyConfig
from gguf_sd.errors import GgufSdError

ADJUSTMENT = 0.01  # added to every concept's score where special care is called for
DECIMALS = 3  # scores are rounded so before they are compared with zero
BLUR = 1 / 10  # standard deviation of the blur, of the picture's longer side
VISION = "vision_model."


class Concepts(nn.Module):
    """Embeddings [n, projection_dim] and thresholds [n] (``_weights``), under the checkpoint's names."""

    def __init__(self, config: SafetyConfig):
        super().__init__()
        self.concept_embeds = nn.Parameter(torch.empty(config.concepts, config.projection_dim))
        self.concept_embeds_weights = nn.Parameter(torch.empty(config.concepts))
        self.special_care_embeds = nn.Parameter(torch.empty(config.special_care, config.projection_dim))
        self.special_care_embeds_weights = nn.Parameter(torch.empty(config.special_care))

    def flagged(self, embeddings: Tensor) -> Tensor:
        """Picture embeddings [B, projection_dim], float32 -> bool [B]."""
        special = _similarity(embeddings, self.special_care_embeds) - self.special_care_embeds_weights
        care = (special.round(decimals=DECIMALS) > 0).any(dim=1, keepdim=True)
        scores = _similarity(embeddings, self.concept_embeds) - self.concept_embeds_weights + ADJUSTMENT * care
        return (scores.round(decimals=DECIMALS) > 0).any(dim=1)


class SafetyChecker(nn.Module):
    """Finished pictures to yes or no. The vision transformer computes in the dtype it was loaded in, the decision is
    made in float32."""

    def __init__(self, config: SafetyConfig):
        # Here, as importing it takes longer than starting to paint: few models carry a checker.
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

        super().__init__()
        self.config = config
        self.vision = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=config.hidden_size,
                intermediate_size=config.intermediate_size,
                num_hidden_layers=config.num_hidden_layers,
                num_attention_heads=config.num_attention_heads,
                image_size=config.image_size,
                patch_size=config.patch_size,
                hidden_act=config.hidden_act,
                projection_dim=config.projection_dim,
                attn_implementation="sdpa",
            )
        )
        self.concepts = Concepts(config)

    @classmethod
    def load(
        cls,
        config: SafetyConfig,
        tensors: Mapping[str, Source],
        dtype: torch.dtype,
        where: str,
        deferred: dict[str, Deferred] | None = None,
    ) -> SafetyChecker:
        """Builds the checker from tensors named as in diffusers' checkpoints, by transformers 4 or 5; ``where`` names
        the file in errors. ``deferred``: see :func:`gguf_sd.checkpoint.assign.assign`. Raises GgufSdError for missing,
        unknown and wrongly shaped tensors."""
        with torch.device("meta"):
            checker = cls(config)
        own = {name for name, _ in checker.concepts.named_parameters()}
        # transformers 4 puts one more vision_model. in front of the transformer than 5 does.
        tower = {name.replace(VISION * 2, VISION, 1): source for name, source in tensors.items() if name not in own}
        later: dict[str, Deferred] | None = None if deferred is None else {}
        assign(checker.vision, tower, dtype, where, keep_quantized=False, deferred=later)
        if deferred is not None and later is not None:
            deferred.update({f"vision.{name}": weight for name, weight in later.items()})
        concepts = {name: source for name, source in tensors.items() if name in own}
        assign(checker.concepts, concepts, torch.float32, where, keep_quantized=False)
        for name, buffer in list(checker.vision.named_buffers()):
            owner, _, leaf = name.rpartition(".")
            if leaf != "position_ids":
                raise RuntimeError(f"transformers' CLIP has a buffer {name} that is not known here")
            setattr(checker.vision.get_submodule(owner), leaf, torch.arange(buffer.shape[-1])[None])
        return checker.eval()

    def flagged(self, images: Sequence[Image.Image]) -> list[bool]:
        """Whether each picture, of any size, is one that should not be shown. Raises GgufSdError where the answer is
        no number: such a picture must not pass."""
        embeddings = self.embed(images)
        if not embeddings.isfinite().all():
            raise GgufSdError("the safety checker produced values that are not finite; try --dtype float32 or bfloat16")
        with torch.inference_mode():
            return [bool(flag) for flag in self.concepts.flagged(embeddings).cpu()]

    @torch.inference_mode()
    def embed(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures -> float32 [B, projection_dim], not normalised."""
        weight = self.vision.visual_projection.weight
        # One at a time: several at once gain little at this size, and memory stays what it is.
        pixels = [preprocessed(image, self.config)[None].to(weight) for image in images]
        embeddings = [self.vision(pixel_values=picture).image_embeds.float() for picture in pixels]
        return torch.cat(embeddings) if embeddings else weight.new_empty(0, self.config.projection_dim).float()


def preprocessed(image: Image.Image, config: SafetyConfig) -> Tensor:
    """What the vision transformer sees: the middle of the picture, float32 [3, image_size, image_size], normalised.

    As CLIP's image processor does it: the shorter side is brought to ``config.resize`` pixels (bicubic, 8 bits), a
    square cut out of the middle, values scaled, mean subtracted, divided by standard deviation.
    """
    width, height = (config.resize * side // min(image.size) for side in image.size)
    left, top = (width - config.image_size) // 2, (height - config.image_size) // 2
    small = image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    square = small.crop((left, top, left + config.image_size, top + config.image_size))
    values = torch.from_numpy(np.array(square, dtype=np.float32)) * config.rescale
    return ((values - torch.tensor(config.mean)) / torch.tensor(config.std)).permute(2, 0, 1)


def blurred(image: Image.Image) -> Image.Image:
    """The picture with nothing left but its colours, at the same size."""
    return image.filter(ImageFilter.GaussianBlur(BLUR * max(image.size)))


def _similarity(a: Tensor, b: Tensor) -> Tensor:
    """Cosine similarity of every row of ``a`` [B, d] with every row of ``b`` [n, d]: [B, n]."""
    return nn.functional.normalize(a) @ nn.functional.normalize(b).T
