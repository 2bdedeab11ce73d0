"""Trains the turbo demo model: ``python -m tools.demo_model.train_turbo --out FOLDER``.

Four stages, each kept in the work folder when it is done, so that a second call goes on where the first one stopped:
the text encoders, the autoencoder, the pictures as latents, the UNet. Then the model is written as a diffusers folder
and asked for pictures of scenes it never saw. What the shipped model took and reached is in its ``README.md``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from gguf_sd.demo.check_large import evaluate
from gguf_sd.demo.world_large import held_out_prompts
from gguf_sd.models.vae import Autoencoder
from tools.demo_model.train import finished, log
from tools.demo_model.turbo.export import export
from tools.demo_model.turbo.paint import Painter
from tools.demo_model.turbo.pictures import encode_shard, joined
from tools.demo_model.turbo.text import TextEncoders, train_text
from tools.demo_model.turbo.unet import Plan, lessons, train_unet
from tools.demo_model.turbo.vae import CONFIG, normalise, train_vae

SEED = 0
TEXT_STEPS, TEXT_BATCH = 1200, 64
VAE_STEPS, VAE_BATCH = 420, 2
MEASURED = 256  # pictures whose latents the autoencoder's scaling is measured on


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--work", type=Path, default=Path("turbo-training"), help="folder of finished stages")
    parser.add_argument("--shards", type=int, default=16, help="of 512 pictures each")
    parser.add_argument("--unet-steps", type=int, default=Plan.steps)
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts to check")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def trained_vae(steps: int) -> Autoencoder:
    """Trained and brought to SDXL's scaling."""
    vae = train_vae(SEED, steps, VAE_BATCH, log)
    measured = encode_shard(vae, -1, SEED, MEASURED)["latents"]
    assert isinstance(measured, torch.Tensor)
    normalise(vae, measured.float())
    return vae


def encoded(vae: Autoencoder, work: Path, count: int) -> list[dict[str, object]]:
    """The first shards of pictures, encoded where they are not yet."""
    shards = []
    for number in range(count):
        path = work / f"shard-{number}.pt"
        if not path.exists():
            torch.save(encode_shard(vae, number, SEED), path)
            log(f"encoded {path.name}")
        shards.append(torch.load(path, weights_only=True))
    return shards


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    work: Path = chosen.work
    work.mkdir(parents=True, exist_ok=True)
    text, vae = TextEncoders(), Autoencoder(CONFIG)
    finished(text, work / "text.pt", lambda: train_text(SEED, TEXT_STEPS, TEXT_BATCH, log))
    finished(vae, work / "vae.pt", lambda: trained_vae(VAE_STEPS))
    data = lessons(joined(encoded(vae, work, chosen.shards)), text.encode)
    unet = train_unet(data, Plan(seed=SEED, steps=chosen.unet_steps), work / "unet.pt", log)
    export(chosen.out, unet, vae, text)
    log(f"wrote {chosen.out}")
    for steps in (1, 2, 4):
        paint = Painter(unet, vae, text, steps)
        log(f"{steps} steps, {evaluate(paint, held_out_prompts(chosen.prompts))}")


if __name__ == "__main__":
    main()
