"""The tables of types in README.md and docs/quality.md, in Markdown, from a report of `gguf-sd bench`.

python -m benchmarks.lib.types_table benchmarks/results/demo-quality/report.json            # README's
python -m benchmarks.lib.types_table benchmarks/results/demo-quality/report.json --full     # docs/quality.md's
python -m benchmarks.lib.types_table benchmarks/results/turbo-quality/report.json --steps   # README's of steps
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CALIBRATED = "+calibrated"
Row = dict[str, Any]


def short_table(report: dict[str, Any]) -> str:
    """A line a type: size, and PSNR as rounded to the nearest and calibrated."""
    rows = rows_by_type(report)
    lines = ["| | UNet | PSNR against F16 | calibrated |", "|---|---|---|---|"]
    kinds = {kind.removesuffix(CALIBRATED) for kind in rows} - {"f16"}
    types = sorted(kinds, key=lambda kind: (_size(rows, kind), kind))
    for kind in types:
        plain, calibrated = rows.get(kind), rows.get(kind + CALIBRATED)
        size = _size(rows, kind) / 1e6
        lines.append(f"| {_as_typed(kind)} | {size:.2f} MB | {_decibels(plain)} | {_decibels(calibrated)} |")
    return "\n".join(lines)


def full_table(report: dict[str, Any]) -> str:
    """A line a contestant, with what the report tells of its quality."""
    lines = [
        "| type | UNet, MB | PSNR, dB, median (mean) | SSIM | MS-SSIM | UNet error | at t = 150-350 | correct |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for kind, row in rows_by_type(report).items():
        values, errors = row["values"], row["errors"]
        cells = [kind, f"{row['unet_bytes'] / 1e6:.2f}"]
        if "psnr" in values:
            cells.append(f"{values['psnr']:.1f} ({values['psnr_mean']:.1f})")
            cells += [f"{values['ssim']:.4f}", f"{values['ms_ssim']:.4f}"]
            cells += [f"{errors['weighted']:.4f}", f"{errors['150-350']:.4f}"]
        else:
            cells += ["reference", "", "", "", ""]
        lines.append("| " + " | ".join([*cells, f"{values['correct']:.1%}"]) + " |")
    return "\n".join(lines)


def steps_table(report: dict[str, Any]) -> str:
    """A line a type, a column a number of steps: PSNR, and the share that is right."""
    heads = [settings.partition(",")[0] for settings in report["rows"][0]["by_settings"]]
    lines = [f"| | UNet | {' | '.join(heads)} |", f"|{'---|' * (len(heads) + 2)}"]
    for kind, row in rows_by_type(report).items():
        cells = [_as_typed(kind), f"{row['unet_bytes'] / 1e6:.2f} MB"]
        for part in row["by_settings"].values():
            psnr = f"{part['psnr']:.1f} dB, " if "psnr" in part else ""
            cells.append(f"{psnr}{part['correct']:.1%} right")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rows_by_type(report: dict[str, Any]) -> dict[str, Row]:
    """The rows by what follows the model's name in theirs."""
    start = report["rows"][0]["name"].removesuffix("f16")
    return {row["name"].removeprefix(start): row for row in report["rows"]}


def _size(rows: dict[str, Row], kind: str) -> int:
    row = rows.get(kind) or rows[kind + CALIBRATED]
    return int(row["unet_bytes"])


def _as_typed(kind: str) -> str:
    name, _, bpw = kind.partition("@")
    return f"`{name} --bpw {float(bpw):g}`" if bpw else f"`{name}`"


def _decibels(row: Row | None) -> str:
    return "" if row is None else f"{row['values']['psnr']:.1f} dB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--full", dest="table", action="store_const", const=full_table, default=short_table)
    parser.add_argument("--steps", dest="table", action="store_const", const=steps_table)
    args = parser.parse_args()
    print(args.table(json.loads(args.report.read_text())))


if __name__ == "__main__":
    main()
