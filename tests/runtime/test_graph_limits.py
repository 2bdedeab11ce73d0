"""Captures that fail, graphs that are evicted, and how CUDA is asked, with stand-ins for it."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gguf_sd.runtime.cuda_graph import CudaCapture, GraphedUNet

CPU = torch.device("cpu")


class Cuda:
    """torch.cuda's streams and graphs: a capture that fails leaves its own stream current, as torch's does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.current: Any = "the caller's"
        self.asked: list[dict[str, Any]] = []
        self.streams = 0
        for name in ("Stream", "graph_pool_handle", "current_stream", "set_stream", "stream", "graph", "CUDAGraph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self, device: torch.device) -> Any:  # noqa: N802 - torch's name
        self.streams += 1

        class Stream:
            def wait_stream(self, other: object) -> None:
                pass

        return Stream()

    def graph_pool_handle(self) -> object:
        return object()

    def current_stream(self, device: torch.device) -> Any:
        outer = self

        class Current(str):
            def wait_stream(self, other: object) -> None:
                assert outer

        return Current(self.current) if isinstance(self.current, str) else self.current

    def set_stream(self, stream: Any) -> None:
        self.current = stream

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        before, self.current = self.current, stream
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def graph(self, graph: Any, pool: Any, stream: Any, **options: Any) -> Iterator[None]:
        self.asked.append(options | {"pool": pool})
        before, self.current = self.current, stream
        yield
        self.current = before  # not reached where the pass raises

    class CUDAGraph:
        def replay(self) -> None:
            pass


def test_a_capture_that_fails_leaves_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch)
    capture = CudaCapture(CPU)
    calls: list[int] = []

    def run() -> Tensor:
        calls.append(1)
        if len(calls) == 3:  # after the warm-ups
            raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.zeros(1)

    with pytest.raises(torch.OutOfMemoryError):
        capture(run)
    assert cuda.current == "the caller's"
    assert capture(run)() is not None
    assert cuda.current == "the caller's"
    assert cuda.streams == 2, "the stream of the failed capture is used again"
    assert cuda.asked[0]["pool"] is not cuda.asked[1]["pool"]
    assert [options["capture_error_mode"] for options in cuda.asked] == ["thread_local"] * 2


class Recorder:
    """Stands for CudaCapture: every graph that is alive takes 1000 bytes."""

    def __init__(self) -> None:
        self.captures = 0
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captures += 1

        class Graph:
            def __call__(self) -> Tensor:
                return run()

        graph = Graph()
        self.alive.add(graph)
        return graph

    def reserved(self) -> int:
        return 1000 * len(self.alive)


class Identity:
    def project(self, context: Tensor) -> Tensor:
        return context

    def step(
        self,
        latents: Tensor,
        timesteps: Tensor,
        projected: Tensor,
        vector: Tensor | None = None,
        *,
        control: Sequence[Tensor] = (),
    ) -> Tensor:
        return latents + 1


def test_the_shapes_used_last_are_held() -> None:
    recorder: Any = Recorder()
    unet = GraphedUNet(Identity(), recorder, limit=2)

    def step(batch: int) -> None:
        latents = torch.full((batch, 1, 2, 2), float(batch))
        got = unet.step(latents, torch.zeros(batch), torch.zeros(batch, 1, 1))
        assert torch.equal(got, latents + 1)

    for batch, captures, held in ((1, 1, 1), (2, 2, 2), (1, 2, 2), (3, 3, 2), (1, 3, 2), (2, 4, 2)):
        step(batch)
        assert (recorder.captures, len(recorder.alive)) == (captures, held)
        assert unet.nbytes == 1000 * held
