"""load_unet in diffusers' own pipelines, against their own UNet with the weights as gguf-py decodes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from gguf_sd import Pipeline
from gguf_sd.adapters.targets import UNET_PART
from gguf_sd.errors import GgufSdError
from gguf_sd.integrations.diffusers import GgufUNet, load_unet
from gguf_sd.models.layers import Quantized
from gguf_sd_convert.convert import ConvertOptions, convert
from tests.adapters.conftest import all_targets, config_of, kohya, random_lora, reads_loras, save
from tests.conftest import UNET, XL_UNET, randomise
from tests.test_pipeline import oracle, psnr, stored_unet

SIZE = {"width": 64, "height": 48}
MODELS: dict[str, dict[str, Any]] = {
    "sd1": {},
    "inpainting": {"unet": {"in_channels": 9}},
    "sdxl": {"xl": True, "scheduler": "EulerDiscreteScheduler"},
}


class Painter:
    """diffusers' pipeline of a model, with its own UNet and with ours."""

    def __init__(self, kind: str, folder: Path, path: Path):
        self.path, self.xl = path, kind == "sdxl"
        self.theirs = oracle(folder, path)
        self.ours = load_unet(path)
        own = XL_UNET if self.xl else UNET
        known: tuple[str, ...] = (
            "block_out_channels",
            "layers_per_block",
            "down_block_types",
            "cross_attention_dim",
            "norm_num_groups",
        )
        more: tuple[str, ...] = (
            "attention_head_dim",
            "transformer_layers_per_block",
            "use_linear_projection",
            "addition_embed_type",
        )
        more += ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
        settings = {name: own[name] for name in (*known, *more) if name in own}
        net = diffusers.ControlNetModel(**settings, conditioning_embedding_out_channels=(8, 8, 8, 8))
        self.control = randomise(net, 9)

    def paint(self, pipeline: str, unet: Any = None, **settings: Any) -> Any:
        kind = getattr(diffusers, pipeline)
        parts = dict(self.theirs.components) | {"unet": unet or self.ours}
        if "ControlNet" in pipeline:
            parts["controlnet"] = self.control
        parts = {name: part for name, part in parts.items() if name in kind._get_signature_keys(kind)[0]}
        extra = {} if self.xl else {"safety_checker": None, "requires_safety_checker": False}
        pipe = kind(**(parts | extra))
        pipe.set_progress_bar_config(disable=True)
        call = {"prompt": "a red cat", "negative_prompt": "dog", "num_inference_steps": 3, "guidance_scale": 5.0}
        call |= {"generator": torch.Generator().manual_seed(5)}
        return pipe(**(call | settings)).images[0]


@pytest.fixture(scope="module")
def painter(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Painter]:
    made: dict[str, Painter] = {}

    def make(kind: str) -> Painter:
        if kind not in made:
            folder, path = tiny_pipeline(**MODELS[kind]), tmp_path_factory.mktemp("unet") / f"{kind}.gguf"
            convert(folder, path, ConvertOptions(type="q4_0"))
            made[kind] = Painter(kind, folder, path)
        return made[kind]

    return make


