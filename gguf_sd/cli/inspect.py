"""`gguf-sd inspect`: what a model file or folder holds, and what it is when it is no model."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.cli.terminal import printable
from gguf_sd.errors import GgufSdError
from gguf_sd.input_files import open_input

if TYPE_CHECKING:
    from gguf_sd.checkpoint.model_file import ModelFile
    from gguf_sd.checkpoint.weights import Weights
    from gguf_sd.checkpoint.what_is_it import Kind

LONG_VALUE = 100  # characters of a metadata value that the table shows
READS = ".gguf, .safetensors and .ckpt files, and diffusers folders"
HEADINGS = ("file", "format", "is", "architecture", "layout", "type", "source", "advice")
PICKLES = (b"PK\x03\x04", b"\x80")  # what torch.save's files begin with

Row = tuple[str, str, int, int]  # part, type, values, bytes


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect",
        help="show what a model file or folder holds",
        description="Shows architecture, parts, tensors and bytes per type, defaults and metadata of a model; and what "
        "another file is: a LoRA, a VAE, a ControlNet, ….",
    )
    parser.add_argument("model", type=Path, help="a .gguf, .safetensors or .ckpt file, or a diffusers folder")
    parser.add_argument("--tensors", action="store_true", help="list every tensor too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    facts = inspect(args.model, args.tensors)
    print(json.dumps(facts, indent=2, default=list) if args.json else table(facts))
    return 0


def inspect(path: Path, tensors: bool = False) -> dict[str, Any]:
    """The facts of a model file or folder as a JSON object, with every tensor where ``tensors``. Raises GgufSdError for
    what cannot be read, is damaged, or is no weight file at all."""
    from gguf_sd.checkpoint.gguf_file import GGUFFile
    from gguf_sd.checkpoint.model_file import ModelFile
    from gguf_sd.checkpoint.safetensors_header import is_safetensors
    from gguf_sd.checkpoint.weights import open_weights
    from gguf_sd.checkpoint.what_is_it import what_is

    head = b"" if path.is_dir() else _head(path)
    if path.is_dir() or is_safetensors(path) or path.suffix == ".safetensors":
        return describe_weights(open_weights(path), tensors)
    if head.startswith(PICKLES):
        return describe_weights(_pickled(path), tensors)
    if head != b"GGUF" and path.suffix.lower() != ".gguf":
        raise GgufSdError(f"{path} is no weight file: it starts with {head!r}; inspect reads {READS}")
    file = GGUFFile(path)
    shapes = {name: file.shape(name) for name in file.tensors}
    kind = what_is(shapes)
    if kind is not None and kind.part != "unet":  # a language model, a text encoder, …
        rows = ((info.name, info.type.name, info.shape, info.nbytes) for info in file.tensors.values())
        facts = {"file": str(path), "bytes": file.size, "format": "GGUF", "is": kind.name, "advice": kind.advice}
        facts |= {"parts": _parts(("tensors", t, prod(s), n) for _, t, s, n in rows), "metadata": file.metadata}
        return facts | ({"tensors": _gguf_tensors(file)} if tensors else {})
    return describe(ModelFile.open(path), tensors, kind)


def _head(path: Path) -> bytes:
    try:
        with open_input(path) as file:
            return file.read(4)
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error


def _pickled(path: Path) -> Weights:
    """A .ckpt file through the converter's reader, which executes nothing."""
    from gguf_sd.checkpoint.safetensors_header import Stored
    from gguf_sd.checkpoint.weights import Weights
    from gguf_sd_convert.sources.checkpoints import open_checkpoint

    tensors = {
        name: Stored(str(entry.dtype).removeprefix("torch."), entry.shape, entry.nbytes, 0)
        for name, entry in open_checkpoint(path).entries.items()
    }
    return Weights(path, "pickled checkpoint", path.stat().st_size, {"": tensors})


def describe(model: ModelFile, tensors: bool = False, kind: Kind | None = None) -> dict[str, Any]:
    """The facts of a ModelFile as a JSON object; ``kind``: what it is, if it is a part."""
    from gguf_sd.checkpoint.model_file import part_of
    from gguf_sd.checkpoint.part_files import missing_parts, missing_sentence

    file = model.file
    stored = [(part_of(canonical), file.tensors[name]) for canonical, name in model.names.items()]
    facts = {
        "file": str(file.path),
        "bytes": file.size,
        **({"is": kind.name, "advice": kind.advice} if kind else {}),
        "architecture": model.config.name,
        "layout": file.metadata.get("gguf_sd.layout", "unknown (not written by gguf-sd)"),
        "type": file.metadata.get("gguf_sd.type", ""),
        "source": file.metadata.get("gguf_sd.source.name", ""),
        "parts": _parts((part, info.type.name, prod(info.shape), info.nbytes) for part, info in stored),
        "config": asdict(model.config),
        "metadata": {key: value for key, value in file.metadata.items() if key != "gguf_sd.config"},
    }
    if kind is None and (missing := missing_parts(model.config, model.names)):
        facts["advice"] = missing_sentence(model.path, model.config, missing)
    return facts | ({"tensors": _gguf_tensors(file)} if tensors else {})


