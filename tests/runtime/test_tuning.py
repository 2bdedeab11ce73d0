"""What a UNet's step runs on our kernels, and that a model whose kernels are wrong here paints the same picture."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.lib.random_weights import random_unet, unet_inputs
from gguf_sd.config import UNetConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models.unet import UNet
from gguf_sd.models.unet_blocks import Upsample
from gguf_sd.runtime.cuda_graph import GraphedUNet
from gguf_sd.runtime.kernel_modes import use_kernels
from gguf_sd.runtime.step_kernels import step_kernels
from gguf_sd.runtime.tuning import Tuned, Tuning, seconds_of
from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.triton import launcher
from gguf_sd_kernels.tuning import launch as launches
from gguf_sd_kernels.tuning import verdicts, ways
from gguf_sd_kernels.tuning.child import ChildError
from gguf_sd_kernels.tuning.launch import ALLOWED, Launch, Measured, Prepared, add_measured
from gguf_sd_kernels.tuning.self_check import Subject, check
from gguf_sd_kernels.tuning.tables import own_table
from gguf_sd_kernels.tuning.tuner import Event, Job, Tuner
from gguf_sd_kernels.tuning.verdicts import Check, Verdicts

CPU = torch.device("cpu")
CONFIG = UNetConfig(
    block_out_channels=(32,),
    layers_per_block=1,
    transformer_layers=(0,),
    num_heads=(4,),
    context_dim=32,
    norm_groups=8,
)


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(verdicts.SWITCH, "1")
    monkeypatch.setattr(verdicts, "_of", {})
    monkeypatch.setattr(launches, "_measured", {})
    Prepared.forget()
    yield
    Prepared.forget()


def made(qtype: str = "Q4_0", mode: str = "auto") -> UNet:
    unet = random_unet(CONFIG, qtype, torch.float16, CPU)
    use_kernels(unet, mode)
    return unet


def inputs() -> list[Tensor]:
    torch.manual_seed(1)
    return unet_inputs(CONFIG, 1, 2, torch.float16, CPU)


def right() -> Tensor:
    """The step in plain torch and float32."""
    return random_unet(CONFIG, "Q4_0", torch.float32, CPU)(*(x.float() for x in inputs()))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


def agrees(subject: Subject, device: torch.device) -> None:
    """In place of the self-check, where what it does is not the question."""


@dataclass
class InProcess(Tuning):
    """Tuning here and not in another process, with a clock that does not wait."""

    quiet: bool = True
    check: Check = agrees
    launch_seconds: float = 1e-4
    jobs: list[Job] = field(default_factory=list)

    def run(self, job: Job, device: torch.device) -> Iterator[Event]:
        self.jobs.append(job)
        return Tuner(job, device, Clock(self.launch_seconds), self.check).run()


class Clock:
    """Fused products take as long as is given, all else 1 ms; calls are made, and nothing else takes time."""

    def __init__(self, launch_seconds: float):
        self.launch_seconds, self.time = launch_seconds, 0.0

    def now(self) -> float:
        return self.time

    def seconds(self, call: Any) -> float:
        call()
        of_launch = any(isinstance(cell.cell_contents, Launch) for cell in call.__closure__ or ())
        seconds = self.launch_seconds if of_launch else 1e-3
        self.time += seconds
        return seconds


@pytest.fixture
def tuning(tmp_path: Path) -> InProcess:
    verdicts._of[CPU] = Verdicts(CPU, tmp_path, agrees)
    return InProcess(folder=tmp_path)


def prepare(tuning: Tuning, unet: UNet) -> Tuned:
    return tuning.prepare(unet, 1, 2, 2, torch.float16)


def test_the_products_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the recorder finds on the meta device is what the step asks for when it runs; the model is as it was."""
    unet = made()
    before = {name: tensor.data_ptr() for name, tensor in unet.state_dict(keep_vars=True).items()}
    kernels = step_kernels(unet, 1, 2, 2, torch.float16)
    assert before == {name: tensor.data_ptr() for name, tensor in unet.state_dict(keep_vars=True).items()}
    asked: list[Any] = []
    real = ways.way_of

    def spy(use: Any, weight: Any, dtype: torch.dtype, mode: str) -> Any:
        asked.append((use, mode))
        return real(use, weight, dtype, mode)

    def spy_fused(use: Any, weight: Any, dtype: torch.dtype, mode: str) -> Any:
        asked.append((use, mode))
        return real_fused(use, weight, dtype, mode)

    real_fused = ways.fused_launch
    monkeypatch.setattr("gguf_sd_kernels.dispatch.way_of", spy)
    monkeypatch.setattr("gguf_sd_kernels.normed.fused_launch", spy_fused)
    verdicts._of[CPU] = Verdicts(CPU, check=agrees)
    unet(*inputs())
    assert set(asked) == set(kernels.uses)
    assert {s for s in verdicts.verdicts_of(CPU).known if s.kernel.endswith("norm")} == kernels.norms
    assert sum(kernels.uses.values()) > len(kernels.uses)


