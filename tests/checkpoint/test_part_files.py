"""Text encoders and autoencoders out of files of their own, under every name that they come with; the oracles are the
models of transformers and diffusers that were saved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gguf_sd.checkpoint.mapped_file import JoinedFile, SafetensorsFile
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.part_files import PartPaths
from gguf_sd.checkpoint.vae_file import VAEFile
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.convert import ConvertOptions, convert

Make = Callable[..., Path]
State = dict[str, Tensor]
GROUPS = {"norm_num_groups": 32}  # as in published ones: tensors do not show it
EXTRA = {"logit_scale": torch.ones(()), "vision_model.post_layernorm.weight": torch.ones(4)}


def save(path: Path, state: State, quantised: bool = False) -> Path:
    """As .safetensors or .gguf; matrices in Q8_0 where ``quantised``."""
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    if path.suffix == ".safetensors":
        save_file(state, path)
        return path
    writer = gguf.GGUFWriter(path, "clip")
    for name, tensor in state.items():
        kind = gguf.GGMLQuantizationType.Q8_0
        if quantised and tensor.dim() == 2 and tensor.shape[1] % 32 == 0:
            writer.add_tensor(name, gguf.quants.quantize(tensor.float().numpy(), kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def unets(tiny_pipeline: Make, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """A function to the UNet alone of the tiny pipeline, SDXL's or SD 1's."""
    folder = tmp_path_factory.mktemp("unets")
    for xl in (False, True):
        convert(tiny_pipeline(xl=xl), folder / f"{xl}.gguf", ConvertOptions(type="f16", unet_only=True, layout="comfy"))
    return lambda xl: folder / f"{xl}.gguf"


def text_state(folder: Path) -> State:
    """A saved text encoder's tensors, under transformers' names without their outermost level."""
    return {name.removeprefix("text_model."): t for name, t in load_file(folder / "model.safetensors").items()}


def levelled(state: State, before: str, level: str = "text_model.") -> State:
    """``level`` in front of all but the projection, ``before`` in front of all."""
    return {before + ("" if name.startswith("text_projection") else level) + name: t for name, t in state.items()}


def as_openclip(state: State, before: str) -> State:
    """A transformers encoder under OpenCLIP's names."""
    result = {
        "token_embedding.weight": state["embeddings.token_embedding.weight"],
        "positional_embedding": state["embeddings.position_embedding.weight"],
        "text_projection": state["text_projection.weight"].t(),
    }
    result |= {f"ln_final.{leaf}": state[f"final_layer_norm.{leaf}"] for leaf in ("weight", "bias")}
    pairs = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    pairs |= {"attn.out_proj": "self_attn.out_proj"}
    for i in range(3):
        for leaf in ("weight", "bias"):
            block, layer = f"transformer.resblocks.{i}", f"encoder.layers.{i}"
            result |= {f"{block}.{new}.{leaf}": state[f"{layer}.{old}.{leaf}"] for new, old in pairs.items()}
            thirds = [state[f"{layer}.self_attn.{x}_proj.{leaf}"] for x in "qkv"]
            result[f"{block}.attn.in_proj_{leaf}"] = torch.cat(thirds)
    return {before + name: tensor for name, tensor in result.items()}


IDS = torch.tensor([[510, 3, 7, 7, 21, 511, 511, 511]])


def encoded(model: ModelFile, index: int) -> tuple[Tensor, Tensor | None]:
    result = model.load_text(index, torch.float32).encode(IDS, 1, normalise=True)
    return result.states, result.pooled


def expected(folder: Path, xl: bool) -> tuple[Tensor, Tensor | None]:
    """transformers' last hidden state, and the projected end token of SDXL's second."""
    from transformers import CLIPTextModel, CLIPTextModelWithProjection

    theirs = (CLIPTextModelWithProjection if xl else CLIPTextModel).from_pretrained(folder)
    with torch.inference_mode():
        output = theirs(IDS)
    return output.last_hidden_state, output.text_embeds if xl else None


def close(got: Tensor, wanted: Tensor, bound: float = 1e-5) -> bool:
    return float((got - wanted).abs().max()) <= bound * float(wanted.abs().max())


