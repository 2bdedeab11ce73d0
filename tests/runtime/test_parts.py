"""What is loaded when: parts are kept as memory allows, whichever way the UNet's weights lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from gguf_sd.models.layers import Quantized
from gguf_sd.pipeline import Pipeline
from gguf_sd.request import Request
from gguf_sd.runtime import host_heap
from gguf_sd.runtime.cuda_graph import Graphing
from gguf_sd.runtime.part_bytes import part_bytes
from gguf_sd.runtime.plan import Planner
from gguf_sd_kernels.cpu import scratch
from gguf_sd_kernels.reference import products

SETTINGS: dict[str, Any] = {"steps": 2, "width": 32, "height": 32, "seed": 3, "safety": "off"}
EVERY_PART = {"text 0", "unet", "vae"}


def load(path: Path, weights: str = "quantized") -> Pipeline:
    return Pipeline.load(path, "cpu", "float32", weights)


def with_least_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As little as the smallest plan with weights in blocks takes."""
    monkeypatch.setattr(Planner, "plan", lambda self, budget: replace(self, weights="quantized").smallest)


@pytest.mark.parametrize("weights", ["quantized", "resident"])
def test_parts_are_loaded_once(tiny_model: Path, weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For all batches of a job, and for the next job."""
    loads: list[str] = []
    for name in ("load_unet", "load_vae", "load_text"):
        original = getattr(type(load(tiny_model).model), name)
        monkeypatch.setattr(
            type(load(tiny_model).model),
            name,
            lambda *a, name=name, original=original, **k: loads.append(name) or original(*a, **k),  # type: ignore[func-returns-value]
        )
    pipeline = load(tiny_model, weights)
    first = pipeline("a cat", count=3, **SETTINGS)
    assert sorted(loads) == ["load_text", "load_unet", "load_vae"]
    assert [p.tobytes() for p in pipeline("a cat", count=3, **SETTINGS)] == [p.tobytes() for p in first]
    assert len(loads) == 3


def test_without_memory_nothing_is_kept(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = load(tiny_model)
    expected = [picture.tobytes() for picture in kept("a cat", count=2, guidance=1, **SETTINGS)]
    assert kept.parts.names == EVERY_PART
    with_least_memory(monkeypatch)
    pipeline = load(tiny_model)
    assert [picture.tobytes() for picture in pipeline("a cat", count=2, guidance=1, **SETTINGS)] == expected
    assert pipeline.parts.names == set()
    assert pipeline.parts.loads == {"text 0": 1, "unet": 2, "vae": 2}


def test_a_changed_decision_reloads(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Less memory, other weights; and what is reported is what ran."""
    pipeline = load(tiny_model, "auto")

    def ran() -> tuple[str, bool]:
        unets: list[Any] = []
        job = pipeline.prepare(Request("a cat", **SETTINGS))
        (picture,) = pipeline.paint(job, lambda step: unets.append(pipeline.parts._loaded["unet"].part))
        return picture.weights, any(isinstance(module, Quantized) for module in unets[-1].modules())

    assert ran() == ("resident", False)
    with_least_memory(monkeypatch)
    assert ran() == ("quantized", True)
    assert pipeline.parts.loads["unet"] == 2
    monkeypatch.undo()
    assert ran() == ("resident", False)
    assert ran() == ("resident", False)
    assert pipeline.parts.loads["unet"] == 3
    pipeline.execution = replace(pipeline.execution, dtype=torch.bfloat16)
    pipeline("a cat", **SETTINGS)
    assert pipeline.parts.loads["unet"] == 4
    assert pipeline.parts.loads["vae"] >= 2


def test_what_is_loaded_already_does_not_change_the_plan(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory that the first picture's model takes is not missing for the second's."""
    pipeline = load(tiny_model, "auto")
    job = pipeline.prepare(Request("a cat", **SETTINGS))
    monkeypatch.setattr("gguf_sd.runtime.memory.available_memory", lambda device: 10**9 - pipeline.parts.nbytes)
    before = pipeline.memory_plan(job)
    (first,) = pipeline.paint(job)
    assert pipeline.parts.nbytes > 100_000, "nothing was kept, so nothing could be missing"
    after = pipeline.memory_plan(job)
    assert abs(after.peak - before.peak) < 1 << 20  # the process itself grows by pages meanwhile
    assert replace(after, peak=before.peak, budget=before.budget) == before
    (second,) = pipeline.paint(job)
    assert pipeline.parts.loads["unet"] == 1
    assert first.image.tobytes() == second.image.tobytes()


class Capture:
    """Stands for CudaCapture where there is no GPU."""

    made: ClassVar[list[Capture]] = []

    def __init__(self, device: torch.device) -> None:
        self.captures = 0
        self.made.append(self)

    def __call__(self, run: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.captures += 1
        return run

    def reserved(self) -> int:
        return 1000 * self.captures


def with_graphs(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    """As if there were a GPU."""
    monkeypatch.setattr("gguf_sd.pipeline.use_graphs", lambda asked, device, kernels, passes: Graphing(mode, passes))
    monkeypatch.setattr("gguf_sd.runtime.parts.CudaCapture", Capture)
    monkeypatch.setattr(Capture, "made", [])


@pytest.mark.parametrize("weights", ["quantized", "resident"])
def test_a_step_is_captured_once_a_unet_and_shape(
    tiny_model: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = load(tiny_model, weights)
    plain = pipeline("a cat", count=2, **SETTINGS)
    with_graphs(monkeypatch, "on")
    job = pipeline.prepare(Request("a cat", count=2, **SETTINGS))
    for _ in range(2):
        painted = list(pipeline.paint(job))
        assert [p.image.tobytes() for p in painted] == [p.tobytes() for p in plain]
        assert [p.graph_bytes for p in painted] == [1000, 1000]
    assert [capture.captures for capture in Capture.made] == [1]
    pipeline.parts.drop("unet")
    assert pipeline.parts.graph_bytes == 0
    list(pipeline.paint(job))
    assert [capture.captures for capture in Capture.made] == [1, 1], "graphs outlived their UNet"


def test_few_steps_are_captured_when_they_are_painted_again(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the next call that asks for such a picture, and by the next batch of one; by no other size's."""
    pipeline = load(tiny_model)
    with_graphs(monkeypatch, "auto")
    small, large = (pipeline.prepare(Request("a cat", **SETTINGS | {"height": height})) for height in (32, 64))
    batches = pipeline.prepare(Request("a cat", count=3, batch=2, **SETTINGS | {"height": 48}))
    for job, captures in ((small, 0), (large, 0), (small, 1), (small, 1), (large, 2), (batches, 2), (batches, 4)):
        list(pipeline.paint(job))
        assert [capture.captures for capture in Capture.made] == [captures]
    assert pipeline.parts.graph_bytes == 4000


def test_parts_go_by_kind(tiny_model: Path) -> None:
    pipeline = load(tiny_model)
    pipeline("a cat", **SETTINGS)
    pipeline.parts.drop_all(but=frozenset({"text", "vae"}))
    assert pipeline.parts.names == {"text 0", "vae"}
    pipeline.parts.drop_all()
    assert (pipeline.parts.names, pipeline.parts.nbytes) == (set(), 0)


@pytest.mark.parametrize("weights", ["quantized", "resident"])
def test_the_sizes_of_parts(tiny_model: Path, weights: str) -> None:
    """Those that the header gives, against what is loaded: blocks, and values in the dtype."""
    pipeline = load(tiny_model, weights)
    pipeline("a cat", **(SETTINGS | {"safety": "blur"}))
    for name, counts in part_bytes(pipeline.model).items():
        part, counts = pipeline.parts._loaded[name].part, counts.decoder  # of the VAE
        blocks = sum(m.blocks.nbytes for m in part.modules() if isinstance(m, Quantized))
        values = sum(p.numel() for p in part.parameters())
        assert blocks + 4 * values == counts.loaded(4, weights if name == "unet" else "resident")
        if weights == "resident":
            assert values == counts.values


def test_a_vae_that_only_decodes_is_its_decoder(tiny_model: Path) -> None:
    """The encoder comes once a picture is started from, and both give the same picture."""
    pipeline = load(tiny_model)
    (picture,) = pipeline("a cat", **SETTINGS)
    assert not hasattr(pipeline.parts._loaded["vae"].part, "encoder")
    pipeline("a cat", image=picture, **SETTINGS)
    assert hasattr(pipeline.parts._loaded["vae"].part, "encoder")
    latents = torch.randn(1, pipeline.model.config.vae.latent_channels, 4, 4)
    halves = [pipeline.model.load_vae(torch.float32, encodes).decode(latents) for encodes in (False, True)]
    assert torch.equal(*halves)


def test_a_frugal_plan_paints_the_same(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, with large weights decoded in parts, and what is freed given back at once."""
    monkeypatch.setattr(products, "PART_VALUES", 1 << 10)
    expected = load(tiny_model)("a cat", **SETTINGS)[0].tobytes()
    pipeline, told = load(tiny_model), []
    original = pipeline.planning.plan
    monkeypatch.setattr(pipeline.planning, "plan", lambda planner: replace(original(planner), frugal=True))
    job = pipeline.prepare(Request("a cat", **SETTINGS))
    try:
        (picture,) = pipeline.paint(job, lambda step: told.append((scratch.in_parts(), host_heap._state["frugal"])))
    finally:
        host_heap.be_frugal(False)
    assert told == [(True, True)] * 2
    assert picture.image.tobytes() == expected
