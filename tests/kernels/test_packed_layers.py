"""A whole UNet on the Triton kernels against the same one in plain torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.config import UNetConfig
from gguf_sd.models.layers import GroupNorm, LayerNorm, Quantized, QuantLinear, quantized, resident
from gguf_sd.models.unet import UNet
from gguf_sd.models.unet_blocks import Attention, ResBlock
from gguf_sd.runtime.kernel_modes import make_resident, use_kernels
from gguf_sd_convert.quantize.quantizers import quantize

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


def inputs(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Latents of an odd size, timesteps and contexts."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, torch.float16)

    return normal(2, 4, 5, 6), torch.tensor([900, 3], device=device), normal(2, 7, 32)


def error(got: Tensor, qtype: str, tap_major: bool, device: torch.device) -> float:
    """Relative error of a prediction for the inputs, against plain torch in float32."""
    latents, timesteps, context = inputs(device)
    want = unet(qtype, tap_major, torch.float32, device)(latents.float(), timesteps, context.float()).double()
    return float((got.double() - want).norm() / want.norm())


@pytest.mark.parametrize(
    ("qtype", "tap_major", "mode"),
    [
        ("Q4_0", True, "fused"),
        ("Q8_0", True, "fused"),
        ("Q4_1", True, "dequantize"),
        pytest.param("Q4_0", False, "fused", marks=pytest.mark.slow),
        ("Q8_0", True, "int8"),
    ],
)
@torch.inference_mode()
def test_unet_on_the_kernels(qtype: str, tap_major: bool, mode: str, device: torch.device) -> None:
    model = unet(qtype, tap_major, torch.float16, device)
    blocks = {name: m.weight.blocks.clone() for name, m in model.named_modules() if isinstance(m, Quantized)}
    for name in [name for name in blocks if name.endswith("attn1.to_q")]:  # becomes one product
        blocks[f"{name}kv"] = torch.cat([blocks.pop(name[:-1] + which) for which in "qkv"])
    blocks["emb_layers"] = torch.cat([blocks.pop(name) for name in list(blocks) if "emb_layers" in name])
    use_kernels(model, mode)
    packed = {name: m for name, m in model.named_modules() if isinstance(m, Quantized)}
    assert packed.keys() == blocks.keys()
    assert all(m.packed is not None and not m.blocks.numel() for m in packed.values())
    assert all(torch.equal(m.weight.blocks, blocks[name]) for name, m in packed.items()), "packing lost something"
    assert all(m.fused for m in model.modules() if isinstance(m, GroupNorm | LayerNorm))
    assert error(model(*inputs(device)), qtype, tap_major, device) < (5e-2 if mode == "int8" else 1e-2)


@pytest.mark.parametrize("kept", [pytest.param("to_q", marks=pytest.mark.slow), "to_k"])
@torch.inference_mode()
def test_projections_of_different_types_stay_apart(kept: str, device: torch.device) -> None:
    """One of them in F16, or in blocks of another type, as files of other tools have it."""
    model = unet("Q4_0", True, torch.float16, device)
    attention = next(m for m in model.modules() if isinstance(m, Attention) and not m.crosses)
    other = quantize(getattr(attention, kept).weight.dequantize(), "Q8_0")
    setattr(attention, kept, QuantLinear(QuantTensor(other.to(device), "Q8_0", getattr(attention, kept).shape), None))
    block = next(m for m in model.modules() if isinstance(m, ResBlock))
    linear = block.emb_layers[1]
    block.emb_layers[1] = resident(linear, torch.float16)
    use_kernels(model, "fused")
    assert attention.to_qkv is None
    assert model.emb_layers is None
    assert error(model(*inputs(device)), "Q4_0", True, device) < 2e-2


def test_int8_leaves_the_sensitive_layers_alone(device: torch.device) -> None:
    model = unet("Q8_0", True, torch.float16, device)
    use_kernels(model, "int8")
    modes = {name: m.mode for name, m in model.named_modules() if isinstance(m, Quantized)}
    sixteen_bits = {name for name, mode in modes.items() if mode != "int8"}
    assert sixteen_bits == {name for name in modes if "attn2.to_k" in name or "attn2.to_v" in name} | {"out.2"}
    assert {modes[name] for name in sixteen_bits} == {"fused"}


@pytest.mark.parametrize("tap_major", [pytest.param(True, marks=pytest.mark.slow), False])
@torch.inference_mode()
def test_resident_by_the_kernels(tap_major: bool, device: torch.device) -> None:
    """Decoded by Triton or by torch, weights are the same bits."""
    by_torch, by_triton = (unet("Q4_1", tap_major, torch.float16, device) for _ in range(2))
    make_resident(by_torch, torch.float16)
    make_resident(by_triton, torch.float16, "resident")
    use_kernels(by_triton, "resident")
    expected = by_torch.state_dict()
    for name in [name for name in expected if name.endswith("attn1.to_q.weight")]:
        parts = [expected.pop(name.replace("to_q", f"to_{which}")) for which in "qkv"]
        expected[name.replace("to_q", "to_qkv")] = torch.cat(parts)
    for leaf in ("weight", "bias"):
        names = [name for name in expected if name.endswith(f"emb_layers.1.{leaf}")]
        expected[f"emb_layers.{leaf}"] = torch.cat([expected.pop(name) for name in names])
    got = by_triton.state_dict()
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], weight) for name, weight in expected.items())
    assert error(by_triton(*inputs(device)), "Q4_1", tap_major, device) < 1e-2


class Copies(TorchDispatchMode):
    """Notes the operators that brought a tensor into another layout."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        kind = str(func).split(".")[1]
        reorders = kind in ("contiguous", "clone", "reshape", "flatten", "_to_copy", "to")
        if reorders and result.data_ptr() != args[0].data_ptr():
            self.seen.append(f"{kind} {list(result.shape)}")
        return result


@torch.inference_mode()
def test_nothing_is_copied_between_layers(device: torch.device) -> None:
    """Channels-last from end to end: but for the latents that come in, no layer reorders what it is given."""
    model = unet("Q4_0", True, torch.float16, device)
    use_kernels(model, "fused")
    latents, timesteps, context = inputs(device)
    model(latents, timesteps, context)  # norms are folded into the layers behind them
    with Copies() as copies:
        model(latents, timesteps, context)
    assert [seen for seen in copies.seen if not seen.startswith("to ")] == ["contiguous [2, 4, 5, 6]"]
    assert all(seen.endswith(("[2]", "[2, 32]")) for seen in copies.seen if seen.startswith("to ")), copies.seen
