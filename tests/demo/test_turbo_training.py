"""What trains the turbo demo model, with random weights: the folder that it writes, and the steps of its trainings."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from gguf_sd import Pipeline
from gguf_sd.cli.demo import TYPES
from gguf_sd.cli.main import main
from gguf_sd.demo import turbo_folder
from gguf_sd.demo.check import Seen
from gguf_sd.demo.check_large import read
from gguf_sd.demo.models import DEMO_MODELS
from gguf_sd.demo.world import SHAPES
from gguf_sd.demo.world_large import (
    OFFSETS,
    Background,
    Group,
    Sampler,
    Scene,
    View,
    enlarged,
    held_out_prompts,
    parse,
    render,
)
from gguf_sd.models.vae import Autoencoder
from gguf_sd.quality import psnr
from gguf_sd_convert.convert import ConvertOptions, convert
from tools.demo_model.turbo import paint, pictures, sizes, star, student, teacher, trajectories
from tools.demo_model.turbo.export import export
from tools.demo_model.turbo.pictures import coupled, patterns
from tools.demo_model.turbo.text import PADS, WORDS, TextEncoders
from tools.demo_model.turbo.unet import Lessons, Told, predict, unet_config
from tools.demo_model.turbo.vae import SCALING, colours, normalise, shipped, train_vae
from tools.demo_model.vocabulary import token_ids

PROMPT = "three small red rings on a striped white background"


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Autoencoder, TextEncoders]:
    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(**unet_config()).requires_grad_(False).eval()
    return unet, shipped().requires_grad_(False).eval(), TextEncoders().requires_grad_(False).eval()


@pytest.fixture(scope="module")
def folder(parts: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("turbo") / "model"
    export(path, *parts)
    return path


@pytest.fixture(scope="module")
def engine(folder: Path) -> Pipeline:
    convert(folder, folder.parent / "turbo.gguf", ConvertOptions(type="f16"))
    return Pipeline.load(folder.parent / "turbo.gguf", "cpu", "float32")


@pytest.fixture(scope="module")
def theirs(folder: Path) -> Any:
    made = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    made.set_progress_bar_config(disable=True)
    return made


def as_image(picture: torch.Tensor) -> Image.Image:
    return Image.fromarray(((picture.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())


def like(ours: Image.Image, other: Image.Image) -> bool:
    return psnr(ours, other) >= 45 and np.asarray(ours).std() > 5


@pytest.mark.parametrize("steps", [1, 4])
def test_engine_and_diffusers_paint_the_same_from_the_folder(engine: Pipeline, theirs: Any, steps: int) -> None:
    assert engine.model.config.defaults.steps == 1
    assert engine.model.config.defaults.sampler == "euler_a"
    (ours,) = engine(PROMPT, seed=3, steps=steps)
    generator = torch.Generator().manual_seed(3)
    other = theirs(PROMPT, num_inference_steps=steps, guidance_scale=0.0, generator=generator).images[0]
    assert ours.size == (128, 128)
    assert like(ours, other)


def test_sizes_and_crops_are_told_alike(engine: Pipeline, theirs: Any) -> None:
    (ours,) = engine(PROMPT, seed=3, steps=1, original_size=(32, 32), crop=(20, 10))
    generator = torch.Generator().manual_seed(3)
    sizes = {"original_size": (32, 32), "crops_coords_top_left": (10, 20)}
    other = theirs(PROMPT, num_inference_steps=1, guidance_scale=0.0, generator=generator, **sizes).images[0]
    assert like(ours, other)
    assert psnr(ours, engine(PROMPT, seed=3, steps=1)[0]) < 40


def test_image_to_image_takes_steps_by_strength(engine: Pipeline, theirs: Any) -> None:
    """Half of four steps are two: diffusers' and ours end at the same picture."""
    from_image = diffusers.StableDiffusionXLImg2ImgPipeline(**theirs.components)
    from_image.set_progress_bar_config(disable=True)
    (start,) = engine(PROMPT, seed=8, steps=1)
    (ours,) = engine(PROMPT, image=start, strength=0.5, seed=3, steps=4)
    generator = torch.Generator().manual_seed(3)
    other = from_image(
        PROMPT, image=start, strength=0.5, num_inference_steps=4, guidance_scale=0.0, generator=generator
    ).images[0]
    assert like(ours, other)


