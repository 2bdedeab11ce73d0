"""A kernel that is wrong on this device is named, set aside, and the result is right all the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.dispatch import conv2d_packed, group_norm_silu, layer_norm, linear_packed
from gguf_sd_kernels.reference.products import dequantize
from gguf_sd_kernels.repack import repack, unpack
from gguf_sd_kernels.row_parts import decoded_dtype
from gguf_sd_kernels.triton import launcher, linear
from gguf_sd_kernels.tuning import launch as launches
from gguf_sd_kernels.tuning import store, verdicts
from gguf_sd_kernels.tuning.launch import Launch, Measured, Prepared, Product
from gguf_sd_kernels.tuning.operands import EPS, Operands, Use
from gguf_sd_kernels.tuning.self_check import DisagreementError, Subject, check
from gguf_sd_kernels.tuning.verdicts import GOOD, Verdicts, verdicts_of

CPU = torch.device("cpu")
SMALL = Launch(16, 32, 32, warps=4, stages=2)


class WrongKernels:
    """Stands between the launcher and the kernels: those named do what ``fault`` says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.faults: dict[str, str] = {}
        self.ran: list[str] = []
        real = launcher.PreparedLaunch.__call__

        def call(start: launcher.PreparedLaunch, *operands: Tensor | None) -> None:
            name = start.kernel.__name__
            self.ran.append(name)
            fault = self.faults.get(name)
            if fault == "compile":
                raise RuntimeError(f"error: cannot compile {name}\nmore of it")
            if fault == "launch":
                raise RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 101376")
            real(start, *operands)
            if fault == "wrong":
                self._result(start, operands).mul_(1.02)

        monkeypatch.setattr(launcher.PreparedLaunch, "__call__", call)

    @staticmethod
    def _result(start: launcher.PreparedLaunch, operands: tuple[Tensor | None, ...]) -> Tensor:
        result = operands[start.names.index("out")]
        assert result is not None
        return result


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> WrongKernels:
    return WrongKernels(monkeypatch)


def _linear(material: Any, mode: str = "fused", dtype: torch.dtype = torch.float16) -> None:
    blocks, weight = material.weight("Q4_0", 40, 64, seed=1)
    x, bias = material.normal(6, 64, seed=2, dtype=dtype), material.normal(40, seed=3, dtype=dtype)
    got = linear_packed(x, repack(blocks, "Q4_0"), bias, mode=mode)
    limit = 2e-2 if mode == "int8" else 1e-3
    assert material.error(got, F.linear(x.double(), weight, bias.double())) < limit


def test_good_kernels_are_checked_once_and_used(material: Any, kernels: WrongKernels, caplog: Any) -> None:
    _linear(material)
    assert kernels.ran == ["linear_kernel"] * 2
    _linear(material)
    assert kernels.ran == ["linear_kernel"] * 3
    assert list(verdicts_of(CPU).known.values()) == [GOOD]
    assert not caplog.records


@pytest.mark.parametrize("fault", ["wrong", "compile", "launch"])
def test_fused_becomes_dequantize_becomes_torch(
    fault: str, material: Any, kernels: WrongKernels, caplog: pytest.LogCaptureFixture
) -> None:
    kernels.faults["linear_kernel"] = fault
    _linear(material)
    assert kernels.ran[-1] == "dequantize_kernel"
    named = [record.message for record in caplog.records]
    assert len(named) == len(set(named)) >= 1
    assert all(message.startswith("the kernel linear Q4_0 float16 +bias ") for message in named)
    kernels.ran.clear()
    _linear(material)
    assert kernels.ran == ["dequantize_kernel"], "neither checked nor tried again"
    assert len(caplog.records) == len(named)
    verdicts_of(CPU).known.clear()
    Prepared.forget()
    kernels.faults["dequantize_kernel"] = fault
    _linear(material)
    kernels.ran.clear()
    _linear(material)
    assert kernels.ran == [], "plain torch"


def test_a_table_with_a_wrong_launch_gives_way_to_the_familys(material: Any, monkeypatch: Any) -> None:
    """What is set aside is one launch of a kernel, the next one takes over."""
    taken: list[Launch] = []
    real = linear.PreparedLinear.__init__

    def spy(self: Any, *args: Any) -> None:
        taken.append(args[5])
        if args[5].block_n == 32:
            raise RuntimeError("this tile cannot be compiled")
        real(self, *args)

    monkeypatch.setattr(linear.PreparedLinear, "__init__", spy)
    product = Product("linear", "Q4_0", 6, 40, 64)
    family = launches.UNTUNED["mma"][0][1]
    launches.add_measured(gpu_of(CPU), {product: Measured(SMALL, 1.0, 2.0, 3.0)})
    _linear(material, "auto")
    assert taken[0].block_n == 32
    assert (taken[-1].block_m, taken[-1].block_n) == (family.block_m, family.block_n)


