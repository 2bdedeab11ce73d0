"""Pictures under ControlNets against diffusers' pipelines, with the weights as gguf-py decodes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import gguf
import numpy as np
import pytest
import torch
from PIL import Image

from gguf_sd import Pipeline
from gguf_sd.checkpoint.control_file import ControlFile
from gguf_sd.checkpoint.tensor_names import CONTROL, control_modules, inverted, rename
from gguf_sd.control import Control
from gguf_sd.errors import GgufSdError
from gguf_sd_kernels.cpu import int8
from tests.test_pipeline import oracle, psnr

XL = {"xl": True, "scheduler": "EulerDiscreteScheduler"}
EULER = {"scheduler": "EulerDiscreteScheduler"}
STEPS = {"steps": 3, "guidance": 5.0}


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def drawn(seed: int, size: tuple[int, int] = (64, 48)) -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)


def hole() -> Image.Image:
    mask = Image.new("L", (64, 48))
    mask.paste(255, (24, 8, 56, 40))
    return mask


def stored_control(folder: Path, path: Path) -> Any:
    """diffusers' ControlNet with the file's weights."""
    net, file = diffusers.ControlNetModel.from_pretrained(folder), ControlFile.open(path)
    names, own = inverted(control_modules(file.config)), net.state_dict()
    for tensor in gguf.GGUFReader(path).tensors:
        value = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
        shape = file.file.shape(tensor.name)
        if len(shape) == 4 and value.dim() == 2:
            out, channels, kh, kw = shape
            value = value.view(out, kh, kw, channels).permute(0, 3, 1, 2)
        name = str(rename(tensor.name.removeprefix(CONTROL), names))
        own[name] = value.reshape(own[name].shape)
    net.load_state_dict(own, strict=True)
    return net


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], gguf_of: Callable[..., Path]) -> Callable[..., tuple[Any, Path]]:
    """A function from the fields of Tiny to diffusers' pipeline and the file, both of the same weights."""
    made: dict[str, tuple[Any, Path]] = {}

    def make(**fields: Any) -> tuple[Any, Path]:
        key = repr(fields)
        if key not in made:
            folder = tiny_pipeline(**fields)
            made[key] = oracle(folder, gguf_of(folder)), gguf_of(folder)
        return made[key]

    return make


def theirs(pipeline: Any, kind: str, control: Any, xl: bool = False, **settings: Any) -> Image.Image:
    made = getattr(diffusers, f"StableDiffusion{'XL' if xl else ''}ControlNet{kind}Pipeline")
    parts = pipeline.components | {"controlnet": control}
    parts = {name: part for name, part in parts.items() if name in made._get_signature_keys(made)[0]}
    pipe = made(**(parts | ({} if xl else {"safety_checker": None, "requires_safety_checker": False})))
    pipe.set_progress_bar_config(disable=True)
    call = {"prompt": "a red cat", "negative_prompt": "dog", "num_inference_steps": 3, "guidance_scale": 5.0}
    call |= {"generator": torch.Generator().manual_seed(5)}
    return pipe(**(call | settings)).images[0]


def ours(path: Path, controls: Any, weights: str = "quantized", **settings: Any) -> Image.Image:
    pipeline = Pipeline.load(path, device="cpu", dtype="float32", weights=weights)
    values = STEPS | {"negative_prompt": "dog", "seed": 5, "controls": controls} | settings
    return pipeline("a red cat", **values)[0]


@pytest.mark.parametrize(
    ("fields", "weights"),
    [({}, "quantized"), (XL, "quantized"), slow({}, "resident"), slow(XL, "resident")],
)
def test_text_to_image(model: Any, tiny_control: Any, gguf_of: Any, fields: dict[str, Any], weights: str) -> None:
    xl = bool(fields)
    pipeline, path = model(**fields)
    folder = tiny_control(xl=xl)
    file = gguf_of(folder)
    got = ours(path, [(file, drawn(1))], weights)
    assert got.size == (64, 48), "the picture gives the size"
    assert psnr(got, theirs(pipeline, "", stored_control(folder, file), xl, image=drawn(1))) >= 45
    assert psnr(got, ours(path, [], width=64, height=48)) < 35, "it controls nothing"
    assert psnr(got, ours(path, [(file, drawn(2))])) < 40, "the picture makes no difference"


