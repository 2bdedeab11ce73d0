"""`gguf-sd convert`: a checkpoint to one GGUF file."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.checkpoint.gguf_header import is_gguf
from gguf_sd.cli.hub_models import add_revision, local_model
from gguf_sd.cli.preflight import check_source, check_type
from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from gguf_sd_convert.calibrate.options import Calibration
    from gguf_sd_convert.report import ConvertReport


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "convert",
        help="make a GGUF file from a checkpoint",
        description="Quantises the UNet of a Stable Diffusion checkpoint; the text encoders and the autoencoder stay "
        "F16. The file holds all that painting takes, tokenizer included.",
    )
    add = parser.add_argument
    add("source", type=Path, help=".safetensors, .ckpt or .gguf file, or a diffusers folder; or org/repo, "
        "org/repo/file.safetensors or a link of the Hugging Face Hub, fetched first")  # fmt: skip
    add_revision(parser)
    add("-o", "--output", type=Path, required=True, help="the .gguf file to write")
    add("--type", help="f16, bf16, q8_0, q6_k, q5_k, q5_1, q5_0, q4_k, iq4_nl, q4_1, q4_0 (q8_0); mixed: by layer, see "
        "--target-size and --bpw; same: as a .gguf SOURCE has it, its default")  # fmt: skip
    add("--text-type", default="f16", help="of the text encoders: f16 or q8_0 (f16)")
    add("--layout", default="auto", help="who can read it: native (gguf-sd), comfy (ComfyUI-GGUF too) or linear "
        "(sd.cpp and diffusers too, but larger: convolutions stay F16); auto: as a .gguf SOURCE, else native, with "
        "--unet-only comfy (auto)")  # fmt: skip
    add("--unet-only", action="store_true", help="write the UNet alone, as ComfyUI-GGUF takes it; SOURCE may be one")
    add("--allow-requantize", action="store_true", help="make blocks of a .gguf SOURCE's blocks, whatever their type: "
        "at a loss")  # fmt: skip
    add("--ema", action="store_true", help="take the averaged weights of a full checkpoint")
    add("--tokenizer", type=Path, help="tokenizer folder, tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz, for a "
        "source that has none")  # fmt: skip
    add("--config", type=Path, help="diffusers folder whose JSON files describe a single-file SOURCE")
    add("--preset", help="whose schedule and defaults the file gets: sd15, sdxl or sdxl-turbo (what the source says)")
    add("--no-safety", action="store_false", dest="safety", help="leave the source's safety checker out")
    add("--lora", action="append", dest="loras", metavar="FILE[:WEIGHT]", help="a LoRA, LoHa or LoKr to merge into the "
        "weights before they are quantised; may be given several times")  # fmt: skip
    add("--calibrate", action="store_true", help="round for what the layers are fed in sampling runs of this model: "
        "less error at the same size, for minutes to half an hour of computing")  # fmt: skip
    add("--prompts", type=Path, help="text file of the prompts to calibrate with, one a line")
    add("--samples", type=int, default=0, help="UNet calls to calibrate on (by the model's size)")
    add("--imatrix", type=Path, help="calibration data to use: of --save-imatrix, or an importance matrix of "
        "llama.cpp's kind")  # fmt: skip
    add("--save-imatrix", type=Path, metavar="FILE", help="where to keep the calibration data for other types")
    add("--target-size", help="of the file with --type mixed, such as 600MB")
    add("--bpw", type=float, help="bits a quantised weight with --type mixed, such as 4.5")
    add("--threads", type=int, default=0, help="tensors worked on at once (one a core)")
    add("--force", action="store_true", help="replace an existing file")
    add("--quiet", action="store_true", help="no progress bar and no table")
    add("--json", action="store_true", help="print the report as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Converts and reports; raises GgufSdError for bad input."""
    check_type(args.type)
    args.source = local_model(args.source, args.revision, args.quiet or args.json)
    check_source(args.source, args.unet_only)
    from gguf_sd_convert.target import check_target

    check_target(args.output, args.force, [args.source])
    from gguf_sd.adapters.lora import as_loras
    from gguf_sd_convert.convert import ConvertOptions, convert

    options = ConvertOptions(
        type=args.type or ("same" if is_gguf(args.source) else "q8_0"),
        layout=args.layout,
        text_type=args.text_type,
        ema=args.ema,
        tokenizer=args.tokenizer,
        config=args.config,
        force=args.force,
        threads=args.threads,
        preset=args.preset,
        safety=args.safety,
        loras=as_loras(args.loras or ()),
        unet_only=args.unet_only,
        allow_requantize=args.allow_requantize,
        calibration=_calibration(args),
    )
    report = convert(args.source, args.output, options, quiet=args.quiet or args.json)
    if args.json:
        print(json.dumps(asdict(report), indent=2))
    elif not args.quiet:
        print(table(report))
    return 0


def _calibration(args: argparse.Namespace) -> Calibration | None:
    """What the arguments ask for; raises GgufSdError for those that have no effect."""
    from gguf_sd_convert.calibrate.options import Calibration

    measures = args.calibrate or args.imatrix is not None or (args.type or "").lower() == "mixed"
    given = {"--prompts": args.prompts, "--samples": args.samples, "--save-imatrix": args.save_imatrix}
    sizes = {"--target-size": args.target_size, "--bpw": args.bpw}
    if (args.type or "").lower() != "mixed" and (useless := [name for name, value in sizes.items() if value]):
        raise GgufSdError(f"{useless[0]} has no effect without --type mixed")
    if not measures:
        if useless := [name for name, value in given.items() if value]:
            raise GgufSdError(f"{useless[0]} has no effect without --calibrate or --type mixed")
        return None
    return Calibration(
        compensate=args.calibrate or args.imatrix is not None,
        prompts=args.prompts,
        samples=args.samples,
        imatrix=args.imatrix,
        save=args.save_imatrix,
        target=args.target_size,
        bpw=args.bpw,
    )


def table(report: ConvertReport) -> str:
    """The report for people."""
    lines = [f"note: {note}" for note in report.notes]
    lines += [f"{'type':6} {'tensors':>8} {'bytes':>14}"]
    lines += [f"{kind:6} {count:>8} {nbytes:>14,}" for kind, (count, nbytes) in report.types.items()]
    lines += ["", f"kept out of {report.type}:"]
    lines += [f"  {reason:42} {count:>6} {nbytes:>14,}" for reason, (count, nbytes) in report.kept.items()]
    share = report.nbytes / report.f16_nbytes
    lines += [
        "",
        f"{report.output}: {report.nbytes / 1e9:.3f} GB, {share:.0%} of F16 ({report.f16_nbytes / 1e9:.3f} GB), "
        f"{report.architecture}, {report.layout} layout, {report.seconds:.1f} s",
        f"tokenizer: {report.tokenizer}",
    ]
    return "\n".join(lines)
