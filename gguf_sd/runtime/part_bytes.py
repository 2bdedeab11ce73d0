"""What each part of a model takes, in its file and loaded: from the file's header alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import prod

from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint.check_tensors import text_names
from gguf_sd.checkpoint.control_file import ControlFile
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.tensor_names import CONTROL as CONTROL_NET
from gguf_sd.checkpoint.tensor_names import ENCODER, SAFETY, UNET, VAE
from gguf_sd.checkpoint.vae_file import VAEFile
from gguf_sd.models.int8 import IN_DECODER, stays_wide
from gguf_sd.models.tiny_vae import tiny_config
from gguf_sd_kernels.formats import FORMATS

# What is streamed together: a residual block, a transformer block, or a layer by itself.
STAGE = re.compile(
    r"(?:input_blocks|output_blocks)\.\d+\.\d+\.(?:transformer_blocks\.\d+\.)?|middle_block\.\d+\."
    r"(?:transformer_blocks\.\d+\.)?|.*\b(?:layers|resblocks)\.\d+\."
)
LOOKED_UP = re.compile(r"token_embedding\.weight$")  # rows are, the table is never streamed
ENLARGING = re.compile(r"output_blocks\.\d+\.\d+\.conv\.weight$")
CONTROL = "control"  # kind of the parts that are ControlNets
TINY_VALUES = 2_450_000  # of a tiny autoencoder, both halves


@dataclass(frozen=True)
class PartBytes:
    """Counts of a part's weights. ``blocks`` are bytes of the weights that stay quantised where the part is loaded so,
    ``plain`` the number of all the others."""

    stored: int  # bytes in the file
    values: int  # weights
    blocks: int = 0
    plain: int = 0
    largest_blocks: int = 0  # weights of the largest tensor in blocks
    held: int = 0  # of a streamed part: weights that stay
    stage_blocks: int = 0  # and the largest stage that comes and goes
    stage_plain: int = 0
    beside: int = 0  # values of LoRAs beside the weights
    narrow: int = 0  # weights that take a byte each in a UNet, or a VAE's decoder, that computes in 8 bits
    phases: int = 0  # bytes of some of them in a second form, see gguf_sd_kernels.cpu.enlarged
    encoder: int = 0  # weights of a VAE's that only encode

    @property
    def decoder(self) -> PartBytes:
        """Without them."""
        return replace(self, values=self.values - self.encoder, plain=self.plain - self.encoder, encoder=0)

    def loaded(self, itemsize: int, weights: str = "resident") -> int:
        """Bytes of the part in memory with ``weights`` as in :class:`gguf_sd.runtime.memory.MemoryPlan`, ``itemsize`` a
        value that is neither in blocks nor in 8 bits."""
        if weights == "int8":
            own = self.narrow + self.phases + (self.values - self.narrow) * itemsize
        else:
            own = self.blocks + self.plain * itemsize if weights == "quantized" else self.values * itemsize
        return own + self.beside * itemsize

    def streamed(self, itemsize: int) -> int:
        """Bytes of what is in memory of a streamed part: one stage that is used, and one on its way."""
        return (self.held + self.beside) * itemsize + 2 * (self.stage_blocks + self.stage_plain * itemsize)


def part_bytes(model: ModelFile, vae_file: VAEFile | None = None) -> dict[str, PartBytes]:
    """By part: text 0, text 1, unet, vae, and safety where the model has one; the VAE is ``vae_file``'s where it is
    given."""
    names = [name for name in model.names if name not in model.strays]
    encoders = len(model.config.text)
    parts = {}
    for index in range(encoders):
        own = text_names(model.names, encoders, index).values()
        parts[f"text {index}"] = _count(model, [name for name in own if name not in model.strays], quantized=False)
    parts["unet"] = _count(model, [name for name in names if name.startswith(UNET)], quantized=True)
    parts["vae"] = _other_vae(vae_file) if vae_file else _own_vae(model, [n for n in names if n.startswith(VAE)])
    if model.config.safety is not None:
        parts["safety"] = _count(model, [name for name in names if name.startswith(SAFETY)], quantized=False)
    return parts


def control_bytes(files: Sequence[ControlFile]) -> dict[str, PartBytes]:
    """Of a job's ControlNets, by part: control 0, control 1, …."""
    return {
        f"{CONTROL} {index}": _count(file, [name for name in file.names if name not in file.strays], quantized=True)
        for index, file in enumerate(files)
    }


def _count(model: ModelFile | ControlFile, names: Iterable[str], quantized: bool) -> PartBytes:
    """``quantized``: whether matrices in blocks stay so."""
    stored = values = blocks = plain = largest = held = narrow = phases = 0
    stages: dict[str, list[int]] = {}
    for canonical in names:
        name = model.names[canonical]
        info, shape = model.file.tensors[name], model.file.shape(name)
        count = prod(shape)
        stored, values = stored + info.nbytes, values + count
        kind = FORMATS.get(info.type.name)
        in_blocks = quantized and kind is not None and len(shape) > 1 and prod(shape[1:]) % kind.block_size == 0
        if in_blocks:
            blocks, largest = blocks + info.nbytes, max(largest, count)
        else:
            plain += count
        if quantized and len(shape) > 1 and not stays_wide(_module(canonical)):
            narrow += count
            phases += count * 16 // 9 if ENLARGING.search(canonical) else 0
        if len(shape) < 2:
            held += count
        elif not LOOKED_UP.search(canonical):
            found = STAGE.search(canonical)
            stage = stages.setdefault(found[0] if found else canonical, [0, 0])
            stage[0] += info.nbytes if in_blocks else 0
            stage[1] += 0 if in_blocks else count
    some, others = max(stages.values(), key=lambda stage: stage[0] + 4 * stage[1], default=[0, 0])
    return PartBytes(stored, values, blocks, plain, largest, held, some, others, narrow=narrow, phases=phases)


def _module(name: str) -> str:
    """Of a weight, in the names of the UNet or the ControlNet that it is of."""
    return name.removeprefix(UNET).removeprefix(CONTROL_NET).removesuffix(".weight")


def _own_vae(model: ModelFile, names: Sequence[str]) -> PartBytes:
    values = {name.removeprefix(VAE): prod(model.file.shape(model.names[name])) for name in names}
    encoder = sum(count for name, count in values.items() if name.startswith(ENCODER))
    narrow = sum(count for name, count in values.items() if IN_DECODER.fullmatch(name))
    return replace(_count(model, names, quantized=False), encoder=encoder, narrow=narrow)


def _other_vae(file: VAEFile) -> PartBytes:
    if file.config == tiny_config(file.config.latent_channels):
        return PartBytes(2 * TINY_VALUES, TINY_VALUES, plain=TINY_VALUES)
    count = sum(prod(shape) for _, shape in inventory.vae(file.config))
    return PartBytes(2 * count, count, plain=count)