def noise(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def hole() -> Image.Image:
    mask = Image.new("L", (64, 48))
    mask.paste(255, (24, 8, 56, 40))
    return mask


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


FROM = {"image": noise(1), "strength": 0.7}


@pytest.mark.parametrize(
    ("kind", "name", "settings"),
    [
        ("sd1", "StableDiffusionPipeline", SIZE),
        slow("sd1", "StableDiffusionImg2ImgPipeline", FROM),
        slow("sd1", "StableDiffusionInpaintPipeline", SIZE | FROM | {"mask_image": hole()}),
        ("inpainting", "StableDiffusionInpaintPipeline", SIZE | FROM | {"mask_image": hole()}),
        ("sd1", "StableDiffusionControlNetPipeline", {"image": noise(2)}),
        slow("sd1", "StableDiffusionControlNetImg2ImgPipeline", FROM | {"control_image": noise(2)}),
        slow(
            "sd1", "StableDiffusionControlNetInpaintPipeline", FROM | {"mask_image": hole(), "control_image": noise(2)}
        ),
        ("sdxl", "StableDiffusionXLPipeline", SIZE),
        slow("sdxl", "StableDiffusionXLImg2ImgPipeline", FROM),
        slow("sdxl", "StableDiffusionXLInpaintPipeline", SIZE | FROM | {"mask_image": hole()}),
        slow("sdxl", "StableDiffusionXLControlNetPipeline", {"image": noise(2)}),
        ("sdxl", "StableDiffusionXLControlNetImg2ImgPipeline", FROM | {"control_image": noise(2)}),
        (
            "sdxl",
            "StableDiffusionXLControlNetInpaintPipeline",
            FROM | {"mask_image": hole(), "control_image": noise(2)},
        ),
    ],
)
def test_every_pipeline(painter: Callable[[str], Painter], kind: str, name: str, settings: dict[str, Any]) -> None:
    own = painter(kind)
    got = own.paint(name, **settings)
    assert psnr(got, own.paint(name, own.theirs.unet, **settings)) >= 45
    if "ControlNet" in name:
        assert psnr(got, own.paint(name, **settings, controlnet_conditioning_scale=0.0)) < 35, "it controls nothing"


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_as_our_own_pipeline(painter: Callable[[str], Painter], kind: str) -> None:
    settings = {"negative_prompt": "dog", "steps": 3, "guidance": 5.0, "seed": 5}
    (ours,) = Pipeline.load(painter(kind).path, device="cpu", dtype="float32", weights="quantized")(
        "a red cat", **SIZE, **settings
    )
    assert psnr(painter(kind).paint(type(painter(kind).theirs).__name__, **SIZE), ours) >= 45


def test_from_pretrained_takes_it_and_the_config_is_the_folders_own(
    painter: Callable[[str], Painter], tiny_pipeline: Callable[..., Path]
) -> None:
    for kind in MODELS:
        folder, unet = tiny_pipeline(**MODELS[kind]), painter(kind).ours
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, unet=unet)
        assert pipe.unet is unet
        expected = diffusers.UNet2DConditionModel.load_config(folder / "unet")
        own = {name: list(v) if isinstance(v, tuple) else v for name, v in unet.config.items()}
        for name in ("attention_head_dim", "transformer_layers_per_block"):
            if isinstance(expected[name], int):
                expected[name] = [expected[name]] * len(own[name])
        expected = {name: value for name, value in expected.items() if not name.startswith("_")}
        assert own == expected


def test_it_moves_and_changes_its_dtype(painter: Callable[[str], Painter]) -> None:
    unet = load_unet(painter("sd1").path)
    assert (unet.dtype, unet.device) == (torch.float32, torch.device("cpu"))
    latents, context = torch.randn(2, 4, 6, 8), torch.randn(2, 77, 32)
    with torch.no_grad():
        wide = unet(latents, 500, context).sample
        unet.to(torch.bfloat16)
        (narrow,) = unet(latents, torch.tensor([500, 500]), context, return_dict=False)
    assert unet.dtype == torch.bfloat16
    assert narrow.dtype == torch.float32
    assert 0 < (wide - narrow).abs().max() < 0.1 * wide.abs().max()


@pytest.mark.parametrize("runs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_on_the_kernels_and_back(
    painter: Callable[[str], Painter], monkeypatch: pytest.MonkeyPatch, runs: bool
) -> None:
    """As offloading moves it: packed for a GPU's kernels, run where asked for in Triton's interpreter, and back."""
    unet, module = load_unet(painter("sd1").path), "gguf_sd.integrations.diffusers"
    latents, context = torch.randn(2, 4, 6, 8), torch.randn(2, 77, 32)
    results = []
    with torch.no_grad():
        expected = unet(latents, 500, context).sample
        for kernels in ("dequantize", "torch", "dequantize"):
            monkeypatch.setattr(f"{module}.running_on", lambda *given, kernels=kernels: kernels)
            unet._settle(1.0)
            unet.to("cpu")
            packed = [m.packed is not None for m in unet.modules() if isinstance(m, Quantized)]
            assert packed
            assert set(packed) == {kernels != "torch"}
            if runs or kernels == "torch":
                results.append(unet(latents, 500, context).sample)
    for got in results:
        assert (got - expected).abs().max() < 1e-2 * expected.abs().max()


