"""The fields of AUTOMATIC1111's txt2img and img2img, and what they are to us.

Fields that it has and we have not are taken at the values that clients send for "off", and refused at others: a
picture is never silently another than was asked for. Fields about files on the server's disk have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Annotated, Any

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import Between, Items, OneOf, checked_fields, shown
from gguf_sd.keywords import check_known

MAX_SIDE = Annotated[int, Between(1, 1 << 15)]
Count = Annotated[int, Between(1, 10_000)]
RESIZE = {0: "stretch", 1: "crop", 2: "fit"}
OFF = (None, "", False, 0, -1, "None", "none")  # of what is not there
# What each field that we do not have may be. None: anything, it has no effect here.
NOT_HERE: dict[str, tuple[Any, ...] | None] = {
    **dict.fromkeys(("enable_hr", "restore_faces", "tiling", "styles", "subseed_strength", "refiner_checkpoint"), OFF),
    **dict.fromkeys(("script_name", "alwayson_scripts", "firstpass_image", "latent_mask", "infotext"), OFF),
    **dict.fromkeys(("seed_resize_from_h", "seed_resize_from_w", "firstphase_width", "firstphase_height"), OFF),
    **dict.fromkeys(("s_churn", "s_tmin", "s_min_uncond", "disable_extra_networks", "include_init_images"), OFF),
    "s_noise": (*OFF, 1),
    "initial_noise_multiplier": (*OFF, 1),
    "mask_round": (*OFF, True),
    # Each sampler has its own eta; how a mask is filled and cropped matters to programs that paint from the fill.
    **dict.fromkeys(("eta", "s_tmax", "inpainting_fill", "inpaint_full_res", "inpaint_full_res_padding"), None),
    **dict.fromkeys(("subseed", "refiner_switch_at", "script_args", "image_cfg_scale", "comments"), None),
    **dict.fromkeys(("hr_scale", "hr_upscaler", "hr_second_pass_steps", "hr_resize_x", "hr_resize_y"), None),
    **dict.fromkeys(("hr_checkpoint_name", "hr_sampler_name", "hr_scheduler", "hr_prompt"), None),
    **dict.fromkeys(("hr_negative_prompt", "hr_additional_steps", "save_images", "do_not_save_samples"), None),
    **dict.fromkeys(("do_not_save_grid", "override_settings_restore_afterwards", "force_task_id", "user"), None),
}
OVERRIDES = {"sd_model_checkpoint", "CLIP_stop_at_last_layers"}
IGNORED_OVERRIDES = {"sd_vae", "samples_format", "eta_noise_seed_delta", "forge_additional_modules", "samples_save"}


@dataclass(frozen=True)
class Fields:
    """A request of either kind; None is the model's default. Names and meanings are AUTOMATIC1111's."""

    prompt: str | None = None
    negative_prompt: str | None = None
    seed: Annotated[int, Between(-1, 2**64 - 1)] | None = None
    sampler_name: str | None = None
    sampler_index: str | None = None
    scheduler: str | None = None
    batch_size: Count | None = None
    n_iter: Count | None = None
    steps: Annotated[int, Between(1, 10_000)] | None = None
    cfg_scale: Annotated[float, Between(0, 100)] | None = None
    width: MAX_SIDE | None = None
    height: MAX_SIDE | None = None
    clip_skip: Annotated[int, Between(0, 128)] | None = None
    denoising_strength: Annotated[float, Between(0, 1)] | None = None
    init_images: Annotated[tuple[str, ...], Items(0, 1)] | None = None
    mask: str | None = None
    mask_blur: Annotated[int, Between(0, 256)] | None = None
    mask_blur_x: Annotated[int, Between(0, 256)] | None = None
    mask_blur_y: Annotated[int, Between(0, 256)] | None = None
    inpainting_mask_invert: Annotated[int, OneOf(0, 1)] | None = None
    resize_mode: Annotated[int, OneOf(*RESIZE)] | None = None
    send_images: bool | None = None

    @property
    def count(self) -> int:
        return (self.batch_size or 1) * (self.n_iter or 1)


def read_fields(body: Mapping[str, Any]) -> tuple[Fields, dict[str, Any]]:
    """The fields of a request, and the settings that it overrides for itself. Raises GgufSdError for unknown fields,
    wrong types, values out of range, and what is asked for and not here."""
    values = dict(body)
    overrides = values.pop("override_settings", None) or {}
    known = [field.name for field in fields(Fields)]
    check_known(values, [*known, *NOT_HERE])
    for name in [name for name in values if name in NOT_HERE]:
        value, allowed = values.pop(name), NOT_HERE[name]
        if allowed is not None and value and value not in allowed:
            raise GgufSdError(f"{name} is {shown(value)}; this server does not have that, leave it out")
    try:
        request: Fields = checked_fields(Fields, values)
    except ValueError as error:
        raise GgufSdError(str(error)) from None
    return request, read_overrides(overrides)


def read_overrides(values: Any) -> dict[str, Any]:
    """Options that we know, of those given. Raises GgufSdError for unknown ones and wrong types."""
    if not isinstance(values, Mapping):
        raise GgufSdError(f"override_settings is {shown(values)}; it takes a JSON object")
    check_known(values, sorted(OVERRIDES | IGNORED_OVERRIDES))
    found = {name: value for name, value in values.items() if name in OVERRIDES and value is not None}
    if not isinstance(found.get("sd_model_checkpoint", ""), str):
        raise GgufSdError(f"sd_model_checkpoint is {shown(found['sd_model_checkpoint'])}; it takes a text")
    skip = found.get("CLIP_stop_at_last_layers", 1)
    if type(skip) is not int or not 1 <= skip <= 128:
        raise GgufSdError(f"CLIP_stop_at_last_layers is {shown(skip)}; it takes a whole number from 1 to 128")
    return found


def settings_of(fields: Fields, clip_skip: int | None) -> dict[str, Any]:
    """Keywords of :class:`gguf_sd.request.Request`, but for the pictures."""
    sampler = fields.sampler_name or fields.sampler_index
    settings = {
        "prompt": fields.prompt or "",
        "negative_prompt": fields.negative_prompt or "",
        "seed": fields.seed,
        "sampler": sampler,
        "schedule": _schedule(fields.scheduler, sampler),
        "steps": fields.steps,
        "guidance": fields.cfg_scale,
        "width": fields.width,
        "height": fields.height,
        "clip_skip": fields.clip_skip or clip_skip,
    }
    if fields.init_images:
        blurs = (fields.mask_blur, fields.mask_blur_x, fields.mask_blur_y)
        settings |= {
            "strength": 0.75 if fields.denoising_strength is None else fields.denoising_strength,
            "resize": RESIZE[fields.resize_mode or 0],
            "mask_blur": next((blur for blur in blurs if blur is not None), None) if fields.mask else None,
        }
    return settings


def _schedule(name: str | None, sampler: str | None) -> str | None:
    """``Automatic`` is what goes with the sampler, which AUTOMATIC1111 looks up too."""
    from gguf_sd.imaging.png_metadata import AUTOMATIC

    if name is None or not name.strip():
        return None
    return AUTOMATIC.get(sampler or "") if name.strip().lower() == "automatic" else name
