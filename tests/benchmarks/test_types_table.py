"""README.md and docs/quality.md say of the types what the committed report says; calibration gains what is claimed."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.lib.types_table import full_table, rows_by_type, short_table, steps_table

ROOT = Path(__file__).parents[2]
REPORT = json.loads((ROOT / "benchmarks/results/demo-quality/report.json").read_text())


def test_readme_has_the_reports_table() -> None:
    assert short_table(REPORT) in (ROOT / "README.md").read_text()


def test_readme_has_the_turbo_models_table() -> None:
    report = json.loads((ROOT / "benchmarks/results/turbo-quality/report.json").read_text())
    assert steps_table(report) in (ROOT / "README.md").read_text()


def test_quality_has_the_reports_table() -> None:
    assert full_table(REPORT) in (ROOT / "docs/quality.md").read_text()


def test_calibration_and_mixed_types_gain_what_they_should() -> None:
    rows = rows_by_type(REPORT)
    psnr = {kind: row["values"].get("psnr", 0.0) for kind, row in rows.items()}
    at_250 = {kind: row["errors"].get("150-350", 0.0) for kind, row in rows.items()}
    assert psnr["q4_0+calibrated"] >= psnr["q4_0"] + 4.5
    assert psnr["q4_1+calibrated"] >= psnr["q4_1"] + 4
    assert at_250["q4_0+calibrated"] <= at_250["q4_0"] / 2
    assert psnr["mixed@5.0"] >= psnr["q4_1"] + 2
    assert rows["mixed@5.0"]["unet_bytes"] <= rows["q4_1"]["unet_bytes"] * 1.001
    assert psnr["mixed@6.25+calibrated"] >= psnr["q8_0"] - 0.5
    assert rows["mixed@6.25+calibrated"]["unet_bytes"] <= 0.7505 * rows["q8_0"]["unet_bytes"]