@pytest.mark.parametrize("mode", ["fused", "int8", "dequantize"])
@pytest.mark.parametrize("tap_major", [True, False])
def test_convolutions(mode: str, tap_major: bool, material: Any, kernels: WrongKernels) -> None:
    kernels.faults = {"conv_kernel": "wrong", "conv_int8_kernel": "wrong", "dequantize_kernel": "launch"}
    kernels.faults["dequantize_taps_kernel"] = "wrong"
    blocks, flat = material.weight("Q8_0", 24, 4 * 32, seed=5)
    full = flat.view(24, 2, 2, 32).permute(0, 3, 1, 2) if tap_major else flat.view(24, 32, 2, 2)
    x, bias = material.normal(2, 32, 4, 5, seed=6), material.normal(24, seed=7)
    emb = material.normal(2, 24, seed=8)
    weight = repack(blocks, "Q8_0", (24, 32, 2, 2), tap_major=tap_major)
    got = conv2d_packed(x, weight, bias, 1, 1, emb=emb, mode=mode)
    assert material.error(got, F.conv2d(x.double(), full, bias.double(), 1, 1) + emb[:, :, None, None]) < 2e-3
    reasons = {subject.kernel: reason for subject, reason in verdicts_of(CPU).known.items()}
    assert all(reasons.values())
    assert reasons.keys() == ({"dequantize", "conv", *([f"conv {mode}"] if mode == "int8" else [])}
                              if tap_major and mode != "dequantize" else {"dequantize"})  # fmt: skip


def test_norms(material: Any, kernels: WrongKernels) -> None:
    x = material.normal(2, 32, 3, 5, seed=1).contiguous(memory_format=torch.channels_last)
    weight, bias = material.normal(32, seed=2), material.normal(32, seed=3)
    want = F.silu(F.group_norm(x.double(), 8, weight.double(), bias.double(), 1e-5))
    rows = x.permute(0, 2, 3, 1)
    want_rows = F.layer_norm(rows.double(), (32,), weight.double(), bias.double(), 1e-5)
    for whole, halves, layer in (("", "", ""), ("wrong", "", "launch"), ("launch", "wrong", "wrong")):
        kernels.faults = {"group_norm_kernel": whole, "group_apply_kernel": halves, "layer_norm_kernel": layer}
        verdicts_of(CPU).known.clear()
        Prepared.forget()
        assert material.error(group_norm_silu(x, 8, weight, bias, 1e-5, True), want) < 2e-3
        assert material.error(layer_norm(rows, weight, bias, 1e-5), want_rows) < 2e-3
        found = {subject.kernel: bool(reason) for subject, reason in verdicts_of(CPU).known.items()}
        second = {"group norm": bool(halves)} if whole else {}
        assert found == {"whole group norm": bool(whole), "layer norm": bool(layer), **second}


def test_groups_too_large_for_one_program(material: Any, kernels: WrongKernels) -> None:
    x, ones = material.normal(1, 2, 130, 130, seed=1), material.normal(2, seed=2)
    group_norm_silu(x, 1, ones, ones, 1e-5, True)
    assert {subject.kernel for subject in verdicts_of(CPU).known} == {"group norm"}


