"""Calibration data in a file: llama.cpp's importance matrix as GGUF, and beside it the calls that it was taken from.

For every weight NAME, as in llama.cpp's files (tools/imatrix): NAME.in_sum2, float32 [columns], the sum of squares of
each input, and NAME.counts, float32 [1]. With the recorded calls of the UNet, under ``gguf_sd.calibration.*``, the
whole calibration can be run again, for any type; without them, in a file of other programs or with ``calls`` left
out, the squares say which weights matter more, and no more than that.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from gguf_sd.atomic_write import put_in_place, temporary_beside
from gguf_sd.bench.calls import Samples
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.config import ModelConfig
from gguf_sd.errors import GgufSdError

SUMS, COUNTS = ".in_sum2", ".counts"
OWN = "gguf_sd.calibration."
FIELDS = ("latents", "timesteps", "prompt", "weights", "contexts")
MAX_CALLS = 1 << 16


@dataclass(frozen=True)
class Imatrix:
    """``importance``: mean square of each column's input, by the weight's canonical name, in the file's column order;
    ``calls``: what it was taken from, where the file has it."""

    importance: dict[str, Tensor] = field(default_factory=dict)
    calls: Samples | None = None


def write_imatrix(path: Path, data: Imatrix, datasets: list[str]) -> None:
    """Writes a file that llama.cpp's quantiser reads; replaces what is there."""
    with temporary_beside(path) as temporary:
        writer = gguf.GGUFWriter(temporary, "imatrix")
        writer.add_type("imatrix")
        writer.add_array("imatrix.datasets", datasets)
        writer.add_uint32("imatrix.chunk_count", len(data.calls) if data.calls else 1)
        writer.add_uint32("imatrix.chunk_size", 1)
        for name, values in data.importance.items():
            writer.add_tensor(name + SUMS, values.float().numpy())
            writer.add_tensor(name + COUNTS, np.ones(1, np.float32))
        if data.calls is not None:
            for name in FIELDS:
                writer.add_tensor(OWN + name, getattr(data.calls, name).float().contiguous().numpy())
            if data.calls.vectors is not None:
                writer.add_tensor(OWN + "vectors", data.calls.vectors.float().contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        put_in_place(temporary, path)


def read_imatrix(path: Path, config: ModelConfig) -> Imatrix:
    """Raises GgufSdError for a file that is none, is damaged, or is of a model of other shapes."""
    file = GGUFFile(path)
    importance = {}
    for name in file.tensors:
        if name.endswith(SUMS) and (own := name.removesuffix(SUMS) + COUNTS) in file.tensors:
            sums, count = _plain(file, name).flatten(), _plain(file, own).flatten()
            if len(count) != 1 or not float(count[0]) > 0 or bool((sums < 0).any()):
                raise GgufSdError(f"{path} is damaged: {name} is no sum of squares of a positive count")
            importance[name.removesuffix(SUMS)] = sums / count[0]
    calls = _calls(file, config) if OWN + "latents" in file.tensors else None
    if not importance and calls is None:
        raise GgufSdError(f"{path} is no importance matrix: it holds neither NAME{SUMS} nor {OWN}latents")
    return Imatrix(importance, calls)


def _plain(file: GGUFFile, name: str) -> Tensor:
    stored = file.tensor(name)
    if not isinstance(stored, Tensor) or not bool(stored.float().isfinite().all()):
        raise GgufSdError(f"{file.path} is damaged: {name} holds values that are no finite numbers")
    return stored.float().clone()


def _calls(file: GGUFFile, config: ModelConfig) -> Samples:
    if missing := [name for name in FIELDS if OWN + name not in file.tensors]:
        raise GgufSdError(f"{file.path} is damaged: it lacks {OWN}{missing[0]}")
    latents, timesteps, prompt, weights, contexts = (_plain(file, OWN + name) for name in FIELDS)
    vectors = _plain(file, OWN + "vectors") if OWN + "vectors" in file.tensors else None
    unet, n = config.unet, len(latents) if latents.dim() else 0
    fits = latents.dim() == 4 and latents.shape[1] == unet.in_channels and 0 < n <= MAX_CALLS
    fits = fits and all(x.shape == (n,) for x in (timesteps, prompt, weights))
    fits = fits and contexts.dim() == 3 and contexts.shape[2] == unet.context_dim
    fits = fits and (vectors is None) == (not unet.vector_dim)
    fits = fits and (vectors is None or vectors.shape == (len(contexts), unet.vector_dim))
    fits = fits and bool(((prompt >= 0) & (prompt < len(contexts)) & (weights >= 0)).all()) and bool(weights.any())
    if not fits:
        raise GgufSdError(f"{file.path} holds calls of another model's UNet; record them with --calibrate")
    steps = timesteps if bool((timesteps != timesteps.round()).any()) else timesteps.to(torch.int64)
    return Samples(latents, steps, prompt.to(torch.int64), weights, contexts, vectors)
