"""Image-to-image and inpainting against diffusers, and the handling of pictures and masks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from gguf_sd import Pipeline
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import open_image, resized, to_rgb
from gguf_sd.imaging.masks import pasted, to_mask
from gguf_sd.quality import psnr
from gguf_sd.request import Request
from gguf_sd.runtime.memory import DTYPES

PROMPT, NEGATIVE = "a red cat", "blurry"
SIZE = (64, 48)
INPAINT = {"in_channels": 9}


def picture() -> Image.Image:
    """Smooth colours with one hard edge."""
    rows, columns = np.mgrid[0 : SIZE[1], 0 : SIZE[0]]
    pixels = np.stack([rows * 5, columns * 4, (columns > 30) * 200], axis=-1)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def hole() -> Image.Image:
    mask = Image.new("L", SIZE)
    mask.paste(255, (16, 8, 48, 40))
    return mask


def paint_with(
    folder: Path, task: str, seeds: list[int], dtype: torch.dtype = torch.float32, **settings: Any
) -> list[Image.Image]:
    """diffusers' pictures, its weights rounded to F16 as they are in the file."""
    pipeline = getattr(diffusers, f"AutoPipelineFor{task}").from_pretrained(folder)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        for parameter in module.parameters() if module is not None else ():
            if parameter.dim() > 1:
                parameter.data = parameter.data.half().float()
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(dtype)
    prompts = {"prompt": [PROMPT] * len(seeds), "image": [picture()] * len(seeds)}
    if settings["guidance_scale"] > 1:
        prompts["negative_prompt"] = [NEGATIVE] * len(seeds)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(**prompts, generator=generators, **settings).images


