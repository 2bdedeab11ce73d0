"""`gguf-sd tune`: kernels checked and measured for a model ahead of its first picture."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.cli.hub_models import add_revision, local_model
from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from gguf_sd.runtime.tuning import Tuned


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "tune",
        help="measure the GPU kernels for a model",
        description="Checks the kernels on this GPU and measures the model's products, ahead of the first picture.",
    )
    add = parser.add_argument
    add("model", nargs="?", type=Path, help="a .gguf file; or a checkpoint or diffusers folder, converted into the "
        "cache first; or org/repo, org/repo/file.gguf of the Hugging Face Hub (default: the built-in demo "
        "model)")  # fmt: skip
    add_revision(parser)
    add("--size", metavar="WxH", help="pixels of the pictures to come (the model's own)")
    add("--batch", type=int, help="pictures that go through the UNet at once, guidance counts twice (2 for models with "
        "guidance, else 1)")  # fmt: skip
    add("--seconds", default="45", metavar="SECONDS|off", help="how long to measure (45); off checks alone")
    add("--device", default="auto", help="auto, cuda, cuda:1, …")
    add("--dtype", default="auto", help="auto, float16, bfloat16: what the UNet computes in (auto)")
    add("--type", default=None, help="quantisation of a MODEL that is no GGUF: f16, q8_0, q4_1, q4_0 (q8_0)")
    add("--quiet", action="store_true", help="no progress bars")
    add("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from gguf_sd.checkpoint.model_file import ModelFile
    from gguf_sd.cli.cache import model_path
    from gguf_sd.demo import model_folder
    from gguf_sd.runtime.kernel_modes import choose_kernels, use_kernels
    from gguf_sd.runtime.memory import choose_device, choose_dtype
    from gguf_sd.runtime.tuning import Tuning, seconds_of

    tuning = Tuning(seconds_of(args.seconds), quiet=args.quiet, again=True)
    device = choose_device(args.device)
    interpreted = device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"  # to try this command
    if choose_kernels("auto", "quantized", device)[0] != "auto" and not interpreted:
        raise GgufSdError(f"tuning is for a GPU with Triton, and the device is {device}; CPUs have nothing to tune")
    source = model_folder() if args.model is None else local_model(args.model, args.revision, args.quiet)
    model = ModelFile.open(model_path(source, args.type, quiet=args.quiet))
    width, height = _size(args.size, model.config)
    batch = args.batch if args.batch is not None else 2 if model.config.defaults.guidance > 1 else 1
    if batch < 1:
        raise GgufSdError(f"--batch is {batch}; it takes a number of pictures, 1 or more")
    dtype = choose_dtype(args.dtype, device)
    unet = model.load_unet(dtype).to(device)
    use_kernels(unet, "auto")
    downscale = model.config.vae.downscale
    tuned = tuning.prepare(unet, batch, height // downscale, width // downscale, dtype)
    found = describe(tuned, device_name(device))
    print(json.dumps(found, indent=2) if args.json else table(found))
    return 0


def _size(text: str | None, config: Any) -> tuple[int, int]:
    if text is None:
        return config.defaults.width, config.defaults.height
    try:
        width, height = map(int, text.split("x"))
    except ValueError:
        raise GgufSdError(f"--size is {text!r}; it takes two numbers of pixels, such as 512x768") from None
    step = config.vae.downscale
    if min(width, height) < 64 or max(width, height) > 8192 or width % step or height % step:
        raise GgufSdError(f"--size is {text!r}; it takes multiples of {step} from 64 to 8192")
    return width, height


def device_name(device: Any) -> str:
    from gguf_sd_kernels.devices import gpu_of

    return gpu_of(device).name


def describe(tuned: Tuned, device: str) -> dict[str, Any]:
    """What is known of a step's products, the largest share of its measured time first, as a JSON object.

    ``roofline`` is the time in which the device could make the product by its measured rates, divided by the best
    mode's.
    """
    rows = []
    for use, count in tuned.uses.items():
        product, known = use.product, tuned.measured.get(use.product)
        row: dict[str, Any] = {"product": asdict(product), "count": count}
        if known is not None:
            best, operations = min(known.fused, known.dequantize), 2 * product.m * product.n * product.k
            row |= {"mode": known.fastest, "launch": str(known.launch), "microseconds": count * best}
            row |= {name: getattr(known, name) for name in ("fused", "dequantize", "resident")}
            row |= {"tflops": operations / best / 1e6, "gbytes": use.nbytes() / best / 1e3}
            if tuned.rates is not None:
                floor = max(operations / tuned.rates.tflops / 1e6, use.nbytes() / tuned.rates.gbytes / 1e3)
                row["roofline"] = floor / best
        rows.append(row)
    total = sum(row.get("microseconds", 0) for row in rows)
    for row in rows:
        if "microseconds" in row:
            row["share"] = row.pop("microseconds") / total
    rows.sort(key=lambda row: -row.get("share", 0))
    rates = None if tuned.rates is None else asdict(tuned.rates)
    return {"device": device, "rates": rates, "milliseconds": total / 1e3, "products": rows}


def table(found: dict[str, Any]) -> str:
    """The products for people."""
    lines = [found["device"]]
    if found["rates"]:
        lines.append(
            "reaches {tflops:.1f} TFLOP/s in a product and {gbytes:.0f} GB/s in a copy".format(**found["rates"])
        )
    lines += ["", f"{'product':34} {'times':>5} {'share':>6} {'fused':>9} {'dequant.':>9} {'resident':>9} "
              f"{'TFLOP/s':>8} {'GB/s':>7} {'roof':>5}  mode"]  # fmt: skip
    measured = [row for row in found["products"] if "share" in row]
    for row in measured:
        product = row["product"]
        name = f"{product['op']} {product['qtype']} {product['m']}x{product['n']}x{product['k']}"
        times = " ".join(f"{row[mode]:7.1f}us" for mode in ("fused", "dequantize", "resident"))
        roof = f"{row['roofline']:5.0%}" if "roofline" in row else "    -"
        mode = row["mode"] + (f" {row['launch']}" if row["mode"] == "fused" else "")
        rates = f"{row['tflops']:8.2f} {row['gbytes']:7.1f}"
        lines.append(f"{name:34} {row['count']:5} {row['share']:6.1%} {times} {rates} {roof}  {mode}")
    lines += ["", f"{len(measured)} of {len(found['products'])} products measured, "
              f"{found['milliseconds']:.2f} ms of a step"]  # fmt: skip
    return "\n".join(lines)
