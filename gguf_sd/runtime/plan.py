"""The memory plan: of all ways to run a job, the fastest whose peak keeps to a budget.

Everything here is arithmetic on counts of weights, see :mod:`gguf_sd.runtime.part_bytes`, and on modelled activations,
see :mod:`gguf_sd.runtime.activations`. Nothing is measured, read or allocated: equal arguments give equal plans.

A job runs in stages: each text encoder, the VAE's encoder where a picture is started from, the UNet, the VAE's decoder,
the safety checker. A stage takes its own part and its work, beside what the process takes anyway and all parts that
stay loaded. ControlNets run in the UNet's stage, and are placed as it is. Ways are compared by the seconds they add to
a picture of STEPS steps on a nominal machine, see :class:`gguf_sd.runtime.plan_cost.Speed`; how many steps and pictures
are really asked for does not count, so that a pipeline that paints on keeps its parts as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import NamedTuple

from gguf_sd.config import ControlConfig, ModelConfig, VAEConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.memory_size import memory_text
from gguf_sd.runtime import activations, plan_cost
from gguf_sd.runtime.activations import Engine
from gguf_sd.runtime.memory import PLACEMENTS, MemoryPlan
from gguf_sd.runtime.part_bytes import CONTROL, PartBytes
from gguf_sd_kernels.reference.products import CHUNK_VALUES, PART_VALUES

TILES = (64, 48, 32, 24, 16, 12, 8, 4)  # edges in latent pixels
DECODING = 8  # bytes a value that decoding blocks takes besides the weight, on a CPU
# What malloc's heap, where pieces of up to 32 MiB come from, loses to holes between them, unless a plan is frugal, see
# gguf_sd.runtime.host_heap: as much as they take, up to this. Measured in bfloat16 at 512x512: SD 1.5, both halves at
# once, of 87 MB 77 in the first step and up to 125 in later ones; SDXL, one half, of 73 MB none to 60.
HOLES = 160 << 20
SLACK = 0.04  # share of what work allocates that lies idle in allocators
STEP_DOWN = 0.7  # of the peak that ran out of memory
HELD = ("resident", "int8")  # of weights, those that are in memory as a whole
NAMES = {"sd1": "Stable Diffusion 1.x", "sdxl": "SDXL"}


@dataclass(frozen=True)
class Workload:
    """What is painted at once."""

    size: tuple[int, int]  # of the latents: height, width
    pictures: int
    guided: bool = True
    chunks: int = 1  # of 75 tokens that the prompts have
    encodes: bool = False  # a picture, to start from
    adapters: int = 0  # values of LoRAs beside the UNet's weights
    lasting: bool = False  # so many steps a picture that it pays to encode the UNet's weights in 8 bits
    controls: tuple[ControlConfig, ...] = ()


@dataclass(frozen=True)
class Machine:
    """What is painted on."""

    gpu: bool
    itemsize: int  # bytes of a value of the UNet and the text encoders
    vae_itemsize: int
    base: int = 0  # bytes that the process takes on the device besides
    onednn: bool = True

    def engine(self, decodes: bool = False) -> Engine:
        return Engine(self.itemsize, self.gpu, self.onednn, decodes)

    @property
    def vae_engine(self) -> Engine:
        return Engine(self.vae_itemsize, self.gpu, self.onednn)


class Stage(NamedTuple):
    """Bytes that a stage takes: its part, and the work with it. ``loading`` is what reading the part takes."""

    name: str
    part: str
    weights: int
    work: int
    loading: int


class _Choice(NamedTuple):
    weights: str
    placement: tuple[str, ...]  # in the order of Planner.own
    batch_guidance: bool
    tile: int | None
    frugal: bool


@dataclass(frozen=True)
class Planner:
    """Plans for one workload of a model on a machine. ``weights`` and ``placement`` other than auto are kept to."""

    config: ModelConfig
    vae: VAEConfig
    tiny: bool  # a tiny autoencoder is in use
    parts: Mapping[str, PartBytes]
    workload: Workload
    machine: Machine
    weights: str = "auto"
    placement: str = "auto"
    vae_tile: int | str = "auto"  # kept to, see gguf_sd.runtime.execution.Execution
    int8: bool = False  # whether auto weights may be int8
    vae_int8: bool = False  # whether the VAE decodes in 8 bits: whole pictures, it does not in bands

    def __post_init__(self) -> None:
        for what, value, known in (
            ("weights mode", self.weights, ("auto", "quantized", *HELD)),
            ("placement", self.placement, ("auto", *PLACEMENTS)),
        ):
            if value not in known:
                raise GgufSdError(f"unknown {what} {value!r}; choose from {', '.join(known)}")

    def plan(self, budget: int) -> MemoryPlan:
        """The fastest that keeps to ``budget`` bytes. Raises GgufSdError, naming the smallest that works, where none
        does."""
        for choice in self._ranked:
            if (peak := self._peak(choice)) <= budget:
                return self._named(choice, peak, budget)
        raise GgufSdError(self._too_small(budget))

    @cached_property
    def smallest(self) -> MemoryPlan:
        """That with the lowest peak; of several the fastest."""
        choice = min(self._ranked, key=self._peak)
        peak = self._peak(choice)
        return self._named(choice, peak, peak)

    def step_down(self, failed: MemoryPlan) -> MemoryPlan | None:
        """The fastest that takes clearly less than one for which there was not enough memory; None where none does."""
        lowest = self.smallest.peak
        if lowest >= failed.peak:
            return None
        return self.plan(max(lowest, int(STEP_DOWN * failed.peak)))

    def seconds(self, plan: MemoryPlan) -> float:
        """What the plan costs, see the module."""
        return self._seconds(self._choice(plan))

    def stages(self, plan: MemoryPlan) -> list[Stage]:
        """In their order."""
        choice = self._choice(plan)
        return [self._stage(name, part, choice) for name, part in self._order]

    def stage_peaks(self, plan: MemoryPlan) -> dict[str, int]:
        """Bytes of the whole process in each stage."""
        return self._peaks(self._choice(plan))

    @cached_property
    def own(self) -> list[str]:
        """The parts that are placed by themselves."""
        return [name for name in self.parts if not name.startswith(CONTROL)]

    @cached_property
    def _controls(self) -> list[str]:
        return [name for name in self.parts if name.startswith(CONTROL)]

    def _placement(self, choice: _Choice) -> dict[str, str]:
        """Of all parts."""
        placement = dict(zip(self.own, choice.placement, strict=True))
        return placement | dict.fromkeys(self._controls, placement["unet"])

    def _choice(self, plan: MemoryPlan) -> _Choice:
        placement = tuple(plan.placement[name] for name in self.own)
        return _Choice(plan.weights, placement, plan.batch_guidance, plan.vae_tile, plan.frugal)

    def _named(self, choice: _Choice, peak: int, budget: int) -> MemoryPlan:
        placement, batched = self._placement(choice), choice.batch_guidance
        in_vae, frugal = self._in_vae(choice), choice.frugal
        return MemoryPlan(choice.weights, placement, batched, choice.tile, frugal, peak, budget, in_vae, self._encodes)

    def _in_vae(self, choice: _Choice) -> str:
        return "int8" if self.vae_int8 and choice.tile is None else ""

    @cached_property
    def _ranked(self) -> list[_Choice]:
        """All choices, the fastest first; of equally fast ones that which takes less."""
        costs = {choice: self._seconds(choice) for choice in self._choices()}
        return sorted(costs, key=lambda choice: (costs[choice], self._peak(choice), choice.placement))

    def _choices(self) -> Iterator[_Choice]:
        modes = [self.weights] if self.weights != "auto" else ["quantized", "resident", *["int8"] * self.int8]
        guidance = (True, False) if self.workload.guided else (True,)
        placements = [self._placements(name) for name in self.own]
        frugality = (False,) if self.machine.gpu else (False, True)
        for choice in map(_Choice._make, product(modes, product(*placements), guidance, self._tiles(), frugality)):
            weights = choice.weights
            if weights == "quantized" or self._placed(choice, "unet") != "streamed":
                yield choice

    def _tiles(self) -> list[int | None]:
        """Those to choose from; None: the whole picture."""
        if isinstance(self.vae_tile, int):
            return [self.vae_tile]
        tiles: list[int | None] = [tile for tile in TILES if tile < max(self.workload.size)]
        if self.vae_tile == "off" or not tiles:
            return [None]
        return tiles if self.vae_tile == "on" else [None, *tiles]

    def _placements(self, part: str) -> tuple[str, ...]:
        """The VAE's weights are few, and read again for every band: it is not streamed."""
        able = PLACEMENTS[:2] if part == "vae" or (part == "unet" and self.weights in HELD) else PLACEMENTS
        if self.placement == "auto":
            return able
        return (self.placement,) if self.placement in able else ("staged",)

    def _placed(self, choice: _Choice, part: str) -> str:
        return choice.placement[self.own.index(part)]

    def _peak(self, choice: _Choice) -> int:
        return max(self._peaks(choice).values())

    def _peaks(self, choice: _Choice) -> dict[str, int]:
        resident = {
            name: self._weights(name, "resident", choice)
            for name, placement in self._placement(choice).items()
            if placement == "resident"
        }
        total, base = sum(resident.values()), self.machine.base
        peaks = {}
        for name, part in self._order:
            stage = self._stage(name, part, choice)
            used = sum(resident.get(other, 0) for other in self._used(part))
            peaks[name] = base + total - used + max(stage.weights + int(stage.work * (1 + SLACK)), stage.loading)
        return peaks

    @cached_property
    def _order(self) -> list[tuple[str, str]]:
        """Names of the stages and of their parts."""
        texts = [(name, name) for name in self.parts if name.startswith("text")]
        encode = [("vae encode", "vae")] if self._encodes else []
        safety = [("safety", "safety")] if "safety" in self.parts else []
        return [*texts, *encode, ("unet", "unet"), ("vae decode", "vae"), *safety]

    @property
    def _encodes(self) -> bool:
        inpaints = self.config.unet.in_channels != self.config.vae.latent_channels
        return self.workload.encodes or inpaints

    def _used(self, part: str) -> list[str]:
        """The parts that run in the stage of one."""
        return [part, *(self._controls if part == "unet" else ())]

    def _stage(self, name: str, part: str, choice: _Choice) -> Stage:
        placement, quantized = self._placed(choice, part), choice.weights == "quantized"
        key = name, placement, *self._matters(name, choice)
        if key not in self._stages:
            weights = sum(self._weights(other, placement, choice) for other in self._used(part))
            loading = weights
            if part == "unet" and not quantized and not self.machine.gpu:
                loading += self.parts[part].stored  # the file's pages, until all of it is dequantised
            self._stages[key] = Stage(name, part, weights, self._work(name, choice), loading)
        return self._stages[key]

    @cached_property
    def _stages(self) -> dict[tuple[object, ...], Stage]:
        return {}

    @staticmethod
    def _matters(stage: str, choice: _Choice) -> tuple[object, ...]:
        """What of a choice a stage depends on, beside its part's placement."""
        if stage == "unet":
            return choice.weights, choice.batch_guidance, choice.frugal
        return (choice.tile,) if stage.startswith("vae") else ()

    def _weights(self, part: str, placement: str, choice: _Choice) -> int:
        counts, itemsize = self.parts[part], self.machine.itemsize
        if part == "vae":
            counts = counts if self._encodes else counts.decoder
            return counts.loaded(self.machine.vae_itemsize, self._in_vae(choice) or "resident")
        if placement == "streamed":
            return counts.streamed(itemsize)
        in_blocks = part == "unet" or part.startswith(CONTROL)
        return counts.loaded(itemsize, choice.weights if in_blocks else "resident")

    def _work(self, stage: str, choice: _Choice) -> int:
        load, machine = self.workload, self.machine
        if stage == "unet":
            return self._unet_work(choice)
        if stage.startswith("text"):
            text = self.config.text[int(stage.removeprefix("text "))]
            return activations.text_encode(text, load.chunks, machine.engine())
        if stage == "safety" and self.config.safety:
            return activations.safety_check(self.config.safety, machine.engine())
        pixels = activations.finished_pixels(load.pictures, load.size, self.vae.downscale)
        encodes, engine = stage == "vae encode", machine.vae_engine
        if choice.tile is not None:
            return activations.vae_banded(self.vae, load.size, choice.tile, engine, self.tiny, encodes) + pixels
        run = activations.vae_encode if encodes else activations.vae_decode
        codes = activations.finest_values(self.vae, load.size) if self.vae_int8 else 0
        return run(self.vae, load.size, engine, self.tiny) + pixels + codes

    def _unet_work(self, choice: _Choice) -> int:
        load, machine = self.workload, self.machine
        largest = max(self.parts[name].largest_blocks for name in self._used("unet"))
        quantized = choice.weights == "quantized"
        halves = 2 if load.guided and choice.batch_guidance else 1
        tokens = load.chunks * self.config.text[0].max_position_embeddings
        if choice.frugal:
            largest = min(largest, PART_VALUES)
        engine = machine.engine(decodes=quantized)
        step = activations.unet_step(self.config.unet, load.pictures, halves, load.size, tokens, engine, load.controls)
        if not machine.gpu and not choice.frugal:
            step += min(step, HOLES)
        step += load.adapters * machine.itemsize
        if choice.weights == "int8":
            step += activations.joined_values(self.config.unet, load.pictures * halves, load.size)
        if quantized and not machine.gpu:
            step += largest * machine.itemsize  # the buffer for decoded weights
            step += DECODING * min(largest, CHUNK_VALUES)
        return step

    def _seconds(self, choice: _Choice) -> float:
        placement = self._placement(choice)
        passes = 2 if self.workload.guided and not choice.batch_guidance else 1
        return plan_cost.seconds(self.parts, placement, choice.weights, passes, choice.tile, choice.frugal, self._sizes)

    @cached_property
    def _sizes(self) -> plan_cost.Sizes:
        height, width = self.workload.size
        halves = 2 if self.workload.guided else 1
        return plan_cost.Sizes(height * width, self.workload.pictures, halves, self.machine.gpu)

    def _too_small(self, budget: int) -> str:
        least, load = self.smallest, self.workload
        height, width = (side * self.vae.downscale for side in load.size)
        name = NAMES.get(self.config.name, self.config.name)
        batch = f" in batches of {load.pictures}" if load.pictures > 1 else ""
        ways = ["a smaller --batch"] if load.pictures > 1 else []
        ways += ["a smaller size", *["--weights quantized"] * (self.weights in HELD)]
        return (
            f"{name} at {width}x{height}{batch} needs at least {memory_text(least.peak)} of memory, "
            f"{memory_text(budget)} may be used; give more with --max-memory, or take {', or '.join(ways)}"
        )
