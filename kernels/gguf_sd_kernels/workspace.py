"""Memory for products whose K is split: float32 parts of tiles, and a counter a tile."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_TILES = 4096  # counters kept; a grid of more tiles has no reason to split K
_counters: dict[tuple[torch.device, int], Tensor] = {}


def split_workspace(
    splits: int, tiles: int, tile_elements: int, device: torch.device
) -> tuple[Tensor | None, Tensor | None]:
    """(float32 ``[splits * tiles * tile_elements]``, int32 counters at zero), both None where K is not split.

    Kernels leave the counters at zero, so they are cleared once; streams, which run side by side, have counters
    of their own. Raises ValueError for more tiles than there are counters.
    """
    if splits == 1:
        return None, None
    if tiles > MAX_TILES:
        raise ValueError(f"K is split for at most {MAX_TILES} tiles, got {tiles}")
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    counters = _counters.get((device, stream))
    if counters is None:
        counters = _counters[device, stream] = torch.zeros(MAX_TILES, dtype=torch.int32, device=device)
    return torch.empty(splits * tiles * tile_elements, dtype=torch.float32, device=device), counters
