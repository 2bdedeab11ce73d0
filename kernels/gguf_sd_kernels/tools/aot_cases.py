"""What is compiled ahead of time: every kernel, with every launch, weight type and dtype it can meet."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from itertools import product
from typing import Any

from gguf_sd_kernels.devices import architecture_family
from gguf_sd_kernels.repack import PACKED_TYPES
from gguf_sd_kernels.row_parts import MAX_PARTS
from gguf_sd_kernels.tuning.launch import GROUP_M, UNTUNED, Launch
from gguf_sd_kernels.tuning.launch_int8 import INT8_TYPES, UNTUNED_INT8


@dataclass(frozen=True)
class Case:
    """One compilation: a kernel ("module:function"), the types of its arguments, and its constants."""

    name: str
    function: str
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int
    stages: int
    multiples_of_16: frozenset[str] = frozenset()
    matrix: str = ""  # "float" or "int8": the kind of matrix instruction it must use
    matrix_rows: int = 0  # rows of its first operand

    def kernel(self) -> Any:
        """The @triton.jit function."""
        module, _, name = self.function.partition(":")
        return getattr(import_module(f"gguf_sd_kernels.{module}"), name)


def cases(target: str) -> Iterator[Case]:
    """Every case for ``target``, as in aot.SHARED_KIB. Where Triton has no matrix instructions, products are the
    library's."""
    family = architecture_family(target)
    if family:
        yield from linear_cases(family)
        yield from conv_cases(family)
        yield from int8_cases(family)
    dtypes = ("fp16", "bf16", "fp32") if family else ("fp16", "fp32")  # older GPUs emulate bfloat16
    yield from dequantize_cases(dtypes)
    yield from norm_cases(dtypes)


def linear_cases(family: str) -> Iterator[Case]:
    for (_, launch), qtype, dtype in product(UNTUNED[family], PACKED_TYPES, ("fp16", "bf16")):
        for geglu, split, normed in product((False, True), repeat=3):
            yield linear_case(launch, qtype, dtype, geglu=geglu, split=split, normed=normed)


def linear_case(
    launch: Launch, qtype: str, dtype: str, *, geglu: bool = False, split: bool = False, normed: bool = False
) -> Case:
    """Without ``normed`` it leaves the statistics of its rows, unless it has GEGLU; with it, it takes such in."""
    constants, name = _product_constants(launch, qtype, dtype, split)
    types = dict.fromkeys(("x", "bias", "residual", "out", "gain"), f"*{dtype}") | _WEIGHT_TYPES
    types |= dict.fromkeys(("M", "N", "K", "steps", "part_width"), "i32") | {"eps": "fp32"}
    types |= dict.fromkeys(("sums", "parts", "out_parts"), "*fp32")
    absent = ("residual", "out_parts") if geglu or normed else ()
    if normed:
        types["bias"] = "*fp32"
    else:
        absent = (*absent, "gain", "sums", "parts")
    return Case(
        name=f"linear {name}{' geglu' if geglu else ''}{' normed' if normed else ''}",
        function="triton.linear:linear_kernel",
        types=types,
        constants=constants | {"GEGLU": geglu, "PARTS": MAX_PARTS} | dict.fromkeys(absent),
        warps=launch.warps,
        stages=launch.stages,
        multiples_of_16=frozenset({"N", "K"}),
        matrix="float",
        matrix_rows=launch.block_n if launch.swap else launch.block_m,
    )


def conv_cases(family: str) -> Iterator[Case]:
    for (_, launch), qtype, dtype in product(UNTUNED[family], PACKED_TYPES, ("fp16", "bf16")):
        for side, split in product((1, 3), (False, True)):
            yield conv_case(launch, qtype, dtype, side=side, split=split)
        for split in (False, True):
            yield conv_case(launch, qtype, dtype, split=split, enlarge=True)


def conv_case(
    launch: Launch, qtype: str, dtype: str, *, side: int = 3, split: bool = False, enlarge: bool = False
) -> Case:
    """A convolution of side x side taps; with ``enlarge`` as it follows an enlargement."""
    constants, name = _product_constants(launch, qtype, dtype, split)
    types = dict.fromkeys(("x", "bias", "residual", "emb", "out"), f"*{dtype}") | _WEIGHT_TYPES
    absent = dict.fromkeys(("residual", "emb")) if enlarge else {}
    sizes = ("M", "N", "K", "H", "W", "IC", "OH", "OW", "stride", "padding", "steps", "emb_stride")
    return Case(
        name=f"conv {side}x{side} {name}{' enlarge' if enlarge else ''}",
        function="triton.conv:conv_kernel",
        types=types | dict.fromkeys(sizes, "i32"),
        constants=constants | {"TAPS_W": side, "ENLARGE": enlarge} | absent,
        warps=launch.warps,
        stages=launch.stages,
        multiples_of_16=frozenset({"N", "K", "IC", "emb_stride"}),
        matrix="float",
        matrix_rows=launch.block_n if launch.swap else launch.block_m,
    )


