"""How a model is loaded, as a value that travels: to another process, or until it is needed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

    from gguf_sd.pipeline import Pipeline


@dataclass(frozen=True)
class LoadOptions:
    """The options of :meth:`gguf_sd.pipeline.Pipeline.load`, and for how many seconds kernels are tuned ("off": not at
    all)."""

    device: str = "auto"
    dtype: str | None = "auto"
    weights: str = "auto"
    tokenizer: Path | None = None
    vae: Path | None = None
    kernels: str = "auto"
    cuda_graph: str = "auto"
    max_memory: str | float | None = None
    placement: str = "auto"
    vae_tile: int | str = "auto"
    tune: str = "off"

    @classmethod
    def of(cls, args: argparse.Namespace) -> LoadOptions:
        """Those of a command line, see gguf_sd.cli.generate_options.add_engine."""
        names = ("device", "dtype", "weights", "tokenizer", "vae", "kernels", "cuda_graph", "max_memory", "vae_tile")
        return cls(**{name: getattr(args, name) for name in names}, tune=args.tune)

    def check(self) -> None:
        """Raises GgufSdError for what the pipeline would refuse, as far as that shows without a model."""
        from gguf_sd.checkpoint.vae_file import VAEFile
        from gguf_sd.errors import GgufSdError
        from gguf_sd.runtime.execution import Execution
        from gguf_sd.runtime.tuning import seconds_of

        memory = self.max_memory, self.placement, self.vae_tile
        Execution.choose(self.device, self.dtype, self.weights, self.kernels, self.cuda_graph, *memory)
        seconds_of(self.tune)
        if self.vae is not None:
            VAEFile.open(self.vae)
        if self.tokenizer is not None and not self.tokenizer.exists():
            raise GgufSdError(f"the tokenizer {self.tokenizer} does not exist; give a folder or a BPE merges file")

    def resolved(self) -> LoadOptions:
        """With paths that hold in another folder too."""
        vae, tokenizer = (None if path is None else path.resolve() for path in (self.vae, self.tokenizer))
        return replace(self, vae=vae, tokenizer=tokenizer)

    def load(self, model: Path, quiet: bool = True) -> Pipeline:
        """Opens a GGUF file; weights are read when they are needed. Raises GgufSdError."""
        from gguf_sd.pipeline import Pipeline
        from gguf_sd.runtime.tuning import Tuning, seconds_of

        pipeline = Pipeline.load(
            model,
            self.device,
            self.dtype,
            self.weights,
            self.tokenizer,
            self.vae,
            self.kernels,
            self.cuda_graph,
            self.max_memory,
            self.placement,
            self.vae_tile,
        )
        pipeline.tuning = Tuning(seconds_of(self.tune), quiet=quiet)
        return pipeline
