"""What the README shows of measured memory."""

from __future__ import annotations

from typing import Any

from benchmarks.cpu.memory_table import tables


def row(planned: int, measured: int, budget: int | None = None) -> dict[str, Any]:
    facts: dict[str, Any] = {"planned_mb": planned, "measured_mb": measured, "error": round(planned / measured - 1, 3)}
    return facts | ({"over_budget": round(measured / budget - 1, 3)} if budget else {})


def test_rows_find_their_places_and_misses_are_told() -> None:
    results = {
        "sd15 512x512 batch 1 1GB": row(900, 940, 1000),
        "sd15 512x512 batch 1 0.8GB": row(790, 880, 800),
        "sd15 512x512 batch 1 auto": row(2000, 1990),
        "sd15 1024x1024 batch 4 auto": row(6000, 5000),
        "sdxl 512x512 batch 1 0.8GB": {"refused": "needs at least 0.9 GiB"},
        "sdxl 512x512 batch 1 1GB 4 steps --medvram": row(1, 1),
    }
    assert tables(results).splitlines() == [
        "| `--max-memory` | 0.8 GB | 1 GB |",
        "|---|---|---|",
        "| sd15 | 0.88 GB | 0.94 GB |",
        "| sdxl | refused |  |",
        "",
        "| planned, measured | sd15 | sdxl |",
        "|---|---|---|",
        "| 512x512, 1 at once | 2.00, 1.99 GB (+0.5%) |  |",
        "| 1024x1024, 4 at once | 6.00, 5.00 GB (+20.0%) |  |",
        "",
        "- sd15 512x512 batch 1 0.8GB: +10% of the budget",
        "- sd15 512x512 batch 1 0.8GB: planned -10% of what was measured",
        "- sd15 1024x1024 batch 4 auto: planned +20% of what was measured",
    ]
