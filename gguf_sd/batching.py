"""Which pictures are painted at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace

from gguf_sd.request import Job
from gguf_sd.sampling.guidance import Conditioning

OWN = {"prompt", "negative_prompt", "seed", "count", "embeddings"}  # what pictures of one batch may differ in
UNCOMPARED = {"schedule", "picture"}  # tensors and images: the very same, or taken for different


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


def _together(a: Task, b: Task) -> bool:
    if a.job is not b.job:
        for name in (field.name for field in fields(Job) if field.name not in OWN):
            mine, other = getattr(a.job, name), getattr(b.job, name)
            if not (mine is other if name in UNCOMPARED else mine == other):
                return False
    return a.conditioning.positive.context.shape == b.conditioning.positive.context.shape
