"""The most bytes that a computation's tensors take at once, counted without making them: under torch's fake tensors.

An operator's results count from its call on until their storage is gone; views share one. What an operator takes
inside itself, for a moment, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakTracer(TorchDispatchMode):
    """Counts the storages of all tensors made while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        given -= self.alive.keys()  # weights and inputs: a view of one takes nothing
        result = func(*args, **(kwargs or {}))
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in given:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        self.peak = max(self.peak, sum(nbytes for _, nbytes in self.alive.values()))
        return result


def traced_peak(build: Callable[[], Callable[[], object]]) -> int:
    """``build`` makes a model and its inputs, which do not count, and returns what runs it; the peak of that is
    returned."""
    with FakeTensorMode(), torch.no_grad():
        run = build()
        with PeakTracer() as tracer:
            run()
    return tracer.peak
