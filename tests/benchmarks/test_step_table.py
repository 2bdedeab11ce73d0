"""README.md says of steps on a CPU what the committed results say."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.cpu.step_table import table

ROOT = Path(__file__).parents[2]


def test_readme_has_the_results_table() -> None:
    results = [json.loads(path.read_text()) for path in sorted((ROOT / "benchmarks/results").glob("cpu-step-*.json"))]
    assert len(results) >= 2
    assert table(results) in (ROOT / "README.md").read_text()


def test_what_did_not_run_leaves_no_row() -> None:
    result = {
        "model": "sd15-q4_0.gguf",
        "date": "2026-01-02",
        "machine": "Intel(R) Xeon(R) Processor, 2 threads",
        "step_seconds": {"diffusers": 2.0, "int8": 1.0},
        "step_ratio_to_diffusers": {"diffusers": 1.0, "int8": 0.5},
        "generate_peak_rss_mb": {"int8": 1234},
        "vae_decode_seconds": {"diffusers": 3.0},
        "vae_ratio_to_diffusers": {"diffusers": 1.0},
    }
    assert "(Intel Xeon with AMX, 2026" in table([result | {"features": ["avx2", "amx_bf16"]}])
    heading, _, *rows = table([result]).splitlines()
    assert heading == "| | sd15-q4_0, a guided step (Intel Xeon, 2026-01-02) |"
    assert rows == [
        "| diffusers, bfloat16, channels-last | 1.00 (2.00 s) |",
        "| gguf-sd q4_0, `--kernels int8` | 0.50, 1.23 GB |",
        "| VAE decode: diffusers, bfloat16 | 1.00 (3.00 s) |",
    ]
