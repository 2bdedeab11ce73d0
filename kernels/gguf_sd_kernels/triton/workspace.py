"""How a product is divided among programs, and the memory it needs where K is split: parts of tiles, and counters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gguf_sd_kernels.tuning.launch import Launch, Product
from gguf_sd_kernels.tuning.launch import tiles as count_tiles

MAX_TILES = 4096  # counters kept; a grid of more tiles has no reason to split K
_counters: dict[tuple[torch.device, int], Tensor] = {}


@dataclass(frozen=True)
class Programs:
    """``splits`` programs for each of the result's ``tiles``, and what they share.

    ``steps`` of ``launch.block_k`` are a program's part of K. ``partials`` and ``counters`` are None where K is not
    split.
    """

    tiles: int
    splits: int
    steps: int
    partials: Tensor | None = None  # float32 [splits * tiles * block_m * block_n]
    counters: Tensor | None = None  # int32, at zero

    @property
    def grid(self) -> tuple[int, int]:
        return self.tiles, self.splits


def divide(product: Product, launch: Launch, device: torch.device) -> Programs:
    """The programs that ``launch`` makes of ``product``; none of them is without work.

    Kernels leave the counters at zero, so they are cleared once; streams, which run side by side, have counters
    of their own. Raises ValueError where K is split for more tiles than there are counters.
    """
    tiles, whole = count_tiles(product, launch), product.k // launch.block_k
    steps = -(-whole // launch.splits)
    splits = -(-whole // steps)
    if splits == 1:
        return Programs(tiles, splits, steps)
    if tiles > MAX_TILES:
        raise ValueError(f"K is split for at most {MAX_TILES} tiles, got {tiles}")
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    counters = _counters.get((device, stream))
    if counters is None:
        counters = _counters[device, stream] = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
    size = splits * tiles * launch.block_m * launch.block_n
    return Programs(tiles, splits, steps, torch.empty(size, dtype=torch.float32, device=device), counters)