@pytest.mark.parametrize(
    ("fields", "kind"), [({}, "Inpaint"), slow({}, "Img2Img"), slow(XL, "Inpaint"), slow(XL, "Img2Img")]
)
def test_from_a_picture(model: Any, tiny_control: Any, gguf_of: Any, fields: dict[str, Any], kind: str) -> None:
    xl = bool(fields)
    pipeline, path = model(**(fields or EULER))
    folder = tiny_control(xl=xl)
    file, more = gguf_of(folder), {"strength": 0.75}
    got = ours(path, Control(file, drawn(1), 0.8), image=drawn(3), paste=False,
               mask=hole() if kind == "Inpaint" else None, **more)  # fmt: skip
    mask = {"mask_image": hole()} if kind == "Inpaint" else {}
    settings = {"image": drawn(3), "control_image": drawn(1), "controlnet_conditioning_scale": 0.8} | more | mask
    assert psnr(got, theirs(pipeline, kind, stored_control(folder, file), xl, **settings)) >= 45


@pytest.mark.slow
def test_an_inpainting_checkpoint(model: Any, tiny_control: Any, gguf_of: Any) -> None:
    """Its mask and masked picture are not for the ControlNet."""
    pipeline, path = model(unet={"in_channels": 9})
    folder = tiny_control()
    file, more = gguf_of(folder), {"strength": 0.75}
    got = ours(path, Control(file, drawn(1)), image=drawn(3), mask=hole(), paste=False, **more)
    settings = {"image": drawn(3), "control_image": drawn(1), "mask_image": hole()} | more
    settings |= {"controlnet_conditioning_scale": 1.0}
    assert psnr(got, theirs(pipeline, "Inpaint", stored_control(folder, file), **settings)) >= 45


