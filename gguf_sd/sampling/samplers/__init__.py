"""The samplers, by kind, and what runs them."""

from gguf_sd.sampling.samplers.run import Blend, Step, sample

__all__ = ["Blend", "Step", "sample"]
