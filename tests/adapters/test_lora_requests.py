"""LoRAs as they are asked for: files with weights, names in prompts, several at once, and what pictures record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from gguf_sd.adapters.lora import Lora, as_loras, parse_lora, requested, short_hash
from gguf_sd.adapters.read_lora import lora_values
from gguf_sd.adapters.side_path import side_bytes
from gguf_sd.cli.main import main
from gguf_sd.errors import GgufSdError
from gguf_sd.pipeline import Pipeline
from gguf_sd.request import Request
from tests.adapters.conftest import all_targets, config_of, kohya, random_lora, save

SETTINGS: dict[str, Any] = {"steps": 1, "width": 32, "height": 32, "seed": 3, "safety": "off"}


@pytest.fixture
def folder(tiny_file: Callable[..., Path], tmp_path: Path) -> Path:
    """LoRAs for the tiny model: style, and sub/other."""
    config = config_of(tiny_file())
    (tmp_path / "sub").mkdir()
    save(kohya(random_lora(config), config), tmp_path / "style.safetensors")
    save(kohya(random_lora(config, rank=2), config), tmp_path / "sub" / "other.safetensors")
    return tmp_path


def test_ways_to_ask(tiny_file: Callable[..., Path], folder: Path) -> None:
    """All the same, and the model is loaded once for them."""
    pipeline = Pipeline.load(tiny_file(), "cpu", "float32", "quantized")
    style, other = folder / "style.safetensors", folder / "sub" / "other.safetensors"

    def paint(prompt: str = "a cat", **settings: Any) -> bytes:
        return pipeline(prompt, **settings, **SETTINGS)[0].tobytes()

    plain = paint()
    half = paint(loras=[f"{style}:0.5", (other, -0.25)])
    assert half not in (plain, paint(loras=f"{style}:0.5"), paint(loras=[Lora(style), Lora(other)]))
    assert half == paint("a <lora:style:0.5>cat<lora:sub/other:-0.25>", lora_dir=folder)
    assert half == paint("a cat <lyco:other:-.25>", lora_dir=str(folder), loras=(style, 0.5))
    assert paint("a cat <lora:style>", lora_dir=folder) == paint(loras=style) == paint(loras=Lora(style, 1))
    # The text encoders' weight comes first, as in AUTOMATIC1111's web UI.
    apart = paint("a cat <lora:style:0:1>", lora_dir=folder)
    assert apart == paint(loras=Lora(style, 1.0, text_weight=0.0))
    assert apart not in (plain, paint(loras=style), paint("a cat <lora:style:1:0>", lora_dir=folder))
    assert plain == paint() == paint(loras=(style, 0)) == paint("a cat <lora:style:0>", lora_dir=folder)
    assert pipeline.parts.loads == {"text 0": 1, "unet": 1, "vae": 1}


def test_prompts_of_one_call_have_loras_of_their_own(tiny_file: Callable[..., Path], folder: Path) -> None:
    pipeline = Pipeline.load(tiny_file(), "cpu", "float32", "quantized")
    prompts = ["a cat", "a cat <lora:style:1>", "a cat <lora:other:1>"]
    together = pipeline(prompts, batch=3, lora_dir=folder, **SETTINGS)
    for index, prompt in enumerate(prompts):
        (alone,) = pipeline(prompt, lora_dir=folder, **(SETTINGS | {"seed": 3 + index}))
        assert together[index].tobytes() == alone.tobytes()


@pytest.mark.parametrize("placement", ["streamed", "staged"])
def test_on_parts_that_come_and_go(tiny_file: Callable[..., Path], folder: Path, placement: str) -> None:
    style = folder / "style.safetensors"
    expected = Pipeline.load(tiny_file(), "cpu", "float32", "quantized")("a cat", loras=style, **SETTINGS)[0]
    pipeline = Pipeline.load(tiny_file(), "cpu", "float32", "quantized", placement=placement)
    assert pipeline("a cat", loras=style, **SETTINGS)[0].tobytes() == expected.tobytes()


def test_memory_is_planned_for(tiny_file: Callable[..., Path], folder: Path) -> None:
    """What lies beside the layers is what the plan counts."""
    pipeline = Pipeline.load(tiny_file(), "cpu", "float32", "quantized")
    job = pipeline.prepare(Request("a cat", loras=str(folder / "style.safetensors"), **SETTINGS))
    counted = lora_values(job.loras, pipeline.model.config)
    list(pipeline.paint(job))
    for name, count in counted.items():
        assert side_bytes(pipeline.parts._loaded[name].part) == 4 * count
    own, plain = (pipeline.planner(x).parts["unet"].loaded(4, "quantized") for x in (job, replace(job, loras=())))
    assert own - plain == 4 * counted["unet"]


def test_graphs_do_not_outlive_a_lora(
    tiny_file: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = Pipeline.load(tiny_file(), "cpu", "float32", "quantized")
    pipeline("a cat", **SETTINGS)
    pipeline.parts._loaded["unet"].graphs = object()  # type: ignore[assignment]
    monkeypatch.setattr(type(pipeline.parts._loaded["unet"]), "nbytes", lambda self, device: 0)
    pipeline("a cat", loras=str(folder / "style.safetensors"), **SETTINGS)
    assert pipeline.parts._loaded["unet"].graphs is None


def test_pictures_record_their_loras(
    tiny_file: Callable[..., Path], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As AUTOMATIC1111 does; --from finds them again, and says what is missing."""
    monkeypatch.chdir(folder)
    style = folder / "style.safetensors"
    options = ["generate", str(tiny_file()), "--steps", "1", "--width", "32", "--height", "32", "--quiet"]
    asked = ["-p", "a <lora:other:0.5> cat", "--lora-dir", ".", "--lora", "style.safetensors:0.25"]
    assert main([*options, *asked, "-o", "a.png"]) == 0
    text = Image.open("a.png").info["parameters"]
    assert text.startswith("a <lora:other:0.5> cat <lora:style:0.25>\n")
    assert f'Lora hashes: "style: {short_hash(style)}, other: ' in text
    assert main([*options, "--from", "a.png", "--lora-dir", ".", "-o", "b.png"]) == 0
    assert Image.open("b.png").tobytes() == Image.open("a.png").tobytes()
    assert main([*options, "--from", "a.png", "-o", "c.png"]) == 2
    assert "a.png was painted with the LoRA 'other', which is not here" in capsys.readouterr().err
    (folder / "sub" / "other.safetensors").rename("other.safetensors")
    assert main([*options, "--from", "a.png", "-o", "c.png"]) == 0
    assert Image.open("c.png").tobytes() == Image.open("a.png").tobytes()
    assert main([*options, "--from", "a.png", "--lora", "style.safetensors:0", "-o", "d.png"]) == 0
    assert "<lora:style:0>" in Image.open("d.png").info["parameters"]
    style.write_bytes(style.read_bytes()[:-4] + b"\0\0\0\0")  # another of the same name
    assert main([*options, "--from", "a.png", "-o", "e.png"]) == 2


