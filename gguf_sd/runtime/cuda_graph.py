"""UNet steps replayed from CUDA graphs: one launch in place of hundreds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gguf_sd.errors import GgufSdError
from gguf_sd.sampling.guidance import Steps

log = logging.getLogger(__name__)

GRAPH_MODES = ("auto", "on", "off")
# Passes before the capture: kernels are compiled, libraries choose their algorithms and take their workspaces, on the
# stream that is captured afterwards, as workspaces belong to a stream.
WARM_UPS = 2
# Passes of one shape that a capture is worth: it costs WARM_UPS and a pass that only records. Not measured.
WORTH_PASSES = 8

Replay = Callable[
    [], Tensor
]  # runs the captured pass on the inputs' present values; its result is overwritten next time
Capture = Callable[[Callable[[], Tensor]], Replay]


def use_graphs(mode: str, device: torch.device, kernels: str, passes: int) -> bool:
    """Whether ``passes`` steps of the UNet are to go through a graph: ``on`` and ``off`` say so themselves, ``auto``
    is on with the Triton kernels (``kernels`` is not torch) and enough passes.

    Raises GgufSdError for an unknown mode, and ``on`` without a GPU.
    """
    if mode not in GRAPH_MODES:
        raise GgufSdError(f"unknown CUDA graph mode {mode!r}; choose from {', '.join(GRAPH_MODES)}")
    if mode == "on" and device.type != "cuda":
        raise GgufSdError(f"CUDA graphs need a GPU, the device is {device}; choose auto or off")
    return mode == "on" or (mode == "auto" and device.type == "cuda" and kernels != "torch" and passes >= WORTH_PASSES)


class CudaCapture:
    """Captures passes on a stream of its own; all graphs share one pool of memory, as they run one at a time."""

    def __init__(self, device: torch.device):
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.device = device

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            result = run()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay

    def reserved(self) -> int:
        """Bytes that torch holds on the device and needs: what it keeps for reuse is given back first."""
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self.device)


@dataclass
class _Captured:
    inputs: list[Tensor]  # what the graph reads
    replay: Replay


@dataclass
class GraphedUNet:
    """Stands for ``unet``: captures a step when it meets inputs of new shapes, and replays it afterwards.

    Where a capture fails, out of memory say, it says so and runs passes as they are; with ``strict`` it raises
    GgufSdError instead.
    """

    unet: Steps
    capture: CudaCapture
    strict: bool = False
    nbytes: int = 0  # device memory that the graphs hold beside the weights
    _known: dict[tuple[object, ...], _Captured | None] = field(default_factory=dict)

    def project(self, context: Tensor) -> Tensor:
        """As :meth:`gguf_sd.models.unet.UNet.project`; once a prompt, without a graph."""
        return self.unet.project(context)

    def step(self, latents: Tensor, timesteps: Tensor, projected: Tensor, vector: Tensor | None = None) -> Tensor:
        """As :meth:`gguf_sd.models.unet.UNet.step`."""
        inputs = [latents, timesteps, projected] + ([] if vector is None else [vector])
        key = tuple((tuple(x.shape), x.dtype, x.device) for x in inputs)
        if key not in self._known:
            self._known[key] = self._captured(inputs)
        captured = self._known[key]
        if captured is None:
            return self.unet.step(*inputs)
        for own, given in zip(captured.inputs, inputs, strict=True):
            own.copy_(given)
        return captured.replay().clone()

    def _captured(self, inputs: list[Tensor]) -> _Captured | None:
        before = self.capture.reserved()
        # Copies that can be written to: timesteps come expanded.
        own = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        try:
            replay = self.capture(lambda: self.unet.step(*own))
        except RuntimeError as error:  # out of memory included
            reason = str(error).splitlines()[0]
            if self.strict:
                raise GgufSdError(f"the UNet cannot become a CUDA graph: {reason}; use --cuda-graph off") from error
            log.warning("the UNet cannot become a CUDA graph, steps run without one: %s", reason)
            return None
        self.nbytes += max(0, self.capture.reserved() - before)
        return _Captured(own, replay)
