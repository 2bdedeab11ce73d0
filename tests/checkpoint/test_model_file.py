"""Files that open with a warning, and weights that are no numbers."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gguf_sd.checkpoint.assign import assign
from gguf_sd.checkpoint.finite import check_blocks, is_finite
from gguf_sd.checkpoint.identify import identify
from gguf_sd.checkpoint.inventory import expected_tensors
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.checkpoint.tensor_names import UNET, VAE
from gguf_sd.config import SD15
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_kernels.formats import FORMATS, BlockFormat

Make = Callable[..., Any]
NORM = UNET + "out.0.weight"
CONV = VAE + "decoder.conv_in.weight"
FIRST = UNET + "input_blocks.0.0.weight"


def rewritten(source: Path, target: Path, change: Callable[[dict[str, np.ndarray]], object]) -> Path:
    """A GGUF file with its tensors changed; types of tensors that are not touched stay."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, "gguf_sd")
    for key, field in reader.fields.items():
        if key.startswith(("gguf_sd.", "tokenizer.")):
            value = field.contents()
            writer.add_string(key, value) if isinstance(value, str) else writer.add_uint32(key, value)
    types = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    change(tensors)
    for name, data in tensors.items():
        kind = types.get(name)
        plain = kind in (None, gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16)
        writer.add_tensor(name, data, raw_dtype=None if plain else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


@pytest.fixture(scope="module")
def plain(tiny_pipeline: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "m.gguf"
    convert(tiny_pipeline(), path, ConvertOptions(type="q4_0"))
    return path


def test_strays_are_one_warning(plain: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    strays = {"ema_scalar": 1, UNET + "adapter.weight": 2, VAE + "loss_scale": 3, "zeta": 4, "alphas_cumprod": 5}
    arrays = {name: np.ones(n, dtype=np.float32) for name, n in strays.items()}
    path = rewritten(plain, tmp_path / "strays.gguf", lambda tensors: tensors.update(arrays))
    with caplog.at_level(logging.WARNING):
        model = ModelFile.open(path)
        model.load_unet(torch.float32)
        model.load_vae(torch.float32)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert f"holds 4 tensors that do not belong and are left out: ema_scalar, {UNET}adapter.weight," in said[0]
    assert said[0].endswith("…")


def test_what_is_missing_or_misshapen_is_refused_when_opened(plain: Path, tmp_path: Path) -> None:
    path = rewritten(plain, tmp_path / "a.gguf", lambda tensors: tensors.pop(NORM))
    with pytest.raises(GgufSdError, match=f"lacks 1 of .* {re.escape(NORM)}"):
        ModelFile.open(path)
    short = np.ones(7, dtype=np.float32)
    path = rewritten(plain, tmp_path / "b.gguf", lambda tensors: tensors.update({NORM: short}))
    with pytest.raises(GgufSdError, match=rf"{re.escape(NORM)} has shape \[7\] where the model takes \[32\]"):
        ModelFile.open(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_no_numbers_are_found_by_name(plain: Path, tmp_path: Path, value: float) -> None:
    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[NORM].reshape(-1)[3] = value
        tensors[CONV].reshape(-1)[-1] = value

    model = ModelFile.open(rewritten(plain, tmp_path / "m.gguf", change))
    with pytest.raises(GgufSdError, match=f"{re.escape(NORM)} holds NaN or infinity"):
        model.load_unet(torch.float32)
    with pytest.raises(GgufSdError, match=f"{re.escape(CONV)} holds NaN or infinity"):
        model.load_vae(torch.float32)


def test_values_beyond_float16_name_the_way_out(plain: Path, tmp_path: Path) -> None:
    path = rewritten(plain, tmp_path / "m.gguf", lambda tensors: tensors[NORM].reshape(-1).put(2, 1e6))
    model = ModelFile.open(path)
    with pytest.raises(GgufSdError, match=rf"{re.escape(NORM)} has values up to 1e\+06, beyond .* float16; .*--dtype"):
        model.load_unet(torch.float16)
    model.load_unet(torch.bfloat16)


def test_scales_of_blocks(plain: Path, tmp_path: Path) -> None:
    name = UNET + "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name][0, :2] = np.frombuffer(np.float16(np.nan).tobytes(), dtype=np.uint8)

    model = ModelFile.open(rewritten(plain, tmp_path / "m.gguf", change))
    with pytest.raises(GgufSdError, match=f"{re.escape(name)} holds NaN or infinity"):
        model.load_unet(torch.float32)


@pytest.mark.parametrize("qtype", FORMATS)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_every_format_is_searched(qtype: str, value: float) -> None:
    """Blocks of random bytes whose decoded values are numbers pass; with a bad scale they do not."""
    fmt = FORMATS[qtype]
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (5, 3, fmt.type_size), dtype=torch.uint8, generator=generator)
    fields = (fmt.scale_bytes, fmt.min_bytes) if isinstance(fmt, BlockFormat) else fmt.field_bytes
    starts = [sum(fields[:i]) for i, size in enumerate(fields) if size == 2 and (qtype, i) != ("IQ4_XS", 1)]
    assert starts
    for start in starts:
        blocks[..., start : start + 2] = torch.tensor(list(np.float16(0.5).tobytes()), dtype=torch.uint8)
    weight = QuantTensor(blocks.flatten(1), qtype, (5, 3 * fmt.block_size))
    check_blocks(weight, "w", "f")
    for start in starts:
        spoiled = blocks.clone()
        spoiled[2, 1, start : start + 2] = torch.tensor(list(np.float16(value).tobytes()), dtype=torch.uint8)
        with pytest.raises(GgufSdError, match="tensor w holds NaN or infinity"):
            check_blocks(replace(weight, blocks=spoiled.flatten(1)), "w", "f")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_is_finite(dtype: torch.dtype) -> None:
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert is_finite(x)
    assert is_finite(x[:0])
    for value in (np.nan, np.inf, -np.inf):
        y: Tensor = x.clone()
        y[617] = value
        assert not is_finite(y)


def test_assign_warns_of_what_it_leaves_out(caplog: pytest.LogCaptureFixture) -> None:
    values = {"weight": torch.ones(2, 2), "bias": torch.ones(2), "decay": torch.ones(1)}
    with torch.device("meta"):
        linear = nn.Linear(2, 2)
    assign(linear, {name: partial(values.__getitem__, name) for name in values}, torch.float32, "f")
    assert [record.getMessage() for record in caplog.records] == [
        "f holds a tensor that does not belong and is left out: decay"
    ]


def test_first_convolutions_without_dimensions() -> None:
    shapes: dict[str, tuple[int, ...]] = dict(expected_tensors(SD15))
    for shape in ((), (320,)):
        with pytest.raises(GgufSdError, match="unknown shape"):
            identify(shapes | {FIRST: shape}, "x")
    context = UNET + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    with pytest.raises(GgufSdError, match="unknown shape"):
        identify(shapes | {context: ()}, "x")


def test_markers() -> None:
    shapes: dict[str, tuple[int, ...]] = dict(expected_tensors(SD15))
    assert identify(shapes | {"v_pred": (0,)}, "x").scheduler.prediction_type == "v_prediction"
    with pytest.raises(GgufSdError, match="x was trained with zero terminal SNR"):
        identify(shapes | {"v_pred": (0,), "ztsnr": (0,)}, "x")
