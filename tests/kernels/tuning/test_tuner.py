"""The tuner with a clock that does not wait: what it measures first, when it stops, and what it finds."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gguf_sd_kernels.devices import Gpu, gpu_of
from gguf_sd_kernels.tuning import launch as launches
from gguf_sd_kernels.tuning import measure, tuner
from gguf_sd_kernels.tuning.cost import MOST, cost, worth_measuring
from gguf_sd_kernels.tuning.launch import UNTUNED, Launch, Measured, Product, measured_entry
from gguf_sd_kernels.tuning.operands import Operands, Use
from gguf_sd_kernels.tuning.self_check import DisagreementError, Subject
from gguf_sd_kernels.tuning.tables import add_to_table, own_table, read_table
from gguf_sd_kernels.tuning.tuner import Job, Tuner

CPU = torch.device("cpu")
LINEAR = Use(Product("linear", "Q4_0", 17, 48, 64), ("bias", "residual"))  # so small that no larger tiles are tried
GEGLU = Use(Product("geglu", "Q8_0", 5, 64, 32), ("bias",))
CONV = Use(Product("conv", "Q4_1", 20, 32, 9 * 32, 9), ("bias", "emb"), (1, 32, 4, 5), padding=1)
USES = ((LINEAR, 1), (GEGLU, 1), (CONV, 2))


def agrees(subject: Subject, device: torch.device) -> None:
    """In place of the self-check, which has tests of its own."""


def ran(tuner: Tuner) -> list[dict[str, Any]]:
    events = list(tuner.run())
    assert events.pop() == {"done": True}
    return [json.loads(json.dumps(event)) for event in events]


def found(events: list[dict[str, Any]]) -> dict[Product, Measured]:
    return dict(measured_entry(event["measured"]) for event in events if "measured" in event)


def test_everything_within_the_budget(fake_clock: Any) -> None:
    """The launch that the clock favours wins, those that agree are all timed, the largest share comes first."""

    def cost(launch: Launch) -> float:
        return 0.2e-3 / launch.splits

    events = ran(Tuner(Job("float16", (), USES, 1e9), CPU, fake_clock(cost), agrees))
    table = found(events)
    assert list(table) == [CONV.product, LINEAR.product, GEGLU.product]
    for product, known in table.items():
        splits = max(launch.splits for launch in worth_measuring(product, gpu_of(CPU)))
        assert known == Measured(known.launch, round(200 / splits, 2), 1000.0, 1000.0)
        assert (known.launch.splits, known.fastest) == (splits, "fused")
    assert any(known.launch.splits > 1 for known in table.values())
    assert [event["share"] for event in events if "share" in event][-1] == pytest.approx(1)
    verdicts = {Subject.from_json(event["subject"]): event["verdict"] for event in events if "verdict" in event}
    assert set(verdicts.values()) == {""}
    assert {(s.kernel, s.added) for s in verdicts} >= {("linear", LINEAR.added), ("conv", CONV.added)}


def test_the_budget_ends_it(fake_clock: Any) -> None:
    """2 ms of rates, 2 of the library, then launches of 50 ms: the budget ends in the second product."""
    launches_of_first = len(worth_measuring(CONV.product, gpu_of(CPU)))
    events = ran(
        Tuner(Job("float16", (), USES, 0.01 + 0.05 * launches_of_first), CPU, fake_clock(lambda launch: 50e-3))
    )
    table = found(events)
    assert list(table) == [CONV.product, LINEAR.product]
    assert all(known.fastest == "dequantize" for known in table.values())
    assert ran(Tuner(Job("float16", (), USES, 0), CPU, fake_clock())) == []


def test_what_is_wrong_or_raises_is_never_chosen(fake_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest launches: one disagrees in the check, one does not compile, one fails at full size."""
    gpu = gpu_of(CPU)
    first, second, third, *_ = worth_measuring(CONV.product, gpu)

    def check(subject: Subject, device: torch.device) -> None:
        assert subject.launch is not None or subject.kernel == "dequantize"
        if subject == Subject.of_product(CONV, torch.float16, first):
            raise DisagreementError("wrong")
        if subject == Subject.of_product(CONV, torch.float16, second):
            raise RuntimeError("PassManager::run failed")

    real = Operands.call

    def call(operands: Operands, launch: Launch, *more: Any) -> torch.Tensor:
        return real(operands, launch, *more) * (1.1 if launch == third else 1)

    monkeypatch.setattr(Operands, "call", call)
    order = [first, second, third]
    clock = fake_clock(lambda launch: 1e-6 if launch in order else 5e-3)
    events = ran(Tuner(Job("float16", (), ((CONV, 1),), 1e9), CPU, clock, check))
    assert found(events)[CONV.product].launch not in order
    reasons = {event["verdict"] for event in events if event.get("verdict")}
    assert reasons == {"DisagreementError: wrong", "RuntimeError: PassManager::run failed",
                       "ArithmeticError: its result at full size is off by 0.1 of the library's"}  # fmt: skip


def test_a_lack_of_memory_is_no_verdict(fake_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tuner, "time_launch", full)
    events = ran(Tuner(Job("float16", (), USES, 1e9), CPU, fake_clock(), agrees))
    assert found(events) == {}
    assert not any(event.get("verdict") for event in events)
    monkeypatch.setattr(tuner, "Operands", full)
    assert found(ran(Tuner(Job("float16", (), USES, 1e9), CPU, fake_clock(), agrees))) == {}


