"""UNets of other tools in K-quants: weights stay in their blocks, the output is that of the weights in full."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from math import prod
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from gguf_sd.checkpoint import metadata_keys
from gguf_sd.checkpoint.assign import assign
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.config import ModelConfig, TextConfig, UNetConfig
from gguf_sd.models.layers import QuantConv2d, Quantized, QuantLinear, resident
from gguf_sd.models.unet import UNet

CONFIG = UNetConfig(
    block_out_channels=(32, 256),
    transformer_layers=(0, 1),
    num_heads=(4, 8),
    context_dim=256,
    layers_per_block=1,
    norm_groups=8,
)
# gguf-py decodes these but writes none of them: bytes of the float16 fields, and about the spread of the values that
# random blocks with scales of 1 (and minima of as much as centres them) have.
TYPES: dict[str, tuple[tuple[int, ...], float]] = {
    "Q2_K": ((80, 82), 15.0),
    "Q3_K": ((108,), 43.0),
    "Q4_K": ((0, 2), 280.0),
    "Q5_K": ((0, 2), 580.0),
    "Q6_K": ((208,), 1400.0),
    "IQ4_NL": ((0,), 70.0),
    "IQ4_XS": ((0,), 1300.0),
}
MINIMA = {"Q2_K": 1.5, "Q4_K": 7.5, "Q5_K": 15.5}  # the mean code


def random_blocks(kind: str, rows: int, cols: int, rng: np.random.Generator) -> np.ndarray:
    """Random codes under scales that make values as large as those of real weights."""
    size, type_size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    blocks = rng.integers(0, 256, (rows * cols // size, type_size), dtype=np.uint8)
    fields, spread = TYPES[kind]
    d = np.float16(cols**-0.5 / spread)
    for at, value in zip(fields, (d, np.float16(d * MINIMA.get(kind, 0))), strict=False):
        blocks[:, at : at + 2] = np.frombuffer(value.tobytes(), np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path) -> set[str]:
    """A UNet named as in original checkpoints, its matrices and the convolutions that whole blocks fill in K-quants,
    flattened as ComfyUI-GGUF does it. Returns the names of what is quantised."""
    rng = np.random.default_rng(11)
    writer = gguf.GGUFWriter(path, "sd1")
    writer.add_string(
        metadata_keys.CONFIG,
        json.dumps(asdict(ModelConfig(unet=CONFIG, text=(TextConfig(hidden_size=256, num_attention_heads=4),)))),
    )
    quantised: set[str] = set()
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in UNet(CONFIG).named_parameters()}
    for name, shape in shapes.items():
        fits = len(shape) > 1 and prod(shape[1:]) % 256 == 0 and shape[0] >= 32
        if not fits or name.startswith("time_embed."):
            values = rng.standard_normal(shape, dtype=np.float32) * prod(shape[1:]) ** -0.5 * 0.5
            writer.add_tensor(UNET + name, values + (len(shape) == 1 and name.endswith("weight")))
            continue
        kind = list(TYPES)[len(quantised) % len(TYPES)]
        if len(shape) == 4:
            writer.add_array(f"comfy.gguf.orig_shape.{UNET}{name}", list(shape))
        blocks = random_blocks(kind, shape[0], prod(shape[1:]), rng)
        writer.add_tensor(UNET + name, blocks, raw_dtype=gguf.GGMLQuantizationType[kind])
        quantised.add(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return quantised


def in_full(path: Path) -> UNet:
    """The same UNet with all weights as gguf-py decodes them."""
    with torch.device("meta"):
        unet = UNet(CONFIG)
    shapes = {name: p.shape for name, p in unet.named_parameters()}
    sources = {}
    for tensor in gguf.GGUFReader(path).tensors:
        name = tensor.name.removeprefix(UNET)
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        sources[name] = partial(Tensor.view, value, shapes[name])
    assign(unet, sources, torch.float32, "the oracle")
    return unet.eval()


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    path = tmp_path_factory.mktemp("k") / "unet.gguf"
    return path, write(path)


@torch.inference_mode()
def test_k_quants_stay_quantised_and_give_the_output_of_full_weights(stored: tuple[Path, set[str]]) -> None:
    path, quantised = stored
    unet = ModelFile.open(path).load_unet(torch.float32)
    layers = {f"{name}.weight": m for name, m in unet.named_modules() if isinstance(m, Quantized)}
    assert set(layers) == quantised
    assert {m.qtype for m in layers.values() if isinstance(m, QuantLinear)} == set(TYPES)
    assert any(isinstance(m, QuantConv2d) for m in layers.values())

    gen = torch.Generator().manual_seed(1)
    latents, context = torch.randn(2, 4, 6, 10, generator=gen), torch.randn(2, 77, 256, generator=gen)
    timesteps = torch.tensor([981, 1])
    expected = in_full(path)(latents, timesteps, context)
    got = unet(latents, timesteps, context)
    assert torch.isfinite(expected).all()
    assert (got - expected).abs().max() < 1e-4 * expected.abs().max()
    moved = unet(latents, timesteps, context.flip(0))
    assert (moved - expected).abs().max() > 1e-2 * expected.abs().max(), "the quantised linears make no difference"

    for name, module in layers.items():  # dequantised once, at load
        unet.set_submodule(name.removesuffix(".weight"), resident(module, torch.float32))
    assert not any(isinstance(m, Quantized) for m in unet.modules())
    again = unet(latents, timesteps, context)
    assert (again - expected).abs().max() < 1e-4 * expected.abs().max()
