"""Trains the demo model from nothing: ``python -m tools.demo_model.train --out FOLDER``.

Three stages, each kept in the work folder when it is done, so that a second call goes on where the first one
stopped: the text encoder, the autoencoder, the UNet. Then the model is written as a diffusers folder and asked
for pictures of scenes it never saw. What the shipped model took and reached is in ``model/README.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from transformers import CLIPTextModel

from gguf_sd.demo.check import evaluate, held_out_prompts
from gguf_sd.models.unet import UNet
from gguf_sd.models.vae import Autoencoder
from tools.demo_model.export import export
from tools.demo_model.paint import Painter
from tools.demo_model.train_text import text_config, train_text
from tools.demo_model.train_unet import Lessons, Plan, encode_pictures, lessons, train_unet
from tools.demo_model.train_vae import VAE, train_vae

SEED = 0
TEXT_STEPS, TEXT_BATCH = 2000, 64
VAE_BATCH = 8
PICTURES = 28672


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--work", type=Path, default=Path("demo-training"), help="folder of finished stages")
    parser.add_argument("--vae-steps", type=int, default=4100)
    parser.add_argument("--vae-seconds", type=float, default=float("inf"), help="stop the stage after this time")
    parser.add_argument("--unet-steps", type=int, default=Plan.steps)
    parser.add_argument("--unet-seconds", type=float, default=float("inf"), help="stop the stage after this time")
    parser.add_argument("--prompts", type=int, default=600, help="held-out prompts to check, a third single objects")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def log(line: str) -> None:
    print(line, flush=True)


def finished(model: torch.nn.Module, path: Path, train: Callable[[], torch.nn.Module]) -> None:
    """Fills ``model`` with the weights of a finished stage, training it first if there are none."""
    if not path.exists():
        torch.save(train().state_dict(), path)
    model.load_state_dict(torch.load(path, weights_only=True))
    model.eval()


def prepared(text: CLIPTextModel, vae: Autoencoder, path: Path) -> tuple[Lessons, float]:
    """What the UNet trains on, and the scaling factor that gives its latents unit deviation."""
    if not path.exists():
        torch.save(encode_pictures(vae, PICTURES, SEED), path)
    latents, captions = torch.load(path, weights_only=True)
    scale = round(1 / latents.std().item(), 5)
    return lessons(text, latents * scale, captions), scale


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    work: Path = chosen.work
    work.mkdir(parents=True, exist_ok=True)
    text, vae = CLIPTextModel(text_config()), Autoencoder(VAE)
    finished(text, work / "text.pt", lambda: train_text(SEED, TEXT_STEPS, TEXT_BATCH, log))
    finished(vae, work / "vae.pt", lambda: train_vae(SEED, chosen.vae_steps, chosen.vae_seconds, VAE_BATCH, log))
    data, scale = prepared(text, vae, work / "latents.pt")
    vae.config = replace(VAE, scaling_factor=scale)
    plan = Plan(seed=SEED, steps=chosen.unet_steps, seconds=chosen.unet_seconds)
    unet: UNet = train_unet(data, plan, work / "unet.pt", log)
    export(chosen.out, unet, vae, text)
    log(f"wrote {chosen.out}")
    paint = Painter(unet, vae, text)
    log(str(evaluate(paint, held_out_prompts(chosen.prompts // 3, chosen.prompts - chosen.prompts // 3))))


if __name__ == "__main__":
    main()