def _gguf_tensors(file: Any) -> list[dict[str, Any]]:
    return [
        {"name": i.name, "type": i.type.name, "shape": file.shape(i.name), "stored": i.shape, "bytes": i.nbytes}
        for i in file.tensors.values()
    ]


def describe_weights(weights: Weights, tensors: bool = False) -> dict[str, Any]:
    """The facts of a checkpoint, a diffusers folder, or of what is no model, as a JSON object."""
    from gguf_sd.checkpoint.model_file import part_of
    from gguf_sd.checkpoint.tensor_names import canonical_names

    facts: dict[str, Any] = {"file": str(weights.path), "bytes": weights.size, "format": weights.format}
    kind = weights.kind
    if kind is not None:
        facts |= {"is": kind.name, "advice": kind.advice}
    elif weights.pipeline:
        facts |= {"is": f"a {weights.pipeline}", "architecture": _pipeline_architecture(weights.pipeline)}
    else:
        facts |= _identified(weights)
    rows: list[Row] = []
    for folder, stored in weights.parts.items():
        known = {name: part_of(new) for new, name in canonical_names(stored).items()} if not folder else {}
        for name, t in stored.items():
            part = folder or ("tensors" if kind is not None else known.get(name, "other"))
            rows.append((part, t.dtype, prod(t.shape), t.nbytes))
    facts |= {"parts": _parts(rows), "metadata": weights.metadata}
    if tensors:
        facts["tensors"] = [
            {"name": f"{folder}/{name}" if folder else name, "type": t.dtype, "shape": t.shape, "bytes": t.nbytes}
            for folder, stored in weights.parts.items()
            for name, t in stored.items()
        ]
    return facts


def _identified(weights: Weights) -> dict[str, Any]:
    """Architecture and configuration of a checkpoint, or why it has none."""
    from gguf_sd.checkpoint.identify import identify
    from gguf_sd.checkpoint.tensor_names import canonical_names

    shapes = weights.shapes
    try:
        config = identify({new: shapes[name] for new, name in canonical_names(shapes).items()}, str(weights.path))
    except GgufSdError as error:
        return {"is": "no model that gguf-sd knows", "advice": str(error)}
    return {"is": "a checkpoint", "architecture": config.name, "config": asdict(config)}


def _pipeline_architecture(name: str) -> str:
    if name.startswith("StableDiffusionXL"):
        return "sdxl"
    known = name.startswith(("StableDiffusionPipeline", "StableDiffusionI", "LatentConsistencyModel"))
    return "sd1" if known else f"unknown ({name})"


def _parts(rows: Iterable[Row]) -> dict[str, dict[str, dict[str, int]]]:
    parts: dict[str, dict[str, dict[str, int]]] = defaultdict(
        lambda: defaultdict(lambda: {"tensors": 0, "values": 0, "bytes": 0})
    )
    for part, kind, values, nbytes in rows:
        entry = parts[part][kind]
        entry["tensors"] += 1
        entry["values"] += values
        entry["bytes"] += nbytes
    return parts


def table(facts: dict[str, Any]) -> str:
    """The facts for people. What comes from the file cannot steer the terminal."""
    lines = [f"{key:13} {_shown(facts[key])}" for key in HEADINGS if facts.get(key)]
    if "config" in facts:
        defaults = facts["config"]["defaults"]
        lines.append(f"{'defaults':13} " + _shown(", ".join(f"{key} {value}" for key, value in defaults.items())))
    width = max([14, *(len(_shown(part)) for part in facts["parts"])])
    kinds = max([6, *(len(kind) for types in facts["parts"].values() for kind in types)])
    lines += ["", f"{'part':{width}} {'type':{kinds}} {'tensors':>8} {'values':>14} {'bytes':>14}"]
    for part, types in facts["parts"].items():
        for kind, n in sorted(types.items(), key=lambda item: -item[1]["bytes"]):
            numbers = f"{n['tensors']:>8} {n['values']:>14,} {n['bytes']:>14,}"
            lines.append(f"{_shown(part):{width}} {kind:{kinds}} {numbers}")
    lines.append(f"{'whole':{width}} {'':{kinds}} {'':8} {'':14} {facts['bytes']:>14,}")
    if facts["metadata"]:
        lines += ["", "metadata", *(f"  {_shown(key)} = {_value(value)}" for key, value in facts["metadata"].items())]
    for tensor in facts.get("tensors", ()):
        lines.append(f"  {tensor['type']:6} {list(tensor['shape'])!s:24} {_shown(tensor['name'])}")
    return "\n".join(lines)


def _value(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=list, ensure_ascii=False)
    shown = _shown(text[:LONG_VALUE])
    return shown if len(text) <= LONG_VALUE else f"{shown}… ({len(text)} chars)"


def _shown(text: object) -> str:
    return printable(str(text), newlines=False)
