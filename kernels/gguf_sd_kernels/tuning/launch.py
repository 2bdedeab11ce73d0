"""Which launch configuration a product gets: tile sizes by GPU family and M, and how often to split K.

Every entry here is UNTUNED: chosen from counted instructions, registers and shared memory of the compiled code and
from arithmetic, with no GPU at hand. Measured entries come from ``benchmarks/gpu/bench_kernels.py`` and go
before these, see :func:`load_measured`.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Hashable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from gguf_sd_kernels.devices import INTERPRETER, Gpu, gpu_of, takes_ptx

# Tiles of M walked before the next of N, so that programs that run together share operands in the L2 cache. A
# customary value, not measured here.
GROUP_M = 8

BLOCKS = (16, 32, 64, 128, 256)
ALLOWED: dict[str, Collection[int]] = {
    "block_m": BLOCKS,
    "block_n": BLOCKS,
    "block_k": (32, 64, 128),
    "warps": (1, 2, 4, 8, 16),
    "stages": range(1, 9),
    "splits": range(1, 65),
}


@dataclass(frozen=True)
class Launch:
    """How a product [M, K] x [N, K]^T is cut up and run."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    swap: bool = False  # dot(w, x^T) in place of dot(x, w^T): the decoded operand stays in registers
    ptx: bool = False  # decode nibbles with inline PTX: NVIDIA, float16
    splits: int = 1  # programs that share a tile's K

    @classmethod
    def checked(cls, values: Mapping[str, Any]) -> Launch:
        """The launch of those fields, as a file has them. Raises ValueError for what no kernel takes, TypeError for
        other fields."""
        launch = cls(**values)
        for name, value in asdict(launch).items():
            kind, allowed = (bool, (False, True)) if name in ("swap", "ptx") else (int, ALLOWED[name])
            if type(value) is not kind or value not in allowed:
                raise ValueError(f"a launch's {name} cannot be {value!r}")
        return launch

    def __str__(self) -> str:
        """ "128x128x64 8w 3s", "swap", "ptx", and "x5" where K is split in five."""
        flags = [flag for flag, on in (("swap", self.swap), ("ptx", self.ptx)) if on]
        flags += [f"x{self.splits}"] if self.splits > 1 else []
        return " ".join([f"{self.block_m}x{self.block_n}x{self.block_k} {self.warps}w {self.stages}s", *flags])

    @property
    def tile(self) -> dict[str, int]:
        """What every product kernel takes of this."""
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "GROUP_M": GROUP_M}

    @property
    def options(self) -> dict[str, int]:
        """What the compiler takes of this."""
        return {"num_warps": self.warps, "num_stages": self.stages}

    def decoding(self, device: torch.device, dtype: torch.dtype) -> dict[str, bool | int]:
        """What the kernels that decode weights to ``dtype`` take besides."""
        interpreted = gpu_of(device) is INTERPRETER  # which knows no bfloat16 product
        return {
            "SWAP": self.swap,
            "PTX": self.ptx and takes_ptx(device),
            "WIDEN": interpreted and dtype == torch.bfloat16,
            "BLOCK_K": self.block_k,
        }


@dataclass(frozen=True)
class Product:
    """What is to be multiplied: ``op`` is "linear", "geglu" or "conv".

    A convolution has M = B * OH * OW, K = taps * IC; GEGLU's N counts values and gates.
    """

    op: str
    qtype: str
    m: int
    n: int
    k: int
    taps: int = 1

    @property
    def step_multiple(self) -> int:
        """What a step along K has to divide: a convolution's steps stay inside a tap."""
        return self.k // self.taps


# family -> (largest M, Launch), in rising order: the first whose M is large enough serves. What comes after one that
# serves every M is only measured beside the others.
Table = dict[str, tuple[tuple[int, Launch], ...]]

