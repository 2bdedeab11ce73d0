"""Checks the kernels a model needs and measures its products, within a budget of time, and tells what it finds.

What happens is told as events, JSON objects, so that it can happen in another process, see
:mod:`gguf_sd_kernels.tuning.child`: ``{"begin": subject}`` and ``{"end": subject}`` around a kernel's
trial, ``{"verdict": reason, "subject": subject}``, ``{"measured": entry of a table}``, ``{"rates": [TFLOP/s, GB/s]}``,
``{"share": part of the work that is done}`` and at last ``{"done": true}``.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.tuning.cost import worth_measuring
from gguf_sd_kernels.tuning.launch import Launch, Product, choose, measured_entries
from gguf_sd_kernels.tuning.measure import Clock, DeviceClock, Times, measure_rates, time_launch, time_library
from gguf_sd_kernels.tuning.operands import Operands, Use
from gguf_sd_kernels.tuning.self_check import Subject, check, proof_of_life, reason_of
from gguf_sd_kernels.tuning.verdicts import GOOD, Check, self_check_on
from gguf_sd_kernels.tuning.ways import fitted, ptx_subject

Event = dict[str, Any]
# [model] Multiply-accumulates that a GPU makes in the time it moves a byte: what a product's share is guessed by.
BALANCE = 150


@dataclass(frozen=True)
class Job:
    """``subjects`` to check, and ``uses``, each as often as a step has it, to measure for so many ``seconds``."""

    dtype: str
    subjects: tuple[Subject, ...] = ()
    uses: tuple[tuple[Use, int], ...] = ()
    seconds: float = 0
    known: tuple[tuple[Subject, str], ...] = ()  # verdicts

    def to_json(self) -> dict[str, Any]:
        return {
            "dtype": self.dtype,
            "subjects": [subject.to_json() for subject in self.subjects],
            "uses": [[asdict(use), count] for use, count in self.uses],
            "seconds": self.seconds,
            "known": [[subject.to_json(), reason] for subject, reason in self.known],
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Job:
        def use(fields: dict[str, Any]) -> Use:
            picture = fields["picture"] and tuple(fields["picture"])
            fields = fields | {"product": Product(**fields["product"]), "added": tuple(fields["added"])}
            return Use(**(fields | {"picture": picture}))

        return cls(
            values["dtype"],
            tuple(Subject.from_json(subject) for subject in values["subjects"]),
            tuple((use(fields), count) for fields, count in values["uses"]),
            values["seconds"],
            tuple((Subject.from_json(subject), reason) for subject, reason in values["known"]),
        )


def work(use: Use, count: int) -> float:
    """What the product's share of a step is guessed by, before anything was measured."""
    product = use.product
    return count * max(product.m * product.n * product.k / BALANCE, use.nbytes())


class Tuner:
    """Runs a job on ``device``, in this process."""

    def __init__(self, job: Job, device: torch.device, clock: Clock | None = None, check: Check = check):
        self.job, self.device, self.check = job, device, check
        self.dtype: torch.dtype = getattr(torch, job.dtype)
        self.clock = clock or DeviceClock(device)
        self.verdicts = dict(job.known)
        self._started: float | None = None

    def run(self) -> Iterator[Event]:
        """Checks first, then measures what has the largest share of a step first, until the time is spent."""
        for subject in self.job.subjects:
            yield from self._check(subject)
        if self.job.seconds > 0 and self.job.uses:
            yield from self._measure_all()
        yield {"done": True}

    @property
    def left(self) -> float:
        """Seconds left for measuring, in which candidates are compiled and checked too. What is used in any case is
        checked before, in its own time."""
        return self.job.seconds - (0 if self._started is None else self.clock.now() - self._started)

    def _check(self, subject: Subject) -> Iterator[Event]:
        if subject not in self.verdicts and self_check_on(self.device):
            yield from self._try(subject, lambda: self.check(subject, self.device))

    def _try(self, subject: Subject, attempt: Callable[[], object]) -> Iterator[Event]:
        """Tells what is attempted, and how it ended where that is news. A lack of memory is no verdict.

        Raises what the device raises once it takes no more work.
        """
        yield {"begin": subject.to_json()}
        reason: str | None = GOOD
        try:
            attempt()
        except (torch.OutOfMemoryError, MemoryError):
            reason = None
        except Exception as problem:
            reason = reason_of(problem)
        if reason is not None and self.verdicts.get(subject) != reason:
            self.verdicts[subject] = reason
            yield {"verdict": reason, "subject": subject.to_json()}
        yield {"end": subject.to_json()}
        if reason != GOOD:
            proof_of_life(self.device)

    def _measure_all(self) -> Iterator[Event]:
        self._started = self.clock.now()
        rates = measure_rates(self.device, self.dtype, self.clock)
        yield {"rates": [rates.tflops, rates.gbytes]}
        uses = sorted(self.job.uses, key=lambda item: -work(*item))
        total, done = sum(work(*item) for item in uses), 0.0
        for use, count in uses:
            if self.left <= 0:
                return
            with contextlib.suppress(torch.OutOfMemoryError, MemoryError):  # it keeps the model's choice
                yield from self._measure(use)
            done += work(use, count)
            yield {"share": done / total}

    def _measure(self, use: Use) -> Iterator[Event]:
        gpu = gpu_of(self.device)
        operands = Operands(use, self.dtype, self.device)
        decoder = Subject.of_decoder(use.product.qtype, self.dtype, use.weight_shape, use.tap_major)
        yield from self._check(decoder)
        good = self._good(decoder)
        times = time_library(operands, self.clock, None if good else lambda out: operands.plain_weight())
        with torch.inference_mode():
            want = operands.library(operands.plain_weight())
        launches = worth_measuring(use.product, gpu, choose(use.product, gpu))
        launches += [replace(launch, ptx=False) for launch in launches[:1] if launch.ptx]  # where all PTX is wrong
        for launch in dict.fromkeys(fitted(launch, use.product) for launch in launches):
            if self.left <= 0 and times.fused:
                break
            if launch == replace(launches[0], ptx=False) and launch != launches[0] and times.fused:
                continue
            yield from self._measure_launch(operands, launch, want, times)
        if (found := times.measured) is not None:
            yield {"measured": measured_entries({use.product: found})[0]}

    def _measure_launch(self, operands: Operands, launch: Launch, want: torch.Tensor, times: Times) -> Iterator[Event]:
        subject = Subject.of_product(operands.use, self.dtype, launch)
        decoder = ptx_subject(subject, self.device)
        for each in [subject] if decoder is None else [decoder, subject]:
            yield from self._check(each)
            if not self._good(each):
                return

        def attempt() -> None:
            times.fused[launch] = time_launch(operands, launch, self.clock, want)

        yield from self._try(subject, attempt)

    def _good(self, subject: Subject) -> bool:
        return self.verdicts.get(subject, GOOD if not self_check_on(self.device) else "not checked") == GOOD
