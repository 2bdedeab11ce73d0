"""What quantisation does to pictures, on the built-in model: a check that must also be able to fail."""

from __future__ import annotations

import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gguf_sd import Pipeline
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.cli.demo import TYPES
from gguf_sd.demo import model_folder
from gguf_sd.demo.check import judge
from gguf_sd.demo.models import DEMO_MODELS
from gguf_sd.demo.world import COLOURS, parse
from gguf_sd.quality import psnr
from gguf_sd_convert.convert import ConvertOptions, convert

PROMPTS = (
    *DEMO_MODELS["sd"].shown,
    "a green square above a cyan cross on a grey background",
    "a red triangle right of a green circle on a white background",
)
Q8_DB = 50.0  # median PSNR against F16; measured 60


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("types")
    for kind in TYPES:
        convert(model_folder(), folder / f"{kind}.gguf", ConvertOptions(type=kind))
    return {kind: folder / f"{kind}.gguf" for kind in TYPES}


def load(path: Path, weights: str = "resident") -> Pipeline:
    return Pipeline.load(path, device="cpu", dtype="float32", weights=weights)


def paint(pipeline: Pipeline) -> list[Image.Image]:
    return [pipeline(prompt, seed=i)[0] for i, prompt in enumerate(PROMPTS)]


@pytest.fixture(scope="module")
def pictures(models: dict[str, Path]) -> dict[str, list[Image.Image]]:
    return {kind: paint(load(path)) for kind, path in models.items()}


def check_pictures(pictures: dict[str, list[Image.Image]]) -> None:
    """F16 and Q8_0 paint what they are told, and the types rank as their bits do."""
    for kind in ("f16", "q8_0"):
        wrong = [p for p, picture in zip(PROMPTS, pictures[kind], strict=True) if not judge(picture, parse(p)).all]
        assert not wrong, f"{kind} is wrong about {wrong}"
    quality = {
        kind: statistics.median(psnr(a, b) for a, b in zip(pictures[kind], pictures["f16"], strict=True))
        for kind in TYPES[1:]
    }
    assert quality["q8_0"] > Q8_DB
    assert quality["q8_0"] > quality["q4_1"] >= quality["q4_0"] > 25, quality


def test_types_rank_and_stay_right(pictures: dict[str, list[Image.Image]]) -> None:
    check_pictures(pictures)


def test_a_corrupted_scale_is_seen(
    models: dict[str, Path], pictures: dict[str, list[Image.Image]], tmp_path: Path
) -> None:
    """One layer's scales half too large: 39 dB where Q8_0 has 60."""
    info = GGUFFile(models["q8_0"]).tensors["model.diffusion_model.output_blocks.3.0.in_layers.2.weight"]
    data = np.fromfile(models["q8_0"], dtype=np.uint8)
    blocks = data[info.offset : info.offset + info.nbytes].reshape(-1, 34)  # scale, 32 values
    blocks[:, :2] = (blocks[:, :2].copy().view(np.float16) * np.float16(1.5)).view(np.uint8)
    data.tofile(tmp_path / "corrupted.gguf")
    with pytest.raises(AssertionError):
        check_pictures(pictures | {"q8_0": paint(load(tmp_path / "corrupted.gguf"))})


def test_quantised_and_resident_weights_paint_the_same(
    models: dict[str, Path], pictures: dict[str, list[Image.Image]]
) -> None:
    quantised = load(models["q4_0"], weights="quantized")(PROMPTS[0], seed=0)[0]
    assert psnr(quantised, pictures["q4_0"][0]) > 50


def test_a_masked_region_is_repainted(models: dict[str, Path]) -> None:
    """The colour changes inside the mask, nothing changes outside."""
    pipeline = load(models["q8_0"])
    original = pipeline("a red circle above a blue square on a grey background", seed=3)[0]
    mask = Image.new("L", original.size)
    mask.paste(255, (0, 0, 64, 34))
    prompt = "a green circle above a blue square on a grey background"
    repainted = pipeline(prompt, image=original, mask=mask, seed=3, mask_blur=2)[0]
    inside = np.asarray(mask) > 0
    before, after = np.asarray(original), np.asarray(repainted)
    assert np.array_equal(before[~inside], after[~inside])

    def share(pixels: np.ndarray, colour: str) -> float:
        return float((np.abs(pixels[inside].astype(int) - COLOURS[colour]).sum(-1) < 120).mean())

    assert share(before, "red") > 0.1 > share(after, "red")
    assert share(after, "green") > 0.1 > share(before, "green")
