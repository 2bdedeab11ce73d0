"""From jobs to a memory plan: what is free or allowed is looked up here, :mod:`gguf_sd.runtime.plan` does the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from gguf_sd.checkpoint.control_file import ControlFile
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.vae_file import VAEFile
from gguf_sd.config import VAEConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models.tiny_vae import tiny_config
from gguf_sd.request import Job
from gguf_sd.runtime import library_pages, memory
from gguf_sd.runtime.execution import Execution
from gguf_sd.runtime.memory import MemoryPlan
from gguf_sd.runtime.part_bytes import control_bytes, part_bytes
from gguf_sd.runtime.plan import Machine, Planner, Workload
from gguf_sd_kernels.cpu import native

# Latent pixels to predict for a picture, over all steps, from which encoding a UNet in 8 bits pays: it takes 5 ns a
# weight, and saves 0.13 ps a weight and pixel (Zen 4, 2 cores). Five guided steps at 512x512, or nine without guidance.
INT8_PAYS = 36_000
# The same where kernels in tiles do both: 1 ns, and 0.2 ps or more (Xeon with AMX, 2 cores). One step without guidance.
INT8_PAYS_IN_TILES = 4_000


def int8_pays() -> int:
    """Of the two above, what holds for this machine; kernels are built where they are not yet."""
    return INT8_PAYS_IN_TILES if native.multiplies(native.BLOCK, native.DEPTH, torch.bfloat16) else INT8_PAYS


class Held(Protocol):
    """What is loaded already, see :class:`gguf_sd.runtime.parts.Parts`."""

    @property
    def nbytes(self) -> int: ...

    @property
    def names(self) -> set[str]: ...


class Planning:
    """Plans jobs of one model, with what ``held`` has loaded counted as free: it is let go where a plan says so."""

    def __init__(
        self, model: ModelFile, execution: Execution, vae_dtype: torch.dtype, held: Held, vae_file: VAEFile | None
    ):
        self.model, self.execution, self.held = model, execution, held
        self.vae: VAEConfig = vae_file.config if vae_file else model.config.vae
        self._vae_dtype = vae_dtype
        self._tiny = vae_file is not None and self.vae == tiny_config(self.vae.latent_channels)
        self._bytes = part_bytes(model, vae_file)
        self._base = 0

    def planner(
        self, workload: Workload, beside: Mapping[str, int] | None = None, controls: Sequence[ControlFile] = ()
    ) -> Planner:
        """``beside``: values that LoRAs hold beside the weights of a part; ``controls``: the ControlNets in use."""
        execution = self.execution
        machine = Machine(
            gpu=execution.device.type == "cuda",
            itemsize=execution.dtype.itemsize,
            vae_itemsize=self._vae_dtype.itemsize,
            base=self.base,
            onednn=execution.dtype == torch.float32 or memory.wide_dtype(execution.device) == execution.dtype,
        )
        weights, placement = execution.weights, execution.placement
        may_be_int8 = execution.int8 and bool(self._bytes["unet"].blocks)  # who left weights whole asked for exactness
        parts = self._bytes | {name: replace(self._bytes[name], beside=n) for name, n in (beside or {}).items()}
        parts |= control_bytes(controls)
        workload = replace(workload, controls=tuple(file.config for file in controls))
        return Planner(
            self.model.config,
            self.vae,
            self._tiny,
            parts,
            workload,
            machine,
            weights,
            placement,
            execution.vae_tile,
            int8=may_be_int8 and workload.lasting,
            vae_int8=(may_be_int8 or weights == "int8") and not self._tiny,
        )

    def workload(self, jobs: Sequence[Job], chunks: Callable[[Job], int]) -> Workload:
        """The most that jobs paint at once; ``chunks`` counts those of a job's prompts."""
        count = sum(job.count for job in jobs)
        largest = max(jobs, key=lambda job: job.width * job.height * min(job.batch, count))
        return Workload(
            size=(largest.height // self.vae.downscale, largest.width // self.vae.downscale),
            pictures=min(largest.batch, count),
            guided=any(job.guided for job in jobs),
            chunks=max(chunks(job) for job in jobs),
            encodes=any(job.picture is not None for job in jobs),
            adapters=max(sum(lora.stamp[1] // 2 for lora in job.loras) for job in jobs),  # in 16 bits
            lasting=self.execution.int8 and min(map(self._predictions, jobs)) >= int8_pays(),
        )

    def _predictions(self, job: Job) -> int:
        """Latent pixels that the UNet predicts for a picture, over all steps. How many pictures there are does not
        count: a picture is the same alone and among others."""
        pixels = job.width * job.height // self.vae.downscale**2
        return job.steps_run * pixels * (2 if job.guided else 1)

    @property
    def base(self) -> int:
        """Bytes that the process takes on the device besides parts and work: measured while nothing is loaded."""
        if not self.held.names or not self._base:
            if self.execution.device.type == "cpu":
                library_pages.forget()
            self._base = memory.process_memory(self.execution.device)
        return self._base

    def plan(self, planner: Planner) -> MemoryPlan:
        """Within what the user allows, else within what is free less a margin; where nothing keeps to that, but
        something to all that is free, it is tried. Raises GgufSdError, naming the smallest that works."""
        if self.execution.max_memory is not None:
            return planner.plan(self.execution.max_memory)
        free = memory.available_memory(self.execution.device) + self.held.nbytes
        base = planner.machine.base
        try:
            return planner.plan(base + int((1 - memory.MARGIN) * free))
        except GgufSdError:
            limit = base + free + memory.swap_memory(self.execution.device)
            return planner.plan(max(planner.smallest.peak, 1) if planner.smallest.peak <= limit else limit)


@dataclass
class Attempt:
    """The plan that a job is painted by, and where memory runs out once, a lower one."""

    planner: Planner
    plan: MemoryPlan
    stepped: bool = False

    def step_down(self) -> bool:
        """Whether there is another plan to try."""
        lower = None if self.stepped else self.planner.step_down(self.plan)
        if lower is None:
            return False
        self.plan, self.stepped = lower, True
        return True