def test_offloading_hooks(painter: Callable[[str], Painter]) -> None:
    """accelerate's, which enable_model_cpu_offload puts around each model."""
    from accelerate import cpu_offload_with_hook

    own = load_unet(painter("sd1").path)
    latents, context = torch.randn(1, 4, 6, 8), torch.randn(1, 77, 32)
    with torch.no_grad():
        expected = own(latents, 500, context).sample
        hooked, hook = cpu_offload_with_hook(own, "cpu")
        assert torch.equal(hooked(latents, 500, context).sample, expected)
        hook.offload()
        assert torch.equal(hooked(latents, 500, context).sample, expected)


@reads_loras
def test_loras(painter: Callable[[str], Painter], tmp_path: Path) -> None:
    """Ours are laid beside the weights; cross_attention_kwargs says how much of them; peft's are refused."""
    own, config = painter("sd1"), config_of(painter("sd1").path)
    changes = random_lora(config, all_targets(config, [UNET_PART]))
    file = save(kohya(changes, config), tmp_path / "style.safetensors")
    unet = load_unet(own.path, loras=[f"{file}:0.5"])
    got = own.paint("StableDiffusionPipeline", unet, **SIZE)
    state = {**stored_unet(own.path)}
    reference = diffusers.UNet2DConditionModel.from_config(own.theirs.unet.config)
    shapes = reference.state_dict()
    reference.load_state_dict({name: value.view(shapes[name].shape) for name, value in state.items()})
    pipe = diffusers.StableDiffusionPipeline(**(own.theirs.components | {"unet": reference}))
    pipe.load_lora_weights(tmp_path, weight_name=file.name)
    scaled = {"cross_attention_kwargs": {"scale": 0.5}}
    assert psnr(got, own.paint("StableDiffusionPipeline", reference.eval(), **SIZE, **scaled)) >= 45
    plain = own.paint("StableDiffusionPipeline", **SIZE)
    assert psnr(got, plain) < 35
    off = own.paint("StableDiffusionPipeline", unet, **SIZE, cross_attention_kwargs={"scale": 0.0})
    assert off.tobytes() == plain.tobytes()
    ours = diffusers.StableDiffusionPipeline(**(own.theirs.components | {"unet": own.ours}))
    with pytest.raises(GgufSdError, match="generate --lora"):
        ours.load_lora_weights(tmp_path, weight_name=file.name)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda unet: unet(*inputs(), class_labels=torch.zeros(1)), "takes no class_labels"),
        (lambda unet: unet(*inputs(), cross_attention_kwargs={"gligen": 1}), "holds 'gligen'"),
        (lambda unet: unet(*inputs(), mid_block_additional_residual=torch.zeros(1)), "for neither"),
        (lambda unet: unet.set_attn_processor(None), "attention of its own"),
        (lambda unet: unet.enable_freeu(1, 1, 1, 1), "FreeU"),
        (lambda unet: unet.save_pretrained("x"), "GGUF file already"),
        (lambda unet: load_unet("missing.gguf"), "cannot read missing.gguf"),
        (lambda unet: load_unet("x.gguf", weights="none"), "unknown weights mode"),
    ],
)
def test_what_it_refuses(painter: Callable[[str], Painter], call: Callable[[GgufUNet], object], message: str) -> None:
    with pytest.raises(GgufSdError, match=message):
        call(painter("sd1").ours)


def inputs() -> tuple[Any, ...]:
    return torch.zeros(1, 4, 6, 8), 1, torch.zeros(1, 77, 32)