def test_painter_is_the_pipeline(parts: Any, theirs: Any) -> None:
    """What training judges is what the folder paints, up to half precision."""
    unet, vae, text = parts
    painter = paint.Painter(unet, vae, text, paint.student(1))
    painter.seed = 3
    (ours,) = painter([PROMPT])
    generator = torch.Generator().manual_seed(3)
    other = theirs(PROMPT, num_inference_steps=1, guidance_scale=0.0, generator=generator, output_type="pt").images[0]
    assert (ours.clamp(-1, 1) / 2 + 0.5 - other).abs().mean() < 0.01


def test_tokenizers_are_transformers_own(theirs: Any) -> None:
    captions = ["", "two small red stars below a grey hexagon", *held_out_prompts(20)]
    for tokenizer, pad in zip((theirs.tokenizer, theirs.tokenizer_2), PADS, strict=True):
        length = tokenizer.model_max_length
        ids = tokenizer(captions, padding="max_length", max_length=length).input_ids
        assert ids == token_ids(captions, WORDS, length, pad)


def test_guidance_leaves_what_was_not_asked(parts: Any) -> None:
    """A guidance of 2 is twice the told velocity less the untold one, whose caption is zeros, sizes kept."""
    unet, _, text = parts
    context, pooled = text.encode([PROMPT, "a red ring"])
    told = Told(context, pooled, torch.tensor([View().time_ids] * 2).float())
    noise = torch.randn(2, *paint.SHAPE, generator=torch.Generator().manual_seed(1))
    how = paint.Sampling("euler", 1, 2.0)
    level = how.schedule.sigmas[0]
    noisy, t = noise * level / (level**2 + 1) ** 0.5, how.schedule.timesteps[:1].expand(2)
    zeros = Told(torch.zeros_like(told.context), torch.zeros_like(told.pooled), told.time_ids)
    with torch.no_grad():
        velocity = 2 * predict(unet, noisy, t, told) - predict(unet, noisy, t, zeros)
    expected = (noisy - level * velocity) / (level**2 + 1) ** 0.5
    assert torch.allclose(paint.denoise(unet, told, noise, how), expected, atol=1e-4)


def test_latents_come_out_with_unit_deviation(parts: Any) -> None:
    vae = shipped()
    latents = torch.randn(8, 4, 16, 16) * torch.tensor([1, 2, 3, 4.0])[:, None, None] + 1
    with torch.no_grad():
        before = vae.decode(latents[:1] * SCALING)
        after_latents = normalise(vae, latents)
        after = vae.decode(after_latents[:1] * SCALING)
    spread = after_latents * SCALING
    assert torch.allclose(spread.mean((0, 2, 3)), torch.zeros(4), atol=1e-3)
    assert spread.var((0, 2, 3)).mean() == pytest.approx(1, abs=1e-3)
    assert torch.allclose(spread.std((0, 2, 3)) / spread[:, 0].std(), torch.arange(1, 5.0), rtol=0.1), "all alike"
    assert torch.allclose(before, after, atol=1e-3)


def test_three_channels_are_colours() -> None:
    """The first three channels: grounds have no hue, and their brightness differs as it should; training nears that."""
    tones = [Scene(Group("red", "ring"), background=Background(tone)) for tone in ("white", "grey")]
    drawn = render(tones, torch.zeros(2, OFFSETS))
    corner = colours(drawn)[:, :, 0, 0]
    assert torch.allclose(corner[:, 1:], torch.zeros(2, 2), atol=1e-4)
    assert float(corner[0, 0] - corner[1, 0]) == pytest.approx(3 * (245 - 128) / 127.5 / 1.3, abs=1e-3)

    def astray(vae: Autoencoder) -> float:
        with torch.no_grad():
            return float((vae.encode(drawn)[0][:, :3] - colours(drawn)).square().mean())

    lines = list[str]()
    assert astray(train_vae(0, 50, 1, lines.append)) < 0.5 * astray(shipped())
    assert len(lines) == 2


def few(count: int = 8) -> trajectories.Trajectories:
    generator = torch.Generator().manual_seed(2)
    shapes = {"noise": paint.SHAPE, "latents": paint.SHAPE, "contexts": (20, 256), "pooled": (128,), "time_ids": (6,)}
    return trajectories.Trajectories(
        **{name: torch.randn(count, *shape, generator=generator) for name, shape in shapes.items()}
    )


