"""Findings on disk: what a killed process leaves of them goes with the next that writes there."""

from __future__ import annotations

import os
from pathlib import Path

from gguf_sd_kernels.tuning.store import read_entries, update_entries
from gguf_sd_kernels.writers import NAME, temporary_name


def test_what_another_left_unfinished_goes(tmp_path: Path) -> None:
    path, seen = tmp_path / "found.json", list[str]()
    left = tmp_path / temporary_name(path).name.replace(
        f"-{os.getpid()}-", f"-{os.getpid()}-1"
    )  # began at another time
    left.touch()

    def change(entries: dict[str, int]) -> dict[str, int]:
        seen.extend(os.listdir(tmp_path))
        return {**entries, "a": 1}

    update_entries(path, change)
    assert read_entries(path) == {"a": 1}
    assert len(seen) == 1, "the next one's own"
    assert NAME.fullmatch(seen[0]), "a name that says whose it is"
    assert os.listdir(tmp_path) == ["found.json"]
