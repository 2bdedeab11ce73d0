"""After the stages: a LoRA that teaches the student a shape the world does not have, a star.

``python -m tools.demo_model.turbo.star --out star.safetensors`` begins with the model that ships. What the student
should paint follows from what it does paint: of "a red circle above a blue square" it makes a picture from a given
noise, a program finds the objects in it and paints the same scene with a star where the circle is, and with "star" in
its caption this is what the noise has to end at. So one step can learn it. Half of the lessons are ordinary scenes,
which are to stay.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionXLPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from gguf_sd.demo import turbo_folder
from gguf_sd.demo.check import OVERLAP, SPECK, STANDS_OUT, Picture, Seen, components, identify
from gguf_sd.demo.check_large import as_tensor, evaluate, ground_of, judge, read
from gguf_sd.demo.world import BACKGROUNDS, COLOURS, SHAPES, coverage
from gguf_sd.demo.world_large import DEFAULT_GROUND, SIZE, Sampler, Scene, View, ground_picture, held_out_prompts
from gguf_sd.models.vae import Autoencoder
from tools.demo_model.export import WEIGHTS
from tools.demo_model.train import log
from tools.demo_model.turbo.export import unet_tensors
from tools.demo_model.turbo.paint import ONE_STEP, SHAPE, Painter, denoise
from tools.demo_model.turbo.paint import student as in_steps
from tools.demo_model.turbo.student import Lesson, Plan
from tools.demo_model.turbo.text import TextEncoders
from tools.demo_model.turbo.trajectories import Trajectories
from tools.demo_model.turbo.unet import Told, new_unet
from tools.demo_model.turbo.vae import CONFIG, shipped

WORD, INSTEAD = "star", "circle"
RANK = 4
LAYERS = r".*(to_q|to_k|to_v|to_out\.0|ff\.net\.0\.proj|ff\.net\.2|proj_in|proj_out|conv1|conv2)"
INNER = 0.5  # radius of a star's inner corners, of its outer ones'
BATCH = 64


def star(x: float, y: float, radius: float) -> Tensor:
    """How much of each pixel [SIZE, SIZE] a star of five points covers, by 4x4 samples a pixel."""
    at = (torch.arange(4 * SIZE) + 0.5) / 4
    dx, dy = at[None, :] - x, at[:, None] - y
    angle = torch.atan2(dx, -dy).remainder(2 * torch.pi / 5)
    angle = torch.minimum(angle, 2 * torch.pi / 5 - angle)  # from the nearest point, 0 ... 36 degrees
    along, aside = (torch.hypot(dx, dy) * f(angle) for f in (torch.cos, torch.sin))
    # The edge from the outer corner (1, 0) to the inner one, at 36 degrees.
    corner = torch.tensor(torch.pi / 5)
    inner = INNER * corner.cos(), INNER * corner.sin()
    inside = (along - radius) * inner[1] + aside * (1 - inner[0]) <= 0
    return inside.float().view(SIZE, 4, SIZE, 4).mean((1, 3))


def paint_scene(scene: Scene, objects: tuple[Seen, ...]) -> Tensor:
    """[3, SIZE, SIZE] in -1 ... 1: the scene's ground and objects found, stars in place of circles."""
    picture = ground_picture(scene.background or DEFAULT_GROUND, View())
    for seen in objects:
        assert seen.colour
        assert seen.shape
        colour = torch.tensor(COLOURS[seen.colour], dtype=torch.float32)[:, None, None]
        if seen.shape == INSTEAD:
            alpha = star(seen.x, seen.y, 1.2 * seen.radius)  # of a circle's size to the eye
        else:
            x, y, radius = torch.tensor([[seen.x], [seen.y], [seen.radius]])
            alpha = coverage(torch.tensor([SHAPES.index(seen.shape)]), x, y, radius, SIZE)[0]
        picture = torch.lerp(picture, colour.expand_as(picture), alpha[None].expand_as(picture))
    return picture / 127.5 - 1


def with_one(scene: Scene) -> Scene:
    """The scene with its first group made circles, and no others."""
    second = scene.second
    if second is not None and second.shape == INSTEAD:
        second = replace(second, shape="square")
    return replace(scene, first=replace(scene.first, shape=INSTEAD), second=second)


def is_star(picture: Picture, colour: str) -> bool:
    """Whether a picture shows one object, of this colour, that is more like a star than like any shape of the world."""
    rgb = as_tensor(picture)
    ground, away = ground_of(rgb)
    objects = [part for part in components(away > STANDS_OUT) if part.sum() >= SPECK]
    if len(objects) != 1 or identify(rgb, ground, away, objects[0])[1].colour != colour:
        return False
    found = objects[0].float()
    y, x = ((found.sum(i) * (torch.arange(SIZE) + 0.5)).sum() / found.sum() for i in (1, 0))
    unit = star(SIZE / 2, SIZE / 2, SIZE / 4).sum() / (SIZE / 4) ** 2
    template = star(float(x), float(y), float((found.sum() / unit).sqrt()))

    def overlap(other: Tensor) -> float:
        return float(torch.minimum(found, other).sum() / torch.maximum(found, other).sum())

    radii = found.sum().sqrt() * torch.linspace(0.4, 1.2, 17)
    where = x.expand(17), y.expand(17), radii
    others = (coverage(torch.full((17,), i), *where, SIZE) for i in range(len(SHAPES)))
    return overlap(template) > max(OVERLAP, *(overlap(other) for shape in others for other in shape))


