"""Files that travel: what other programs make of ours, and we of theirs, on full-size weights.

    python -m benchmarks.lib.make_checkpoint /tmp/sd15.safetensors
    pip install cyllama; git clone https://github.com/city96/ComfyUI-GGUF /tmp/ComfyUI-GGUF
    python -m benchmarks.compat.run /tmp/sd15.safetensors --tokenizer VOCABULARY --comfyui-gguf /tmp/ComfyUI-GGUF \
        --output benchmarks/results/compat.json

Takes some ten minutes on two cores, 6 GB of memory and as much disk. What is not installed is left out, and said.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import multiprocessing
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.compat import comfyui_gguf, diffusers_gguf, sdcpp

SETTINGS = sdcpp.Settings()


def alone(function: Callable[..., Any], *args: Any) -> Any:
    """Runs in a process of its own, whose memory goes with it."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *args).result()


def command(*arguments: str) -> Any:
    """Runs a command of ours; its seconds and peak memory in MB."""
    return alone(_measured, arguments)


def _measured(arguments: tuple[str, ...]) -> dict[str, float]:
    from gguf_sd.cli.main import main

    started = time.perf_counter()
    if main([*arguments, "--quiet"]):
        raise SystemExit(f"gguf-sd {' '.join(arguments)} failed")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"seconds": round(time.perf_counter() - started, 1), "peak_mb": round(peak)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a full-size checkpoint of SD 1.5")
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--comfyui-gguf", type=Path, help="a checkout of ComfyUI-GGUF")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    result: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "source": args.source.name,
        "cpu": platform.processor() or platform.machine(),
        "versions": {name: _version(name) for name in ("torch", "gguf", "diffusers", "cyllama")},
        "settings": vars(SETTINGS),
    }
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for name, part in (("files", files), ("diffusers", with_diffusers), ("comfyui_gguf", with_comfyui_gguf),
                           ("sdcpp", with_sdcpp)):  # fmt: skip
            result[name] = part(Path(folder), args)
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
    alone(sdcpp.convert, args.source, whole, "q4_0")
    for name, path in (("our linear q4_0", folder / "linear.gguf"), ("their whole q4_0", whole)):
        theirs = alone(sdcpp.theirs, path, SETTINGS, args.threads)
        ours = alone(sdcpp.ours, path, SETTINGS, args.tokenizer)
        result[name] = {"psnr_db": round(sdcpp.psnr(theirs, ours), 1), "spread": round(float(ours.std()), 1)}
    return result


if __name__ == "__main__":
    main()
