"""What goes wrong while painting is one sentence that names the right part, and pictures are checked from the first
preview on."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from gguf_sd.errors import GgufSdError
from gguf_sd.models import tiled_vae
from gguf_sd.models.safety import blurred
from gguf_sd.pipeline import Pipeline
from gguf_sd.request import Request
from gguf_sd_convert.convert import ConvertOptions, convert

SETTINGS: dict[str, Any] = {"steps": 3, "width": 32, "height": 32, "seed": 5}


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("failures") / "tiny.gguf"
    convert(tiny_pipeline(safety=True), path, ConvertOptions(type="q8_0"))
    return path


@pytest.fixture
def pipeline(model: Path) -> Pipeline:
    return Pipeline.load(model, "cpu", "float32")


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), MemoryError(), "allocator"])
def test_running_out_of_memory_keeps_what_is_finished(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, error: Exception | str
) -> None:
    """Where less memory does not do either; and holds no tensor of the step that failed while the error is looked
    at."""
    job = pipeline.prepare(Request("a cat", count=4, batch=2, **SETTINGS))
    steps, held = [], []

    class Large:
        pass

    def on_step(step: object) -> None:
        steps.append(step)
        if len(steps) >= 5:
            large = Large()
            held.append(weakref.ref(large))
            if isinstance(error, str):
                torch.empty(2**60, dtype=torch.uint8)
            raise error  # type: ignore[misc]

    finished: list[int] = []
    with pytest.raises(GgufSdError, match=r"out of memory: .* a smaller --batch than 2, or a smaller size") as caught:
        finished.extend(picture.seed for picture in pipeline.paint(job, on_step))
    assert finished == [5, 6]
    assert len(steps) == 6, "once more, with less, and no more than that"
    gc.collect()
    if isinstance(error, str):
        assert held[0]() is None
    assert caught.value.__context__ is None
    assert len(pipeline("a cat", **SETTINGS)) == 1, "it paints again"


@pytest.mark.parametrize("stage", ["text", "step", "decode"])
def test_running_out_of_memory_once_costs_no_picture(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, stage: str
) -> None:
    """The batch that failed is painted again by a plan that takes less, as are those after it, with one warning."""
    settings = SETTINGS | {"sampler": "euler_a"}
    expected = [picture.tobytes() for picture in pipeline("a cat", count=4, batch=2, **settings)]
    failures = [torch.OutOfMemoryError("CUDA out of memory.")]
    failed: list[int] = []  # peak of the plan that there was not enough memory for
    steps: list[object] = []

    def fail() -> None:
        if failures:
            assert pipeline._turns.running
            failed.append(pipeline._turns.running.peak)
            raise failures.pop()

    def on_step(step: object) -> None:
        steps.append(step)
        if stage == "step" and len(steps) == 5:
            fail()

    if stage == "text":
        encode = pipeline._encode
        monkeypatch.setattr(pipeline, "_encode", lambda *given: fail() or encode(*given))  # type: ignore[func-returns-value]
    if stage == "decode":
        decode = tiled_vae.decode
        monkeypatch.setattr(tiled_vae, "decode", lambda *given: fail() or decode(*given))  # type: ignore[func-returns-value]
    job = pipeline.prepare(Request("a cat", count=4, batch=2, **settings))
    painted = list(pipeline.paint(job, on_step))
    assert not failures
    assert [picture.seed for picture in painted] == [5, 6, 7, 8]
    plans = [picture.plan.peak for picture in painted if picture.plan]
    assert plans[-1] < failed[0]
    assert plans[0] == plans[-1] or stage == "step"
    if {picture.weights for picture in painted} == {"resident"}:
        assert [picture.image.tobytes() for picture in painted] == expected
    else:
        pixels = [np.asarray(picture.image, dtype=float) for picture in painted]
        assert max(np.abs(a.ravel() - list(b)).max() for a, b in zip(pixels, expected, strict=True)) <= 1
    assert len([record for record in caplog.records if "painted again with less" in record.message]) == 1


def test_other_errors_are_left_as_they_are(pipeline: Pipeline) -> None:
    def on_step(step: object) -> None:
        raise RuntimeError("something else")

    with pytest.raises(RuntimeError, match="something else"):
        list(pipeline.paint(pipeline.prepare(Request("a cat", **SETTINGS)), on_step))


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ("text 0", "the text encoder 1 produced values that are not finite in float32; the weights"),
        ("unet", "the UNet produced values that are not finite at step 1 of 3 in float32; the weights"),
        ("vae", "the VAE produced values that are not finite in float32; the weights"),
    ],
)
def test_the_right_part_is_blamed(pipeline: Pipeline, part: str, message: str) -> None:
    pipeline("a cat", **SETTINGS)
    module = pipeline.parts._loaded[part].part
    biases = [p for name, p in module.named_parameters() if name.endswith("bias")]
    with torch.no_grad():
        for bias in biases:
            bias.fill_(float("nan"))
    with pytest.raises(GgufSdError, match=message):
        pipeline("a cat", **SETTINGS)


def test_a_bad_encoding_of_the_picture_to_start_from(pipeline: Pipeline) -> None:
    pipeline("a cat", image=Image.new("RGB", (32, 32)), **SETTINGS)
    with torch.no_grad():
        next(pipeline.parts._loaded["vae"].part.encoder.parameters()).fill_(float("inf"))  # type: ignore[union-attr]
    with pytest.raises(GgufSdError, match="the VAE produced values that are not finite of the picture to start from"):
        pipeline("a cat", image=Image.new("RGB", (32, 32)), **SETTINGS)


@pytest.mark.parametrize("flagged", [True, False])
@pytest.mark.parametrize("mode", ["blur", "warn", "off"])
def test_previews_are_checked_as_pictures_are(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, mode: str, flagged: bool
) -> None:
    looked: list[int] = []

    def flag(self: object, images: list[Image.Image]) -> list[bool]:
        looked.append(len(images))
        return [flagged] * len(images)

    monkeypatch.setattr("gguf_sd.models.safety.SafetyChecker.flagged", flag)
    pairs: list[tuple[Image.Image, Image.Image]] = []
    job = pipeline.prepare(Request("a cat", safety=mode, **SETTINGS))
    (picture,) = pipeline.paint(
        job, lambda step: pairs.append((pipeline.preview(step, job.safety), pipeline.preview(step, "off")))
    )
    for shown, plain in pairs:
        assert shown.tobytes() == (blurred(plain) if flagged and mode == "blur" else plain).tobytes()
    assert picture.flagged == (flagged and mode != "off")
    assert len(looked) == {"blur": 4, "warn": 1, "off": 0}[mode]


def test_previews_are_checked_unless_told_otherwise(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gguf_sd.models.safety.SafetyChecker.flagged", lambda self, images: [True] * len(images))
    shown: list[Image.Image] = []
    list(
        pipeline.paint(
            pipeline.prepare(Request("a cat", **SETTINGS)),
            lambda step: shown.extend((pipeline.preview(step), pipeline.preview(step, "off"))),
        )
    )
    assert shown[0].tobytes() == blurred(shown[1]).tobytes() != shown[1].tobytes()
