"""Which pictures are painted at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

from gguf_sd.request import Job
from gguf_sd.sampling.guidance import Conditioning

OWN = {"prompt", "negative_prompt", "seed", "count", "embeddings"}  # what pictures of one batch may differ in
UNCOMPARED = {"schedule", "picture"}  # tensors and images: the very same, or taken for different
_COMPARED = [field.name for field in fields(Job) if field.name not in OWN | UNCOMPARED]


@dataclass(frozen=True)
class Task:
    """One picture to paint."""

    job: Job
    seed: int
    conditioning: Conditioning


def batches(jobs: Iterable[Job], conditionings: Iterable[Conditioning]) -> Iterator[list[Task]]:
    """The jobs' pictures in order, those after one another together as far as they go together: up to ``Job.batch``,
    of the same settings, with prompts of as many chunks."""
    batch: list[Task] = []
    for job, conditioning in zip(jobs, conditionings, strict=True):
        for seed in (seed for seeds in job.batches() for seed in seeds):
            task = Task(job, seed, conditioning)
            if batch and not (len(batch) < job.batch and _together(batch[0], task)):
                yield batch
                batch = []
            batch.append(task)
    if batch:
        yield batch


def with_shared_schedules(jobs: Iterable[Job]) -> list[Job]:
    """Jobs of one model that were prepared one by one, with the very same schedule where theirs are equal, so that
    their pictures may go together."""
    schedules: dict[tuple[str, str, int], Job] = {}
    return [
        replace(job, schedule=schedules.setdefault((job.sampler, job.schedule_name, job.steps), job).schedule)
        for job in jobs
    ]


def same_shape(a: Job, b: Job) -> bool:
    """Whether pictures of two jobs of one model can be painted at once, their prompts having as many chunks and their
    schedules, which follow from the other settings, being shared."""
    if a is b:
        return True
    if any(getattr(a, name) != getattr(b, name) for name in _COMPARED):
        return False
    return a.picture is b.picture


def _together(a: Task, b: Task) -> bool:
    alike = a.job is b.job or (same_shape(a.job, b.job) and a.job.schedule is b.job.schedule)
    return alike and a.conditioning.positive.context.shape == b.conditioning.positive.context.shape
