"""When a part of the measurements has to come to its end."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Deadline:
    """A part's share of the time: nothing new is started after ``seconds``."""

    seconds: float
    started: float = field(default_factory=time.monotonic)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    @property
    def passed(self) -> bool:
        return self.left <= 0
