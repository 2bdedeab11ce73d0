"""UNets that come alone: painted with parts from other files, packed with them, inspected."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.cli.main import main
from gguf_sd.errors import GgufSdError
from gguf_sd.pipeline import Pipeline
from gguf_sd_convert.sources.diffusers_config import read_model_config
from tests.convert.conftest import ldm_state, read

Make = Callable[..., Path]
FAST = ["--steps", "2", "--width", "32", "--height", "32", "--device", "cpu", "--dtype", "float32", "--quiet"]
FAST += ["-p", "a cat", "--seed", "7", "--force"]
GROUPS = {"norm_num_groups": 32}


@pytest.fixture(scope="module")
def folder(tiny_pipeline: Make) -> Path:
    return tiny_pipeline(vae=GROUPS)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The whole model in Q8_0, in ComfyUI-GGUF's layout."""
    path = tmp_path_factory.mktemp("parts") / "whole.gguf"
    assert main(["convert", str(folder), "-o", str(path), "--type", "q8_0", "--layout", "comfy", "--quiet"]) == 0
    return path


@pytest.fixture(scope="module")
def parts(folder: Path, whole: Path) -> list[str]:
    """Options that give the parts of ``whole``: in F16, as it holds them."""
    vae = {n.removeprefix("first_stage_model."): t for n, t in ldm_state(folder).items() if n.startswith("first_")}
    text = {"text_model." + n.removeprefix("text_model."): t for n, t in load_file(folder / CLIP).items()}
    for name, state in (("vae", vae), ("clip_l", text)):
        state = {n: t.half() if t.dim() > 1 else t for n, t in state.items()}
        save_file({n: t.contiguous() for n, t in state.items()}, whole.with_name(f"{name}.safetensors"))
    given = [str(whole.with_name(f"{name}.safetensors")) for name in ("clip_l", "vae")]
    return ["--clip-l", given[0], "--vae", given[1], "--tokenizer", str(folder / "tokenizer")]


CLIP = "text_encoder/model.safetensors"


