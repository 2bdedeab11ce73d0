"""A full-size single-file checkpoint with random weights, for benchmarks of speed, memory and file size.

    python -m benchmarks.lib.make_checkpoint /tmp/sd15.safetensors --model sd15

Activations neither explode nor vanish in it: weights are scaled by their fan-in, the outputs of residual branches are
damped, norms are the identity. It is written tensor by tensor, in seconds; the same seed gives the same file.
"""

from __future__ import annotations

import argparse
import json
import struct
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lib.random_weights import weight_std
from gguf_sd.checkpoint.inventory import expected_tensors
from gguf_sd.config import SD15, SD15_INPAINT, SDXL, ModelConfig
from gguf_sd_convert.workers import in_order, workers

MODELS: dict[str, ModelConfig] = {"sd15": SD15, "sd15-inpaint": SD15_INPAINT, "sdxl": SDXL}
DTYPES = {"fp16": ("F16", torch.float16), "fp32": ("F32", torch.float32)}


def random_tensor(name: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """A weight for ``name``: norms are 1 and 0, biases 0, the rest normal."""
    if len(shape) == 1:
        norm = name.endswith(".weight")  # of the 1-D tensors only norms are called so
        return torch.full(shape, float(norm), dtype=dtype)
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.mul_(weight_std(name, shape)).to(dtype)


def write_checkpoint(path: Path, config: ModelConfig, dtype: str = "fp16", seed: int = 0) -> int:
    """Writes a .safetensors file of ``config`` under the original (LDM) names; returns its size in bytes."""
    kind, torch_dtype = DTYPES[dtype]
    shapes = expected_tensors(config)
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + prod(shape) * torch_dtype.itemsize
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def job(index: int, name: str, shape: tuple[int, ...]) -> Tensor:
        return random_tensor(name, shape, seed * 100_003 + index, torch_dtype)

    with open(path, "wb") as file, workers(0) as pool:
        file.write(struct.pack("<Q", len(text)) + text)
        jobs = (
            (4 * prod(shape), lambda i=i, n=name, s=shape: job(i, n, s))
            for i, (name, shape) in enumerate(shapes.items())
        )
        for tensor in in_order(jobs, pool):
            file.write(tensor.view(-1).view(torch.uint8).numpy().data)
    return 8 + len(text) + offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", choices=sorted(MODELS), default="sd15")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    size = write_checkpoint(args.output, MODELS[args.model], args.dtype, args.seed)
    print(f"{args.output}: {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
