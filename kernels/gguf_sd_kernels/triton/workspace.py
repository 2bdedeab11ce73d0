"""How a product is divided among programs, and the memory it needs where K is split: parts of tiles, and counters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gguf_sd_kernels.devices import current_stream
from gguf_sd_kernels.tuning.launch import Launch, Product
from gguf_sd_kernels.tuning.launch import tiles as count_tiles

MAX_TILES = 4096  # counters kept; a grid of more tiles has no reason to split K
_NOTHING = None, None
_counters: dict[tuple[torch.device, int], Tensor] = {}


@dataclass(frozen=True)
class Programs:
    """``splits`` programs for each of the result's ``tiles``; ``steps`` of ``launch.block_k`` are a program's part of
    K."""

    tiles: int
    splits: int
    steps: int
    tile_values: int

    @property
    def grid(self) -> tuple[int, int]:
        return self.tiles, self.splits

    @property
    def split(self) -> bool:
        """Whether programs share a tile, and need memory for it."""
        return self.splits > 1

    def shared(self, device: torch.device) -> tuple[Tensor | None, Tensor | None]:
        """What programs of one tile share: float32 ``[splits * tiles * tile_values]`` for parts of sums, and int32
        counters, at zero; None where K is not split.

        Kernels leave the counters at zero, so they are cleared once; streams, which run side by side, have counters
        of their own.
        """
        if self.splits == 1:
            return _NOTHING
        key = device, current_stream(device)
        counters = _counters.get(key)
        if counters is None:
            counters = _counters[key] = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
        values = self.splits * self.tiles * self.tile_values
        return torch.empty_strided((values,), (1,), dtype=torch.float32, device=device), counters


def divide(product: Product, launch: Launch) -> Programs:
    """The programs that ``launch`` makes of ``product``; none of them is without work.

    Raises ValueError where K is split for more tiles than there are counters.
    """
    tiles, whole = count_tiles(product, launch), product.k // launch.block_k
    steps = -(-whole // launch.splits)
    splits = -(-whole // steps)
    if splits > 1 and tiles > MAX_TILES:
        raise ValueError(f"K is split for at most {MAX_TILES} tiles, got {tiles}")
    return Programs(tiles, splits, steps, launch.block_m * launch.block_n)
