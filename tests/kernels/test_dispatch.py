"""Every way to make a product with a packed weight gives the same, and the right one is taken."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from gguf_sd_kernels import dispatch
from gguf_sd_kernels.devices import Gpu, architecture_family, gpu_of
from gguf_sd_kernels.dispatch import MODES, conv2d_packed, linear_packed
from gguf_sd_kernels.repack import repack
from gguf_sd_kernels.tuning import launch as launches
from gguf_sd_kernels.tuning.launch import Launch, Measured, Product


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("qtype", ["Q4_1", "Q4_0"])
def test_linear(mode: str, dtype: torch.dtype, qtype: str, material: Any) -> None:
    blocks, weight = material.weight(qtype, 40, 64, seed=1)
    x, bias = material.normal(2, 3, 64, seed=2, dtype=dtype), material.normal(40, seed=3, dtype=dtype)
    residual, y = material.normal(2, 3, 40, seed=4, dtype=dtype), F.linear(x.double(), weight, bias.double())
    got = linear_packed(x, repack(blocks, qtype), bias, residual, mode=mode)
    in_8_bits = mode == "int8" and qtype == "Q4_0" and dtype == torch.float16  # else it is done in 16 or 32
    low, high = (1e-3, 2e-2) if in_8_bits else (0, 1e-3)
    assert low <= material.error(got, y + residual) < high
    value, gate = y.chunk(2, dim=-1)
    got = linear_packed(x, repack(blocks, qtype), bias, geglu=True, mode=mode)
    assert low <= material.error(got, value * F.gelu(gate)) < high


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("tap_major", [True, False])
@pytest.mark.parametrize("channels", [32, 16])
def test_conv(mode: str, tap_major: bool, channels: int, material: Any) -> None:
    """Without 32 channels or tap-major order there is no fused convolution; the result is right all the same."""
    shape = (24, channels, 2, 2)
    blocks, flat = material.weight("Q8_0", 24, 4 * channels, seed=5)
    full = flat.view(24, 2, 2, channels).permute(0, 3, 1, 2) if tap_major else flat.view(shape)
    x, bias = material.normal(2, channels, 4, 5, seed=6), material.normal(24, seed=7)
    emb = material.normal(2, 24, seed=8)
    want = F.conv2d(x.double(), full, bias.double(), 1, 1) + emb[:, :, None, None]
    residual = material.normal(*want.shape, seed=9)
    weight = repack(blocks, "Q8_0", shape, tap_major=tap_major)
    got = conv2d_packed(x, weight, bias, 1, 1, emb=emb, residual=residual, mode=mode)
    assert material.error(got, want + residual) < 2e-3


def test_auto_takes_the_measured_mode(material: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for module, name in (("triton.linear", "PreparedLinear"), ("triton.dequantize", "dequantize_packed")):
        real = getattr(__import__(f"gguf_sd_kernels.{module}", fromlist=[name]), name)

        def spy(*args: Any, real: Any = real, name: str = name, **options: Any) -> Any:
            taken.append(name)
            return real(*args, **options)

        monkeypatch.setattr(f"gguf_sd_kernels.{module}.{name}", spy)
    monkeypatch.setattr(launches, "_measured", {})
    launches.Prepared.forget()
    weight, x = repack(material.weight("Q4_0", 32, 64, seed=10)[0], "Q4_0"), material.normal(5, 64, seed=11)
    product, launch = Product("linear", "Q4_0", 5, 32, 64), Launch(16, 32, 64, warps=4, stages=2)
    for fused, dequantize in ((1.0, 2.0), (2.0, 1.0)):
        launches.add_measured(gpu_of(x.device), {product: Measured(launch, fused, dequantize, resident=0.5)})
        linear_packed(x, weight)
    assert taken == ["PreparedLinear", "dequantize_packed"]
    assert dispatch.UNMEASURED in MODES


def test_tables_are_kept_and_the_nearest_m_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "_measured", {})
    launches.Prepared.forget()
    product, gpu = Product("conv", "Q4_0", 1024, 320, 2880, taps=9), Gpu("Some GPU", "mma", 4)
    before = launches.choose(product, gpu)
    small, large = Launch(64, 64, 64, 4, 4, splits=3), Launch(128, 64, 64, 8, 3, swap=True)
    table = {
        product: Measured(small, 1.0, 2.0, 0.5),
        replace(product, m=8192): Measured(large, 2.0, 1.0, 0.5),
    }
    launches.save_measured(tmp_path / "table.json", "Some GPU", table)
    assert launches.load_measured(tmp_path / "table.json", gpu) == 2
    assert launches.choose(product, gpu) == small != before, "what was chosen before the table is forgotten"
    assert launches.choose(product, replace(gpu, name="Another GPU")) == before
    for m, near in ((1500, small), (6000, large), (40000, None), (200, None)):
        found = launches.measured(replace(product, m=m), gpu)
        assert (found and found.launch) == near
    assert launches.measured(replace(product, qtype="Q8_0"), gpu) is None
    assert launches.measured(product, replace(gpu, name="Another GPU")) is None
    assert launches.choose(replace(product, m=6000), gpu) == large, "splits of another M mean nothing"
    (tmp_path / "other.json").write_text('{"products": [{"product": {"op": "conv"}, "launch": {}}]}')
    with pytest.raises(ValueError, match=r"other\.json is no table"):
        launches.load_measured(tmp_path / "other.json", gpu)
    assert launches.table_name("NVIDIA GeForce RTX 3060 (12GB)") == "nvidia-geforce-rtx-3060-12gb.json"


@pytest.mark.parametrize(
    ("architecture", "family"),
    [
        ("75", None),
        ("86", "mma"),
        ("90", "wgmma"),
        ("120", "mma120"),
        ("gfx906:sramecc+:xnack-", None),
        ("gfx90a:sramecc+:xnack-", "mfma"),
        ("gfx942", "mfma"),
        ("gfx1030", None),
        ("gfx1100", "wmma"),
    ],
)
def test_families(architecture: str, family: str | None) -> None:
    assert architecture_family(architecture) == family


def test_errors_give_the_values(material: Any) -> None:
    weight, x = repack(material.weight("Q4_0", 32, 64, seed=12)[0], "Q4_0"), material.normal(5, 64, seed=13)
    with pytest.raises(ValueError, match=r"'quick'.*auto, fused, dequantize"):
        linear_packed(x, weight, mode="quick")
    with pytest.raises(ValueError, match="no residual"):
        linear_packed(x, weight, residual=x[:, :16], geglu=True, mode="dequantize")
    with pytest.raises(ValueError, match="no fused kernels"):
        launches.choose(Product("linear", "Q4_0", 5, 32, 64), Gpu("old", None, 1))


def test_importing_needs_no_triton() -> None:
    """Triton is imported by the first product, not by the package."""
    modules = ("ops", "dispatch", "repack", "tuning.launch", "triton.workspace")
    names = ", ".join(f"gguf_sd_kernels.{name}" for name in modules)
    code = f"import sys, {names}; assert not any(name.startswith('triton') for name in sys.modules)"
    folder = str(Path(dispatch.__file__).parents[1])
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": folder})
