"""Paints groups of pictures: here, or in an actor on another machine."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.batch.items import Item
from gguf_sd.errors import GgufSdError
from gguf_sd.loading import LoadOptions

if TYPE_CHECKING:
    from gguf_sd.pipeline import Picture
    from gguf_sd.request import Job

log = logging.getLogger(__name__)
UNSAID = {"prompt", "count", "batch", "seed"}  # settings that a picture's line says elsewhere, or that are of the run


@dataclass(frozen=True)
class Result:
    """A picture as the bytes of its file, with what the manifest says of it; or ``error``, why there is none."""

    item: Item
    png: bytes = b""
    facts: Mapping[str, Any] | None = None
    error: str = ""


class Painter:
    """A model, loaded once, and what paints items with it."""

    def __init__(self, model: Path, options: LoadOptions, batch: int = 1, shared: Mapping[str, Any] | None = None):
        """``shared``: settings of the run, ``lora_dir`` and ``embeddings``. Raises GgufSdError for a model that cannot
        be opened."""
        self.pipeline = options.load(model)
        self.batch, self.shared, self.vae = batch, dict(shared or {}), options.vae
        from gguf_sd.cli.recorded import vae_hash

        self._vae_hash = vae_hash(options.vae)

    def paint(self, group: Sequence[Item], on_step: Callable[[Any], object] = lambda step: None) -> Iterator[Result]:
        """A result for each item, in order. What is wrong with one item costs the others nothing but the company."""
        jobs: dict[int, Job] = {}
        errors: dict[int, str] = {}
        for index, item in enumerate(group):
            try:
                jobs[index] = self._job(item)
            except GgufSdError as error:
                errors[index] = str(error)
        painted = self._together(jobs, on_step)
        for index, item in enumerate(group):
            if index in errors:
                yield Result(item, error=errors[index])
                continue
            try:
                picture = painted.get(index) or self._alone(jobs[index], on_step)
                yield self._result(item, picture)
            except Exception as error:
                yield Result(item, error=_sentence(error))

    def _job(self, item: Item) -> Job:
        from gguf_sd import keywords
        from gguf_sd.request import Request

        settings = {**self.shared, **item.settings, "seed": item.seed, "batch": self.batch}
        keywords.check_known(settings, [field.name for field in fields(Request)])
        return self.pipeline.prepare(Request(**settings))

    def _together(self, jobs: Mapping[int, Job], on_step: Callable[[Any], object]) -> dict[int, Picture]:
        """The pictures by index; none where something went wrong: then each is tried alone."""
        from gguf_sd.batching import with_shared_schedules

        if len(jobs) < 2:
            return {}
        try:
            pictures = self.pipeline.paint(with_shared_schedules(jobs.values()), on_step)
            return dict(zip(jobs, pictures, strict=True))
        except Exception as error:
            log.info("%s; the pictures of this batch are painted one by one", _sentence(error))
            return {}

    def _alone(self, job: Job, on_step: Callable[[Any], object]) -> Picture:
        (picture,) = self.pipeline.paint(job, on_step)
        return picture

    def _result(self, item: Item, picture: Picture) -> Result:
        from gguf_sd.imaging.png_metadata import PARAMETERS, parameters
        from gguf_sd.imaging.save_png import png_bytes

        model, job = self.pipeline.model, picture.job
        dtype = str(self.pipeline.dtype).removeprefix("torch.")
        vae = "" if self.vae is None else self.vae.name
        text = parameters(picture, model.path.stem, model.source_hash, dtype, vae, self._vae_hash)
        settings = {field.name: getattr(job, field.name) for field in fields(job) if field.repr}
        settings = {name: value for name, value in settings.items() if name not in UNSAID}
        facts = {"prompt": job.prompt, "seed": picture.seed, "flagged": picture.flagged, "settings": settings}
        plain = json.loads(json.dumps(facts, default=str))
        return Result(item, png_bytes(picture.image, {PARAMETERS: text}), plain)


def _sentence(error: Exception) -> str:
    if isinstance(error, GgufSdError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