def test_it_can_be_turned_off(material: Any, kernels: WrongKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.faults["linear_kernel"] = "wrong"
    monkeypatch.setenv(verdicts.SWITCH, "0")
    with pytest.raises(AssertionError):
        _linear(material)
    assert kernels.ran == ["linear_kernel"]
    monkeypatch.delenv(verdicts.SWITCH)
    assert not verdicts.self_check_on(CPU), "the interpreter is for tests"
    assert verdicts.self_check_on(torch.device("cuda"))


def test_a_small_error_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("linear", "float16", "Q4_0", SMALL, ("bias",))
    check(subject, CPU)
    real = linear.linear_fused
    monkeypatch.setattr(linear, "linear_fused", lambda *args, **options: real(*args, **options) * 1.004)
    with pytest.raises(DisagreementError, match=r"off by 0\.004 of plain torch's, at most 0\.002"):
        check(subject, CPU)
    monkeypatch.setattr(linear, "linear_fused", lambda *args, **options: real(*args, **options) * float("nan"))
    with pytest.raises(DisagreementError, match="nan"):
        check(subject, CPU)


@pytest.mark.parametrize("op", ["linear", "geglu"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_norm_is_held_against_what_the_kernel_is_to_do(op: str, dtype: torch.dtype) -> None:
    """The kernel's own sums in float64 are the reference's but for what is rounded once, and that is nearer to the
    weight's own values than plain torch comes, which rounds the normalised rows, the weight and each step's result."""
    operands = Operands(Use(Product(op, "Q4_0", 53, 192, 256), ("bias", "norm")), dtype, CPU)
    assert operands.norm is not None
    assert operands.bias is not None
    (folded,), x, (gain, shift) = operands._folded, operands.x.double(), (values.double() for values in operands.norm)

    def finish(y: Tensor) -> Tensor:
        value, gate = y.chunk(2, dim=-1)
        return value * F.gelu(gate) if op == "geglu" else y

    def error(got: Tensor, want: Tensor) -> float:
        return float((got.double() - want.double()).norm() / want.double().norm())

    exact = dequantize(unpack(operands.weights[0]), "Q4_0", torch.float32)
    decoded = exact.to(decoded_dtype(dtype))
    weight = (decoded * operands.norm[0].to(decoded.dtype)).to(dtype).double()
    mean, scale = x.mean(1, keepdim=True), (x.var(1, keepdim=True, correction=0) + EPS).rsqrt()
    kernel = finish((x @ weight.T - mean * folded.sums.double()) * scale + folded.bias.double())
    assert error(kernel.to(dtype), operands.plain()) < 1e-4
    true = finish(F.layer_norm(x, (256,), gain, shift, EPS) @ exact.double().T + operands.bias.double())
    assert error(operands.plain(), true) < error(operands.library(operands.plain_weight()), true)


def test_inline_ptx_is_held_against_the_portable_form(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for its result: the interpreter has no inline PTX."""
    subject = Subject("ptx", "float16", "Q4_1", SMALL)
    check(subject, CPU)
    real = linear.linear_fused

    def one_bit_off(*args: Any, launch: Launch, **options: Any) -> Tensor:
        y = real(*args, launch=launch, **options)
        if launch.ptx:
            y.view(torch.int16)[3, 7] ^= 1
        return y

    monkeypatch.setattr(linear, "linear_fused", one_bit_off)
    launch_with_ptx = Subject("ptx", "float16", "Q4_1", Launch(16, 32, 32, 4, 2, ptx=True))
    with pytest.raises(DisagreementError, match="differ"):
        check(launch_with_ptx, CPU)


def test_verdicts_are_kept_on_disk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked: list[Subject] = []

    def wrong(subject: Subject, device: torch.device) -> None:
        asked.append(subject)
        if subject.kernel == "conv":
            raise DisagreementError("wrong")
        if subject.kernel == "geglu":
            raise torch.OutOfMemoryError("not now")

    subjects = [Subject(kernel, "float16", "Q4_0", SMALL, ("bias",)) for kernel in ("linear", "conv", "geglu")]
    first = Verdicts(CPU, tmp_path, wrong)
    assert [first.trusted(subject) for subject in subjects * 2] == [True, False, False] * 2
    assert asked == subjects
    second = Verdicts(CPU, tmp_path, wrong)
    assert [second.trusted(subject) for subject in subjects] == [True, False, False]
    assert asked == [*subjects, subjects[2]], "a lack of memory may pass"
    (path,) = (tmp_path / "checks").iterdir()
    assert path == first.path
    facts = json.loads(path.read_text())["device"]
    assert {"driver", "torch", "triton", "kernels"} <= facts.keys()
    assert caplog.text.count("the kernel conv Q4_0 float16 +bias 16x32x32 4w 2s is not used on this GPU") == 1


@pytest.mark.parametrize(
    "text",
    ["", "{", '{"checks": 7}', '{"checks": [{"subject": {}, "reason": ""}]}', "[]", "[" * 100000, '{"checks": [3]}',
     '{"checks": [{"subject": {"kernel": "linear", "dtype": "float16", "launch": {"block_m": 17}}, "reason": ""}]}',
     '{"checks": [{"subject": {"kernel": [], "dtype": "float16"}, "reason": ""}]}', b"\xff\xfe"],
)  # fmt: skip
def test_a_torn_file_is_said_once_and_done_again(
    text: str | bytes, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_told", set())
    path = Verdicts(CPU, tmp_path).path
    assert path is not None
    path.parent.mkdir()
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    subject = Subject("linear", "float16", "Q4_0", SMALL)
    asked: list[Subject] = []
    for _ in range(2):
        assert Verdicts(CPU, tmp_path, lambda subject, device: asked.append(subject)).trusted(subject)
    assert len(asked) == 1
    assert len(caplog.records) == 1
    assert str(path) in caplog.text


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "checks").write_text("a file")
    known = Verdicts(CPU, tmp_path, lambda subject, device: None)
    for rows in (16, 32):
        assert known.trusted(Subject("layer norm", "float16", sizes=(rows,)))
    assert len(caplog.records) == 1
    assert "cannot be written" in caplog.text


def test_other_sources_or_another_driver_have_other_files(monkeypatch: pytest.MonkeyPatch) -> None:
    from gguf_sd_kernels.tuning import fingerprint

    names = {fingerprint.file_name(CPU)}
    for name in ("kernels_version", "driver_version"):
        monkeypatch.setattr(fingerprint, name, lambda: "another")
        fingerprint.fingerprint.cache_clear()
        names.add(fingerprint.file_name(CPU))
    fingerprint.fingerprint.cache_clear()
    assert len(names) == 3


def test_a_gpu_that_takes_no_more_work_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def gone(*args: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(verdicts, "proof_of_life", gone)
    subject = Subject("linear", "float16", "Q4_0", SMALL)
    with pytest.raises(RuntimeError, match=r"linear Q4_0 float16 .* start the program anew"):
        Verdicts(CPU, tmp_path, gone).trusted(subject)
    assert not Verdicts(CPU, tmp_path, gone).trusted(subject), "the next process knows"
