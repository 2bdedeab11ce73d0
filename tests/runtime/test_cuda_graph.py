"""Graphed steps: what is captured, when, and that a replay sees the inputs it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from gguf_sd.errors import GgufSdError
from gguf_sd.runtime.cuda_graph import (
    MAX_SHAPES,
    NO_GRAPHS,
    WORTH_PASSES,
    CudaCapture,
    GraphedUNet,
    Graphing,
    use_graphs,
)

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class Recorder:
    """Stands for CudaCapture where there is no GPU: a replay runs the pass on its own inputs, into its own result."""

    def __init__(self, failure: str = ""):
        self.captures, self.failure = 0, failure

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.failure:
            raise torch.OutOfMemoryError(self.failure)
        self.captures += 1
        result = run()
        return lambda: result.copy_(run())

    def reserved(self) -> int:
        return 1000 * self.captures


class Sum:
    """A UNet to compute in the head."""

    def project(self, context: Tensor) -> Tensor:
        return 2 * context

    def step(
        self,
        latents: Tensor,
        timesteps: Tensor,
        projected: Tensor,
        vector: Tensor | None = None,
        *,
        control: Sequence[Tensor] = (),
    ) -> Tensor:
        extra = 0 if vector is None else vector.sum(1)[:, None, None, None]
        steered = sum((i + 1) * x.mean() for i, x in enumerate(control))
        return latents + timesteps[:, None, None, None] + projected.sum((1, 2))[:, None, None, None] + extra + steered


def inputs(batch: int, value: float, vector: bool = False) -> list[Any]:
    """As guidance passes them: timesteps expanded from one, contexts from one prompt."""
    given = [
        torch.full((batch, 4, 2, 2), value),
        torch.tensor(value).expand(batch),
        torch.full((1, 3, 2), value).expand(batch, -1, -1),
    ]
    return given + ([torch.full((1, 5), value).expand(batch, -1)] if vector else [])


def graphed(capture: Any, mode: str = "auto") -> GraphedUNet:
    return GraphedUNet(Sum(), capture, Graphing(mode))


def test_a_replay_sees_its_inputs() -> None:
    unet = graphed(Recorder())
    first = unet.step(*inputs(2, 1.0))
    kept = first.clone()
    for value in (1.0, 2.0, 3.0):
        given = inputs(2, value)
        assert torch.equal(unet.step(*given), Sum().step(*given))
    assert torch.equal(first, kept), "a result changed after it was returned"


@pytest.mark.parametrize("vector", [False, True])
def test_what_controlnets_add_is_an_input(vector: bool) -> None:
    capture = Recorder()
    unet: Any = graphed(capture)
    plain: Any = Sum()
    for value in (1.0, 2.0, 3.0):
        given = inputs(2, value, vector)
        added = [torch.full((2, 8, 2, 2), value), torch.full((2, 16, 1, 1), -value)]
        assert torch.equal(unet.step(*given, control=added), plain.step(*given, control=added))
    assert capture.captures == 1
    given = inputs(2, 5.0, vector)
    assert torch.equal(unet.step(*given), Sum().step(*given)), "where a net has no say the pass is another"
    assert capture.captures == 2


def test_a_shape_is_captured_once() -> None:
    recorder = Recorder()
    unet = graphed(recorder)
    for given in (inputs(1, 1.0), inputs(1, 2.0), inputs(2, 1.0), inputs(1, 1.0), inputs(2, 5.0, vector=True)):
        assert torch.equal(unet.step(*given), Sum().step(*given))
    assert recorder.captures == 3
    assert unet.nbytes == 3000


def test_a_failed_capture_is_said_once_and_steps_go_on(caplog: pytest.LogCaptureFixture) -> None:
    unet = graphed(Recorder("CUDA out of memory\nmore"))
    for value in (1.0, 2.0):
        given = inputs(1, value)
        assert torch.equal(unet.step(*given), Sum().step(*given))
    assert [record.message for record in caplog.records] == [
        "the UNet cannot become a CUDA graph, steps run without one: CUDA out of memory"
    ]
    with pytest.raises(GgufSdError, match="out of memory; use --cuda-graph off"):
        graphed(Recorder("CUDA out of memory"), "on").step(*inputs(1, 1.0))


def test_when_graphs_are_used() -> None:
    many = WORTH_PASSES
    assert use_graphs("auto", GPU, "fused", 3) == Graphing("auto", 3)
    assert use_graphs("auto", GPU, "torch", many) == NO_GRAPHS
    assert use_graphs("auto", CPU, "torch", many) == NO_GRAPHS
    assert use_graphs("on", GPU, "torch", 1).mode == "on"
    assert use_graphs("off", GPU, "fused", many).mode == "off"
    with pytest.raises(GgufSdError, match="'yes'; choose from auto, on, off"):
        use_graphs("yes", GPU, "fused", many)
    with pytest.raises(GgufSdError, match="need an NVIDIA or AMD GPU, the device is cpu"):
        use_graphs("on", CPU, "torch", many)


def painted(unet: GraphedUNet, passes: int, *given: list[Any], mode: str = "auto") -> None:
    lent = unet.lend(Graphing(mode, passes))
    for each in given:
        assert torch.equal(lent.step(*each), Sum().step(*each))


def test_few_passes_are_captured_when_the_shape_is_painted_again() -> None:
    """Turbo's one to four steps; another shape in between has its own count, and the graph is kept."""
    recorder = Recorder()
    unet = graphed(recorder)
    painted(unet, 2, inputs(1, 1.0), inputs(1, 2.0))
    painted(unet, 2, inputs(2, 1.0), inputs(2, 2.0))
    assert recorder.captures == 0
    painted(unet, 2, inputs(1, 3.0), inputs(1, 4.0))
    assert recorder.captures == 1
    painted(unet, 2, inputs(2, 3.0), inputs(1, 5.0))
    assert recorder.captures == 2
    painted(unet, 1, inputs(1, 6.0), inputs(2, 6.0))
    assert recorder.captures == 2


def test_many_passes_and_graphs_on_are_captured_at_once() -> None:
    for passes, mode in ((WORTH_PASSES, "auto"), (1, "on")):
        recorder = Recorder()
        painted(graphed(recorder), passes, inputs(1, 1.0), mode=mode)
        assert recorder.captures == 1


def test_not_all_shapes_ever_painted_are_remembered() -> None:
    unet = graphed(Recorder())
    for batch in range(1, MAX_SHAPES + 3):
        painted(unet, 1, [torch.zeros(batch, 1, 1, 1), torch.zeros(batch), torch.zeros(batch, 1, 1)])
    assert len(unet._met) == MAX_SHAPES


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@torch.inference_mode()
def test_on_a_gpu() -> None:
    unet = GraphedUNet(Sum(), CudaCapture(GPU), Graphing("on"))
    for value in (1.0, 2.0):
        given = [x.to(GPU) for x in inputs(2, value)]
        assert torch.equal(unet.step(*given), Sum().step(*given))
