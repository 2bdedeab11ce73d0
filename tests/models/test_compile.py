"""torch.compile and torch.export on whole UNets: one graph, one compilation, the same result."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.config import UNetConfig
from gguf_sd.demo import model_folder
from gguf_sd.models.layers import quantized
from gguf_sd.models.unet import UNet
from gguf_sd.runtime.kernel_modes import make_resident, use_kernels
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_convert.quantize.quantizers import quantize
from gguf_sd_kernels.custom_ops import NAMESPACE

FLAT = UNetConfig(
    block_out_channels=(32,),
    layers_per_block=1,
    transformer_layers=(1,),
    num_heads=(2,),
    context_dim=32,
    norm_groups=8,
)
SD1 = replace(FLAT, block_out_channels=(32, 64), transformer_layers=(1, 0), num_heads=(2, 2))
SDXL = replace(SD1, transformer_layers=(0, 2), num_heads=(2, 4), context_dim=64, vector_dim=64)
PACKED = {f"{NAMESPACE}.{op}.default" for op in ("linear_packed", "conv2d_packed", "group_norm_silu", "layer_norm")}
MODES = ("torch", "resident", "fused", "dequantize", "int8")


def made(config: UNetConfig, mode: str, dtype: torch.dtype = torch.float32) -> UNet:
    """Random weights in Q8_0 blocks where 32 divides their rows, on kernels ``mode``; packed ones are float16."""
    torch.manual_seed(1)
    unet = UNet(config)
    for name, module in list(unet.named_modules()):
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight[0].numel() % 32 == 0:
            weight = module.weight.detach()
            taps = weight.dim() == 4
            rows = (weight.permute(0, 2, 3, 1) if taps else weight).reshape(len(weight), -1)
            stored = QuantTensor(quantize(rows, "Q8_0"), "Q8_0", tuple(weight.shape), taps)
            unet.set_submodule(name, quantized(module, stored))
    return on_kernels(unet.to(dtype).eval().requires_grad_(False), mode, dtype)


def on_kernels(unet: UNet, mode: str, dtype: torch.dtype) -> UNet:
    if mode == "resident":
        make_resident(unet, dtype)
    elif mode != "torch":
        use_kernels(unet, mode)
    return unet


def inputs(config: UNetConfig, dtype: torch.dtype, seed: int, height: int = 2, width: int = 3) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    latents, timesteps = normal(2, config.in_channels, height, width), torch.tensor([701.0, 3.0])
    context = normal(2, 5, config.context_dim)
    return latents, timesteps, context, *([normal(2, config.vector_dim)] if config.vector_dim else [])


def error(got: Tensor, want: Tensor) -> float:
    """Largest error, relative to the largest value."""
    assert got.shape == want.shape
    assert got.dtype == want.dtype
    return float((got - want).abs().max() / want.abs().max())


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Nothing compiled before counts."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def targets(program: Any) -> set[str]:
    """The operators of a program by library: "aten.linear.default"."""
    return {str(node.target) for node in program.graph.nodes if node.op == "call_function"}


def check_compiled(unet: UNet, dtype: torch.dtype, backend: Any, limit: float, **size: int) -> None:
    """One graph; the same result, for other values without another compilation."""
    graphs = []

    def counting(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend(backend)(graph, example)

    compiled = torch.compile(unet, fullgraph=True, backend=counting)
    with torch.inference_mode():
        first, second = (inputs(unet.config, dtype, seed, **size) for seed in (1, 2))
        assert error(compiled(*first), unet(*first)) <= limit
        with torch.compiler.set_stance("fail_on_recompile"):
            assert error(compiled(*second), unet(*second)) <= limit
    assert len(graphs) == 1


def test_a_unet_is_one_graph() -> None:
    check_compiled(made(FLAT, "torch"), torch.float32, "eager", 1e-5)


def test_a_unet_of_packed_weights_is_one_graph() -> None:
    """Traced alone: kernels take long in the interpreter."""
    found: set[str] = set()

    def backend(graph: Any, example: Any) -> Any:
        found.update(targets(graph))
        raise TracedError

    unet = made(FLAT, "fused", torch.float16)
    with torch.inference_mode(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="TracedError"):
        torch.compile(unet, fullgraph=True, backend=backend)(*inputs(FLAT, torch.float16, seed=1))
    assert found >= PACKED


class TracedError(Exception):
    """Raised in place of compiling."""


@pytest.mark.slow
@pytest.mark.parametrize("config", [SD1, SDXL], ids=["SD 1.5", "SDXL"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_is_one_graph(config: UNetConfig, mode: str) -> None:
    dtype = torch.float32 if mode in ("torch", "resident") else torch.float16
    check_compiled(made(config, mode, dtype), dtype, "eager", 1e-5 if dtype == torch.float32 else 1e-3)


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize(("config", "mode"), [(FLAT, "torch"), (FLAT, "resident"), (SDXL, "torch"), (FLAT, "fused")])
def test_inductor(config: UNetConfig, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    dtype = torch.float16 if mode == "fused" else torch.float32
    check_compiled(made(config, mode, dtype), dtype, "inductor", 1e-5 if dtype == torch.float32 else 5e-3)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model in Q8_0."""
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    convert(model_folder(), path, ConvertOptions(type="q8_0"), quiet=True)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "dtype"), [("torch", torch.bfloat16), ("fused", torch.float16)])
def test_the_demo_model_is_one_graph(mode: str, dtype: torch.dtype, demo: Path) -> None:
    unet = on_kernels(ModelFile.open(demo).load_unet(dtype), mode, dtype)
    check_compiled(unet, dtype, "eager", 1e-2, height=8, width=8)


