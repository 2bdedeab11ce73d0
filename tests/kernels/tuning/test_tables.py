"""Whatever a table's file holds, only what can have been measured comes out of it, and nothing but ValueError."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.tuning.launch import ALLOWED, UNTUNED, Launch, Measured, Product, load_measured, measured_entries
from gguf_sd_kernels.tuning.tables import read_table

CPU = torch.device("cpu")
GOOD = measured_entries({Product("linear", "Q4_0", 4, 32, 32): Measured(UNTUNED["mma"][0][1], 1.0, 2.0, 3.0)})[0]
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.just("linear"))
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)


@st.composite
def entries(draw: st.DrawFn) -> Any:
    """A product's entry with a field, or all of it, replaced by anything."""
    entry = {**GOOD, "product": {**GOOD["product"]}, "launch": {**GOOD["launch"]}}
    owner = draw(st.sampled_from([entry, entry["product"], entry["launch"]]))
    owner[draw(st.sampled_from([*owner, "unknown"]))] = draw(values)
    return draw(st.sampled_from([entry, draw(values)]))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tables") / "cpu.json"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(entries(), max_size=3), tuned=values)
@example(found=[GOOD | {"fused": 10**400}], tuned=[])
def test_what_comes_out_can_have_been_measured(found: list[Any], tuned: Any, path: Path) -> None:
    path.write_text(json.dumps({"products": found, "tuned": tuned}))
    products, names = read_table(path)
    assert all(isinstance(name, str) for name in names)
    for product, known in products.items():
        assert min(product.m, product.n, product.k, product.taps) > 0
        assert 0 < known.fused < float("inf")
        for name, allowed in ALLOWED.items():
            assert getattr(known.launch, name) in allowed
        assert Launch.checked(asdict(known.launch)) == known.launch
    if products:
        assert load_measured(path, gpu_of(CPU)) == len(products)
    elif found and isinstance(tuned, list | str | dict):
        with pytest.raises(ValueError, match="is no table of kernel measurements"):
            load_measured(path, gpu_of(CPU))
