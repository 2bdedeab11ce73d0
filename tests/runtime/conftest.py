"""A converted tiny model, for the tests of what is loaded and who paints when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_sd_convert.convert import ConvertOptions, convert


@pytest.fixture(scope="session")
def tiny_model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny SD 1.x in Q8_0, with a safety checker."""
    path = tmp_path_factory.mktemp("parts") / "tiny.gguf"
    convert(tiny_pipeline(safety=True), path, ConvertOptions(type="q8_0"))
    return path
