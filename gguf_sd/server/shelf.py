"""The models of a server: opened at its start, their weights loaded when they are painted with, and let go for others
where memory does not hold both."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gguf_sd.errors import GgufSdError
from gguf_sd.loading import LoadOptions
from gguf_sd.server.tickets import Finished

if TYPE_CHECKING:
    from gguf_sd.pipeline import Pipeline
    from gguf_sd.request import Job, Request
    from gguf_sd.sampling import Step

log = logging.getLogger(__name__)
LOOK_QUALITY = 80  # of the JPEG of a preview


class Watcher(Protocol):
    """What a painter tells while it paints."""

    def wanted(self) -> Sequence[int]:
        """Indices of the jobs whose looks somebody wants to see."""
        ...

    def step(self, step: int, looks: Mapping[int, bytes]) -> None:
        """``step`` steps are done; the looks are JPEGs by the job's index. Raises what is to end the painting."""
        ...

    def finished(self, index: int, picture: Finished) -> None: ...


class Painter(Protocol):
    """What paints jobs of one model, all at once: in this process, or elsewhere."""

    def paint(self, model: str, jobs: Sequence[Job], watcher: Watcher) -> None: ...


@dataclass
class Model:
    """A model on the shelf. ``used``: when it was last painted with, as a number that counts up."""

    name: str
    path: Path
    pipeline: Pipeline
    facts: dict[str, Any] = field(default_factory=dict)
    used: int = 0


class Shelf:
    """Models by name. ``paint`` is for one thread at a time."""

    def __init__(self, models: Mapping[str, Path], options: LoadOptions, quiet: bool = True):
        """Raises GgufSdError for a model that cannot be opened."""
        from gguf_sd.cli.recorded import vae_hash

        self.options, self.swaps = options, 0
        self._vae = "" if options.vae is None else options.vae.name, vae_hash(options.vae)
        self.models = {name: Model(name, path, options.load(path, quiet)) for name, path in models.items()}
        for model in self.models.values():
            model.facts = _facts(model)
        self._turn, self._uses = threading.Lock(), 0

    @property
    def default(self) -> str:
        return next(iter(self.models))

    def prepare(self, name: str, request: Request) -> Job:
        """Raises GgufSdError for what cannot be painted."""
        return self.models[name].pipeline.prepare(request)

    def chunks(self, name: str, job: Job) -> int:
        return self.models[name].pipeline.prompt_chunks(job)

    def paint(self, name: str, jobs: Sequence[Job], watcher: Watcher) -> None:
        """Tells the watcher of steps and pictures. Raises GgufSdError where memory runs out."""
        from gguf_sd.batching import with_shared_schedules

        with self._turn:
            model = self.models[name]
            shared = with_shared_schedules(jobs)
            self._make_room(model, shared)
            self._uses += 1
            model.used = self._uses

            def on_step(step: Step) -> None:
                wanted = [index for index in watcher.wanted() if index < len(step.latents)]
                watcher.step(step.index + 1, {index: _look(model.pipeline, step, index, jobs) for index in wanted})

            for index, picture in enumerate(model.pipeline.paint(shared, on_step)):
                watcher.finished(index, _finished(model, picture, *self._vae))

    def loaded(self) -> dict[str, int]:
        """Bytes that each model's loaded parts take on the device."""
        return {name: model.pipeline.parts.nbytes for name, model in self.models.items()}

    def _make_room(self, model: Model, jobs: Sequence[Job]) -> None:
        """Lets other models go, the one not used for longest first, until this one has all the memory that it wants.
        Under a budget of the user's, which each model plans with as if it were alone, one is loaded at a time."""
        others = [other for other in self.models.values() if other is not model and other.pipeline.parts.names]
        for other in sorted(others, key=lambda other: other.used):
            if model.pipeline.execution.max_memory is None and _fits(model.pipeline, jobs):
                return
            log.info("%s is let go for %s", other.name, model.name)
            other.pipeline.parts.drop_all()
            self.swaps += 1


def _fits(pipeline: Pipeline, jobs: Sequence[Job]) -> bool:
    """Whether all parts can stay loaded beside what is loaded by others."""
    try:
        plan = pipeline.memory_plan(*jobs)
    except GgufSdError:
        return False
    return set(plan.placement.values()) == {"resident"}


def _look(pipeline: Pipeline, step: Step, index: int, jobs: Sequence[Job]) -> bytes:
    import io
    from dataclasses import replace

    one = slice(index, index + 1)
    image = pipeline.preview(replace(step, latents=step.latents[one], denoised=step.denoised[one]), jobs[index].safety)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=LOOK_QUALITY)
    return buffer.getvalue()


def _finished(model: Model, picture: Any, vae: str, vae_hash: str) -> Finished:
    from gguf_sd.imaging.png_metadata import PARAMETERS, parameters
    from gguf_sd.imaging.save_png import png_bytes

    dtype, opened = str(model.pipeline.dtype).removeprefix("torch."), model.pipeline.model
    text = parameters(picture, opened.path.stem, opened.source_hash, dtype, vae, vae_hash)
    return Finished(png_bytes(picture.image, {PARAMETERS: text}), picture.seed, picture.flagged, text)


def _facts(model: Model) -> dict[str, Any]:
    """What the interfaces tell of a model."""
    from gguf_sd.cli.inspect import describe

    opened, config = model.pipeline.model, model.pipeline.model.config
    described = describe(opened)
    defaults = config.defaults
    return {
        "name": model.name,
        "file": model.path.stem,  # what pictures call it
        "architecture": config.name,
        "type": described["type"],
        "bytes": model.path.stat().st_size,
        "hash": opened.source_hash,
        "created": int(model.path.stat().st_mtime),
        "inpainting": config.unet.in_channels != config.vae.latent_channels,
        "safety": config.safety is not None,
        "multiple": config.vae.downscale,
        "defaults": {
            "sampler": defaults.sampler,
            "schedule": defaults.schedule,
            "steps": defaults.steps,
            "guidance": defaults.guidance,
            "width": defaults.width,
            "height": defaults.height,
        },
    }
