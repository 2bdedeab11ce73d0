"""What AUTOMATIC1111's clients ask for before they paint, and the ``info`` of a painted picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gguf_sd.imaging.png_metadata import SCHEDULE_LABELS, version
from gguf_sd.sampling.names import SAMPLERS, SCHEDULES
from gguf_sd.server.desk import Desk
from gguf_sd.server.metrics import process_bytes
from gguf_sd.server.shelf import Model
from gguf_sd.server.tickets import Finished, Ticket

EMPTY: dict[str, Any] = {
    "upscalers": [],
    "latent-upscale-modes": [],
    "sd-vae": [],
    "sd-modules": [],
    "hypernetworks": [],
    "face-restorers": [],
    "realesrgan-models": [],
    "prompt-styles": [],
    "script-info": [],
    "scripts": {"txt2img": [], "img2img": []},
    "embeddings": {"loaded": {}, "skipped": {}},
    "cmd-flags": {"api": True},
}
REFRESHED = ("refresh-checkpoints", "refresh-loras", "refresh-vae", "reload-checkpoint", "unload-checkpoint")


def title(model: Model) -> str:
    """What the list of checkpoints calls a model."""
    short = model.facts["hash"][:10]
    return f"{model.name} [{short}]" if short else model.name


def routes(desk: Desk, prefix: str) -> list[Route]:
    def answer(make: Callable[[], Any]) -> Callable[[HttpRequest], Any]:
        async def endpoint(http: HttpRequest) -> Response:
            return JSONResponse(await run_in_threadpool(make))

        return endpoint

    lists: dict[str, Callable[[], Any]] = {
        "sd-models": lambda: [_checkpoint(model) for model in desk.shelf.models.values()],
        "samplers": _samplers,
        "schedulers": _schedulers,
        "loras": lambda: [{"name": x, "alias": x, "path": f"{x}.safetensors", "metadata": {}} for x in desk.loras()],
        "memory": _memory,
    }
    lists |= {name: lambda value=value: value for name, value in EMPTY.items()}  # type: ignore[misc]
    found = [Route(f"{prefix}/{name}", answer(make), methods=["GET"]) for name, make in lists.items()]
    return found + [Route(f"{prefix}/{name}", answer(lambda: None), methods=["POST"]) for name in REFRESHED]


def _checkpoint(model: Model) -> dict[str, Any]:
    digest = model.facts["hash"]
    return {
        "title": title(model),
        "model_name": model.name,
        "hash": digest[:10] or None,
        "sha256": digest or None,
        "filename": model.path.name,  # not where it lies
        "config": None,
    }


def _samplers() -> list[dict[str, Any]]:
    return [{"name": info.label, "aliases": [name, *info.aliases], "options": {}} for name, info in SAMPLERS.items()]


def _schedulers() -> list[dict[str, Any]]:
    found = [{"name": "automatic", "label": "Automatic", "aliases": None}]
    for name in SCHEDULES:
        if name != "model":
            label = SCHEDULE_LABELS.get(name, name.capitalize())
            found.append({"name": name, "label": label, "aliases": None})
    return [entry | {"default_rho": -1, "need_inner_model": False} for entry in found]


def _memory() -> dict[str, Any]:
    import torch

    from gguf_sd.runtime.memory import available_memory

    free, used = available_memory(torch.device("cpu")), process_bytes()
    return {"ram": {"free": free, "used": used, "total": free + used}, "cuda": {}}


def info(ticket: Ticket, done: Sequence[Finished], model: Model) -> dict[str, Any]:
    """As AUTOMATIC1111 writes it; lists are of the pictures painted."""
    job, many = ticket.jobs[0], len(done)
    seeds = [picture.seed for picture in done] or [job.seed]
    sampler = SAMPLERS[job.sampler].label
    schedule = SCHEDULE_LABELS.get(job.schedule_name, job.schedule_name.capitalize())
    return {
        "prompt": job.prompt,
        "all_prompts": [job.prompt] * many,
        "negative_prompt": job.negative_prompt or "",
        "all_negative_prompts": [job.negative_prompt or ""] * many,
        "seed": seeds[0],
        "all_seeds": seeds,
        "subseed": -1,
        "all_subseeds": [-1] * many,
        "subseed_strength": 0,
        "width": job.width,
        "height": job.height,
        "sampler_name": sampler,
        "cfg_scale": job.guidance,
        "steps": job.steps,
        "batch_size": many,
        "restore_faces": False,
        "face_restoration_model": None,
        "sd_model_name": model.name,
        "sd_model_hash": model.facts["hash"][:10],
        "sd_vae_name": None,
        "sd_vae_hash": None,
        "seed_resize_from_w": -1,
        "seed_resize_from_h": -1,
        "denoising_strength": job.strength,
        "extra_generation_params": {"Schedule type": schedule},
        "index_of_first_image": 0,
        "infotexts": [picture.parameters for picture in done],
        "styles": [],
        "job_timestamp": time.strftime("%Y%m%d%H%M%S"),
        "clip_skip": job.clip_skip or 1,
        "is_using_inpainting_conditioning": model.facts["inpainting"],
        "version": version(),
    }
