"""Whole pictures against diffusers: the same weights (as gguf-py reads them), prompt, seed and settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch

from gguf_sd import Pipeline
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.tensor_names import UNET, inverted, rename, unet_modules
from gguf_sd.errors import GgufSdError
from gguf_sd.request import Request
from gguf_sd.runtime.memory import DTYPES
from gguf_sd.runtime.plan import Planner
from gguf_sd_convert.convert import ConvertOptions, convert

PROMPT, NEGATIVE = "a red cat beside a dog", "blurry"


def psnr(got: Any, expected: Any) -> float:
    """Peak signal-to-noise ratio of 8-bit pictures, dB."""
    error = np.mean((np.asarray(got, np.float64) - np.asarray(expected, np.float64)) ** 2)
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A function from a folder and options to the converted file, each made once."""
    made: dict[tuple[Path, ConvertOptions], Path] = {}

    def make(folder: Path, **options: Any) -> Path:
        key = (folder, ConvertOptions(**options))
        if key not in made:
            made[key] = tmp_path_factory.mktemp("gguf") / "model.gguf"
            convert(folder, made[key], key[1])
        return made[key]

    return make


def stored_unet(path: Path) -> dict[str, torch.Tensor]:
    """The UNet's tensors as gguf-py decodes them, in their logical shape, float32, under diffusers' names."""
    model = ModelFile.open(path)
    names = inverted(unet_modules(model.config.unet))
    values = {}
    for tensor in gguf.GGUFReader(path).tensors:
        if not tensor.name.startswith(UNET):
            continue
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        shape = model.file.shape(tensor.name)
        if len(shape) == 4 and model.file.metadata["gguf_sd.layout"] == "native" and value.dim() == 2:
            out, channels, kh, kw = shape
            value = value.view(out, kh, kw, channels).permute(0, 3, 1, 2).contiguous()
        values[str(rename(tensor.name.removeprefix(UNET), names))] = value.view(shape)
    return values


def oracle(folder: Path, path: Path, dtype: torch.dtype = torch.float32) -> Any:
    """diffusers' pipeline with the weights of the GGUF file: its UNet, and all else rounded to F16 as there."""
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder)
    state, own = stored_unet(path), pipeline.unet.state_dict()
    pipeline.unet.load_state_dict({name: value.view(own[name].shape) for name, value in state.items()}, strict=True)
    for part in ("vae", "text_encoder", "text_encoder_2"):
        module = getattr(pipeline, part, None)
        for parameter in module.parameters() if module is not None else ():
            if parameter.dim() > 1:
                parameter.data = parameter.data.half().float()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(dtype)


def paint_with(pipeline: Any, seeds: list[int], negative: str | None = NEGATIVE, **settings: Any) -> list[Any]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return pipeline(
        [PROMPT] * len(seeds),
        negative_prompt=None if negative is None else [negative] * len(seeds),
        generator=generators,
        num_inference_steps=settings["steps"],
        guidance_scale=settings["guidance"],
        width=settings["width"],
        height=settings["height"],
    ).images


SETTINGS = {"steps": 4, "guidance": 5.0, "width": 64, "height": 88}


@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_1", "q4_0"])
@pytest.mark.parametrize("layout", ["native", "comfy", "linear"])
def test_pictures_equal_diffusers(
    tiny_pipeline: Callable[..., Path], converted: Callable[..., Path], kind: str, layout: str
) -> None:
    folder = tiny_pipeline()
    path = converted(folder, type=kind, layout=layout)
    expected = paint_with(oracle(folder, path), [7, 8], **SETTINGS)
    pipeline = Pipeline.load(path, device="cpu", dtype="float32")
    got = pipeline(PROMPT, negative_prompt=NEGATIVE, seed=7, count=2, batch=2, **SETTINGS)
    assert min(psnr(g, e) for g, e in zip(got, expected, strict=True)) >= 45
    assert psnr(got[0], expected[1]) < 30, "the seed makes no difference: the comparison is blind"


