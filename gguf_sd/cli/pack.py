"""`gguf-sd pack`: a UNet, text encoders and an autoencoder in one file."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from gguf_sd_convert.pack import PackReport


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "pack",
        help="join a UNet and its other parts into one file",
        description="Joins a UNet with text encoders and an autoencoder into one self-contained .gguf file, tokenizer "
        "and settings included. Nothing is quantised again: blocks are copied byte for byte.",
    )
    add = parser.add_argument
    part = ".gguf or .safetensors, of it alone or of a whole model"
    add("unet", type=Path, help=".gguf or .safetensors file of a UNet; other parts in it serve too")
    add("--clip-l", "--clip_l", type=Path, metavar="FILE", help=f"text encoder CLIP-L: {part}")
    add("--clip-g", "--clip_g", type=Path, metavar="FILE", help="text encoder CLIP-G, of SDXL: the same")
    add("--vae", type=Path, metavar="FILE", help="autoencoder: the same")
    add("-o", "--output", type=Path, required=True, help="the .gguf file to write")
    add("--preset", help="whose schedule and defaults the file gets: sd15, sdxl or sdxl-turbo")
    add("--tokenizer", type=Path, help="tokenizer folder, tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz, for "
        "parts that carry none")  # fmt: skip
    add("--force", action="store_true", help="replace an existing file")
    add("--quiet", action="store_true", help="no progress bar and no report")
    add("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Packs and reports; raises GgufSdError for bad input, as far as it shows in headers before torch is imported."""
    from gguf_sd.checkpoint.part_files import PartPaths

    if not args.unet.exists():
        raise GgufSdError(f"{args.unet} does not exist; give a .gguf or .safetensors file of a UNet")
    from gguf_sd_convert.pack import PackOptions, pack

    parts = PartPaths(args.clip_l, args.clip_g, args.vae)
    options = PackOptions(args.tokenizer, args.preset, args.force)
    report = pack(args.unet, parts, args.output, options, args.quiet or args.json)
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    elif not args.quiet:
        print(_text(report))
    return 0


def _text(report: PackReport) -> str:
    lines = [f"{part:8} {path}" for part, path in (report.parts | {"tokenizer": report.tokenizer}).items()]
    lines.append(
        f"{report.output}: {report.nbytes / 1e9:.3f} GB, {report.tensors} tensors, {report.architecture}, "
        f"{report.type}, {report.layout} layout, {report.seconds:.1f} s"
    )
    return "\n".join(lines)
