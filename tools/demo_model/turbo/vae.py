"""The autoencoder: the first demo model's, taught the larger pictures and the textures, its latents brought to SDXL's
spread.

Everything that it starts from was trained from nothing by :mod:`tools.demo_model.train_vae`; it would take 25 minutes
of a core again. Left to itself it puts all six colours on one line, red and purple on black an eighth as far apart
as black and white, and hides shapes in differences that hardly show: latents off by a fifth of their deviation left
22 % of scenes readable, and a UNet mixed colours for thousands of steps. So three of the four channels are told to be
brightness and the two opponent colours, each 8x8 pixels' mean; the fourth is free, and carries what of edges it can.
Latents get noise while it trains, and pixels of objects count more than the ground's. What these are it learns on
squares around one object, at a quarter of the cost; the last steps on full pictures bring the norms, which see all
of a picture, to their small share of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from gguf_sd.checkpoint.tensor_names import rename, vae_modules
from gguf_sd.demo import model_folder
from gguf_sd.demo.check_large import Report, evaluate
from gguf_sd.demo.world_large import (
    DEFAULT_GROUND,
    OFFSETS,
    SIZE,
    Sampler,
    ground_picture,
    held_out_prompts,
    parse,
    place,
    render,
)
from gguf_sd.models.vae import Autoencoder
from tools.demo_model.train_vae import VAE, reconstruct

SCALING = 0.13025  # SDXL's: its latents' deviation is near 1 / SCALING
SPREADS = (1.3, 0.5, 0.5)  # deviations that brightness and opponent colours are divided by
KL = 3e-4  # weight of the divergence beside the pictures' own losses
NOISE = 0.25  # latents' noise in training, at most, where their deviation is near 1
OBJECTS = 8.0  # how much more a pixel of an object, or near one, counts than one of the ground
PARTS = 0.55  # of the steps are on parts of pictures
CHECKED = 750  # steps from one check to the next
ASTRAY = 1.0  # that of the three channels
LOUD = 0.05  # that of the fourth channel, where its mean square is above 1: the others would drown in it
OPPONENT = ((1, 1, 1), (1, -1, 0), (0.5, 0.5, -1))  # rows on red, green and blue
CONFIG = replace(VAE, scaling_factor=SCALING)


def shipped(folder: Path | None = None) -> Autoencoder:
    """The autoencoder of a demo model that ships, the first one's if none is named."""
    vae, modules = Autoencoder(CONFIG), vae_modules(VAE)
    weights = load_file((folder or model_folder()) / "vae" / "diffusion_pytorch_model.safetensors")
    state = {rename(name, modules): value.float() for name, value in weights.items()}
    vae.load_state_dict({n: v.flatten(1) if v.shape[2:] == (1, 1) else v for n, v in state.items()})  # type: ignore
    return vae


def colours(pictures: Tensor) -> Tensor:
    """[B, 3, H, W] -> the first three latent channels [B, 3, H/8, W/8]."""
    mixed = torch.einsum("oc,bchw->bohw", torch.tensor(OPPONENT), F.avg_pool2d(pictures, 8))
    return mixed / torch.tensor(SPREADS)[:, None, None]


@dataclass(frozen=True)
class Batch:
    pictures: Tensor  # [B, 3, H, W], in -1 ... 1
    weights: Tensor  # [B, 1, H, W], how much a pixel's error counts


def draw(sampler: Sampler, count: int, side: int = SIZE) -> Batch:
    """``count`` pictures, of each the square of ``side`` pixels around one of its objects."""
    scenes, views = sampler.draw(count), [sampler.view() for _ in range(count)]
    offsets = torch.rand(count, OFFSETS) * 2 - 1
    pictures = render(scenes, offsets, views)
    grounds = [
        ground_picture(s.background or DEFAULT_GROUND, v) / 127.5 - 1 for s, v in zip(scenes, views, strict=True)
    ]
    objects = ((pictures - torch.stack(grounds)).abs().amax(1, keepdim=True) > 0.25).float()
    weights = 1 + (OBJECTS - 1) * F.max_pool2d(objects, 5, stride=1, padding=2)
    windows = []
    for scene, moves, view in zip(scenes, offsets.tolist(), views, strict=True):
        _, *centre = sampler.rng.choice(place(scene, moves))
        corner = [at - cut - side / 2 for at, cut in zip(centre, (view.left, view.top), strict=True)]
        # Whole latents, so that textures lie on them as in full pictures.
        windows.append([min(max(round(at / 8) * 8, 0), SIZE - side) for at in corner])

    def cut(whole: Tensor) -> Tensor:
        return torch.stack([p[:, y : y + side, x : x + side] for p, (x, y) in zip(whole, windows, strict=True)])

    return Batch(cut(pictures), cut(weights))


def train_vae(seed: int, steps: int, batch: int, log: Callable[[str], None]) -> Autoencoder:
    """Trains on parts of pictures first, then on ``batch`` full ones, and returns the averaged autoencoder."""
    torch.manual_seed(seed)
    vae, mean = shipped(), shipped().requires_grad_(False)
    parameters, means = list[Tensor](vae.parameters()), list[Tensor](mean.parameters())
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.99), weight_decay=0)
    sampler = Sampler(seed + 1)
    recent: list[float] = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 20, (1 - step / steps) / 0.8)
        whole = step >= PARTS * steps
        drawn = draw(sampler, batch if whole else 4 * batch, SIZE if whole else SIZE // 2)
        painted, kl, found = reconstruct(vae, drawn.pictures, NOISE)
        difference = painted - drawn.pictures
        error = (drawn.weights * (difference.abs() + difference.square())).mean()
        astray = (found[:, :3] - colours(drawn.pictures)).square().mean()
        loud = (found[:, 3].square().mean() - 1).clamp(min=0)
        optimizer.zero_grad()
        (error + KL * kl + ASTRAY * astray + LOUD * loud).backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(means, [p.detach() for p in parameters], 1 - min(0.99, step / (step + 10)))
        recent.append(difference.square().mean().item())
        if (step + 1) % 25 == 0:
            psnr = 10 * torch.log10(4 / torch.tensor(recent).mean())
            log(f"vae {step + 1}, PSNR {psnr:.2f} dB, KL {kl.item():.2f}, colours astray {astray.item():.4f}")
            recent.clear()
        if (step + 1) % CHECKED == 0:
            for noise in (0.0, 0.2):
                log(f"vae {step + 1}, at noise {noise}, {readable(mean, noise)}")
    return mean.eval()


@torch.no_grad()
def readable(vae: Autoencoder, noise: float, count: int = 60) -> Report:
    """What of held-out scenes is still there behind the autoencoder, ``noise`` added to the latents, in parts of their
    deviation."""
    generator = torch.Generator().manual_seed(0)

    def paint(captions: list[str]) -> Tensor:
        offsets = torch.rand(len(captions), OFFSETS, generator=generator) * 2 - 1
        latents = vae.encode(render([parse(caption) for caption in captions], offsets))[0]
        latents += noise * latents.std() * torch.randn(latents.shape, generator=generator)
        return vae.decode(SCALING * latents)

    return evaluate(paint, held_out_prompts(count), 20)


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