@pytest.mark.parametrize(
    ("scheduler", "config"),
    [
        ("PNDMScheduler", {}),
        ("DDIMScheduler", {"clip_sample": False}),
        ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
        ("EulerAncestralDiscreteScheduler", {}),
        ("HeunDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("LCMScheduler", {}),
    ],
)
def test_each_scheduler_by_the_files_default(
    tiny_pipeline: Callable[..., Path], converted: Callable[..., Path], scheduler: str, config: dict[str, Any]
) -> None:
    folder = tiny_pipeline(scheduler=scheduler, scheduler_config=config)
    path = converted(folder, type="q8_0")
    settings = SETTINGS | {"steps": 5}
    expected = paint_with(oracle(folder, path), [3], **settings)
    got = Pipeline.load(path, device="cpu", dtype="float32")(PROMPT, negative_prompt=NEGATIVE, seed=3, **settings)
    assert psnr(got[0], expected[0]) >= 45


@pytest.mark.parametrize(("kind", "layout"), [("f16", "native"), ("q4_0", "native"), ("q4_0", "comfy")])
@pytest.mark.parametrize("negative", [NEGATIVE, "", None])
def test_sdxl(
    tiny_pipeline: Callable[..., Path], converted: Callable[..., Path], kind: str, layout: str, negative: str | None
) -> None:
    """Two text encoders, pooled text and sizes; an absent negative prompt is all zeros, an empty one is not."""
    folder = tiny_pipeline(xl=True, scheduler="EulerDiscreteScheduler")
    path = converted(folder, type=kind, layout=layout)
    expected = paint_with(oracle(folder, path), [7, 8], negative=negative, **SETTINGS)
    pipeline = Pipeline.load(path, device="cpu", dtype="float32")
    got = pipeline(PROMPT, negative_prompt=negative, seed=7, count=2, batch=2, **SETTINGS)
    assert min(psnr(g, e) for g, e in zip(got, expected, strict=True)) >= 45
    assert psnr(got[0], expected[1]) < 30


def test_sdxl_sizes_and_crops(tiny_pipeline: Callable[..., Path], converted: Callable[..., Path]) -> None:
    folder = tiny_pipeline(xl=True, scheduler="EulerDiscreteScheduler")
    path = converted(folder, type="f16", layout="native")
    theirs = {"original_size": (300, 200), "crops_coords_top_left": (16, 32)}  # height, width; top, left
    expected = oracle(folder, path)(
        PROMPT,
        generator=torch.Generator().manual_seed(7),
        num_inference_steps=3,
        guidance_scale=0.0,
        width=64,
        height=88,
        **theirs,
    ).images[0]
    settings = {"steps": 3, "guidance": 0.0, "width": 64, "height": 88, "seed": 7}
    pipeline = Pipeline.load(path, device="cpu", dtype="float32")
    assert psnr(pipeline(PROMPT, original_size=(200, 300), crop=(32, 16), **settings)[0], expected) >= 45
    assert psnr(pipeline(PROMPT, **settings)[0], expected) < 45


def test_sdxl_decodes_beyond_float16s_range(tiny_pipeline: Callable[..., Path], converted: Callable[..., Path]) -> None:
    path = converted(tiny_pipeline(xl=True, scheduler="EulerDiscreteScheduler"), type="f16", layout="native")
    assert Pipeline.load(path, device="cpu", dtype="float16").vae_dtype in (torch.bfloat16, torch.float32)
    plain = converted(tiny_pipeline(), type="q8_0")
    assert Pipeline.load(plain, device="cpu", dtype="float16").vae_dtype == torch.float16


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 45), ("bfloat16", 35)])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_sdxl_turbo(
    tiny_pipeline: Callable[..., Path], converted: Callable[..., Path], steps: int, dtype: str, bound: float
) -> None:
    config = {"timestep_spacing": "trailing"}
    folder = tiny_pipeline(xl=True, scheduler="EulerAncestralDiscreteScheduler", scheduler_config=config)
    path = converted(folder, type="q8_0")
    settings = SETTINGS | {"steps": steps, "guidance": 0.0}
    expected = paint_with(oracle(folder, path, DTYPES[dtype]), [3], negative=None, **settings)
    assert psnr(Pipeline.load(path, device="cpu", dtype=dtype)(PROMPT, seed=3, **settings)[0], expected[0]) >= bound


@pytest.mark.parametrize("weights", ["quantized", "resident"])
@pytest.mark.parametrize("fields", [{}, {"xl": True, "scheduler": "EulerDiscreteScheduler"}], ids=["sd1", "sdxl"])
def test_sixteen_bits(
    tiny_pipeline: Callable[..., Path], converted: Callable[..., Path], weights: str, fields: dict[str, Any]
) -> None:
    folder = tiny_pipeline(**fields)
    path = converted(folder, type="q4_0")
    expected = paint_with(oracle(folder, path, torch.bfloat16), [7], **SETTINGS)
    pipeline = Pipeline.load(path, device="cpu", dtype="bfloat16", weights=weights)
    got = pipeline(PROMPT, negative_prompt=NEGATIVE, seed=7, **SETTINGS)
    assert psnr(got[0], expected[0]) >= 35


