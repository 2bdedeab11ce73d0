"""The autoencoder: the first demo model's, taught the larger pictures and the textures, its latents brought to SDXL's
spread.

Everything that it starts from was trained from nothing by :mod:`tools.demo_model.train_vae`; it would take 25 minutes
of a core again. Left to itself it puts all six colours on one line, red and purple on black an eighth as far apart
as black and white, and hides shapes in differences that hardly show: latents off by a fifth of their deviation left
22 % of scenes readable, and a UNet mixed colours for thousands of steps. So three of the four channels are told to be
brightness and the two opponent colours, each 8x8 pixels' mean; the fourth is free, and carries what of edges it can.
And the weight of the KL divergence, which asks for latents that bear noise, is high first and falls slowly. After
4,200 steps, at the same 31 dB, 58 % bore that noise, and shapes were still becoming clearer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from gguf_sd.checkpoint.tensor_names import rename, vae_modules
from gguf_sd.demo import model_folder
from gguf_sd.demo.world_large import OFFSETS, Sampler, render
from gguf_sd.models.vae import Autoencoder
from tools.demo_model.train_vae import VAE, reconstruct

SCALING = 0.13025  # SDXL's: its latents' deviation is near 1 / SCALING
SPREADS = (1.3, 0.5, 0.5)  # deviations that brightness and opponent colours are divided by
KL = (5e-3, 2e-4)  # weight of the divergence at the beginning and at the end, beside the pictures' own losses
ASTRAY = 0.1  # that of the three channels
OPPONENT = ((1, 1, 1), (1, -1, 0), (0.5, 0.5, -1))  # rows on red, green and blue
CONFIG = replace(VAE, scaling_factor=SCALING)


def shipped() -> Autoencoder:
    """The first demo model's autoencoder."""
    vae, modules = Autoencoder(CONFIG), vae_modules(VAE)
    weights = load_file(model_folder() / "vae" / "diffusion_pytorch_model.safetensors")
    state = {rename(name, modules): value.float() for name, value in weights.items()}
    vae.load_state_dict({n: v.flatten(1) if v.shape[2:] == (1, 1) else v for n, v in state.items()})  # type: ignore
    return vae


def colours(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] -> the first three latent channels [B, 3, H/8, W/8]."""
    mixed = torch.einsum("oc,bchw->bohw", torch.tensor(OPPONENT), F.avg_pool2d(pictures, 8))
    return mixed / torch.tensor(SPREADS)[:, None, None]


def train_vae(seed: int, steps: int, batch: int, log: Callable[[str], None]) -> Autoencoder:
    """Trains on full pictures and returns the averaged autoencoder."""
    torch.manual_seed(seed)
    vae, mean = shipped(), shipped().requires_grad_(False)
    parameters, means = list[Tensor](vae.parameters()), list[Tensor](mean.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0)
    sampler = Sampler(seed + 1)
    recent: list[float] = []
    for step in range(steps):
        divergence = KL[0] * (KL[1] / KL[0]) ** (step / steps)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20, (1 - step / steps) / 0.8)
        offsets = torch.rand(batch, OFFSETS) * 2 - 1
        pictures = render(sampler.draw(batch), offsets, [sampler.view() for _ in range(batch)])
        painted, kl, found = reconstruct(vae, pictures)
        difference = painted - pictures
        mse = difference.square().mean()
        astray = (found[:, :3] - colours(pictures)).square().mean()
        optimizer.zero_grad()
        (difference.abs().mean() + mse + divergence * kl + ASTRAY * astray).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(means, [p.detach() for p in parameters], 1 - min(0.99, step / (step + 10)))
        recent.append(mse.item())
        if (step + 1) % 25 == 0:
            psnr = 10 * torch.log10(4 / torch.tensor(recent).mean())
            log(f"vae {step + 1}, PSNR {psnr:.2f} dB, KL {kl.item():.2f}, colours astray {astray.item():.4f}")
            recent.clear()
    return mean.eval()


@torch.no_grad()
def normalise(vae: Autoencoder, latents: Tensor) -> Tensor:
    """Changes what goes in and out of the latents so that, times SCALING, each channel of these, [N, 4, h, w], has
    mean 0, and all together deviation 1; nothing else changes. Returns the latents as they are then, unscaled."""
    mean = latents.mean((0, 2, 3))
    factor = (1 / (SCALING * latents.std((0, 2, 3)).square().mean().sqrt())).expand(len(mean))
    channels = len(mean)
    encode, decode = vae.quant_conv, vae.post_quant_conv
    encode.weight[:channels] *= factor[:, None]
    encode.bias[:channels] = (encode.bias[:channels] - mean) * factor
    encode.bias[channels:] += 2 * factor.log()
    decode.bias.add_(decode.weight @ mean)
    decode.weight.div_(factor[None])
    return (latents - mean[:, None, None]) * factor[:, None, None]
