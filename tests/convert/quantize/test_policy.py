"""Which type a tensor gets."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from gguf_sd import Pipeline
from gguf_sd.errors import GgufSdError
from gguf_sd.quality import psnr
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.quantize.policy import TYPES, plan, type_name

U = "model.diffusion_model."
SHAPES = {
    f"{U}middle_block.1.proj_in.weight": (1280, 1280, 1, 1),
    f"{U}input_blocks.1.1.proj_in.weight": (320, 320, 1, 1),
    f"{U}input_blocks.1.0.in_layers.2.weight": (320, 320, 3, 3),
    f"{U}out.2.weight": (4, 320, 3, 3),
    "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (3072, 768),
    "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight": (49408, 768),
    "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight": (77, 768),
    "first_stage_model.decoder.conv_in.weight": (512, 4, 3, 3),
}


@pytest.mark.parametrize(("qtype", "second"), [("q4_k", "Q4_1"), ("q5_k", "Q5_1"), ("q6_k", "Q8_0")])
def test_rows_that_super_blocks_do_not_fill_fall_back_and_say_so(qtype: str, second: str) -> None:
    wide, narrow, conv, *_ = plan(SHAPES, qtype, "native")
    assert (wide.type, wide.reason) == (qtype.upper(), "")
    for stored in (narrow, conv):
        assert stored.type == second
        assert stored.reason == f"rows that blocks of 256 do not fill, in {second}"


def test_text_encoders_are_f16_unless_asked() -> None:
    assert {s.type for s in plan(SHAPES, "q4_0", "native")[3:]} == {"F16"}
    types = {s.name.split(".")[-2]: s.type for s in plan(SHAPES, "q4_0", "native", text_type="q8_0")}
    assert types["fc1"] == types["token_embedding"] == "Q8_0"
    assert types["position_embedding"] == types["conv_in"] == "F16"


def test_every_type_has_a_name_of_its_own() -> None:
    assert [type_name(kind.upper()) for kind in TYPES] == list(TYPES)
    with pytest.raises(GgufSdError, match=r"no type 'q3_k'; choose from f16, .*q4_k"):
        type_name("q3_k")


@pytest.mark.parametrize("qtype", ["q5_k", pytest.param("iq4_nl", marks=pytest.mark.slow)])
def test_a_file_with_quantised_text_encoder_paints_the_same_on_every_path(
    qtype: str, tiny_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    model = tiny_pipeline(unet={"sample_size": 8})
    report = convert(model, tmp_path / "small.gguf", ConvertOptions(type=qtype, text_type="q8_0"))
    convert(model, tmp_path / "f16.gguf", ConvertOptions(type=qtype))
    assert report.types["Q8_0"][0] > 10

    def paint(name: str, **how: str) -> Image.Image:
        pipeline = Pipeline.load(tmp_path / name, device="cpu", dtype="float32", **how)
        return pipeline("a red cat", seed=1, steps=1)[0]

    picture = paint("small.gguf", weights="resident")
    for how in ({"weights": "quantized"}, {"placement": "streamed"}):
        assert psnr(paint("small.gguf", **how), picture) > 45
    assert 30 < psnr(paint("f16.gguf"), picture) < 90
