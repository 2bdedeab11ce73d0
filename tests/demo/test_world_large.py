"""The larger world and its checker: what is rendered is read back, and what is wrong is called wrong."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gguf_sd.demo import check_large, world_large
from gguf_sd.demo.world import COLOURS, RELATIONS, SHAPES
from gguf_sd.demo.world_large import Background, Group, Scene, View

PICTURES = 200


@pytest.fixture(scope="module")
def gallery() -> tuple[list[Scene], Tensor]:
    scenes = world_large.Sampler(7, named=1.0).draw(PICTURES)
    offsets = torch.rand(PICTURES, world_large.OFFSETS, generator=torch.Generator().manual_seed(7)) * 2 - 1
    return scenes, world_large.render(scenes, offsets)


@pytest.mark.parametrize("noise", [0.0, 0.08])
def test_checker_reads_what_was_rendered(gallery: tuple[list[Scene], Tensor], noise: float) -> None:
    scenes, pictures = gallery
    spoilt = pictures + noise * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(1))
    right = [check_large.judge(picture, scene).all for scene, picture in zip(scenes, spoilt, strict=True)]
    assert sum(right) >= 0.995 * PICTURES


def wrong_scenes(scene: Scene) -> dict[str, Scene]:
    """The scene with one thing changed, by what the checker must find wrong."""
    first = scene.first
    colour = next(c for c in COLOURS if c not in {group.colour for group in scene.groups})
    texture = "striped" if scene.background and scene.background.texture != "striped" else "plain"
    assert scene.background is not None
    wrong = {
        "colours": replace(scene, first=replace(first, colour=colour)),
        "objects": replace(scene, first=replace(first, shape=next(s for s in SHAPES if s != first.shape))),
        "sizes": replace(scene, first=replace(first, size="small" if first.size != "small" else "large")),
        "background": replace(scene, background=replace(scene.background, texture=texture)),
        "background ": replace(scene, background=Background("grey" if scene.background.tone != "grey" else "black")),
    }
    if scene.relation is not None:
        wrong["relation"] = replace(scene, relation=RELATIONS[scene.relation])
    return wrong


def test_checker_finds_every_kind_of_mistake(gallery: tuple[list[Scene], Tensor]) -> None:
    for scene, picture in zip(gallery[0][:30], gallery[1], strict=False):
        for what, wrong in wrong_scenes(scene).items():
            verdict = check_large.judge(picture, wrong)
            assert not getattr(verdict, what.strip()), (what, scene)
            assert not verdict.all
            if what != "colours":  # which decide what is compared with what
                others = {"objects", "colours", "sizes", "relation", "background"} - {what.strip()}
                assert all(getattr(verdict, other) for other in others), (what, scene)


def test_checker_counts_objects() -> None:
    three = Scene(Group("red", "ring", None, 3))
    (picture,) = world_large.render([three], torch.zeros(1, world_large.OFFSETS))
    assert check_large.judge(picture, three).all
    verdict = check_large.judge(picture, Scene(Group("red", "ring", None, 2)))
    assert (verdict.objects, verdict.colours, verdict.sizes) == (False, False, False)
    assert not check_large.judge(torch.rand(3, 128, 128) * 2 - 1, three).objects
    with pytest.raises(ValueError, match="want \\[3, 128, 128\\]"):
        check_large.judge(picture[:, :64], three)


def test_captions_parse_back() -> None:
    for scene in world_large.Sampler(1, named=0.5).draw(500):
        assert world_large.parse(scene.caption) == scene
    wrong = (
        "a cat",
        "two red circle",
        "a tiny red circle",
        "two red circles above a blue square",
        "a red circle on a dotted black background",
    )
    for caption in wrong:
        with pytest.raises(ValueError, match="got"):
            world_large.parse(caption)


def test_held_out_scenes_are_apart_from_training() -> None:
    prompts = world_large.held_out_prompts(500)
    assert {scene.caption for scene in world_large.Sampler(3).draw(5000)}.isdisjoint(prompts)
    for prompt in prompts:
        scene = world_large.parse(prompt)
        assert world_large.held_out(scene)
        assert world_large.held_out(scene.inverse())
    kinds = [world_large.parse(prompt).kind for prompt in prompts]
    assert [kinds.count(kind) for kind in world_large.KINDS] == [100, 100, 300]


def test_a_crop_moves_the_scene_and_a_small_original_blurs_it() -> None:
    scene, still = Scene(Group("red", "square")), torch.zeros(1, world_large.OFFSETS)
    views = [View(), View(left=20, top=10), View(original=32)]
    plain, cut, blurred = (world_large.render([scene], still, [view])[0] for view in views)
    (before,), (after,) = check_large.read(plain).objects, check_large.read(cut).objects
    assert (before.x - after.x, before.y - after.y) == pytest.approx((20, 10), abs=0.5)

    def edges(picture: Tensor) -> float:
        return float(picture.diff(dim=2).abs().max())

    assert edges(blurred) < 0.5 * edges(plain)
