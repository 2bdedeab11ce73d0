"""`gguf-sd inspect`: what a GGUF file holds."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import Any

LONG_VALUE = 100  # characters of a metadata value that the table shows


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect", help="show what a GGUF file holds", description="Architecture, layout, tensors and bytes per type."
    )
    parser.add_argument("model", type=Path, help="a .gguf file")
    parser.add_argument("--tensors", action="store_true", help="list every tensor too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gguf_sd.checkpoint.model_file import ModelFile

    facts = describe(ModelFile.open(args.model), args.tensors)
    print(json.dumps(facts, indent=2) if args.json else table(facts))
    return 0


def describe(model: Any, tensors: bool = False) -> dict[str, Any]:
    """The facts of a ModelFile as a JSON object."""
    from gguf_sd.checkpoint.model_file import part_of

    file = model.file
    parts: dict[str, dict[str, dict[str, int]]] = defaultdict(
        lambda: defaultdict(lambda: {"tensors": 0, "values": 0, "bytes": 0})
    )
    for canonical, name in model.names.items():
        info = file.tensors[name]
        entry = parts[part_of(canonical)][info.type.name]
        entry["tensors"] += 1
        entry["values"] += prod(info.shape)
        entry["bytes"] += info.nbytes
    facts = {
        "file": str(file.path),
        "bytes": file.size,
        "architecture": model.config.name,
        "layout": file.metadata.get("gguf_sd.layout", "unknown (not written by gguf-sd)"),
        "type": file.metadata.get("gguf_sd.type", ""),
        "source": file.metadata.get("gguf_sd.source.name", ""),
        "parts": parts,
        "config": asdict(model.config),
        "metadata": {key: value for key, value in file.metadata.items() if key != "gguf_sd.config"},
    }
    if tensors:
        facts["tensors"] = [
            {"name": i.name, "type": i.type.name, "shape": file.shape(i.name), "stored": i.shape, "bytes": i.nbytes}
            for i in file.tensors.values()
        ]
    return facts


def table(facts: dict[str, Any]) -> str:
    """The facts for people."""
    lines = [f"{key:13} {facts[key]}" for key in ("file", "architecture", "layout", "type", "source") if facts[key]]
    defaults = facts["config"]["defaults"]
    lines.append(f"{'defaults':13} " + ", ".join(f"{key} {value}" for key, value in defaults.items()))
    lines += ["", f"{'part':14} {'type':6} {'tensors':>8} {'values':>14} {'bytes':>14}"]
    for part, types in facts["parts"].items():
        for kind, n in sorted(types.items(), key=lambda item: -item[1]["bytes"]):
            lines.append(f"{part:14} {kind:6} {n['tensors']:>8} {n['values']:>14,} {n['bytes']:>14,}")
    lines.append(f"{'whole file':14} {'':6} {'':8} {'':14} {facts['bytes']:>14,}")
    lines += ["", "metadata"]
    for key, value in facts["metadata"].items():
        text = json.dumps(value) if not isinstance(value, str) else value
        lines.append(f"  {key} = " + (text if len(text) <= LONG_VALUE else f"{text[:LONG_VALUE]}… ({len(text)} chars)"))
    for tensor in facts.get("tensors", ()):
        lines.append(f"  {tensor['type']:6} {list(tensor['shape'])!s:24} {tensor['name']}")
    return "\n".join(lines)
