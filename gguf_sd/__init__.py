"""gguf-sd: Stable Diffusion in one quantised GGUF file.

>>> import gguf_sd
>>> pictures = gguf_sd.Pipeline.load("model.gguf")(prompt="a lighthouse at dusk", steps=20)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf_sd.errors import GgufSdError as GgufSdError
    from gguf_sd.pipeline import Pipeline as Pipeline

try:
    __version__ = version("gguf-sd")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["GgufSdError", "Pipeline", "__version__"]


def __getattr__(name: str) -> Any:
    """Imports torch and transformers only when the pipeline is asked for."""
    if name == "Pipeline":
        from gguf_sd.pipeline import Pipeline

        return Pipeline
    if name == "GgufSdError":
        from gguf_sd.errors import GgufSdError

        return GgufSdError
    raise AttributeError(f"module 'gguf_sd' has no attribute {name!r}")
