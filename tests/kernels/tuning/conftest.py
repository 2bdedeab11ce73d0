"""Kernels that are wrong on purpose, a clock that does not wait, and verdicts of their own for each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from gguf_sd_kernels.tuning import launch as launches
from gguf_sd_kernels.tuning import verdicts
from gguf_sd_kernels.tuning.launch import Launch, Prepared

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The self-check is on, and nothing was found so far."""
    monkeypatch.setenv(verdicts.SWITCH, "1")
    monkeypatch.setattr(verdicts, "_of", {})
    monkeypatch.setattr(launches, "_measured", {})
    Prepared.forget()
    yield
    Prepared.forget()


class FakeClock:
    """Each call takes as long as ``cost`` says of the launch it was made with, 1 ms without one; time passes with
    calls alone, and they are run."""

    def __init__(self, cost: Callable[[Launch], float] = lambda launch: 2e-3):
        self.cost, self.time = cost, 0.0

    def now(self) -> float:
        return self.time

    def seconds(self, call: Callable[[], Tensor]) -> float:
        launch = next((c.cell_contents for c in call.__closure__ or () if isinstance(c.cell_contents, Launch)), None)
        call()
        seconds = 1e-3 if launch is None else self.cost(launch)
        self.time += seconds
        return seconds


@pytest.fixture
def fake_clock() -> type[FakeClock]:
    return FakeClock
