"""Where and how a model runs."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from gguf_sd.errors import GgufSdError
from gguf_sd.memory_size import parse_memory
from gguf_sd.runtime.cuda_graph import use_graphs
from gguf_sd.runtime.kernel_modes import choose_kernels, may_take_int8
from gguf_sd.runtime.memory import PLACEMENTS, WEIGHT_MODES, choose_device, choose_dtype

VAE_TILING = ("auto", "on", "off")  # as memory allows; always, in tiles as large as it allows; never
MAX_MEMORY = "GGUF_SD_MAX_MEMORY"  # environment variable: the budget where none is given


@dataclass(frozen=True)
class Execution:
    """Checked choices; :meth:`choose` makes them from what a user says."""

    device: torch.device
    dtype: torch.dtype  # that the UNet and the text encoders compute in
    weights: str = "auto"  # quantized, resident, int8, or auto: as memory allows, see gguf_sd.runtime.memory.MemoryPlan
    kernels: str = "torch"  # see gguf_sd.runtime.kernel_modes.choose_kernels
    cuda_graph: str = "auto"  # see gguf_sd.runtime.cuda_graph.use_graphs
    max_memory: int | None = None  # bytes, see gguf_sd.runtime.planning; None = what is free less a margin
    placement: str = "auto"  # of all parts, see gguf_sd.runtime.memory.PLACEMENTS; auto: as memory allows
    vae_tile: int | str = "auto"  # edge in latent pixels, or one of VAE_TILING
    int8: bool = False  # whether auto weights may be int8

    @classmethod
    def choose(
        cls,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        weights: str | None = None,
        kernels: str | None = None,
        cuda_graph: str | None = None,
        max_memory: str | float | None = None,
        placement: str | None = None,
        vae_tile: int | str | None = None,
    ) -> Execution:
        """None is auto throughout; for ``max_memory`` it is the environment's GGUF_SD_MAX_MEMORY. Raises GgufSdError
        for what is unknown, or cannot be on this device."""
        where, weights, graph = choose_device(device), weights or "auto", cuda_graph or "auto"
        if weights not in WEIGHT_MODES:
            raise GgufSdError(f"unknown weights mode {weights!r}; choose from {', '.join(WEIGHT_MODES)}")
        if (placed := placement or "auto") not in ("auto", *PLACEMENTS):
            raise GgufSdError(f"unknown placement {placed!r}; choose from auto, {', '.join(PLACEMENTS)}")
        if placed == "streamed" and weights == "resident":
            raise GgufSdError("streamed weights (--lowvram) stay as the file has them; leave --weights resident out")
        budget = parse_memory(max_memory, "max_memory")
        if max_memory is None:
            budget = parse_memory(os.environ.get(MAX_MEMORY), MAX_MEMORY)
        may_be_int8 = may_take_int8(kernels or "auto", weights, where)
        chosen, weights = choose_kernels(kernels or "auto", weights, where)
        if placed == "streamed" and weights == "int8":
            raise GgufSdError("streamed weights (--lowvram) stay as the file has them; leave --kernels int8 out")
        use_graphs(graph, where, chosen, passes=0)  # raises for what cannot be
        number, tile = choose_dtype(dtype, where), checked_tile(vae_tile)
        if weights == "int8" and number == torch.float16:
            raise GgufSdError("kernels 'int8' compute with bfloat16 or float32 on a CPU; leave --dtype float16 out")
        exact = number == torch.float16 or (
            number == torch.float32 and dtype not in (None, "auto")
        )  # by one's own wish
        may_be_int8 = may_be_int8 and not exact
        return cls(where, number, weights, chosen, graph, budget, placed, tile, may_be_int8)


def checked_tile(tile: int | str | None) -> int | str:
    """One of VAE_TILING, None being auto, or the edge of a tile in latent pixels: 32, "32", or "32x32" as other
    programs have it, of which the shorter side counts. Raises GgufSdError for anything else."""
    text = "auto" if tile is None else str(tile).lower()
    if text in VAE_TILING:
        return text
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isascii() and side.isdigit() and len(side) < 6 and int(side) for side in sides):
        raise GgufSdError(
            f"the VAE tile {tile!r} is no size; it takes {', '.join(VAE_TILING)}, or an edge of 1 latent pixel "
            "(8 pixels of the picture) or more, such as 32"
        )
    return min(map(int, sides))