def test_an_enlargement_is_part_of_the_convolution_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the recorder as for the layer."""
    config = replace(CONFIG, block_out_channels=(32, 32), transformer_layers=(0, 0), num_heads=(4, 4))
    unet = random_unet(config, "Q4_0", torch.float16, CPU)
    use_kernels(unet, "fused")
    found = [use for use, _ in step_kernels(unet, 1, 3, 4, torch.float16).uses if "enlarge" in use.added]
    asked: list[Any] = []
    real = ways.fused_launch

    def spy(use: Any, *rest: Any) -> Any:
        asked.append(use)
        return real(use, *rest)

    monkeypatch.setattr("gguf_sd_kernels.enlarged.fused_launch", spy)
    verdicts._of[CPU] = Verdicts(CPU, check=agrees)
    (conv,) = (module.conv for module in unet.modules() if isinstance(module, Upsample))
    x = torch.ones(1, 32, 2, 2, dtype=torch.float16).contiguous(memory_format=torch.channels_last)
    assert conv.enlarged(x, (3, 4)).shape == (1, 32, 3, 4)
    assert asked == found
    assert len(found) == 1


def test_once_a_gpu(tuning: InProcess) -> None:
    """The second time nothing runs; a new process reads what was found; the table takes effect."""
    unet = made()
    tuned = prepare(tuning, unet)
    assert len(tuning.jobs) == 1
    assert tuned.measured.keys() == {use.product for use in tuned.uses}
    assert tuned.rates is not None
    assert own_table(CPU, tuning.folder).is_file()
    prepare(tuning, unet)
    assert len(tuning.jobs) == 1
    launches._measured.clear()
    verdicts._of.clear()
    again = prepare(tuning, unet)
    assert len(tuning.jobs) == 1
    assert again.measured == tuned.measured
    assert all(launches.measured(product, gpu_of(CPU)) == known for product, known in tuned.measured.items())
    assert error(unet(*inputs()), right()) < 1e-2


def test_what_was_not_reached_is_measured_when_asked_for(tuning: InProcess) -> None:
    unet = made()
    tuning.launch_seconds, tuning.seconds = 9e-3, 0.02
    few = prepare(tuning, unet)
    assert 0 < len(few.measured) < len(few.uses)
    prepare(tuning, unet)
    assert len(tuning.jobs) == 1, "once, and not at every start"
    tuning.again, tuning.seconds = True, 1e9
    everything = prepare(tuning, unet)
    assert len(everything.measured) == len(everything.uses)
    (_, job) = tuning.jobs
    assert not {use.product for use, _ in job.uses} & few.measured.keys()


def test_off_checks_and_measures_nothing(tuning: InProcess) -> None:
    tuning.seconds = 0
    prepare(tuning, made())
    (job,) = tuning.jobs
    assert job.subjects
    assert job.seconds == 0
    assert not own_table(CPU, tuning.folder).exists()


def test_other_modes_and_plain_torch(tuning: InProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    latents = torch.zeros(1, 4, 2, 2, dtype=torch.float16)
    tuning.before_steps(random_unet(CONFIG, "Q4_0", torch.float32, CPU), latents, True)
    assert tuning.jobs == []
    unet = made(mode="int8")
    tuning.before_steps(GraphedUNet(unet, None), latents, True)  # type: ignore[arg-type]
    (job,) = tuning.jobs
    assert job.seconds == 0
    monkeypatch.setattr(InProcess, "prepare", None)
    tuning.before_steps(unet, latents, True)  # is not called again for a size that it was called for
    assert {"linear int8", "conv int8", "linear", "dequantize", "whole group norm", "layer norm"} <= {
        subject.kernel for subject in job.subjects
    }


def test_where_no_process_can_be_started(
    tuning: InProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(self: InProcess, job: Job, device: torch.device) -> Iterator[Event]:
        raise ChildError("no memory for another context")

    monkeypatch.setattr(InProcess, "run", none)
    unet = made()
    assert prepare(tuning, unet).measured == {}
    assert "in a process of their own (no memory for another context): each is checked when met" in caplog.text
    assert error(unet(*inputs()), right()) < 1e-2
    assert len(verdicts.verdicts_of(CPU).known) > 5


@pytest.mark.parametrize(("fault", "kernels"), [("wrong", "all"), ("raise", "products")])
def test_wrong_kernels_paint_the_right_picture(
    fault: str, kernels: str, tuning: InProcess, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Wrong in the tuner as in the step; the tuner's own check is the real one here."""
    real = launcher.PreparedLaunch.__call__
    ran: list[str] = []

    def call(start: launcher.PreparedLaunch, *operands: Any) -> None:
        name = start.kernel.__name__
        ran.append(name)
        if kernels == "products" and name not in ("linear_kernel", "conv_kernel"):
            return real(start, *operands)
        if fault == "raise":
            raise RuntimeError(f"{name} cannot be launched")
        real(start, *operands)
        for name in ("out", "means"):
            if name in start.names:
                operands[start.names.index(name)].mul_(1.5)
        return None

    monkeypatch.setattr(launcher.PreparedLaunch, "__call__", call)
    verdicts._of.clear()
    tuning.check, tuning.seconds = check, 0
    unet = made()
    prepare(tuning, unet)
    unet(*inputs())
    ran.clear()
    assert error(unet(*inputs()), right()) < 1e-2
    left = {"products": {"dequantize_kernel", "group_norm_kernel", "layer_norm_kernel"}}
    assert set(ran) == left.get(kernels, set())
    assert "the kernel conv Q4_0 float16" in caplog.text


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_no_table_changes_a_result(seed: int) -> None:
    """Launches drawn from all that a file can hold, whatever they do to speed."""
    draw = random.Random(seed)
    unet = made()
    table = {}
    for use, _ in step_kernels(unet, 1, 2, 2, torch.float16).uses:
        drawn = {name: draw.choice(list(allowed)) for name, allowed in ALLOWED.items()}
        drawn |= {"block_m": draw.choice((16, 32)), "block_n": draw.choice((16, 32, 64))}  # larger ones take long here
        launch = Launch.checked({**drawn, "swap": draw.random() < 0.5, "ptx": draw.random() < 0.5})
        table[use.product] = Measured(launch, draw.uniform(0.1, 2), draw.uniform(1, 2), 1.0)
    add_measured(gpu_of(CPU), table)
    assert error(unet(*inputs()), right()) < 1e-2
    assert any(known.fastest == "fused" for known in table.values())


def test_what_the_option_takes() -> None:
    assert (seconds_of("off"), seconds_of("45"), seconds_of("0.5")) == (0, 45, 0.5)
    for text in ("0", "-1", "nan", "inf", "on", "1e9", ""):
        with pytest.raises(GgufSdError, match="a number of seconds"):
            seconds_of(text)
