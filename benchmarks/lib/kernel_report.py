"""What bench_kernels.py measured: the rates, the sums over a step, the project's targets; and as a table."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.lib.kernel_checks import INT8_LIMIT, launch_name
from benchmarks.lib.shapes import Layer
from gguf_sd_kernels.tuning.launch import Launch, Product

LARGE_M = 1024  # of the target for linears
FUSED_LIMIT = 2e-2  # relative error against the library's result


@dataclass(frozen=True)
class Row:
    """One product: microseconds a call in each mode, the fused call's rates, and errors against plain float16."""

    layer: Layer
    qtype: str
    launch: Launch
    fused: float
    dequantize: float
    resident: float
    fused_error: float
    int8: float | None = None  # Q4_0 and Q8_0
    int8_launch: Launch | None = None
    int8_error: float | None = None
    failed_launches: dict[str, str] = field(default_factory=dict)  # and why, such as OutOfResources

    @property
    def tflops(self) -> float:
        """Of the fused call, 10^12 floating-point operations a second."""
        return 2 * self.layer.gmac / self.fused / 1e-3

    @property
    def gbytes(self) -> float:
        """Weights, activations and results moved once by the fused call, 10^9 bytes a second."""
        bits = {"Q4_0": 4.5, "Q4_1": 5.0, "Q8_0": 8.5}[self.qtype]
        activations = self.layer.m * self.layer.k / self.layer.taps * self.layer.stride**2
        columns = self.layer.n / (2 if self.layer.op == "geglu" else 1)
        moved = self.layer.n * self.layer.k * bits / 8 + 2 * (activations + self.layer.m * columns)
        return moved / self.fused / 1e3

    @property
    def wrong(self) -> bool:
        """Whether a result is, or a launch failed otherwise than for want of registers or shared memory."""
        refused = all(reason.startswith("OutOfResources") for reason in self.failed_launches.values())
        return not (self.fused_error <= FUSED_LIMIT and (self.int8_error or 0.0) <= INT8_LIMIT and refused)

    @property
    def product(self) -> Product:
        return Product(self.layer.op, self.qtype, self.layer.m, self.layer.n, self.layer.k, self.layer.taps)

    def __str__(self) -> str:
        return f"{self.qtype} {self.layer}"


def step_totals(works: dict[str, Counter[Layer]], rows: list[Row]) -> dict[str, dict[str, float]]:
    """Milliseconds of all products of a step in each mode, by workload and type, where all were measured."""
    totals: dict[str, dict[str, float]] = {}
    by_product = {(row.layer, row.qtype): row for row in rows}
    for name, layers in works.items():
        for qtype in dict.fromkeys(row.qtype for row in rows):
            found = [(by_product.get((layer, qtype)), count) for layer, count in layers.items()]
            measured = [(row, count) for row, count in found if row]
            if len(measured) < len(found):
                continue
            sums = {
                mode: round(sum(getattr(row, mode) * count for row, count in measured) / 1e3, 3)
                for mode in ("fused", "dequantize", "resident")
            }
            best = sum(min(row.fused, row.dequantize) * count for row, count in measured) / 1e3
            totals[f"{name} {qtype}"] = sums | {"auto": round(best, 3)}
            in_int8 = [row.int8 * count for row, count in measured if row.int8]
            if len(in_int8) == len(measured):
                totals[f"{name} {qtype}"]["int8"] = round(sum(in_int8) / 1e3, 3)
    return totals


def targets(rows: list[Row]) -> list[dict[str, Any]]:
    """What the project set itself: how fast the fused kernels are to be, and which products are furthest from it."""
    linears = [row for row in rows if row.layer.op != "conv" and row.layer.m >= LARGE_M]
    convs = [row for row in rows if row.layer.taps == 9]
    return [
        target("fused at least as fast as dequantize + library, every product", 1.0, rows, "dequantize"),
        target(f"fused at 0.75 of float16 cuBLAS, linears and GEGLU with M >= {LARGE_M}", 0.75, linears, "resident"),
        target("fused at 0.7 of float16 cuDNN, 3x3 convolutions", 0.7, convs, "resident"),
    ]


def target(name: str, goal: float, rows: list[Row], baseline: str) -> dict[str, Any]:
    ratios = sorted((getattr(row, baseline) / row.fused, str(row)) for row in rows)
    missed = [f"{ratio:.2f} {row}" for ratio, row in ratios if ratio < goal]
    median = f"median {statistics.median(ratio for ratio, _ in ratios):.2f}, " if ratios else ""
    detail = f"{median}{len(missed)} of {len(rows)} missed" + (": " + "; ".join(missed[:5]) if missed else "")
    return {"name": name, "met": not missed if rows else None, "detail": detail}


def summary(rows: list[Row], failures: dict[str, str], totals: dict[str, dict[str, float]], jobs: int) -> list[str]:
    lines = [*table(totals).splitlines(), f"{len(rows)} of {jobs} products measured"]
    lines += [f"FAILED {name}: {reason}" for name, reason in failures.items()]
    for row in rows:
        if row.wrong:
            lines.append(f"WRONG {row}: fused {row.fused_error}, int8 {row.int8_error}, launches {row.failed_launches}")
    refused = Counter(launch for row in rows for launch in row.failed_launches)
    return lines + [f"failed for {count} products: {launch}" for launch, count in refused.items()]


def table_head() -> str:
    return f"{'':50}{'fused':>9}{'dequant':>9}{'16 bit':>9}{'int8':>9} us{'TFLOP/s':>9}{'GB/s':>7}  launch"


def line(row: Row) -> str:
    times = "".join(f"{t:9.1f}" for t in (row.fused, row.dequantize, row.resident, row.int8 or float("nan")))
    errors = f"  fused error {row.fused_error:.0e}"
    if row.int8_error is not None and row.int8_launch:
        errors += f", int8 {row.int8_error:.0e} with {launch_name(row.int8_launch)}"
    rates = f"   {row.tflops:9.1f}{row.gbytes:7.0f}"
    return f"{row.qtype:6}{row.layer!s:44}{times}{rates}  {launch_name(row.launch)}{errors}"


def table(totals: dict[str, dict[str, float]]) -> str:
    names = ("fused", "dequantize", "resident", "auto", "int8")
    lines = ["products of a step, ms" + " " * 8 + "".join(f"{name:>12}" for name in names)]
    for name, sums in totals.items():
        lines.append(f"{name:30}" + "".join(f"{sums[m]:12.3f}" if m in sums else " " * 12 for m in names))
    return "\n".join(lines)