@pytest.fixture(scope="module")
def engine(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A function from the fields of a tiny pipeline to its folder and our pipeline, converted to F16."""
    from gguf_sd_convert.convert import ConvertOptions, convert

    def make(**fields: Any) -> tuple[Path, Pipeline]:
        folder = tiny_pipeline(**fields)
        path = tmp_path_factory.mktemp("f16") / "model.gguf"
        convert(folder, path, ConvertOptions(type="f16"))
        return folder, Pipeline.load(path, device="cpu", dtype="float32")

    return make


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "DDIMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("strength", [0.3, 0.75, 1.0])
def test_image_to_image(engine: Callable[..., Any], scheduler: str, strength: float) -> None:
    config = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    folder, pipeline = engine(scheduler=scheduler, scheduler_config=config)
    settings = {"strength": strength, "num_inference_steps": 6, "guidance_scale": 4.0}
    expected = paint_with(folder, "Image2Image", [5, 6], **settings)
    ours = {"steps": 6, "guidance": 4.0, "width": SIZE[0], "height": SIZE[1], "strength": strength}
    got = pipeline(PROMPT, negative_prompt=NEGATIVE, image=picture(), seed=5, count=2, batch=2, **ours)
    assert min(psnr(g, e) for g, e in zip(got, expected, strict=True)) >= 45


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 45), ("bfloat16", 35)])
@pytest.mark.parametrize(("steps", "strength"), [(1, 1.0), (2, 0.5), (4, 0.5)])
def test_turbo_image_to_image(
    engine: Callable[..., Any], steps: int, strength: float, dtype: str, bound: float
) -> None:
    if dtype == "bfloat16" and tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 38):
        pytest.skip("older diffusers round more in bfloat16")
    config = {"timestep_spacing": "trailing"}
    folder, pipeline = engine(xl=True, scheduler="EulerAncestralDiscreteScheduler", scheduler_config=config)
    settings = {"strength": strength, "num_inference_steps": steps, "guidance_scale": 0.0}
    expected = paint_with(folder, "Image2Image", [5], DTYPES[dtype], **settings)
    ours = {"steps": steps, "guidance": 0.0, "width": SIZE[0], "height": SIZE[1], "strength": strength}
    pipeline = Pipeline.load(pipeline.model.path, device="cpu", dtype=dtype)
    assert psnr(pipeline(PROMPT, image=picture(), seed=5, **ours)[0], expected[0]) >= bound


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_checkpoint(engine: Callable[..., Any], scheduler: str, strength: float) -> None:
    folder, pipeline = engine(unet=INPAINT, scheduler=scheduler)
    check_inpainting(folder, pipeline, strength)


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"])
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpainting_with_a_plain_checkpoint(engine: Callable[..., Any], scheduler: str, strength: float) -> None:
    config = {"clip_sample": False} if scheduler == "DDIMScheduler" else {}
    folder, pipeline = engine(scheduler=scheduler, scheduler_config=config)
    check_inpainting(folder, pipeline, strength)


def check_inpainting(folder: Path, pipeline: Pipeline, strength: float) -> None:
    settings = {"strength": strength, "num_inference_steps": 5, "guidance_scale": 4.0, "mask_image": [hole()] * 2}
    expected = paint_with(folder, "Inpainting", [5, 6], height=SIZE[1], width=SIZE[0], **settings)
    ours = {"steps": 5, "guidance": 4.0, "width": SIZE[0], "height": SIZE[1], "strength": strength, "paste": False}
    ours |= {"image": picture(), "mask": hole(), "seed": 5, "count": 2, "batch": 2, "negative_prompt": NEGATIVE}
    got = pipeline(PROMPT, **ours)
    assert min(psnr(g, e) for g, e in zip(got, expected, strict=True)) >= 45
    assert psnr(got[0], pipeline(PROMPT, **(ours | {"mask": Image.new("L", SIZE, 255)}))[0]) < 40


@pytest.mark.parametrize("fields", [{}, {"unet": INPAINT}], ids=["plain", "inpainting"])
def test_sixteen_bits(engine: Callable[..., Any], fields: dict[str, Any]) -> None:
    folder, pipeline = engine(scheduler="EulerDiscreteScheduler", **fields)
    pipeline = Pipeline.load(pipeline.model.path, device="cpu", dtype="bfloat16")
    ours = {"steps": 4, "guidance": 3.0, "width": SIZE[0], "height": SIZE[1], "strength": 0.6, "paste": False}
    ours |= {"image": picture(), "seed": 5, "negative_prompt": NEGATIVE}
    settings = {"strength": 0.6, "num_inference_steps": 4, "guidance_scale": 3.0}
    theirs = {**settings, "mask_image": [hole()], "height": SIZE[1], "width": SIZE[0]}
    expected = paint_with(folder, "Inpainting", [5], torch.bfloat16, **theirs)
    assert psnr(pipeline(PROMPT, mask=hole(), **ours)[0], expected[0]) >= 35
    if not fields:
        expected = paint_with(folder, "Image2Image", [5], torch.bfloat16, **settings)
        assert psnr(pipeline(PROMPT, **ours)[0], expected[0]) >= 35


def test_unmasked_pixels_are_the_pictures_own(engine: Callable[..., Any]) -> None:
    _, pipeline = engine()
    settings = {"steps": 2, "width": SIZE[0], "height": SIZE[1], "seed": 1, "image": picture(), "mask": hole()}
    painted = np.asarray(pipeline(PROMPT, **settings)[0])
    outside = np.asarray(hole()) == 0
    assert np.array_equal(painted[outside], np.asarray(picture())[outside])
    assert not np.array_equal(painted[~outside], np.asarray(picture())[~outside])


def test_an_inpainting_checkpoint_paints_without_a_picture(engine: Callable[..., Any]) -> None:
    _, pipeline = engine(unet=INPAINT)
    settings = {"steps": 2, "width": 32, "height": 32, "seed": 1}
    assert pipeline(PROMPT, **settings)[0].size == (32, 32)
    assert pipeline(PROMPT, image=picture(), strength=0.5, **settings)[0].size == (32, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"image": picture(), "strength": 0.1, "steps": 5}, "runs no step at all; take a strength of at least 0.2, or"),
        ({"image": picture(), "strength": 0.1, "steps": 5}, "at least 10 steps"),
        ({"image": picture(), "strength": 1.5}, "strength must lie above 0 and at most at 1, got 1.5"),
        ({"mask": hole()}, "a mask needs a picture"),
        ({"image": picture(), "resize": "squash"}, "unknown resize mode 'squash'; choose from crop, fit, stretch"),
        ({"image": picture(), "mask_blur": -1}, "mask blur must lie in"),
    ],
)
def test_bad_settings(engine: Callable[..., Any], settings: dict[str, Any], message: str) -> None:
    _, pipeline = engine()
    with pytest.raises(GgufSdError, match=message):
        pipeline.prepare(Request(PROMPT, **({"width": 64, "height": 48} | settings)))


def test_pictures_are_turned_and_flattened(tmp_path: Path) -> None:
    turned = Image.new("RGB", (4, 2), "red")
    exif = turned.getexif()
    exif[0x0112] = 6  # the camera was held upright
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (2, 4)
    clear = Image.new("RGBA", (2, 1), (255, 0, 0, 0))
    clear.putpixel((1, 0), (0, 0, 255, 255))
    assert [to_rgb(clear).getpixel((x, 0)) for x in (0, 1)] == [(255, 255, 255), (0, 0, 255)]
    assert [to_mask(clear).getpixel((x, 0)) for x in (0, 1)] == [255, 0]
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(GgufSdError, match="cannot read the picture"):
        open_image(tmp_path / "text.png")
    with pytest.raises(GgufSdError, match=r"none\.png does not exist"):
        open_image(tmp_path / "none.png")


def test_resizing() -> None:
    wide = Image.new("RGB", (100, 50), "white")
    wide.paste("red", (0, 0, 10, 50))
    assert resized(wide, 40, 40, "crop").getpixel((0, 20)) == (255, 255, 255)
    assert resized(wide, 40, 40, "stretch").getpixel((1, 20))[1] < 10  # type: ignore[index]
    fit = resized(wide, 40, 40, "fit")
    assert fit.size == (40, 40)
    assert fit.getpixel((1, 0))[1] < 10  # type: ignore[index]


def test_the_masks_edge_is_soft_inwards() -> None:
    black, white, mask = Image.new("RGB", SIZE), Image.new("RGB", SIZE, "white"), hole()
    soft = np.asarray(pasted(white, black, mask, 4))[..., 0]
    inside = np.asarray(mask) > 0
    assert soft[~inside].max() == 0
    assert soft[24, 32] == 255
    assert 0 < soft[24, 18] < 255
    hard = np.asarray(pasted(white, black, mask, 0))[..., 0]
    assert np.array_equal(hard > 0, inside)
