"""Which launches are worth the time of measuring them [model]: none of the numbers here has been measured."""

from __future__ import annotations

from gguf_sd_kernels.devices import Gpu
from gguf_sd_kernels.tuning.launch import START_STEPS, Launch, Product, candidates, tiles, untuned

MOST = 4  # launches measured for a product
WARPS_A_PROCESSOR = 16  # that fit beside one another with the registers these kernels take
LOAD_WEIGHT = 48  # multiply-accumulates in the time of loading and decoding one value of an operand
REDUCE = 8.0  # times a tile's values: writing a part of the sums and reading it back


def cost(product: Product, launch: Launch, processors: int) -> float:
    """The product's time in arbitrary units: waves of programs, each with its steps along K and its start."""
    steps = -(-product.k // launch.block_k // launch.splits)
    area, rim = launch.block_m * launch.block_n, launch.block_m + launch.block_n
    step = launch.block_k * (area + LOAD_WEIGHT * rim)
    beside = max(1, WARPS_A_PROCESSOR // launch.warps)  # they share the processor's units
    waves = -(-tiles(product, launch) * launch.splits // (processors * beside))
    reduction = REDUCE * area * launch.splits if launch.splits > 1 else 0
    return waves * beside * (step * (steps + START_STEPS) + reduction)


def worth_measuring(product: Product, gpu: Gpu, first: Launch | None = None, most: int = MOST) -> list[Launch]:
    """At most ``most`` launches: ``first``, which is used now (by default the family's), and the cheapest of the other
    candidates."""
    if gpu.family is None:
        return []
    first = first or untuned(product, gpu)
    others = set(candidates(product, gpu.family, gpu.processors)) - {first}
    return [first, *sorted(others, key=lambda launch: (cost(product, launch, gpu.processors), str(launch)))][:most]
