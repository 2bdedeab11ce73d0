"""Files that travel: what other programs make of ours, and we of theirs, on full-size weights.

    python -m benchmarks.lib.make_checkpoint /tmp/sd15.safetensors
    pip install cyllama; git clone https://github.com/city96/ComfyUI-GGUF /tmp/ComfyUI-GGUF
    python -m benchmarks.compat.run /tmp/sd15.safetensors --tokenizer VOCABULARY --comfyui-gguf /tmp/ComfyUI-GGUF \
        --work /tmp/compat --output benchmarks/results/compat.json

Takes some five minutes on two idle cores, 6 GB of memory and 8 GB of disk. What is not installed is left out, and said.
Files in the folder --work are taken again; --only runs some of the parts, whose results replace those in --output.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import platform
import resource
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.compat import comfyui_gguf, diffusers_gguf, sdcpp
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.metadata_keys import CALIBRATION
from gguf_sd.config import SD15
from gguf_sd_convert.calibrate.options import Calibration
from gguf_sd_convert.convert import ConvertOptions, convert

SETTINGS = sdcpp.Settings()


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Runs in a process of its own, whose memory goes with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def command(*arguments: str) -> Any:
    """Runs a command of ours, the file of which is behind -o; its peak memory in MB, or that it was there already."""
    there = Path(arguments[arguments.index("-o") + 1]).exists()
    return "there already" if there else alone(_peak, arguments)


def _peak(arguments: tuple[str, ...]) -> dict[str, int]:
    from gguf_sd.cli.main import main

    if main([*arguments, "--quiet"]):
        raise SystemExit(f"gguf-sd {' '.join(arguments)} failed")
    return {"peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a full-size checkpoint of SD 1.5")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--comfyui-gguf", type=Path, help="a checkout of ComfyUI-GGUF")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="folder for the files that are made")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.work.mkdir(exist_ok=True)
    result: dict[str, Any] = {}
    if args.output and args.output.exists():
        result = json.loads(args.output.read_text())
    result |= {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": args.source.name,
        "cpu": platform.processor() or platform.machine(),
        "versions": {name: _version(name) for name in ("torch", "gguf", "diffusers", "cyllama")},
        "settings": vars(SETTINGS),
    }
    for name in args.only:
        result[name] = PARTS[name](args.work, args)
        print(name, json.dumps(result[name], indent=1), flush=True)
        if args.output:
            args.output.write_text(json.dumps(result, indent=1) + "\n")


def _version(name: str) -> str:
    try:
        return version(name)
    except ImportError:
        return "not installed"


def files(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """What the others get, made by our commands; conversions of GGUF files, and what they take."""
    source, tokenizer = str(args.source), ["--tokenizer", str(args.tokenizer)]
    at = {name: str(folder / f"{name}.gguf") for name in ("f16", "linear", "comfy", "unet", "packed", "again")}
    took = {
        "checkpoint to f16": command("convert", source, "-o", at["f16"], "--type", "f16", *tokenizer),
        "f16.gguf to q4_0, linear": command(
            "convert", at["f16"], "-o", at["linear"], "--type", "q4_0", "--layout", "linear"
        ),
        "f16.gguf to q4_0, comfy": command(
            "convert", at["f16"], "-o", at["comfy"], "--type", "q4_0", "--layout", "comfy"
        ),
        "comfy.gguf to its UNet alone": command("convert", at["comfy"], "-o", at["unet"], "--unet-only"),
        "UNet and parts of the checkpoint, packed": command(
            "pack", at["unet"], "--clip-l", source, "--vae", source, "-o", at["packed"], *tokenizer
        ),
        "packed to linear": command("convert", at["packed"], "-o", at["again"], "--layout", "linear"),
    }
    return took | {"bytes": {name: Path(path).stat().st_size for name, path in at.items()}}


def with_diffusers(folder: Path, args: argparse.Namespace) -> Any:
    if importlib.util.find_spec("diffusers") is None:
        return "diffusers is not installed"
    return {name: alone(diffusers_gguf.compare, folder / f"{name}.gguf") for name in ("linear", "again")}


def with_comfyui_gguf(folder: Path, args: argparse.Namespace) -> Any:
    if args.comfyui_gguf is None:
        return "--comfyui-gguf is not given"
    return {
        name: alone(comfyui_gguf.compare, folder / f"{name}.gguf", args.comfyui_gguf)
        for name in ("comfy", "unet", "linear", "packed")
    }


def with_sdcpp(folder: Path, args: argparse.Namespace) -> Any:
    """PSNR between pictures of the same file, in decibels."""
    if importlib.util.find_spec("cyllama") is None:
        return "cyllama is not installed"
    torch.set_num_threads(args.threads)
    whole, result = folder / "sdcpp.gguf", {}
    if not whole.exists():
        alone(sdcpp.convert, args.source, whole, "q4_0")
    for name, path in (("our linear q4_0", folder / "linear.gguf"), ("their whole q4_0", whole)):
        theirs = alone(sdcpp.theirs, path, SETTINGS, args.threads)
        ours = alone(sdcpp.ours, path, SETTINGS, args.tokenizer)
        result[name] = {"psnr_db": round(sdcpp.psnr(theirs, ours), 1), "spread": round(float(ours.std()), 1)}
    return result


def calibrated(folder: Path, args: argparse.Namespace) -> Any:
    """A calibrated file in the linear layout: its UNet in diffusers, its picture by stable-diffusion.cpp and by us; and
    how near the program's pictures of it and of the file without calibration are to ours of the checkpoint in F16."""
    torch.set_num_threads(args.threads)
    path = folder / "calibrated.gguf"
    if not path.exists():
        alone(_calibrate, args.source, args.tokenizer, path)
    facts = GGUFFile(path).metadata[CALIBRATION]
    result: dict[str, Any] = {"calibration": json.loads(facts) | {"pictures": "128x128"}}
    if importlib.util.find_spec("diffusers") is not None:
        result["diffusers"] = alone(diffusers_gguf.compare, path)
    if importlib.util.find_spec("cyllama") is None:
        return result | {"sdcpp": "cyllama is not installed"}
    theirs, plain = (alone(sdcpp.theirs, of, SETTINGS, args.threads) for of in (path, folder / "linear.gguf"))
    ours, full = (alone(sdcpp.ours, of, SETTINGS, args.tokenizer) for of in (path, folder / "f16.gguf"))
    return result | {
        "sdcpp": {
            "psnr_db_against_ours": round(sdcpp.psnr(theirs, ours), 1),
            "psnr_db_against_f16": round(sdcpp.psnr(theirs, full), 1),
            "psnr_db_uncalibrated_against_f16": round(sdcpp.psnr(plain, full), 1),
        }
    }


def _calibrate(source: Path, tokenizer: Path, target: Path) -> None:
    """On a few calls of small pictures, so that it takes minutes."""
    small = replace(SD15, defaults=replace(SD15.defaults, width=128, height=128))
    calibration = Calibration(samples=16)
    options = ConvertOptions(type="q4_0", layout="linear", tokenizer=tokenizer, config=small, calibration=calibration)
    convert(source, target, options)


PARTS = {
    "files": files,
    "diffusers": with_diffusers,
    "comfyui_gguf": with_comfyui_gguf,
    "sdcpp": with_sdcpp,
    "calibrated": calibrated,
}

if __name__ == "__main__":
    main()
