"""OpenVINO as a contestant: the UNet and the VAE's decoder of a diffusers folder, converted and compiled for the CPU,
inside diffusers' pipeline; the text encoders run in torch.

    python -m gguf_sd.bench.peer_openvino MODEL FOLDER

converts, once for all rounds and in a process of its own: that takes a float32 copy of the model, which should not
count as what painting takes.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from gguf_sd.bench.contestant import Result, Task
from gguf_sd.bench.peer_diffusers import paint_with
from gguf_sd.errors import GgufSdError
from gguf_sd_kernels.writers import remove_stale, temporary_name

UNET, DECODER = "unet.xml", "vae_decoder.xml"
HINTS = {"bfloat16": "bf16", "float32": "f32", "float16": "f16"}


def paint(task: Task, folder: Path) -> Result:
    """Paints; ``dtype`` auto is what our engine would compute in."""
    from gguf_sd.bench.runner import fingerprint

    kept = folder.parent / f"openvino-{fingerprint(Path(task.model))}"
    if not kept.is_dir():
        words = [sys.executable, "-m", "gguf_sd.bench.peer_openvino", task.model, str(kept)]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            raise GgufSdError(f"OpenVINO did not convert {task.model}: {last}")
    started = time.perf_counter()
    import diffusers

    from gguf_sd.runtime.memory import choose_device, choose_dtype

    dtype = str(choose_dtype(task.dtype, choose_device("cpu"))).removeprefix("torch.")
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        task.model, unet=None, vae=None, torch_dtype=torch.float32, safety_checker=None
    )
    unet_config = _config(diffusers.UNet2DConditionModel, task.model, "unet")
    vae_config = _config(diffusers.AutoencoderKL, task.model, "vae")
    unet = _UNet(_Compiled(kept / UNET, HINTS[dtype]), unet_config)
    pipe.register_modules(unet=unet, vae=_Decoder(_Compiled(kept / DECODER, HINTS[dtype]), vae_config))
    pipe.vae_scale_factor = 2 ** (len(vae_config.block_out_channels) - 1)
    return paint_with(pipe, task, folder, started, Result(device="cpu", dtype=dtype, weights="full"))


class _Compiled:
    """A converted model, compiled for the shapes of its inputs when they first come."""

    def __init__(self, path: Path, precision: str):
        import openvino

        self.core, self.settings = openvino.Core(), {"INFERENCE_PRECISION_HINT": precision}
        self.settings |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(torch.get_num_threads())}
        self.path = path
        self.requests: dict[tuple[tuple[int, ...], ...], Any] = {}

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        shapes = tuple(tuple(x.shape) for x in inputs)
        if shapes not in self.requests:
            model = self.core.read_model(self.path)
            model.reshape({port: list(shape) for port, shape in zip(model.inputs, shapes, strict=True)})
            self.requests[shapes] = self.core.compile_model(model, "CPU", self.settings).create_infer_request()
        made = self.requests[shapes].infer([x.detach().numpy() for x in inputs])
        return torch.from_numpy(made[0].copy())


class _UNet(nn.Module):
    """Stands for diffusers' UNet in its pipelines."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, compiled: _Compiled, config: Any):
        super().__init__()
        self.compiled, self.config = compiled, config
        width = config.projection_class_embeddings_input_dim
        self.add_embedding = SimpleNamespace(linear_1=SimpleNamespace(in_features=width))  # as SDXL's pipeline asks

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, **more: Any) -> tuple[Tensor]:
        timesteps = torch.as_tensor(timestep).float().expand(len(sample))
        inputs = [sample.float(), timesteps, encoder_hidden_states.float()]
        if added := more.get("added_cond_kwargs"):
            inputs += [added["text_embeds"].float(), added["time_ids"].float()]
        return (self.compiled(inputs),)


class _Decoder(nn.Module):
    """Stands for diffusers' autoencoder in its text-to-image pipelines."""

    dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, compiled: _Compiled, config: Any):
        super().__init__()
        self.compiled, self.config = compiled, config

    def decode(self, latents: Tensor, **more: Any) -> tuple[Tensor]:
        return (self.compiled([latents.float()]),)


def _config(kind: Any, model: str, part: str) -> Any:
    """A part's configuration with the defaults of its class, without its weights."""
    with torch.device("meta"):
        return kind.from_config(kind.load_config(model, subfolder=part)).config


class FlatUNet(nn.Module):
    """diffusers' UNet with tensors alone as arguments: latents, timesteps, prompt and, where they are taken, pooled
    text and sizes."""

    def __init__(self, unet: nn.Module):
        super().__init__()
        self.unet = unet

    def forward(self, latents: Tensor, timesteps: Tensor, context: Tensor, *vectors: Tensor) -> Tensor:
        more: dict[str, Any] = {"return_dict": False}
        if vectors:
            more["added_cond_kwargs"] = {"text_embeds": vectors[0], "time_ids": vectors[1]}
        result: Tensor = self.unet(latents, timesteps, context, **more)[0]
        return result


class _Decode(nn.Module):
    """diffusers' autoencoder, its way down."""

    def __init__(self, vae: Any):
        super().__init__()
        self.vae = vae

    def forward(self, latents: Tensor) -> Tensor:
        result: Tensor = self.vae.decode(latents, return_dict=False)[0]
        return result


@torch.no_grad()
def convert(model: Path, folder: Path) -> None:
    """Writes both parts with weights in 16 bits and shapes left open; ``folder`` appears whole or not at all."""
    import diffusers
    import openvino

    remove_stale(folder.parent)
    made, side = temporary_name(folder), 16
    try:
        unet = diffusers.UNet2DConditionModel.from_pretrained(model, subfolder="unet", torch_dtype=torch.float32).eval()
        config = unet.config
        arguments = [torch.randn(2, config.in_channels, side, side), torch.full((2,), 500.0)]
        arguments.append(torch.randn(2, 77, config.cross_attention_dim))
        if width := config.projection_class_embeddings_input_dim:
            pooled = width - 6 * config.addition_time_embed_dim
            arguments += [torch.randn(2, pooled), torch.full((2, 6), 512.0)]
        openvino.save_model(openvino.convert_model(FlatUNet(unet), example_input=tuple(arguments)), made / UNET)
        del unet
        vae = diffusers.AutoencoderKL.from_pretrained(model, subfolder="vae", torch_dtype=torch.float32).eval()
        latents = torch.randn(1, vae.config.latent_channels, side, side)
        openvino.save_model(openvino.convert_model(_Decode(vae), example_input=latents), made / DECODER)
        made.rename(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
