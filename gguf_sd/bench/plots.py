"""Plots of a comparison, as PNG bytes, by matplotlib."""

from __future__ import annotations

import io
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from gguf_sd.bench.runner import Row
from gguf_sd.errors import GgufSdError


def quality_against_size(rows: Sequence[Row]) -> bytes:
    """Median PSNR over the bytes of the UNet."""
    figure, axes = _figure("UNet, MB", "PSNR against the first, dB (median)")
    for i, (row, name) in enumerate(zip(rows, short_names(rows), strict=True)):
        if (psnr := row.values.get("psnr")) is not None and psnr != float("inf"):
            axes.errorbar(row.unet_bytes / 1e6, psnr, row.spread.get("psnr", 0.0), capsize=3, label=name, **_style(i))
    _legend(figure)
    return _png(figure)


def time_against_memory(rows: Sequence[Row]) -> bytes:
    """Seconds a step over the peak of memory: of the device where it has its own, else of the process."""
    figure, axes = _figure("peak memory, GB", "seconds a step (median)")
    for i, (row, name) in enumerate(zip(rows, short_names(rows), strict=True)):
        memory = (row.values.get("peak_vram") or row.values.get("peak_rss") or 0) / 1e9
        seconds = row.values.get("step_s") or 0.0
        axes.errorbar(memory, seconds, row.spread.get("step_s", 0.0), capsize=3, label=name, **_style(i))
    axes.set_ylim(bottom=0)
    _legend(figure)
    return _png(figure)


def error_by_timestep(rows: Sequence[Row]) -> bytes:
    """Relative error of the UNet's output in each range of timesteps."""
    figure, axes = _figure("timesteps", "relative error of the UNet's output")
    for i, (row, name) in enumerate(zip(rows, short_names(rows), strict=True)):
        bins = [name for name in row.errors if "-" in name]
        if bins:
            axes.plot(bins, [row.errors[b] for b in bins], label=name, **_style(i) | {"linestyle": "-"})
    axes.set_yscale("log")
    _legend(figure)
    return _png(figure)


def sensitivities(names: Sequence[str], errors: Sequence[float], qtype: str) -> bytes:
    """Bars, the largest on top."""
    figure, axes = _figure(f"share of the squared error of the UNet's output, all layers in {qtype}", "")
    figure.set_size_inches(9, 1 + 0.22 * len(names))
    total = sum(errors) or 1.0
    axes.barh(list(reversed(names)), [error / total for error in reversed(errors)])
    axes.tick_params(axis="y", labelsize=7)
    axes.margins(y=0.01)
    return _png(figure)


def short_names(rows: Sequence[Row]) -> list[str]:
    """The contestants' names without the words, as far as a dash, that all begin with."""
    names = [row.name for row in rows]
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(min(names), max(names), strict=False))
    words, dash, _ = "".join(a for a, _ in alike).rpartition("-")
    return [name.removeprefix(words + dash) for name in names] if len(names) > 1 else names


def _style(i: int) -> dict[str, Any]:
    """Of the i-th contestant, in every plot."""
    return {"color": f"C{i % 10}", "marker": "osD^v"[i // 10 % 5], "linestyle": ""}


def _legend(figure: Any) -> None:
    """Beside the plot, where it hides nothing."""
    figure.legend(loc="outside right upper", fontsize=9)


def _figure(x: str, y: str) -> tuple[Any, Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise GgufSdError('reports need matplotlib: pip install "gguf-sd[bench]"') from error
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()