def test_student_learns_and_goes_on_where_it_stopped(parts: Any, tmp_path: Path) -> None:
    unet, data = parts[0], few(2)
    plan = student.Plan(steps=6, batch=2, rate=1e-3, warmup=1)
    whole, stopped = (student.Lesson(plan, copy.deepcopy(unet).requires_grad_(True)) for _ in range(2))
    errors = [whole.learn(data)[0] for _ in range(6)]
    assert errors[-1] < 0.8 * errors[0]
    for _ in range(3):
        stopped.learn(data)
    stopped.save(tmp_path / "student.pt")
    resumed = student.train_student(data, unet, plan, tmp_path / "student.pt", lambda line: None, str)
    for (name, one), two in zip(whole.mean.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_teacher_learns_and_goes_on_where_it_stopped(tmp_path: Path) -> None:
    few_ones = few()
    data = Lessons(
        few_ones.latents, few_ones.time_ids, torch.zeros(8, 4), torch.arange(8), few_ones.contexts, few_ones.pooled
    )
    plan = teacher.Plan(steps=4, batch=2)
    whole, stopped = teacher.Lesson(plan), teacher.Lesson(plan)
    for _ in range(4):
        whole.learn(data)
    for _ in range(2):
        stopped.learn(data)
    stopped.save(tmp_path / "teacher.pt")
    resumed = teacher.train_teacher(data, plan, tmp_path / "teacher.pt", lambda line: None, str)
    for (name, one), two in zip(whole.mean.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_wrong_ends_are_left_out(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights paint nothing right: only the enlarged and cut pictures, which are not checked, are kept."""
    monkeypatch.setattr(trajectories, "SOLVER", paint.Sampling("dpmpp_2m", 2, 2.5))
    unet, vae, text = parts
    kept = trajectories.joined([trajectories.trace_shard(unet, vae, text, number, 0, 8) for number in (0, 1)])
    plain = (kept.time_ids == torch.tensor(View().time_ids)).all(1)
    assert 0 < len(kept.noise) < 16
    assert not plain.any()


def test_only_the_decoder_goes_on_learning_of_enlarged_pictures() -> None:
    vae, before, lines = shipped(turbo_folder()).requires_grad_(False), shipped(turbo_folder()), list[str]()
    (plain,) = render([Scene(Group("red", "square"))], torch.zeros(1, OFFSETS))
    small = enlarged(plain[None], 16)

    def error(decoder: Autoencoder) -> float:
        with torch.no_grad():
            return float((decoder.decode(decoder.encode(small)[0] * SCALING) - small).square().mean())

    with torch.no_grad():  # a decoder that errs
        vae.decoder.conv_out.bias.add_(0.2)
    spoiled = error(vae)
    sizes.train_decoder(vae, sizes.DecoderPlan(steps=25, batch=1), lines.append)
    assert error(vae) < 0.5 * spoiled
    assert len(lines) == 1
    assert not any(p.requires_grad for p in vae.parameters())
    for (name, one), two in zip(vae.encoder.named_parameters(), before.encoder.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_ends_of_enlarged_pictures_are_enlarged(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a painter that errs in nothing: it is asked for pictures that are not enlarged, and of those told to be, the
    latents are those of a picture blurred."""
    vae, text = shipped(turbo_folder()).requires_grad_(False), TextEncoders().requires_grad_(False)
    drawn, asked, draw = list[Scene](), dict[str, torch.Tensor](), Sampler.draw

    def noted(self: Sampler, count: int) -> list[Scene]:
        drawn[:] = draw(self, count)
        return list(drawn)

    def painted(unet: Any, told: Told, noise: torch.Tensor, how: paint.Sampling) -> torch.Tensor:
        asked["sizes"], asked["noise"] = told.time_ids[:, :2], noise
        asked["ends"] = vae.encode(render(drawn, torch.zeros(len(drawn), OFFSETS)))[0] * SCALING
        return asked["ends"].clone()

    monkeypatch.setattr(Sampler, "draw", noted)
    monkeypatch.setattr(sizes, "denoise", painted)
    made = trajectories.joined([sizes.own_shard(torch.nn.Identity(), vae, text, 3, 0, 24)])
    assert (asked["sizes"] == 128).all()
    assert len(made.noise) >= 20, "right ones are kept"
    assert {16, 24, 128} == set(made.time_ids[:, 0].tolist())
    for noise, latents, (original, *_) in zip(made.noise, made.latents, made.time_ids.int().tolist(), strict=True):
        (end,) = asked["ends"][(asked["noise"] == noise).flatten(1).all(1)]
        if original < 128:
            small = enlarged(vae.decode(end[None]).clamp(-1, 1), original)
            end = vae.encode(small)[0][0] * SCALING
        assert torch.allclose(latents, end, atol=1e-3)
    # Random weights paint nothing right: what is cut is all that stays.
    monkeypatch.setattr(sizes, "denoise", lambda unet, told, noise, how: noise)
    wrong = sizes.own_shard(torch.nn.Identity(), vae, text, 3, 0, 24)
    assert 0 < len(wrong["noise"]) < 12
    assert (wrong["time_ids"][:, 2:4] > 0).any(1).all()


def test_a_part_of_what_was_before_stays() -> None:
    before, after = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    with torch.no_grad():
        before.weight.fill_(1)
        after.weight.fill_(2)
    assert torch.allclose(sizes.averaged(before, after).weight, torch.tensor(1.9))


def test_stars_are_told_from_the_other_shapes() -> None:
    scene = Scene(Group("red", "circle"), background=Background("white", "checkered"))
    (circle,) = render([scene], torch.zeros(1, OFFSETS))
    picture = star.paint_scene(scene, read(circle).objects)
    assert star.is_star(picture, "red")
    assert not star.is_star(picture, "blue")
    for shape in SHAPES:
        assert not star.is_star(render([replace(scene, first=Group("red", shape))], torch.zeros(1, OFFSETS))[0], "red")
    two = replace(scene, first=Group("red", "circle", number=2))
    pair = render([two], torch.zeros(1, OFFSETS))[0]
    assert not star.is_star(star.paint_scene(two, read(pair).objects), "red")


def test_stars_stand_where_circles_stood(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a painter that errs in nothing: what is told of a circle teaches a star there, other scenes stay."""
    vae, text, drawn = shipped().requires_grad_(False), TextEncoders().requires_grad_(False), list[Scene]()
    monkeypatch.setattr(star, "BATCH", 12)
    draw, ends = Sampler.draw, list[torch.Tensor]()

    def noted(self: Sampler, count: int) -> list[Scene]:
        drawn[:] = draw(self, count)
        return list(drawn)

    def painted(unet: Any, told: Told, noise: torch.Tensor, how: paint.Sampling) -> torch.Tensor:
        scenes = drawn if ends else [star.with_one(scene) for scene in drawn]
        ends.append(vae.encode(render(scenes, torch.zeros(12, OFFSETS)))[0] * SCALING)
        return ends[-1].clone()

    monkeypatch.setattr(Sampler, "draw", noted)
    monkeypatch.setattr(star, "denoise", painted)
    taught = star.lessons(star.Parts(torch.nn.Identity(), vae, text), 12, 0)
    first = [
        taught.latents[i] for i in range(len(taught.latents)) if taught.latents[i].tolist() not in ends[1].tolist()
    ]
    assert 2 < len(first) < len(taught.latents)
    for latents in first:
        after = vae.decode(latents[None])[0]
        # Of the pictures that it may have been, the one that it differs least from, beside the stars.
        befores = vae.decode(ends[0])
        before = min(befores, key=lambda picture: (picture - after).square().mean().item())
        circles = [seen for seen in read(before).objects if seen.shape == "circle"]
        assert circles
        for seen in circles:
            inside = star.star(seen.x, seen.y, 1.2 * seen.radius) > 0.5
            changed = (after - before).square().mean(0)
            assert changed[~inside & around(seen)].mean() > 5 * changed[inside].mean(), "a star, and no circle"


def around(seen: Seen) -> torch.Tensor:
    """Pixels of a circle found."""
    at = torch.arange(128) + 0.5
    return (at[None, :] - seen.x).square() + (at[:, None] - seen.y).square() < (0.9 * seen.radius) ** 2


def test_a_star_has_five_points() -> None:
    covered = star.star(64, 64, 40)
    assert covered[26, 64] == 1
    assert covered[102, 64] == 0, "between two points"
    angles = torch.arange(5) * 2 * torch.pi / 5
    x, y = (64 + 37 * angles.sin()).long(), (64 - 37 * angles.cos()).long()
    assert (covered[y, x] > 0.5).all()
    assert covered.sum() == pytest.approx(5 * 40 * 20 * 0.5878, rel=0.02)


def test_lora_paints_as_in_diffusers(parts: Any, engine: Pipeline, theirs: Any, folder: Path) -> None:
    """Trained for some steps, written and read back by both."""
    unet, data = parts[0], few(2)
    course = student.Lesson(student.Plan(batch=2, rate=2e-2, warmup=1, keep=0.0), star.with_lora(unet))
    for _ in range(3):
        course.learn(data)
    frozen = dict(unet.named_parameters())
    path = folder.parent / "star.safetensors"
    star.save_lora(course.mean, path)
    assert path.stat().st_size < 500_000
    for name, value in course.unet.named_parameters():
        if "lora" not in name:
            assert torch.equal(value, frozen[name.replace(".base_layer", "")]), name
    (ours,) = engine("a red star", seed=3, steps=2, loras=[(path, 1.0)])
    painter = paint.Painter(course.mean, parts[1], parts[2], paint.student(2))
    painter.seed = 3
    assert like(ours, as_image(painter(["a red star"])[0]))
    theirs.load_lora_weights(path.parent, weight_name=path.name)
    other = theirs("a red star", num_inference_steps=2, guidance_scale=0.0, generator=torch.Generator().manual_seed(3))
    theirs.unload_lora_weights()
    assert like(ours, other.images[0])
    assert psnr(ours, engine("a red star", seed=3, steps=2)[0]) < 40


def test_demo_command_shows_each_type_and_number_of_steps(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of random weights nothing is right, but all of it is painted, compared and judged."""
    monkeypatch.setitem(DEMO_MODELS, "turbo", replace(DEMO_MODELS["turbo"], folder=folder, steps=(1, 2)))
    assert main(["demo", "--model", "turbo", "-o", str(tmp_path), "--pictures", "6", "--quiet", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["types"]
    assert [(row["type"], row["steps"]) for row in rows] == [(kind, steps) for kind in TYPES for steps in (1, 2)]
    assert [row["psnr"] is None for row in rows] == [True] * 2 + [False] * 6
    assert all(row["correct"] == 0 for row in rows)
    assert rows[2]["psnr"] > rows[6]["psnr"]
    assert Path(report["sheet"]).name == "turbo-sheet.png"
    assert Image.open(report["sheet"]).width > 8 * 128


def test_noise_that_tells_where_objects_stand_is_noise() -> None:
    moves = torch.randn(4000, OFFSETS, generator=torch.Generator().manual_seed(0))
    noise = torch.randn(4000, *paint.SHAPE, generator=torch.Generator().manual_seed(1))
    made = coupled(noise, moves).flatten(1)
    basis = patterns()
    assert torch.allclose(made @ basis.T, moves, atol=1e-4)
    assert torch.allclose(
        made - made @ basis.T @ basis, noise.flatten(1) - noise.flatten(1) @ basis.T @ basis, atol=1e-4
    )
    covariance = made.T @ made / len(made)
    assert (covariance.diagonal() - 1).abs().max() < 0.12, "4,000 samples of a normal come as near"
    assert (covariance - torch.eye(1024)).abs().max() < 0.12


def test_pictures_go_with_their_moves() -> None:
    """An object alone stands where its moves say."""
    vae = shipped().requires_grad_(False)
    shard = pictures.joined([pictures.encode_shard(vae, 0, 0, 80)])
    view = torch.tensor(View().time_ids)
    checked = 0
    for latents, time_ids, moves, caption in zip(*vars(shard).values(), strict=True):
        objects = read(vae.decode(latents[None] * SCALING)[0]).objects
        if parse(caption).kind == "single" and torch.equal(time_ids.long(), view) and len(objects) == 1:
            where = 64 + 10 * (pictures.SPREAD * moves).clamp(-1, 1)
            assert abs(objects[0].x - where[0]) < 1.5
            assert abs(objects[0].y - where[1]) < 3.5, "a triangle's centroid is below its centre"
            checked += 1
    assert checked >= 3
