"""Kernels tried in a process of their own: one that hangs or crashes ends that process and nothing else."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_sd_kernels.tuning.child import ChildError, run_in_child
from gguf_sd_kernels.tuning.launch import Launch, Product
from gguf_sd_kernels.tuning.operands import Use
from gguf_sd_kernels.tuning.self_check import Subject
from gguf_sd_kernels.tuning.tuner import Job

CPU = torch.device("cpu")
COMMAND = (sys.executable, str(Path(__file__).with_name("faulty_child.py")))
SMALL = Launch(16, 32, 32, warps=4, stages=2)
SUBJECTS = (
    Subject("dequantize", "float16", "Q4_0", sizes=(1, 1)),
    Subject("linear", "float16", "Q4_0", SMALL),
    Subject("layer norm", "float16", sizes=(32,)),
)
USES = ((Use(Product("linear", "Q4_0", 4, 32, 32)), 1),)


def run(monkeypatch: pytest.MonkeyPatch, fault: str, kernel: str, job: Job, quiet: float = 60) -> list[dict[str, Any]]:
    monkeypatch.setenv("FAULT", fault)
    monkeypatch.setenv("FAULTY", kernel)
    return list(run_in_child(job, CPU, COMMAND, quiet))


def verdicts(events: list[dict[str, Any]]) -> dict[str, str]:
    return {event["subject"]["kernel"]: event["verdict"] for event in events if "verdict" in event}


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("crash", "it ended its process, exit status 139"), ("raise", "RuntimeError: cannot be launched"),
     ("wrong", "DisagreementError"), ("chatter", "")],
)  # fmt: skip
def test_the_others_are_tried_all_the_same(fault: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    events = run(monkeypatch, fault, "linear_kernel", Job("float16", SUBJECTS))
    found = verdicts(events)
    assert found.keys() == {"dequantize", "linear", "layer norm"}
    assert found["linear"].startswith(reason)
    assert bool(found.pop("linear")) == bool(reason)
    assert set(found.values()) == {""}
    assert events[-1]["done"]


def test_a_kernel_that_hangs_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its child is ended; another one goes on with what is left. The one that only starts slowly is given its time."""
    started = time.monotonic()
    events = run(monkeypatch, "hang", "linear_kernel", Job("float16", SUBJECTS), quiet=8)
    assert verdicts(events) == {"dequantize": "", "linear": "it hangs: nothing came of it in 8 s", "layer norm": ""}
    assert time.monotonic() - started < 300
    assert events[-1]["done"]


def test_measurements_come_through(monkeypatch: pytest.MonkeyPatch) -> None:
    events = run(monkeypatch, "", "", Job("float16", (), USES, 600))
    (measured,) = [event["measured"] for event in events if "measured" in event]
    assert measured["product"]["n"] == 32
    assert min(measured[mode] for mode in ("fused", "dequantize", "resident")) > 0
    assert any("rates" in event for event in events)


def test_a_child_that_cannot_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ChildError, match="no driver that this can use"):
        run(monkeypatch, "mute", "", Job("float16", SUBJECTS))
    with pytest.raises(ChildError, match="no process can be started"):
        list(run_in_child(Job("float16", SUBJECTS), CPU, ("/nowhere/python",)))
