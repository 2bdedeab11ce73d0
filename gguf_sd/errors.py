"""The one exception that a user is meant to read, and a sentence that several parts say."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class GgufSdError(Exception):
    """Bad input: one sentence saying what is wrong, where, and what to do. The CLI prints it, exit code 2."""


def not_finite(part: str, dtype: torch.dtype, when: str = "") -> str:
    """The sentence for a part that produced NaN or infinity, computing in ``dtype``."""
    name = str(dtype).removeprefix("torch.")
    wider = {"float16": "try --dtype float32 or bfloat16", "bfloat16": "try --dtype float32"}
    advice = wider.get(name, "the weights of the model may be damaged")
    return f"the {part} produced values that are not finite{when} in {name}; {advice}"