# mma (sm_80 86 89): mma.sync; 128x128 and 128x64 spill with 4 warps, as does 64x64 (8 bytes, a linear of Q4_0 in
# bfloat16 on sm_86), and 64x128 with any. At a BLOCK_K of 64, 128x64 spills with 8 warps too, in 1x1 convolutions.
# 3 stages fit 99 KiB. mma120 (sm_120): mma.sync too; there 64x64 spills with 8 warps (8 bytes, of Q8_0 where K is
# split) and 16x64 with 4 (behind an enlargement), and 128x64 at a BLOCK_K of 64 with GEGLU.
# wgmma (sm_90): 256 rows of x share one decoding of 128 rows of w. tcgen05: sm_100, where 64x64 spills with 4 warps
# (linears of Q8_0, and behind an enlargement), as does 128x128 at a BLOCK_K of 64 there. mfma: AMD CDNA. wmma: AMD
# RDNA, where 128x128 spills at a BLOCK_K of 64, 64x128 does with Triton 3.9 (12 bytes, linears of Q8_0 in float16), and
# 32x64 does with 4 warps where it takes a layer norm in.
UNTUNED: Table = {
    "mma": (
        (16, Launch(16, 64, 64, warps=4, stages=4, swap=True, ptx=True)),
        (64, Launch(64, 64, 64, warps=8, stages=4, swap=True, ptx=True)),
        (512, Launch(128, 64, 32, warps=8, stages=4, swap=True, ptx=True)),
        (1 << 31, Launch(128, 128, 64, warps=8, stages=3, swap=True, ptx=True)),
    ),
    "mma120": (
        (16, Launch(16, 64, 64, warps=8, stages=4, swap=True, ptx=True)),
        (64, Launch(64, 64, 64, warps=4, stages=4, swap=True, ptx=True)),
        (512, Launch(128, 64, 32, warps=8, stages=4, swap=True, ptx=True)),
        (1 << 31, Launch(128, 128, 64, warps=8, stages=3, swap=True, ptx=True)),
    ),
    "wgmma": (
        (16, Launch(16, 64, 64, warps=4, stages=4, swap=True, ptx=True)),
        (64, Launch(64, 64, 64, warps=4, stages=4, ptx=True)),
        (512, Launch(128, 128, 64, warps=8, stages=4, ptx=True)),
        (1 << 31, Launch(256, 128, 64, warps=8, stages=3, ptx=True)),
        (1 << 31, Launch(256, 128, 64, warps=8, stages=4, ptx=True)),
        (1 << 31, Launch(128, 64, 64, warps=4, stages=4, ptx=True)),
    ),
    "tcgen05": (
        (64, Launch(64, 64, 64, warps=8, stages=3, ptx=True)),
        (1 << 31, Launch(128, 128, 32, warps=8, stages=4, ptx=True)),
    ),
    "mfma": (
        (64, Launch(32, 64, 64, warps=4, stages=2)),
        (512, Launch(64, 64, 64, warps=4, stages=2)),
        (1 << 31, Launch(128, 128, 64, warps=8, stages=2)),
    ),
    "wmma": (
        (64, Launch(32, 64, 64, warps=8, stages=2)),
        (512, Launch(64, 128, 32, warps=8, stages=2)),
        (1 << 31, Launch(128, 128, 32, warps=8, stages=2)),
    ),
}
# Cost of a split in steps of BLOCK_K: [model] starting a program and filling its pipeline, writing and re-reading
# its part of the tile. Neither has been measured.
START_STEPS, SPLIT_STEPS, MAX_SPLITS = 4, 2, 16


@dataclass(frozen=True)
class Measured:
    """What a GPU measured for one product: its best launch, and microseconds a call in each mode."""

    launch: Launch
    fused: float
    dequantize: float  # decoding included
    resident: float

    @property
    def fastest(self) -> str:
        """ "fused" or "dequantize": the faster one that keeps the weight quantised."""
        return "fused" if self.fused <= self.dequantize else "dequantize"


# What was measured, by the GPU's name and the product without its M, then by M.
_measured: dict[tuple[str, Product], dict[int, Measured]] = {}
# A product that was not measured goes by the measured one of the nearest M, if that is no further than this factor.
NEAREST = 4

T = TypeVar("T")


class Prepared(dict[Hashable, T]):
    """What was decided or made ready for operands of some shapes: forgotten when a table of measurements is loaded,
    and where there is more of it than any model needs."""

    LARGEST = 4096
    everything: list[Prepared[Any]] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        Prepared.everything.append(self)

    def keep(self, key: Hashable, value: T) -> T:
        """Keeps ``value`` under ``key``, and returns it."""
        if len(self) >= self.LARGEST:
            self.clear()
        self[key] = value
        return value

    @staticmethod
    def forget() -> None:
        """Empties all."""
        for prepared in Prepared.everything:
            prepared.clear()


_chosen: Prepared[Launch] = Prepared()


def choose(product: Product, gpu: Gpu) -> Launch:
    """The launch for ``product``: what was measured on such a GPU, else what its family has for this M.

    Raises ValueError for a GPU without a family.
    """
    key = product, gpu
    return _chosen.get(key) or _chosen.keep(key, _choose(product, gpu))


def _choose(product: Product, gpu: Gpu) -> Launch:
    near = _nearest(product, gpu)
    if gpu.family is not None and near:
        m, known = near
        if m == product.m:
            return known.launch
        return replace(known.launch, splits=best_splits(product, known.launch, gpu.processors))
    return untuned(product, gpu)


