"""What is concluded from what Linux says of a processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gguf_sd_kernels.cpu import processor

X86 = "sse2 avx512f avx512_vnni"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(processor, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    cached = (processor.flags, processor.has_tiles, processor.multiplies_bytes, processor.multiplies_bfloat16_fast)
    for function in cached:
        function.cache_clear()
    yield tmp_path / "cpuinfo"
    for function in cached:
        function.cache_clear()


@pytest.mark.parametrize(
    ("vendor", "flags", "fast"),
    [
        ("AuthenticAMD", f"{X86} avx512_bf16", True),
        ("GenuineIntel", f"{X86} avx512_bf16", False),
        ("GenuineIntel", f"{X86} avx512_bf16 amx_bf16", True),
        ("AuthenticAMD", "sse2 avx2", False),
    ],
)
def test_bfloat16_is_fast_where_its_instruction_is(cpuinfo: Path, vendor: str, flags: str, fast: bool) -> None:
    cpuinfo.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
    assert processor.multiplies_bfloat16_fast() is fast
    assert processor.multiplies_bytes() is ("avx512_vnni" in flags)
    assert processor.has_tiles() is ("amx_bf16" in flags)


def test_other_processors_are_as_torch_says(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo.write_text("processor\t: 0\nFeatures\t: fp asimd bf16\n")
    assert processor.multiplies_bfloat16_fast()
    assert not processor.multiplies_bytes()
    processor.multiplies_bfloat16_fast.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not processor.multiplies_bfloat16_fast()


def test_without_proc(cpuinfo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert processor.flags() is None
    assert not processor.has_tiles()
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True, raising=False)
    assert processor.multiplies_bytes()
