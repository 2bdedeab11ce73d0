"""A GGUF file seen as a Stable Diffusion model: its configuration, and its parts by canonical name.

What it takes to open one needs no torch: it is imported, with the modules that use it, when a part is loaded.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.identify import identify
from gguf_sd.checkpoint.tensor_names import SAFETY, TEXT, UNET, VAE, canonical_names
from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from gguf_sd.checkpoint.assign import Source
    from gguf_sd.models.safety import SafetyChecker
    from gguf_sd.models.text import TextEncoder
    from gguf_sd.models.unet import UNet
    from gguf_sd.models.vae import Autoencoder
    from gguf_sd.prompt.tokenizer import Tokenizer

CONFIG_KEY = "gguf_sd.config"
FORMAT_KEY = "gguf_sd.format_version"
FORMAT_VERSION = 1
XL_TEXTS = ("conditioner.embedders.0.", "conditioner.embedders.1.")
XL_WRAPPER = re.compile(r"^(model|transformer(?=\.text_model))\.")
SOURCE_HASH_KEY = "gguf_sd.source.sha256"


def part_of(canonical: str) -> str:
    """Which part of the model a tensor belongs to."""
    parts = {UNET: "unet", VAE: "vae", TEXT: "text encoder", SAFETY: "safety checker"}
    parts |= {prefix: f"text encoder {i + 1}" for i, prefix in enumerate(XL_TEXTS)}
    return next((part for prefix, part in parts.items() if canonical.startswith(prefix)), "other")


@dataclass(frozen=True)
class ModelFile:
    """An opened model. Nothing but the header is read until a part is loaded."""

    file: GGUFFile
    config: ModelConfig
    names: dict[str, str]  # canonical name -> name in the file

    @classmethod
    def open(cls, path: Path | str) -> ModelFile:
        """Raises GgufSdError for files that are no GGUF, no Stable Diffusion, or newer than this program."""
        file = GGUFFile(path)
        names = canonical_names(file.tensors)
        version = file.metadata.get(FORMAT_KEY, FORMAT_VERSION)
        if version != FORMAT_VERSION:
            raise GgufSdError(
                f"{path} has gguf-sd format version {version}, this program reads {FORMAT_VERSION}; update gguf-sd"
            )
        shapes = {canonical: file.shape(name) for canonical, name in names.items()}
        if CONFIG_KEY not in file.metadata:
            return cls(file, identify(shapes, str(path)), names)
        try:
            config = ModelConfig.from_dict(file.json(CONFIG_KEY))
        except (TypeError, ValueError, AttributeError) as error:
            raise GgufSdError(f"{path} has damaged metadata: {CONFIG_KEY}: {error}") from error
        return cls(file, config, names)

    @property
    def path(self) -> Path:
        return self.file.path

    def part(self, prefix: str) -> dict[str, Source]:
        """Readers of the tensors under a canonical prefix, by the name behind it."""
        sources: dict[str, Source] = {
            canonical.removeprefix(prefix): partial(self.file.tensor, name)
            for canonical, name in self.names.items()
            if canonical.startswith(prefix)
        }
        if not sources:
            raise GgufSdError(
                f"{self.path} holds no {prefix}* tensors, it is not a whole model; "
                "convert a full checkpoint or a diffusers folder"
            )
        return sources

    def _copied(self, prefix: str, dtype: torch.dtype) -> dict[str, Source]:
        """As :meth:`part`, for tensors that are converted at once: their pages go back one by one, so that a part is
        never in memory twice."""

        from gguf_sd.checkpoint.quant_tensor import QuantTensor

        def read(source: Source) -> Tensor:
            stored = source()
            full = stored.dequantize(dtype) if isinstance(stored, QuantTensor) else stored.to(dtype)
            self.file.forget_pages()
            return full

        return {name: partial(read, source) for name, source in self.part(prefix).items()}

    @property
    def source_hash(self) -> str:
        """SHA-256 of the checkpoint the file was made from, as hex; empty where it is not known."""
        return str(self.file.metadata.get(SOURCE_HASH_KEY, ""))

    def unet_values(self) -> int:
        """Number of weights in the UNet."""
        return sum(prod(self.file.tensors[n].shape) for c, n in self.names.items() if c.startswith(UNET))

    def load_unet(self, dtype: torch.dtype) -> UNet:
        """The UNet, quantised weights still in blocks, everything else in ``dtype``."""
        import torch

        from gguf_sd.checkpoint.assign import assign
        from gguf_sd.models.unet import UNet

        with torch.device("meta"):
            unet = UNet(self.config.unet)
        assign(unet, self.part(UNET), dtype, str(self.path))
        return unet.eval()

    def load_vae(self, dtype: torch.dtype) -> Autoencoder:
        import torch

        from gguf_sd.checkpoint.assign import assign
        from gguf_sd.models.vae import Autoencoder

        with torch.device("meta"):
            vae = Autoencoder(self.config.vae)
        assign(vae, self._copied(VAE, dtype), dtype, str(self.path), keep_quantized=False)
        return vae.eval()

    def load_text(self, index: int, dtype: torch.dtype) -> TextEncoder:
        """The model's text encoder number ``index``."""
        from gguf_sd.models.text import TextEncoder

        if len(self.config.text) == 1:
            tensors = self._copied(TEXT, dtype)
        else:  # the second is OpenCLIP's ("model."), or transformers' in the files of other tools
            tensors = {XL_WRAPPER.sub("", name): s for name, s in self._copied(XL_TEXTS[index], dtype).items()}
        return TextEncoder.load(self.config.text[index], tensors, dtype, str(self.path))

    def load_safety(self, dtype: torch.dtype) -> SafetyChecker:
        """The model's safety checker. Raises GgufSdError where the file carries none (``config.safety`` is None)."""
        from gguf_sd.models.safety import SafetyChecker

        if self.config.safety is None:
            raise GgufSdError(
                f"{self.path} carries no safety checker; convert a diffusers folder that has one, or do without"
            )
        checker = SafetyChecker.load(self.config.safety, self.part(SAFETY), dtype, str(self.path))
        self.file.forget_pages()
        return checker

    def tokenizer(self, chosen: Path | None = None) -> Tokenizer:
        """The file's own tokenizer; ``chosen`` (a tokenizer folder or a BPE merges file), or one that can be found, for
        files of other tools, which carry none."""
        from gguf_sd.prompt.find_tokenizer import find_tokenizer
        from gguf_sd.prompt.tokenizer import METADATA_KEY, Tokenizer

        text = self.file.metadata.get(METADATA_KEY)
        if chosen is not None or text is None:
            text = find_tokenizer(chosen, None, self.config.text[0]).json
        return Tokenizer(str(text), str(self.path))
