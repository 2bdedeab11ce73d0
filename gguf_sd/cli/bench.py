"""`gguf-sd bench`: models and programs compared; `gguf-sd bench layers`: what each layer's rounding costs."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.bench.peers import PEERS, SDCPP_ENV, check_peers, check_samplers, sdcpp_program
from gguf_sd.checkpoint.gguf_header import is_gguf
from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from gguf_sd.bench.spec import Spec

TYPES = "f16,q8_0,q4_1,q4_0"
WAY = re.compile(r"(?P<type>[a-z0-9_]+)(?:@(?P<bpw>\d+(?:\.\d+)?))?(?P<calibrated>\+calibrated)?")


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
    from gguf_sd.bench.report import write_report
    from gguf_sd.bench.runner import run as compare
    from gguf_sd.cli.progress import progress_bar

    started_from = len(args.models) == 1 and args.models[0].endswith(".toml")
    _check_output(args)
    spec = _of_file(args) if started_from else _of_arguments(args)
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
        table, _, _ = (args.output / "report.md").read_text().partition("\n\n![")
        print(table)
        print(f"\n{path}")
    return 0


def _check_output(args: argparse.Namespace) -> None:
    if args.output.exists() and not args.output.is_dir():
        raise GgufSdError(f"{args.output} is a file; name a folder")
    if args.output.is_dir() and any(args.output.iterdir()) and not (args.force or args.resume):
        raise GgufSdError(f"{args.output} is not empty; --resume goes on in it, --force replaces, or choose another")


def _of_file(args: argparse.Namespace) -> Spec:
    from gguf_sd.bench.spec import Spec

    path = Path(args.models[0])
    spec = Spec.from_toml(path)
    base = path.resolve().parent
    found, conversions = [], []
    for contestant in spec.contestants:
        model = next((p for p in (base / contestant.model, Path(contestant.model)) if p.exists()), None)
        if model is None:
            source = next((p for p in (base / contestant.source, Path(contestant.source)) if p.exists()), None)
            if not contestant.way or source is None:
                told = f", nor does {contestant.source}, of which it was made" if contestant.way else ""
                raise GgufSdError(f"{path}: {contestant.model} does not exist{told}")
            model = args.output / "models" / f"{contestant.name}.gguf"
            conversions.append((source, model, _way(contestant.way)[1]))
        found.append(replace(contestant, model=str(model.resolve())))
    models = [Path(c.model) for c in found]
    peers = sorted({c.program for c in found} - {"gguf-sd"})
    program = _program(peers, models, spec.device, args.sdcpp or spec.sdcpp)
    spec = _checked(replace(spec, contestants=tuple(found), sdcpp=program), peers)
    for conversion in conversions:
        _convert(*conversion, args)
    return replace(spec, recorded=_recorded(args, models))


def _of_arguments(args: argparse.Namespace) -> Spec:
    from gguf_sd.bench.prompts import read_prompts
    from gguf_sd.bench.spec import PRESETS, Contestant, Spec
    from gguf_sd.sampling.names import resolve_sampler

    if args.preset not in PRESETS:
        raise GgufSdError(f"no preset {args.preset!r}; choose from {', '.join(PRESETS)}")
    if args.count is not None and not 1 <= args.count <= 10_000:
        raise GgufSdError(f"--count is {args.count}; it takes 1 … 10000")
    paths = [Path(model) for model in args.models]
    for path in paths:
        if not path.exists():
            raise GgufSdError(f"{path} does not exist; give .gguf files, checkpoints or diffusers folders")
    peers = [peer for peer in args.peers.split(",") if peer]
    program = _program(peers, paths, args.device, args.sdcpp)
    ways = [_way(word) for word in args.types.split(",")]
    prompts = read_prompts(args.prompts) if args.prompts else _prompts(paths[0], args.count or 16)
    prompts = prompts[: args.count] if args.count else prompts
    contestants, conversions = [], []
    for path in paths:
        if is_gguf(path):
            contestants.append(Contestant(_name(path.stem), str(path.resolve()), source=str(path)))
            continue
        for word, options in ways:
            target = args.output / "models" / f"{_name(path.stem)}-{word}.gguf"
            contestants.append(Contestant(target.stem, str(target.resolve()), source=str(path), way=word))
            conversions.append((path, target, options))
        joining = [peer for peer in peers if peer in PEERS and PEERS[peer].reads(path)]
        model = str(path.resolve())
        contestants += [Contestant(f"{_name(path.stem)}-{peer}", model, peer, str(path)) for peer in joining]
    asked = {name: getattr(args, name) for name in ("steps", "sampler", "width", "height")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if args.sampler is not None:
        asked["sampler"], _ = resolve_sampler(args.sampler)
    own = _defaults(paths[0])
    spec = Spec(
        contestants=tuple(contestants),
        prompts=tuple(prompts),
        settings=tuple(own | settings | asked for settings in PRESETS[args.preset]),
        seed=args.seed,
        rounds=min(args.rounds, len(prompts)),
        device=args.device,
        dtype=args.dtype,
        weights=args.weights,
        errors=args.errors,
        sdcpp=program,
        clip=_path(args.clip),
        lpips=_path(args.lpips),
        fid=_path(args.fid),
    )
    _checked(spec, peers)
    for path, target, options in conversions:
        _convert(path, target, options, args)
    return replace(spec, recorded=_recorded(args, [Path(c.model) for c in contestants]))


def _path(given: Path | None) -> str:
    return "" if given is None else str(given.resolve())


def _program(peers: list[str], models: list[Path], device: str, sdcpp: str | None) -> str:
    """The path of stable-diffusion.cpp's program where it takes part; raises GgufSdError for peers that cannot."""
    from gguf_sd.runtime.memory import choose_device

    if not peers:
        return ""
    program = sdcpp or os.environ.get(SDCPP_ENV, "")
    check_peers(peers, models, choose_device(device).type, program)
    return sdcpp_program(program) if "sdcpp" in peers else ""


