"""What is measured of the host without a GPU: launches are the models', and the measurement leaves torch as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
ROOT = Path(__file__).parents[2]


def run(script: str, result: Path, *options: str) -> Any:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / f) for f in (".", "kernels", "convert"))}
    command = [sys.executable, "-m", f"benchmarks.gpu.{script}", *options, "--json", str(result)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(result.read_text())


def test_launches_of_sd15(tmp_path: Path) -> None:
    """Every linear, convolution and group norm of the model, and no more: layer norms are in the linears."""
    step = run("count_launches", tmp_path / "launches.json", "--workload", "sd15-512")["steps"]["sd15-512"]
    norms = {"group_norm_kernel": 43, "group_stats_kernel": 18, "group_apply_kernel": 18}
    assert step["triton"] == {"linear_kernel": 143, "conv_kernel": 50, **norms}
    assert step["triton_total"] == 272 <= step["aim"]
    assert step["torch"]["attention"] == 32


def test_dequantising_takes_a_launch_more_for_each_product(tmp_path: Path) -> None:
    fused, decoded = (
        run("count_launches", tmp_path / f"{mode}.json", "--workload", "tiny", "--mode", mode)["steps"]["tiny"]
        for mode in ("fused", "dequantize")
    )
    products = fused["triton"]["linear_kernel"] + fused["triton"]["conv_kernel"]
    assert decoded["triton"]["dequantize_kernel"] == products
    assert decoded["torch_total"] > fused["torch_total"]


def test_host_overhead(tmp_path: Path) -> None:
    found = run("host_overhead", tmp_path / "host.json", "--workload", "tiny", "--rounds", "2")
    step = found["steps"]["tiny"]
    assert step["ms"]["ours"] > 0
    assert step["launches"] > 10
    assert "target_ms" not in step


def test_torch_is_as_before() -> None:
    """Shapes and layouts are torch's own, within the block and after it."""
    import torch
    from torch.nn import functional as F

    from benchmarks.lib.light_meta import light_meta

    def results() -> list[tuple[torch.Size, tuple[int, ...]]]:
        x = torch.empty(2, 32, 6, 4, device="meta").contiguous(memory_format=torch.channels_last)
        rows, weight = torch.empty(2, 5, 32, device="meta"), torch.empty(64, 32, device="meta")
        pictures = torch.empty(64, 32, 3, 3, device="meta").contiguous(memory_format=torch.channels_last)
        norm = torch.empty(2, 32, device="meta")
        found = [
            torch.cat([x, x], 1),
            F.interpolate(x, size=(12, 8)),
            F.silu(x) + x * 2,
            rows[:, :1] + rows,
            F.linear(rows, weight, weight[:, 0]),
            F.linear(rows, weight),
            F.conv2d(x.contiguous(), pictures.contiguous(), None, 2, 1),  # of channels-last ones a GPU's are so too
            F.group_norm(x, 8, *norm).contiguous(),  # torch 2.14 lays it out otherwise than 2.13
            F.layer_norm(rows, (32,), *norm),
        ]
        return [(tensor.shape, tensor.stride()) for tensor in found]

    attention, want = F.scaled_dot_product_attention, results()
    with torch.inference_mode(), light_meta() as calls:
        assert results() == want
        assert calls["cat"] == 1
    assert F.scaled_dot_product_attention is attention
    with torch.inference_mode():
        assert results() == want
    assert calls.total() < 20, "none is counted after the block"
