"""Bytes of a file as a tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from gguf_sd.errors import GgufSdError


def read_bytes(path: Path, offset: int, nbytes: int) -> Tensor:
    """A file's bytes as uint8 [nbytes]. Raises GgufSdError where it has become shorter or cannot be read."""
    buffer = torch.empty(nbytes, dtype=torch.uint8)
    view, done = buffer.numpy().data, 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while done < nbytes:
                if not (count := file.readinto(view[done:])):
                    raise GgufSdError(
                        f"{path} ended at byte {offset + done} while it was read; is it still being written?"
                    )
                done += count
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error
    return buffer
