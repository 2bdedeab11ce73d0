"""The order of copies and computing on a GPU's two streams, proved with stand-ins for streams and events.

Streams keep clocks: what was started on one happens after what was started on it before, after what the host had seen
by then, and after the events it waits for. Every operation on memory that both use is noted with its stream's clock; no
two may touch one place, one of them writing, without one happening before the other.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.runtime import lanes, streaming
from gguf_sd.runtime.lanes import GpuLane
from gguf_sd.runtime.stages import Meter, Stream
from gguf_sd.runtime.streaming import load_streamed

CPU = torch.device("cpu")
Clock = dict[str, int]  # of which operations of each stream it is known that they are done


class FakeStream:
    current: ClassVar[list[FakeStream]] = []

    def __init__(self, device: object = None, name: str = "copy"):
        self.name, self.clock = name, Clock()

    def start(self) -> Clock:
        """The clock of an operation that is started here now."""
        self.merge(HOST.clock)
        self.clock[self.name] = self.clock.get(self.name, 0) + 1
        return dict(self.clock)

    def merge(self, other: Clock) -> None:
        for name, count in other.items():
            self.clock[name] = max(self.clock.get(name, 0), count)

    def wait_event(self, event: FakeEvent) -> None:
        self.merge(event.clock)


class FakeEvent:
    def record(self, stream: FakeStream) -> None:
        self.clock = dict(stream.clock)

    def synchronize(self) -> None:
        HOST.merge(self.clock)


HOST = FakeStream(name="host")


@contextmanager
def switched(stream: FakeStream) -> Iterator[None]:
    FakeStream.current.append(stream)
    yield
    FakeStream.current.pop()


class Races(TorchDispatchMode):
    """Notes who touches the lane's memory when, and what does so out of order."""

    def __init__(self, lane: GpuLane):
        super().__init__()
        self.pinned = {memory.untyped_storage().data_ptr() for memory in lane._ring}
        self.shared: set[int] = self.pinned | {lane._landing.untyped_storage().data_ptr()}
        self.touched: dict[int, list[tuple[range, bool, str, Clock]]] = {}
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        arguments = list(zip(func._schema.arguments, args, strict=False))
        arguments += [(a, (kwargs or {})[a.name]) for a in func._schema.arguments if a.name in (kwargs or {})]
        touches: list[tuple[Tensor, bool]] = []
        for argument, value in arguments:
            writes = argument.alias_info is not None and argument.alias_info.is_write
            tensors = value if isinstance(value, list | tuple) else [value]
            touches += [(x, writes) for x in tensors if isinstance(x, Tensor) and self._place(x) in self.shared]
        if touches and not func.is_view:
            stream = HOST if any(w and self._place(x) in self.pinned for x, w in touches) else FakeStream.current[-1]
            clock = stream.start()
            for tensor, writes in touches:
                self._note(tensor, writes, stream.name, clock, str(func))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _place(tensor: Tensor) -> int:
        return tensor.untyped_storage().data_ptr()

    def _note(self, tensor: Tensor, writes: bool, stream: str, clock: Clock, what: str) -> None:
        start = tensor.storage_offset() * tensor.element_size()
        where = range(start, start + tensor.nbytes)
        notes = self.touched.setdefault(self._place(tensor), [])
        for other, wrote, by, then in notes:
            apart = other.stop <= where.start or where.stop <= other.start
            if not apart and (writes or wrote) and then[by] > clock.get(by, 0):
                self.found.append(f"{what} on {stream} does not wait for what {by} does at {other}")
        notes.append((where, writes, stream, clock))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The device is the CPU, whose module in torch has streams here that are clocks."""
    monkeypatch.setattr(torch.cpu, "Stream", FakeStream, raising=False)
    monkeypatch.setattr(torch.cpu, "Event", FakeEvent, raising=False)
    monkeypatch.setattr(torch.cpu, "stream", switched, raising=False)
    monkeypatch.setattr(torch.cpu, "current_stream", lambda device: FakeStream.current[0])
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(FakeStream, "current", [FakeStream(name="compute")])
    monkeypatch.setattr(HOST, "clock", {})


def streamed_steps(
    path: Path, monkeypatch: pytest.MonkeyPatch, steps: int = 3
) -> tuple[list[str], list[Tensor], Meter]:
    """The races of some steps of a UNet in blocks that come over a GpuLane, what they predicted, and the count."""
    made: list[GpuLane] = []

    def lane_to(device: torch.device, largest: int) -> GpuLane:
        made.append(GpuLane(device, largest))
        return made[-1]

    monkeypatch.setattr(streaming, "lane_to", lane_to)
    monkeypatch.setattr(streaming, "used_in_place", lambda device, kernels: False)
    model, meter = ModelFile.open(path), Meter()
    streamed = load_streamed(model, "unet", CPU, torch.float32, "torch", meter)
    races, unet = Races(made[0]), streamed.part
    races.shared |= {
        tensor.untyped_storage().data_ptr()
        for module in unet.modules()
        if getattr(module, "origins", ())
        for tensor in (getattr(module, "blocks", None), getattr(module, "weight", None))
        if isinstance(tensor, Tensor)
    }
    config, generator = model.config.unet, torch.Generator().manual_seed(0)
    latents = torch.randn(1, config.in_channels, 4, 4, generator=generator)
    context = torch.randn(1, 7, config.context_dim, generator=generator)
    with races, torch.inference_mode():
        results = [unet(latents * n, torch.tensor([500.0]), context) for n in range(steps)]
    assert races.touched, "nothing was seen"
    return races.found, results, meter


def test_nothing_is_overwritten_before_its_time(gpu: None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, results, _ = streamed_steps(tiny_model, monkeypatch)
    assert found == []
    monkeypatch.undo()
    streamed = load_streamed(ModelFile.open(tiny_model), "unet", CPU, torch.float32, "torch", Meter())
    generator = torch.Generator().manual_seed(0)
    latents, context = (torch.randn(shape, generator=generator) for shape in ((1, 4, 4, 4), (1, 7, 32)))
    with torch.inference_mode():
        assert torch.equal(results[1], streamed.part(latents, torch.tensor([500.0]), context))


@pytest.mark.parametrize("missing", ["compute_after", "copy_after", "ring"])
def test_a_missing_wait_is_seen(gpu: None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    """So that the test above is one."""
    if missing == "ring":
        monkeypatch.setattr(lanes, "RING", 1)
        monkeypatch.setattr(FakeEvent, "synchronize", lambda event: None)
    else:
        monkeypatch.setattr(GpuLane, missing, lambda lane, event: None)
    assert streamed_steps(tiny_model, monkeypatch)[0]


def test_each_stage_is_copied_while_the_one_before_computes(
    gpu: None, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That is: none is waited for when its turn comes, but one a pass where the last and the first share a place; from
    the first pass on, as the order of stages is that of the modules."""
    fills: list[bool] = []
    beside: list[bool] = []  # whether the copy does not wait for all of the computing that was started
    fill, begin = Stream._fill, Stream.begin

    def noted(stream: Stream, *given: Any) -> None:
        fills.append(getattr(stream, "beginning", False))
        fill(stream, *given)
        if not fills[-1]:
            known, now = given[1].filled.clock, FakeStream.current[0].clock
            beside.append(known.get("compute", 0) < now["compute"])

    def beginning(stream: Any, stage: Any) -> None:
        stream.beginning = True
        begin(stream, stage)
        stream.beginning = False

    monkeypatch.setattr(Stream, "_fill", noted)
    monkeypatch.setattr(Stream, "begin", beginning)
    _, _, meter = streamed_steps(tiny_model, monkeypatch, steps=5)
    assert sum(fills) <= 5, "stages waited for their weights although their order is known"
    assert len(fills) > 5 * 20
    assert all(beside[1:])  # the first knows of no end yet
    assert meter.nbytes < 5.2 * sum(x.nbytes for x in ModelFile.open(tiny_model).file.tensors.values())