@pytest.mark.parametrize("changes", [{"guidance": 1.0}, {"width": 40, "height": 136}, {"width": 8, "height": 8}])
def test_without_guidance_and_at_odd_sizes(
    tiny_pipeline: Callable[..., Path], converted: Callable[..., Path], changes: dict[str, Any]
) -> None:
    folder = tiny_pipeline()
    path = converted(folder, type="q8_0")
    settings = SETTINGS | changes
    expected = paint_with(oracle(folder, path), [1], **settings)
    got = Pipeline.load(path, device="cpu", dtype="float32")(PROMPT, negative_prompt=NEGATIVE, seed=1, **settings)
    assert got[0].size == (settings["width"], settings["height"])
    assert psnr(got[0], expected[0]) >= 45


def test_one_pass_or_two_give_the_same_guidance(
    tiny_pipeline: Callable[..., Path], converted: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = converted(tiny_pipeline(), type="q8_0")
    settings = SETTINGS | {"seed": 5, "negative_prompt": NEGATIVE}
    roomy = Pipeline.load(path, device="cpu", dtype="float32")
    job = roomy.prepare(Request(PROMPT, **settings))
    assert roomy.memory_plan(job).batch_guidance
    monkeypatch.setattr(Planner, "plan", lambda self, budget: replace(self.smallest, batch_guidance=False))
    tight = Pipeline.load(path, device="cpu", dtype="float32")
    plan = tight.memory_plan(job)
    assert (plan.keep, plan.batch_guidance) == (frozenset(), False)
    assert psnr(roomy(PROMPT, **settings)[0], tight(PROMPT, **settings)[0]) >= 60


def test_batches_do_not_change_pictures(tiny_pipeline: Callable[..., Path], converted: Callable[..., Path]) -> None:
    pipeline = Pipeline.load(converted(tiny_pipeline(), type="q8_0"), device="cpu", dtype="float32")
    settings = SETTINGS | {"sampler": "euler_a", "steps": 3}
    together = pipeline(PROMPT, seed=11, count=3, batch=2, **settings)
    alone = [pipeline(PROMPT, seed=11 + i, **settings)[0] for i in range(3)]
    assert min(psnr(a, b) for a, b in zip(together, alone, strict=True)) >= 60


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 100}, "width 100 is no multiple of 8; the nearest are 96 and 104"),
        ({"height": 0}, "height 0 is no multiple of 8"),
        ({"sampler": "dpmp_2m"}, "unknown sampler 'dpmp_2m'; did you mean dpmpp_2m"),
        ({"sampler": "lcm", "schedule": "karras"}, "sampler 'lcm' has no schedule 'karras'"),
        ({"steps": 0}, "steps"),
        ({"seed": -2}, "seed must lie in"),
        ({"count": 0}, "count must be at least 1"),
        ({"guidance": -3.0}, "guidance must lie in"),
    ],
)
def test_bad_settings(
    tiny_pipeline: Callable[..., Path], converted: Callable[..., Path], settings: dict[str, Any], message: str
) -> None:
    pipeline = Pipeline.load(converted(tiny_pipeline(), type="q8_0"), device="cpu", dtype="float32")
    with pytest.raises(GgufSdError, match=message):
        pipeline.prepare(Request(PROMPT, **settings))


def test_latents_that_are_not_finite_are_an_error(
    tiny_pipeline: Callable[..., Path], converted: Callable[..., Path]
) -> None:
    pipeline = Pipeline.load(converted(tiny_pipeline(), type="q8_0"), device="cpu", dtype="float32")
    latents = torch.zeros(1, 4, 8, 8)
    latents[0, 0, 0, 0] = float("nan")
    with pytest.raises(GgufSdError, match="not finite"):
        pipeline.decode(latents)


def test_long_and_empty_prompts(tiny_pipeline: Callable[..., Path], converted: Callable[..., Path]) -> None:
    pipeline = Pipeline.load(converted(tiny_pipeline(), type="q8_0"), device="cpu", dtype="float32")
    settings = {"steps": 1, "width": 32, "height": 32, "seed": 0}
    pictures = [pipeline(p, **settings)[0].tobytes() for p in ("", "cat " * 150, "cat " * 75 + "dog " * 75)]
    assert len(set(pictures)) == 3
