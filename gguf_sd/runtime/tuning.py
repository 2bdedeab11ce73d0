"""Kernels checked and tuned for a model, once, on the GPU it runs on.

What is found is kept in the cache folder, and holds for every model with the same products.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from gguf_sd.errors import GgufSdError
from gguf_sd.models.unet import UNet
from gguf_sd.runtime.step_kernels import StepKernels, step_kernels
from gguf_sd_kernels.cache_folder import cache_folder
from gguf_sd_kernels.devices import gpu_of
from gguf_sd_kernels.repack import PACKED_TYPES
from gguf_sd_kernels.tuning.child import ChildError, run_in_child
from gguf_sd_kernels.tuning.launch import NEAREST, Measured, Product, add_measured, choose, measured, measured_entry
from gguf_sd_kernels.tuning.launch_int8 import INT8_TYPES, UNTUNED_INT8, choose_int8
from gguf_sd_kernels.tuning.measure import Rates
from gguf_sd_kernels.tuning.operands import Use
from gguf_sd_kernels.tuning.self_check import Subject
from gguf_sd_kernels.tuning.tables import add_to_table, own_table, read_table
from gguf_sd_kernels.tuning.tuner import Event, Job
from gguf_sd_kernels.tuning.verdicts import Verdicts, keep_verdicts, self_check_on
from gguf_sd_kernels.tuning.ways import fitted, ptx_subject

log = logging.getLogger(__name__)
DEFAULT_SECONDS = 45.0


def seconds_of(text: str) -> float:
    """What ``--tune`` takes: a number of seconds, or off, which is 0. Raises GgufSdError for other text."""
    if text == "off":
        return 0.0
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1
    if not 0 < seconds <= 86400:
        raise GgufSdError(f"tuning takes a number of seconds, up to 86400, or off; got {text!r}")
    return seconds


@dataclass
class Tuned:
    """What is known of a step's products: ``uses`` with how often a step has each, and what was measured."""

    uses: dict[Use, int]
    measured: dict[Product, Measured]
    rates: Rates | None = None