def untuned(product: Product, gpu: Gpu) -> Launch:
    """What the family of ``gpu`` has for this M. Raises ValueError for a GPU without a family."""
    if gpu.family is None:
        raise ValueError("no fused kernels for this GPU: dequantize, and use the library's product")
    launch = next(launch for largest, launch in UNTUNED[gpu.family] if product.m <= largest)
    if product.step_multiple % launch.block_k:
        launch = replace(launch, block_k=32)  # blocks of 32 divide every row
    return replace(launch, splits=best_splits(product, launch, gpu.processors))


def tiles(product: Product, launch: Launch) -> int:
    """How many tiles the result is cut into."""
    return -(-product.m // launch.block_m) * -(-product.n // launch.block_n)


def best_splits(product: Product, launch: Launch, processors: int) -> int:
    """How many programs should share a tile's K so that a small grid fills the GPU [model]."""
    steps, grid = product.k // launch.block_k, tiles(product, launch)
    if grid >= 2 * processors:
        return 1

    def cost(splits: int) -> int:
        waves = -(-grid * splits // processors)
        return waves * (-(-steps // splits) + START_STEPS) + (SPLIT_STEPS * splits if splits > 1 else 0)

    return min(range(1, min(MAX_SPLITS, steps) + 1), key=cost)


def candidates(product: Product, family: str, processors: int, table: Table = UNTUNED) -> list[Launch]:
    """Launches worth measuring for ``product``: every tile of the family, K split as the model says and around it."""
    found: dict[Launch, None] = {}
    for i, (_, launch) in enumerate(table[family]):
        if i and launch.block_m >= 4 * product.m:
            continue  # mostly padding; the smallest tile is always tried
        if product.step_multiple % launch.block_k:
            launch = replace(launch, block_k=32)
        splits = best_splits(product, launch, processors)
        small = tiles(product, launch) < 2 * processors  # a grid that fills the GPU has no reason to split K
        for count in {1, splits // 2, splits, 2 * splits} if small else {1}:
            if 1 <= count <= product.k // launch.block_k:
                found[replace(launch, splits=count)] = None
    return list(found)


def measured(product: Product, gpu: Gpu) -> Measured | None:
    """What was measured on such a GPU for ``product``, or for the same weight and the nearest M within a factor of
    NEAREST; None where nothing was: mode "auto" decides by it."""
    near = _nearest(product, gpu)
    return near[1] if near else None


def _nearest(product: Product, gpu: Gpu) -> tuple[int, Measured] | None:
    by_m = _measured.get((gpu.name, replace(product, m=0)))
    if not by_m or not product.m:
        return None
    m = min(by_m, key=lambda m: abs(math.log(m / product.m)))
    return (m, by_m[m]) if 1 / NEAREST <= m / product.m <= NEAREST else None


def load_measured(path: Path, gpu: Gpu) -> int:
    """Reads what ``benchmarks/gpu/bench_kernels.py`` measured on a GPU of this name; returns for how many products.

    Raises ValueError for a file that is no such table; then nothing is taken from it.
    """
    try:
        table = dict(measured_entry(entry) for entry in json.loads(path.read_text())["products"])
    except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} is no table of kernel measurements: {error!r}") from error
    add_measured(gpu, table)
    return len(table)


def add_measured(gpu: Gpu, table: Mapping[Product, Measured]) -> None:
    """Lets GPUs of this name go by ``table`` from now on."""
    for product, values in table.items():
        _measured.setdefault((gpu.name, replace(product, m=0)), {})[product.m] = values
    Prepared.forget()


def save_measured(path: Path, gpu: str, products: Mapping[Product, Measured]) -> None:
    """Writes a table for :func:`load_measured`."""
    path.write_text(json.dumps({"gpu": gpu, "products": measured_entries(products)}, indent=1) + "\n")


def measured_entries(products: Mapping[Product, Measured]) -> list[dict[str, Any]]:
    """The products as a table has them."""
    return [{"product": asdict(product)} | asdict(values) for product, values in products.items()]


def measured_entry(entry: Mapping[str, Any]) -> tuple[Product, Measured]:
    """A product of a table. Raises KeyError, TypeError or ValueError for what cannot have been measured."""
    try:
        times = {name: float(value) for name, value in entry.items() if name not in ("product", "launch")}
    except OverflowError as error:
        raise ValueError("no product takes so long") from error
    product, known = Product(**entry["product"]), Measured(launch=Launch.checked(entry["launch"]), **times)
    sizes = product.m, product.n, product.k, product.taps
    if any(type(size) is not int or not 0 < size < 1 << 31 for size in sizes) or product.k % product.taps:
        raise ValueError(f"no product is of the sizes {sizes}")
    if not all(0 < time < math.inf for time in times.values()):
        raise ValueError(f"no product takes {times} microseconds")
    return product, known


def table_name(gpu: str) -> str:
    """File name of a GPU's table: "NVIDIA H200" -> "nvidia-h200.json"."""
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"
