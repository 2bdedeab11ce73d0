"""The planner's promises, on made-up models and workloads."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gguf_sd.config import SD15, SD15_INPAINT, SDXL, ModelConfig, SafetyConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.runtime.memory import PLACEMENTS, MemoryPlan
from gguf_sd.runtime.part_bytes import PartBytes
from gguf_sd.runtime.plan import Machine, Planner, Workload
from gguf_sd.runtime.plan_text import as_dict, changes, table

MB = 10**6
COUNTS = st.integers(1 << 10, 1 << 30)


@st.composite
def part(draw: st.DrawFn, quantized: bool) -> PartBytes:
    plain = draw(COUNTS)
    blocks = draw(COUNTS) if quantized else 0
    values = plain + 2 * blocks
    stage_blocks, stage_plain = draw(st.integers(0, blocks)), draw(st.integers(0, plain // 2))
    return PartBytes(
        2 * plain + blocks, values, blocks, plain, 2 * stage_blocks, plain // 100, stage_blocks, stage_plain
    )


@st.composite
def planner(draw: st.DrawFn) -> Planner:
    config: ModelConfig = draw(st.sampled_from([SD15, SD15_INPAINT, SDXL, replace(SD15, safety=SafetyConfig())]))
    parts = {f"text {i}": draw(part(False)) for i in range(len(config.text))}
    parts |= {"unet": draw(part(True)), "vae": draw(part(False))}
    if config.safety:
        parts["safety"] = draw(part(False))
    side = st.integers(1, 200)
    load = Workload(
        size=(draw(side), draw(side)),
        pictures=draw(st.integers(1, 8)),
        guided=draw(st.booleans()),
        chunks=draw(st.integers(1, 4)),
        encodes=draw(st.booleans()),
    )
    sizes = st.sampled_from([2, 4])
    machine = Machine(draw(st.booleans()), draw(sizes), draw(sizes), draw(st.integers(0, 1 << 30)), draw(st.booleans()))
    weights = draw(st.sampled_from(["auto", "auto", "quantized", "resident"]))
    return Planner(config, config.vae, draw(st.booleans()), parts, load, machine, weights)


@given(planner(), st.lists(st.floats(0, 3), min_size=2, max_size=6))
@settings(max_examples=20, deadline=None)
def test_what_is_promised_of_every_plan(some: Planner, shares: list[float]) -> None:
    """Never over budget, more budget is never slower, every part is placed, equal plans for equal arguments."""
    least = some.smallest.peak
    seconds = []
    for budget in sorted(int(least * (1 + share)) for share in shares):
        plan = some.plan(budget)
        assert (plan.peak <= budget, plan.budget) == (True, budget)
        assert plan.peak == max(some.stage_peaks(plan).values())
        assert set(plan.placement) == set(some.parts)
        assert set(plan.placement.values()) <= set(PLACEMENTS)
        assert plan.placement["vae"] != "streamed"
        assert plan.weights == some.weights or some.weights == "auto"
        assert plan.weights == "quantized" or plan.placement["unet"] != "streamed"
        assert plan.vae_tile is None or plan.vae_tile < max(some.workload.size)
        assert not (plan.frugal and some.machine.gpu)
        seconds.append(some.seconds(plan))
        assert replace(some).plan(budget) == plan
    assert all(tight >= roomy for tight, roomy in itertools.pairwise(seconds))
    with pytest.raises(GgufSdError, match=r"needs at least \d+\.\d\d GiB of memory"):
        some.plan(least - 1)


@given(planner(), st.floats(0, 3))
@settings(max_examples=20, deadline=None)
def test_stepping_down_takes_less(some: Planner, share: float) -> None:
    plan = some.plan(int(some.smallest.peak * (1 + share)))
    lower = some.step_down(plan)
    if lower is None:
        assert plan.peak == some.smallest.peak
    else:
        assert lower.peak < plan.peak
        assert changes(plan, lower)


@given(planner())
@settings(max_examples=15, deadline=None)
def test_the_words_that_ask_for_a_placement(some: Planner) -> None:
    some = replace(some, weights="auto")
    streamed = replace(some, placement="streamed").plan(1 << 60)
    assert {placed for name, placed in streamed.placement.items() if name != "vae"} == {"streamed"}
    assert set(replace(some, placement="staged").plan(1 << 60).placement.values()) == {"staged"}
    everything = some.plan(1 << 60)
    assert set(everything.placement.values()) == {"resident"}
    assert (everything.weights, everything.batch_guidance, everything.vae_tile) == ("resident", True, None)


# What the published models have in q4_0, by their headers.
SD15_PARTS = {
    "text 0": PartBytes(246363648, 123060480, 0, 123060480, 0, 121344, 0, 7077888),
    "unet": PartBytes(487983376, 859520964, 482065920, 2514884, 29491200, 443844, 27648000, 0),
    "vae": PartBytes(167439612, 83653863, 0, 83653863, 0, 65943, 0, 2359296),
}


def of_sd15(size: int, pictures: int = 1, gpu: bool = False) -> Planner:
    machine = Machine(gpu, 2 if gpu else 4, 2 if gpu else 4, 64 * MB if gpu else 320 * MB)
    return Planner(SD15, SD15.vae, False, SD15_PARTS, Workload((size // 8, size // 8), pictures), machine)


def test_sd15_on_small_machines() -> None:
    """Where there is little, what is cheapest to do without goes first."""
    tight, some, much = (of_sd15(512).plan(budget * MB) for budget in (900, 1500, 8000))
    assert (tight.weights, tight.placement["unet"], tight.placement["text 0"]) == ("quantized", "streamed", "staged")
    assert tight.vae_tile is not None
    assert (some.weights, some.placement["unet"], some.batch_guidance) == ("quantized", "staged", True)
    assert (much.weights, much.keep, much.vae_tile) == ("resident", {"text", "unet", "vae"}, None)
    assert of_sd15(512, gpu=True).plan(1000 * MB).placement["unet"] != "streamed"
    assert of_sd15(512, gpu=True).smallest.peak < 500 * MB


def test_what_is_too_much_is_refused_at_once() -> None:
    with pytest.raises(
        GgufSdError,
        match=r"Stable Diffusion 1.x at 160000x160000 in batches of 4 needs at least \d+\.\d\d GiB of memory, 7.46 GiB "
        "may be used; give more with --max-memory, or take a smaller --batch, or a smaller size",
    ):
        of_sd15(160000, 4).plan(8000 * MB)


def test_a_plan_for_people() -> None:
    some = of_sd15(512)
    plan = some.plan(1000 * MB)
    text = table(plan, some)
    assert "512x512, 1 at once" in text
    assert "budget     0.94 GiB" in text
    assert all(stage in text for stage in ("text 0", "unet", "vae decode", "layer by layer"))
    facts = as_dict(plan, some)
    assert max(facts["stages"].values()) == facts["peak"] <= facts["budget"] == 1000 * MB
    assert isinstance(plan, MemoryPlan)


@pytest.mark.parametrize("names", [{"weights": "int4"}, {"placement": "disk"}])
def test_modes_that_are_none(names: dict[str, str]) -> None:
    with pytest.raises(GgufSdError, match="choose from auto"):
        replace(of_sd15(512), **names)  # type: ignore[arg-type]
