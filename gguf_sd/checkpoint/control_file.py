"""A GGUF file seen as a ControlNet. Opening one needs no torch, which is imported when it is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.check_tensors import check_part, warn_of_strays
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.tensor_names import CONTROL
from gguf_sd.checkpoint.what_is_it import what_is
from gguf_sd.config import SD15, SDXL, ControlConfig, ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown

if TYPE_CHECKING:
    import torch

    from gguf_sd.checkpoint.assign import Deferred
    from gguf_sd.models.controlnet import ControlNet

MADE_FOR = {"sd1": "Stable Diffusion 1.x", "sdxl": "SDXL"}
TAKES = "--control takes a ControlNet: a GGUF, .safetensors or .pth file, or a diffusers folder"
Stamp = tuple[int, int]  # time and size of a file, which tell one from its successor


@dataclass(frozen=True)
class ControlFile:
    """An opened ControlNet; two are equal where path and stamp are. Nothing but the header is read until it is
    loaded."""

    path: Path
    stamp: Stamp
    file: GGUFFile = field(repr=False, compare=False)
    config: ControlConfig = field(compare=False)
    names: dict[str, str] = field(repr=False, compare=False)  # canonical name -> name in the file
    strays: frozenset[str] = field(default=frozenset(), repr=False, compare=False)

    @classmethod
    def open(cls, path: Path) -> ControlFile:
        """Raises GgufSdError for files that are no GGUF, no ControlNet, damaged, or newer than this program."""
        file = GGUFFile(path)
        version = file.metadata.get(keys.FORMAT, keys.FORMAT_VERSION)
        if version != keys.FORMAT_VERSION:
            raise GgufSdError(
                f"{path} has gguf-sd format version {shown(version)}, this program reads {keys.FORMAT_VERSION}; "
                "update gguf-sd"
            )
        names = control_names(file.tensors)
        shapes = {canonical: file.shape(name) for canonical, name in names.items()}
        config = _own_config(file) if keys.CONTROL in file.metadata else identify_control(shapes, str(path))
        local = {canonical.removeprefix(CONTROL): canonical for canonical in names if canonical.startswith(CONTROL)}
        known = check_part(local, inventory.controlnet(config), shapes, str(path))
        if not known:
            raise GgufSdError(f"{path} holds no {CONTROL}* tensors; {TAKES}")
        strays = frozenset(set(names) - known)
        warn_of_strays([names[name] for name in names if name in strays], str(path))
        stat = path.stat()
        return cls(path, (stat.st_mtime_ns, stat.st_size), file, config, names, strays)

    @property
    def name(self) -> str:
        """What the ControlNet is called: the name of what it was made from."""
        return str(self.file.metadata.get(keys.SOURCE_NAME, self.path.name)).rpartition("/")[2]

    @property
    def source_hash(self) -> str:
        """SHA-256 of the file it was made from, as hex; empty where it is not known."""
        return str(self.file.metadata.get(keys.SOURCE_HASH, ""))

    def check_fits(self, model: ModelConfig) -> None:
        """Raises GgufSdError where it is for other models."""
        if why := self.config.misfit(model):
            own, wanted = MADE_FOR[self.config.name], MADE_FOR[model.name]
            kind = f"a ControlNet for {own}, the model is {wanted}" if own != wanted else "no ControlNet for this model"
            raise GgufSdError(f"{self.path} is {kind} ({why}); choose one made for it")

    def load(self, dtype: torch.dtype, deferred: dict[str, Deferred] | None = None) -> ControlNet:
        """The ControlNet, quantised weights still in blocks, everything else in ``dtype``; ``deferred``: see
        :func:`gguf_sd.checkpoint.assign.assign`."""
        import torch

        from gguf_sd.checkpoint.assign import assign
        from gguf_sd.models.controlnet import ControlNet

        with torch.device("meta"):
            net = ControlNet(self.config)
        sources = {
            canonical.removeprefix(CONTROL): partial(self.file.tensor, name)
            for canonical, name in self.names.items()
            if canonical not in self.strays
        }
        assign(net, sources, dtype, str(self.path), prefix=CONTROL, deferred=deferred)
        return net.eval()


def control_names(names: Sequence[str] | Mapping[str, object]) -> dict[str, str]:
    """Canonical name -> name in the file; some leave the prefix out. Others' parts of a whole checkpoint, the UNet that
    a ControlNet was trained beside, say, are left out."""
    bare = "input_hint_block.0.weight" in names
    own = names if bare else [name for name in names if name.startswith(CONTROL)]
    return {CONTROL + name if bare else name: name for name in own}


def _own_config(file: GGUFFile) -> ControlConfig:
    try:
        return ControlConfig.from_dict(file.json(keys.CONTROL))
    except ValueError as error:
        raise GgufSdError(f"{file.path} has damaged metadata: {keys.CONTROL}: {error}") from error


def identify_control(shapes: Mapping[str, Sequence[int]], source: str) -> ControlConfig:
    """The configuration of a ControlNet for SD 1.x or SDXL of these shapes, by canonical name. Raises GgufSdError for
    anything else."""

    def columns(name: str) -> int:
        shape = shapes.get(CONTROL + name, ())
        return shape[-1] if len(shape) > 1 else 0

    first = shapes.get(CONTROL + "input_blocks.0.0.weight")
    if first is None:
        kind = what_is(shapes)
        what = f"{source} is {kind.name}" if kind is not None else f"{source} is no ControlNet"
        raise GgufSdError(f"{what}; {TAKES}")
    key = "transformer_blocks.0.attn2.to_k.weight"
    context = columns(f"input_blocks.1.1.{key}") or columns(f"input_blocks.4.1.{key}")
    for model in (SD15, SDXL):
        unet = model.unet
        if (first[0], context, columns("label_emb.0.0.weight")) == (
            unet.block_out_channels[0],
            unet.context_dim,
            unet.vector_dim,
        ):
            return ControlConfig(model.name, replace(unet, in_channels=4))
    raise GgufSdError(
        f"{source} is a ControlNet of an unknown shape (first convolution {list(first)}, context width {context}); "
        "those for Stable Diffusion 1.x and XL are supported, other widths only as a diffusers folder"
    )
