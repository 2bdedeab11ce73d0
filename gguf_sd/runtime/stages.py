"""Stages of a part whose weights come when they run: what brings them in time, and keeps count."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from gguf_sd.checkpoint.assign import Deferred
from gguf_sd.checkpoint.finite import cast, check_blocks, is_finite
from gguf_sd.checkpoint.mapped_file import MappedFile
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.runtime.lanes import Event, Lane

# Puts a stored tensor (of blocks, the blocks), which is on the device, where its module takes it from: what is there
# then.
Place = Callable[[Tensor], Tensor]


@dataclass
class Meter:
    """What was streamed, of a part: bytes as the file has them, and the seconds that the stages they came for took,
    loading included."""

    nbytes: int = 0
    seconds: float = 0.0
    steps: int = 0  # of a UNet
    step_bytes: int = 0  # of the last of them

    @property
    def rate(self) -> float:
        """Bytes a second."""
        return self.nbytes / self.seconds if self.seconds else 0.0

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        counts = {"bytes": self.nbytes, "seconds": round(self.seconds, 3), "bytes_per_second": round(self.rate)}
        return counts | ({"steps": self.steps, "bytes_per_step": self.step_bytes} if self.steps else {})


@dataclass
class Weight:
    """A weight in the file, and how it comes to its module: without ``place`` it is used where the file is mapped."""

    deferred: Deferred
    place: Place | None
    view: Tensor | None = None  # of the mapped file, where it lies there as it is read
    checked: bool = False  # that its values are numbers

    def stored(self) -> Tensor:
        """As it lies in the file. Raises GgufSdError where it is no number, and is looked at for the first time."""
        if self.checked and self.view is not None:
            return self.view
        stored = self.deferred.stored()
        if isinstance(stored, Tensor):
            return stored
        if not self.checked:
            check_blocks(stored, self.deferred.name, self.deferred.where)
        return stored.blocks

    def check(self, placed: Tensor) -> None:
        """Raises GgufSdError where a number became none on its way, or was none; looks once."""
        if not self.checked and placed.is_floating_point() and not is_finite(placed):
            cast(self.deferred.stored(), placed.dtype, self.deferred.name, self.deferred.where)
        self.checked = True


@dataclass(eq=False)
class Slot:
    """Memory for the weights of one stage at a time."""

    holds: Stage | None = None
    filled: Event | None = None
    used: Event | None = None  # the end of what it served last; None while it serves, and before
    brought: int = 0  # bytes from the file that no stage has used yet


@dataclass(eq=False)
class Stage:
    """Weights that come and go together, those of the module ``name``."""

    name: str
    weights: list[Weight] = field(default_factory=list)
    slot: Slot | None = None  # of the weights that have a place

    def mapped(self, placed: bool) -> list[Tensor]:
        """Views of the file: of the weights that have a place, or those that have none."""
        return [w.view for w in self.weights if w.view is not None and (w.place is not None) == placed]


class Stream:
    """Brings the weights of each stage before it runs, and lets them go behind it. Stages may run in any order; what
    followed one last time is brought while it runs. ``drop``: whether the file's pages are given back too."""

    def __init__(self, stages: Sequence[Stage], lane: Lane, file: MappedFile, meter: Meter, drop: bool):
        self.lane, self.file, self.meter, self.drop = lane, file, meter, drop
        self._after = dict(zip(stages, [*stages[1:], *stages[:1]], strict=True))
        for weight in (weight for stage in stages for weight in stage.weights):
            stored = weight.deferred.stored()
            tensor = stored.blocks if isinstance(stored, QuantTensor) else stored
            weight.view = tensor if file.holds(tensor) else None
        self._last: Stage | None = None
        self._began = 0.0

    def attach(self, module: nn.Module, stage: Stage) -> None:
        """Has the stage's module call for its weights."""
        module.register_forward_pre_hook(_Hook(self.begin, stage))
        module.register_forward_hook(_Hook(self.end, stage))

    def begin(self, stage: Stage) -> None:
        """Computing that is started from now on has the stage's weights."""
        self._began = time.perf_counter()
        if self._last is not None:
            self._after[self._last] = stage
        if (slot := stage.slot) is not None:
            if slot.holds is not stage:
                self._fill(stage, slot)
            self.lane.compute_after(slot.filled)
            slot.used = None
            self.meter.nbytes += slot.brought
            slot.brought = 0
        for weight in stage.weights:
            if weight.place is None:
                stored = weight.stored()
                weight.check(stored)
                self.meter.nbytes += stored.nbytes
        following = self._after[stage]
        self.file.expect(following.mapped(placed=False) + following.mapped(placed=True))

    def end(self, stage: Stage) -> None:
        """The stage's computing was started; its memory serves another when that is done."""
        self._last, following = stage, self._after[stage]
        if stage.slot is not None:
            stage.slot.used = self.lane.computed()
        if self.drop:
            self.file.forget_pages(stage.mapped(placed=False))
        if following.slot not in (None, stage.slot) and following.slot.holds is not following:
            self._fill(following, following.slot)
        self.meter.seconds += time.perf_counter() - self._began

    def _fill(self, stage: Stage, slot: Slot) -> None:
        slot.holds, slot.brought = None, 0
        # Where a stage failed, the end of its computing was not marked, but is not later than now.
        self.lane.copy_after(slot.used or self.lane.computed())
        with self.lane.copying():
            for weight in stage.weights:
                if weight.place is not None:
                    stored = weight.stored()
                    weight.check(weight.place(self.lane.bring(stored)))
                    slot.brought += stored.nbytes
            slot.filled = self.lane.copied()
        slot.holds = stage
        if self.drop:
            self.file.forget_pages(stage.mapped(placed=True))


class _Hook:
    """A module's call for its stage. In a copy of the module, which has weights of its own, it does nothing."""

    def __init__(self, call: Callable[[Stage], None], stage: Stage):
        self.call, self.stage = call, stage

    def __call__(self, *given: object) -> None:
        self.call(self.stage)

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., None]:
        return _nothing


def _nothing(*given: object) -> None:
    pass
