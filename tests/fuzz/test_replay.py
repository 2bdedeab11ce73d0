"""Files and texts that almost make sense end in success or in one sentence, seed by seed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.png_metadata import parse_parameters
from gguf_sd.prompt.prompts import parse, unsupported
from gguf_sd_convert.convert import ConvertOptions, convert
from tests.fuzz.gguf_mutator import mutated, take_apart
from tests.fuzz.text_mutator import mutated_settings, mutated_text

SECONDS = 2.0  # of the processor's time, for any case


def test_damaged_gguf_files(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    whole, damaged = tmp_path / "whole.gguf", tmp_path / "damaged.gguf"
    convert(tiny_pipeline(), whole, ConvertOptions(type="q4_0"))
    parts = take_apart(whole)
    damaged.write_bytes(parts.to_bytes())
    assert ModelFile.open(damaged).config == ModelFile.open(whole).config, "taken apart and put together it is the same"
    refused = 0
    for seed in range(200):
        damaged.write_bytes(mutated(parts, random.Random(seed)))
        started = time.process_time()
        try:
            ModelFile.open(damaged)
        except GgufSdError:
            refused += 1
        assert time.process_time() - started < SECONDS, seed
    assert 100 < refused < 200


def test_prompts_and_settings() -> None:
    for seed in range(200):
        rng = random.Random(seed)
        prompt, settings = mutated_text(rng), mutated_settings(rng)
        started = time.process_time()
        parts = parse(prompt)
        list(unsupported(prompt))
        with suppress(ValueError, GgufSdError):
            parse_parameters(settings)
        assert time.process_time() - started < SECONDS, seed
        assert all(part.text is None or part.text for part in parts)
