"""`gguf-sd generate`: a model and a prompt to pictures."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.cli.generate_options import add_options
from gguf_sd.cli.once import first_time
from gguf_sd.cli.preflight import check_model, check_type
from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from gguf_sd.imaging.outputs import Outputs
    from gguf_sd.pipeline import Picture, Pipeline
    from gguf_sd.request import Job
    from gguf_sd.sampling import Step

log = logging.getLogger(__name__)


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "generate",
        help="paint pictures from a prompt",
        description="Paints pictures. Settings that are not given come from the model's file.",
    )
    add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """What can be wrong with the arguments is found out first: a model that is no GGUF takes minutes to convert."""
    model = _model(args)
    check_type(args.type)
    if args.preview < 0:
        raise GgufSdError(f"--preview is {args.preview}; it takes a number of steps, or 0 for none")

    from gguf_sd.cli.recorded import make_request, recorded_vae, warn_of_other_model
    from gguf_sd.cli.recorded_adapters import recorded_adapters
    from gguf_sd.imaging.outputs import Outputs
    from gguf_sd.imaging.png_metadata import read_parameters

    recorded = read_parameters(args.settings) if args.settings else {}
    recorded |= recorded_adapters(args, recorded, model)
    request = make_request(args, recorded)
    vae = recorded_vae(args, recorded, model)
    given = (args.settings, args.image, args.mask, args.tokenizer, model, vae)
    outputs = Outputs(args.output, request.count, [path for path in given if path is not None], args.force)
    if args.preview:
        outputs.check_preview()
    dtype = args.dtype or recorded.get("dtype", "auto")
    _check_engine(args, dtype, vae)

    from gguf_sd.cli.cache import model_path
    from gguf_sd.pipeline import Pipeline
    from gguf_sd.runtime.tuning import Tuning, seconds_of

    tuning = Tuning(seconds_of(args.tune), quiet=args.quiet)
    if not (args.model or args.model_option or args.quiet):
        print("no MODEL is given: the small built-in demo model paints", file=sys.stderr)
    path = model_path(model, args.type, args.tokenizer, quiet=args.quiet)
    pipeline = Pipeline.load(path, args.device, dtype, args.weights, args.tokenizer, vae, args.kernels, args.cuda_graph)
    pipeline.tuning = tuning
    warn_of_other_model(recorded, pipeline.model.source_hash)
    job = pipeline.prepare(request)
    paint(pipeline, job, outputs, args, vae)
    return 0


def _model(args: argparse.Namespace) -> Path:
    from gguf_sd.demo import model_folder

    if args.model is not None and args.model_option is not None:
        raise GgufSdError(f"two models are given, {args.model} and {args.model_option}; choose one")
    model: Path | None = args.model or args.model_option
    if model is None:
        return model_folder()
    check_model(model)
    return model


def _check_engine(args: argparse.Namespace, dtype: str, vae: Path | None) -> None:
    """Raises GgufSdError for what the pipeline would refuse, as far as that shows without a model."""
    from gguf_sd.checkpoint.vae_file import VAEFile
    from gguf_sd.runtime import memory
    from gguf_sd.runtime.cuda_graph import use_graphs
    from gguf_sd.runtime.kernel_modes import choose_kernels

    device = memory.choose_device(args.device)
    memory.choose_dtype(dtype, device)
    if args.weights not in memory.WEIGHT_MODES:
        raise GgufSdError(f"unknown weights mode {args.weights!r}; choose from {', '.join(memory.WEIGHT_MODES)}")
    kernels, _ = choose_kernels(args.kernels, args.weights, device)
    use_graphs(args.cuda_graph, device, kernels, passes=0)
    if vae is not None:
        VAEFile.open(vae)
    if args.tokenizer is not None and not args.tokenizer.exists():
        raise GgufSdError(f"the tokenizer {args.tokenizer} does not exist; give a folder or a BPE merges file")


def paint(pipeline: Pipeline, job: Job, outputs: Outputs, args: argparse.Namespace, vae: Path | None = None) -> None:
    """Paints, saves and tells what was saved, when it is interrupted too."""
    for note in [] if args.quiet else _notes(pipeline, args):
        print(note, file=sys.stderr)
    files: list[dict[str, Any]] = []
    ran: dict[str, Any] = {}  # how the last picture was painted
    started = time.perf_counter()
    interrupted = False
    try:
        for file in _saved(pipeline, job, outputs, args, vae, ran):
            files.append(file)
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        seconds = round(time.perf_counter() - started, 3)
        if files or interrupted or sys.exc_info()[0] is None:
            _tell(files, _report(pipeline, job, ran, seconds, interrupted) if args.json else None)


def _saved(
    pipeline: Pipeline,
    job: Job,
    outputs: Outputs,
    args: argparse.Namespace,
    vae: Path | None,
    ran: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Paints; yields path, seed and flag of each picture once it is on the disk."""
    from gguf_sd.cli.progress import progress_bar
    from gguf_sd.cli.recorded import vae_hash
    from gguf_sd.imaging.png_metadata import parameters
    from gguf_sd.pipeline import Picture

    model, vae_digest = pipeline.model, vae_hash(vae)

    def text(picture: Picture) -> str:
        name = "" if vae is None else vae.name
        return parameters(picture, model.path.stem, model.source_hash, _dtype(pipeline), name, vae_digest)

    with progress_bar(job.steps_run * len(list(job.batches())), args.quiet, unit="step") as bar:
        if pipeline.kernels != "torch":
            bar.set_description("compiling kernels")  # on first use; Triton keeps them on disk

        def on_step(step: Step) -> None:
            bar.set_description(None)
            bar.update()
            if args.preview and (step.index + 1) % args.preview == 0:
                image = pipeline.preview(step, job.safety)
                outputs.save_preview(image, text(Picture(image, job.seed, job)))

        for index, picture in enumerate(pipeline.paint(job, on_step)):
            path = outputs.save(picture.image, index, text(picture))
            ran |= {"weights": picture.weights, "graph_bytes": picture.graph_bytes}
            yield {"path": str(path), "seed": picture.seed, "flagged": picture.flagged}
            if picture.flagged:
                log.warning("%s was flagged by the safety checker (--safety %s)", path, job.safety)