CLIP_L_NAMES = {
    "transformers 5": lambda state: state,
    "transformers": lambda state: levelled(state, "") | EXTRA,
    "ComfyUI's clip_l, with a projection": lambda state: (
        levelled(state, "") | {"text_projection.weight": torch.ones(32, 32), "logit_scale": torch.ones(())}
    ),
    "sd.cpp's part": lambda state: levelled(state, "text_encoders.clip_l.transformer."),
    "sd.cpp's te": lambda state: levelled(state, "te."),
    "SD 1.x checkpoint": lambda state: (
        levelled(state, "cond_stage_model.transformer.") | {"first_stage_model.decoder.conv_in.weight": torch.ones(4)}
    ),
    "SDXL checkpoint": lambda state: levelled(state, "conditioner.embedders.0.transformer."),
    "with position ids": lambda state: (
        levelled(state, "") | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    ),
}


@pytest.mark.parametrize("names", CLIP_L_NAMES)
@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_clip_l(tiny_pipeline: Make, unets: Any, tmp_path: Path, names: str, suffix: str) -> None:
    folder = tiny_pipeline() / "text_encoder"
    path = save(tmp_path / f"clip{suffix}", CLIP_L_NAMES[names](text_state(folder)))
    model = ModelFile.open(unets(False), PartPaths(clip_l=path))
    assert close(encoded(model, 0)[0], expected(folder, False)[0])


CLIP_G_NAMES = {
    "transformers 5": lambda state: state,
    "transformers": lambda state: levelled(state, "") | EXTRA,
    "sd.cpp's part": lambda state: levelled(state, "text_encoders.clip_g.transformer."),
    "OpenCLIP": lambda state: as_openclip(state, "") | {"visual.proj": torch.ones(2, 2), "logit_scale": torch.ones(())},
    "SDXL checkpoint": lambda state: as_openclip(state, "conditioner.embedders.1.model."),
}


@pytest.mark.parametrize("names", CLIP_G_NAMES)
@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_clip_g(tiny_pipeline: Make, unets: Any, tmp_path: Path, names: str, suffix: str) -> None:
    folder = tiny_pipeline(xl=True) / "text_encoder_2"
    path = save(tmp_path / f"clip{suffix}", CLIP_G_NAMES[names](text_state(folder)))
    states, pooled = encoded(ModelFile.open(unets(True), PartPaths(clip_g=path)), 1)
    wanted_states, wanted_pooled = expected(folder, True)
    assert close(states, wanted_states)
    assert pooled is not None
    assert wanted_pooled is not None
    assert close(pooled, wanted_pooled)


def test_both_out_of_one_whole_model(tiny_pipeline: Make, unets: Any, tmp_path: Path) -> None:
    """Which encoder is which is told by their layers, and the tokenizer comes along."""
    convert(tiny_pipeline(xl=True), tmp_path / "whole.gguf", ConvertOptions(type="f16"))
    model = ModelFile.open(unets(True), PartPaths(clip_l=tmp_path / "whole.gguf", clip_g=tmp_path / "whole.gguf"))
    for index, name in enumerate(("text_encoder", "text_encoder_2")):
        states, _ = encoded(model, index)
        assert close(states, expected(tiny_pipeline(xl=True) / name, index == 1)[0], 2e-3)
    assert model.tokenizer().encode("a cat", model.config.text[0]).ids.shape == (1, 77)


def test_quantised_and_narrow_parts(tiny_pipeline: Make, unets: Any, tmp_path: Path) -> None:
    """Q8_0 blocks, bfloat16 and float8 become what is computed in."""
    folder = tiny_pipeline() / "text_encoder"
    state, wanted = text_state(folder), expected(folder, False)[0]
    narrow = {name: t.to(torch.float8_e4m3fn) if t.dim() > 1 else t.bfloat16() for name, t in state.items()}
    paths = {
        save(tmp_path / "a.gguf", state, quantised=True): 0.03,
        save(tmp_path / "b.safetensors", {name: t.bfloat16() for name, t in state.items()}): 0.03,
        save(tmp_path / "c.safetensors", narrow): 0.3,
    }
    for path, bound in paths.items():
        model = ModelFile.open(unets(False), PartPaths(clip_l=path))
        assert close(encoded(model, 0)[0], wanted, bound), path


