"""stable-diffusion.cpp beside us: the same file, the same picture.

Needs the wheel `cyllama` (`pip install cyllama`). With its CPU generator it draws the noise that torch draws.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

PROMPT, NEGATIVE = "a lighthouse on a cliff at dusk", "blurry"


@dataclass(frozen=True)
class Settings:
    """Of a picture; sampled by Euler's method over the schedule of stable-diffusion.cpp, which is linspace."""

    steps: int = 4
    guidance: float = 7.0
    side: int = 128
    seed: int = 7


def theirs(model: Path, settings: Settings, threads: int, parts: dict[str, str] | None = None) -> np.ndarray:
    """uint8 [side, side, 3], painted by stable-diffusion.cpp; ``parts``: paths of a UNet's other parts, by the names
    of its parameters."""
    from cyllama import sd

    given = {"diffusion_model_path": str(model), **parts} if parts else {"model_path": str(model)}
    params = sd.SDContextParams(**given, n_threads=threads, vae_decode_only=True)
    params.rng_type = params.sampler_rng_type = sd.RngType.CPU
    image = sd.SDContext(params).generate(
        PROMPT,
        negative_prompt=NEGATIVE,
        width=settings.side,
        height=settings.side,
        seed=settings.seed,
        sample_steps=settings.steps,
        cfg_scale=settings.guidance,
        sample_method=sd.SampleMethod.EULER,
        scheduler=sd.Scheduler.DISCRETE,
    )[0]
    return np.array(image.to_numpy())


def ours(model: Path, settings: Settings, tokenizer: Path, parts: dict[str, str] | None = None) -> np.ndarray:
    """The same from us, in float32."""
    from gguf_sd.pipeline import Pipeline

    pipeline = Pipeline.load(model, "cpu", "float32", "quantized", tokenizer, **(parts or {}))
    picture = pipeline(
        PROMPT,
        negative_prompt=NEGATIVE,
        width=settings.side,
        height=settings.side,
        seed=settings.seed,
        steps=settings.steps,
        guidance=settings.guidance,
        sampler="euler",
        schedule="linspace",
        safety="off",
    )[0]
    return np.array(picture)


def convert(source: Path, target: Path, kind: str) -> None:
    """stable-diffusion.cpp's own conversion, of all parts."""
    from cyllama import sd

    # A rule for no tensor: without any the wheel hands over a null pointer, which ends the process.
    rule = "no such tensor=f16"
    if not sd.convert_model(str(source), str(target), getattr(sd.SDType, kind.upper()), "", rule):
        raise SystemExit(f"stable-diffusion.cpp did not convert {source}")


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Decibels between two uint8 pictures."""
    error = float(np.mean((a.astype(np.float64) - b.astype(np.float64)) ** 2))
    return 10 * float(np.log10(255**2 / max(error, 1e-10)))
