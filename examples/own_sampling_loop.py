"""The loop inside the pipeline, written out: encode, denoise step by step with a sampler of your own, decode.

    python examples/own_sampling_loop.py [OUTPUT.png]

The sampler is Euler's method on the probability-flow ODE (Karras et al. 2022, arXiv:2206.00364): latents
x = x0 + sigma * eps, and dx / dsigma = (x - denoised) / sigma.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image

import gguf_sd
from gguf_sd.demo import model_folder
from gguf_sd.sampling import NoiseSource, make_schedule
from gguf_sd.sampling.guidance import Predictor


@torch.inference_mode()
def main(output: str = "own_sampling_loop.png") -> Path:
    model = Path(output).with_name("demo-q8_0.gguf")
    if not model.exists():
        gguf_sd.convert(model_folder(), model, type="q8_0")
    pipeline = gguf_sd.Pipeline.load(model, dtype="float32")
    job = pipeline.prepare(gguf_sd.Request("a cyan ring below a red triangle", seed=2))

    # The UNet with its weights still in blocks; guided, it is a function of latents and timestep.
    unet = pipeline.model.load_unet(pipeline.dtype)
    predict = Predictor(unet, pipeline.encode(job), job.guidance, batched=True, extra=None)

    # 20 noise levels, evenly spaced in the timesteps of training, and the noise to start from.
    schedule = make_schedule(pipeline.model.config.scheduler, "euler", "linspace", steps=20)
    x = NoiseSource([job.seed])((1, 4, job.height // 8, job.width // 8)) * schedule.init_noise_sigma
    for i, timestep in enumerate(schedule.timesteps):
        sigma, sigma_next = schedule.sigmas[i], schedule.sigmas[i + 1]
        eps = predict(x / (sigma**2 + 1) ** 0.5, timestep)  # the UNet wants latents of unit variance
        denoised = x - sigma * eps
        x = x + (x - denoised) / sigma * (sigma_next - sigma)

    Image.fromarray(pipeline.decode(x)[0].numpy()).save(output)
    return Path(output)


if __name__ == "__main__":
    print(main(*sys.argv[1:]))
