"""A GGUF file seen as a Stable Diffusion model: its configuration, and its parts by canonical name.

Opening one needs no torch, which is imported when a part is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.check_tensors import XL_TEXTS, check_tensors, text_names, warn_of_strays
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.identify import MARKERS, identify
from gguf_sd.checkpoint.mapped_file import MappedFile
from gguf_sd.checkpoint.part_files import PartPaths, joined, missing_parts, missing_sentence
from gguf_sd.checkpoint.tensor_names import ENCODER, SAFETY, TEXT, UNET, VAE, canonical_names
from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.sampling.names import resolve_sampler, resolve_schedule

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gguf_sd.checkpoint.assign import Deferred, Source
    from gguf_sd.checkpoint.quant_tensor import QuantTensor
    from gguf_sd.models.safety import SafetyChecker
    from gguf_sd.models.text import TextEncoder
    from gguf_sd.models.unet import UNet
    from gguf_sd.models.vae import Autoencoder
    from gguf_sd.prompt.tokenizer import Tokenizer


def part_of(canonical: str) -> str:
    """Which part of the model a tensor belongs to."""
    parts = {UNET: "unet", VAE: "vae", TEXT: "text encoder", SAFETY: "safety checker"}
    parts |= {prefix: f"text encoder {i + 1}" for i, prefix in enumerate(XL_TEXTS)}
    return next((part for prefix, part in parts.items() if canonical.startswith(prefix)), "other")


@dataclass(frozen=True)
class ModelFile:
    """An opened model. Nothing but the header is read until a part is loaded."""

    file: MappedFile
    config: ModelConfig
    names: dict[str, str]  # canonical name -> name in the file
    strays: frozenset[str] = frozenset()  # canonical names of tensors that belong to no part

    @classmethod
    def open(cls, path: Path | str, parts: PartPaths | None = None) -> ModelFile:
        """Checks configuration and tensors against each other; text encoders of ``parts`` take the place of the file's
        own. Raises GgufSdError for files that are no GGUF, no Stable Diffusion, damaged, or newer than this program;
        tensors that do not belong are one warning."""
        file: MappedFile = GGUFFile(path)
        version = file.metadata.get(keys.FORMAT, keys.FORMAT_VERSION)
        if version != keys.FORMAT_VERSION:
            raise GgufSdError(
                f"{path} has gguf-sd format version {shown(version)}, this program reads {keys.FORMAT_VERSION}; "
                "update gguf-sd"
            )
        model = cls.of(file, own_config(file) if keys.CONFIG in file.metadata else None)
        return model.with_parts(parts) if parts and parts.given else model

    @classmethod
    def of(cls, file: MappedFile, config: ModelConfig | None) -> ModelFile:
        """An opened file as a model, of ``config`` or recognised from its tensors."""
        names = canonical_names(file.tensors, config.unet if config else None)
        shapes = {canonical: file.shape(name) for canonical, name in names.items()}
        config = config or identify(shapes, str(file.path))
        strays = [name for name in check_tensors(config, shapes, str(file.path)) if name not in MARKERS]
        warn_of_strays([names[name] for name in strays], str(file.path))
        return cls(file, config, names, frozenset(strays))

    def with_parts(self, parts: PartPaths) -> ModelFile:
        """The same with text encoders from other files, see :func:`gguf_sd.checkpoint.part_files.joined`."""
        known = {canonical: name for canonical, name in self.names.items() if canonical not in self.strays}
        file = joined(self.file, known, self.config, parts)
        return replace(self, file=file, names={name: name for name in file.tensors}, strays=frozenset())

    def check_whole(self, vae: bool = False) -> None:
        """Raises GgufSdError where a part is missing that painting takes, naming the option that gives it; ``vae``:
        whether an autoencoder comes from elsewhere."""
        if missing := [part for part in missing_parts(self.config, self.names) if part != "vae" or not vae]:
            raise GgufSdError(missing_sentence(self.path, self.config, missing))

    @property
    def path(self) -> Path:
        return self.file.path

    def part(self, prefix: str) -> dict[str, Source]:
        """Readers of the tensors under a canonical prefix, by the name behind it."""
        sources: dict[str, Source] = {
            canonical.removeprefix(prefix): partial(self.file.tensor, name)
            for canonical, name in self.names.items()
            if canonical.startswith(prefix) and canonical not in self.strays
        }
        if not sources:
            raise GgufSdError(
                f"{self.path} holds no {prefix}* tensors, it is not a whole model; "
                "convert a full checkpoint or a diffusers folder"
            )
        return sources

    def _passing(self, names: dict[str, str]) -> dict[str, Source]:
        """Readers of tensors, given by the name for the reader and their canonical one, for parts that take what they
        need: the pages behind one go back when the next is read, so that a part is never in memory twice."""

        def read(name: str) -> Tensor | QuantTensor:
            self.file.forget_pages()
            return self.file.tensor(name)

        known = {local: canonical for local, canonical in names.items() if canonical not in self.strays}
        return {local: partial(read, self.names[canonical]) for local, canonical in known.items()}

    def _under(self, prefix: str) -> dict[str, str]:
        """Name behind the prefix -> canonical name; raises GgufSdError where there is none."""
        return {local: prefix + local for local in self.part(prefix)}

    @property
    def source_hash(self) -> str:
        """SHA-256 of the checkpoint the file was made from, as hex; empty where it is not known."""
        return str(self.file.metadata.get(keys.SOURCE_HASH, ""))

    def unet_values(self) -> int:
        """Number of weights in the UNet."""
        return sum(prod(self.file.tensors[n].shape) for c, n in self.names.items() if c.startswith(UNET))

    def load_unet(self, dtype: torch.dtype, deferred: dict[str, Deferred] | None = None) -> UNet:
        """The UNet, quantised weights still in blocks, everything else in ``dtype``. ``deferred``, here and below: see
        :func:`gguf_sd.checkpoint.assign.assign`."""
        import torch

        from gguf_sd.checkpoint.assign import assign
        from gguf_sd.models.unet import UNet

        with torch.device("meta"):
            unet = UNet(self.config.unet)
        # Of a UNet whose weights wait in the file, only small tensors all over it are read here: with each, Linux maps
        # up to 2 MiB around it.
        sources = self.part(UNET) if deferred is None else self._passing(self._under(UNET))
        assign(unet, sources, dtype, str(self.path), prefix=UNET, deferred=deferred)
        return unet.eval()

    def load_vae(self, dtype: torch.dtype, encodes: bool = True) -> Autoencoder:
        """The VAE; without ``encodes`` only what decodes."""
        import torch

        from gguf_sd.checkpoint.assign import assign
        from gguf_sd.models.vae import Autoencoder

        with torch.device("meta"):
            vae = Autoencoder(self.config.vae)
        names = self._under(VAE)
        if not encodes:
            vae.forget_encoder()
            names = {local: name for local, name in names.items() if not local.startswith(ENCODER)}
        assign(vae, self._passing(names), dtype, str(self.path), keep_quantized=False, prefix=VAE)
        self.file.forget_pages()
        return vae.eval()

    def load_text(self, index: int, dtype: torch.dtype, deferred: dict[str, Deferred] | None = None) -> TextEncoder:
        """The model's text encoder number ``index``."""
        from gguf_sd.models.text import TextEncoder

        texts = self.config.text
        prefix = TEXT if len(texts) == 1 else XL_TEXTS[index]
        self.part(prefix)  # raises where there is none
        tensors = self._passing(text_names(self.names, len(texts), index))
        encoder = TextEncoder.load(texts[index], tensors, dtype, str(self.path), deferred, prefix)
        self.file.forget_pages()
        return encoder

    def load_safety(self, dtype: torch.dtype, deferred: dict[str, Deferred] | None = None) -> SafetyChecker:
        """The model's safety checker. Raises GgufSdError where the file carries none (``config.safety`` is None)."""
        if self.config.safety is None:
            raise GgufSdError(
                f"{self.path} carries no safety checker; convert a diffusers folder that has one, or do without"
            )
        from gguf_sd.models.safety import SafetyChecker

        checker = SafetyChecker.load(self.config.safety, self.part(SAFETY), dtype, str(self.path), deferred)
        self.file.forget_pages()
        return checker

    def tokenizer(self, chosen: Path | None = None) -> Tokenizer:
        """The file's own tokenizer; ``chosen`` (a tokenizer folder or a BPE merges file), or one that can be found, for
        files of other tools, which carry none."""
        from gguf_sd.prompt.find_tokenizer import find_tokenizer
        from gguf_sd.prompt.tokenizer import Tokenizer

        text = self.file.metadata.get(keys.TOKENIZER)
        if chosen is not None or text is None:
            text = find_tokenizer(chosen, None, self.config.text[0]).json
        return Tokenizer(str(text), str(self.path))


def own_config(file: MappedFile) -> ModelConfig:
    """The configuration that a file of ours carries. Raises GgufSdError: file, key, value and what is allowed."""
    where = f"{file.path} has damaged metadata: {keys.CONFIG}"
    try:
        config = ModelConfig.from_dict(file.json(keys.CONFIG))
    except ValueError as error:
        raise GgufSdError(f"{where}: {error}") from error
    try:
        sampler, _ = resolve_sampler(config.defaults.sampler)
        resolve_schedule(config.defaults.schedule, sampler)
    except GgufSdError as error:
        raise GgufSdError(f"{where}: defaults: {error}") from error
    return config
