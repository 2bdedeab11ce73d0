"""A memory plan for people: a table, JSON, and what one plan does otherwise than another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from gguf_sd.memory_size import memory_text
from gguf_sd.runtime.memory import MemoryPlan
from gguf_sd.runtime.plan import Planner

WEIGHTS = {
    "quantized": "in blocks, decoded for each product",
    "resident": "decoded once, when it is loaded",
    "int8": "in 8 bits, encoded when it is loaded",
}
PLACED = {"resident": "stays loaded", "staged": "goes behind its stage", "streamed": "layer by layer"}


def as_dict(plan: MemoryPlan, planner: Planner | None = None) -> dict[str, Any]:
    """For JSON; bytes throughout. With a planner, what each stage takes of the whole process."""
    facts: dict[str, Any] = {
        "budget": plan.budget,
        "peak": plan.peak,
        "weights": plan.weights,
        "placement": dict(plan.placement),
        "batch_guidance": plan.batch_guidance,
        "vae_tile": plan.vae_tile,
        "frugal": plan.frugal,
    }
    return facts if planner is None else facts | {"stages": planner.stage_peaks(plan)}


def table(plan: MemoryPlan, planner: Planner) -> str:
    """Lines of text."""
    return "\n".join(_lines(plan, planner))


def _lines(plan: MemoryPlan, planner: Planner) -> Iterator[str]:
    load, peaks = planner.workload, planner.stage_peaks(plan)
    height, width = (side * planner.vae.downscale for side in load.size)
    yield f"size       {width}x{height}, {load.pictures} at once"
    yield f"budget     {memory_text(plan.budget)}"
    yield f"peak       {memory_text(plan.peak)}, in {max(peaks, key=lambda name: peaks[name])}"
    yield f"UNet       {WEIGHTS[plan.weights]}"
    if load.guided:
        yield f"guidance   {'both halves at once' if plan.batch_guidance else 'in two passes'}"
    yield f"VAE        {_vae(plan)}"
    if plan.frugal:
        yield "heap       what is freed goes back at once"
    yield ""
    yield f"{'stage':<12}{'part':<26}{'weights':>10}{'work':>10}{'all':>10}"
    for stage in planner.stages(plan):
        placed = PLACED[plan.placement[stage.part]]
        sizes = stage.weights, stage.work, peaks[stage.name]
        yield f"{stage.name:<12}{placed:<26}" + "".join(f"{memory_text(size):>10}" for size in sizes)


def changes(before: MemoryPlan, after: MemoryPlan) -> str:
    """What ``after`` does to take less, for a sentence."""
    parts = [
        f"{name} {PLACED[placement]}"
        for name, placement in after.placement.items()
        if placement != before.placement.get(name)
    ]
    if after.weights != before.weights:
        parts.append(f"weights {WEIGHTS[after.weights]}")
    if after.batch_guidance != before.batch_guidance:
        parts.append("guidance in two passes")
    if after.vae_tile != before.vae_tile:
        parts.append(f"the VAE {_vae(after)}")
    if after.frugal and not before.frugal:
        parts.append("what is freed goes back at once")
    return ", ".join(parts)


def _vae(plan: MemoryPlan) -> str:
    return "whole pictures" if plan.vae_tile is None else f"in tiles of {plan.vae_tile} latent pixels"