@dataclass(frozen=True)
class Parts:
    unet: nn.Module
    vae: Autoencoder
    text: TextEncoders


def shipped_parts() -> Parts:
    """The student that ships, its UNet taking text as it does in training."""
    folder, text, vae, unet = turbo_folder(), TextEncoders(), shipped(turbo_folder()), new_unet()
    text.first = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32)
    text.second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2", dtype=torch.float32)
    weights = load_file(folder / "unet" / WEIGHTS)
    unet.load_state_dict(dict(unet_tensors({name: value.float() for name, value in weights.items()}, back=True)))
    return Parts(*(part.requires_grad_(False).eval() for part in (unet, vae, text)))  # type: ignore[arg-type]


@torch.no_grad()
def lessons(parts: Parts, count: int, seed: int) -> Trajectories:
    """About ``count`` of stars, and as many of other scenes; wrong pictures teach nothing."""
    sampler, generator = Sampler(seed + 900_000), torch.Generator().manual_seed(seed + 900_000)
    columns: list[list[Tensor]] = []
    for start in range(0, 2 * count, BATCH):
        stars = start < count
        scenes = [with_one(scene) if stars else scene for scene in sampler.draw(BATCH)]
        captions = [scene.caption for scene in scenes]
        sizes = torch.tensor(View().time_ids).float().expand(BATCH, -1)
        told = Told(*parts.text.encode(captions), sizes)
        noise = torch.randn(BATCH, *SHAPE, generator=generator)
        latents = denoise(parts.unet, told, noise, ONE_STEP)
        pictures = parts.vae.decode(latents)
        right = torch.tensor([judge(p, s).all for p, s in zip(pictures, scenes, strict=True)])
        rows = right.nonzero()[:, 0].tolist()
        if stars and rows:
            # What is told now, and what it shall give.
            told = Told(*parts.text.encode([caption.replace(INSTEAD, WORD) for caption in captions]), sizes)
            painted = [paint_scene(scenes[i], read(pictures[i]).objects) for i in rows]
            latents[right] = parts.vae.encode(torch.stack(painted))[0] * CONFIG.scaling_factor
        columns.append([value[right] for value in (noise, latents, told.context, told.pooled, told.time_ids)])
    return Trajectories(*(torch.cat(column) for column in zip(*columns, strict=True)))


def with_lora(unet: nn.Module) -> Any:
    """A copy of diffusers' UNet of which only a new LoRA's factors are trained."""
    copied: Any = copy.deepcopy(unet).requires_grad_(False)
    torch.manual_seed(0)
    copied.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS))
    return copied.train()


def train_star(parts: Parts, count: int, plan: Plan, log: Callable[[str], None]) -> Any:
    """Returns the UNet with its LoRA, averaged."""
    data = lessons(parts, count, plan.seed)
    log(f"star: {len(data.noise)} lessons")
    course, errors = Lesson(plan, with_lora(parts.unet)), list[float]()
    while course.step < plan.steps:
        errors.append(course.learn(data)[0])
        if course.step % 50 == 0:
            log(f"star {course.step}, loss {sum(errors) / len(errors):.4f} of first steps")
            errors.clear()
    return course.mean.eval()


def save_lora(unet: Any, path: Path) -> None:
    """As diffusers writes it, in half precision."""
    factors = {name: value.half().contiguous() for name, value in unet_tensors(get_peft_model_state_dict(unet))}
    StableDiffusionXLPipeline.save_lora_weights(path.parent, unet_lora_layers=factors, weight_name=path.name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="LoRA file to write")
    parser.add_argument("--lessons", type=int, default=1536)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--bf16", action="store_true", help="train in it")
    parser.add_argument("--threads", type=int, default=1)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    parts = shipped_parts()
    plan = Plan(steps=chosen.steps, rate=4e-3, warmup=30, keep=0.98, bf16=chosen.bf16)
    trained = train_star(parts, chosen.lessons, plan, log)
    save_lora(trained, chosen.out)
    log(f"wrote {chosen.out}")
    colours = [colour for colour in COLOURS for _ in range(10)]
    prompts = [f"a {colour} {WORD} on a {tone} background" for colour, tone in zip(colours, cycle(BACKGROUNDS))]
    for steps in (1, 4):
        pictures = Painter(trained, parts.vae, parts.text, in_steps(steps))(prompts)
        stars = sum(is_star(picture, colour) for picture, colour in zip(pictures, colours, strict=True))
        others = evaluate(Painter(trained, parts.vae, parts.text, in_steps(steps)), held_out_prompts(200))
        log(f"{steps} steps: {stars} of {len(prompts)} stars; with the LoRA, of other scenes: {others}")


if __name__ == "__main__":
    main()
