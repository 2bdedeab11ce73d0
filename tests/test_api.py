"""The Python interface: what is exported, and what it takes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import gguf_sd
from gguf_sd.imaging.png_metadata import parse_parameters
from gguf_sd.quality import psnr

SETTINGS: dict[str, Any] = {"steps": 2, "width": 32, "height": 32}


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "tiny.gguf"
    report = gguf_sd.convert(str(tiny_pipeline()), str(path), type="q8_0", threads=None)
    assert (report.type, report.layout) == ("q8_0", "native")
    return path


@pytest.fixture(scope="module")
def xl_model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("api") / "xl.gguf"
    gguf_sd.convert(tiny_pipeline(xl=True, scheduler="EulerDiscreteScheduler"), path, "q4_0")
    return path


@pytest.fixture(scope="module")
def pipeline(model: Path) -> gguf_sd.Pipeline:
    return gguf_sd.Pipeline.load(
        str(model), device=torch.device("cpu"), dtype=torch.float32, weights=None, kernels=None
    )


def test_exports_are_shown_and_loaded_late() -> None:
    names = {"Control", "Pipeline", "Request", "convert", "inspect", "GgufSdError", "__version__"}
    assert names <= set(dir(gguf_sd))
    assert names == set(gguf_sd.__all__)
    assert all(getattr(gguf_sd, name) for name in names)
    code = "import sys, gguf_sd; dir(gguf_sd); gguf_sd.GgufSdError; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    with pytest.raises(AttributeError, match="no attribute 'Pipelines'"):
        _ = gguf_sd.Pipelines


def test_inspect(model: Path) -> None:
    facts = gguf_sd.inspect(str(model), tensors=True)
    assert (facts["architecture"], facts["type"]) == ("sd1", "q8_0")
    assert set(facts["parts"]) == {"unet", "vae", "text encoder"}
    assert type(facts["parts"]) is dict
    assert facts["tensors"][0].keys() >= {"name", "type", "shape"}
    with pytest.raises(gguf_sd.GgufSdError, match="takes a path"):
        gguf_sd.inspect(3)  # type: ignore[arg-type]


def test_pictures_carry_their_settings(pipeline: gguf_sd.Pipeline) -> None:
    (picture,) = pipeline("a cat", negative_prompt="dog", seed=7, **SETTINGS)
    settings = parse_parameters(picture.info["parameters"])
    assert settings["prompt"] == "a cat"
    assert settings["negative_prompt"] == "dog"
    assert (settings["seed"], settings["steps"], settings["width"]) == (7, 2, 32)
    empty, none = (pipeline("a cat", negative_prompt=text, **SETTINGS)[0].info["parameters"] for text in ("", None))
    assert parse_parameters(empty)["negative_prompt"] == ""
    assert parse_parameters(none).get("negative_prompt") is None


def test_numbers_of_other_kinds_and_none(pipeline: gguf_sd.Pipeline) -> None:
    expected = pipeline("a cat", steps=2, width=32, height=32, guidance=3.0, seed=7)[0].tobytes()
    given = {"steps": np.int64(2), "width": np.int32(32), "height": torch.tensor(32), "guidance": np.float32(3)}
    got = pipeline("a cat", seed=np.uint8(7), batch=None, count=None, crop=None, sampler=None, **given)
    assert got[0].tobytes() == expected
    request = gguf_sd.Request("a cat", seed=np.int64(7), **given)  # type: ignore[arg-type]
    assert next(pipeline.paint(pipeline.prepare(request))).image.tobytes() == expected


def test_pictures_and_where_they_lie(pipeline: gguf_sd.Pipeline, tmp_path: Path) -> None:
    start, mask = Image.new("RGB", (32, 32), "orange"), Image.new("L", (32, 32))
    mask.paste(255, (8, 8, 32, 32))
    start.save(tmp_path / "start.png")
    mask.save(tmp_path / "mask.png")
    settings = SETTINGS | {"seed": 1, "mask_blur": np.int64(0), "paste": np.True_}
    expected = pipeline("a cat", image=start, mask=mask, **settings)[0].tobytes()
    got = pipeline("a cat", image=str(tmp_path / "start.png"), mask=tmp_path / "mask.png", **settings)
    assert got[0].tobytes() == expected


@pytest.mark.parametrize("kind", ["model", "xl_model"])
@pytest.mark.parametrize("negative", [None, "blurry", ["", "blurry", "dog", "red " * 90]])
def test_a_list_of_prompts(kind: str, negative: Any, request: pytest.FixtureRequest) -> None:
    """A picture for each, seeds counting up, painted together: the same pictures as one at a time."""
    pipeline = gguf_sd.Pipeline.load(request.getfixturevalue(kind), "cpu", "float32")
    prompts = ["a cat", "a red dog", "(dog:1.4)", "cat " * 80]  # the last is of two chunks
    negatives = negative if isinstance(negative, list) else [negative] * 4
    alone = [
        pipeline(prompt, negative_prompt=text, seed=7 + i, **SETTINGS)[0]
        for i, (prompt, text) in enumerate(zip(prompts, negatives, strict=True))
    ]
    shapes: list[int] = []
    jobs = [
        pipeline.prepare(gguf_sd.Request(prompt, negative_prompt=text, seed=7, batch=3, **SETTINGS))
        for prompt, text in zip(prompts, negatives, strict=True)
    ]
    assert len(jobs) == 4
    original = pipeline.decode

    def decode(latents: torch.Tensor, plan: Any = None) -> torch.Tensor:
        shapes.append(len(latents))
        return original(latents, plan)

    pipeline.decode = decode  # type: ignore[method-assign]
    together = pipeline(prompts, negative_prompt=negative, seed=7, batch=3, **SETTINGS)
    assert shapes == [3, 1]
    assert min(psnr(a, b) for a, b in zip(together, alone, strict=True)) >= 60
    assert [p.info["parameters"] for p in together] == [p.info["parameters"] for p in alone]
    assert max(psnr(together[0], other) for other in together[1:]) < 40, "all the same: the comparison is blind"


def test_several_pictures_for_each_prompt(pipeline: gguf_sd.Pipeline) -> None:
    together = pipeline(("a cat", "a dog"), seed=3, count=2, batch=4, **SETTINGS)
    alone = [*pipeline("a cat", seed=3, count=2, **SETTINGS), *pipeline("a dog", seed=5, count=2, **SETTINGS)]
    assert min(psnr(a, b) for a, b in zip(together, alone, strict=True)) >= 60


@pytest.mark.parametrize(
    ("prompt", "settings", "message"),
    [
        ("a", {"step": 3}, "there is no setting 'step'; did you mean steps"),
        ("a", {"guidance_scale": 3}, "there is no setting 'guidance_scale'; here it is called guidance"),
        ("a", {"num_inference_steps": 3}, "here it is called steps"),
        ("a", {"xyzzy": 3}, "no setting 'xyzzy'; choose from prompt, negative_prompt, steps"),
        ("a", {"steps": 20.0}, "steps must be a whole number, got 20.0"),
        ("a", {"steps": "20"}, "steps must be a whole number, got '20'"),
        ("a", {"seed": True}, "seed must be a whole number, got True"),
        ("a", {"guidance": "7"}, "guidance must be a finite number, got '7'"),
        ("a", {"sampler": 3}, "sampler must be a text, got 3"),
        ("a", {"paste": "yes"}, "paste must be True or False, got 'yes'"),
        ("a", {"crop": 8}, "crop must be two whole numbers, got 8"),
        ("a", {"crop": (8, "x")}, "crop must be two whole numbers, got (8, 'x')"),
        ("a", {"image": 3}, "image must be a PIL image, got 3"),
        ("a", {"image": "none.png"}, "none.png"),
        (3, {}, "prompt takes a text, or a list of texts, got 3"),
        (["a", b"b"], {}, "prompt takes a text, or a list of texts, got b'b'"),
        ([], {}, "prompt is an empty list"),
        (["a", "b"], {"negative_prompt": ["c"]}, "negative_prompt has 1 texts for 2 prompts"),
        ("a", {"negative_prompt": 3}, "negative_prompt takes a text"),
    ],
)
def test_wrong_values_are_one_sentence(
    pipeline: gguf_sd.Pipeline, prompt: Any, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(gguf_sd.GgufSdError) as caught:
        pipeline(prompt, **settings)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_wrong_models_and_options(tiny_pipeline: Callable[..., Path], tmp_path: Path, model: Path) -> None:
    with pytest.raises(gguf_sd.GgufSdError, match=r"is no GGUF file; convert it first, with gguf_sd\.convert"):
        gguf_sd.Pipeline.load(tiny_pipeline())
    (tmp_path / "m.safetensors").touch()
    with pytest.raises(gguf_sd.GgufSdError, match="is no GGUF file; convert it first"):
        gguf_sd.Pipeline.load(str(tmp_path / "m.safetensors"))
    with pytest.raises(gguf_sd.GgufSdError, match="the model takes a path, got 3"):
        gguf_sd.Pipeline.load(3)  # type: ignore[arg-type]
    with pytest.raises(gguf_sd.GgufSdError, match="vae takes a path, got 3"):
        gguf_sd.Pipeline.load(model, vae=3)  # type: ignore[arg-type]
    with pytest.raises(gguf_sd.GgufSdError, match="no setting 'layot'; did you mean layout"):
        gguf_sd.convert(model, tmp_path / "o.gguf", layot="comfy")
    with pytest.raises(gguf_sd.GgufSdError, match="type takes a text, got 4"):
        gguf_sd.convert(model, tmp_path / "o.gguf", type=4)  # type: ignore[arg-type]
