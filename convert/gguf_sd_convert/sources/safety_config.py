"""The safety checker of a diffusers folder -> SafetyConfig."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf_sd.config import SafetyConfig
from gguf_sd.field_checks import shown
from gguf_sd_convert.sources.json_settings import check_fixed, integer, read_json, refusal

KIND = "StableDiffusionSafetyChecker"
FOLDER = "safety_checker"
VISION_FIXED: dict[str, tuple[Any, ...]] = {"num_channels": (3,), "layer_norm_eps": (1e-5,)}
PROCESSOR_FIXED: dict[str, tuple[Any, ...]] = {
    "do_resize": (True,),
    "do_center_crop": (True,),
    "do_rescale": (True,),
    "do_normalize": (True,),
    "do_convert_rgb": (True, None),
    "resample": (3,),  # Pillow's number of bicubic
}


def safety_config(folder: Path) -> tuple[SafetyConfig | None, list[str]]:
    """The safety checker that a diffusers folder carries, None where it has none, and notes for the report.

    A model is whole without its checker, so one that is announced but not there, or not of diffusers' class, is noted;
    one with settings that the engine does not have is refused (GgufSdError).
    """
    index = read_json(folder / "model_index.json")
    entry = index.get(FOLDER)
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] is None:
        return None, []
    if entry[1] != KIND:
        kind = entry[1] if isinstance(entry[1], str) else shown(entry[1])
        return None, [f"its safety checker is a {kind}, not a {KIND}, and was left out"]
    if not any((folder / FOLDER).glob("model*.safetensors*")):
        return None, [f"its safety checker has no weights in {folder / FOLDER} (model.safetensors) and was left out"]
    values = read_json(folder / FOLDER / "config.json")
    vision = _vision(values)
    check_fixed(vision, VISION_FIXED)
    if (act := vision.get("hidden_act", "quick_gelu")) not in ("quick_gelu", "gelu"):
        raise refusal(vision, "hidden_act", "'quick_gelu' or 'gelu'")
    patch, image = integer(vision, "patch_size", 32), integer(vision, "image_size", 224)
    if image < patch:
        raise refusal(vision, "image_size", f"at least patch_size, {patch}")
    hidden, heads = integer(vision, "hidden_size", 768), integer(vision, "num_attention_heads", 12)
    if hidden % heads:
        raise refusal(vision, "num_attention_heads", f"a number that divides hidden_size, {hidden}")
    processor, notes = _processor(folder / "feature_extractor" / "preprocessor_config.json", image)
    return SafetyConfig(
        hidden_size=hidden,
        intermediate_size=integer(vision, "intermediate_size", 3072),
        num_hidden_layers=integer(vision, "num_hidden_layers", 12),
        num_attention_heads=heads,
        image_size=image,
        patch_size=patch,
        hidden_act=act,
        projection_dim=integer(values, "projection_dim", 512),
        **processor,
    ), notes


def _vision(values: dict[str, Any]) -> dict[str, Any]:
    """The settings of the vision transformer; early files repeat what matters under ``vision_config_dict``."""
    parts = [values.get(key) or {} for key in ("vision_config", "vision_config_dict")]
    for key, part in zip(("vision_config", "vision_config_dict"), parts, strict=True):
        if not isinstance(part, dict):
            raise refusal(values, key, "a JSON object")
    return {**parts[0], **parts[1], "_path": values["_path"]}


def _processor(path: Path, image_size: int) -> tuple[dict[str, Any], list[str]]:
    """SafetyConfig's fields on preparing pictures, as CLIPImageProcessor's JSON has them."""
    if not path.is_file():
        return {"resize": image_size}, [f"there is no {path}; the safety checker sees pictures prepared as CLIP's are"]
    values = read_json(path)
    check_fixed(values, PROCESSOR_FIXED)
    size, crop = values.get("size", 224), values.get("crop_size", 224)
    resize = size.get("shortest_edge") if isinstance(size, dict) and len(size) == 1 else size
    if type(resize) is not int or resize < image_size:
        raise refusal(values, "size", f"a shortest_edge of {image_size} or more, the vision model's image_size")
    if crop not in (image_size, {"height": image_size, "width": image_size}):
        raise refusal(values, "crop_size", f"{image_size}, the vision model's image_size")
    rescale = values.get("rescale_factor", SafetyConfig.rescale)
    if not _positive(rescale):
        raise refusal(values, "rescale_factor", "a positive number")
    mean, std = (values.get(f"image_{key}", list(getattr(SafetyConfig, key))) for key in ("mean", "std"))
    if not isinstance(mean, list) or len(mean) != 3 or not all(isinstance(x, int | float) for x in mean):
        raise refusal(values, "image_mean", "three numbers")
    if not isinstance(std, list) or len(std) != 3 or not all(map(_positive, std)):
        raise refusal(values, "image_std", "three positive numbers")
    return {"resize": resize, "rescale": rescale, "mean": tuple(mean), "std": tuple(std)}, []


def _positive(value: object) -> bool:
    return isinstance(value, int | float) and value > 0
