"""Trains the turbo demo model: ``python -m tools.demo_model.train_turbo --out FOLDER``.

Stages, each kept in the work folder as it goes, so that a second call goes on where the first one stopped: the text
encoders, the autoencoder, pictures as latents, the teacher, its trajectories, the student, and what enlarged pictures
look like. Then the student is written as a diffusers folder, and both are asked for pictures of scenes they never saw.
On one core of a server's processor with AMX a step of the teacher takes 0.45 s with ``--bf16``. What the shipped model
took and reached is in ``gguf_sd/demo/turbo/README.md``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gguf_sd.demo.check_large import Report, evaluate
from gguf_sd.demo.world_large import held_out_prompts
from gguf_sd.models.vae import Autoencoder
from tools.demo_model.train import finished, log
from tools.demo_model.turbo import paint, pictures, sizes, student, teacher, trajectories
from tools.demo_model.turbo.export import export
from tools.demo_model.turbo.text import TextEncoders, train_text
from tools.demo_model.turbo.unet import lessons
from tools.demo_model.turbo.vae import CONFIG, normalise, train_vae

SEED = 0
TEXT_STEPS, TEXT_BATCH = 1200, 64
VAE_STEPS, VAE_BATCH = 4000, 2
CHECKED = 60  # held-out prompts, while it trains
MEASURED = 256  # pictures whose latents the autoencoder's scaling is measured on


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="diffusers folder to write")
    parser.add_argument("--work", type=Path, default=Path("turbo-training"), help="folder of finished stages")
    parser.add_argument("--shards", type=int, default=48, help="of 512 pictures each")
    parser.add_argument("--teacher-steps", type=int, default=teacher.Plan.steps)
    parser.add_argument("--trajectories", type=int, default=8, help="shards of 512 each")
    parser.add_argument("--student-steps", type=int, default=student.Plan.steps)
    parser.add_argument("--own", type=int, default=12, help="shards of the student's own pictures, of 512 each")
    parser.add_argument("--prompts", type=int, default=500, help="held-out prompts to check")
    parser.add_argument("--bf16", action="store_true", help="train in it: twice as fast where the processor has it")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def trained_vae(steps: int) -> Autoencoder:
    """Trained and brought to SDXL's scaling."""
    vae = train_vae(SEED, steps, VAE_BATCH, log)
    measured = pictures.encode_shard(vae, -1, SEED, MEASURED)["latents"]
    assert isinstance(measured, torch.Tensor)
    normalise(vae, measured.float())
    return vae


def shards(work: Path, name: str, count: int, make: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """The first shards of a stage, made where they are not there yet."""
    found = []
    for number in range(count):
        path = work / f"{name}-{number}.pt"
        if not path.exists():
            partial = path.with_suffix(".partial")
            torch.save(make(number), partial)
            partial.replace(path)
            log(f"made {path.name}")
        found.append(torch.load(path, weights_only=True))
    return found


def main() -> None:
    chosen = options()
    torch.set_num_threads(chosen.threads)
    work: Path = chosen.work
    work.mkdir(parents=True, exist_ok=True)
    text, vae = TextEncoders(), Autoencoder(CONFIG)
    finished(text, work / "text.pt", lambda: train_text(SEED, TEXT_STEPS, TEXT_BATCH, log))
    finished(vae, work / "vae.pt", lambda: trained_vae(VAE_STEPS))
    encoded = shards(work, "shard", chosen.shards, lambda number: pictures.encode_shard(vae, number, SEED))
    data = lessons(pictures.joined(encoded), text.encode)

    def check(unet: nn.Module, how: paint.Sampling, count: int = CHECKED) -> Report:
        return evaluate(paint.Painter(unet, vae, text, how), held_out_prompts(count))

    plan = teacher.Plan(SEED, chosen.teacher_steps, bf16=chosen.bf16)
    guided = teacher.train_teacher(data, plan, work / "teacher.pt", log, lambda unet: check(unet, paint.TEACHER))
    traced = shards(
        work,
        "trace",
        chosen.trajectories,
        lambda number: trajectories.trace_shard(guided, vae, text, number, SEED, bf16=chosen.bf16),
    )
    pace = student.Plan(SEED, chosen.student_steps, bf16=chosen.bf16)
    ends, at_once = trajectories.joined(traced), paint.student(1)
    brief = student.train_student(ends, guided, pace, work / "student.pt", log, lambda unet: check(unet, at_once))
    finished(vae, work / "decoder.pt", lambda: sizes.train_decoder(vae, sizes.DecoderPlan(SEED), log))
    own = shards(work, "own", chosen.own, lambda number: sizes.own_shard(brief, vae, text, number, SEED))
    pace = replace(sizes.STUDENT, seed=SEED, bf16=chosen.bf16)
    ends, kept = trajectories.joined(own), work / "sizes.pt"
    taught = student.train_student(ends, brief, pace, kept, log, lambda unet: check(unet, at_once), "sizes")
    brief = sizes.averaged(brief, taught)
    export(chosen.out, brief, vae, text)
    log(f"wrote {chosen.out}")
    for steps in (1, 2, 4):
        log(f"student, {steps} steps, {check(brief, paint.student(steps), chosen.prompts)}")
    log(f"teacher, {paint.TEACHER}, {check(guided, paint.TEACHER, chosen.prompts)}")


if __name__ == "__main__":
    main()
