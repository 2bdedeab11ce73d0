"""`gguf-sd bench`: models and programs compared; `gguf-sd bench layers`: what each layer's rounding costs."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from gguf_sd.bench.peers import SDCPP_ENV
from gguf_sd.errors import GgufSdError

TYPES = "f16,q8_0,q4_1,q4_0"


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "bench",
        help="compare models: pictures, times, memory",
        description="Paints the same prompts and seeds with every contestant, each in a process of its own, in turn, "
        "and writes a report. `gguf-sd bench layers MODEL` tells what rounding each layer of a UNet costs.",
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help=".gguf files; a checkpoint or diffusers folder is converted to each "
        "of --types; or the bench.toml of an earlier report; `layers MODEL` for layers")  # fmt: skip
    add("-o", "--output", type=Path, default=Path("report"), help="folder of the report (report)")
    add("--types", default=TYPES, help="of checkpoints, the first is what the others are compared with; mixed@4.8 has "
        f"4.8 bits a weight, +calibrated behind a type calibrates ({TYPES})")  # fmt: skip
    add("--tokenizer", type=Path, help="of checkpoints that have none, as for `gguf-sd convert`")
    add("--prompts", type=Path, help="text file, one a line (some that come with the program)")
    add("--count", type=int, help="pictures by each contestant (16)")
    add("--preset", default="model", help="quick, model, sd15-card or turbo: steps and guidance (model)")
    add("--steps", type=int, help="of every picture, in place of the preset's")
    add("--sampler", help="of every picture, in place of the model's")
    add("--width", type=int, help="of every picture, pixels (the model's)")
    add("--height", type=int, help="of every picture, pixels (the model's)")
    add("--rounds", type=int, default=3, help="fresh processes of each contestant, which share the prompts (3)")
    add("--peers", default="", help="other programs to compare with, on the same weights: diffusers, openvino, sdcpp")
    add("--sdcpp", metavar="PROGRAM", help=f"stable-diffusion.cpp's sd-cli, for that peer (${SDCPP_ENV})")
    add("--lpips", type=Path, help="file of torchvision's AlexNet, VGG16 or SqueezeNet 1.1, for LPIPS")
    add("--clip", type=Path, help="folder of a CLIP model, for CLIP scores")
    add("--fid", type=Path, help="file of torch-fidelity's Inception, for FID against the first's pictures")
    add("--seed", type=int, default=0, help="of the first picture (0)")
    add("--device", default="auto", help="auto, cpu, cuda, …")
    add("--dtype", default="auto", help="auto, float32, float16, bfloat16")
    add("--weights", default="auto", help="auto, quantized or resident")
    add("--no-errors", action="store_false", dest="errors", help="do not record the UNet's calls and measure its "
        "output's error on them: minutes with large models on a CPU")  # fmt: skip
    add("--no-times", action="store_false", dest="times", help="leave times and memory out of the report: the machine "
        "is busy with other work")  # fmt: skip
    add("--resume", action="store_true", help="go on with an interrupted comparison in OUTPUT")
    add("--force", action="store_true", help="replace what stands in OUTPUT")
    add("--quiet", action="store_true", help="no progress bar and no table")
    add("--json", action="store_true", help="print the rows as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.models[0] == "layers":
        from gguf_sd.cli.bench_layers import run_layers

        return run_layers(args)
    from gguf_sd.bench.report import in_columns, write_report
    from gguf_sd.bench.runner import run as compare
    from gguf_sd.cli.bench_spec import spec_of_arguments, spec_of_file
    from gguf_sd.cli.progress import progress_bar

    started_from = len(args.models) == 1 and args.models[0].endswith(".toml")
    _check_output(args)
    spec = spec_of_file(args) if started_from else spec_of_arguments(args)
    args.output.mkdir(parents=True, exist_ok=True)
    with progress_bar(spec.rounds * len(spec.contestants), args.quiet, unit="run") as bar:

        def tick(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update(1)

        rows = compare(spec, args.output, args.resume, tick)
    path = write_report(spec, rows, args.output, args.times)
    if args.json:
        print((args.output / "report.json").read_text())
    elif not args.quiet:
        print(in_columns(spec, rows, args.times, shutil.get_terminal_size().columns))
        print(f"\n{path}")
    return 0


def _check_output(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.output.is_dir():
        raise GgufSdError(f"{args.output} is a file; name a folder")
    if args.output.is_dir() and any(args.output.iterdir()) and not (args.force or args.resume):
        raise GgufSdError(f"{args.output} is not empty; --resume goes on in it, --force replaces, or choose another")
