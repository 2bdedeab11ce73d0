"""Progress bars for people: on stderr, and only where that is a terminal."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm


def progress_bar(total: float | None = None, quiet: bool = False, **settings: Any) -> tqdm:
    """A tqdm bar, which shows nothing when ``quiet`` or where stderr is a file or a pipe: a log would get a line at
    every update. ``settings`` are tqdm's (``unit``, ``desc``, …)."""
    from tqdm import tqdm

    return tqdm(total=total, disable=quiet or not sys.stderr.isatty(), **settings)
