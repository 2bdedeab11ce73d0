"""A UNet in 8 bits on a CPU: beside the same weights in float32, with LoRAs, by the plan and from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from gguf_sd import Pipeline, Request
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.cli.main import main
from gguf_sd.errors import GgufSdError
from gguf_sd.models.int8 import Int8EnlargingConv2d, Int8Layer, stays_wide, use_int8
from gguf_sd.models.layers import Conv2d, Linear, Quantized
from gguf_sd.models.unet_blocks import Upsample
from gguf_sd.quality import psnr
from gguf_sd.runtime import kernel_modes, planning
from gguf_sd.runtime.memory import held_bytes
from gguf_sd_convert.convert import ConvertOptions, convert
from gguf_sd_kernels.cpu import int8

HERE = int8.is_fast()
fast = pytest.mark.skipif(not HERE, reason="this processor has no instructions for products in 8 bits")
SETTINGS: dict[str, Any] = {"steps": 4, "width": 32, "height": 32, "seed": 3, "safety": "off"}


@pytest.fixture(scope="module")
def models(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("int8")
    for kind in ("f16", "q8_0", "q4_0"):
        convert(tiny_pipeline(), folder / f"{kind}.gguf", ConvertOptions(type=kind))
    return {kind: folder / f"{kind}.gguf" for kind in ("f16", "q8_0", "q4_0")}


@fast
@pytest.mark.parametrize("kind", ["f16", "q8_0", "q4_0"])
@pytest.mark.parametrize("same_time", [True, False])
@pytest.mark.parametrize("size", [(32, 24), (25, 13)])  # which halves to whole numbers all the way down, or not
def test_a_step(models: dict[str, Path], kind: str, same_time: bool, size: tuple[int, int]) -> None:
    model = ModelFile.open(models[kind])
    full, unet = model.load_unet(torch.float32), model.load_unet(torch.float32)
    use_int8(unet, torch.float32)
    layers = dict(unet.named_modules())
    assert not any(isinstance(layer, Quantized) for layer in layers.values())
    for name, layer in layers.items():
        if isinstance(layer, Linear | Conv2d | Int8Layer):
            assert isinstance(layer, Int8Layer) != stays_wide(name), name
        if isinstance(layer, Upsample):
            assert isinstance(layer.conv, Int8EnlargingConv2d)
    config, random = model.config.unet, torch.Generator().manual_seed(0)
    x = torch.randn(2, config.in_channels, *size, generator=random)
    context = torch.randn(2, 77, config.context_dim, generator=random)
    times = torch.tensor([500, 500 if same_time else 20])
    with torch.inference_mode():
        got, want = unet(x, times, context), full(x, times, context)
    assert 1e-4 < (got - want).norm() / want.norm() < 0.08  # random weights, whose errors add up


@fast
def test_bytes_are_known_ahead(models: dict[str, Path]) -> None:
    pipeline = Pipeline.load(models["q4_0"], "cpu", "bfloat16", kernels="int8")
    job = pipeline.prepare(Request("a cat", **SETTINGS))
    pipeline("a cat", **SETTINGS)
    planner = pipeline.planner(job)
    plan = planner.plan(1 << 60)
    assert plan.weights == "int8"
    (unet,) = [stage for stage in planner.stages(plan) if stage.name == "unet"]
    held = held_bytes(pipeline.parts._loaded["unet"].part, pipeline.device)
    assert held == pytest.approx(unet.weights, rel=0.05)  # besides the rows' scales


@fast
def test_the_plan_takes_it_where_it_lasts(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "int8_pays", lambda: 128)  # latent pixels: 16 of them, 4 steps, two halves

    def planned(kind: str, steps: int = 4, count: int = 1, **how: Any) -> str:
        pipeline = Pipeline.load(models[kind], "cpu", **({"dtype": "bfloat16"} | how))
        settings = SETTINGS | {"steps": steps, "count": count}
        return pipeline.memory_plan(pipeline.prepare(Request("a cat", **settings))).weights

    assert planned("q8_0") == planned("q8_0", count=3) == "int8"
    assert planned("q8_0", steps=3) == planned("q8_0", steps=3, count=3) == "resident"  # pictures alone are the same
    assert planned("f16", kernels="int8") == "int8"
    assert planned("f16") == "resident"  # who left the weights whole did not ask for 8 bits
    assert planned("q4_0", dtype="float16") == "resident"
    assert planned("q4_0", dtype="float32") == "resident"  # neither did who asks for 32
    assert planned("q4_0", kernels="torch") == "resident"
    assert planned("q4_0", weights="quantized") == "quantized"
    assert planned("q4_0", placement="streamed") == "quantized"


@fast
def test_a_picture_is_the_same_alone_and_among_others(models: dict[str, Path]) -> None:
    pipeline = Pipeline.load(models["q4_0"], "cpu", "bfloat16", kernels="int8")
    three = pipeline("a cat", count=3, batch=3, **SETTINGS)
    alone = [pipeline("a cat", **(SETTINGS | {"seed": SETTINGS["seed"] + i}))[0] for i in range(3)]
    assert [picture.tobytes() for picture in three] == [picture.tobytes() for picture in alone]


@fast
def test_loras_lie_beside(models: dict[str, Path], tmp_path: Path) -> None:
    block = ModelFile.open(models["q8_0"]).load_unet(torch.float32).input_blocks[1][1].transformer_blocks[0]  # type: ignore[index]
    factors: dict[str, torch.Tensor] = {}
    random = torch.Generator().manual_seed(0)
    for leaf in ("attn1.to_q", "attn1.to_out.0", "ff.net.0.proj", "ff.net.2"):
        name = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_{leaf.replace('.', '_')}"
        out, features = block.get_submodule(leaf).shape
        factors[f"{name}.lora_down.weight"] = torch.randn(4, features, generator=random) / 8
        factors[f"{name}.lora_up.weight"] = torch.randn(out, 4, generator=random) / 2
    save_file(factors, tmp_path / "some.safetensors")
    lora = str(tmp_path / "some.safetensors")
    exact = Pipeline.load(models["q8_0"], "cpu", "float32", kernels="torch")
    narrow = Pipeline.load(models["q8_0"], "cpu", "float32", kernels="int8")
    plain, want = exact("a cat", **SETTINGS)[0], exact("a cat", loras=lora, **SETTINGS)[0]
    got, without = narrow("a cat", loras=lora, **SETTINGS)[0], narrow("a cat", **SETTINGS)[0]
    assert psnr(got, want) > 30
    assert psnr(without, plain) > 30
    assert psnr(plain, want) < psnr(got, want) - 5


@fast
def test_from_the_command_line(models: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["generate", str(models["q4_0"]), "-p", "a cat", "--steps", "2", "--width", "32", "--height", "32"]
    command += ["--device", "cpu", "--kernels", "int8", "--quiet", "--json", "-o", str(tmp_path / "out.png")]
    assert main(command) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["weights"] == "int8"
    assert main([*command, "--weights", "quantized", "--force"]) == 2
    assert "'int8' keep weights in 8 bits on a CPU, and quantized are asked for" in capsys.readouterr().err
    assert main([*command, "--dtype", "float16", "--force"]) == 2
    assert "leave --dtype float16 out" in capsys.readouterr().err
    assert main([*command, "--lowvram", "--force"]) == 2
    assert "leave --kernels int8 out" in capsys.readouterr().err


def test_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(int8, "is_fast", lambda: False)
    assert not kernel_modes.may_take_int8("auto", "auto", cpu)
    monkeypatch.setattr(int8, "has_operators", lambda: True)
    with pytest.raises(GgufSdError, match="need a processor with AVX512-VNNI"):
        kernel_modes.choose_kernels("int8", "auto", cpu)
    monkeypatch.setattr(int8, "has_operators", lambda: False)
    with pytest.raises(GgufSdError, match="oneDNN's operators in 8 bits, which this torch lacks"):
        kernel_modes.choose_kernels("int8", "auto", cpu)


@fast
def test_the_vae_decodes_in_8_bits(models: dict[str, Path]) -> None:
    """Where the plan has it, and it does so whole; the encoder, and a decoder in bands, stay as they are."""
    pipeline = Pipeline.load(models["q8_0"], "cpu", "float32", kernels="int8")
    job = pipeline.prepare(Request("a cat", **SETTINGS))
    whole = pipeline.memory_plan(job)
    assert whole.vae_weights == "int8"
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = Pipeline.load(models["q8_0"], "cpu", "float32", kernels="torch")
    got, want = pipeline.decode(latents, whole), exact.decode(latents)
    vae = pipeline.parts._loaded["vae"].part
    layers = {name for name, layer in vae.named_modules() if isinstance(layer, Int8Layer)}
    assert layers
    assert all(name.startswith("decoder.") and name.endswith((".conv1", ".conv2")) for name in layers)
    assert not torch.equal(got, want)
    assert psnr(got[0].numpy(), want[0].numpy()) > 35
    tiled = Pipeline.load(models["q8_0"], "cpu", "float32", kernels="int8", vae_tile=4)
    assert tiled.memory_plan(job).vae_weights == ""
    assert torch.equal(
        tiled.decode(latents), Pipeline.load(models["q8_0"], "cpu", "float32", vae_tile=4).decode(latents)
    )


@fast
def test_a_picture_is_painted_again_as_it_was(
    models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether in 8 bits or not, whatever `auto` would do by itself; and others' pictures leave it to `auto`."""
    asked: list[str] = []
    load = Pipeline.load

    def watched(*args: Any) -> Pipeline:
        asked.append(args[6])
        return load(*args)

    monkeypatch.setattr(Pipeline, "load", watched)
    command = ["generate", str(models["q4_0"]), "--quiet", "--device", "cpu"]
    for kernels, recorded in (("int8", True), ("torch", False)):
        first, again = tmp_path / f"{kernels}.png", tmp_path / f"{kernels}-again.png"
        more = ["--steps", "2", "--width", "32", "--height", "32", "--seed", "3"]
        assert main([*command, "-p", "a boat", "-o", str(first), "--kernels", kernels, *more]) == 0
        with Image.open(first) as picture:
            assert ("Kernels: int8" in picture.info["parameters"]) is recorded
        assert main([*command, "--from", str(first), "-o", str(again)]) == 0
        assert asked[-1] == kernels
        assert again.read_bytes() == first.read_bytes()
        resident = ["--dtype", "float32", "--weights", "resident", "-o", str(tmp_path / f"{kernels}-resident.png")]
        assert main([*command, "--from", str(first), *resident]) == 0
        assert asked[-1] == "auto"
    assert kernel_modes.as_recorded("auto", "auto", torch.device("cpu"), None) == "auto"
    assert kernel_modes.as_recorded("torch", "auto", torch.device("cpu"), "int8") == "torch"
    assert kernel_modes.as_recorded("auto", "auto", torch.device("cuda"), "int8") == "auto"