def _checked(spec: Spec, peers: list[str]) -> Spec:
    """Raises GgufSdError for samplers that a peer lacks and weights of metrics that are not there."""
    from gguf_sd.bench.learned import check_weights

    check_samplers(peers, {settings["sampler"] for settings in spec.settings if "sampler" in settings})
    check_weights(spec.clip, spec.lpips, spec.fid)
    return spec


def _defaults(path: Path) -> dict[str, Any]:
    """The first model's own settings, said to every program."""
    if is_gguf(path):
        from gguf_sd.checkpoint.model_file import ModelFile

        defaults = ModelFile.open(path).config.defaults
    else:
        from gguf_sd_convert.options import ConvertOptions
        from gguf_sd_convert.prepare import source_config

        defaults = source_config(path, ConvertOptions()).defaults
    return {name: getattr(defaults, name) for name in ("steps", "guidance", "sampler", "width", "height")}


def _name(stem: str) -> str:
    return re.sub(r"[^\w.+@-]", "-", stem)[:60]


def _way(word: str) -> tuple[str, dict[str, Any]]:
    """A word of --types as options of a conversion; raises GgufSdError for others."""
    from gguf_sd_convert.calibrate.options import Calibration
    from gguf_sd_convert.quantize.policy import type_name

    word = word.strip().lower()
    if (found := WAY.fullmatch(word)) is None:
        raise GgufSdError(f"--types: {word!r} is no type; write q4_0, q4_0+calibrated or mixed@4.8")
    qtype, bpw = type_name(found["type"]), found["bpw"]
    if (qtype == "mixed") != (bpw is not None):
        raise GgufSdError(f"--types: {word!r}: bits a weight go with mixed, as in mixed@4.8")
    options: dict[str, Any] = {"type": qtype}
    if bpw or found["calibrated"]:
        compensate = bool(found["calibrated"])
        options["calibration"] = Calibration(compensate=compensate, bpw=float(bpw) if bpw else None)
    return word, options


def _convert(source: Path, target: Path, options: dict[str, Any], args: argparse.Namespace) -> None:
    from gguf_sd_convert.convert import ConvertOptions, convert

    if args.resume and target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if (calibration := options.get("calibration")) is not None:  # recorded once for all types
        data = target.parent / f"{_name(source.stem)}.imatrix.gguf"
        shared = replace(calibration, imatrix=data) if data.exists() else replace(calibration, save=data)
        options = options | {"calibration": shared}
    convert(
        source,
        target,
        ConvertOptions(tokenizer=args.tokenizer, force=args.force or args.resume, **options),
        quiet=args.quiet,
    )


def _prompts(path: Path, count: int) -> list[str]:
    """Of a demo model's world, scenes that its training never saw, which no calibration takes either."""
    from gguf_sd.bench.prompts import default_prompts
    from gguf_sd.demo.models import demo_model

    if (demo := demo_model(path)) is not None:
        return demo.prompts(count, seed=7)
    found = default_prompts(path)
    return [found[i % len(found)] for i in range(count)]


def _recorded(args: argparse.Namespace, models: list[Path]) -> dict[str, Any]:
    """What a comparison depends on: versions, machine, models and command."""
    import importlib.metadata as metadata

    import torch

    import gguf_sd
    from gguf_sd.bench.runner import fingerprint
    from gguf_sd.runtime.memory import choose_device

    device = choose_device(args.device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    versions = {name: metadata.version(name) for name in ("torch", "numpy", "transformers", "torchmetrics")}
    return {
        "gguf_sd": gguf_sd.__version__,
        **versions,
        "python": platform.python_version(),
        "system": platform.platform(),
        "device": f"{device} ({where})",
        "threads": torch.get_num_threads(),
        "models": json.dumps({model.name: fingerprint(model) for model in models}),
        "command": shlex.join(["gguf-sd", *sys.argv[1:]]),
    }


def _processor() -> str:
    """The processor's name, as far as the system tells it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