def other_tools_unet(path: Path, folder: Path, whole: Path, names: str) -> Path:
    """The whole model's UNet as another tool would write it: no metadata of ours but the configuration, which no tensor
    of a tiny one shows."""
    from gguf_sd.checkpoint.tensor_names import inverted, rename, unet_modules

    config, _ = read_model_config(folder)
    written = read(whole)
    back = inverted(unet_modules(config.unet))
    rename_to: dict[str, Callable[[str], str]] = {
        "prefixed": lambda name: UNET + name,
        "bare": lambda name: name,
        "diffusers": lambda name: rename(name, back) or name,
        "sd.cpp": lambda name: "unet." + name,
    }
    writer = gguf.GGUFWriter(path, "sd1")
    writer.add_string("gguf_sd.config", json.dumps(asdict(config)))
    for name in (n for n in written.types if n.startswith(UNET)):
        new = rename_to[names](name.removeprefix(UNET))
        shape = written.metadata.get(f"comfy.gguf.orig_shape.{name}")
        if shape is not None:
            writer.add_array(f"comfy.gguf.orig_shape.{new}", shape)
        kind = gguf.GGMLQuantizationType[written.types[name]]
        writer.add_tensor(new, written.data[name], raw_dtype=kind if kind == gguf.GGMLQuantizationType.Q8_0 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def painted(model: Path, out: Path, *options: str) -> bytes:
    assert main(["generate", str(model), "-o", str(out), *FAST, *options]) == 0
    return Image.open(out).tobytes()


@pytest.mark.parametrize("names", ["prefixed", "bare", "diffusers", "sd.cpp"])
def test_a_unet_paints_with_parts(folder: Path, whole: Path, parts: list[str], tmp_path: Path, names: str) -> None:
    """The picture of the whole model, whatever the names."""
    unet = other_tools_unet(tmp_path / "unet.gguf", folder, whole, names)
    assert painted(unet, tmp_path / "a.png", *parts) == painted(whole, tmp_path / "b.png")


def test_parts_out_of_a_whole_model(whole: Path, tmp_path: Path, folder: Path) -> None:
    """The tokenizer comes with the text encoder, and streaming reads each part from its own file."""
    unet = tmp_path / "unet.gguf"
    assert main(["convert", str(whole), "-o", str(unet), "--unet-only", "--quiet"]) == 0
    given = ["--clip-l", str(whole), "--vae", str(whole)]
    expected = painted(whole, tmp_path / "b.png")
    assert painted(unet, tmp_path / "a.png", *given) == expected
    assert painted(unet, tmp_path / "a.png", *given, "--lowvram") == expected


def test_from_python(whole: Path, folder: Path, parts: list[str], tmp_path: Path) -> None:
    unet = other_tools_unet(tmp_path / "unet.gguf", folder, whole, "bare")
    given = {"clip_l": parts[1], "vae": Path(parts[3]), "tokenizer": parts[5]}
    settings = {"steps": 2, "width": 32, "height": 32, "seed": 7}
    picture = Pipeline.load(unet, "cpu", "float32", **given)("a cat", **settings)[0]
    assert picture.tobytes() == Pipeline.load(whole, "cpu", "float32")("a cat", **settings)[0].tobytes()
    with pytest.raises(GgufSdError, match="holds a UNet alone; give its text encoder CLIP-L with --clip-l and"):
        Pipeline.load(unet)


def test_what_is_missing_is_named(
    whole: Path, folder: Path, parts: list[str], tiny_pipeline: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet, xl = tmp_path / "unet.gguf", tmp_path / "xl.gguf"
    other_tools_unet(unet, folder, whole, "bare")
    assert main(["convert", str(tiny_pipeline(xl=True)), "-o", str(xl), "--unet-only", "--quiet"]) == 0
    capsys.readouterr()
    clip, vae = parts[:2], parts[2:4]
    g = "its text encoder CLIP-G (OpenCLIP ViT-bigG) with --clip-g"
    cases: list[tuple[list[str], str]] = [
        ([str(unet)], "holds a UNet alone; give its text encoder CLIP-L with --clip-l and its autoencoder with --vae"),
        ([str(unet), *clip], "holds no autoencoder; give its autoencoder with --vae"),
        ([str(unet), *vae], "holds no text encoder CLIP-L; give its text encoder CLIP-L with --clip-l"),
        ([str(xl), *vae], f"; give its text encoder CLIP-L with --clip-l and {g}"),
        ([str(xl), *clip, *vae], f"; give {g}"),
        ([str(unet), "--clip-l", parts[3], *vae], "holds no text encoder of CLIP's"),
        ([str(whole), "--clip-g", str(whole)], "has one text encoder: leave --clip-g"),
        ([parts[1]], "is a text encoder alone"),
        ([parts[3]], "is a VAE alone; give it to generate or pack as --vae, beside a model"),
    ]
    for arguments, message in cases:
        assert main(["generate", *arguments, "-o", str(tmp_path / "x.png"), *FAST]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "x.png").exists()


def test_pack(whole: Path, folder: Path, parts: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Blocks byte for byte, all that painting takes inside, the same picture."""
    unet, packed = other_tools_unet(tmp_path / "unet.gguf", folder, whole, "diffusers"), tmp_path / "packed.gguf"
    assert main(["pack", str(unet), *parts, "-o", str(packed), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    ours, theirs = read(packed), read(whole)
    assert report["nbytes"] == packed.stat().st_size
    assert (report["layout"], report["type"], report["architecture"]) == ("comfy", "q8_0", "sd1")
    assert ours.types == theirs.types
    assert ours.shapes == theirs.shapes
    assert all(np.array_equal(ours.data[name], theirs.data[name]) for name in theirs.data)
    same = [key for key in theirs.metadata if key.startswith(("comfy.", "tokenizer.", "general.q", "general.f"))]
    assert {key: ours.metadata[key] for key in same} == {key: theirs.metadata[key] for key in same}
    assert json.loads(ours.metadata["gguf_sd.config"]) == json.loads(theirs.metadata["gguf_sd.config"])
    assert len(ours.metadata["gguf_sd.source.sha256"]) == 64
    assert painted(packed, tmp_path / "a.png") == painted(whole, tmp_path / "b.png")
    before = packed.read_bytes()
    assert main(["pack", str(unet), *parts, "-o", str(packed)]) == 2
    assert "exists; --force replaces it" in capsys.readouterr().err
    assert main(["pack", str(unet), *parts, "-o", str(packed), "--force", "--quiet"]) == 0
    assert packed.read_bytes() == before


def test_pack_of_sdxl_from_folders(tiny_pipeline: Make, tmp_path: Path) -> None:
    """Parts as diffusers saved them, the UNet in the native layout."""
    folder = tiny_pipeline(xl=True, vae=GROUPS)
    whole, unet, packed = (tmp_path / f"{name}.gguf" for name in ("whole", "unet", "packed"))
    quantised = ["--type", "q4_0", "--layout", "native", "--quiet"]
    assert main(["convert", str(folder), "-o", str(unet), "--unet-only", *quantised]) == 0
    assert main(["convert", str(folder), "-o", str(whole), *quantised]) == 0
    given = {"--clip-l": "text_encoder", "--clip-g": "text_encoder_2", "--vae": "vae", "--tokenizer": "tokenizer"}
    options = [text for option, name in given.items() for text in (option, str(folder / name))]
    assert main(["pack", str(unet), *options, "-o", str(packed), "--preset", "sdxl-turbo", "--quiet"]) == 0
    ours, theirs = read(packed), read(whole)
    assert ours.metadata["general.architecture"] == "gguf_sd"
    assert json.loads(ours.metadata["gguf_sd.config"])["defaults"]["steps"] == 1
    assert all(np.array_equal(ours.data[n], theirs.data[n]) for n in theirs.data if n.startswith(UNET))
    assert ours.metadata["gguf_sd.shapes"] == theirs.metadata["gguf_sd.shapes"]
    vae = [name for name in theirs.shapes if name.startswith("first_stage_model.")]
    assert {name: ours.shapes[name] for name in vae} == {name: theirs.shapes[name] for name in vae}, "1x1 convolutions"
    pictures = [
        np.frombuffer(painted(model, tmp_path / "a.png", "--guidance", "5", *TURBO), np.uint8).astype(int)
        for model in (packed, whole)
    ]
    assert np.abs(pictures[0] - pictures[1]).max() <= 2, "float32 parts here, float16 there"


TURBO = ["--sampler", "euler_a", "--schedule", "trailing"]


def test_pack_refuses(whole: Path, folder: Path, parts: list[str], tmp_path: Path, tiny_pipeline: Make,
                      capsys: pytest.CaptureFixture[str]) -> None:  # fmt: skip
    unet = other_tools_unet(tmp_path / "unet.gguf", folder, whole, "bare")
    clip, vae, tokenizer = parts[:2], parts[2:4], parts[4:]
    four = tiny_pipeline(vae=GROUPS | {"latent_channels": 8}, unet={"in_channels": 8, "out_channels": 8}) / "vae"
    lacking = load_file(parts[3])
    del lacking["decoder.norm_out.bias"]
    save_file(lacking, tmp_path / "lacking.safetensors")
    capsys.readouterr()
    cases: list[tuple[list[str], str]] = [
        ([str(unet), *clip, *tokenizer], "holds no autoencoder; give its autoencoder with --vae"),
        ([str(unet), *clip, "--vae", str(four), *tokenizer], "is the autoencoder of another model family"),
        (
            [str(unet), *clip, "--vae", str(tmp_path / "lacking.safetensors"), *tokenizer],
            "lacks 1 tensors of the autoe",
        ),
        ([str(unet), *clip, "--vae", parts[1], *tokenizer], "holds no VAE"),
        ([str(unet), *clip, *vae, *tokenizer, "--preset", "sdxl"], "preset sdxl is for sdxl models"),
        ([str(unet), *clip, *vae, *tokenizer, "--preset", "sd"], "no preset 'sd'; choose from"),
        ([parts[1], *clip, *vae, *tokenizer], "is a text encoder alone"),
        ([str(tmp_path / "none"), *clip, *vae], "none does not exist"),
        ([str(unet), *clip, *vae, "-o", parts[3], "--force"], "would replace"),
    ]
    for arguments, message in cases:
        output = [] if "-o" in arguments else ["-o", str(tmp_path / "x.gguf")]
        assert main(["pack", *arguments, *output]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert not (tmp_path / "x.gguf").exists()


def test_inspect_says_which_options(
    whole: Path, folder: Path, parts: list[str], tiny_pipeline: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unet = other_tools_unet(tmp_path / "unet.gguf", folder, whole, "diffusers")
    own, xl = tmp_path / "own.gguf", tmp_path / "xl.gguf"
    assert main(["convert", str(folder), "-o", str(own), "--unet-only", "--type", "q4_0", "--quiet"]) == 0
    assert main(["convert", str(tiny_pipeline(xl=True)), "-o", str(xl), "--unet-only", "--quiet"]) == 0
    facts: dict[str, Any] = {}
    for path in (unet, own, xl, Path(parts[1]), Path(parts[3])):
        capsys.readouterr()
        assert main(["inspect", str(path), "--json"]) == 0
        facts[path.stem] = json.loads(capsys.readouterr().out)
    assert {name: f["is"] for name, f in facts.items()} == {
        "unet": "a UNet alone",
        "own": "a UNet alone",
        "xl": "a UNet alone",
        "clip_l": "a text encoder alone",
        "vae": "a VAE alone",
    }
    assert "with --clip-l and --vae" in facts["unet"]["advice"]
    assert "with --clip-l, --clip-g and --vae" in facts["xl"]["advice"]
    assert (facts["own"]["layout"], facts["own"]["type"], facts["own"]["architecture"]) == ("comfy", "q4_0", "sd1")
    assert set(facts["unet"]["parts"]) == {"unet"}


@pytest.mark.parametrize(("width", "name", "option"), [(768, "CLIP-L", "--clip-l"), (1280, "CLIP-G", "--clip-g")])
def test_inspect_knows_published_text_encoders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], width: int, name: str, option: str
) -> None:
    from tests.cli.test_inspect import sparse

    path = sparse(tmp_path / "x.safetensors", {"text_model.embeddings.token_embedding.weight": (49408, width)})
    assert main(["inspect", str(path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["is"] == f"a text encoder alone ({name})"
    assert f"as {option}" in facts["advice"]
