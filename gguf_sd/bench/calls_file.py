"""The same UNet calls for every contestant: recorded once, predicted by each."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gguf_sd.adapters.targets import UNET_PART
from gguf_sd.bench.calls import Samples, default_count, record
from gguf_sd.pipeline import Pipeline
from gguf_sd.request import Request
from gguf_sd.runtime.parts import LoadedAs

COUNT = 96  # calls at most, of as many prompts as that takes
BATCH_POSITIONS = 8192  # of latents, predicted at once
PREDICTIONS = "predictions.safetensors"
BINS = ((0, 150), (150, 350), (350, 650), (650, 1000))  # timesteps


def predict(pipeline: Pipeline, calls: Path, folder: Path, prompts: list[str] | None) -> None:
    """Writes what the UNet predicts for the calls in a file; ``prompts``: records them first, from other seeds than
    the pictures'."""
    if prompts is not None and not calls.exists():
        kept = record(pipeline, prompts, min(COUNT, default_count(pipeline.model.config)), seed=1 << 20)
        tensors = {name: getattr(kept, name) for name in ("latents", "timesteps", "prompt", "weights", "contexts")}
        if kept.vectors is not None:
            tensors["vectors"] = kept.vectors
        save_file({name: x.contiguous() for name, x in tensors.items()}, calls)
    save_file({"predictions": _predictions(pipeline, Samples(**load_file(calls))).contiguous()}, folder / PREDICTIONS)


@torch.inference_mode()
def _predictions(pipeline: Pipeline, s: Samples) -> Tensor:
    plan = pipeline.memory_plan(pipeline.prepare(Request(seed=0)))
    how = LoadedAs(pipeline.dtype, plan.weights, pipeline.kernels, plan.placement[UNET_PART])

    def placed(x: Tensor) -> Tensor:
        return x.to(pipeline.device, pipeline.dtype)

    made, batch = [], max(1, BATCH_POSITIONS // (s.latents.shape[2] * s.latents.shape[3]))
    with pipeline.parts.unet(how) as unet:
        for i in range(0, len(s), batch):
            part = slice(i, i + batch)
            prompt = s.prompt[part]
            projected = unet.project(placed(s.contexts[prompt]))
            vectors = None if s.vectors is None else placed(s.vectors[prompt])
            timesteps = s.timesteps[part].to(pipeline.device)
            made.append(unet.step(placed(s.latents[part]), timesteps, projected, vectors).float().cpu())
    return torch.cat(made)


def errors_by_timestep(calls: Path, folder: Path, reference: Path) -> dict[str, float]:
    """Relative root mean square error of a contestant's predictions against the first's, by range of timesteps, and
    over all as they matter for the picture ("weighted")."""
    s = load_file(calls)
    got, wanted = (load_file(path / PREDICTIONS)["predictions"] for path in (folder, reference))
    error, size = ((x**2).flatten(1).sum(1) for x in (got - wanted, wanted))
    t, weights = s["timesteps"], s["weights"]
    found = {}
    for low, high in BINS:
        inside = (t >= low) & (t < high)
        if bool(inside.any()):
            found[f"{low}-{high}"] = float((error[inside].sum() / size[inside].sum()).sqrt())
    found["weighted"] = float(((error * weights).sum() / (size * weights).sum()).sqrt())
    return found
