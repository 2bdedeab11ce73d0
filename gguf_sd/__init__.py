"""gguf-sd: Stable Diffusion in one quantised GGUF file.

>>> import gguf_sd
>>> gguf_sd.convert("v1-5-pruned.safetensors", "sd15.gguf", type="q4_0")  # doctest: +SKIP
>>> gguf_sd.inspect("sd15.gguf")["architecture"]  # doctest: +SKIP
'sd1'
>>> pipeline = gguf_sd.Pipeline.load("sd15.gguf")  # doctest: +SKIP
>>> pictures = pipeline(["a lighthouse at dusk", "a lighthouse at dawn"], steps=20, seed=7)  # doctest: +SKIP
>>> pictures[0].info["parameters"]  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gguf_sd.api import convert as convert
    from gguf_sd.api import inspect as inspect
    from gguf_sd.control import Control as Control
    from gguf_sd.errors import GgufSdError as GgufSdError
    from gguf_sd.pipeline import Pipeline as Pipeline
    from gguf_sd.request import Request as Request

try:
    __version__ = version("gguf-sd")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Control", "GgufSdError", "Pipeline", "Request", "__version__", "convert", "inspect"]
_HOMES = {
    "Control": "control",
    "GgufSdError": "errors",
    "Pipeline": "pipeline",
    "Request": "request",
    "convert": "api",
    "inspect": "api",
}


def __getattr__(name: str) -> Any:
    """Imports torch and the rest only when something that needs them is asked for."""
    if name in _HOMES:
        return getattr(import_module(f"gguf_sd.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'gguf_sd' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
