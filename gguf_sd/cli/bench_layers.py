"""`gguf-sd bench layers MODEL`: what rounding each layer of a UNet costs its output."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from gguf_sd.errors import GgufSdError

CALLS = 64
LISTED = 40  # layers, of the plot and the table


def run_layers(args: argparse.Namespace) -> int:
    """Measures, prints and plots; raises GgufSdError for what is no one model."""
    import torch

    from gguf_sd.atomic_write import put_in_place, temporary_beside
    from gguf_sd.bench import plots
    from gguf_sd.bench.calls import default_count, record
    from gguf_sd.bench.prompts import default_prompts, read_prompts
    from gguf_sd.checkpoint.model_file import ModelFile
    from gguf_sd.cli.cache import model_path
    from gguf_sd.cli.progress import progress_bar
    from gguf_sd.pipeline import Pipeline
    from gguf_sd.runtime.execution import Execution
    from gguf_sd_convert.calibrate.job import MIXED_TYPES
    from gguf_sd_convert.calibrate.sensitivity import MEASURED, measurable_layers, sensitivities

    if len(args.models) != 2:
        raise GgufSdError("bench layers takes one MODEL: `gguf-sd bench layers MODEL -o FOLDER`")
    source = Path(args.models[1])
    model = ModelFile.open(model_path(source, "f16", quiet=args.quiet))
    prompts = read_prompts(args.prompts) if args.prompts else default_prompts(source)
    pipeline = Pipeline(model, Execution.choose(args.device, args.dtype))
    calls = record(pipeline, prompts, min(CALLS, default_count(model.config)), args.seed)
    pipeline.parts.drop_all()
    unet = model.load_unet(torch.float32)
    layers = measurable_layers(unet)
    with progress_bar(len(layers), args.quiet, unit="layer") as bar:
        found = sensitivities(unet, calls, layers, MIXED_TYPES, lambda name: bar.update(1))
    found.sort(key=lambda one: -one.errors.get(MEASURED, 0.0))
    rows = [{"layers": list(one.names), "weights": one.values, "errors": one.errors} for one in found]
    args.output.mkdir(parents=True, exist_ok=True)
    names = [one.names[0] if len(one.names) == 1 else f"{one.names[0]} and {len(one.names) - 1} more" for one in found]
    errors = [one.errors[MEASURED] for one in found]
    files = {
        "layers.json": json.dumps({"type": MEASURED, "rows": rows}, indent=1).encode(),
        "layers.png": plots.sensitivities(names[:LISTED], errors[:LISTED], MEASURED),
    }
    for name, data in files.items():
        with temporary_beside(args.output / name) as temporary:
            temporary.write_bytes(data)
            put_in_place(temporary, args.output / name)
    if args.json:
        print(files["layers.json"].decode())
    elif not args.quiet:
        total = sum(errors) or 1.0
        print(
            f"{'share':>6} {'weights':>10}  layer, of the squared error of the UNet's output, each alone in {MEASURED}"
        )
        for name, error, one in list(zip(names, errors, found, strict=True))[:LISTED]:
            print(f"{error / total:6.1%} {one.values:>10,}  {name}")
        print(f"\n{args.output / 'layers.png'}")
    return 0
