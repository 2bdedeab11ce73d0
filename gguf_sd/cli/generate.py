"""`gguf-sd generate`: a model and a prompt to pictures."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.cli.generate_options import add_options
from gguf_sd.cli.hub_models import fetch_arguments, is_on_hub, local_model
from gguf_sd.cli.once import first_time
from gguf_sd.cli.preflight import check_model, check_type
from gguf_sd.errors import GgufSdError
from gguf_sd.memory_size import parse_memory

if TYPE_CHECKING:
    from gguf_sd.imaging.outputs import Outputs
    from gguf_sd.pipeline import Picture, Pipeline
    from gguf_sd.request import Job
    from gguf_sd.sampling import Step

log = logging.getLogger(__name__)
ON_HUB = ("vae", "clip_l", "clip_g", "loras", "control_models")  # arguments that may name files of the Hub too


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
    check_type(args.type)
    parse_memory(args.max_memory)
    if args.preview < 0:
        raise GgufSdError(f"--preview is {args.preview}; it takes a number of steps, or 0 for none")

    _fetch(args)
    model = _model(args)
    from gguf_sd.cli.controls import given_controls, ready_controls
    from gguf_sd.cli.recorded import make_request, recorded_vae, warn_of_other_model
    from gguf_sd.cli.recorded_adapters import recorded_adapters
    from gguf_sd.cli.resume import with_earlier_seed
    from gguf_sd.imaging.outputs import Outputs
    from gguf_sd.imaging.png_metadata import read_parameters

    recorded = read_parameters(args.settings) if args.settings else {}
    recorded |= recorded_adapters(args, recorded, model)
    args.controls = given_controls(args, recorded.get("controls_used", ()), model)
    request = make_request(args, recorded)
    vae = recorded_vae(args, recorded, model)
    seen = [path for control in args.controls or () for path in (control.path, control.image)]
    given = (*seen, args.settings, args.image, args.mask, args.tokenizer, args.clip_l, args.clip_g, model, vae)
    outputs = Outputs(args.output, request.count, [path for path in given if path is not None], args.force)
    if args.preview:
        outputs.check_preview()
    if args.resume:
        request = with_earlier_seed(request, outputs)
    dtype = args.dtype or recorded.get("dtype", "auto")
    _check_engine(args, dtype, vae)

    from gguf_sd.checkpoint.metadata_keys import TYPE
    from gguf_sd.cli.cache import model_path
    from gguf_sd.pipeline import Pipeline
    from gguf_sd.runtime.kernel_modes import as_recorded
    from gguf_sd.runtime.memory import choose_device
    from gguf_sd.runtime.tuning import Tuning, seconds_of

    tuning = Tuning(seconds_of(args.tune), quiet=args.quiet)
    if not (args.model or args.model_option or args.quiet):
        print("no MODEL is given: the small built-in demo model paints", file=sys.stderr)
    path = model_path(model, args.type, args.tokenizer, quiet=args.quiet, **_unet_alone(model))
    pipeline = Pipeline.load(
        path,
        args.device,
        dtype,
        args.weights,
        args.tokenizer,
        vae,
        as_recorded(args.kernels, args.weights, choose_device(args.device), recorded.get("kernels")),
        args.cuda_graph,
        args.max_memory,
        args.placement,
        args.vae_tile,
        args.clip_l,
        args.clip_g,
    )
    pipeline.tuning = tuning
    warn_of_other_model(recorded, pipeline.model.source_hash)
    if args.controls:
        kind = args.type or pipeline.model.file.metadata.get(TYPE)
        request = replace(request, controls=ready_controls(args.controls, kind, args.quiet))
    job = pipeline.prepare(request)
    if args.plan:
        show_plan(pipeline, job, args.json)
        return 0
    paint(pipeline, job, outputs, args, vae)
    return 0


def _model(args: argparse.Namespace) -> Path:
    from gguf_sd.demo import model_folder

    if args.model is not None and args.model_option is not None:
        raise GgufSdError(f"two models are given, {args.model} and {args.model_option}; choose one")
    model: Path | None = args.model or args.model_option
    if model is None:
        return model_folder()
    from gguf_sd.checkpoint.part_files import PartPaths

    check_model(model, PartPaths(args.clip_l, args.clip_g, args.vae))
    return model


def _fetch(args: argparse.Namespace) -> None:
    """What lies on the Hub, once the other settings are known to be sound, as far as they are without it."""
    if not is_on_hub(args.model, args.model_option, *(getattr(args, name) for name in ON_HUB)):
        if args.revision is not None and (model := args.model or args.model_option) is not None:
            local_model(model, args.revision)  # raises
        return
    from gguf_sd.cli.recorded import make_request

    if args.settings is None:
        make_request(argparse.Namespace(**vars(args) | {"loras": None}), {})
    _check_engine(args, args.dtype or "auto", None)
    for name in ("model", "model_option"):
        if (model := getattr(args, name)) is not None:
            setattr(args, name, local_model(model, args.revision, args.quiet))
    fetch_arguments(args, ON_HUB)


def _unet_alone(model: Path) -> dict[str, Any]:
    """The conversion that a UNet takes whose other parts come from other files."""
    from gguf_sd.checkpoint.safetensors_header import is_safetensors
    from gguf_sd.checkpoint.weights import open_weights

    kind = open_weights(model).kind if is_safetensors(model) else None
    return {"unet_only": True} if kind is not None and kind.part == "unet" else {}


def _check_engine(args: argparse.Namespace, dtype: str, vae: Path | None) -> None:
    """Raises GgufSdError for what the pipeline would refuse, as far as that shows without a model."""
    from gguf_sd.checkpoint.vae_file import VAEFile
    from gguf_sd.runtime.execution import Execution

    memory = args.max_memory, args.placement, args.vae_tile
    Execution.choose(args.device, dtype, args.weights, args.kernels, args.cuda_graph, *memory)
    if vae is not None:
        VAEFile.open(vae)
    if args.tokenizer is not None and not args.tokenizer.exists():
        raise GgufSdError(f"the tokenizer {args.tokenizer} does not exist; give a folder or a BPE merges file")


def paint(pipeline: Pipeline, job: Job, outputs: Outputs, args: argparse.Namespace, vae: Path | None = None) -> None:
    """Paints, saves and tells what was saved, when it is interrupted too."""
    for note in [] if args.quiet else _notes(pipeline, args):
        print(note, file=sys.stderr)
    text = _texts(pipeline, vae)
    done = _finished(job, outputs, text, args) if args.resume else set()
    files: list[dict[str, Any]] = []
    ran: dict[str, Any] = {}  # how the last picture was painted
    started = time.perf_counter()
    interrupted = False
    try:
        for file in _saved(pipeline, job, outputs, args, text, done, ran):
            files.append(file)
    except KeyboardInterrupt:
        interrupted = True
        raise
    finally:
        seconds = round(time.perf_counter() - started, 3)
        if files or interrupted or sys.exc_info()[0] is None:
            kept = [str(outputs.named(index)) for index in sorted(done)]
            report = _report(pipeline, job, ran, seconds, interrupted) | {"kept": kept} if args.json else None
            _tell(files, report)


def _texts(pipeline: Pipeline, vae: Path | None) -> Callable[[Picture], str]:
    """What gives the settings that a picture carries."""
    from gguf_sd.cli.recorded import vae_hash
    from gguf_sd.imaging.png_metadata import parameters

    model, name, digest = pipeline.model, "" if vae is None else vae.name, vae_hash(vae)

    def text(picture: Picture) -> str:
        return parameters(picture, model.path.stem, model.source_hash, _dtype(pipeline), name, digest)

    return text


def _finished(job: Job, outputs: Outputs, text: Callable[[Picture], str], args: argparse.Namespace) -> set[int]:
    """The pictures that an earlier run has left."""
    from PIL import Image

    from gguf_sd.cli.resume import finished
    from gguf_sd.pipeline import Picture

    nothing = Image.new("RGB", (1, 1))
    done = finished(outputs, job, lambda seed: text(Picture(nothing, seed, job)))
    if done and not args.quiet:
        print(f"{len(done)} of {job.count} pictures are there already, and kept", file=sys.stderr)
    return done


def show_plan(pipeline: Pipeline, job: Job, as_json: bool) -> None:
    """What `--plan` prints."""
    from gguf_sd.runtime.plan_text import as_dict, table

    planner = pipeline.planner(job)
    plan = pipeline.planning.plan(planner)
    print(json.dumps(as_dict(plan, planner), indent=2) if as_json else table(plan, planner), flush=True)


def _saved(
    pipeline: Pipeline,
    job: Job,
    outputs: Outputs,
    args: argparse.Namespace,
    text: Callable[[Picture], str],
    done: set[int],
    ran: dict[str, Any],
) -> Iterator[dict[str, Any]]:
    """Paints what is not ``done``; yields path, seed and flag of each picture once it is on the disk."""
    from gguf_sd.cli.progress import progress_bar
    from gguf_sd.cli.resume import remaining
    from gguf_sd.pipeline import Picture

    parts = remaining(job, done)
    batches = sum(len(list(part.batches())) for part, _ in parts)
    with progress_bar(job.steps_run * batches, args.quiet, unit="step") as bar:
        if pipeline.kernels != "torch":
            bar.set_description("compiling kernels")  # on first use; Triton keeps them on disk

        def on_step(step: Step) -> None:
            bar.set_description(None)
            bar.update()
            if args.preview and (step.index + 1) % args.preview == 0:
                image = pipeline.preview(step, job.safety)
                outputs.save_preview(image, text(Picture(image, job.seed, job)))

        indices = [index for _, part in parts for index in part]
        for index, picture in zip(indices, pipeline.paint([part for part, _ in parts], on_step), strict=True):
            if index in done:
                continue
            path = outputs.save(picture.image, index, text(picture))
            ran |= {"weights": picture.weights, "graph_bytes": picture.graph_bytes, "plan": picture.plan}
            yield {"path": str(path), "seed": picture.seed, "flagged": picture.flagged}
            if picture.flagged:
                log.warning("%s was flagged by the safety checker (--safety %s)", path, job.safety)


def _dtype(pipeline: Pipeline) -> str:
    return str(pipeline.dtype).removeprefix("torch.")


def _report(pipeline: Pipeline, job: Job, ran: dict[str, Any], seconds: float, interrupted: bool) -> dict[str, Any]:
    """What `--json` prints besides the files."""
    from gguf_sd.runtime.memory import peak_memory
    from gguf_sd.runtime.plan_text import as_dict

    settings = {field.name: getattr(job, field.name) for field in fields(job) if field.repr}
    plan = ran.get("plan")
    streamed = {name: meter.as_dict() for name, meter in pipeline.parts.streamed.items()}
    return {
        "model": str(pipeline.model.path),
        "device": str(pipeline.device),
        "dtype": _dtype(pipeline),
        "weights": ran.get("weights"),
        "kernels": pipeline.kernels,
        "graph_bytes": ran.get("graph_bytes"),
        "memory": plan and as_dict(plan) | {"measured": peak_memory(pipeline.device), "streamed": streamed},
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