def test_weights_are_checked() -> None:
    assert parse_lora("a:b.safetensors:0.5") == Lora(Path("a:b.safetensors"), 0.5)
    assert str(parse_lora("x.safetensors:0.5:1")) == "x.safetensors:0.5:1"
    assert as_loras([("x", 2), Path("y"), "z"]) == (Lora(Path("x"), 2.0), Lora(Path("y")), Lora(Path("z")))
    for text in ("x:nan", "x:inf", "x:1e9", "x:", "x:two", "x:1:2:3", "x.safetensors0.5", ""):
        with pytest.raises(GgufSdError, match=r"LoRA|weights"):
            parse_lora(text)
    for value in (5, [5], [("x", "y", "z")], {"x": 1, 5: 2}):
        with pytest.raises((TypeError, ValueError, GgufSdError)):
            as_loras(value)


def test_names_lead_nowhere_else(folder: Path, tmp_path: Path) -> None:
    outside = tmp_path.parent / "outside.safetensors"
    outside.write_bytes(b"x")
    for name in ("../outside", str(outside.with_suffix("")), "nothing"):
        with pytest.raises(GgufSdError, match="in the prompt: there is no"):
            requested((), f"<lora:{name}:1>", folder)
    (folder / "other.safetensors").write_bytes(b"x")
    with pytest.raises(GgufSdError, match=r"may be .* give one of them with --lora"):
        requested((), "<lora:other:1>", folder)
    with pytest.raises(GgufSdError, match="names a LoRA; say with --lora-dir"):
        requested((), "<lora:style:1>", None)
    with pytest.raises(GgufSdError, match="the LoRA style is given twice"):
        requested(as_loras(str(folder / "style.safetensors")), "<lora:style:1>", folder)
    with pytest.raises(GgufSdError, match="does not exist"):
        requested((), "<lora:style:1>", folder / "nothing")


def test_unmatched_tensors_are_counted(
    tiny_file: Callable[..., Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(tiny_file())
    state = kohya(random_lora(config, all_targets(config, ["unet"])[:3]), config)
    state |= {"lora_unet_nowhere.lora_up.weight": torch.ones(2, 2), "lora_unet_x.diff": torch.ones(2)}
    path = save(state, tmp_path / "odd.safetensors")
    Pipeline.load(tiny_file(), "cpu", "float32").prepare(Request("x", loras=str(path)))
    (line,) = [message for message in caplog.messages if "odd.safetensors" in message]
    assert "2 tensors for no layer of this model, the first is lora_unet_nowhere.lora_up.weight" in line
    assert "3 layers take the others" in line
