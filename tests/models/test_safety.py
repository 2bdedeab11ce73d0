"""The safety checker against diffusers' own, and its way through a converted file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.tensor_names import SAFETY
from gguf_sd.cli.inspect import describe
from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models.safety import SafetyChecker, blurred, preprocessed
from gguf_sd_convert.convert import ConvertReport, convert

SIZES = [(64, 64), (40, 72), (73, 41), (37, 37), (20, 30), (128, 37)]
VISION = "vision_model."


def random_pictures(count: int, seed: int) -> list[Image.Image]:
    """Coarse colour patches, so that pictures differ after they are made small too."""
    rng = np.random.default_rng(seed)
    patches = rng.integers(0, 256, (count, 5, 5, 3), dtype=np.uint8)
    return [Image.fromarray(p).resize(SIZES[i % len(SIZES)], Image.Resampling.BICUBIC) for i, p in enumerate(patches)]


@pytest.fixture(scope="module")
def folder(tiny_pipeline: Callable[..., Path]) -> Path:
    return tiny_pipeline(safety=True)


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ConvertReport]:
    path = tmp_path_factory.mktemp("safety") / "model.gguf"
    return path, convert(folder, path)


@pytest.fixture(scope="module")
def ours(written: tuple[Path, ConvertReport]) -> SafetyChecker:
    return ModelFile.open(written[0]).load_safety(torch.float32)


@pytest.fixture(scope="module")
def theirs(folder: Path) -> tuple[Any, Any]:
    """diffusers' checker with matrices rounded to F16 as in our file, and its image processor."""
    from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
    from transformers import CLIPImageProcessor

    checker = StableDiffusionSafetyChecker.from_pretrained(folder / "safety_checker").eval()
    for parameter in checker.parameters():
        if parameter.dim() > 1:
            parameter.data = parameter.data.half().float()
    return checker, CLIPImageProcessor.from_pretrained(folder / "feature_extractor")


def their_pixels(theirs: tuple[Any, Any], pictures: list[Image.Image]) -> torch.Tensor:
    return torch.cat([theirs[1](picture, return_tensors="pt").pixel_values for picture in pictures])


