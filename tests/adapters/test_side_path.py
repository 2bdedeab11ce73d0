"""A whole UNet with LoRAs beside its layers, on every kind of kernels, against one with them merged in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from gguf_sd.adapters.lora import Lora, active
from gguf_sd.adapters.read_lora import check_loras, layer_factors
from gguf_sd.adapters.side_path import Adapted, attach, detach
from gguf_sd.adapters.targets import Target
from gguf_sd.config import SD15
from gguf_sd.models.unet import UNet
from gguf_sd.runtime.kernel_modes import make_resident, use_kernels
from gguf_sd.runtime.step_kernels import step_kernels
from tests.adapters.conftest import Changes, all_targets, kohya, save
from tests.kernels.test_packed_layers import CONFIG, inputs, unet

MODEL = replace(SD15, unet=CONFIG)
CPU = torch.device("cpu")
KINDS = ("lora", "mid", "loha", "loha full", "loha tucker", "lokr", "lokr low", "lokr tucker", "full")


def change(kind: str, target: Target, seed: int) -> tuple[dict[str, Tensor], np.ndarray]:
    """Tensors as LyCORIS writes them, and the difference that its formulas make of them, in float64."""
    random = np.random.default_rng(seed)
    (out, channels, *kernel), r = target.shape, 3
    taps = kernel or [1, 1]

    def normal(*shape: int) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32).astype(np.float64)

    def tucker(core: np.ndarray, b: np.ndarray, a: np.ndarray) -> np.ndarray:
        return np.einsum("ijkl,jr,ip->prkl", core, b, a)

    scale, flat = 2.0 / r, channels * taps[0] * taps[1]
    if kind in ("mid", "loha tucker", "lokr tucker") and not kernel:
        kind = kind.split()[0].replace("mid", "lora")
    tensors: dict[str, np.ndarray] = {"alpha": np.array(2.0)}
    if kind == "lora":
        down, up = normal(r, channels, *kernel), normal(out, r, *(1 for _ in kernel))
        tensors |= {"lora_down.weight": down, "lora_up.weight": up}
        delta = up.reshape(out, r) @ down.reshape(r, -1)
    elif kind == "full":
        delta, scale = normal(out, flat), 1.0
        tensors = {"diff": delta.reshape(target.shape)}
    elif kind == "mid":
        down, mid, up = normal(r, channels, 1, 1), normal(4, r, *kernel), normal(out, 4, 1, 1)
        tensors |= {"lora_down.weight": down, "lora_mid.weight": mid, "lora_up.weight": up}
        delta = np.einsum("nmkl,on,mi->oikl", mid, up.reshape(out, 4), down.reshape(r, -1))
    elif kind == "loha tucker":
        t1, t2, a1, a2 = normal(r, r, *kernel), normal(r, r, *kernel), normal(r, out), normal(r, out)
        b1, b2 = normal(r, channels), normal(r, channels)
        tensors |= {"hada_t1": t1, "hada_w1_a": a1, "hada_w1_b": b1, "hada_t2": t2, "hada_w2_a": a2, "hada_w2_b": b2}
        delta = tucker(t1, b1, a1) * tucker(t2, b2, a2)
    elif kind.startswith("loha"):
        r = 12 if kind.endswith("full") else r  # r * r is no low rank here
        scale = 2.0 / r
        a1, a2, b1, b2 = normal(out, r), normal(out, r), normal(r, flat), normal(r, flat)
        tensors |= {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2}
        delta = (a1 @ b1) * (a2 @ b2)
    else:
        left = normal(4, 2)
        if kind == "lokr":
            right, scale = normal(out // 4, channels // 2, *kernel), 1.0
            tensors |= {"lokr_w1": left, "lokr_w2": right}
        elif kind == "lokr tucker":
            core, a, b = normal(r, r, *kernel), normal(r, out // 4), normal(r, channels // 2)
            tensors |= {"lokr_w1": left, "lokr_t2": core, "lokr_w2_a": a, "lokr_w2_b": b}
            right = tucker(core, b, a)
        else:
            one, two, a, b = normal(4, r), normal(r, 2), normal(out // 4, r), normal(r, flat // 2)
            tensors |= {"lokr_w1_a": one, "lokr_w1_b": two, "lokr_w2_a": a, "lokr_w2_b": b}
            left, right = one @ two, (a @ b).reshape(out // 4, channels // 2, *kernel)
        delta = np.kron(left[(..., *(None for _ in right.shape[2:]))], right)
    size = 0.2 / (np.sqrt(flat) * delta.std() * scale)
    first = next(leaf for leaf in tensors if leaf.endswith(("up.weight", "_a", "w1", "diff")))
    tensors[first] = tensors[first] * size
    stored = {leaf: torch.from_numpy(value).float() for leaf, value in tensors.items()}
    return stored, (delta * scale * size).reshape(target.shape)


@pytest.fixture(scope="module")
def lora(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Target, np.ndarray]]:
    """One file with every kind of change, and the differences that it stands for."""
    changes, deltas = Changes(), {}
    divisible = [t for t in all_targets(MODEL, ["unet"]) if not (t.shape[0] % 4 or t.shape[1] % 2)]
    for seed, target in enumerate(divisible):
        changes[target], deltas[target] = change(KINDS[seed % len(KINDS)], target, seed)
    return save(kohya(changes, MODEL), tmp_path_factory.mktemp("lora") / "all.safetensors"), deltas


def merged(qtype: str, deltas: dict[Target, np.ndarray], weight: float) -> UNet:
    model = unet(qtype, True, torch.float32, CPU)
    make_resident(model, torch.float32)
    for target, delta in deltas.items():
        module = model.get_submodule(target.module)
        assert isinstance(module, nn.Linear | nn.Conv2d)
        module.weight.data += weight * torch.from_numpy(delta).float()
    return model


@pytest.mark.parametrize(
    ("qtype", "mode", "bound"),
    [
        ("Q4_0", "torch", 2e-5),
        ("Q4_0", "stacked", 2e-5),
        pytest.param("Q4_0", "fused", 5e-3, marks=pytest.mark.slow),
        pytest.param("Q8_0", "dequantize", 5e-3, marks=pytest.mark.slow),
        pytest.param("Q8_0", "int8", 3e-2, marks=pytest.mark.slow),
        pytest.param("Q8_0", "resident", 5e-3, marks=pytest.mark.slow),
    ],
)
@torch.inference_mode()
def test_every_kind_on_every_kernel(
    lora: tuple[Path, dict[Target, np.ndarray]], qtype: str, mode: str, bound: float
) -> None:
    path, deltas = lora
    assert check_loras([Lora(path)], MODEL) == []
    latents, timesteps, context = inputs(CPU)
    want = merged(qtype, deltas, 0.7)(latents.float(), timesteps, context.float())
    plain = mode in ("torch", "stacked")
    dtype = torch.float32 if plain else torch.float16
    model = unet(qtype, True, dtype, CPU)
    if mode == "resident":
        make_resident(model, dtype)
    if not plain:
        use_kernels(model, mode)
    elif mode == "stacked":
        model.stack()
    assert (model.emb_layers is None) == (mode == "torch")
    latents, context = latents.to(dtype), context.to(dtype)
    before = model(latents, timesteps, context) if plain else None
    attach(model, layer_factors(active([Lora(path, 0.7)], "unet"), "unet", MODEL), dtype, CPU)
    assert sum(isinstance(module, Adapted) for module in model.modules()) > 30
    got = model(latents, timesteps, context)
    assert (got.double() - want.double()).norm() <= bound * want.double().norm()
    if mode == "fused":  # what tunes the kernels sees the layers under the LoRA
        assert step_kernels(model, 2, 5, 6, dtype).uses
    detach(model)
    if before is not None:
        assert (got - before).norm() > 0.1 * before.norm()
        assert torch.equal(model(latents, timesteps, context), before)
    assert not any(isinstance(module, Adapted) for module in model.modules())


@torch.inference_mode()
def test_small_scales_survive_float16(tmp_path: Path) -> None:
    """A scale of 1/10000 on small factors: their product is in range of float16, the scaled factor alone is not."""
    (target,) = [t for t in all_targets(MODEL, ["unet"]) if t.module == "middle_block.1.proj_in"]
    up = torch.randn(64, 4, generator=torch.Generator().manual_seed(1)) * 1e-3
    down = torch.randn(4, 64, generator=torch.Generator().manual_seed(2)) * 30
    tensors = {"lora_up.weight": up, "lora_down.weight": down, "alpha": torch.tensor(4e-4)}
    path = save(kohya({target: tensors}, MODEL), tmp_path / "small.safetensors")
    model = nn.Module()
    model.middle_block = nn.ModuleList([nn.Identity(), nn.Module()])
    layer = nn.Linear(64, 64, bias=False, dtype=torch.float16)
    nn.init.zeros_(layer.weight)
    model.middle_block[1].proj_in = layer
    attach(model, layer_factors(active([Lora(path)], "unet"), "unet", MODEL), torch.float16, CPU)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(3))
    want = x @ (1e-4 * up @ down).T
    got = model.middle_block[1].proj_in(x.half()).float()
    assert (got - want).norm() < 5e-3 * want.norm()
