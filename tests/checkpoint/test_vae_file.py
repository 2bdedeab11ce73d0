"""TAESD against diffusers' AutoencoderTiny, and VAE files of every kind in the place of a model's."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.vae_file import VAEFile, load_vae_file
from gguf_sd.config import SD15, SDXL
from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import resized, to_tensor
from gguf_sd.models.tiny_vae import TinyAutoencoder
from gguf_sd.quality import psnr
from gguf_sd.sampling.init_latents import Encoder
from gguf_sd_convert.convert import ConvertOptions, convert

TAESD = Path(__file__).resolve().parents[3] / "shared" / "data" / "taesd"
GROUPS_32 = {"norm_num_groups": 32}  # what a file without config.json is taken to have
CPU, F32 = torch.device("cpu"), torch.float32


def max_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest error, relative to how far the values reach from their mean."""
    return ((got - expected).abs().max() / (expected - expected.mean()).abs().max()).item()


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def latents(seed: int = 1) -> torch.Tensor:
    """Large enough for the decoder's clamp to matter."""
    return 3 * torch.randn(2, 4, 8, 6, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def tiny() -> Any:
    """diffusers' AutoencoderTiny, weights random and as large as leaves signals their size."""
    oracle, generator = diffusers.AutoencoderTiny().eval(), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in oracle.parameters():
            fan_in = parameter[0].numel()
            std = fan_in**-0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return oracle


def published(oracle: Any, half: str) -> dict[str, torch.Tensor]:
    """One half under the names of the published files, whose decoder begins with a layer that has no weights."""
    state, shift = getattr(oracle, half).layers.state_dict(), int(half == "decoder")
    parts = ((name.split(".", 1), value) for name, value in state.items())
    return {f"{int(index) + shift}.{rest}": value.contiguous() for (index, rest), value in parts}


def write_tiny(oracle: Any, folder: Path, form: str) -> Path:
    if form == "diffusers folder":
        oracle.save_pretrained(folder)
        return folder
    halves = {half: published(oracle, half) for half in ("encoder", "decoder")}
    if form == "one file":
        whole = {f"{half}.{name}": value for half, state in halves.items() for name, value in state.items()}
        save_file(whole, folder / "taesd.safetensors")
        return folder / "taesd.safetensors"
    for half, state in halves.items():
        save_file(state, folder / f"taesd_{half}.safetensors")
    return {"folder": folder, "decoder": folder / "taesd_decoder.safetensors"}.get(
        form, folder / "taesd_encoder.safetensors"
    )


@pytest.mark.parametrize("form", ["folder", "decoder", "encoder", "one file", "diffusers folder"])
@torch.inference_mode()
def test_tiny_equals_diffusers(tiny: Any, tmp_path: Path, form: str) -> None:
    vae = load_vae_file(write_tiny(tiny, tmp_path, form), F32, SD15.vae)
    assert isinstance(vae, TinyAutoencoder)
    expected = tiny.encode(images()).latents
    encoder = Encoder(vae, CPU, F32)
    noise = torch.randn(1, 4, 8, 6)
    for image, wanted in zip(images(), expected, strict=True):  # scaled as the UNet takes them, and not random
        assert max_error(encoder(image[None], noise)[0], wanted) < 1e-4
    assert max_error(vae.decode(latents()), tiny.decode(latents()).sample) < 1e-4
    assert max_error(vae.decode(latents() * 1.01), tiny.decode(latents()).sample) > 1e-3, "the comparison is blind"


@torch.inference_mode()
def test_decoder_alone(tiny: Any, tmp_path: Path) -> None:
    path = write_tiny(tiny, tmp_path, "decoder")
    path.with_name("taesd_encoder.safetensors").unlink()
    vae = load_vae_file(tmp_path, F32, SD15.vae)
    assert max_error(vae.decode(latents()), tiny.decode(latents()).sample) < 1e-4
    with pytest.raises(GgufSdError, match=r"taesd_decoder.safetensors holds only the decoder .* put its encoder"):
        vae.encode(images())


@pytest.mark.skipif(not TAESD.is_dir(), reason="the trained TAESD is not here")
@pytest.mark.parametrize(("photograph", "bound"), [("astronaut", 21), ("coffee", 24)])
@torch.inference_mode()
def test_trained_tiny_carries_photographs(photograph: str, bound: float) -> None:
    picture = resized(Image.fromarray(getattr(skimage.data, photograph)()), 256, 256, "crop")
    vae = load_vae_file(TAESD / "taesd_decoder.safetensors", F32, SD15.vae)
    pixels = vae.decode(vae.encode(to_tensor(picture))[0])[0].permute(1, 2, 0) / 2 + 0.5
    painted = (pixels.clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    assert psnr(painted, np.asarray(picture)) >= bound


def ldm_state(folder: Path, prefix: str) -> dict[str, torch.Tensor]:
    """A diffusers VAE under the original names, 1x1 convolutions as such, with what training leaves behind."""
    state = {}
    for name, value in load_vae_file(folder, F32).state_dict().items():
        pointwise = value.dim() == 2
        state[prefix + name] = (value[..., None, None] if pointwise else value).contiguous()
    state |= {prefix + "loss.logvar": torch.zeros(1), prefix + "model_ema.decay": torch.zeros(1)}
    return state


def write_full(folder: Path, target: Path, form: str) -> Path:
    if form == "diffusers folder":
        return folder / "vae"
    if form == "whole pipeline":
        return folder
    if form == "diffusers file alone":
        state = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    else:
        state = ldm_state(folder / "vae", "first_stage_model." if form == "checkpoint" else "")
    if form == "checkpoint":
        state["model.diffusion_model.out.2.bias"] = torch.zeros(4)
    if form == "old attention":
        old = {".attn_1.q.": ".attn_1.to_q.", ".attn_1.proj_out.": ".attn_1.to_out.0."}
        for name in list(state):
            for new, before in old.items():
                if new in name:
                    state[name.replace(new, before)] = state.pop(name)
    save_file(state, target / "vae.safetensors")
    return target / "vae.safetensors"


FORMS = ["diffusers folder", "whole pipeline", "diffusers file alone", "ldm", "checkpoint", "old attention"]


@pytest.mark.parametrize("form", FORMS)
@torch.inference_mode()
def test_full_vae_equals_diffusers(tiny_pipeline: Callable[..., Path], tmp_path: Path, form: str) -> None:
    folder = tiny_pipeline(vae={} if form == "diffusers folder" else GROUPS_32)
    oracle = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    vae = load_vae_file(write_full(folder, tmp_path, form), F32, SD15.vae)
    expected = oracle.encode(images()).latent_dist
    mean, std = vae.encode(images())
    assert max_error(mean, expected.mean) < 1e-4
    assert max_error(std, expected.std) < 1e-4
    assert max_error(vae.decode(latents()), oracle.decode(latents() / 0.18215).sample) < 1e-4


@torch.inference_mode()
def test_vae_of_a_gguf_model(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    convert(tiny_pipeline(), tmp_path / "model.gguf", ConvertOptions())
    own = ModelFile.open(tmp_path / "model.gguf").load_vae(F32)
    vae = load_vae_file(tmp_path / "model.gguf", F32, SD15.vae)
    assert torch.equal(vae.decode(latents()), own.decode(latents()))


def test_scaling_and_width_follow_config_and_model(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    """Without config.json the model's scaling; float16 is safe only where both or the config say so."""
    folder = tiny_pipeline(vae=GROUPS_32)
    alone = write_full(folder, tmp_path, "ldm")
    assert VAEFile.open(alone, SD15.vae).config.scaling_factor == SD15.vae.scaling_factor
    sdxl = VAEFile.open(alone, SDXL.vae).config
    assert (sdxl.scaling_factor, sdxl.overflows_float16) == (SDXL.vae.scaling_factor, True)

    values = json.loads((folder / "vae" / "config.json").read_text())
    fixed = values | {"scaling_factor": SDXL.vae.scaling_factor, "force_upcast": False}
    (tmp_path / "config.json").write_text(json.dumps(fixed))
    alone.rename(tmp_path / "diffusion_pytorch_model.safetensors")
    assert VAEFile.open(tmp_path, SDXL.vae).config == replace(sdxl, overflows_float16=False)
    with pytest.raises(GgufSdError, match=r"another model family: it scales latents by 0.13025, this model by 0.18215"):
        VAEFile.open(tmp_path, SD15.vae)


def _save(path: Path, **tensors: torch.Tensor) -> Path:
    save_file({name.replace("__", "."): value for name, value in tensors.items()}, path)
    return path


def _truncated(tiny: Any, folder: Path) -> Path:
    path = write_tiny(tiny, folder, "one file")
    path.write_bytes(path.read_bytes()[:-100])
    return path


def _half(tiny: Any, folder: Path, drop: str) -> Path:
    write_tiny(tiny, folder, "folder")
    (folder / f"taesd_{drop}.safetensors").unlink()
    return folder


def _edited(tiny: Any, folder: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> Path:
    path = write_tiny(tiny, folder, "one file")
    state = load_file(path)
    edit(state)
    save_file(state, path)
    return path


def _configured(tiny: Any, folder: Path, **changes: Any) -> Path:
    write_tiny(tiny, folder, "diffusers folder")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))
    return folder


def _hollow(folder: Path, *blocks: str) -> Path:
    ends = ("decoder.conv_in.weight", "decoder.conv_out.weight")
    path = folder / "hollow.safetensors"
    save_file({name: torch.zeros(32, 4, 1, 1) for name in (*blocks, *ends)}, path)
    return path


def _pickle(path: Path) -> Path:
    torch.save({"a": torch.zeros(1)}, path)
    return path


def _two(tiny: Any, folder: Path) -> Path:
    for name in ("taesd", "taesdxl"):
        save_file(published(tiny, "decoder"), folder / f"{name}_decoder.safetensors")
    return folder


WRONG: dict[str, tuple[Callable[[Any, Path], Path], str]] = {
    "absent": (lambda _, f: f / "none.safetensors", "cannot read the VAE .*none.safetensors: No such file"),
    "empty folder": (lambda _, f: f, "holds no .safetensors file; --vae takes TAESD or a full VAE"),
    "two in a folder": (_two, r"more than one file \(taesd_decoder.*taesdxl_decoder.*\); give the path of the one"),
    "pickle": (lambda _, f: _pickle(f / "vae.pt"), "vae.pt is neither a safetensors nor a GGUF file"),
    "truncated": (_truncated, "taesd.safetensors is damaged or no safetensors file: .* download it again"),
    "no tensors": (lambda _, f: _save(f / "no.safetensors"), "no.safetensors holds no VAE"),
    "other layers": (
        lambda _, f: save_file({"0.weight": torch.zeros(4, 4)}, f / "mlp.safetensors") or f,
        "mlp.safetensors holds no VAE",
    ),
    "UNet": (lambda _, f: _save(f / "u.safetensors", out__2__bias=torch.zeros(4)), "u.safetensors holds no VAE"),
    "encoder alone": (lambda t, f: _half(t, f, "decoder"), "holds only the encoder .* put taesd_decoder.safetensors"),
    "a level without blocks": (
        lambda _, f: _hollow(f, "encoder.down.1.block.0.conv1.weight", "encoder.down.3.block.7.conv1.weight"),
        "hollow.safetensors lacks resnet blocks of its encoder",
    ),
    "lacks one": (lambda t, f: _edited(t, f, lambda s: s.pop("decoder.19.bias")), "lacks 1 of .* decoder.19.bias"),
    "16 channels": (
        lambda t, f: _edited(t, f, lambda s: s.update({"decoder.1.weight": torch.zeros(64, 16, 3, 3)})),
        "another model family: its latent_channels is 16, this model's 4",
    ),
    "another class": (
        lambda t, f: _configured(t, f, _class_name="AutoencoderKL"),
        "config.json: _class_name is 'AutoencoderKL'; gguf-sd takes 'AutoencoderTiny'",
    ),
    "another activation": (lambda t, f: _configured(t, f, act_fn="silu"), "act_fn is 'silu'; gguf-sd takes 'relu'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_named(tiny: Any, tmp_path: Path, case: str) -> None:
    make, message = WRONG[case]
    with pytest.raises(GgufSdError, match=message) as raised:
        load_vae_file(make(tiny, tmp_path), F32, SD15.vae)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_full_vae_with_other_groups_needs_its_config(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    state = load_file(
        tiny_pipeline(vae={"block_out_channels": (8, 16, 32, 32)}) / "vae" / "diffusion_pytorch_model.safetensors"
    )
    save_file(state, tmp_path / "vae.safetensors")
    with pytest.raises(
        GgufSdError, match=r"widths \[8, 16, 32, 32\] do not split into 32 groups; name it diff.* config.json"
    ):
        VAEFile.open(tmp_path / "vae.safetensors")