def test_pixels_and_embeddings_equal_diffusers(ours: SafetyChecker, theirs: tuple[Any, Any]) -> None:
    pictures = random_pictures(12, seed=1)
    pixels = their_pixels(theirs, pictures)
    for picture, expected in zip(pictures, pixels, strict=True):
        assert (preprocessed(picture, ours.config) - expected).abs().max() < 1e-5
    with torch.no_grad():
        wanted = theirs[0].visual_projection(theirs[0].vision_model(pixels)[1])
    got = ours.embed(pictures)
    assert (got - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    assert (got - wanted.roll(1, 0)).abs().max() > 0.1 * wanted.abs().max(), "all pictures look alike to it"


@pytest.mark.parametrize("special", ["never", "sometimes"])
def test_decisions_equal_diffusers(
    ours: SafetyChecker, theirs: tuple[Any, Any], special: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Thresholds amid the scores that these pictures get: some are flagged, and some only because of special care."""
    pictures = random_pictures(120, seed=2)
    scores, cares = _similarities(ours, pictures)
    with torch.no_grad():
        # Every concept catches a few pictures; those of special care more, where they may.
        thresholds = {"concept_embeds_weights": scores.quantile(0.97, dim=0)}
        care = cares.quantile(0.85, dim=0) if special == "sometimes" else cares.amax(dim=0) + 1
        thresholds["special_care_embeds_weights"] = care
        for module in (ours.concepts, theirs[0]):
            for name, values in thresholds.items():
                monkeypatch.setattr(getattr(module, name), "data", values.clone())
    pixels = their_pixels(theirs, pictures)
    expected = theirs[0](pixels, [np.zeros(1)] * len(pictures))[1]
    assert ours.flagged(pictures) == expected
    assert 0.1 < np.mean(expected) < 0.9
    plain = ((scores - thresholds["concept_embeds_weights"]).round(decimals=3) > 0).any(dim=1)
    assert (plain.tolist() != expected) == (special == "sometimes"), "special care makes no difference here"


def _similarities(checker: SafetyChecker, pictures: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines [B, 17] with the concepts and [B, 3] with those of special care."""
    embeddings, concepts = checker.embed(pictures), checker.concepts
    cosine = torch.nn.functional.cosine_similarity
    with torch.no_grad():
        both = (concepts.concept_embeds, concepts.special_care_embeds)
        scores, cares = (cosine(embeddings[:, None], embeds[None], dim=-1) for embeds in both)
    return scores, cares


def test_scores_are_rounded_to_three_decimals_before_they_count(ours: SafetyChecker) -> None:
    concepts = type(ours.concepts)(ours.config)
    with torch.no_grad():
        concepts.concept_embeds.copy_(torch.eye(24)[:17])
        concepts.special_care_embeds.copy_(torch.eye(24)[17:20])
        concepts.concept_embeds_weights.fill_(2.0)
        concepts.special_care_embeds_weights.fill_(2.0)
        picture = torch.eye(24)[:1] + torch.eye(24)[17:18]  # cosine 0.70711 with concept 0 and special concept 0
        found = []
        for threshold, care in ((0.7068, 2.0), (0.7063, 2.0), (0.716, 2.0), (0.716, 0.7068), (0.716, 0.7063)):
            concepts.concept_embeds_weights[0], concepts.special_care_embeds_weights[0] = threshold, care
            found.append(concepts.flagged(picture).item())
    assert found == [False, True, False, False, True]


def test_values_that_are_not_finite_do_not_pass(written: tuple[Path, ConvertReport]) -> None:
    checker = ModelFile.open(written[0]).load_safety(torch.float32)
    checker.vision.visual_projection.weight.data[0, 0] = float("nan")
    with pytest.raises(GgufSdError, match="not finite; try --dtype"):
        checker.flagged(random_pictures(1, seed=3))


def test_sixteen_bits(written: tuple[Path, ConvertReport], ours: SafetyChecker) -> None:
    """The transformer computes in 16 bits, thresholds and concepts keep theirs."""
    checker = ModelFile.open(written[0]).load_safety(torch.bfloat16)
    assert checker.vision.visual_projection.weight.dtype == torch.bfloat16
    assert torch.equal(checker.concepts.concept_embeds_weights, ours.concepts.concept_embeds_weights)
    assert checker.flagged([]) == []
    pictures = random_pictures(4, seed=4)
    got, wanted = checker.embed(pictures), ours.embed(pictures)
    assert torch.nn.functional.cosine_similarity(got, wanted).min() > 0.99
    assert len(checker.flagged(pictures)) == 4


def test_the_file_holds_it(folder: Path, written: tuple[Path, ConvertReport]) -> None:
    path, report = written
    model, source = ModelFile.open(path), load_file(folder / "safety_checker" / "model.safetensors")
    assert model.config.safety is not None
    assert astuple(model.config.safety)[:10] == (32, 64, 2, 4, 32, 8, "quick_gelu", 24, 17, 3)
    assert model.config.safety.resize == 37
    stored = {name.removeprefix(SAFETY): name for name in model.names if name.startswith(SAFETY)}
    assert {name.replace(VISION * 2, VISION) for name in stored} == {n.replace(VISION * 2, VISION) for n in source}
    for name, value in source.items():
        long = name if name in stored else name.replace(VISION, VISION * 2)
        got = model.file.tensor(stored[long])
        assert isinstance(got, torch.Tensor)
        assert got.dtype == (torch.float16 if value.dim() > 1 else torch.float32)
        assert torch.equal(got, value.to(got.dtype)), name
    matrices = [value for value in source.values() if value.dim() > 1]
    assert report.kept["safety checker"] == (len(matrices), sum(2 * value.numel() for value in matrices))
    parts = describe(model)["parts"]["safety checker"]
    assert (parts["F16"]["tensors"], parts["F32"]["tensors"]) == (len(matrices), len(source) - len(matrices))


def test_names_of_both_transformers(folder: Path, written: tuple[Path, ConvertReport], tmp_path: Path) -> None:
    """vision_model. twice (version 4, with its position_ids) or once (version 5): the same file, and both load."""
    copy = shutil.copytree(folder, tmp_path / "other")
    weights = copy / "safety_checker" / "model.safetensors"
    state = load_file(weights)
    twice = any(name.startswith(VISION * 2) for name in state)
    new, old = (VISION, VISION * 2) if twice else (VISION * 2, VISION)
    state = {new + n.removeprefix(old) if n.startswith(VISION) else n: value for n, value in state.items()}
    state[new + "embeddings.position_ids"] = torch.arange(17)[None]
    save_file(state, weights)
    report = convert(copy, tmp_path / "other.gguf")
    assert not any("no part of the model" in note for note in report.notes)
    first, second = ModelFile.open(written[0]), ModelFile.open(tmp_path / "other.gguf")
    assert set(first.names) == set(second.names)
    assert first.config.safety is not None
    bare = {name.replace(VISION * 2, VISION): source for name, source in first.part(SAFETY).items()}
    checker = SafetyChecker.load(first.config.safety, bare, torch.float32, "here")
    pictures = random_pictures(3, seed=5)
    assert torch.equal(checker.embed(pictures), second.load_safety(torch.float32).embed(pictures))


def test_folder_without_one(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "plain.gguf"
    report = convert(tiny_pipeline(), path)
    model = ModelFile.open(path)
    assert model.config.safety is None
    assert "safety checker" not in report.kept
    assert not any("safety" in note for note in report.notes)
    with pytest.raises(GgufSdError, match=r"plain\.gguf carries no safety checker; convert a diffusers folder"):
        model.load_safety(torch.float32)
    old = model.file.json("gguf_sd.config")
    del old["safety"]  # as written before checkers were stored
    assert ModelConfig.from_dict(old) == model.config


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ("weights", "no weights in"),
        ("class", "is a CustomChecker, not a StableDiffusionSafetyChecker"),
        ("processor", "sees pictures prepared as CLIP's are"),
    ],
)
def test_what_is_left_out_is_said(folder: Path, tmp_path: Path, change: str, note: str) -> None:
    copy = shutil.copytree(folder, tmp_path / "changed")
    if change == "weights":
        (copy / "safety_checker" / "model.safetensors").unlink()
    elif change == "processor":
        shutil.rmtree(copy / "feature_extractor")
    else:
        _edit(copy / "model_index.json", safety_checker=["mine", "CustomChecker"])
    report = convert(copy, tmp_path / "out.gguf")
    assert [text for text in report.notes if note in text]
    config = ModelFile.open(tmp_path / "out.gguf").config.safety
    assert (config.resize if config else None) == (32 if change == "processor" else None)


@pytest.mark.parametrize(
    ("file", "settings", "message"),
    [
        ("feature_extractor/preprocessor_config.json", {"do_center_crop": False}, "do_center_crop is False"),
        ("feature_extractor/preprocessor_config.json", {"resample": 2}, "resample is 2; gguf-sd takes 3"),
        (
            "feature_extractor/preprocessor_config.json",
            {"size": {"shortest_edge": 31}},
            "a shortest_edge of 32 or more",
        ),
        ("feature_extractor/preprocessor_config.json", {"size": {"height": 64, "width": 64}}, "a shortest_edge of 32"),
        ("feature_extractor/preprocessor_config.json", {"crop_size": 36}, "crop_size is 36; gguf-sd takes 32"),
        ("feature_extractor/preprocessor_config.json", {"image_std": [1, 1, 0]}, "three positive numbers"),
        ("safety_checker/config.json", {"vision_config": {"hidden_act": "relu"}}, "hidden_act is 'relu'"),
        ("safety_checker/config.json", {"vision_config": {"hidden_size": 30}}, "that divides hidden_size, 30"),
        ("safety_checker/config.json", {"projection_dim": 20}, r"visual_projection.weight has shape \[24, 32\]"),
    ],
)
def test_settings_that_do_not_fit_are_refused(
    folder: Path, tmp_path: Path, file: str, settings: dict[str, Any], message: str
) -> None:
    copy = shutil.copytree(folder, tmp_path / "changed")
    _edit(copy / file, **settings)
    with pytest.raises(GgufSdError, match=message):
        convert(copy, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()


def test_early_files_settings(folder: Path, written: tuple[Path, ConvertReport], tmp_path: Path) -> None:
    """The published folders' JSON: sizes as plain numbers, the vision model's settings twice."""
    copy = shutil.copytree(folder, tmp_path / "early")
    vision = json.loads((copy / "safety_checker" / "config.json").read_text())["vision_config"]
    own = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "patch_size", "image_size")
    early = {"vision_config_dict": {key: vision[key] for key in own}, "vision_config": {"hidden_size": 768}}
    _edit(copy / "safety_checker" / "config.json", **early)
    _edit(copy / "feature_extractor" / "preprocessor_config.json", size=37, crop_size=32)
    convert(copy, tmp_path / "out.gguf")
    assert ModelFile.open(tmp_path / "out.gguf").config == ModelFile.open(written[0]).config


@pytest.mark.parametrize(
    ("name", "count"), [("visual_projection.weight", 40), ("concept_embeds", 4), ("special_care_embeds_weights", 4)]
)
def test_missing_tensors(written: tuple[Path, ConvertReport], name: str, count: int) -> None:
    model = ModelFile.open(written[0])
    assert model.names.pop(SAFETY + name)
    with pytest.raises(GgufSdError) as caught:
        model.load_safety(torch.float32)
    assert f"{written[0]} lacks 1 of {count} tensors, the first is {name}" in str(caught.value)
    assert "\n" not in str(caught.value)
    model.names.clear()
    with pytest.raises(GgufSdError, match=r"holds no safety_checker\.\* tensors"):
        model.load_safety(torch.float32)


def test_blur_leaves_colours_only() -> None:
    """No detail at any size, the average colour kept, and half the size blurs to half the picture."""
    small = Image.fromarray(np.random.default_rng(6).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    pictures = [small.resize((n, n), Image.Resampling.NEAREST) for n in (64, 128)]
    results = [np.asarray(blurred(picture), np.float64) for picture in pictures]
    for picture, result in zip(pictures, results, strict=True):
        before = np.asarray(picture, np.float64)
        assert result.shape == before.shape
        assert result.std(axis=(0, 1)).max() < 0.3 * before.std(axis=(0, 1)).min()
        assert np.abs(result.mean(axis=(0, 1)) - before.mean(axis=(0, 1))).max() < 12
    halved = results[1].reshape(64, 2, 64, 2, 3).mean(axis=(1, 3))
    assert np.abs(halved - results[0]).max() < 4


def _edit(path: Path, **settings: Any) -> None:
    """A JSON file with other settings; those of the vision model are merged with the rest of its own."""
    values = json.loads(path.read_text())
    if "vision_config" in settings:
        settings["vision_config"] = values["vision_config"] | settings["vision_config"]
    path.write_text(json.dumps(values | settings))
