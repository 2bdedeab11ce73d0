"""A pipeline's turns: one batch is painted at a time, and where memory runs out, once more with less."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import TypeVar

import torch

from gguf_sd.errors import GgufSdError
from gguf_sd.request import Job
from gguf_sd.runtime import memory
from gguf_sd.runtime.host_heap import be_frugal
from gguf_sd.runtime.memory import MemoryPlan
from gguf_sd.runtime.parts import Parts
from gguf_sd.runtime.plan_text import changes
from gguf_sd.runtime.planning import Attempt

log = logging.getLogger(__name__)

T = TypeVar("T")


class Turns:
    """``lock`` is held while a batch is painted, never while a picture is handed out; ``running``: the plan by which
    that is done."""

    def __init__(self, device: torch.device, parts: Parts):
        self.device, self.parts = device, parts
        self.lock = threading.RLock()
        self.running: MemoryPlan | None = None

    def take(self, job: Job, attempt: Attempt, work: Callable[[MemoryPlan], T]) -> T:
        """The work by the attempt's plan and, where memory runs out, once more by one that takes less. Raises
        GgufSdError where there is none."""
        with self.lock:
            try:
                return self._run(attempt.plan, work)
            except Exception as error:
                if not memory.is_out_of_memory(error):
                    raise
        # Out here, where the frames of the failed step, and the tensors in them, are gone.
        failed = attempt.plan
        if not attempt.step_down():
            size = job.width, job.height
            raise GgufSdError(memory.out_of_memory_advice(self.device, failed.weights, job.batch, size))
        self.parts.drop_all()
        memory.give_back(self.device)
        log.warning("out of memory; the batch is painted again with less: %s", changes(failed, attempt.plan))
        return self.take(job, attempt, work)

    def _run(self, plan: MemoryPlan, work: Callable[[MemoryPlan], T]) -> T:
        self.running = plan
        if self.device.type == "cpu":
            be_frugal(plan.frugal)
        try:
            return work(plan)
        finally:
            self.running = None

    def between_stages(self, plan: MemoryPlan) -> None:
        """Gives memory back; where all stays on a GPU, what torch keeps for reuse stays too."""
        placements = set(plan.placement.values())
        if self.device.type == "cpu" or placements != {"resident"}:
            memory.give_back(self.device, "streamed" in placements)
