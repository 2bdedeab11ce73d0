"""diffusers as a contestant: the same folder, prompts, seeds and settings, through its own pipeline."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from gguf_sd.bench.contestant import Clock, EnergyMeter, Result, Task
from gguf_sd.bench.peers import DIFFUSERS


def paint(task: Task, folder: Path) -> Result:
    """Paints with ``DiffusionPipeline.from_pretrained``. ``dtype`` auto is what our engine would compute in."""
    started = time.perf_counter()
    from diffusers import DiffusionPipeline

    from gguf_sd.runtime.memory import choose_device, choose_dtype

    device = choose_device(task.device)
    dtype = choose_dtype(task.dtype, device)
    pipe = DiffusionPipeline.from_pretrained(task.model, torch_dtype=dtype, safety_checker=None).to(device)
    result = Result(device=str(device), dtype=str(dtype).removeprefix("torch."), weights="full")
    return paint_with(pipe, task, folder, started, result)


def paint_with(pipe: Any, task: Task, folder: Path, started: float, result: Result) -> Result:
    """Paints with a pipeline of diffusers', begun to load at ``started``."""
    import torch

    pipe.set_progress_bar_config(disable=True)
    _set_sampler(pipe, task)
    result.load_s = time.perf_counter() - started
    cuda, meter = result.device.startswith("cuda"), None
    pictures = [task.pictures[0], *task.pictures] if task.pictures else []
    for i, (number, prompt, seed, settings) in enumerate(pictures):  # the first, to warm up
        clock = Clock()
        generator = torch.Generator().manual_seed(seed)
        made = pipe(prompt, generator=generator, callback_on_step_end=_ticking(clock), **_arguments(settings))
        if i == 0:
            result.first_step_s = clock.ticks[0] - started
            if cuda:
                torch.cuda.reset_peak_memory_stats(result.device)
                meter = EnergyMeter(torch.device(result.device).index or 0)
            continue
        clock.put_into(result)
        made.images[0].save(folder / f"{number:05}.png")
    result.joules = meter.joules() if meter else None
    result.peak_vram = torch.cuda.max_memory_allocated(result.device) if cuda else 0
    return result


def _set_sampler(pipe: Any, task: Task) -> None:
    """The scheduler that is our sampler, of the model's own settings."""
    import diffusers

    for sampler in {settings["sampler"] for *_, settings in task.pictures if "sampler" in settings}:
        pipe.scheduler = getattr(diffusers, DIFFUSERS[sampler]).from_config(pipe.scheduler.config)


def _ticking(clock: Clock) -> Any:
    def tick(pipe: object, step: int, timestep: object, tensors: dict[str, Any]) -> dict[str, Any]:
        clock.tick()
        return tensors

    return tick


def _arguments(settings: dict[str, Any]) -> dict[str, Any]:
    """Our names for settings as the pipeline's."""
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale", "width": "width", "height": "height"}
    return {names[key]: value for key, value in settings.items() if key in names}
