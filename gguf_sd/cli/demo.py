"""`gguf-sd demo`: what each type does to the size, speed and pictures of the built-in model."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.demo.models import DEMO_MODELS
from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from gguf_sd.demo.models import DemoModel

TYPES = ("f16", "q8_0", "q4_1", "q4_0")  # the first is the reference
BATCH = 10  # pictures painted at once


@dataclass(frozen=True)
class Row:
    """A line of the table. Sizes in bytes; PSNR in dB and SSIM against F16 in as many
    steps, medians over the pictures; shares 0 … 1."""

    type: str
    steps: int
    file_bytes: int
    unet_bytes: int
    seconds: float  # a picture
    psnr: float | None
    ssim: float | None
    correct: float


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "demo",
        help="convert a built-in model to four types and compare them",
        description="Quantises a built-in demo model to F16, Q8_0, Q4_1 and Q4_0, paints the same prompts and seeds "
        "with each, and shows what each type costs in bytes, seconds and picture quality.",
    )
    add = parser.add_argument
    add("-o", "--output", type=Path, default=Path("demo"), help="folder for the models, the sheet and pictures (demo)")
    told = "sd, made like Stable Diffusion 1.x, or turbo, made like SDXL-Turbo, in 1, 2 and 4 steps (sd)"
    add("--model", choices=list(DEMO_MODELS), default="sd", help=told)
    add("--pictures", type=int, default=60, help="pictures painted with each type (60)")
    add("--seed", type=int, default=0, help="seed of the prompts and pictures (0)")
    add("--device", default="auto", help="auto, cpu, cuda, …")
    add("--dtype", default="float32", help="auto, float32, float16, bfloat16 (float32)")
    add("--quiet", action="store_true", help="no progress bar and no table")
    add("--json", action="store_true", help="print the table as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gguf_sd.demo.sheet import contact_sheet
    from gguf_sd.imaging.png_metadata import PARAMETERS, version
    from gguf_sd.imaging.save_png import save_png

    model = DEMO_MODELS[args.model]
    if args.pictures < len(model.shown):
        raise GgufSdError(f"--pictures is {args.pictures}; the sheet shows {len(model.shown)}")
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GgufSdError(f"cannot create {args.output}: {error.strerror}; choose another --output") from error
    _check_files(args.output, model)
    rows, pictures = compare(args, model)
    columns = [(_title(row, model), _quality(row)) for row in rows]
    shown = [painted[: len(model.shown)] for painted in pictures]
    sheet = args.output / model.sheet
    save_png(contact_sheet(model.shown, columns, shown), sheet, {PARAMETERS: f"Version: {version()}"})
    if args.json:
        print(json.dumps({"sheet": str(sheet), "types": [asdict(row) for row in rows]}, indent=2))
    elif not args.quiet:
        print(table(rows))
        print(f"\n{sheet}: the same prompts and seeds with each type")
        print(f'paint your own: gguf-sd generate {args.output}/{model.stem}-q4_0.gguf -p "{model.shown[0]}"')
        if model.lora:
            file, prompt = model.lora
            print(
                f'and, with a LoRA: gguf-sd generate {args.output}/{model.stem}-q4_0.gguf -p "{prompt}" --lora {file}'
            )
    return 0


def _check_files(folder: Path, model: DemoModel) -> None:
    """Files of an earlier demo are replaced. Raises GgufSdError where one of another origin has such a name."""
    from gguf_sd.checkpoint.gguf_file import GGUFFile
    from gguf_sd.checkpoint.metadata_keys import SOURCE_NAME
    from gguf_sd.imaging.png_metadata import written_by_us

    def of_demo(path: Path) -> bool:
        try:
            return bool(GGUFFile(path).metadata.get(SOURCE_NAME) == model.folder.name)
        except GgufSdError:
            return False

    models = [folder / f"{model.stem}-{kind}.gguf" for kind in TYPES]
    for path, ours in [*((path, of_demo) for path in models), (folder / model.sheet, written_by_us)]:
        if os.path.lexists(path) and (path.is_symlink() or not ours(path)):
            raise GgufSdError(f"{path} exists and is not of an earlier demo; choose another --output")


def compare(args: argparse.Namespace, model: DemoModel) -> tuple[list[Row], list[list[Image.Image]]]:
    """Converts, paints and judges; the rows of the table and the pictures of each."""
    from gguf_sd.cli.inspect import describe
    from gguf_sd.cli.progress import progress_bar
    from gguf_sd.pipeline import Pipeline
    from gguf_sd_convert.convert import ConvertOptions, convert

    captions = [*model.shown, *model.prompts(args.pictures - len(model.shown), args.seed)]
    rows: list[Row] = []
    pictures: list[list[Image.Image]] = []
    runs = len(model.steps) or 1
    with progress_bar(len(TYPES) * len(captions) * runs, args.quiet, unit="picture") as bar:
        for kind in TYPES:
            bar.set_description(kind)
            path = args.output / f"{model.stem}-{kind}.gguf"
            convert(model.folder, path, ConvertOptions(type=kind, force=True))
            pipeline = Pipeline.load(path, args.device, args.dtype, weights="auto")
            unet = describe(pipeline.model)["parts"]["unet"]
            for steps in model.steps or (pipeline.model.config.defaults.steps,):
                painted: list[Image.Image] = []
                started = time.perf_counter()
                for first in range(0, len(captions), BATCH):
                    some = captions[first : first + BATCH]
                    painted += pipeline(some, seed=args.seed + first, batch=BATCH, steps=steps)
                    bar.update(len(some))
                seconds = (time.perf_counter() - started) / len(captions)
                reference = None if kind == TYPES[0] else pictures[len(pictures) % runs]
                rows.append(
                    Row(
                        type=kind,
                        steps=steps,
                        file_bytes=path.stat().st_size,
                        unet_bytes=sum(entry["bytes"] for entry in unet.values()),
                        seconds=round(seconds, 4),
                        **_quality_of(painted, reference),
                        correct=round(model.share_correct(painted, captions) or 0.0, 4),
                    )
                )
                pictures.append(painted)
    return rows, pictures


def _title(row: Row, model: DemoModel) -> str:
    if not model.steps:
        return f"{row.type.upper()}  {row.unet_bytes / 1e6:.1f} MB"
    return f"{row.type.upper()}  {row.steps} step{'s' if row.steps > 1 else ''}"


def _quality_of(pictures: Sequence[Image.Image], references: Sequence[Image.Image] | None) -> dict[str, Any]:
    from gguf_sd.quality import psnr, ssim

    if references is None:
        return {"psnr": None, "ssim": None}
    pairs = list(zip(pictures, references, strict=True))
    return {
        "psnr": round(statistics.median(psnr(p, r) for p, r in pairs), 2),
        "ssim": round(statistics.median(ssim(p, r) for p, r in pairs), 4),
    }


def _quality(row: Row) -> str:
    return "reference" if row.psnr is None else f"{row.psnr:.1f} dB"


def table(rows: Sequence[Row]) -> str:
    """The comparison for people."""
    heads = (
        ("type", 6),
        ("steps", 5),
        ("file, bytes", 12),
        ("UNet, bytes", 12),
        ("s a picture", 12),
        ("PSNR, dB", 9),
        ("SSIM", 7),
    )
    lines = [" ".join(f"{head:<{w}}" if head == "type" else f"{head:>{w}}" for head, w in heads) + "  correct"]
    for row in rows:
        psnr, ssim = ("", "") if row.psnr is None else (f"{row.psnr:.1f}", f"{row.ssim:.3f}")
        cells = f"{row.type:6} {row.steps:>5} {row.file_bytes:>12,} {row.unet_bytes:>12,} {row.seconds:>12.3f}"
        lines.append(f"{cells} {psnr:>9} {ssim:>7} {row.correct:>8.1%}")
    return "\n".join(lines)
