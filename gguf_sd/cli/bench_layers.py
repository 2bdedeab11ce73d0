"""`gguf-sd bench layers MODEL`: what rounding each layer of a UNet costs its output."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from gguf_sd_convert.calibrate.sensitivity import Sensitivity

LISTED = 40  # layers, of the plot and the table


def run_layers(args: argparse.Namespace) -> int:
    """Measures, prints and plots; raises GgufSdError for what is no one model in 16 or 32 bits."""
    from gguf_sd.atomic_write import put_in_place, temporary_beside
    from gguf_sd.bench import plots
    from gguf_sd_convert.calibrate.sensitivity import MEASURED

    if len(args.models) != 2:
        raise GgufSdError("bench layers takes one MODEL: `gguf-sd bench layers MODEL -o FOLDER`")
    found = sorted(_measured(args), key=lambda one: -one.errors[MEASURED])
    rows = [{"layers": list(one.names), "weights": one.values, "errors": one.errors} for one in found]
    errors = [one.errors[MEASURED] for one in found]
    files = {
        "layers.json": json.dumps({"type": MEASURED, "rows": rows}, indent=1).encode(),
        "layers.png": plots.sensitivities([_title(one) for one in found[:LISTED]], errors[:LISTED], MEASURED),
    }
    args.output.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        with temporary_beside(args.output / name) as temporary:
            temporary.write_bytes(data)
            put_in_place(temporary, args.output / name)
    if args.json:
        print(files["layers.json"].decode())
    elif not args.quiet:
        print(table(found))
        print(f"\n{args.output / 'layers.png'}")
    return 0


def table(found: Sequence[Sensitivity]) -> str:
    """The first layers, and of what size and weight the others are together."""
    from gguf_sd_convert.calibrate.sensitivity import MEASURED

    total = sum(one.errors[MEASURED] for one in found) or 1.0
    head = f"{'share':>6} {'weights':>11}  layer, of the squared error of the UNet's output, each alone in {MEASURED}"

    def line(some: Sequence[Sensitivity], title: str) -> str:
        return f"{sum(one.errors[MEASURED] for one in some) / total:6.1%} {sum(s.values for s in some):>11,}  {title}"

    lines = [line([one], _title(one)) for one in found[:LISTED]]
    if others := found[LISTED:]:
        lines.append(line(others, f"the {len(others)} others together"))
    return "\n".join([head, *lines])


def _title(one: Sensitivity) -> str:
    return one.names[0] if len(one.names) == 1 else f"{one.names[0]} and {len(one.names) - 1} more"


def _measured(args: argparse.Namespace) -> list[Sensitivity]:
    import torch

    from gguf_sd.bench.calls import default_count, prompts_for, record
    from gguf_sd.bench.prompts import default_prompts, read_prompts
    from gguf_sd.checkpoint.gguf_header import is_gguf
    from gguf_sd.checkpoint.model_file import ModelFile
    from gguf_sd.checkpoint.tensor_names import UNET
    from gguf_sd.cli.cache import model_path
    from gguf_sd.cli.progress import progress_bar
    from gguf_sd.pipeline import Pipeline
    from gguf_sd.runtime.execution import Execution
    from gguf_sd_convert.calibrate import sensitivity as measure
    from gguf_sd_convert.calibrate.job import MIXED_TYPES
    from gguf_sd_kernels.formats import FORMATS

    execution, source = Execution.choose(args.device, args.dtype), Path(args.models[1])
    prompts = read_prompts(args.prompts) if args.prompts else default_prompts(source)
    kind = None if is_gguf(source) else "f16"
    model = ModelFile.open(model_path(source, kind, args.tokenizer, quiet=args.quiet))
    stored = {own: model.file.tensors[name].type.name for own, name in model.names.items() if own.startswith(UNET)}
    if kinds := set(stored.values()) & set(FORMATS):
        raise GgufSdError(f"{source} is quantised already, to {min(kinds)}; measure the original")
    pipeline = Pipeline(model, execution)
    count = default_count(model.config)
    with progress_bar(min(len(prompts), prompts_for(count)), args.quiet, unit="picture", desc="recording") as bar:
        calls = record(pipeline, prompts, count, args.seed, lambda prompt: bar.update(1))
    pipeline.parts.drop_all()
    unet = model.load_unet(torch.float32)
    layers = measure.measurable_layers(unet)
    with progress_bar(len(measure.groups(layers)), args.quiet, unit="layer", desc="measuring") as bar:
        return measure.sensitivities(
            unet, measure.measured_calls(calls), layers, MIXED_TYPES, lambda name: bar.update(1)
        )