@pytest.mark.parametrize("prefix", ["first_stage_model.", "vae.", ""])
@pytest.mark.parametrize("quantised", [False, True])
def test_vae_as_gguf(tiny_pipeline: Make, tmp_path: Path, prefix: str, quantised: bool) -> None:
    """Under its original names; what it makes of latents is what diffusers makes of them."""
    import diffusers

    from tests.convert.conftest import ldm_state

    folder = tiny_pipeline(vae=GROUPS)
    state = {n: t for n, t in ldm_state(folder).items() if n.startswith("first_stage_model.")}
    state = {prefix + name.removeprefix("first_stage_model."): tensor for name, tensor in state.items()}
    path = save(tmp_path / "vae.gguf", state, quantised)
    decoder = VAEFile.open(path).load(torch.float32)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    with torch.inference_mode():
        assert close(decoder.decode(latents * 0.18215), theirs.decode(latents).sample, 0.03 if quantised else 1e-5)


def test_vae_with_diffusers_names_as_gguf(tiny_pipeline: Make, tmp_path: Path) -> None:
    import diffusers

    folder = tiny_pipeline(vae=GROUPS)
    state = load_file(folder / "vae" / "diffusion_pytorch_model.safetensors")
    decoder = VAEFile.open(save(tmp_path / "vae.gguf", state)).load(torch.float32)
    latents = torch.randn(1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    theirs = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    with torch.inference_mode():
        assert close(decoder.decode(latents * 0.18215), theirs.decode(latents).sample)


def test_what_cannot_be_is_one_sentence(tiny_pipeline: Make, unets: Any, tmp_path: Path) -> None:
    state = text_state(tiny_pipeline() / "text_encoder")
    wide = {n: torch.cat([t, t], -1) if n.endswith("token_embedding.weight") else t for n, t in state.items()}
    short = {n: t for n, t in state.items() if n != "final_layer_norm.bias"}
    shape = state | {"final_layer_norm.bias": torch.ones(31)}
    cases = {
        "wide": (wide, "holds a text encoder of width 64 with 2 layers, the model takes one of width 32 with 2"),
        "short": (short, "lacks 1 of 36 tensors of the text encoder, the first is final_layer_norm.bias"),
        "shape": (shape, r"has tensor final_layer_norm.bias of shape \[31\] where the model takes \[32\]"),
        "none": ({"x": torch.ones(2)}, "holds no text encoder of CLIP's"),
    }
    for name, (tensors, message) in cases.items():
        path = save(tmp_path / f"{name}.safetensors", tensors)
        with pytest.raises(GgufSdError, match=f"^--clip-l: {path} {message}.*give the text encoder CLIP-L"):
            ModelFile.open(unets(False), PartPaths(clip_l=path))
    with pytest.raises(GgufSdError, match=f"is sd1, which has one text encoder: leave --clip-g {path} out"):
        ModelFile.open(unets(False), PartPaths(clip_g=path))
    (tmp_path / "x.bin").write_bytes(b"PK\x03\x04")
    with pytest.raises(GgufSdError, match=r"--clip-l: .*x\.bin is neither a \.gguf nor a \.safetensors file"):
        ModelFile.open(unets(False), PartPaths(clip_l=tmp_path / "x.bin"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(GgufSdError, match=r"--clip-l: the folder .* it has none"):
        ModelFile.open(unets(False), PartPaths(clip_l=tmp_path / "empty"))
    with pytest.raises(GgufSdError, match=r"--clip-l: .*nowhere does not exist"):
        ModelFile.open(unets(False), PartPaths(clip_l=tmp_path / "nowhere"))


def test_joined_files_know_their_own(tmp_path: Path) -> None:
    """Pages go back to the file that they came from; shapes and orders come along."""
    for name in "ab":
        save_file({name: torch.full((64, 1024), float(ord(name)))}, tmp_path / name)
    first, second = (SafetensorsFile(tmp_path / name) for name in "ab")
    joined = JoinedFile(first, {"x": (first, "a"), "y": (second, "b")})
    x, y = joined.tensor("x"), joined.tensor("y")
    assert isinstance(x, Tensor)
    assert isinstance(y, Tensor)
    assert joined.holds(x)
    assert joined.holds(y)
    assert not joined.holds(torch.ones(1))
    joined.expect([x, y, torch.ones(1)])
    joined.forget_pages([y])
    joined.forget_pages()
    assert np.array_equal(np.unique(y.numpy()), [98.0])
    assert joined.size == first.size + second.size
    assert replace(joined.tensors["y"], name="b") == second.tensors["b"]
