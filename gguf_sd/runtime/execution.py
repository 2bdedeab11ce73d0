"""Where and how a model runs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gguf_sd.errors import GgufSdError
from gguf_sd.runtime.cuda_graph import use_graphs
from gguf_sd.runtime.kernel_modes import choose_kernels
from gguf_sd.runtime.memory import WEIGHT_MODES, choose_device, choose_dtype


@dataclass(frozen=True)
class Execution:
    """Checked choices; :meth:`choose` makes them from what a user says."""

    device: torch.device
    dtype: torch.dtype  # that the UNet and the text encoders compute in
    weights: str = "auto"  # quantized, resident, or auto: as memory allows, see gguf_sd.runtime.memory.MemoryPlan
    kernels: str = "torch"  # see gguf_sd.runtime.kernel_modes.choose_kernels
    cuda_graph: str = "auto"  # see gguf_sd.runtime.cuda_graph.use_graphs

    @classmethod
    def choose(
        cls,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        weights: str | None = None,
        kernels: str | None = None,
        cuda_graph: str | None = None,
    ) -> Execution:
        """None is auto throughout. Raises GgufSdError for what is unknown, or cannot be on this device."""
        where, weights, graph = choose_device(device), weights or "auto", cuda_graph or "auto"
        if weights not in WEIGHT_MODES:
            raise GgufSdError(f"unknown weights mode {weights!r}; choose from {', '.join(WEIGHT_MODES)}")
        chosen, weights = choose_kernels(kernels or "auto", weights, where)
        use_graphs(graph, where, chosen, passes=0)  # raises for what cannot be
        return cls(where, choose_dtype(dtype, where), weights, chosen, graph)
