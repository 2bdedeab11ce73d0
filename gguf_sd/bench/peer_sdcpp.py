"""stable-diffusion.cpp as a contestant: its program, once a picture, which loads the model every time.

It draws torch's noise with its CPU generator, and its discrete schedule is linspace, so that pictures can be compared.
"""

from __future__ import annotations

import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gguf_sd.bench.contestant import Result, Task
from gguf_sd.bench.peers import SDCPP
from gguf_sd.errors import GgufSdError

# What its log tells: seconds.
LOADED = re.compile(r"loading tensors completed, taking ([\d.]+)s")
SAMPLED = re.compile(r"sampling completed, taking ([\d.]+)s")
DECODED = re.compile(r"decode_first_stage completed, taking ([\d.]+)s")
PAINTED = re.compile(r"generate_image completed in ([\d.]+)s")
SECONDS_A_PICTURE = 3600


def paint(task: Task, folder: Path) -> Result:
    """A step is the time of sampling over the steps. Raises GgufSdError where the program fails or says nothing of
    its times."""
    result = Result(device="as built", dtype="as built", weights="as stored")
    pictures = [task.pictures[0], *task.pictures] if task.pictures else []
    for i, (number, prompt, seed, settings) in enumerate(pictures):  # the first, to warm up
        started = time.perf_counter()
        log = _run(command(task, prompt, seed, settings, folder / f"{number:05}.png"))
        whole = time.perf_counter() - started
        sampled, decoded, painted = (_seconds(log, pattern) for pattern in (SAMPLED, DECODED, PAINTED))
        step = sampled / settings["steps"]
        if i == 0:
            result.load_s = _seconds(log, LOADED)
            result.first_step_s = whole - painted + step
            continue
        result.step_s.append(step)
        result.vae_s.append(decoded)
        result.picture_s.append(painted)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    result.peak_rss = peak if sys.platform == "darwin" else peak * 1024
    return result


def command(task: Task, prompt: str, seed: int, settings: dict[str, Any], output: Path) -> list[str]:
    """Of one picture. Its guidance of 1 is none."""
    words = [task.sdcpp, "-m", task.model, "-p", prompt, "-o", str(output), "-s", str(seed), "--rng", "cpu"]
    words += ["--steps", str(settings["steps"]), "--cfg-scale", str(max(1.0, settings["guidance"]))]
    words += ["--sampling-method", SDCPP[settings["sampler"]], "--scheduler", "discrete", "-v"]
    return [*words, "-W", str(settings["width"]), "-H", str(settings["height"])]


def _run(words: list[str]) -> str:
    done = subprocess.run(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", timeout=SECONDS_A_PICTURE
    )
    if done.returncode or not Path(words[words.index("-o") + 1]).is_file():
        lines = done.stdout.strip().splitlines() or ["it said nothing"]
        told = [line for line in lines if "[ERROR]" in line] or lines
        raise GgufSdError(f"stable-diffusion.cpp ended with {done.returncode}: {told[-1]}")
    return done.stdout


def _seconds(log: str, pattern: re.Pattern[str]) -> float:
    if (found := pattern.search(log)) is None:
        raise GgufSdError(f"stable-diffusion.cpp's log has no line like {pattern.pattern!r}; is this its sd-cli?")
    return float(found[1])