@dataclass
class Tuning:
    """How kernels are made ready: measured for at most ``seconds`` (0: not at all), in a process of its own."""

    seconds: float = DEFAULT_SECONDS
    quiet: bool = False  # no progress bar
    again: bool = False  # measure what an earlier run did not reach, or measured at another size alone
    folder: Path = field(default_factory=cache_folder)
    # The sizes that a UNet, as long as it is there, was made ready for.
    _ready: WeakKeyDictionary[UNet, set[tuple[int, int, int, torch.dtype]]] = field(default_factory=WeakKeyDictionary)

    def run(self, job: Job, device: torch.device) -> Iterator[Event]:
        """What happens, see :mod:`gguf_sd_kernels.tuning.tuner`."""
        return run_in_child(job, device)

    def prepare(self, unet: UNet, batch: int, height: int, width: int, dtype: torch.dtype) -> Tuned:
        """Has the kernels of a step of ``unet`` on latents [batch, C, height, width] checked, and with kernels auto
        measured, unless the cache folder says what was found before. ``unet`` was handed to the kernels."""
        device = next(unet.parameters()).device
        kernels = step_kernels(unet, batch, height, width, dtype)
        uses: Counter[Use] = Counter()
        for (use, mode), count in kernels.uses.items():
            if mode == "auto" and _measurable(use, dtype, device):
                uses[use] += count
        verdicts, table = keep_verdicts(device, self.folder), own_table(device, self.folder)
        known, tuned = read_table(table)
        add_measured(gpu_of(device), known)
        name = _name_of(uses, dtype)
        missing = {use: n for use, n in _distinct(uses).items() if not self._have(use.product, known)}
        seconds = self.seconds if missing and (self.again or name not in tuned) else 0
        subjects = tuple(s for s in self._subjects(kernels, dtype, device) if s not in verdicts.known)
        tuned_now = Tuned(_distinct(uses), {p: v for p, v in known.items() if p in {u.product for u in uses}})
        if seconds or (subjects and self_check_on(device)):
            job = Job(_text(dtype), subjects, tuple(missing.items()), seconds, tuple(verdicts.known.items()))
            if self._follow(job, device, verdicts, tuned_now) and seconds:
                add_to_table(table, device, {}, [name])
                add_measured(gpu_of(device), tuned_now.measured)
        return tuned_now

    def _have(self, product: Product, known: Mapping[Product, Measured]) -> bool:
        """Whether the product was measured, or one that is near enough to go by."""
        near = NEAREST if not self.again else 1
        same = (other.m for other in known if replace(other, m=0) == replace(product, m=0))
        return any(product.m <= m * near and m <= product.m * near for m in same)

    def before_steps(self, unet: object, latents: Tensor, guided: bool) -> None:
        """Makes the kernels of ``unet`` ready for steps on such latents [B, C, h, w], of twice as many if ``guided``.

        Does nothing for a UNet that none of its layers has been handed to the kernels, nor costs it anything.
        """
        unet = getattr(unet, "unet", unet)  # out of its CUDA graphs
        if not isinstance(unet, UNet) or not any(getattr(m, "fused", False) for m in unet.modules()):
            return
        batch, _, height, width = latents.shape
        size = batch * (2 if guided else 1), height, width, latents.dtype
        ready = self._ready.setdefault(unet, set())
        if size not in ready:
            self.prepare(unet, *size)
            ready.add(size)

    def _follow(self, job: Job, device: torch.device, verdicts: Verdicts, tuned: Tuned) -> bool:
        """Runs the job behind a progress bar and takes in what it tells; False where it could not begin."""
        from tqdm import tqdm

        gpu = gpu_of(device).name
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}"
        checks = 0.3 if job.seconds else 1.0  # of the bar
        with tqdm(total=1.0, bar_format=form, disable=self.quiet or None, leave=False) as bar:
            bar.set_description(f"checking kernels for {gpu} (once)")
            try:
                for event in self.run(job, device):
                    if "verdict" in event:
                        verdicts.note({Subject.from_json(event["subject"]): event["verdict"]})
                        bar.update(min(checks / max(1, len(job.subjects)), max(0.0, checks - bar.n)))
                    elif "rates" in event:
                        bar.set_description(f"tuning for {gpu} (once, about {job.seconds:.0f} s)")
                        tuned.rates = Rates(*event["rates"])
                    elif "measured" in event:
                        product, values = measured_entry(event["measured"])
                        tuned.measured[product] = values
                        add_to_table(own_table(device, self.folder), device, {product: values})
                    elif "share" in event:
                        bar.update(max(0.0, checks + (1 - checks) * event["share"] - bar.n))
            except ChildError as problem:
                log.warning("kernels cannot be tried in a process of their own (%s): each is checked when met", problem)
                return False
        return True

    @staticmethod
    def _subjects(kernels: StepKernels, dtype: torch.dtype, device: torch.device) -> list[Subject]:
        """What the step would run as things are, most telling first."""
        gpu, found = gpu_of(device), list[Subject]()
        for use, mode in kernels.uses:
            found.append(Subject.of_decoder(use.product.qtype, dtype, use.weight_shape, use.tap_major))
            if not _measurable(use, dtype, device):
                continue
            known = measured(use.product, gpu)
            if mode == "int8" and use.product.qtype in INT8_TYPES and gpu.family in UNTUNED_INT8:
                found.append(Subject.of_product(use, dtype, choose_int8(use.product, gpu), int8=True))
            elif mode != "dequantize" and (mode != "auto" or known is None or known.fastest == "fused"):
                subject = Subject.of_product(use, dtype, fitted(choose(use.product, gpu), use.product))
                decoder = ptx_subject(subject, device)
                found += [subject] if decoder is None else [decoder, subject]
        return list(dict.fromkeys([*found, *sorted(kernels.norms, key=str)]))


def _measurable(use: Use, dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a fused kernel for it, so that there is a choice."""
    in_order = use.picture is None or ((use.tap_major or use.product.taps == 1) and use.picture[1] % 32 == 0)
    sixteen_bits = dtype in (torch.float16, torch.bfloat16)
    return in_order and sixteen_bits and gpu_of(device).family is not None and use.product.qtype in PACKED_TYPES


def _distinct(uses: Counter[Use]) -> dict[Use, int]:
    """Each product once, as it is used most often, with how often the step has it in all."""
    most: dict[Product, Use] = {}
    total: Counter[Product] = Counter()
    for use, count in uses.most_common():
        most.setdefault(use.product, use)
        total[use.product] += count
    return {use: total[product] for product, use in most.items()}


def _name_of(uses: Counter[Use], dtype: torch.dtype) -> str:
    """The same for models with the same products."""
    products = sorted(str(use.product) for use in _distinct(uses))
    return hashlib.sha256("\n".join([_text(dtype), *products]).encode()).hexdigest()[:16]


def _text(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
