"""What counts as a name of the Hub, and which of a repository's files are taken."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gguf_sd.checkpoint.hub_files import wanted_files
from gguf_sd.checkpoint.hub_names import HubName, cached_repo, hub_name, plain_name
from gguf_sd.errors import GgufSdError


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("org/repo", HubName("org/repo")),
        ("org/repo/q4/sd15.gguf", HubName("org/repo", "q4/sd15.gguf")),
        ("org/repo-1.5-gguf", HubName("org/repo-1.5-gguf")),
        ("https://huggingface.co/org/repo", HubName("org/repo")),
        ("https:/huggingface.co/org/repo/", HubName("org/repo")),  # as a Path has it
        ("https://huggingface.co/org/repo/blob/main/sd%2015.gguf", HubName("org/repo", "sd 15.gguf", "main")),
        ("https://hf.co/org/repo/resolve/v1/a/b.gguf?download=true", HubName("org/repo", "a/b.gguf", "v1")),
        ("https://huggingface.co/org/repo/tree/refs/pr/1/unet", HubName("org/repo", "unet", "refs/pr/1")),
        ("models/sd15.gguf", None),
        ("sd15.gguf", None),
        ("/org/repo", None),
        ("./org/repo", None),
        ("../org/repo", None),
        ("org/../repo", None),
        ("org/repo/../../x.gguf", None),
        ("C:\\org\\repo", None),
        ("org//repo", None),
        ("folder/repo/x.gguf", None),  # of a folder that is there
        ("a" * 200 + "/b", None),
        ("a" * 900, None),
    ],
)
def test_names(text: str, name: HubName | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    assert hub_name(text) == name


def test_what_is_there_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub_name("org/repo") is not None
    (tmp_path / "org" / "repo").mkdir(parents=True)
    assert hub_name("org/repo") is None


@pytest.mark.parametrize(
    "link",
    ["https://example.com/a.gguf", "https://huggingface.co/org", "https://huggingface.co/datasets/org/../../x",
     "http://huggingface.co.evil.org/org/repo", "https://[", "https://[::1/org/repo"],
)  # fmt: skip
def test_links_that_lead_to_no_model(link: str) -> None:
    with pytest.raises(GgufSdError, match="is no link"):
        hub_name(link)


def test_names_in_the_cache(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--some-sd-1.5" / "snapshots" / "0123"
    assert plain_name(snapshot) == "some-sd-1.5"
    assert plain_name(snapshot / "a.gguf") == "a.gguf"
    assert cached_repo(snapshot / "unet" / "a.gguf") == "org/some-sd-1.5"
    assert cached_repo(tmp_path / "a.gguf") is None


PIPELINE = ["model_index.json", "README.md", "v1-5-pruned.safetensors", "unet/config.json", "scheduler/x_config.json",
            "unet/diffusion_pytorch_model.bin", "unet/diffusion_pytorch_model.safetensors",
            "unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.non_ema.safetensors",
            "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
            "text_encoder/model.safetensors.index.json", "text_encoder/model-00001-of-00002.safetensors",
            "text_encoder/model-00002-of-00002.safetensors", "text_encoder/pytorch_model.bin",
            "tokenizer/vocab.json", "tokenizer/merges.txt", "image_encoder/model.safetensors"]  # fmt: skip


@pytest.mark.parametrize(
    ("files", "wanted", "model"),
    [
        (["a.gguf", "README.md", "b.safetensors", "c.ckpt"], {"a.gguf"}, "a.gguf"),
        (["q4/a.gguf", "README.md"], {"q4/a.gguf"}, "q4/a.gguf"),
        (["a.ckpt", "a.safetensors", "unet/x.safetensors"], {"a.safetensors"}, "a.safetensors"),
        (["config.json", "diffusion_pytorch_model.bin", "diffusion_pytorch_model.safetensors",
          "diffusion_pytorch_model.fp16.safetensors"],
         {"config.json", "diffusion_pytorch_model.fp16.safetensors"}, None),
        (PIPELINE,
         {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/config.json",
          "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json", "scheduler/x_config.json",
          "text_encoder/model.safetensors.index.json", "text_encoder/model-00001-of-00002.safetensors",
          "text_encoder/model-00002-of-00002.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"}, None),
    ],
)  # fmt: skip
def test_files(files: list[str], wanted: set[str], model: str | None) -> None:
    got, own = wanted_files(files, "org/repo")
    assert (set(got), own) == (wanted, model)
    assert len(got) == len(wanted)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["a.gguf", "b.gguf"], "org/repo holds several models, a.gguf, b.gguf; name one of them: org/repo/a.gguf"),
        (["README.md"], "holds no model that gguf-sd reads .*; it holds README.md"),
        ([], "it is empty"),
        (["model_index.json", "unet/diffusion_pytorch_model.bin"], "org/repo/unet holds no .safetensors weights"),
    ],
)
def test_no_clear_choice(files: list[str], message: str) -> None:
    with pytest.raises(GgufSdError, match=message):
        wanted_files(files, "org/repo")


@pytest.mark.parametrize("revision", ["../../x", "a b", "-x", "\x1b[2J"])
def test_no_revisions(revision: str) -> None:
    from gguf_sd.checkpoint.hub import fetched

    with pytest.raises(GgufSdError, match="is no revision"):
        fetched("org/repo", revision)


def test_revisions_are_for_the_hub(tmp_path: Path, capsys: Any) -> None:
    from gguf_sd.cli.main import main

    for command in (["generate", "x.gguf"], ["convert", "x.safetensors", "-o", str(tmp_path / "x.gguf")]):
        assert main([*command, "--revision", "v1"]) == 2
        assert "--revision is for a model of the Hugging Face Hub" in capsys.readouterr().err
