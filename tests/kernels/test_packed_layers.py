"""A whole UNet on the Triton kernels against the same one in plain torch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from gguf_sd.config import UNetConfig
from gguf_sd.kernel_modes import use_kernels
from gguf_sd.layers import Quantized, quantized
from gguf_sd.models.unet import UNet
from gguf_sd.quant_tensor import QuantTensor
from gguf_sd_convert.quantizers import quantize

CONFIG = UNetConfig(
    block_out_channels=(32, 64),
    layers_per_block=1,
    transformer_layers=(1, 0),
    num_heads=(2, 2),
    context_dim=32,
    norm_groups=8,
)


def unet(qtype: str, tap_major: bool, dtype: torch.dtype, device: torch.device) -> UNet:
    """Random weights, everything quantised that 32 divides; convolutions in either order of their rows."""
    torch.manual_seed(1)
    model = UNet(CONFIG)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        weight = module.weight.detach()
        if weight[0].numel() % 32:
            continue
        taps = tap_major and weight.dim() == 4
        rows = (weight.permute(0, 2, 3, 1) if taps else weight).reshape(len(weight), -1)
        stored = QuantTensor(quantize(rows, qtype), qtype, tuple(weight.shape), taps)
        model.set_submodule(name, quantized(module, stored))
    return model.to(device, dtype).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("qtype", "tap_major", "mode"),
    [("Q4_0", True, "fused"), ("Q8_0", True, "fused"), ("Q4_1", True, "dequantize"), ("Q4_0", False, "fused")],
)
@torch.inference_mode()
def test_unet_on_the_kernels(qtype: str, tap_major: bool, mode: str, device: torch.device) -> None:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float16)

    generator = torch.Generator().manual_seed(2)
    inputs = normal(2, 4, 5, 6), torch.tensor([900, 3], device=device), normal(2, 7, 32)
    expected = unet(qtype, tap_major, torch.float32, device)(inputs[0].float(), inputs[1], inputs[2].float())
    model = unet(qtype, tap_major, torch.float16, device)
    blocks = {name: m.weight.blocks.clone() for name, m in model.named_modules() if isinstance(m, Quantized)}
    use_kernels(model, mode)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, Quantized)}
    assert all(m.packed is not None and not m.blocks.numel() for m in packed.values())
    assert all(torch.equal(m.weight.blocks, blocks[name]) for name, m in packed.items()), "packing lost something"
    got = model(*inputs).double()
    assert float((got - expected.double()).norm() / expected.double().norm()) < 1e-2
