"""The model that ships in the package: complete, small, loaded by diffusers, and painting what it is told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPTokenizer

from gguf_sd import Pipeline
from gguf_sd.demo import check, model_folder, world
from gguf_sd_convert.convert import ConvertOptions, convert
from tests.demo.matrices import check_matrices
from tools.demo_model.paint import GUIDANCE, STEPS
from tools.demo_model.vocabulary import LENGTH, token_ids

FOLDER = model_folder()
BATCH = 12


@pytest.fixture(scope="module")
def pipeline() -> Any:
    made = diffusers.StableDiffusionPipeline.from_pretrained(FOLDER, safety_checker=None)
    made.set_progress_bar_config(disable=True)
    return made


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(FOLDER, path, ConvertOptions(type="f16"))
    return path


def test_folder_is_small() -> None:
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file()) <= 15e6


def test_every_matrix_takes_every_type() -> None:
    check_matrices(FOLDER, 3)


def test_tokenizer_is_transformers_own() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(FOLDER / "tokenizer")
    captions = ["", *(scene.caption for n in (1, 2) for scene in world.scenes(held=True, objects=n)[::7])]
    assert tokenizer(captions, padding="max_length", max_length=LENGTH).input_ids == token_ids(captions)
    assert tokenizer.model_max_length == LENGTH
    ids = tokenizer("Ça, 2 naïve 猫 🙂!").input_ids[1:-1]
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids).replace(" ", "") == "ça,2naïve猫🙂!"


def test_paints_what_it_is_told(pipeline: Any) -> None:
    """Held-out captions through diffusers; the same pictures must fail as illustrations of other captions."""
    prompts = check.held_out_prompts(BATCH // 4, BATCH - BATCH // 4, seed=3)
    painted: list[Image.Image] = []

    def paint(captions: list[str]) -> Sequence[Image.Image]:
        generators = [torch.Generator().manual_seed(i) for i in range(len(captions))]
        painted.extend(
            pipeline(captions, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators).images
        )
        return painted

    report = check.evaluate(paint, prompts)
    assert report.single == 1.0
    assert report.pair >= 0.75
    shuffled = check.evaluate(lambda captions: painted[1:] + painted[:1], prompts)
    assert shuffled.pair <= 0.1


def test_engine_paints_as_diffusers_does(pipeline: Any, converted: Path) -> None:
    prompt, settings = "a red circle above a blue square", {"steps": 12, "guidance": GUIDANCE}
    engine = Pipeline.load(converted, "cpu", "float32")
    assert engine.model.config.defaults.sampler == "dpmpp_2m"
    assert (engine.model.config.defaults.width, engine.model.config.defaults.height) == (64, 64)
    for seed in (0, 5):
        (ours,) = engine(prompt, seed=seed, **settings)
        generator = torch.Generator().manual_seed(seed)
        theirs = pipeline(prompt, num_inference_steps=12, guidance_scale=GUIDANCE, generator=generator).images[0]
        error = np.mean((np.asarray(ours, np.float64) - np.asarray(theirs, np.float64)) ** 2)
        assert error <= 255**2 / 10**4.5, f"seed {seed}: PSNR below 45 dB"
        assert check.judge(ours, world.parse(prompt)).all


def test_scheduler_is_the_one_it_is_judged_with(pipeline: Any) -> None:
    assert type(pipeline.scheduler).__name__ == "DPMSolverMultistepScheduler"
    config = json.loads((FOLDER / "scheduler" / "scheduler_config.json").read_text())
    assert (config["prediction_type"], config["timestep_spacing"]) == ("epsilon", "linspace")
