"""The user's own table of measurements: of this kind of GPU, with these versions of everything."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.tuning.fingerprint import file_name, fingerprint
from gguf_sd_kernels.tuning.launch import Measured, Product, measured_entries, measured_entry
from gguf_sd_kernels.tuning.store import Entries, read_entries, say_once, update_entries


def own_table(device: torch.device, folder: Path) -> Path:
    """Where it lies below ``folder``; in the format of :func:`gguf_sd_kernels.tuning.launch.save_measured`."""
    return folder / "tables" / file_name(device)


def read_table(path: Path) -> tuple[dict[Product, Measured], set[str]]:
    """What was measured, and the names of what was tuned. Damaged entries are left out, which is said once."""
    return _parsed(read_entries(path), path)


def _parsed(entries: Entries, path: Path) -> tuple[dict[Product, Measured], set[str]]:
    products: dict[Product, Measured] = {}
    listed, tuned = entries.get("products", []), entries.get("tuned", [])
    try:
        for entry in listed:
            product, values = measured_entry(entry)
            products[product] = values
        names = {name for name in tuned if isinstance(name, str)}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        say_once(f"{path} is damaged ({type(error).__name__}: {error}): it is measured anew")
        return {}, set()
    return products, names


def add_to_table(
    path: Path, device: torch.device, products: Mapping[Product, Measured], tuned: Collection[str] = ()
) -> None:
    """Adds to the file, whole or not at all; what others put there meanwhile stays."""

    def change(entries: Entries) -> dict[str, Any]:
        before, names = _parsed(entries, path)
        return {
            "gpu": gpu_of(device).name,
            "device": fingerprint(device),
            "tuned": sorted(names | set(tuned)),
            "products": measured_entries(before | dict(products)),
        }

    update_entries(path, change)
