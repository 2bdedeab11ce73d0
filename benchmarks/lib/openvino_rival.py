"""OpenVINO's UNet beside ours: diffusers' modules, converted, in bfloat16 or quantised to int8 by nncf (W8A8).

Converting and quantising takes minutes and, for a moment, several times the model's size; what comes out is kept in a
folder, and taken from there the next time. Needs the extra ``gguf-sd[bench]``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.lib.baselines import diffusers_unet
from gguf_sd.bench.peer_openvino import FlatUNet
from gguf_sd.config import UNetConfig

SAMPLES = 2  # of random latents, that nncf takes the activations' ranges from


def unet_arguments(config: UNetConfig, batch: int, size: int, seed: int = 0) -> list[Tensor]:
    """Random latents [batch, C, size, size], timesteps, prompt and, where they are taken, pooled text and sizes."""
    random = torch.Generator().manual_seed(seed)
    arguments = [
        torch.randn(batch, config.in_channels, size, size, generator=random),
        torch.full((batch,), 500),
        torch.randn(batch, 77, config.context_dim, generator=random),
    ]
    if config.vector_dim:
        pooled = config.vector_dim - 6 * 256  # the rest embeds six sizes
        arguments += [torch.randn(batch, pooled, generator=random), torch.full((batch, 6), 512.0)]
    return arguments


def unet_files(config: UNetConfig, batch: int, size: int, folder: Path) -> dict[str, Path]:
    """The converted UNet and the quantised one, by precision: ``bf16`` (stored in 16 bits) and ``int8``."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{config.block_out_channels[0]}-{config.context_dim}-{batch}x{size}"
    files = {kind: folder / f"unet-{name}-{kind}.xml" for kind in ("bf16", "int8")}
    if not all(path.is_file() for path in files.values()):
        _convert(config, batch, size, files)
    return files


def _convert(config: UNetConfig, batch: int, size: int, files: dict[str, Path]) -> None:
    import nncf
    import openvino

    unet = FlatUNet(diffusers_unet(config, torch.float32, torch.device("cpu")))
    inputs = unet_arguments(config, batch, size)
    with torch.no_grad():
        model = openvino.convert_model(unet, example_input=tuple(inputs), input=[list(x.shape) for x in inputs])
    openvino.save_model(model, files["bf16"])
    samples = [dict(enumerate(unet_arguments(config, batch, size, seed))) for seed in range(1, SAMPLES + 1)]
    data = nncf.Dataset(samples, lambda sample: {k: x.numpy() for k, x in sample.items()})
    quantized = nncf.quantize(model, data, subset_size=SAMPLES, model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(quantized, files["int8"])


def compiled_step(path: Path, arguments: Sequence[Tensor], threads: int) -> Callable[[], object]:
    """A step by the model at ``path``, its products in bfloat16 unless they are in 8 bits."""
    import openvino

    settings = {
        "INFERENCE_PRECISION_HINT": "bf16",
        "INFERENCE_NUM_THREADS": str(threads),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()
    inputs = [x.numpy() for x in arguments]
    return lambda: request.infer(inputs)
