"""Random weights made on the device: blocks, and whole UNets in which activations neither explode nor vanish."""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from gguf_sd.checkpoint.assign import Source, assign
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.config import UNetConfig
from gguf_sd.models.layers import Quantized
from gguf_sd.models.unet import UNet
from gguf_sd_convert.quantize.policy import plan
from gguf_sd_kernels.formats import block_format
from gguf_sd_kernels.repack import PackedWeight, repack

# Last layers of residual branches, in the UNet, the autoencoder and both kinds of text encoder, under the names of
# original checkpoints and of diffusers.
DAMPED = (".out_layers.3.", ".proj_out.", ".ff.net.2.", ".to_out.0.", ".conv2.", ".out_proj.", ".fc2.", ".c_proj.")
DAMPING = 0.2
EMBEDDINGS = ("embedding.weight", "positional_embedding")
# Root mean square of uniformly random codes less their zero point.
CODE_RMS = {"Q4_0": 4.64, "Q4_1": 4.61, "Q8_0": 73.9}


def weight_std(name: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of the random weight called ``name``, two dimensions or more: by its fan-in."""
    std = 0.02 if name.endswith(EMBEDDINGS) else prod(shape[1:]) ** -0.5
    return std * DAMPING if any(part in name for part in DAMPED) else std


def random_blocks(qtype: str, rows: int, cols: int, device: torch.device, std: float | None = None) -> Tensor:
    """Random codes under normal scales, uint8 [rows, row_bytes]; ``std`` is the values' root mean square, cols^-0.5
    by default."""
    fmt = block_format(qtype)
    blocks = torch.randint(0, 256, (rows * cols // 32, fmt.type_size), dtype=torch.uint8, device=device)
    halves = (fmt.scale_bytes + fmt.min_bytes) // 2
    scales = torch.randn(len(blocks), halves, device=device).mul((std or cols**-0.5) / CODE_RMS[qtype])
    if fmt.min_bytes:
        scales[:, 1] = -7.5 * scales[:, 0]  # the minimum: half the range below zero
    blocks[:, : 2 * halves] = scales.half().view(torch.uint8)
    return blocks.view(rows, -1)


def packed_weight(qtype: str, shape: tuple[int, ...], device: torch.device) -> tuple[PackedWeight, Tensor]:
    """A random weight: packed, tap-major where it is a convolution's, and decoded in float64 in ``shape``."""
    from gguf_sd_kernels.reference import products as reference

    blocks = random_blocks(qtype, shape[0], prod(shape[1:]), device)
    decoded = reference.dequantize(blocks, qtype, torch.float32).double()
    if len(shape) == 4:
        oc, ic, kh, kw = shape
        decoded = decoded.view(oc, kh, kw, ic).permute(0, 3, 1, 2)
    return repack(blocks, qtype, shape, tap_major=len(shape) == 4), decoded


def random_unet(config: UNetConfig, qtype: str, dtype: torch.dtype, device: torch.device, seed: int = 0) -> UNet:
    """A UNet of plain torch layers with random weights, of type ``qtype`` (such as "Q4_0") where the converter
    quantises them, the rest in ``dtype``. The same seed gives the same UNet."""
    torch.manual_seed(seed)
    with torch.device("meta"):
        unet = UNet(config)
    shapes = {UNET + name: tuple(parameter.shape) for name, parameter in unet.named_parameters()}

    def source(name: str, stored: str, shape: tuple[int, ...], tap_major: bool) -> Source:
        def quantised() -> QuantTensor:
            blocks = random_blocks(stored, shape[0], prod(shape[1:]), device, weight_std(name, shape))
            return QuantTensor(blocks, stored, shape, tap_major)

        def plain() -> Tensor:
            values = torch.randn(shape, device=device)
            if len(shape) > 1:
                return values * weight_std(name, shape)
            return 0.1 * values + float(name.endswith(".weight"))  # of the 1-D tensors only norms are called so

        return quantised if stored in CODE_RMS else plain

    sources = {
        stored.name.removeprefix(UNET): source(stored.name, stored.type, stored.logical, stored.tap_major)
        for stored in plan(shapes, qtype.lower(), "native")
    }
    assign(unet, sources, dtype, "the random UNet")
    return unet.eval()


def unet_inputs(config: UNetConfig, batch: int, side: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Latents [batch, C, side, side], timesteps, contexts of 77 tokens and SDXL's vectors."""
    inputs = [
        torch.randn(batch, config.in_channels, side, side, device=device).to(dtype),
        torch.full((batch,), 500, device=device),
        torch.randn(batch, 77, config.context_dim, device=device).to(dtype),
    ]
    if config.vector_dim:
        inputs.append(torch.randn(batch, config.vector_dim, device=device).to(dtype))
    return inputs


def weights_bytes(model: torch.nn.Module) -> int:
    """Bytes of all weights, packed ones included."""
    tensors = [*model.parameters(), *model.buffers()]
    packed = [m.packed.nbytes for m in model.modules() if isinstance(m, Quantized) and m.packed is not None]
    return sum(t.numel() * t.element_size() for t in tensors) + sum(packed)
