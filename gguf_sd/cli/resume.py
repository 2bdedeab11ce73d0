"""`generate --resume`: what an interrupted run of the same command has finished is kept, the rest is painted.

A picture counts as finished where it lies under the name that it would get, is whole, and carries the settings that it
would get; version and kernels do not matter. A batch is painted whole or not at all: in other company a GPU
may round differently, so that the pictures are those of a run that was not interrupted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from itertools import groupby

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.imaging.infotext import decompose
from gguf_sd.imaging.outputs import Outputs
from gguf_sd.imaging.png_metadata import parse_parameters
from gguf_sd.request import MAX_SEED, RANDOM_SEED, Job, Request

OF_THE_RUN = ("Version", "Kernels")  # the memory plan decides on kernels, when a batch is painted


def with_earlier_seed(request: Request, outputs: Outputs) -> Request:
    """The request with the seed of the earlier run, where it asks for any and there is a picture that tells it."""
    if request.seed not in (None, RANDOM_SEED):
        return request
    for index in range(request.count):
        text = outputs.finished(index)
        with suppress(ValueError):  # no settings after all
            if text is not None and "seed" in (found := parse_parameters(text)):
                return replace(request, seed=(found["seed"] - index) % (MAX_SEED + 1))
    return request


def finished(outputs: Outputs, job: Job, text_of: Callable[[int], str]) -> set[int]:
    """The pictures of a job that are there; ``text_of`` is what a picture of a seed would carry. Raises GgufSdError for
    one that was painted otherwise."""
    done: set[int] = set()
    seeds = [seed for seeds in job.batches() for seed in seeds]
    for index, seed in enumerate(seeds):
        if (found := outputs.finished(index)) is None:
            continue
        if (other := _difference(found, text_of(seed))) is not None:
            raise GgufSdError(
                f"{outputs.named(index)} was painted with other settings, {other}; give those of the earlier run, or "
                "choose another --output"
            )
        done.add(index)
    return done


def _difference(found: str, wanted: str) -> str | None:
    """The first setting in which two texts differ, for a sentence."""
    own_prompt, own_negative, own = decompose(wanted)
    try:
        prompt, negative, pairs = decompose(found)
    except ValueError:
        return "which cannot be read"
    if prompt != own_prompt:
        return f"the prompt {shown(prompt)}"
    if negative != own_negative:
        return f"the negative prompt {shown(negative)}" if negative is not None else "no negative prompt"
    keys = [key for key in (*own, *pairs) if key not in OF_THE_RUN and own.get(key) != pairs.get(key)]
    if not keys:
        return None
    key = keys[0]
    return f"{key} {shown(pairs[key])} where now {shown(own[key])}" if key in pairs and key in own else key


def remaining(job: Job, done: set[int]) -> list[tuple[Job, range]]:
    """The batches of a job of which a picture is missing, those after one another as one job, with their pictures'
    numbers."""
    batches = [range(first, min(first + job.batch, job.count)) for first in range(0, job.count, job.batch)]
    found = []
    for missing, group in groupby(batches, key=lambda batch: not done.issuperset(batch)):
        if missing:
            together = list(group)
            indices = range(together[0].start, together[-1].stop)
            seed = (job.seed + indices.start) % (MAX_SEED + 1)
            found.append((replace(job, seed=seed, count=len(indices)), indices))
    return found
