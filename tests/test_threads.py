"""One pipeline in several threads, iterators that are abandoned, and several pipelines beside each other."""

from __future__ import annotations

import gc
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from gguf_sd.pipeline import Pipeline
from gguf_sd.request import Request
from gguf_sd.runtime.plan import Planner

SETTINGS: dict[str, Any] = {"steps": 3, "width": 32, "height": 32, "sampler": "euler_a"}


@pytest.fixture
def pipeline(tiny_model: Path) -> Pipeline:
    return Pipeline.load(tiny_model, "cpu", "float32")


@pytest.fixture(params=[True, False], ids=["roomy", "tight"])
def memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """With memory for all parts, and for none."""
    if not request.param:
        monkeypatch.setattr(Planner, "plan", lambda self, budget: self.smallest)
    return bool(request.param)


def is_free(pipeline: Pipeline) -> bool:
    """Whether another thread could paint now."""

    def attempt() -> bool:
        if got := pipeline._turns.lock.acquire(blocking=False):
            pipeline._turns.lock.release()
        return got

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(attempt).result()


def test_threads_take_turns(pipeline: Pipeline, memory: bool) -> None:
    prompts = ["a cat", "a red dog", "a dog", "red " * 90]
    alone = [[p.tobytes() for p in pipeline(x, seed=i, count=2, **SETTINGS)] for i, x in enumerate(prompts)]
    inside: list[int] = []
    most: list[int] = []

    def paint(index: int) -> list[bytes]:
        job = pipeline.prepare(Request(prompts[index], seed=index, count=2, **SETTINGS))

        def on_step(step: object) -> None:
            if index not in inside:
                inside.append(index)
            most.append(len(inside))
            if getattr(step, "index", 0) == 2:
                inside.remove(index)

        return [picture.image.tobytes() for picture in pipeline.paint(job, on_step)]

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(paint, range(4))) == alone
    assert max(most) == 1, "two painted at the same time"


def test_a_picture_that_is_handed_out_holds_nothing(pipeline: Pipeline) -> None:
    painting = pipeline.paint(pipeline.prepare(Request("a cat", seed=1, count=2, **SETTINGS)))
    first = next(painting)
    assert is_free(pipeline)
    between = pipeline("a cat", seed=2, **SETTINGS)  # by the same thread, in the middle of the job
    assert between[0].tobytes() == next(painting).image.tobytes()
    assert between[0].tobytes() != first.image.tobytes()


@pytest.mark.parametrize("how", ["break", "close", "collect", "error"])
def test_an_abandoned_iterator_holds_nothing(pipeline: Pipeline, memory: bool, how: str) -> None:
    job = pipeline.prepare(Request("a cat", seed=1, count=3, **SETTINGS))

    def fail(step: object) -> None:
        raise KeyError("mine")

    if how == "break":
        for _ in pipeline.paint(job):
            break
    elif how == "error":
        with pytest.raises(KeyError, match="mine"):
            list(pipeline.paint(job, fail))
    else:
        painting = pipeline.paint(job)
        next(painting)
        if how == "close":
            painting.close()  # type: ignore[attr-defined]
        del painting
        gc.collect()
    assert is_free(pipeline)
    assert memory or pipeline.parts.names == set()
    assert len(pipeline("a cat", **SETTINGS)) == 1


def test_a_step_may_look_and_paint(pipeline: Pipeline) -> None:
    """A callback is in its own thread's turn: it gets previews, and even pictures."""
    expected = [pipeline("a cat", seed=1, **SETTINGS)[0].tobytes(), pipeline("a dog", seed=1, **SETTINGS)[0].tobytes()]
    inner: list[bytes] = []

    def on_step(step: Any) -> None:
        assert pipeline.preview(step).size == (32, 32)
        assert not is_free(pipeline)
        if step.index == 1:
            inner.append(pipeline("a dog", seed=1, **SETTINGS)[0].tobytes())

    (outer,) = pipeline.paint(pipeline.prepare(Request("a cat", seed=1, **SETTINGS)), on_step)
    assert [outer.image.tobytes(), *inner] == expected


def test_two_pipelines_at_the_same_time(tiny_model: Path) -> None:
    alone = [
        Pipeline.load(tiny_model, "cpu", "float32", w)("a cat", seed=1, **SETTINGS)[0]
        for w in ("quantized", "resident")
    ]
    both = threading.Barrier(2, timeout=60)

    def paint(weights: str) -> bytes:
        pipeline = Pipeline.load(tiny_model, "cpu", "float32", weights)
        job = pipeline.prepare(Request("a cat", seed=1, **SETTINGS))
        (picture,) = pipeline.paint(job, lambda step: both.wait())  # neither goes on without the other
        return picture.image.tobytes()

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(paint, ("quantized", "resident"))) == [picture.tobytes() for picture in alone]
