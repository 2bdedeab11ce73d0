"""JSON of strangers: however it is written, it costs a sentence and little memory."""

from __future__ import annotations

import json
import tracemalloc

import pytest

from gguf_sd.errors import GgufSdError
from gguf_sd.json_text import MAX_DEPTH, MAX_TABLE, json_object


def nested(depth: int, lists: bool) -> str:
    return '{"a":' + ("[" if lists else '{"a":') * (depth - 1) + "1" + ("]" if lists else "}") * (depth - 1) + "}"


@pytest.mark.parametrize("lists", [True, False])
def test_depth(lists: bool) -> None:
    assert json_object(nested(MAX_DEPTH, lists), "x")
    for depth in (MAX_DEPTH + 1, 500, 100_000):
        with pytest.raises(GgufSdError, match=r"^x is no JSON object that can be read: it is nested"):
            json_object(nested(depth, lists), "x")


@pytest.mark.parametrize("item", ["[],", "{},", '{"":0},', "7,", '"",', "1.5,"])
def test_memory(item: str) -> None:
    text = '{"a":[' + item * ((MAX_TABLE - 20) // len(item)) + "0]}"
    tracemalloc.start()
    with pytest.raises(GgufSdError, match="x holds too many values"):
        json_object(text.encode(), "x", MAX_TABLE)
    assert tracemalloc.get_traced_memory()[1] < MAX_TABLE * 1.1
    tracemalloc.stop()


def test_a_table_of_tensors_is_not_too_many() -> None:
    rows = range(20_000)  # a training checkpoint of SDXL with its optimiser has 8,000
    row = {"dtype": "F16", "shape": [320, 4, 3, 3], "data_offsets": [0, 4]}
    assert len(json_object(json.dumps(dict.fromkeys(map(str, rows), row)), "x", MAX_TABLE)) == len(rows)
