"""What `gguf-sd bench` compares: from its arguments, or the bench.toml of an earlier report, to a Spec whose models are
there."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf_sd.bench.peers import PEERS, SDCPP_ENV, check_peers, check_samplers, sdcpp_program
from gguf_sd.bench.spec import PRESETS, Contestant, Spec
from gguf_sd.checkpoint.gguf_header import is_gguf
from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError

WAY = re.compile(r"(?P<type>[a-z0-9_]+)(?:@(?P<bpw>\d+(?:\.\d+)?))?(?P<calibrated>\+calibrated)?")


@dataclass(frozen=True)
class _Conversion:
    """``options``: of ConvertOptions; ``data``: where what is recorded of the source for one type waits for others."""

    source: Path
    target: Path
    options: dict[str, Any]
    data: Path


def spec_of_file(args: argparse.Namespace) -> Spec:
    """Of a bench.toml; models that are gone are made again. Raises GgufSdError for a file that is none, and for models
    and programs that are not there."""
    path = Path(args.models[0])
    spec = Spec.from_toml(path)
    base = path.resolve().parent
    found: list[Contestant] = []
    conversions: list[_Conversion] = []
    for contestant in spec.contestants:
        model = next((p for p in (base / contestant.model, Path(contestant.model)) if p.exists()), None)
        if model is None:
            source = next((p for p in (base / contestant.source, Path(contestant.source)) if p.exists()), None)
            if not contestant.way or source is None:
                told = f", nor does {contestant.source}, of which it was made" if contestant.way else ""
                raise GgufSdError(f"{path}: {contestant.model} does not exist{told}")
            model = args.output / "models" / f"{contestant.name}.gguf"
            data = model.with_name(f"{contestant.name.removesuffix('-' + contestant.way)}.imatrix.gguf")
            conversions.append(_Conversion(source, model, _way(contestant.way)[1], data))
        found.append(replace(contestant, model=str(model.resolve())))
    models = [Path(c.model) for c in found]
    peers = sorted({c.program for c in found} - {"gguf-sd"})
    program = _program(peers, models, spec.device, args.sdcpp or spec.sdcpp)
    spec = _checked(replace(spec, contestants=tuple(found), sdcpp=program), peers)
    _convert(conversions, args)
    return replace(spec, recorded=_recorded(args, models))


def spec_of_arguments(args: argparse.Namespace) -> Spec:
    """Of the command line; checkpoints are converted. Raises GgufSdError, before any work, for what does not do."""
    from gguf_sd.bench.prompts import read_prompts
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
    contestants: list[Contestant] = []
    conversions: list[_Conversion] = []
    for path, name in zip(paths, _names(paths), strict=True):
        if is_gguf(path):
            contestants.append(Contestant(name, str(path.resolve()), source=str(path)))
        for word, options in [] if is_gguf(path) else ways:
            target = args.output / "models" / f"{name}-{word}.gguf"
            contestants.append(Contestant(f"{name}-{word}", str(target.resolve()), source=str(path), way=word))
            conversions.append(_Conversion(path, target, options, target.with_name(f"{name}.imatrix.gguf")))
        joining = [peer for peer in peers if PEERS[peer].reads(path)]
        model = str(path.resolve())
        contestants += [Contestant(f"{name}-{peer}", model, peer, str(path)) for peer in joining]
    asked = {name: getattr(args, name) for name in ("steps", "sampler", "width", "height")}
    asked = {name: value for name, value in asked.items() if value is not None}
    if args.sampler is not None:
        asked["sampler"], _ = resolve_sampler(args.sampler)
    configs = [_config(path) for path in paths]
    defaults = configs[0].defaults
    own = {name: getattr(defaults, name) for name in ("steps", "guidance", "sampler", "width", "height")}
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
    for config in configs:
        _check_pictures(spec, config)
    _convert(conversions, args)
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


def _config(path: Path) -> ModelConfig:
    """A model's configuration; of a checkpoint, that which its conversion will carry."""
    if is_gguf(path):
        from gguf_sd.checkpoint.model_file import ModelFile

        return ModelFile.open(path).config
    from gguf_sd_convert.options import ConvertOptions
    from gguf_sd_convert.prepare import source_config

    return source_config(path, ConvertOptions())


def _check_pictures(spec: Spec, config: ModelConfig) -> None:
    """Raises GgufSdError for settings that a model cannot paint with, and for a device, dtype or weights that there
    are not."""
    from gguf_sd.request import Request, prepare
    from gguf_sd.runtime.execution import Execution

    Execution.choose(spec.device, spec.dtype, spec.weights)
    for settings in spec.settings:
        prepare(Request(seed=0, safety="off", **settings), config)


def _names(paths: Sequence[Path]) -> list[str]:
    """Of models: their files' names, with the folders' before them where two are called the same."""
    names = [_name(path.stem) for path in paths]
    if len(set(names)) < len(names):
        names = [_name(f"{path.resolve().parent.name}-{path.stem}") for path in paths]
    return names


def _name(stem: str) -> str:
    return re.sub(r"[^\w.+@-]", "-", stem)[:60]


def _way(word: str) -> tuple[str, dict[str, Any]]:
    """A word of --types as options of a conversion; raises GgufSdError for others."""
    from gguf_sd_convert.calibrate.job import check_calibration
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
        check_calibration(options["calibration"], qtype)
    return word, options


def _convert(conversions: Sequence[_Conversion], args: argparse.Namespace) -> None:
    """With --resume what is there stays, models and recordings."""
    from gguf_sd_convert.convert import ConvertOptions, convert

    if not args.resume:
        for one in conversions:
            one.data.unlink(missing_ok=True)
    for one in conversions:
        if args.resume and one.target.exists():
            continue
        one.target.parent.mkdir(parents=True, exist_ok=True)
        options = one.options
        if (calibration := options.get("calibration")) is not None:
            known = one.data.exists()
            shared = replace(calibration, imatrix=one.data) if known else replace(calibration, save=one.data)
            options = options | {"calibration": shared}
        whole = ConvertOptions(tokenizer=args.tokenizer, force=args.force or args.resume, **options)
        convert(one.source, one.target, whole, quiet=args.quiet)


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
