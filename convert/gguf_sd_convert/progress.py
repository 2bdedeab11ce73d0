"""How far a conversion is, for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gguf_sd.cli import progress

Progress = Callable[[int, int, str], None]  # bytes of work done, bytes in all, "checking" or "converting"


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr, where that is a terminal."""
    with progress.progress_bar(unit="B", unit_scale=True, unit_divisor=1000) as bar:

        def show(done: int, total: int, doing: str) -> None:
            bar.total = total
            bar.set_description(doing, refresh=False)
            bar.update(done - bar.n)

        yield show