def _dtype(pipeline: Pipeline) -> str:
    return str(pipeline.dtype).removeprefix("torch.")


def _report(pipeline: Pipeline, job: Job, ran: dict[str, Any], seconds: float, interrupted: bool) -> dict[str, Any]:
    """What `--json` prints besides the files."""
    settings = {field.name: getattr(job, field.name) for field in fields(job) if field.repr}
    return {
        "model": str(pipeline.model.path),
        "device": str(pipeline.device),
        "dtype": _dtype(pipeline),
        "weights": ran.get("weights"),
        "kernels": pipeline.kernels,
        "graph_bytes": ran.get("graph_bytes"),
        "settings": settings,
        "seconds": seconds,
        "interrupted": interrupted,
    }


def _tell(files: list[dict[str, Any]], report: dict[str, Any] | None) -> None:
    if report is not None:
        print(json.dumps(report | {"files": files}, indent=2, default=str), flush=True)
        return
    for file in files:
        print(f"{file['path']}  seed {file['seed']}", flush=True)


def _notes(pipeline: Pipeline, args: argparse.Namespace) -> Iterator[str]:
    """What the user may not expect."""
    if pipeline.model.config.safety is None and args.safety != "off" and first_time("safety", pipeline.model.path):
        yield "this model carries no safety checker"
    if args.kernels == "auto" and pipeline.kernels == "torch" and pipeline.device.type == "cuda":
        yield "Triton is not installed: quantised layers run in plain torch, which is slow; pip install triton"
