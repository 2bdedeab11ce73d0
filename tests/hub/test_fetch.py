"""Models fetched from a server that speaks the Hub's API, in fresh processes that know it by HF_ENDPOINT."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gguf_sd.checkpoint.gguf_file import GGUFFile
from tests.hub.hub_server import COMMIT, Hub, serving

FETCH = """
import json, sys
from gguf_sd.checkpoint.hub import fetched
from gguf_sd.errors import GgufSdError
for name, revision in json.loads(sys.argv[1]):
    try:
        print(fetched(name, revision))
    except GgufSdError as error:
        print(f"refused: {error}")
"""


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serving(Hub()) as hub:
        yield hub


def environment(hub: Hub, home: Path, **more: str) -> dict[str, str]:
    own = {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(home / "hf"),
        "GGUF_SD_CACHE": str(home / "cache"),
        "GGUF_SD_NATIVE": "0",
    }
    own |= {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    own |= {"HF_HUB_DISABLE_XET": "1"}  # a protocol of its own, between the client's library and the Hub's storage
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_CACHE")}
    return kept | own | more


def fetch(hub: Hub, home: Path, *names: str | tuple[str, str], **more: str) -> list[str]:
    """What each of the names comes to, one after another in one process."""
    asked = json.dumps([name if isinstance(name, tuple) else (name, None) for name in names])
    done = subprocess.run(
        [sys.executable, "-c", FETCH, asked], env=environment(hub, home, **more), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def run(hub: Hub, home: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gguf_sd", *arguments]
    return subprocess.run(command, env=environment(hub, home, **more), capture_output=True, text=True, cwd=home)


def folder_files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_fetched_and_what_is_refused(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {
        "org/one": {"main": {"a.gguf": b"GGUF main", "README.md": b"hi"}, "v1": {"a.gguf": b"GGUF v1"}},
        "org/two": {"main": {"q4.gguf": b"4", "q8.gguf": b"8"}},
        "org/control": {"main": {"config.json": b"{}", "diffusion_pytorch_model.safetensors": b"x", "x.bin": b"x"}},
        "org/closed": {"main": {"a.gguf": b"x"}},
        "org/nested": {"main": {"unet/a.gguf": b"x", "docs/b.txt": b"x"}},
    }
    hub.gated = {"org/closed"}
    (tmp_path / "local.gguf").write_bytes(b"x")
    link = f"{hub.address}/org/one/blob/v1/a.gguf"
    got = fetch(
        hub, tmp_path, "org/one", ("org/one", "v1"), link, "org/two/q8.gguf", "org/two", "org/control",
        "org/nested/unet", "org/nested/nothing", "org/one/b.gguf", ("org/one", "v2"), "org/none", "org/closed/a.gguf",
        (link, "main"), str(tmp_path / "local.gguf"),
    )  # fmt: skip
    snapshots = tmp_path / "hf" / "hub"
    assert [Path(path).read_bytes() for path in got[:4]] == [b"GGUF main", b"GGUF v1", b"GGUF v1", b"8"]
    assert Path(got[0]) == snapshots / "models--org--one" / "snapshots" / COMMIT / "a.gguf"
    assert got[4] == "refused: org/two holds several models, q4.gguf, q8.gguf; name one of them: org/two/q4.gguf"
    assert sorted(folder_files(Path(got[5]))) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert Path(got[6]).name == "a.gguf"
    refused = [
        "org/nested holds no nothing; it holds docs/b.txt, unet/a.gguf",
        "org/one holds no b.gguf; it holds README.md, a.gguf",
        "org/one has no revision v2; give a branch, tag or commit",
        "there is no org/none here, and no such model on the Hub; check the name or, for a private one, log in with",
        "org/closed is gated: accept its terms on https://huggingface.co/org/closed and log in with `hf auth login`",
        "the link names the revision v1, --revision main; leave one out",
    ]
    for line, expected in zip(got[7:13], refused, strict=True):
        assert line.startswith(f"refused: {expected}")
    assert got[13] == str(tmp_path / "local.gguf")


def test_offline_and_out_of_reach(hub: Hub, tmp_path: Path) -> None:
    hub.repos = {"org/one": {"main": {"a.gguf": b"GGUF", "README.md": b"hi"}}}
    (online,) = fetch(hub, tmp_path, "org/one")
    before = len(hub.requests)
    names = ("org/one", "org/one/a.gguf", "org/one/b.gguf", "org/none")
    offline = fetch(hub, tmp_path, *names, HF_HUB_OFFLINE="1")
    assert len(hub.requests) == before, "nobody was asked"
    assert offline[:2] == [online, online]
    for line, name in zip(offline[2:], names[2:], strict=True):
        assert line == f"refused: {name} is neither here nor in the Hub's cache, and HF_HUB_OFFLINE is set"
    hub.address = "http://127.0.0.1:9"
    gone = fetch(hub, tmp_path, *names)
    assert gone[:2] == [online, online]
    for line in gone[2:]:
        assert line.endswith("neither here nor in the Hub's cache, and http://127.0.0.1:9 cannot be reached")


def test_a_download_that_was_cut_short_goes_on(hub: Hub, tmp_path: Path) -> None:
    data, cut = bytes(range(256)) * 100_000, 22_000_000  # the client writes pieces of 10 MB
    hub.repos, hub.cut = {"org/one": {"main": {"a.gguf": data}}}, cut
    lines = fetch(hub, tmp_path, "org/one/a.gguf", "org/one/a.gguf")
    assert Path(lines[-1]).read_bytes() == data
    assert hub.ranges, "the rest alone is asked for"
    assert 0 < hub.ranges[0] <= cut


@pytest.mark.parametrize("twice", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_painting_from_the_hub(hub: Hub, tiny_pipeline: Callable[..., Path], tmp_path: Path, twice: bool) -> None:
    """A diffusers repository: fetched, converted into the cache and painted with, then again without a network."""
    files = folder_files(tiny_pipeline())
    files |= {"unet/diffusion_pytorch_model.bin": b"x" * 1000, "safety_checker/pytorch_model.bin": b""}
    del files["safety_checker/pytorch_model.bin"]
    hub.repos = {"org/tiny-sd": {"main": files}}
    paint = ["generate", "org/tiny-sd", "-p", "a cat", "--steps", "1", "--width", "32", "--height", "32", "--seed", "3"]
    paint += ["--device", "cpu", "--dtype", "float32", "--quiet"]
    wrong = run(hub, tmp_path, *paint, "--sampler", "nope", "-o", "a.png")
    assert (wrong.returncode, hub.requests) == (2, []), "settings are looked at before anything is fetched"
    done = run(hub, tmp_path, *paint, "-o", "a.png")
    assert done.returncode == 0, done.stderr
    assert hub.gets("model.bin") == 0
    assert hub.gets("unet/diffusion_pytorch_model.safetensors") == 1
    if twice:
        again = run(hub, tmp_path, *paint, "-o", "b.png", HF_HUB_OFFLINE="1")
        assert again.returncode == 0, again.stderr
        assert Image.open(tmp_path / "a.png").tobytes() == Image.open(tmp_path / "b.png").tobytes()
    (converted,) = (tmp_path / "cache").glob("*.gguf")
    assert converted.name.startswith("tiny-sd-")
    said: dict[str, Any] = GGUFFile(converted).metadata
    assert said["general.name"] == said["gguf_sd.source.name"] == "tiny-sd"
    assert said["general.base_model.0.repo_url"] == "https://huggingface.co/org/tiny-sd"
