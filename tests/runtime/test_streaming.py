"""Streamed parts paint what resident ones paint, from weights that come and go."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.cli.main import main
from gguf_sd.errors import GgufSdError
from gguf_sd.models.layers import Quantized
from gguf_sd.pipeline import Pipeline
from gguf_sd.request import Request
from gguf_sd.runtime.part_bytes import part_bytes
from gguf_sd.runtime.parts import LoadedAs, Parts
from gguf_sd.runtime.stages import Meter
from gguf_sd.runtime.step_kernels import on_meta
from gguf_sd.runtime.streaming import APART, StreamedUNet, load_streamed
from gguf_sd_convert.convert import ConvertOptions, convert

CPU = torch.device("cpu")
SETTINGS: dict[str, Any] = {"steps": 2, "width": 32, "height": 32, "seed": 3}
XL = {"xl": True, "scheduler": "EulerDiscreteScheduler"}
KINDS = {
    "sd1 q8_0": ({"safety": True}, "q8_0"),
    "sd1 f16": ({"safety": True}, "f16"),
    "sdxl q4_0": (XL, "q4_0"),
}


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a key of KINDS to a file."""
    folder = tmp_path_factory.mktemp("streaming")

    def make(kind: str) -> Path:
        fields, qtype = KINDS[kind]
        path = folder / f"{kind.replace(' ', '-')}.gguf"
        if not path.exists():
            convert(tiny_pipeline(**fields), path, ConvertOptions(type=qtype))
        return path

    return make


def placed(pipeline: Pipeline, placement: str) -> Pipeline:
    """The pipeline with every part placed so."""
    planned = pipeline.planning.plan

    def plan(*given: Any) -> Any:
        made = planned(*given)
        return replace(made, weights="quantized", placement=dict.fromkeys(made.placement, placement))

    pipeline.planning.plan = plan  # type: ignore[method-assign, assignment]
    return pipeline


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_equal_bit_for_bit(model: Callable[[str], Path], kind: str, dtype: str) -> None:
    path = model(kind)
    expected = placed(Pipeline.load(path, "cpu", dtype), "resident")("a red cat", **SETTINGS)
    pipeline = placed(Pipeline.load(path, "cpu", dtype), "streamed")
    job = pipeline.prepare(Request("a red cat", **SETTINGS))
    painted = list(pipeline.paint(job))
    assert [picture.image.tobytes() for picture in painted] == [picture.tobytes() for picture in expected]
    texts = {f"text {index}" for index in range(len(pipeline.model.config.text))}
    assert set(pipeline.parts.streamed) == {"unet", *texts, *(["safety"] if pipeline.model.config.safety else [])}
    assert pipeline.parts.names == set(), "a streamed part stayed behind"


def inputs(model: ModelFile, seed: int = 0) -> list[Tensor]:
    config, generator = model.config.unet, torch.Generator().manual_seed(seed)
    latents = torch.randn(2, config.in_channels, 4, 4, generator=generator)
    context = torch.randn(2, 7, config.context_dim, generator=generator)
    vector = [torch.randn(2, config.vector_dim, generator=generator)] if config.vector_dim else []
    return [latents, torch.tensor([981.0, 3.0]), context, *vector]


def predicted(parts: Parts, how: LoadedAs, seed: int = 0) -> Tensor:
    latents, timesteps, context, *vector = inputs(parts.model, seed)
    with parts.unet(how) as unet, torch.inference_mode():
        return unet.step(latents, timesteps, unet.project(context), *vector)


