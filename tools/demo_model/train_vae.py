"""Second stage: the autoencoder learns to carry the world's pictures through 8x8 latents.

L1 + MSE + 1e-4 KL, nothing adversarial or perceptual: the pictures are plain and their edges few.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from gguf_sd.config import VAEConfig
from gguf_sd.demo.world import Sampler, render
from gguf_sd.models.vae import Autoencoder

VAE = VAEConfig(block_out_channels=(32, 32, 64, 96), layers_per_block=1, norm_groups=16, scaling_factor=1.0)


def reconstruct(vae: Autoencoder, pictures: Tensor, noise: float = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [B, 3, H, W] through sampled latents and back, the mean KL divergence of a latent, in nats, and the
    latents' means. To each picture's latents more noise is added, of a deviation up to ``noise``."""
    mean, log_variance = vae.quant_conv(vae.encoder(pictures)).chunk(2, 1)
    log_variance = log_variance.clamp(-30, 20)
    latents = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    if noise:
        latents = latents + noise * torch.rand(len(mean), 1, 1, 1) * torch.randn_like(mean)
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    return vae.decoder(vae.post_quant_conv(latents)), kl, mean


def train_vae(seed: int, steps: int, seconds: float, batch: int, log: Callable[[str], None]) -> Autoencoder:
    """Trains until ``steps`` or ``seconds``, whichever comes first, and returns the averaged autoencoder."""
    torch.manual_seed(seed)
    vae, mean = Autoencoder(VAE), Autoencoder(VAE).requires_grad_(False)
    parameters, means = list[Tensor](vae.parameters()), list[Tensor](mean.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0)
    sampler, rng = Sampler(seed + 1, named=1.0), random.Random(seed + 2)
    started, step, done = time.monotonic(), 0, 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1.5e-3 * min(1, step / 100) * min(1, (1 - done) / 0.7)
        pictures = render([scene for scene, _ in sampler.draw(batch)], rng)
        painted, kl, _ = reconstruct(vae, pictures)
        difference = painted - pictures
        mse = difference.square().mean()
        optimizer.zero_grad()
        (difference.abs().mean() + mse + 1e-4 * kl).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(means, [p.detach() for p in parameters], 1 - min(0.998, step / (step + 10)))
        step += 1
        elapsed = time.monotonic() - started
        done = max(step / steps, elapsed / seconds)
        if step % 100 == 0 or done >= 1:
            log(f"vae {step} {elapsed:.0f} s, PSNR {10 * torch.log10(4 / mse):.2f} dB, KL {kl:.2f}")
    return mean.eval()
