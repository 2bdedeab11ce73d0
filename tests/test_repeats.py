"""The same settings give the same bytes: twice, and in whatever company a picture is painted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gguf_sd.cli.main import main
from gguf_sd.pipeline import Pipeline
from gguf_sd.sampling.names import SAMPLERS
from gguf_sd_convert.convert import ConvertOptions, convert

SIZE = {"width": 32, "height": 32, "seed": 7, "steps": 2}


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("repeats") / "tiny.gguf"
    convert(tiny_pipeline(), path, ConvertOptions(type="q8_0"))
    return path


@pytest.fixture(scope="module")
def pipelines(model: Path) -> list[Pipeline]:
    """The same model twice, weights in blocks and decoded."""
    return [Pipeline.load(model, "cpu", "float32", weights) for weights in ("quantized", "resident")]


def twice(pipeline: Pipeline, **settings: Any) -> None:
    first, second = ([image.tobytes() for image in pipeline("a cat", **SIZE, count=2, **settings)] for _ in range(2))
    assert first == second
    assert len(set(first)) == 2


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_repeats_itself(pipelines: list[Pipeline], sampler: str) -> None:
    twice(pipelines[0], sampler=sampler, batch=2)


def test_every_batch_size_and_way_to_keep_weights(pipelines: list[Pipeline]) -> None:
    for pipeline in pipelines:
        for batch in (1, 2):
            twice(pipeline, sampler="dpmpp_2m_sde", batch=batch)


def test_the_same_command_gives_the_same_file(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = [f"--{key}={value}" for key, value in SIZE.items()]
    for name in ("a.png", "b.png"):
        arguments = ["generate", str(model), "-p", "a cat", "-o", name, "--device", "cpu", "--quiet", *settings]
        assert main(arguments) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.slow
def test_five_hundred_pictures_need_no_more_memory_than_ten(model: Path) -> None:
    import resource

    pipeline = Pipeline.load(model, "cpu", "float32")
    peaks = []
    for index in range(500):
        pipeline("a cat", **(SIZE | {"seed": index, "steps": 1}))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(f"from the 11th to the 500th picture: {(peaks[-1] - peaks[10]) / 1024:.1f} MB more")
    assert peaks[-1] - peaks[10] < 20 << 10, "KiB"
