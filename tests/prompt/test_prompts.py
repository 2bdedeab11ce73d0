"""Prompt syntax, long prompts and clip skip; diffusers and transformers are the oracles."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from gguf_sd import Pipeline
from gguf_sd.errors import GgufSdError
from gguf_sd.prompt.conditioning import weighted
from gguf_sd.prompt.prompts import Part, parse
from gguf_sd.request import Request
from gguf_sd_convert.convert import ConvertOptions, convert


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a plain: prompt, 10:30 B BREAKFAST", [("a plain: prompt, 10:30 B BREAKFAST", 1)]),
        ("", []),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a ((red)) [cat]", [("a ", 1), ("red", 1.21), (" ", 1), ("cat", 1 / 1.1)]),
        ("(a (red:1.5) cat:0.5)", [("a ", 0.5), ("red", 0.75), (" cat", 0.5)]),
        ("(x:.7)(y: -2 )", [("x", 0.7), ("y", -2)]),
        (r"smile \(art\) \\ \[x\]", [(r"smile (art) \ [x]", 1)]),
        ("never (closed", [("never ", 1), ("closed", 1.1)]),
        ("closed) twice]", [("closed) twice]", 1)]),
        ("a ratio (of 3:2 here)", [("a ratio ", 1), ("of 3:2 here", 1.1)]),
        ("one BREAK two", [("one ", 1), (None, 1), (" two", 1)]),
    ],
)
def test_syntax(prompt: str, parts: list[tuple[str | None, float]]) -> None:
    got = parse(prompt)
    assert [p.text for p in got] == [text for text, _ in parts]
    assert [p.weight for p in got] == pytest.approx([weight for _, weight in parts])
    assert all(isinstance(p, Part) for p in got)


def test_weights_keep_the_mean() -> None:
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1)) + 0.5
    weights = torch.tensor([[1, 1.5, 1, 1, 1], [1, 1, 1, 1, 1.0]])
    got = weighted(states, weights)
    assert torch.allclose(got.mean((1, 2)), states.mean((1, 2)), atol=1e-6)
    assert torch.allclose(got[0, 1] / states[0, 1], 1.5 * got[0, 0] / states[0, 0], rtol=1e-4)
    assert weighted(states, torch.ones(2, 5)) is states


@pytest.fixture(scope="module")
def engine(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """A function to diffusers' pipeline, its text encoders rounded to F16, and ours, converted."""

    def make(**fields: Any) -> tuple[Any, Pipeline]:
        folder = tiny_pipeline(**fields)
        path = tmp_path_factory.mktemp("f16") / "model.gguf"
        convert(folder, path, ConvertOptions(type="f16"))
        theirs = diffusers.DiffusionPipeline.from_pretrained(folder)
        for part in ("text_encoder", "text_encoder_2"):
            module = getattr(theirs, part, None)
            for parameter in module.parameters() if module is not None else ():
                if parameter.dim() > 1:
                    parameter.data = parameter.data.half().float()
        return theirs, Pipeline.load(path, device="cpu", dtype="float32")

    return make


def encode(pipeline: Pipeline, prompt: str, **settings: Any) -> Any:
    return pipeline.encode(pipeline.prepare(Request(prompt, **settings)))


@pytest.mark.parametrize("clip_skip", [None, 1, 2])
@torch.inference_mode()
def test_clip_skip(engine: Callable[..., Any], clip_skip: int | None) -> None:
    """The states after the layer counted from the end, through the final LayerNorm: transformers is the oracle."""
    theirs, ours = engine()
    clip = theirs.text_encoder
    got = encode(ours, "a red cat", negative_prompt="dog", guidance=5.0, clip_skip=clip_skip)
    for prompt, encoded in (("a red cat", got.positive), ("dog", got.negative)):
        ids = theirs.tokenizer(prompt, padding="max_length", return_tensors="pt").input_ids
        states = clip(ids, output_hidden_states=True).hidden_states[-(clip_skip or 1)]
        expected = getattr(clip, "text_model", clip).final_layer_norm(states)
        assert torch.allclose(encoded.context, expected, atol=1e-5)
    assert torch.allclose(clip(ids).last_hidden_state, expected, atol=1e-5) == (clip_skip != 2)
    with pytest.raises(GgufSdError, match="clip skip must lie in 1 … 2"):
        encode(ours, "a red cat", clip_skip=3)


def test_sdxl_prompt_and_pooled_text(engine: Callable[..., Any]) -> None:
    theirs, ours = engine(xl=True, scheduler="EulerDiscreteScheduler")
    expected, _, pooled, _ = theirs.encode_prompt("a red cat", device="cpu", do_classifier_free_guidance=False)
    got = encode(ours, "a red cat", guidance=1.0).positive
    assert torch.allclose(got.context, expected, atol=1e-5)
    assert torch.allclose(got.vector[:, : pooled.shape[1]], pooled, atol=1e-5)


def test_long_prompts_are_encoded_in_chunks(engine: Callable[..., Any]) -> None:
    theirs, ours = engine()
    long = " ".join(["cat"] * 75 + ["dog"] * 10)
    both = encode(ours, long, negative_prompt="x", guidance=5.0)
    parts = [theirs.encode_prompt(p, "cpu", 1, False)[0] for p in (" ".join(["cat"] * 75), " ".join(["dog"] * 10), "")]
    assert both.positive.context.shape == both.negative.context.shape == (1, 154, 32)
    assert torch.allclose(both.positive.context, torch.cat(parts[:2], dim=1), atol=1e-5)
    assert torch.allclose(both.negative.context[:, 77:], parts[2], atol=1e-5)
    broken = encode(ours, "cat BREAK dog", guidance=1.0).positive.context
    parts = [theirs.encode_prompt(p, "cpu", 1, False)[0] for p in ("cat", "dog")]
    assert torch.allclose(broken, torch.cat(parts, dim=1), atol=1e-5)


def test_weights_of_one_change_nothing(engine: Callable[..., Any]) -> None:
    _, ours = engine()
    plain = encode(ours, "a red cat", guidance=1.0).positive.context
    assert torch.equal(encode(ours, "a (red:1.0) cat", guidance=1.0).positive.context, plain)
    assert not torch.allclose(encode(ours, "a (red:1.4) cat", guidance=1.0).positive.context, plain, atol=1e-3)


def test_brackets_without_end_take_time_in_proportion() -> None:
    """A quarter of a million of them; in the square of their number it would be hours."""
    started = time.process_time()
    parts = parse("(" * 100_000 + "a" + "[b" * 50_000 + ")" * 30_000 + "]" * 30_000)
    assert time.process_time() - started < 20
    assert parts[0].weight == math.inf


def test_a_prompt_without_end_is_refused(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    convert(tiny_pipeline(), path, ConvertOptions(type="q8_0"))
    pipeline = Pipeline.load(path, device="cpu", dtype="float32")
    with pytest.raises(GgufSdError, match=r"chunks of up to .* shorten it"):
        pipeline("cat " * 8000, steps=1, width=16, height=16)


@pytest.mark.parametrize("space", ["", " ", "\n", "\x1c", "\x1d\x1e\x1f", "\x85", "\u2003", "\u3000"])
def test_any_space_before_a_weight(space: str) -> None:
    """Regular expressions know more spaces than float() does."""
    assert parse(f"(x:{space}1.5{space})") == [Part("x", 1.5)]
