"""README's table of CPU steps, in Markdown, from the results that :mod:`benchmarks.cpu.bench_step` wrote.

python -m benchmarks.cpu.step_table benchmarks/results/cpu-step-*.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

ROWS = {
    "diffusers": "diffusers, bfloat16, channels-last",
    "diffusers float32": "diffusers, float32, channels-last",
    "openvino bf16": "OpenVINO, bfloat16",
    "openvino int8": "OpenVINO, int8 (nncf W8A8)",
    "quantized": "gguf-sd q4_0, `--weights quantized`",
    "resident": "gguf-sd q4_0, `--weights resident`",
    "int8": "gguf-sd q4_0, `--kernels int8`",
}


DECODES = {
    "diffusers": "VAE decode: diffusers, bfloat16",
    "gguf-sd": "gguf-sd, bfloat16",
    "gguf-sd int8": "gguf-sd, 8 bits",
}


def table(results: list[dict[str, Any]]) -> str:
    """A column a file: time against diffusers' in the same run, and the peak memory of ``generate``."""
    lines = ["| | " + " | ".join(heading(result) for result in results) + " |", "|---" * (len(results) + 1) + "|"]
    rows = {words: [cell(result, name) for result in results] for name, words in ROWS.items()}
    rows |= {words: [decode_cell(result, name) for result in results] for name, words in DECODES.items()}
    lines += [f"| {words} | " + " | ".join(cells) + " |" for words, cells in rows.items() if any(cells)]
    return "\n".join(lines)


def heading(result: dict[str, Any]) -> str:
    what = "one step, no guidance" if "sdxl" in result["model"] else "a guided step"
    machine = " ".join(result["machine"].partition(",")[0].replace("(R)", "").replace("Processor", "").split())
    machine += " with AMX" if "amx_bf16" in result.get("features", ()) else ""
    return f"{result['model'].removesuffix('.gguf')}, {what} ({machine}, {result['date']})"


def cell(result: dict[str, Any], name: str) -> str:
    """Empty where it did not run."""
    ratio = result["step_ratio_to_diffusers"].get(name)
    if ratio is None:
        return ""
    peak = result["generate_peak_rss_mb"].get(name)
    seconds = f" ({result['step_seconds'][name]:.2f} s)" if name == "diffusers" else ""
    return f"{ratio:.2f}{seconds}" + (f", {peak / 1000:.2f} GB" if peak else "")


def decode_cell(result: dict[str, Any], name: str) -> str:
    ratio = result["vae_ratio_to_diffusers"].get(name)
    if ratio is None:
        return ""
    return f"{ratio:.2f}" + (f" ({result['vae_decode_seconds'][name]:.2f} s)" if name == "diffusers" else "")


if __name__ == "__main__":
    print(table([json.loads(Path(name).read_text()) for name in sys.argv[1:]]))