def exported(unet: UNet, dtype: torch.dtype, **keywords: Any) -> Any:
    with torch.no_grad():
        return torch.export.export(unet, inputs(unet.config, dtype, seed=1), **keywords)


@pytest.mark.parametrize("mode", ["torch", pytest.param("resident", marks=pytest.mark.slow)])
def test_an_exported_program_gives_the_same(mode: str) -> None:
    """Also after it was written and read, and for another batch and size than it was exported with."""
    unet = made(FLAT, mode)
    batch, height, width = (torch.export.Dim(name, min=1, max=64) for name in ("batch", "height", "width"))
    shapes = {0: batch, 2: height, 3: width}, {0: batch}, {0: batch}
    program = exported(unet, torch.float32, dynamic_shapes=shapes)
    ours = {name for name in targets(program) if name.startswith(NAMESPACE)}
    assert ours == (set() if mode == "resident" else {f"{NAMESPACE}.{op}.default" for op in ("linear", "conv2d")})
    assert not any(name.startswith("mkldnn") for name in targets(program)), "for any device"
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    larger = inputs(FLAT, torch.float32, 3, 4, 2)
    for values in (inputs(FLAT, torch.float32, 2), tuple(torch.cat([each, each]) for each in larger)):
        assert error(again(*values), unet(*values)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["fused", "dequantize", "int8"])
def test_a_program_of_packed_weights_gives_the_same(mode: str) -> None:
    unet = made(SD1, mode, torch.float16)
    program = exported(unet, torch.float16)
    assert targets(program) >= PACKED
    values = inputs(SD1, torch.float16, 2)
    assert error(program.module()(*values), unet(*values)) <= 1e-3


class NoOperators(TorchDispatchMode):
    """Fails where one of our operators is called."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.namespace != NAMESPACE, func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", ["torch", pytest.param("fused", marks=pytest.mark.slow)])
def test_without_a_compiler_functions_are_called_directly(mode: str) -> None:
    """An operator costs microseconds a call, some hundred times a step."""
    dtype = torch.float16 if mode == "fused" else torch.float32
    unet = made(FLAT, mode, dtype)
    with torch.inference_mode(), NoOperators():
        unet(*inputs(FLAT, dtype, seed=1))
