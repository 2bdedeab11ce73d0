"""Peers: what is told before any work, stable-diffusion.cpp's program by a stand-in, OpenVINO beside diffusers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gguf_sd.bench import peer_sdcpp, peers
from gguf_sd.bench.contestant import Task
from gguf_sd.cli.main import main
from gguf_sd.demo import model_folder
from gguf_sd.errors import GgufSdError
from gguf_sd.quality import psnr
from gguf_sd_convert.convert import ConvertOptions, convert

SETTINGS = {"steps": 4, "guidance": 0.0, "sampler": "euler_a", "width": 48, "height": 32}
# Its log of a picture, as `sd-cli -v` writes it, between lines that are of no account.
LOG = """[INFO ] model.cpp:1600 - loading tensors completed, taking 1.25s (read: 0.50s, memcpy: 0.00s, convert: 0.10s)
  |==================================================| 4/4 - 1.98s/it
[INFO ] stable-diffusion.cpp:3400 - sampling completed, taking 8.00s
[INFO ] stable-diffusion.cpp:3459 - decode_first_stage completed, taking 0.75s
[INFO ] stable-diffusion.cpp:3700 - generate_image completed in 9.50s
"""


def stand_in(folder: Path, log: str = LOG, code: int = 0) -> Path:
    """A program that notes its arguments, paints a grey picture and writes a log."""
    path = folder / "sd-cli"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, pathlib, sys\n"
        "from PIL import Image\n"
        "at = sys.argv.index\n"
        "with open(pathlib.Path(__file__).with_name('calls'), 'a') as calls:\n"
        "    calls.write(json.dumps(sys.argv[1:]) + '\\n')\n"
        "size = int(sys.argv[at('-W') + 1]), int(sys.argv[at('-H') + 1])\n"
        "Image.new('RGB', size, 'grey').save(sys.argv[at('-o') + 1])\n"
        f"print({log!r})\n"
        f"sys.exit({code})\n"
    )
    path.chmod(0o755)
    return path


def task(program: Path, folder: Path) -> Task:
    pictures = [(3, "a cat", 11, SETTINGS), (5, "a dog", 12, SETTINGS | {"guidance": 7.5})]
    return Task("/m/model.safetensors", "sdcpp", pictures, str(folder), sdcpp=str(program))


def test_sdcpp_gets_each_picture_and_its_log_is_read(tmp_path: Path) -> None:
    result = peer_sdcpp.paint(task(stand_in(tmp_path), tmp_path), tmp_path)
    calls = [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) == 3, "one to warm up"
    words = calls[2]
    told = dict(pairwise(words))
    assert (told["-m"], told["-p"], told["-s"], told["--rng"]) == ("/m/model.safetensors", "a dog", "12", "cpu")
    assert (told["--steps"], told["--sampling-method"], told["-W"], told["-H"]) == ("4", "euler_a", "48", "32")
    assert [dict(pairwise(c))["--cfg-scale"] for c in calls] == ["1.0", "1.0", "7.5"]
    assert Image.open(tmp_path / "00005.png").size == (48, 32)
    assert (result.step_s, result.vae_s, result.picture_s, result.load_s) == ([2.0, 2.0], [0.75] * 2, [9.5] * 2, 1.25)
    assert result.peak_rss > 1e6


def test_sdcpp_that_fails_is_told(tmp_path: Path) -> None:
    with pytest.raises(GgufSdError, match="ended with 3: out of luck"):
        peer_sdcpp.paint(task(stand_in(tmp_path, "out of luck", 3), tmp_path), tmp_path)
    with pytest.raises(GgufSdError, match=r"ended with 1: \[ERROR\] no such tensor"):
        peer_sdcpp.paint(task(stand_in(tmp_path, "[ERROR] no such tensor\n[INFO ] bye", 1), tmp_path), tmp_path)
    with pytest.raises(GgufSdError, match="log has no line like"):
        peer_sdcpp.paint(task(stand_in(tmp_path, "all went well"), tmp_path), tmp_path)


def test_what_cannot_take_part_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf, linear, folder = tmp_path / "a.gguf", tmp_path / "linear.gguf", tmp_path / "folder"
    for path, layout in ((gguf, "native"), (linear, "linear")):
        convert(model_folder(), path, ConvertOptions(type="q4_0", layout=layout))
    folder.mkdir()
    program = str(stand_in(tmp_path))
    peers.check_peers(["diffusers", "sdcpp"], [gguf, folder], "cpu", program)
    peers.check_peers(["sdcpp"], [linear], "cpu", program)
    for names, models, device, sdcpp, complaint in (
        (["comfy"], [folder], "cpu", "", "no peer 'comfy'; choose from diffusers, openvino, sdcpp"),
        (["diffusers"], [gguf], "cpu", "", "diffusers reads diffusers folders"),
        (["sdcpp"], [gguf], "cpu", program, "sdcpp reads checkpoints, diffusers folders and .gguf files in the linear"),
        (["sdcpp"], [folder], "cpu", "", "give its path by --sdcpp or in GGUF_SD_SDCPP"),
        (["sdcpp"], [folder], "cpu", str(gguf), "a.gguf is no program"),
    ):
        with pytest.raises(GgufSdError, match=complaint):
            peers.check_peers(names, models, device, sdcpp)
    monkeypatch.setattr(peers, "find_spec", lambda name: None if name == "openvino" else object())
    with pytest.raises(GgufSdError, match=r"openvino needs openvino: pip install \"gguf-sd\[bench\]\""):
        peers.check_peers(["openvino"], [folder], "cpu", "")
    monkeypatch.setattr(peers, "find_spec", lambda name: object())
    with pytest.raises(GgufSdError, match="openvino runs on cpu here, not on cuda"):
        peers.check_peers(["openvino"], [folder], "cuda", "")
    with pytest.raises(GgufSdError, match="sdcpp has no sampler 'pndm'; choose one by --sampler: euler"):
        peers.check_samplers(["sdcpp"], ["pndm"])


@pytest.mark.slow
def test_openvino_paints_what_diffusers_paints(tiny_pipeline: Callable[..., Path], tmp_path: Path, capsys: Any) -> None:
    pytest.importorskip("openvino")
    folder, out = tiny_pipeline(unet={"sample_size": 8}), tmp_path / "report"
    command = ["bench", str(folder), "--types", "f16", "--count", "2", "--rounds", "2", "--preset", "quick"]
    command += ["--dtype", "float32", "--device", "cpu", "--peers", "diffusers,openvino", "-o", str(out), "--json"]
    assert main([*command, "--quiet"]) == 0
    rows = {row["program"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert rows["openvino"]["values"]["psnr"] > 40, "the same model in another program"
    assert rows["openvino"]["values"]["step_s"] > 0
    for path in sorted(out.glob("runs/*openvino-*/*.png")):
        other = path.parent.with_name(path.parent.name.replace("openvino", "diffusers")) / path.name
        assert psnr(np.array(Image.open(path)), np.array(Image.open(other))) > 40
    assert len(list(out.glob("runs/openvino-*"))) == 1, "converted once for all rounds"
