"""What this processor can do, as far as that decides how to compute."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")
MULTIPLIES_BYTES = {"avx512_vnni", "avx_vnni", "amx_int8"}


@cache
def flags() -> frozenset[str] | None:
    """As Linux names them; None where there is no /proc."""
    words = _field("flags")
    return None if words is None else frozenset(words.split())


@cache
def multiplies_bytes() -> bool:
    """Whether products of bytes have an instruction: without one sums of pairs may overflow, and nothing is gained."""
    known = flags()
    if known is None:
        return bool(getattr(torch.cpu, "_is_vnni_supported", lambda: False)())
    return not MULTIPLIES_BYTES.isdisjoint(known)


@cache
def has_tiles() -> bool:
    """Whether bfloat16 is multiplied in AMX's tiles, several times as fast as by vectors."""
    return "amx_bf16" in (flags() or ())


@cache
def has_byte_tiles() -> bool:
    """Whether bytes are multiplied in AMX's tiles."""
    return "amx_int8" in (flags() or ())


@cache
def multiplies_bfloat16_fast() -> bool:
    """Whether bfloat16 products take less time than float32's. Multiply-adds a second with AVX512-BF16, 2 cores: 210
    against 110 billion on a Zen 4, but 78 against 138 on an Emerald Rapids whose AMX is hidden, as in many virtual
    machines; and processors without either instruction only widen. What is no x86 is taken at torch's word."""
    if not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        return False
    known = flags()
    if known is None or "sse2" not in known:
        return True
    return has_tiles() or ("avx512_bf16" in known and _field("vendor_id") == "AuthenticAMD")


def _field(name: str) -> str | None:
    """The first value of that name in /proc/cpuinfo; None where there is no /proc."""
    try:
        lines = CPUINFO.read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.split(":")[0].strip() == name), "")