@pytest.mark.parametrize("kernels", ["fused", "int8", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_each_stage_has_its_weights(model: Callable[[str], Path], kind: str, kernels: str) -> None:
    """Packed as the kernels of resident layers take them, stacked where those are; all in one or two places."""
    parts = Parts(ModelFile.open(model(kind)), CPU)
    resident = parts._load("unet", LoadedAs(torch.float32, "quantized", kernels))
    streamed = load_streamed(parts.model, "unet", CPU, torch.float32, kernels, Meter())
    compared = 0
    for stage in streamed.stream._after:
        streamed.stream.begin(stage)
        for name, module in streamed.part.get_submodule(stage.name).named_modules(prefix=stage.name):
            if not getattr(module, "origins", ()) or (name != stage.name and APART.search(name)):
                continue
            other = resident.get_submodule(name)
            assert module.extra_repr() == other.extra_repr()
            assert getattr(module, "mode", "") == getattr(other, "mode", "")
            for one, two in zip(held(module), held(other), strict=True):
                assert torch.equal(one, two), name
                assert one.stride() == two.stride(), name
                compared += one.numel()
        streamed.stream.end(stage)
    assert compared >= sum(held.numel() for held in resident.parameters() if held.dim() > 1)
    assert streamed.nbytes < part_bytes(parts.model)["unet"].values * 4 / 2


def held(module: torch.nn.Module) -> list[Tensor]:
    """A module's weights."""
    if isinstance(module, Quantized):
        packed = module.packed
        tensors = [module.blocks] if packed is None else [packed.quants, packed.scales, packed.mins]
        return [tensor for tensor in tensors if tensor is not None]
    return [module.weight]  # type: ignore[list-item]


@pytest.mark.parametrize(
    "kernels",
    ["fused", pytest.param("dequantize", marks=pytest.mark.slow), pytest.param("int8", marks=pytest.mark.slow)],
)
def test_steps_on_our_kernels_are_equal(model: Callable[[str], Path], kernels: str) -> None:
    """In Triton's interpreter."""
    parts = Parts(ModelFile.open(model("sdxl q4_0")), CPU)
    expected = predicted(parts, LoadedAs(torch.float32, "quantized", kernels, "resident"))
    assert torch.equal(predicted(parts, LoadedAs(torch.float32, "quantized", kernels, "streamed")), expected)


def test_a_step_reads_each_weight_once(model: Callable[[str], Path]) -> None:
    """All but those that make the prompt's keys and values, which are read once a picture."""
    file = ModelFile.open(model("sd1 q8_0"))
    sizes = {name: file.file.tensors[file.names[name]].nbytes for name in file.names if name.startswith(UNET)}
    weights = {name: size for name, size in sizes.items() if len(file.file.shape(file.names[name])) > 1}
    prompt = sum(size for name, size in weights.items() if "attn2.to_k" in name or "attn2.to_v" in name)
    parts = Parts(file, CPU)
    latents, timesteps, context = inputs(file)
    with parts.unet(LoadedAs(torch.float32, "quantized", "torch", "streamed")) as unet, torch.inference_mode():
        assert isinstance(unet, StreamedUNet)
        projected = unet.project(context)
        assert unet.meter.nbytes == prompt > 0
        for _ in range(2):
            unet.step(latents, timesteps, projected)
            assert unet.meter.step_bytes == sum(weights.values()) - prompt
    meter = parts.streamed["unet"]
    assert (meter.steps, meter.nbytes) == (2, 2 * sum(weights.values()) - prompt)
    assert meter.rate == pytest.approx(meter.nbytes / meter.seconds)


def test_json_says_what_was_streamed(
    model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-p", "a cat", "--steps", "3", "--width", "32", "--height", "32", "-o", str(tmp_path / "a.png")]
    assert main(["generate", str(model("sd1 q8_0")), *options, "--lowvram", "--quiet", "--json"]) == 0
    streamed = json.loads(capsys.readouterr().out)["memory"]["streamed"]
    assert {"unet", "text 0"} <= set(streamed)
    unet = streamed["unet"]
    assert unet["steps"] >= 3
    assert unet["bytes"] > unet["steps"] * unet["bytes_per_step"] > 0
    assert unet["bytes_per_second"] == pytest.approx(unet["bytes"] / unet["seconds"], rel=0.1)


def mapped_kilobytes(path: Path) -> int:
    """How much of a file is in this process's memory, by /proc."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            ours = line.endswith(str(path))
        elif ours and line.startswith("Rss:"):
            total += int(line.split()[1])
    return total


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="needs /proc")
def test_pages_are_given_back(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    """Of a UNet of megabytes next to none is in memory behind a step, and half of it never was at a time."""
    path = tmp_path / "wide.gguf"
    wide = {"block_out_channels": (128, 256), "attention_head_dim": 8, "norm_num_groups": 32}
    convert(tiny_pipeline(unet=wide), path, ConvertOptions(type="f16"))
    parts = Parts(ModelFile.open(path), CPU)
    how = LoadedAs(torch.float32, "quantized", "torch", "streamed")
    most: list[int] = []
    latents, timesteps, context = inputs(parts.model)
    with parts.unet(how) as unet, torch.inference_mode():
        for block in unet.unet.output_blocks:  # type: ignore[attr-defined]
            block[0].out_layers[3].register_forward_hook(lambda *given: most.append(mapped_kilobytes(path)))
        unet.step(latents, timesteps, unet.project(context))
        left = mapped_kilobytes(path)
    size = part_bytes(parts.model)["unet"].stored / 1024
    assert size > 15_000
    assert max(most) < size / 4
    assert left < 200


def test_damaged_weights_are_named(model: Callable[[str], Path], tmp_path: Path) -> None:
    """When they are first met, as nobody reads them before."""
    for kind, part, name in (
        ("sd1 q8_0", "unet", UNET + "middle_block.0.in_layers.2.weight"),
        ("sd1 f16", "unet", UNET + "middle_block.0.in_layers.2.weight"),
        ("sd1 q8_0", "text 0", "cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc1.weight"),
    ):
        whole = model(kind)
        file = ModelFile.open(whole)
        data = bytearray(whole.read_bytes())
        offset = file.file.tensors[file.names[name]].offset
        data[offset : offset + 2] = b"\x00\x7e"  # a float16's NaN: a value, or a block's scale
        path = tmp_path / "damaged.gguf"
        path.write_bytes(data)
        pipeline = placed(Pipeline.load(path, "cpu", "float32"), "streamed")
        assert part in pipeline.memory_plan(pipeline.prepare(Request("a cat", **SETTINGS))).placement
        with pytest.raises(GgufSdError, match=rf"{name.replace('text_model.', '')} holds NaN or infinity"):
            pipeline("a cat", **SETTINGS)


def test_a_stage_that_failed_is_run_again(model: Callable[[str], Path]) -> None:
    parts = Parts(ModelFile.open(model("sd1 f16")), CPU)
    how = LoadedAs(torch.float32, "quantized", "torch", "streamed")
    expected = predicted(parts, how)
    latents, timesteps, context = inputs(parts.model)
    with parts.unet(how) as unet, torch.inference_mode():
        projected = unet.project(context)
        block = unet.unet.middle_block[0]  # type: ignore[attr-defined]
        failing = block.out_layers[3].register_forward_pre_hook(lambda *given: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            unet.step(latents, timesteps, projected)
        failing.remove()
        assert torch.equal(unet.step(latents, timesteps, projected), expected)


def test_a_copy_streams_nothing(model: Callable[[str], Path]) -> None:
    """The copy without values by which kernels are counted."""
    file = ModelFile.open(model("sdxl q4_0"))
    streamed = load_streamed(file, "unet", CPU, torch.float32, "fused", meter := Meter())
    plain = on_meta(streamed.part)  # type: ignore[arg-type]
    assert all(tensor.is_meta for tensor in plain.parameters())
    for unet in (plain, streamed.part):
        module = unet.get_submodule("input_blocks.1.0")
        for hook in module._forward_pre_hooks.values():
            hook(module, ())
        assert (meter.nbytes > 0) == (unet is streamed.part)


def test_loaded_weights_keep_nothing_else_in_memory(model: Callable[[str], Path]) -> None:
    """Such as the whole of what OpenCLIP's queries, keys and values were cut from, once each."""
    file = ModelFile.open(model("sdxl q4_0"))
    parts = [file.load_text(0, torch.float32), file.load_text(1, torch.float32), file.load_vae(torch.float32)]
    for part in parts:
        for name, weight in part.named_parameters():
            assert file.file.holds(weight) or weight.untyped_storage().nbytes() == weight.nbytes, name
