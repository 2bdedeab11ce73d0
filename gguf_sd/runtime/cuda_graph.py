"""UNet steps replayed from CUDA graphs: one launch in place of hundreds.

A shape is captured when enough passes of it are to come, or when it is painted again: a server that paints a step or
four at a time asks for the same shape all day. Graphs live as long as the loaded UNet does.
"""

from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gguf_sd.errors import GgufSdError
from gguf_sd.sampling.guidance import Denoise

log = logging.getLogger(__name__)

GRAPH_MODES = ("auto", "on", "off")
# Passes before the capture: kernels are compiled, libraries choose their algorithms and take their workspaces, on the
# stream that is captured afterwards, as workspaces belong to a stream.
WARM_UPS = 2
# Passes of one shape that a capture is worth: it costs WARM_UPS and a pass that only records. Not measured.
WORTH_PASSES = 8

# Shapes whose graphs are held at a time. A job needs one, or two where its last batch is smaller; not measured.
MAX_GRAPHS = 4
MAX_SHAPES = 256  # that are remembered to have been painted
CAPTURING = threading.Lock()  # CUDA records one graph at a time in a process

# Runs the captured pass on the inputs' present values; its result is overwritten next time.
Replay = Callable[[], Tensor]
Shapes = tuple[tuple[tuple[int, ...], torch.dtype, torch.device], ...]  # of a step's inputs


@dataclass(frozen=True)
class Graphing:
    """How ``passes`` steps of the UNet are to be made: ``on`` through graphs, ``auto`` where a graph pays, ``off``
    without."""

    mode: str
    passes: int = WORTH_PASSES


NO_GRAPHS = Graphing("off")


def use_graphs(mode: str, device: torch.device, kernels: str, passes: int) -> Graphing:
    """What ``mode``, one of GRAPH_MODES, comes to for ``passes`` steps: ``auto`` is off without a GPU, and without the
    Triton kernels (``kernels`` is torch).

    Raises GgufSdError for an unknown mode, and ``on`` without a GPU.
    """
    if mode not in GRAPH_MODES:
        raise GgufSdError(f"unknown CUDA graph mode {mode!r}; choose from {', '.join(GRAPH_MODES)}")
    if mode == "on" and device.type != "cuda":
        raise GgufSdError(f"CUDA graphs need an NVIDIA or AMD GPU, the device is {device}; choose auto or off")
    if mode == "auto" and (device.type != "cuda" or kernels == "torch"):
        return NO_GRAPHS
    return Graphing(mode, passes)


class CudaCapture:
    """Captures passes on a stream of its own; all graphs share one pool of memory, as they run one at a time."""

    def __init__(self, device: torch.device):
        self.device = device
        self._start_afresh()

    def _start_afresh(self) -> None:
        self.stream = torch.cuda.Stream(self.device)
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], Tensor]) -> Replay:
        """Captures ``run``. Raises RuntimeError, torch.OutOfMemoryError included, where that fails; the stream that
        was current is current again either way."""
        current = torch.cuda.current_stream(self.device)
        try:
            with CAPTURING:
                return self._captured(run, current)
        except RuntimeError:
            self._start_afresh()  # what failed may have left stream and pool in the middle of a capture
            raise
        finally:
            torch.cuda.set_stream(current)  # torch.cuda.graph leaves its own current where a capture fails

    def _captured(self, run: Callable[[], Tensor], current: torch.cuda.Stream) -> Replay:
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                run()
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # "thread_local": what other threads do on the GPU meanwhile, allocating say, does not spoil the capture.
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
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
    """Stands for ``unet``: captures a step of inputs of some shapes once that pays, and replays it afterwards. Of the
    shapes, the ``limit`` used last are held.

    Where a capture fails, out of memory say, it says so and runs passes as they are; with ``graphing.mode`` "on",
    where every shape is captured at once, it raises GgufSdError instead.
    """

    unet: Denoise
    capture: CudaCapture
    graphing: Graphing = Graphing("auto")
    limit: int = MAX_GRAPHS
    nbytes: int = 0  # device memory that the graphs hold beside the weights
    _known: OrderedDict[Shapes, _Captured | None] = field(default_factory=OrderedDict)
    _loan: int = 0  # how often it was lent
    _met: OrderedDict[Shapes, int] = field(default_factory=OrderedDict)  # the loan in which each shape came first

    def lend(self, graphing: Graphing) -> GraphedUNet:
        """Itself, for a painting whose steps are to be made as ``graphing`` says."""
        self.graphing, self._loan = graphing, self._loan + 1
        return self

    def project(self, context: Tensor) -> Tensor:
        """As :meth:`gguf_sd.models.unet.UNet.project`; once a prompt, without a graph."""
        return self.unet.project(context)

    def step(
        self,
        latents: Tensor,
        timesteps: Tensor,
        projected: Tensor,
        vector: Tensor | None = None,
        *,
        control: Sequence[Tensor] = (),
    ) -> Tensor:
        """As :meth:`gguf_sd.models.unet.UNet.step`."""
        inputs = [latents, timesteps, projected, *([] if vector is None else [vector]), *control]
        captured = self._graph_of(tuple((tuple(x.shape), x.dtype, x.device) for x in inputs), inputs, len(control))
        if captured is None:
            return self.unet.step(latents, timesteps, projected, vector, control=control)
        for own, given in zip(captured.inputs, inputs, strict=True):
            own.copy_(given)
        return captured.replay().clone()

    def _graph_of(self, shapes: Shapes, inputs: list[Tensor], controls: int) -> _Captured | None:
        """The graph for such inputs, the last ``controls`` of which are ControlNets'; None where there is none, because
        it does not pay yet or cannot be."""
        strict = self.graphing.mode == "on"
        if shapes not in self._known or (self._known[shapes] is None and strict):
            if not (strict or self._pays(shapes)):
                return None
            self._known[shapes] = self._captured(inputs, controls)
        self._known.move_to_end(shapes)
        return self._known[shapes]

    def _pays(self, shapes: Shapes) -> bool:
        """Whether enough passes are to come, or the shape was painted before and so may be again."""
        first = self._met.setdefault(shapes, self._loan)
        if len(self._met) > MAX_SHAPES:
            self._met.popitem(last=False)
        return self.graphing.passes >= WORTH_PASSES or first < self._loan

    def _captured(self, inputs: list[Tensor], controls: int) -> _Captured | None:
        before = self.capture.reserved()
        while len(self._known) >= self.limit:
            self._known.popitem(last=False)  # first, so that its memory serves the new one
        # Copies that can be written to: timesteps come expanded.
        own = [x.clone(memory_format=torch.contiguous_format) for x in inputs]
        first, captured = len(own) - controls, None
        latents, timesteps, projected, *vector = own[:first]

        def run() -> Tensor:
            return self.unet.step(latents, timesteps, projected, vector[0] if vector else None, control=own[first:])

        try:
            captured = _Captured(own, self.capture(run))
        except RuntimeError as error:  # out of memory included
            reason = str(error).splitlines()[0]
            if self.graphing.mode == "on":
                raise GgufSdError(f"the UNet cannot become a CUDA graph: {reason}; use --cuda-graph off") from error
            log.warning("the UNet cannot become a CUDA graph, steps run without one: %s", reason)
        finally:
            self.nbytes = max(0, self.nbytes + self.capture.reserved() - before)
        return captured