@pytest.mark.parametrize("sampler", [None, slow("HeunDiscreteScheduler")])
def test_several_and_parts_of_the_way(
    model: Any, tiny_control: Any, gguf_of: Any, sampler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PNDM, the model's own, and Heun ask the model more often than there are steps."""
    pipeline, path = model()
    folders = [tiny_control(), tiny_control(seed=21)]
    files = [gguf_of(folder) for folder in folders]
    if sampler:
        scheduler = getattr(diffusers, sampler).from_config(pipeline.scheduler.config)
        monkeypatch.setitem(pipeline.__dict__, "scheduler", scheduler)
    nets = diffusers.MultiControlNetModel([stored_control(*pair) for pair in zip(folders, files, strict=True)])
    settings: dict[str, Any] = {"controlnet_conditioning_scale": [0.6, 1.2]}
    settings |= {"control_guidance_start": [0.0, 0.3], "control_guidance_end": [0.6, 1.0]}
    expected = theirs(pipeline, "", nets, image=[drawn(1), drawn(2)], **settings)
    controls = [Control(files[0], drawn(1), 0.6, 0.0, 0.6), Control(files[1], drawn(2), 1.2, 0.3, 1.0)]
    more = {} if sampler is None else {"sampler": "heun"}
    assert psnr(ours(path, controls, **more), expected) >= 45
    everywhere = [Control(files[0], drawn(1), 0.6), Control(files[1], drawn(2), 1.2)]
    assert psnr(ours(path, everywhere, **more), expected) < 45


@pytest.mark.parametrize("placement", [slow("staged"), "streamed"])
def test_wherever_the_weights_are(model: Any, tiny_control: Any, gguf_of: Any, placement: str) -> None:
    _, path = model()
    file = gguf_of(tiny_control())
    expected = ours(path, [(file, drawn(1))])
    pipeline = Pipeline.load(path, device="cpu", dtype="float32", weights="quantized", placement=placement)
    for _ in range(2):
        got = pipeline("a red cat", negative_prompt="dog", seed=5, controls=[(file, drawn(1))], **STEPS)[0]
        assert psnr(got, expected) >= 60
    assert not pipeline.parts.names
    if placement == "streamed":
        assert pipeline.parts.streamed["control 0"].nbytes > 0


def test_nets_come_and_go(model: Any, tiny_control: Any, gguf_of: Any) -> None:
    """One pipeline, other nets: each picture is as alone, and no net stays that the plan does not know."""
    _, path = model()
    one, two = gguf_of(tiny_control()), gguf_of(tiny_control(seed=21))
    pipeline = Pipeline.load(path, device="cpu", dtype="float32", weights="quantized")
    settings = STEPS | {"negative_prompt": "dog", "seed": 5}
    for controls in ([(one, drawn(1))], [(two, drawn(1)), (one, drawn(2))], [(two, drawn(2))]):
        assert psnr(pipeline("a red cat", controls=controls, **settings)[0], ours(path, controls)) >= 60
        assert {n for n in pipeline.parts.names if "control" in n} == {f"control {i}" for i in range(len(controls))}
    pipeline("a red cat", width=64, height=48, **settings)
    assert not any("control" in name for name in pipeline.parts.names)
    assert pipeline.parts.loads["unet"] == 1


@pytest.mark.slow
def test_batches_and_guidance_in_two_passes(model: Any, tiny_control: Any, gguf_of: Any) -> None:
    _, path = model()
    controls = [Control(gguf_of(tiny_control()), drawn(1), 0.7, 0.2, 0.9)]
    pipeline = Pipeline.load(path, device="cpu", dtype="float32", weights="quantized")
    settings = {"controls": controls, "negative_prompt": "dog", "width": 64, "height": 48} | STEPS
    pictures = pipeline("a red cat", seed=4, count=2, batch=2, **settings)
    assert psnr(pictures[1], ours(path, controls)) >= 60


@pytest.mark.parametrize(
    ("controls", "message"),
    [
        (lambda file: Control(file, drawn(1), scale=-1), "scale of the ControlNet .* is -1; it takes a number from 0"),
        (lambda file: Control(file, drawn(1), start=0.5, end=0.5), "starts at 0.5 and ends at 0.5"),
        (lambda file: Control(file, drawn(1), end=float("nan")), "end of the ControlNet .* is nan"),
        (lambda file: (file, "missing.png"), "missing.png does not exist"),
        (lambda file: ("missing.gguf", drawn(1)), "cannot read missing.gguf"),
        (lambda file: [file], "controls must be a Control, .file, picture."),
        (lambda file: [Control(file, drawn(1))] * 9, "at most 8 are taken"),
    ],
)
def test_what_cannot_be(model: Any, tiny_control: Any, gguf_of: Any, controls: Any, message: str) -> None:
    _, path = model()
    with pytest.raises(GgufSdError, match=message):
        ours(path, controls(gguf_of(tiny_control())))


def test_of_other_models(model: Any, tiny_control: Any, gguf_of: Any) -> None:
    _, path = model()
    with pytest.raises(GgufSdError, match=r"a ControlNet for SDXL, the model is Stable Diffusion 1.x"):
        ours(path, [(gguf_of(tiny_control(xl=True)), drawn(1))])
    with pytest.raises(GgufSdError, match="is no ControlNet"):
        ours(path, [(path, drawn(1))])


@pytest.mark.slow
@pytest.mark.skipif(not (int8.has_operators() and int8.is_fast()), reason="needs a processor that multiplies in 8 bits")
def test_in_8_bits(model: Any, tiny_control: Any, gguf_of: Any) -> None:
    _, path = model()
    controls = [(gguf_of(tiny_control()), drawn(1))]
    pipeline = Pipeline.load(path, device="cpu", dtype="float32", kernels="int8")
    got = pipeline("a red cat", negative_prompt="dog", seed=5, controls=controls, **STEPS)[0]
    assert psnr(got, ours(path, controls)) >= 30
