"""What `gguf-sd convert` and `gguf-sd inspect` do, for Python."""

from __future__ import annotations

import json
import os
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from gguf_sd_convert.report import ConvertReport

StrPath = str | os.PathLike[str]


def convert(
    source: StrPath, output: StrPath, type: str = "q8_0", layout: str = "native", **options: Any
) -> ConvertReport:
    """Makes the GGUF file ``output`` of a .safetensors, .ckpt or .gguf file or a diffusers folder; returns a report.

    ``type``: f16, bf16, q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, iq4_nl, q4_1 or q4_0. ``layout``: native, comfy or linear.
    ``options``: the other fields of :class:`gguf_sd_convert.convert.ConvertOptions`, ``force=True`` to replace an
    existing file among them; None is the default everywhere. Raises GgufSdError for everything that does not do."""
    from gguf_sd import keywords
    from gguf_sd_convert import convert as converter

    known = {field.name for field in fields(converter.ConvertOptions)}
    keywords.check_known(options, sorted(known))
    given = {"type": type, "layout": layout, **options}
    given = {name: value for name, value in given.items() if value is not None}
    if "tokenizer" in given:
        given["tokenizer"] = keywords.path("tokenizer", given["tokenizer"])
    for name in ("type", "layout"):
        if not isinstance(given.get(name, ""), str):
            raise GgufSdError(f"{name} takes a text, got {given[name]!r}")
    chosen = converter.ConvertOptions(**given)
    return converter.convert(keywords.hub_path("source", source), keywords.path("output", output), chosen)


def inspect(path: StrPath, tensors: bool = False) -> dict[str, Any]:
    """What a model file or folder holds, as `gguf-sd inspect --json` prints it: architecture, layout, bytes by part and
    type, configuration, metadata; with ``tensors`` each tensor too. Raises GgufSdError for what is no such file."""
    from gguf_sd.cli import inspect as command

    if not isinstance(path, str | os.PathLike):
        raise GgufSdError(f"inspect takes a path, got {path!r}")
    facts: dict[str, Any] = json.loads(json.dumps(command.inspect(Path(path), tensors), default=list))
    return facts
