"""README's tables of memory on a CPU, in Markdown, from the results that :mod:`benchmarks.cpu.bench_memory` wrote.

python -m benchmarks.cpu.memory_table
"""

from __future__ import annotations

import json
import re
from typing import Any

from benchmarks.cpu.bench_memory import ALLOWED_ERROR, ALLOWED_OVER, RESULTS

KEY = re.compile(r"(\w+) (\d+)x\d+ batch (\d+) (\S+)(.*)")
AMOUNT = re.compile(r"([\d.]+)GB")
Row = dict[str, Any]


def tables(results: dict[str, Row]) -> str:
    """Budgets and what was taken of them; sizes and batches with what was planned and taken; then the misses."""
    found = {key: match for key in results if (match := KEY.fullmatch(key)) and not match[5]}
    budgets = sorted({float(m[1]) for key in found.values() if (m := AMOUNT.fullmatch(key[4]))})
    budgeted = ["| `--max-memory` | " + " | ".join(f"{budget:g} GB" for budget in budgets) + " |"]
    models = list(dict.fromkeys(match[1] for match in found.values()))
    budgeted += ["|---" * (len(budgets) + 1) + "|"]
    for model in models:
        rows = [results.get(f"{model} 512x512 batch 1 {budget:g}GB") for budget in budgets]
        budgeted.append(f"| {model} | " + " | ".join(map(taken, rows)) + " |")
    sized = ["| planned, measured | " + " | ".join(models) + " |", "|---" * (len(models) + 1) + "|"]
    for size, batch in sorted({(int(m[2]), int(m[3])) for m in found.values() if m[4] == "auto"}):
        rows = [results.get(f"{model} {size}x{size} batch {batch} auto") for model in models]
        sized.append(f"| {size}x{size}, {batch} at once | " + " | ".join(map(planned, rows)) + " |")
    lines = ["\n".join(budgeted), "\n".join(sized), misses(results)]
    return "\n\n".join(line for line in lines if line)


def taken(row: Row | None) -> str:
    if row is None:
        return ""
    return "refused" if "refused" in row else f"{row['measured_mb'] / 1000:.2f} GB"


def planned(row: Row | None) -> str:
    """Empty where it was not measured."""
    if row is None or "refused" in row:
        return taken(row)
    return f"{row['planned_mb'] / 1000:.2f}, {row['measured_mb'] / 1000:.2f} GB ({row['error']:+.1%})"


def misses(results: dict[str, Row]) -> str:
    """A line for each promise that was not kept."""
    lines = []
    for key, row in results.items():
        if row.get("over_budget", -1) > ALLOWED_OVER:
            lines.append(f"- {key}: {row['over_budget']:+.0%} of the budget")
        if abs(row.get("error", 0)) > ALLOWED_ERROR:
            lines.append(f"- {key}: planned {row['error']:+.0%} of what was measured")
    return "\n".join(lines)


if __name__ == "__main__":
    print(tables(json.loads(RESULTS.read_text())["results"]))
