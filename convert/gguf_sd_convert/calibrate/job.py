"""From a model in F16 and what was asked for to how each of its UNet's tensors is stored: types and rounded weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod
from pathlib import Path

import torch

from gguf_sd.bench.calls import Samples, default_count, prompts_for, record
from gguf_sd.bench.prompts import default_prompts, read_prompts
from gguf_sd.checkpoint.assign import Deferred
from gguf_sd.checkpoint.metadata_keys import CALIBRATION
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.errors import GgufSdError
from gguf_sd.memory_size import parse_memory
from gguf_sd.pipeline import Pipeline
from gguf_sd.runtime.execution import Execution
from gguf_sd_convert.calibrate.calibrate import Calibrated, calibrate, calibrated_layers, round_by_importance
from gguf_sd_convert.calibrate.imatrix import Imatrix, read_imatrix, write_imatrix
from gguf_sd_convert.calibrate.knapsack import Choice, solve
from gguf_sd_convert.calibrate.options import Calibration
from gguf_sd_convert.calibrate.sensitivity import groups, measured_calls, sensitivities
from gguf_sd_convert.progress import Progress
from gguf_sd_convert.quantize.policy import MIXED, Stored
from gguf_sd_kernels.formats import row_bytes

MIXED_TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_1", "Q5_0", "Q4_K", "Q4_1", "Q4_0")
MAX_SAMPLES = 1 << 14
Plan = Callable[[dict[str, str]], list[Stored]]  # what is stored how, some tensors having types of their own


@dataclass
class Decided:
    """Types by tensor, where they differ from the chosen one; what calibration made; metadata; notes for people."""

    types: dict[str, str] = field(default_factory=dict)
    calibrated: Calibrated = field(default_factory=Calibrated)
    metadata: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def check_calibration(options: Calibration, qtype: str) -> None:
    """Raises GgufSdError for what does not depend on the source."""
    if not 0 <= options.samples <= MAX_SAMPLES:
        raise GgufSdError(f"samples is {options.samples}; it takes 1 … {MAX_SAMPLES}, or 0 for as many as do")
    if qtype == MIXED and (options.target is None) == (options.bpw is None):
        raise GgufSdError("type mixed takes either a target size (--target-size 600MB) or bits a weight (--bpw 4.5)")
    if qtype != MIXED and (options.target is not None or options.bpw is not None):
        raise GgufSdError("a target size or bits a weight are for --type mixed")
    if options.bpw is not None and not 4.5 <= options.bpw <= 8.5:
        raise GgufSdError(f"bpw is {options.bpw:g}; it takes 4.5 (Q4_0) … 8.5 (Q8_0)")
    if options.target is not None and parse_memory(options.target, "--target-size") is None:
        raise GgufSdError(f"target size is {options.target!r}; it takes an amount, such as 600MB")
    if options.prompts is not None:
        read_prompts(options.prompts)
    for path in (options.imatrix,):
        if path is not None and not path.is_file():
            raise GgufSdError(f"{path} does not exist; --calibrate with --save-imatrix makes such a file")
    if qtype in ("f16", "bf16", "same") and options.compensate:
        raise GgufSdError(f"there is nothing to calibrate in {qtype}; choose a quantised type")


def decide(
    full: Path, source: Path, plan: Plan, fixed_bytes: int, qtype: str, options: Calibration, progress: Progress | None
) -> Decided:
    """Records, measures and rounds. ``full``: the model in F16; ``plan``: the policy, to be asked again once types are
    chosen; ``fixed_bytes``: what the file takes besides the UNet's quantised tensors."""
    model = ModelFile.open(full)
    steps = _Steps(progress)
    data = read_imatrix(options.imatrix, model.config) if options.imatrix else Imatrix()
    calls, prompts = data.calls, 0
    if calls is not None and (options.prompts is not None or options.samples):
        raise GgufSdError(f"{options.imatrix} holds recorded calls already; leave --prompts and --samples out")
    if calls is None and not (data.importance and options.compensate and qtype != MIXED):
        calls, prompts = _record(full, source, options, steps)
        if options.save is not None:  # in case that what follows is interrupted
            _save(options, Imatrix(calls=calls))
    decided = Decided()
    if calls is None:
        decided.calibrated = _by_importance(model, plan({}), data)
        decided.notes.append(f"rounded by the importances of {options.imatrix}")
        return decided
    if qtype == MIXED:
        unet = model.load_unet(torch.float32)
        decided.types, note = _choose(unet, calls, plan({}), fixed_bytes, options, steps)
        decided.notes.append(note)
        del unet
    if options.compensate:
        layers = plan(decided.types)
        steps.begin(len(calibrated_layers(layers)), "calibrating")
        deferred: dict[str, Deferred] = {}
        unet = model.load_unet(torch.float32, deferred)
        decided.calibrated = calibrate(unet, calls, layers, steps, deferred)
        decided.notes.append(f"calibrated on {len(calls)} calls: UNet output error {decided.calibrated.error:.4f}")
        facts = {"calls": len(calls), "prompts": prompts, "error": round(decided.calibrated.error, 6)}
        decided.metadata[CALIBRATION] = json.dumps(facts)
    if options.save is not None:
        _save(options, Imatrix(decided.calibrated.importance, calls))
    return decided


