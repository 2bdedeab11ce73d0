"""Whole pictures of a model whose scheduler names no timestep spacing, as SD 1.5 is published.

They are compared with diffusers' pipeline with another scheduler put in by from_config, as its users do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from gguf_sd import Pipeline, Request
from gguf_sd.config import SD15, SDXL, SDXL_TURBO, SchedulerConfig
from gguf_sd.sampling import SAMPLERS, make_schedule
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.sources.diffusers_config import read_model_config
from tests.sampling.oracle import scheduler_class

pytestmark = pytest.mark.filterwarnings("ignore:__array_")  # of diffusers with NumPy 2

PUBLISHED = {  # of SD 1.5
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
SETTINGS = {"width": 64, "height": 64}


def psnr(got: Any, expected: Any) -> float:
    error = np.mean((np.asarray(got, np.float64) - np.asarray(expected, np.float64)) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Pipeline, Any]:
    """Ours and diffusers', with the same weights: both rounded to F16."""
    folder = shutil.copytree(tiny_pipeline(), tmp_path_factory.mktemp("unnamed") / "folder")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED))
    convert(folder, folder / "model.gguf", ConvertOptions(type="f16"))
    theirs = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    for part in (theirs.unet, theirs.vae, theirs.text_encoder):
        for parameter in part.parameters():
            if parameter.dim() > 1:
                parameter.data = parameter.data.half().float()
    theirs.set_progress_bar_config(disable=True)
    return Pipeline.load(folder / "model.gguf", device="cpu", dtype="float32"), theirs


IN_PIPELINES = [s for s, info in SAMPLERS.items() if info.scheduler and s not in ("dpmpp_sde", "dpmpp_2m_sde")]


@pytest.mark.parametrize("sampler", IN_PIPELINES)
def test_pictures_equal_diffusers_with_its_scheduler_changed(model: tuple[Pipeline, Any], sampler: str) -> None:
    ours, theirs = model
    theirs.scheduler = scheduler_class(SAMPLERS[sampler].scheduler or "").from_config(theirs.scheduler.config)
    eta = {"eta": 0.3} if sampler == "tcd" else {}
    expected = theirs(
        "a red cat",
        negative_prompt="dog",
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=6,
        guidance_scale=5.0,
        **SETTINGS,
        **eta,
    ).images[0]
    got = ours("a red cat", negative_prompt="dog", seed=5, steps=6, guidance=5.0, sampler=sampler, **SETTINGS)[0]
    assert psnr(got, expected) >= 45


@pytest.mark.parametrize(
    ("task", "sampler"),
    [("Image2Image", "unipc"), ("Image2Image", "dpm2_a"), ("Inpainting", "unipc"), ("Inpainting", "ddpm")],
)
def test_pictures_begun_from_one(model: tuple[Pipeline, Any], task: str, sampler: str) -> None:
    """Inpainting with two evaluations a step is not compared: diffusers puts the picture back within steps."""
    ours, theirs = model
    theirs = getattr(diffusers, f"AutoPipelineFor{task}").from_pipe(theirs)
    theirs.scheduler = scheduler_class(SAMPLERS[sampler].scheduler or "").from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    picture = Image.fromarray((np.indices((64, 64, 3)).sum(0) * 2).astype(np.uint8))
    mask = Image.new("L", (64, 64))
    mask.paste(255, (16, 8, 48, 40))
    given = {"mask_image": mask, **SETTINGS} if task == "Inpainting" else {}
    expected = theirs(
        "a red cat",
        image=picture,
        generator=torch.Generator().manual_seed(5),
        num_inference_steps=7,
        strength=0.6,
        guidance_scale=5.0,
        **given,
    ).images[0]
    masked = {"mask": mask, "paste": False} if task == "Inpainting" else {}
    settings = {"seed": 5, "steps": 7, "strength": 0.6, "guidance": 5.0, "sampler": sampler, **SETTINGS, **masked}
    assert psnr(ours("a red cat", image=picture, **settings)[0], expected) >= 45


def test_what_the_source_said_is_recorded_and_nothing_else(model: tuple[Pipeline, Any]) -> None:
    config = model[0].model.config.scheduler
    assert (config.timestep_spacing, config.steps_offset, config.set_alpha_to_one) == (None, 1, False)
    assert SD15.scheduler.timestep_spacing is None
    assert (SDXL.scheduler.timestep_spacing, SDXL_TURBO.scheduler.timestep_spacing) == ("leading", "trailing")


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_spacing_that_the_source_names_rules(
    tiny_pipeline: Callable[..., Path], tmp_path: Path, spacing: str
) -> None:
    folder = shutil.copytree(tiny_pipeline(), tmp_path / "named")
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(PUBLISHED | {"timestep_spacing": spacing}))
    config = read_model_config(folder)[0].scheduler
    for sampler in ("euler", "dpmpp_2m", "ddim"):
        named, asked = make_schedule(config, sampler, steps=8), make_schedule(SD15.scheduler, sampler, spacing, 8)
        assert torch.equal(named.timesteps, asked.timesteps)


@pytest.mark.parametrize("sampler", ["euler", "euler_a", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "lms"])
def test_the_schedule_of_k_diffusion_where_none_is_named(sampler: str) -> None:
    schedule = make_schedule(SD15.scheduler, sampler, steps=20)
    assert schedule.timesteps[0] == 999
    assert float(schedule.sigmas[0]) == pytest.approx(14.6146, abs=1e-4)


def test_the_schedule_of_ddim_where_none_is_named() -> None:
    assert make_schedule(SD15.scheduler, "ddim", steps=20).timesteps.tolist() == list(range(951, 0, -50))


def test_the_schedule_of_dpmpp_3m_sde_where_none_is_named(model: tuple[Pipeline, Any]) -> None:
    """Over linspace's last steps the third order overshoots: the picture breaks."""

    def schedule(**named: str) -> str:
        return model[0].prepare(Request("a cat", steps=4, **named)).schedule_name

    assert schedule(sampler="DPM++ 3M SDE") == "exponential"
    assert schedule(sampler="dpmpp_3m_sde", schedule="linspace") == "linspace"
    assert schedule(sampler="DPM++ 3M SDE Karras") == "karras"
    assert schedule(sampler="dpmpp_2m_sde") == "model"


def test_an_unknown_spacing_in_a_file_is_refused() -> None:
    with pytest.raises(ValueError, match="timestep_spacing is 'even'"):
        SchedulerConfig.from_dict({"timestep_spacing": "even"})
    assert SchedulerConfig.from_dict({"timestep_spacing": None}).timestep_spacing is None
