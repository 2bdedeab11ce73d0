"""Amounts of memory as people write them."""

from __future__ import annotations

import math
import re

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown

GIB = 1 << 30
# Decimal where the unit is an SI one, binary for GiB and for the bare letters, as in docker and the JVM.
UNITS = {"b": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": GIB, "tib": 1 << 40, "kb": 10**3, "mb": 10**6, "gb": 10**9}
UNITS |= {"tb": 10**12, "k": 1 << 10, "m": 1 << 20, "g": GIB, "t": 1 << 40, "": GIB}
AMOUNT = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:e[+-]?\d{1,3})?)\s*([a-z]{0,3})\s*", re.ASCII)
MOST = 1 << 50  # bytes; what is more was meant otherwise
NONE = ("", "auto", "none")


def parse_memory(value: str | float | None, name: str = "--max-memory") -> int | None:
    """Bytes of `1GiB`, `1.5GB`, `800MB`, `1g`, or of a plain number of GiB, as stable-diffusion.cpp takes; None, no
    limit, for None, `auto`, zero and what is below (that program's words for it). Raises GgufSdError for anything
    else."""
    text = "" if value is None else str(value).lower()
    if text.strip() in NONE:
        return None
    if (found := AMOUNT.fullmatch(text)) is None or found[2] not in UNITS:
        raise _unknown(value, name)
    nbytes = float(found[1]) * UNITS[found[2]]
    if not math.isfinite(nbytes) or nbytes > MOST:
        raise GgufSdError(f"{name} is {shown(value)}, more than any machine has; a plain number counts GiB")
    return int(nbytes) if nbytes > 0 else None


def _unknown(value: object, name: str) -> GgufSdError:
    return GgufSdError(
        f"{name} is {shown(value)}; it takes an amount of memory, such as 1GiB, 1.5GB, 800MB, or 2 (GiB)"
    )


def memory_text(nbytes: int) -> str:
    """As GiB with two digits, rounded up: who is given so much has enough."""
    return f"{math.ceil(nbytes / GIB * 100 - 1e-9) / 100:.2f} GiB"