def _save(options: Calibration, data: Imatrix) -> None:
    assert options.save is not None
    write_imatrix(options.save, data, [str(options.prompts or "built-in")])


class _Steps:
    """Progress of a stage of so many layers or pictures, as the converter's bar takes it."""

    def __init__(self, progress: Progress | None):
        self.progress, self.done, self.total, self.doing = progress, 0, 1, ""

    def begin(self, total: int, doing: str) -> None:
        self.done, self.total, self.doing = 0, total, doing

    def __call__(self, name: str) -> None:
        self.done += 1
        if self.progress:
            self.progress(self.done, max(self.total, self.done), self.doing)


def _record(full: Path, source: Path, options: Calibration, steps: _Steps) -> tuple[Samples, int]:
    pipeline = Pipeline(ModelFile.open(full), Execution.choose())
    prompts = read_prompts(options.prompts) if options.prompts else default_prompts(source)
    count = options.samples or default_count(pipeline.model.config)
    prompts = prompts[: prompts_for(count)]
    steps.begin(len(prompts), "recording")
    return record(pipeline, prompts, count, progress=steps), len(prompts)


def _by_importance(model: ModelFile, stored: list[Stored], data: Imatrix) -> Calibrated:
    """As far as diagonal moments go: they say which weights matter, not what makes good what."""
    result = Calibrated()
    for name, layer in ((s.name, s) for s in calibrated_layers(stored).values()):
        if (importance := data.importance.get(name)) is None:
            continue
        if importance.shape != (prod(layer.logical[1:]),):
            raise GgufSdError(f"the importances of {name} are {len(importance)}; the model has rows of "
                              f"{prod(layer.logical[1:])}")  # fmt: skip
        weight = model.file.tensor(model.names[name])
        assert isinstance(weight, torch.Tensor)
        result.blocks[name] = round_by_importance(weight.float().reshape(layer.logical), importance, layer)
    return result


def _choose(
    unet: torch.nn.Module,
    calls: Samples,
    stored: list[Stored],
    fixed_bytes: int,
    options: Calibration,
    steps: _Steps,
) -> tuple[dict[str, str], str]:
    """A type for every layer, and what to tell of it. Raises GgufSdError for a size that is out of reach."""
    layers = calibrated_layers(stored)
    steps.begin(len(groups(list(layers))), "measuring")
    found = sensitivities(unet, measured_calls(calls), list(layers), MIXED_TYPES, steps)  # type: ignore[arg-type]
    values = sum(one.values for one in found)
    if options.bpw is not None:
        budget = int(values * options.bpw / 8)
    else:
        budget = (parse_memory(options.target) or 0) - fixed_bytes
    shapes = {name: layer.shape for name, layer in layers.items()}
    choices = [
        [Choice(sum(_nbytes(t, shapes[name]) for name in one.names), error) for t, error in one.errors.items()]
        for one in found
    ]
    least = sum(min(c.nbytes for c in some) for some in choices)
    if budget < least:
        size = f"{(least + fixed_bytes) / 1e6:.0f} MB"
        raise GgufSdError(f"--target-size {options.target} is out of reach: Q4_0 throughout takes {size}")
    picked = solve(choices, budget)
    types = {
        f"{UNET}{name}.weight": list(one.errors)[i] for one, i in zip(found, picked, strict=True) for name in one.names
    }
    nbytes = sum(some[i].nbytes for some, i in zip(choices, picked, strict=True))
    return types, f"mixed: {8 * nbytes / values:.2f} bits a weight, {nbytes / 1e6:.1f} MB of quantised weights"


def _nbytes(qtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape[:-1]) * row_bytes(qtype, shape[-1])