def dequantize_cases(dtypes: Sequence[str]) -> Iterator[Case]:
    for qtype, dtype in product(PACKED_TYPES, dtypes):
        constants: dict[str, Any] = {"QTYPE": qtype} | ({} if qtype == "Q4_1" else {"mins": None})
        types = _WEIGHT_TYPES | {"out": f"*{dtype}", "n_blocks": "i32", "n_values": "i32", "channels": "i32"}
        name = f"{qtype} {dtype}"
        for taps, kernel, width, warps in (
            (1, "dequantize_kernel", {"BLOCKS": 64}, 4),
            (9, "dequantize_taps_kernel", {"TAPS": 9, "VALUES": 1024}, 4),
        ):
            yield Case(
                name=f"dequantize {name} taps {taps}",
                function=f"triton.dequantize:{kernel}",
                types=types,
                constants=constants | width,
                warps=warps,
                stages=1,
                multiples_of_16=frozenset({"n_values", "channels"}),
            )


def norm_cases(dtypes: Sequence[str]) -> Iterator[Case]:
    """Group norm of the narrowest and the widest groups that SD 1.5 and SDXL have, and layer norm."""
    from gguf_sd_kernels.triton.norm import MAX_TILES, TILE_VALUES, WARPS

    counts = dict.fromkeys(("rows", "rows_a_tile", "G", "C"), "i32") | {"eps": "fp32"}
    pointers = {"means": "*fp32", "deviations": "*fp32"}
    for dtype, width in product(dtypes, (16, 128)):
        types = counts | pointers | dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}")
        tile: dict[str, Any] = {"ROWS": max(1, TILE_VALUES // (32 * width)), "GROUPS": 32, "WIDTH": width}
        name = f"{dtype} width {width}"
        yield Case(f"group stats {name}", "triton.norm:group_stats_kernel", types, tile, WARPS, 1)
        apply = tile | {"SILU": True, "TILES": MAX_TILES}
        yield Case(f"group apply {name}", "triton.norm:group_apply_kernel", types, apply, WARPS, 1)
    for dtype, width in product(dtypes, (512, 2048)):
        types = {"C": "i32", "eps": "fp32"} | dict.fromkeys(("x", "weight", "bias", "out"), f"*{dtype}")
        constants = {"WIDTH": width}
        name = f"layer norm {dtype} width {width}"
        yield Case(name, "triton.norm:layer_norm_kernel", types, constants, width // 256, 1)


def int8_cases(family: str) -> Iterator[Case]:
    from gguf_sd_kernels.triton.quantize import QUANTIZE_BLOCKS, QUANTIZE_WARPS

    launches = [launch for _, launch in UNTUNED_INT8[family]]
    for launch, qtype, dtype in product(launches, INT8_TYPES, ("fp16", "bf16")):
        for geglu, split in product((False, True), repeat=2):
            yield int8_case(linear_case(launch, qtype, dtype, geglu=geglu, split=split))
        for side, split in product((1, 3), (False, True)):
            yield int8_case(conv_case(launch, qtype, dtype, side=side, split=split))
    for dtype in ("fp16", "bf16"):
        types = {"x": f"*{dtype}", "codes": "*i8", "scales": "*fp32", "sums": "*i32", "n_blocks": "i32"}
        blocks = {"BLOCKS": QUANTIZE_BLOCKS}
        yield Case(f"int8 quantize {dtype}", "triton.quantize:quantize_kernel", types, blocks, QUANTIZE_WARPS, 1)


_INT8_KERNELS = {
    "triton.linear:linear_kernel": "triton.int8:linear_int8_kernel",
    "triton.conv:conv_kernel": "triton.int8:conv_int8_kernel",
}


def int8_case(case: Case) -> Case:
    """The case of the product in 8 bits that a fused one corresponds to."""
    unused = ("SWAP", "PTX", "WIDEN", "BLOCK_K", "mins", "PARTS", "ENLARGE", "gain", "sums", "parts", "out_parts")
    return replace(
        case,
        name=f"int8 {case.name}",
        function=_INT8_KERNELS[case.function],
        types=dict(case.types) | {"codes": "*i8", "x_scales": "*fp32", "sums": "*i32"},
        constants={name: value for name, value in case.constants.items() if name not in unused},
        matrix="int8",
    )


_WEIGHT_TYPES = {"quants": "*u8", "scales": "*fp16", "mins": "*fp16", "partials": "*fp32", "counters": "*i32"}


def _product_constants(launch: Launch, qtype: str, dtype: str, split: bool) -> tuple[dict[str, Any], str]:
    """Constants that linear and conv share, and the launch in words."""
    constants: dict[str, Any] = {
        "QTYPE": qtype,
        "SPLIT": split,
        "SWAP": launch.swap,
        "PTX": launch.ptx,
        "WIDEN": False,
        "BLOCK_M": launch.block_m,
        "BLOCK_N": launch.block_n,
        "BLOCK_K": launch.block_k,
        "GROUP_M": GROUP_M,
    }
    if qtype != "Q4_1":
        constants["mins"] = None
    if not split:
        constants |= {"partials": None, "counters": None}
    name = f"{qtype} {dtype} {launch.block_m}x{launch.block_n}x{launch.block_k} {launch.warps}w {launch.stages}s"
    flags = [flag for flag, on in (("swap", launch.swap), ("ptx", launch.ptx), ("split", split)) if on]
    return constants, " ".join([name, *flags])
