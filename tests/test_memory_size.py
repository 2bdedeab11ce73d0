"""Amounts of memory as users of several programs write them."""

from __future__ import annotations

import pytest

from gguf_sd.errors import GgufSdError
from gguf_sd.memory_size import memory_text, parse_memory
from gguf_sd.runtime.execution import Execution


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1GiB", 1 << 30),
        ("1.5GB", 1_500_000_000),
        ("800MB", 800_000_000),
        ("800 mb", 800_000_000),
        ("1g", 1 << 30),
        ("512m", 512 << 20),
        ("0.5", 1 << 29),
        (".5", 1 << 29),
        (2, 2 << 30),
        (1.5, 3 << 29),
        ("0", None),
        ("-1", None),
        ("auto", None),
        ("", None),
        (None, None),
    ],
)
def test_amounts(text: str | float | None, nbytes: int | None) -> None:
    assert parse_memory(text) == nbytes


@pytest.mark.parametrize("text", ["much", "1 2", "1x", "GiB", "1e999", "nan", "inf", True, "1GiB2", "١", "1" * 400])
def test_what_is_no_amount(text: str) -> None:
    with pytest.raises(GgufSdError, match=r"--max-memory is .* (it takes an amount|more than any machine has)"):
        parse_memory(text)


def test_bytes_given_as_a_number_are_told_from_gibibytes() -> None:
    with pytest.raises(GgufSdError, match="a plain number counts GiB"):
        parse_memory(4_000_000_000)


def test_text_is_rounded_up() -> None:
    """Who gives as much as an error asks for has given enough."""
    for nbytes in (1, 12345678, (1 << 30) - 1, 1 << 30, (1 << 30) + 1):
        assert (parse_memory(memory_text(nbytes).replace(" ", "")) or 0) >= nbytes
    assert memory_text(1 << 30) == "1.00 GiB"


def test_the_environment_gives_the_budget_where_nobody_else_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Execution.choose("cpu").max_memory is None
    monkeypatch.setenv("GGUF_SD_MAX_MEMORY", "1GB")
    assert Execution.choose("cpu").max_memory == 10**9
    assert Execution.choose("cpu", max_memory="2GB").max_memory == 2 * 10**9
    assert Execution.choose("cpu", max_memory="auto").max_memory is None
    monkeypatch.setenv("GGUF_SD_MAX_MEMORY", "lots")
    with pytest.raises(GgufSdError, match="GGUF_SD_MAX_MEMORY is 'lots'"):
        Execution.choose("cpu")