def test_a_dead_gpu_ends_the_process(fake_clock: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After an illegal access every call fails: the kernels after it are not to blame."""

    def gone(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tuner, "proof_of_life", gone)
    subjects = tuple(Subject("layer norm", "float16", sizes=(width,)) for width in (16, 32))
    told = iter(Tuner(Job("float16", subjects), CPU, fake_clock(), gone).run())
    assert [next(iter(next(told))) for _ in range(3)] == ["begin", "verdict", "end"]
    with pytest.raises(RuntimeError, match="illegal"):
        next(told)


def test_jobs_are_written_and_read() -> None:
    subject = Subject.of_product(CONV, torch.float16, UNTUNED["mma"][2][1])
    job = Job("bfloat16", (subject,), USES, 3.5, ((subject, "bad"),))
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job


@pytest.mark.parametrize("family", UNTUNED)
def test_at_most_four_candidates_and_the_one_in_use(family: str) -> None:
    gpu = Gpu("Some GPU", family, 100)
    for m in (1, 77, 256, 1024, 8192):
        for product in (Product("linear", "Q4_0", m, 1280, 5120), Product("conv", "Q4_0", m, 320, 2880, 9)):
            tried = worth_measuring(product, gpu)
            assert 1 <= len(tried) == len(set(tried)) <= MOST
            assert tried[0] == launches.untuned(product, gpu)
            best = min(launches.candidates(product, family, 100), key=lambda launch: cost(product, launch, 100))
            assert best in tried
    assert worth_measuring(Product("linear", "Q4_0", 64, 64, 64), Gpu("old", None, 10)) == []


def test_the_model_prefers_tiles_that_fill_the_gpu() -> None:
    small, large = Launch(64, 64, 64, 4, 4), Launch(256, 128, 64, 8, 3)
    few, many = Product("linear", "Q4_0", 256, 1280, 1280), Product("linear", "Q4_0", 16384, 5120, 1280)
    assert cost(few, small, 132) < cost(few, large, 132)
    assert cost(many, large, 132) < cost(many, small, 132)


def test_rates(fake_clock: Any) -> None:
    rates = measure.measure_rates(CPU, torch.float16, fake_clock())
    assert rates.tflops == pytest.approx(2 * 128**3 / 1e-3 / 1e12)
    assert rates.gbytes == pytest.approx(2 * (1 << 20) / 1e-3 / 1e9)


def test_two_processes_write_one_table(tmp_path: Path) -> None:
    """Threads as stand-ins: each adds its products one by one; the file is whole at all times, and ends as the union,
    but for what both wrote in one moment."""
    path, measured = own_table(CPU, tmp_path), Measured(UNTUNED["mma"][0][1], 1.0, 2.0, 3.0)
    stop = threading.Event()
    torn: list[str] = []

    def read() -> None:
        while not stop.is_set():
            try:
                json.loads(path.read_text())
            except FileNotFoundError:
                continue
            except ValueError as error:
                torn.append(str(error))

    def write(qtype: str) -> None:
        for m in range(1, 21):
            product = Product("linear", qtype, m, 32, 32)
            add_to_table(path, CPU, {product: measured})
        add_to_table(path, CPU, {Product("linear", qtype, m, 32, 32): measured for m in range(1, 21)}, [qtype])

    reader = threading.Thread(target=read)
    reader.start()
    writers = [threading.Thread(target=write, args=(qtype,)) for qtype in ("Q4_0", "Q8_0")]
    for thread in writers:
        thread.start()
    for thread in writers:
        thread.join()
    stop.set()
    reader.join()
    assert torn == []
    products, names = read_table(path)
    assert names
    for qtype in names:
        assert {product.m for product in products if product.qtype == qtype} == set(range(1, 21))
    assert [file.name for file in path.parent.iterdir()] == [path.name], "nothing temporary is left"
    assert launches.load_measured(path, gpu_of(CPU)) == len(products), "the format of other tables"


@pytest.mark.parametrize(
    "change",
    [{"fused": 0}, {"fused": float("nan")}, {"fused": "x"}, {"launch": {"block_m": 48}}, {"launch": 3},
     {"product": {"op": "linear", "qtype": "Q4_0", "m": -1, "n": 2, "k": 3}}, {"resident": -1}],
)  # fmt: skip
def test_damaged_entries_are_measured_anew(change: dict[str, Any], tmp_path: Path, caplog: Any) -> None:
    path = own_table(CPU, tmp_path)
    add_to_table(path, CPU, {LINEAR.product: Measured(UNTUNED["mma"][0][1], 1.0, 2.0, 3.0)}, ["a model"])
    assert read_table(path)[0]
    entries = json.loads(path.read_text())
    entries["products"][0] |= change
    path.write_text(json.dumps(entries))
    assert read_table(path) == ({}, set())
    assert read_table(path) == ({}, set())
    assert caplog.text.count("is damaged") == 1
    with pytest.raises(ValueError, match="is no table"):
        launches.load_measured(path, gpu_of(CPU))
    other = replace(LINEAR.product, m=3)
    add_to_table(path, CPU, {other: Measured(UNTUNED["mma"][0][1], 1.0, 2.0, 3.0)})
    assert set(read_table(path)[0]) == {other}
