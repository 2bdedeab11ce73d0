"""`gguf-sd generate`: a model and a prompt to pictures."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from gguf_sd.pipeline import Pipeline
    from gguf_sd.request import Job, Request
    from gguf_sd.sampling import Step

log = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        help="paint pictures from a prompt",
        description="Paints pictures. Settings that are not given come from the model's file.",
    )
    add = parser.add_argument
    add("model", nargs="?", type=Path, help="a .gguf file; or a checkpoint or diffusers folder, converted into the "
        "cache first (default: the built-in demo model)")  # fmt: skip
    add("--from", type=Path, dest="settings", metavar="PNG", help="take the settings from a picture; others given here "
        "override them")  # fmt: skip
    add("-p", "--prompt", help="what to paint; (x:1.2) weighs x, BREAK starts a new chunk")
    add("-n", "--negative-prompt", help="what to keep away from; needs guidance above 1")
    add("-o", "--output", type=Path, default=Path("out.png"), help="PNG to write; several get -1, -2, … (out.png)")
    add("--steps", type=int, help="sampling steps")
    add("--guidance", type=float, help="classifier-free guidance scale; 1 or less does without (and is twice as fast)")
    add("--sampler", help="pndm, ddim, euler, euler_a, heun, dpmpp_2m, dpmpp_2m_sde, lcm, or another program's name")
    add("--schedule", help="model, karras, exponential, trailing, leading, linspace")
    add("--seed", type=int, help="seed of the first picture; the next ones count up (default: random)")
    add("--width", type=int, help="pixels, a multiple of 8")
    add("--height", type=int, help="pixels, a multiple of 8")
    add("--count", type=int, default=1, help="pictures in all (1)")
    add("--batch", type=int, default=1, help="pictures painted at once: faster on a GPU, more memory (1)")
    add("--clip-skip", type=int, help="text encoder layers counted from the end: 1 takes the last, 2 the last but one")
    add("--original-size", type=_pair, metavar="WxH", help="SDXL: the size that the picture seems to have had")
    add("--crop", type=_pair, default=(0, 0), metavar="XxY", help="SDXL: pixels cut off on the left and the top (0x0)")
    add("--init-image", type=Path, dest="image", help="picture to start from (image-to-image)")
    add("--strength", type=float, help="how much of it may change, up to 1 (0.8; 1 with --mask)")
    add("--resize", default="crop", help="how it is brought to size: crop, fit or stretch (crop)")
    add("--mask", type=Path, help="repaint the picture only where this one is white, or transparent (inpainting)")
    add("--mask-blur", type=int, default=4, help="pixels over which the mask's edge is softened, inwards (4)")
    add("--no-paste", action="store_false", dest="paste", help="keep what the model made of the rest of the picture")
    add("--safety", default="blur", help="what happens to pictures that the model's safety checker flags: blur, warn "
        "or off (blur)")  # fmt: skip
    add("--vae", type=Path, help="another autoencoder: TAESD, or a full VAE file or folder")
    add("--preview", type=int, default=0, metavar="N", help="write OUTPUT.preview.png every N steps (0 = never)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, …")
    add("--dtype", help="auto, float32, float16, bfloat16: what the UNet computes in (auto)")
    add("--weights", default="auto", help="auto, quantized (small) or resident (dequantised once: faster, larger)")
    add("--kernels", default="auto", help="how quantised layers compute: fused, dequantize, int8 or resident (Triton, "
        "on a GPU), torch (auto: the fastest where this GPU has been measured, else torch)")  # fmt: skip
    add("--cuda-graph", default="auto", help="replay UNet steps from CUDA graphs: on, off (auto: with Triton kernels)")
    add("--type", default=None, help="quantisation of a MODEL that is no GGUF: f16, q8_0, q4_1, q4_0 (q8_0)")
    add("--tokenizer", type=Path, help="tokenizer for a model that carries none: a folder or a BPE merges file")
    add("--quiet", action="store_true", help="no progress bars")
    add("--json", action="store_true", help="print settings, files and times as JSON")
    parser.set_defaults(run=run)


def _pair(text: str) -> tuple[int, int]:
    """'1024x768' as two numbers; argparse turns the ValueError into a sentence."""
    first, _, second = text.partition("x")
    return int(first), int(second)


_pair.__name__ = "pair, such as 1024x768"


def run(args: argparse.Namespace) -> int:
    from gguf_sd.cli.cache import model_path
    from gguf_sd.demo import model_folder
    from gguf_sd.imaging.png_metadata import read_parameters
    from gguf_sd.pipeline import Pipeline

    _check_output(args.output)
    if args.preview < 0:
        raise GgufSdError(f"--preview is {args.preview}; it takes a number of steps, or 0 for none")
    recorded = read_parameters(args.settings) if args.settings else {}
    request = _request(args, recorded)
    path = model_path(args.model or model_folder(), args.type, args.tokenizer, quiet=args.quiet)
    dtype = args.dtype or recorded.get("dtype", "auto")
    pipeline = Pipeline.load(
        path, args.device, dtype, args.weights, args.tokenizer, args.vae, args.kernels, args.cuda_graph
    )
    _check_model(pipeline, recorded)
    job = pipeline.prepare(request)
    report = paint(pipeline, job, args)
    if args.json:
        print(json.dumps(report, indent=2))
    elif not args.quiet:
        for file in report["files"]:
            print(f"{file['path']}  seed {file['seed']}")
    return 0


def _request(args: argparse.Namespace, recorded: dict[str, Any]) -> Request:
    """The settings of the command line over those recorded in a picture."""
    from gguf_sd.imaging.images import open_image
    from gguf_sd.request import Request

    names = {f.name for f in fields(Request)}
    if args.sampler is not None:
        recorded = {**recorded, "schedule": None}  # it went with the recorded sampler
    if "strength" in recorded and args.image is None:
        raise GgufSdError(f"{args.settings} was painted from another picture; give that one with --init-image")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    values: dict[str, Any] = {name: value for name, value in recorded.items() if name in names} | given
    values |= {name: open_image(values[name]) for name in ("image", "mask") if name in values}
    return Request(**values)


def _check_model(pipeline: Pipeline, recorded: dict[str, Any]) -> None:
    wanted, got = recorded.get("model_hash", ""), pipeline.model.source_hash
    if wanted and got and not got.startswith(wanted):
        log.warning(
            "the picture was painted by another model (%s, hash %s), the result will differ",
            recorded.get("model"),
            wanted,
        )


def paint(pipeline: Pipeline, job: Job, args: argparse.Namespace) -> dict[str, Any]:
    """Paints and saves; returns what `--json` prints: settings, files, seconds."""
    from tqdm import tqdm

    from gguf_sd.imaging.atomic_write import save_png
    from gguf_sd.imaging.png_metadata import PARAMETERS, parameters

    for note in [] if args.quiet else _notes(pipeline, job, args):
        print(note, file=sys.stderr)
    dtype = str(pipeline.dtype).removeprefix("torch.")
    files, started = [], time.perf_counter()
    ran: dict[str, Any] = {}
    with tqdm(total=job.steps_run * len(list(job.batches())), unit="step", disable=args.quiet) as bar:
        if pipeline.kernels != "torch":
            bar.set_description("compiling kernels")  # on first use; Triton keeps them on disk

        def on_step(step: Step) -> None:
            bar.set_description(None)
            bar.update()
            if args.preview and (step.index + 1) % args.preview == 0:
                save_png(pipeline.preview(step, job.safety), args.output.with_suffix(".preview.png"))

        for index, picture in enumerate(pipeline.paint(job, on_step)):
            path = _numbered(args.output, index, job.count)
            text = parameters(picture, pipeline.model.path.stem, pipeline.model.source_hash, dtype)
            save_png(picture.image, path, {PARAMETERS: text})
            files.append({"path": str(path), "seed": picture.seed, "flagged": picture.flagged})
            ran = {"weights": picture.weights, "graph_bytes": picture.graph_bytes}
            if picture.flagged:
                log.warning("%s was flagged by the safety checker (--safety %s)", path, args.safety)
    settings = {f.name: getattr(job, f.name) for f in fields(job) if f.repr}
    return {
        "model": str(pipeline.model.path),
        "device": str(pipeline.device),
        "dtype": dtype,
        "weights": ran.get("weights"),
        "kernels": pipeline.kernels,
        "graph_bytes": ran.get("graph_bytes"),
        "settings": settings,
        "files": files,
        "seconds": round(time.perf_counter() - started, 3),
    }


def _notes(pipeline: Pipeline, job: Job, args: argparse.Namespace) -> Iterator[str]:
    """What the user may not expect."""
    if pipeline.model.config.safety is None and args.safety != "off":
        yield "this model carries no safety checker"
    unmeasured = args.kernels == "auto" and pipeline.kernels == "torch" and pipeline.device.type == "cuda"
    if unmeasured and pipeline.memory_plan(job).weights == "quantized":
        yield "no speeds of the Triton kernels are known for this GPU, plain torch is used; try --kernels fused"


def _numbered(path: Path, index: int, count: int) -> Path:
    return path if count == 1 else path.with_name(f"{path.stem}-{index + 1}{path.suffix}")


def _check_output(path: Path) -> None:
    """Found out before minutes of painting, not after."""
    if path.suffix.lower() != ".png":
        raise GgufSdError(f"the output {path} must end in .png: the settings are kept in PNG text")
    if path.is_dir():
        raise GgufSdError(f"the output {path} is a folder; give a file name in it")
    if not path.parent.is_dir():
        raise GgufSdError(f"the output's folder {path.parent} does not exist; create it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise GgufSdError(f"cannot write to {path.parent}: {error.strerror}; choose another --output") from error
