"""The demo's world and its checker: what is rendered is read back, and what is wrong is called wrong."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from gguf_sd.demo import check, world
from tools.demo_model.vocabulary import LENGTH, WORDS, learn_merges, token_ids, vocabulary

PICTURES = 200


@pytest.fixture(scope="module")
def gallery() -> tuple[list[world.Scene], Tensor]:
    sampler = world.Sampler(7)
    drawn = [scene for scene, _ in sampler.draw(PICTURES)]
    return drawn, world.render(drawn, sampler.rng)


def _blurred(pictures: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 2.0, 1.0])
    kernel = (kernel[:, None] * kernel / 16)[None, None].repeat(3, 1, 1, 1)
    smooth = F.conv2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), kernel, groups=3)
    return smooth + 0.08 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))


def _jpeg(pictures: Tensor) -> Tensor:
    result = []
    for array in ((pictures + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(array).save(file, "JPEG", quality=60, subsampling=0)
        result.append(np.asarray(Image.open(file)))
    return torch.from_numpy(np.stack(result)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("spoil", [lambda x: x, _blurred, _jpeg], ids=["clean", "blurred", "jpeg"])
def test_checker_reads_what_was_rendered(
    gallery: tuple[list[world.Scene], Tensor], spoil: Callable[[Tensor], Tensor]
) -> None:
    drawn, pictures = gallery
    right = [check.judge(p, scene).all for scene, p in zip(drawn, spoil(pictures), strict=True)]
    assert sum(right) >= 0.995 * PICTURES


def _wrong_scenes(scene: world.Scene) -> dict[str, world.Scene]:
    thing = scene.first
    free = next(c for c in world.COLOURS if c not in {t.colour for t in scene.things})
    wrong = {
        "colours": replace(scene, first=world.Thing(free, thing.shape)),
        "shapes": replace(scene, first=world.Thing(thing.colour, next(s for s in world.SHAPES if s != thing.shape))),
        "background": replace(scene, background=next(b for b in world.BACKGROUNDS if b != scene.background)),
    }
    if scene.second is not None and scene.relation is not None:
        wrong["relation"] = replace(scene, relation=world.RELATIONS[scene.relation])
        if thing.shape != scene.second.shape:  # colours and shapes both there, on the wrong objects
            swapped = (world.Thing(thing.colour, scene.second.shape), world.Thing(scene.second.colour, thing.shape))
            wrong["shapes "] = replace(scene, first=swapped[0], second=swapped[1])
    return wrong


def test_checker_finds_every_kind_of_mistake(gallery: tuple[list[world.Scene], Tensor]) -> None:
    """Each caption is changed in one point; exactly that point must be marked wrong."""
    drawn, pictures = gallery
    for scene, picture in zip(drawn[:30], pictures, strict=False):
        for what, wrong in _wrong_scenes(scene).items():
            verdict = check.judge(picture, wrong)
            assert not getattr(verdict, what.strip()), (what, scene, wrong)
            assert not verdict.all
            if what != "colours":
                others = {"colours", "shapes", "relation", "background"} - {what.strip()}
                assert all(getattr(verdict, other) for other in others), (what, scene)


def test_checker_counts_objects(gallery: tuple[list[world.Scene], Tensor]) -> None:
    drawn, pictures = gallery
    pair = next(i for i, scene in enumerate(drawn) if scene.second is not None)
    single = next(i for i, scene in enumerate(drawn) if scene.second is None)
    only_first = world.Scene(drawn[pair].first, background=drawn[pair].background)
    second = world.Thing(next(c for c in world.COLOURS if c != drawn[single].first.colour), "ring")
    assert not check.judge(pictures[pair], only_first).colours
    assert not check.judge(pictures[single], world.Scene(drawn[single].first, "above", second)).colours


def test_checker_takes_noise_and_foreign_shapes_for_nothing() -> None:
    noise = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(3)) * 2 - 1
    assert not check.judge(noise, world.Scene(world.Thing("red", "circle"))).all
    bar = torch.full((3, 64, 64), 0.92)
    bar[:, 20:27, 8:56] = torch.tensor(world.COLOURS["red"])[:, None, None] / 127.5 - 1
    (seen,) = check.read(bar).objects
    assert (seen.colour, seen.shape) == ("red", None)


def test_evaluate_counts_by_hand(gallery: tuple[list[world.Scene], Tensor]) -> None:
    """Of four captions painted right, wrong colour, wrong relation, right: the shares are known."""
    one = world.Scene(world.Thing("red", "ring"), background="white")
    two = world.Scene(world.Thing("red", "ring"), "above", world.Thing("blue", "cross"), "black")
    painted = [one, replace(one, first=world.Thing("cyan", "ring")), replace(two, relation="left of"), two]
    rng = random.Random(0)

    def paint(captions: list[str]) -> list[Image.Image]:
        batch = [painted.pop(0) for _ in captions]
        arrays = ((world.render(batch, rng) + 1) * 127.5).byte().permute(0, 2, 3, 1).numpy()
        return [Image.fromarray(array) for array in arrays]

    report = check.evaluate(paint, [s.caption for s in (one, one, two, two)], batch=3)
    assert report == check.Report(2, 0.5, 2, 1.0, 1.0, 0.5, 0.5)


def test_captions_parse_back() -> None:
    every = [scene for held in (True, False) for n in (1, 2) for scene in world.scenes(held, n)]
    assert all(world.parse(scene.caption) == scene for scene in every)
    with pytest.raises(ValueError, match="a cat"):
        world.parse("a cat above a red circle")


def test_held_out_scenes_are_apart_from_training() -> None:
    trained = {caption for _, caption in world.Sampler(3).draw(4000)}
    assert trained.isdisjoint(check.held_out_prompts(10, 800))
    for n in (1, 2):
        for scene in world.scenes(held=True, objects=n):
            assert world.held_out(scene.inverse())
    seen = {(t.colour, t.shape) for scene in world.scenes(held=False, objects=1) for t in scene.things}
    assert len(seen) == len(world.COLOURS) * len(world.SHAPES)  # every object is seen, if not on every background


def test_objects_stay_apart_and_inside() -> None:
    rng = random.Random(5)
    for scene in world.scenes(held=False, objects=2)[::40]:
        (x1, y1, r1), (x2, y2, r2) = world.place(scene, rng)
        along = abs(y1 - y2) if scene.relation in ("above", "below") else abs(x1 - x2)
        assert along >= r1 + r2 + 2 or along >= (r1 + r2) * 1.2
        assert all(r + 2 <= v <= world.SIZE - r - 2 for v, r in ((x1, r1), (y1, r1), (x2, r2), (y2, r2)))


def test_vocabulary_has_each_word_once_and_every_byte() -> None:
    merges = learn_merges()
    ids = vocabulary(merges)
    assert len(ids) == 512 + len(merges) + 2 == max(ids.values()) + 1
    assert all(word + "</w>" in ids for word in WORDS)
    (row,) = token_ids(["a red circle left of a blue square on a black background"])
    assert len(row) == LENGTH
    assert row[0] == len(ids) - 2
    assert row[13:] == [len(ids) - 1] * 11
