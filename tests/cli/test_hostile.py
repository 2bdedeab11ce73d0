"""What the fuzzers do not make, by hand: each ends well or in one sentence, within a second and 300 MB."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import struct
import sys
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, TiffImagePlugin
from safetensors.torch import save_file

from gguf_sd_convert.convert import ConvertOptions, convert
from tests.cli.attempt import attempt
from tests.fuzz.file_mutators import chunk
from tests.fuzz.gguf_mutator import Parts, take_apart, text
from tests.fuzz.material import SMALL, archive_members

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forks, and asks /proc")
PAINT = ["-p", "x", "--steps", "1", "--width", "32", "--height", "32", "--device", "cpu", "--safety", "off", "--quiet"]
BOMB = 400 << 20  # bytes, unpacked
Make = Callable[[Path, Path], list[str]]
REFUSED: dict[str, Make] = {}
FINE: dict[str, Make] = {}


def refused(make: Make) -> Make:
    REFUSED[make.__name__] = make
    return make


def fine(make: Make) -> Make:
    FINE[make.__name__] = make
    return make


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    convert(tiny_pipeline(**SMALL), path, ConvertOptions(type="q4_0"))
    return path


def generate(model: Path, *more: str) -> list[str]:
    return ["generate", str(model), *PAINT, *more]


def changed(model: Path, to: Path, change: Callable[[Parts], None]) -> Path:
    parts = take_apart(model)
    change(parts)
    to.write_bytes(parts.to_bytes())
    return to


def with_key(model: Path, to: Path, key: bytes, kind: int, value: bytes) -> Path:
    return changed(model, to, lambda parts: parts.metadata.append((key, kind, value)))


def with_config(model: Path, to: Path, change: Callable[[str], str]) -> Path:
    """The JSON of our settings, as text."""

    def apply(parts: Parts) -> None:
        for index, (key, kind, raw) in enumerate(parts.metadata):
            if key == b"gguf_sd.config":
                parts.metadata[index] = key, kind, text(change(raw[8:].decode()))

    return changed(model, to, apply)


def with_offset(model: Path, to: Path, index: int, offset: int) -> Path:
    def apply(parts: Parts) -> None:
        name, shape, kind, _ = parts.tensors[index]
        parts.tensors[index] = name, shape, kind, offset

    return changed(model, to, apply)


# --- GGUF ---


@refused
def overlapping_tensors(folder: Path, model: Path) -> list[str]:
    return generate(with_offset(model, folder / "x.gguf", 1, 0))


@refused
def offset_past_2_to_the_64(folder: Path, model: Path) -> list[str]:
    return generate(with_offset(model, folder / "x.gguf", 1, 2**64 - 32))


@refused
def offset_between_alignments(folder: Path, model: Path) -> list[str]:
    return generate(with_offset(model, folder / "x.gguf", 1, 33))


@refused
def alignment_0(folder: Path, model: Path) -> list[str]:
    return generate(with_key(model, folder / "x.gguf", b"general.alignment", 4, struct.pack("<I", 0)))


@refused
def alignment_3(folder: Path, model: Path) -> list[str]:
    return generate(with_key(model, folder / "x.gguf", b"general.alignment", 4, struct.pack("<I", 3)))


@refused
def alignment_2_to_the_31(folder: Path, model: Path) -> list[str]:
    return generate(with_key(model, folder / "x.gguf", b"general.alignment", 4, struct.pack("<I", 2**31)))


@refused
def shape_whose_product_wraps(folder: Path, model: Path) -> list[str]:
    def apply(parts: Parts) -> None:
        name, _, _, offset = parts.tensors[0]
        parts.tensors[0] = name, (2**32, 2**32, 2), 0, offset

    return generate(changed(model, folder / "x.gguf", apply))


@refused
def a_key_twice(folder: Path, model: Path) -> list[str]:
    return generate(with_key(model, folder / "x.gguf", b"gguf_sd.config", 8, text("{}")))


# --- JSON ---


@refused
def an_integer_of_5000_digits(folder: Path, model: Path) -> list[str]:
    return generate(with_config(model, folder / "x.gguf", lambda j: j.replace(": 4", ": " + "4" * 5000, 1)))


@refused
def a_size_of_4000_digits(folder: Path, model: Path) -> list[str]:
    return generate(with_config(model, folder / "x.gguf", lambda j: j.replace(": 4", ": " + "4" * 4000, 1)))


@refused
def not_a_number(folder: Path, model: Path) -> list[str]:
    return generate(with_config(model, folder / "x.gguf", lambda j: j.replace(": 4", ": NaN", 1)))


@refused
def a_hundred_thousand_deep(folder: Path, model: Path) -> list[str]:
    return generate(with_config(model, folder / "x.gguf", lambda j: '{"unet": ' * 100_000))


@refused
def a_deep_list_in_a_deep_list(folder: Path, model: Path) -> list[str]:
    return generate(with_config(model, folder / "x.gguf", lambda j: '{"unet": ' + "[" * 900 + "]" * 900 + "}"))


@refused
def json_key_twice(folder: Path, model: Path) -> list[str]:
    """The last one counts, as in Python, and it is wrong."""
    return generate(with_config(model, folder / "x.gguf", lambda j: j[:-1] + ', "unet": 3}'))


# --- safetensors ---


def safetensors(path: Path, header: dict[str, Any] | str, data: bytes = bytes(64)) -> Path:
    raw = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def row(*offsets: Any, shape: Any = (4,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@refused
def negative_offsets(folder: Path, model: Path) -> list[str]:
    return ["inspect", str(safetensors(folder / "x.safetensors", {"a": row(-16, 0), "b": row(0, 16)}))]


@refused
def overlapping_offsets(folder: Path, model: Path) -> list[str]:
    return ["inspect", str(safetensors(folder / "x.safetensors", {"a": row(0, 16), "b": row(8, 24)}))]


@refused
def offsets_of_4000_digits(folder: Path, model: Path) -> list[str]:
    header = '{"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, ' + "9" * 4000 + "]}}"
    return ["convert", str(safetensors(folder / "x.safetensors", header)), "-o", "y.gguf"]


@refused
def a_header_of_2_to_the_63(folder: Path, model: Path) -> list[str]:
    (folder / "x.safetensors").write_bytes(struct.pack("<Q", 2**63 - 1) + b"{}")
    return ["convert", "x.safetensors", "-o", "y.gguf"]


@refused
def an_index_that_leads_out_of_its_folder(folder: Path, model: Path) -> list[str]:
    (folder / "d" / "unet").mkdir(parents=True)
    (folder / "d" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    save_file({"a": torch.ones(1)}, folder / "outside.safetensors")
    index = {"weight_map": {"a": "../../outside.safetensors"}}
    (folder / "d" / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return ["convert", "d", "-o", "y.gguf"]


# --- .ckpt ---


def archive(path: Path, members: dict[str, bytes], *more: tuple[str, bytes], packed: bool = False) -> Path:
    kind = zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED
    with zipfile.ZipFile(path, "w", kind, compresslevel=1) as file:
        for name, data in (*members.items(), *more):
            file.writestr(name, data)
    return path


STATE = {"state_dict": {"a": torch.ones(4, 4)}}


@refused
def a_zip_bomb(folder: Path, model: Path) -> list[str]:
    members = archive_members(STATE) | {"m/data.pkl": bytes(BOMB)}
    return ["convert", str(archive(folder / "x.ckpt", members, packed=True)), "-o", "y.gguf"]


@refused
def a_bomb_of_weights(folder: Path, model: Path) -> list[str]:
    members = archive_members(STATE)
    name = next(name for name in members if "/data/" in name)
    return ["convert", str(archive(folder / "x.ckpt", members | {name: bytes(BOMB)}, packed=True)), "-o", "y.gguf"]


@pytest.mark.filterwarnings("ignore:Duplicate name")
@refused
def members_twice_and_absolute(folder: Path, model: Path) -> list[str]:
    members = archive_members(STATE)
    more = ("m/data.pkl", pickle.dumps({"b": 1})), ("/etc/cron.d/x", b"* * * * *"), ("../../x", b"x")
    return ["convert", str(archive(folder / "x.ckpt", members, *more)), "-o", "y.gguf"]


@refused
def a_view_larger_than_its_storage(folder: Path, model: Path) -> list[str]:
    members = archive_members({"state_dict": {"a": torch.ones(4, 4)[:2], "b": torch.ones(3)}})
    members["m/data.pkl"] = members["m/data.pkl"].replace(b"K\x04K\x01\x86", b"M\xff\xffK\x01\x86")  # strides
    assert b"M\xff\xffK\x01\x86" in members["m/data.pkl"]
    return ["convert", str(archive(folder / "x.ckpt", members)), "-o", "y.gguf"]


# --- pictures ---


def png(folder: Path, *chunks: bytes) -> Path:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    raw = buffer.getvalue()
    (folder / "x.png").write_bytes(raw[:33] + b"".join(chunks) + raw[33:])
    return folder / "x.png"


@refused
def a_bomb_of_text_in_a_png(folder: Path, model: Path) -> list[str]:
    packed = zlib.compress(b"Steps: 2, " * (BOMB // 10), 1)
    return generate(model, "--from", str(png(folder, chunk(b"zTXt", b"parameters\0\0" + packed))))


@refused
def many_texts_in_a_png(folder: Path, model: Path) -> list[str]:
    packed = zlib.compress(b"x" * 1_000_000, 9)
    texts = [chunk(b"zTXt", f"parameters{i}".encode() + b"\0\0" + packed) for i in range(200)]
    return generate(model, "--from", str(png(folder, *texts)))


@refused
def a_bomb_of_a_colour_profile(folder: Path, model: Path) -> list[str]:
    packed = zlib.compress(bytes(BOMB), 1)
    return generate(model, "--from", str(png(folder, chunk(b"iCCP", b"x\0\0" + packed))))


@fine
def a_hundred_thousand_frames_of_gif(folder: Path, model: Path) -> list[str]:
    buffer = io.BytesIO()
    Image.new("P", (64, 64)).save(buffer, "GIF")
    raw = buffer.getvalue()
    start = raw.index(b",")
    frame = raw[start:-1]
    (folder / "x.gif").write_bytes(raw[:start] + frame * 100_000 + b";")
    return generate(model, "--strength", "1", "--init-image", "x.gif", "-o", "y.png")


@fine
def many_frames_of_webp(folder: Path, model: Path) -> list[str]:
    frames = [Image.new("RGB", (64, 64), (i % 256, i // 256, 0)) for i in range(200)]
    frames[0].save(folder / "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    return generate(model, "--strength", "1", "--init-image", "x.webp", "-o", "y.png")


@refused
def a_tiff_of_strange_tags(folder: Path, model: Path) -> list[str]:
    tags = [(256, 4, 1, 64), (257, 4, 1, 64), (258, 3, 2**31 - 1, 8), (259, 3, 1, 99), (273, 4, 2**30, 8),
            (277, 3, 1, 60000), (278, 4, 1, 64), (279, 4, 1, 2**32 - 1), (33432, 2, 2**31, 8)]  # fmt: skip
    raw = b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    (folder / "x.tif").write_bytes(raw + bytes(4))
    return generate(model, "--init-image", "x.tif", "-o", "y.png")


@refused
def a_tiff_that_points_to_itself(folder: Path, model: Path) -> list[str]:
    entry = struct.pack("<HHHII", 1, 34665, 4, 1, 8)
    (folder / "x.tif").write_bytes(b"II*\0\x08\0\0\0" + entry[:2] + entry[2:] + struct.pack("<I", 8))
    return generate(model, "--init-image", "x.tif", "-o", "y.png")


@fine
def a_tiff_with_long_tags(folder: Path, model: Path) -> list[str]:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    info[270] = "x" * 100_000
    info[33432] = "\x1b[2J"
    Image.new("RGB", (64, 64)).save(folder / "x.tif", tiffinfo=info)
    return generate(model, "--strength", "1", "--init-image", "x.tif", "-o", "y.png")


@fine
def a_picture_on_its_side(folder: Path, model: Path) -> list[str]:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 32)).save(folder / "x.jpg", exif=exif)
    return generate(model, "--strength", "1", "--init-image", "x.jpg", "-o", "y.png")


@fine
def an_orientation_of_999(folder: Path, model: Path) -> list[str]:
    exif = Image.Exif()
    exif[0x0112] = 999
    Image.new("RGB", (64, 64)).save(folder / "x.jpg", exif=exif)
    return generate(model, "--strength", "1", "--init-image", "x.jpg", "-o", "y.png")


# --- names and kinds of files ---


@refused
def an_output_that_is_a_link_to_nowhere(folder: Path, model: Path) -> list[str]:
    (folder / "y.png").symlink_to("/nonexistent/z.png")
    return generate(model, "-o", "y.png")


@refused
def an_output_that_is_a_link_to_the_model(folder: Path, model: Path) -> list[str]:
    (folder / "y.gguf").symlink_to(model)
    return ["convert", str(model), "-o", "y.gguf", "--force"]


@refused
def a_picture_that_is_a_link_to_something_else(folder: Path, model: Path) -> list[str]:
    (folder / "dear.txt").write_text("diary")
    (folder / "y.png").symlink_to("dear.txt")
    return generate(model, "-o", "y.png")


@refused
def a_link_to_itself(folder: Path, model: Path) -> list[str]:
    (folder / "x.gguf").symlink_to("x.gguf")
    return generate(folder / "x.gguf")


@refused
def a_pipe(folder: Path, model: Path) -> list[str]:
    os.mkfifo(folder / "x.gguf")
    return generate(folder / "x.gguf")


@refused
def a_folder_of_that_name(folder: Path, model: Path) -> list[str]:
    (folder / "x.gguf").mkdir()
    return generate(folder / "x.gguf")


@refused
def the_memory_of_the_process(folder: Path, model: Path) -> list[str]:
    return generate(Path("/proc/self/mem"))


@refused
def what_changes_as_it_is_read(folder: Path, model: Path) -> list[str]:
    return ["convert", "/proc/self/smaps", "-o", "y.gguf"]


@refused
def zeros_without_end(folder: Path, model: Path) -> list[str]:
    return generate(model, "--init-image", "/dev/zero", "-o", "y.png")


@refused
def settings_that_are_no_numbers(folder: Path, model: Path) -> list[str]:
    text = b"parameters\0a cat\nSteps: 2, CFG scale: nan"
    return generate(model, "--from", str(png(folder, chunk(b"tEXt", text))))


@fine
def a_name_of_line_breaks_and_escapes(folder: Path, model: Path) -> list[str]:
    name = folder / "a\n\x1b[2J\r b.gguf"
    name.symlink_to(model)
    return generate(name, "-o", "\n\x1b]0;x\x07.png")


@refused
def a_missing_name_of_line_breaks_and_escapes(folder: Path, model: Path) -> list[str]:
    return generate(folder / "a\n\x1b[2J\r b.gguf")


# --- pack, LoRAs, tokenizers, tables ---


@refused
def a_unet_that_is_an_autoencoder(folder: Path, model: Path) -> list[str]:
    save_file({"first_stage_model.encoder.conv_in.weight": torch.ones(4, 3, 3, 3)}, folder / "x.safetensors")
    return ["pack", "x.safetensors", "--vae", "x.safetensors", "--preset", "sd15", "-o", "y.gguf"]


@refused
def a_unet_of_one_tensor(folder: Path, model: Path) -> list[str]:
    name = "model.diffusion_model.input_blocks.0.0.weight"
    save_file({name: torch.ones(320, 4, 3, 3)}, folder / "x.safetensors")
    return ["pack", "x.safetensors", "--clip-l", str(model), "--vae", str(model), "--preset", "sd15", "-o", "y.gguf"]


@refused
def parts_of_sparse_files(folder: Path, model: Path) -> list[str]:
    """A hundred gigabytes, by its size."""
    path = safetensors(folder / "x.safetensors", {"a": row(0, 100 << 30, shape=[25 << 30])}, b"")
    os.truncate(path, path.stat().st_size + (100 << 30))
    return ["pack", str(model), "--vae", "x.safetensors", "-o", "y.gguf"]


@refused
def a_bomb_of_a_tokenizer(folder: Path, model: Path) -> list[str]:
    (folder / "x.txt.gz").write_bytes(gzip.compress(bytes(BOMB), 1))
    return ["pack", str(model), "--tokenizer", "x.txt.gz", "-o", "y.gguf"]


@refused
def a_lora_that_is_the_model(folder: Path, model: Path) -> list[str]:
    return generate(model, "--lora", str(model))


@refused
def a_lora_name_that_leads_elsewhere(folder: Path, model: Path) -> list[str]:
    (folder / "loras").mkdir()
    return ["generate", str(model), *PAINT[2:], "-p", "x <lora:../../../etc/passwd:1>", "--lora-dir", "loras"]


@refused
def a_table_of_a_million_columns(folder: Path, model: Path) -> list[str]:
    (folder / "x.csv").write_text("prompt," * 1_000_000 + "\n")
    return ["batch", "x.csv", "-m", str(model), "-o", "out"]


@refused
def settings_as_text_instead_of_a_file(folder: Path, model: Path) -> list[str]:
    return generate(model, "--from", "x\nSteps: 2, Size: 64x" + "9" * 100_000)


@refused
def settings_of_endless_tables(folder: Path, model: Path) -> list[str]:
    (folder / "x.toml").write_text("[" + "a." * 20_000 + "a]\n")
    return ["bench", "x.toml"]


def case_names(cases: dict[str, Make]) -> list[Any]:
    return [pytest.param(make, id=name) for name, make in cases.items()]


@pytest.mark.parametrize("make", case_names(REFUSED))
def test_one_sentence(make: Make, tmp_path: Path, model: Path) -> None:
    before = model.read_bytes()
    ended = attempt(make(tmp_path, model), tmp_path)
    lines = [line for line in ended.err.split("\n") if line and not line.startswith("WARNING")]
    assert (ended.code, len(lines)) == (2, 1), ended
    assert lines[0].startswith("gguf-sd: "), ended
    assert ended.err.replace("\n", "").isprintable(), ended
    assert len(ended.err) < 2000, ended
    assert not ended.out
    assert not (tmp_path / "y.gguf").is_file() or (tmp_path / "y.gguf").is_symlink()
    assert not list(tmp_path.rglob("*.partial"))
    assert model.read_bytes() == before
    check_cost(ended)


@pytest.mark.parametrize("make", case_names(FINE))
def test_no_harm(make: Make, tmp_path: Path, model: Path) -> None:
    ended = attempt(make(tmp_path, model), tmp_path)
    assert ended.code == 0, ended
    assert ended.err.replace("\n", "").isprintable(), ended
    check_cost(replace(ended, seconds=ended.seconds - 1, megabytes=ended.megabytes - 200))  # it paints, too


def check_cost(ended: Any) -> None:
    assert ended.seconds < 1, ended
    assert ended.megabytes < 300, ended
