"""Files, folders, pictures and texts that almost make sense end in success or in one sentence, seed by seed.

20,000 of them at each run of the tests; `python -m tests.fuzz` takes as many as there is time for.
"""

from __future__ import annotations

import logging
import random
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gguf_sd.checkpoint.model_file import ModelFile
from tests.fuzz.cases import Cases
from tests.fuzz.gguf_mutator import mutated, mutated_json
from tests.fuzz.material import SMALL

KINDS = ("gguf", "safetensors", "ckpt", "folder", "tokenizer", "picture", "parts", "lora", "embedding", "control",
         "imatrix", "text", "recorded", "rows", "bench", "hub", "request")  # fmt: skip
CASES = 20_000  # in all
SECONDS = 1.0  # of the processor's time, for any case
MEGABYTES = 300  # that the largest case may add to the process


@pytest.fixture(scope="module")
def cases(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cases]:
    logging.disable(logging.WARNING)  # what files are told of is not looked at
    yield Cases(tiny_pipeline(safety=True, **SMALL), tmp_path_factory.mktemp("fuzz"))
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", KINDS)
def test_replay(cases: Cases, kind: str) -> None:
    before, refused, count = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, -(-CASES // len(KINDS))
    for seed in range(count):
        try:
            outcome = cases.run(kind, seed)
        except BaseException as error:
            raise AssertionError(f"{kind} {seed}: {type(error).__name__}: {str(error)[:500]}") from error
        assert outcome.seconds < SECONDS, f"{kind} {seed}"
        refused += bool(outcome.refused)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEGABYTES << 10
    assert refused < count, "some must be fine, or nothing is looked at"
    assert kind == "text" or refused > count / 5


def test_every_kind_is_replayed(cases: Cases) -> None:
    assert set(KINDS) == set(cases.kinds)


@given(rng=st.randoms(use_true_random=False), kind=st.sampled_from(KINDS))
@settings(max_examples=20, deadline=None, database=None, derandomize=True,
          suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip
def test_what_hypothesis_draws(cases: Cases, rng: random.Random, kind: str) -> None:
    """It chooses among the mutations itself, and makes what it finds smaller."""
    cases.run(kind, rng.randrange(1 << 30))


def test_a_whole_file_is_fine(cases: Cases, tmp_path: Path) -> None:
    (tmp_path / "m.gguf").write_bytes(cases.parts.to_bytes())
    assert ModelFile.open(tmp_path / "m.gguf").config == ModelFile.open(cases.whole).config
    assert mutated(cases.parts, random.Random(0)) == mutated(cases.parts, random.Random(0)), "by its seed alone"


def test_a_case_leaves_what_the_next_begins_with() -> None:
    """Or cases grow, and none is the same by itself."""
    values = {"a": [1, {"b": [2]}], "c": {}}
    for seed in range(100):
        mutated_json(values, random.Random(seed))
    assert values == {"a": [1, {"b": [2]}], "c": {}}
