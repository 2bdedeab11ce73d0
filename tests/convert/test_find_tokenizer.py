"""Tokenizers: the same ids as transformers', from whatever they are read, and found in the right order."""

from __future__ import annotations

import gzip
import json
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tokenizers

from gguf_sd.checkpoint import hub
from gguf_sd.config import TextConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.prompt import find_tokenizer as module
from gguf_sd.prompt.find_tokenizer import find_tokenizer, read_tokenizer
from gguf_sd_convert.convert import ConvertOptions, convert

Make = Callable[..., Any]
MERGES = Path(__file__).parents[3] / "shared" / "data" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
needs_merges = pytest.mark.skipif(not MERGES.is_file(), reason="CLIP's vocabulary is not at hand")
TEXTS = [
    "a photograph of an astronaut riding a horse",
    "A  Photo\tof\nTWO Cats!!!   (masterpiece:1.2), 8k -- it's they'll 'quoted' don't",
    "l'été à Zürich, naïve façade; cafe\u0301 e\u0301",
    "日本の猫 😀👩‍👩‍👧 中文 العربية עברית \u200b zero\u00a0width",
    "2023年12月 3.14159 $99.99 50% #tag @user https://example.org/x?y=1&z=2",
    "",
    " ",
    "ẞ İstanbul ﬁne Ⅷ ½ x²",
    "<|startoftext|> inside <|endoftext|> and <|endoftext|>",
    "pneumonoultramicroscopicsilicovolcanoconiosis " * 3,
    "\u0000\u0001 control \u007f",
]


def transformers_tokenizer(folder: Path, merges: list[str] | None = None) -> Any:
    from transformers import CLIPTokenizerFast

    return CLIPTokenizerFast.from_pretrained(folder)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vocab.json and merges.txt of CLIP, made as OpenAI's simple_tokenizer.py describes it."""
    folder = tmp_path_factory.mktemp("clip")
    lines = gzip.decompress(MERGES.read_bytes()).decode().split("\n")[1 : 49152 - 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    symbols, extra = [chr(b) for b in printable], 0
    for b in range(256):
        if b not in printable:
            symbols.append(chr(256 + extra))
            extra += 1
    vocabulary = symbols + [s + "</w>" for s in symbols] + ["".join(line.split()) for line in lines]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(lines) + "\n")
    return folder


@needs_merges
def test_same_ids_as_transformers(clip_folder: Path, tmp_path: Path) -> None:
    theirs = transformers_tokenizer(clip_folder)
    theirs.save_pretrained(tmp_path / "saved")
    for path in (MERGES, clip_folder, tmp_path / "saved"):
        found = read_tokenizer(path, 49408)
        assert (found.size, found.bos_token_id, found.eos_token_id, found.pad_token_id) == (49408, 49406, 49407, 49407)
        ours = tokenizers.Tokenizer.from_str(found.json)
        for text in TEXTS:
            assert ours.encode(text).ids == theirs(text).input_ids, (path.name, text)
            plain = ours.encode(text, add_special_tokens=False).ids
            assert plain == theirs(text, add_special_tokens=False).input_ids
    assert ours.encode(TEXTS[0]).ids == [49406, 320, 8853, 539, 550, 18376, 6765, 320, 4558, 49407]  # CLIP's own


@needs_merges
def test_plain_text_merges(tmp_path: Path) -> None:
    (tmp_path / "bpe.txt").write_bytes(gzip.decompress(MERGES.read_bytes()))
    assert read_tokenizer(tmp_path / "bpe.txt", 49408).json == read_tokenizer(MERGES, 49408).json


def test_neither_truncates_nor_pads(tiny_pipeline: Make, tmp_path: Path) -> None:
    folder = tiny_pipeline() / "tokenizer"
    state = json.loads((folder / "tokenizer.json").read_text())
    whole = tokenizers.Tokenizer.from_str(json.dumps(state))
    whole.enable_truncation(5)
    whole.enable_padding(length=9, pad_id=3)
    whole.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text((folder / "tokenizer_config.json").read_text())
    ours = tokenizers.Tokenizer.from_str(read_tokenizer(tmp_path, 520).json)
    assert len(ours.encode("abcdefghijkl", add_special_tokens=False).ids) == 12
    assert len(ours.encode("a", add_special_tokens=False).ids) == 1


def test_tiny_tokenizer_in_the_file(tiny_pipeline: Make, converted: Make) -> None:
    folder = tiny_pipeline()
    metadata = converted(folder).metadata
    ours = tokenizers.Tokenizer.from_str(metadata["tokenizer.huggingface.json"])
    theirs = transformers_tokenizer(folder / "tokenizer")
    for text in ("Cat red dog", "été 😀 !", *TEXTS):
        assert ours.encode(text).ids == theirs(text).input_ids
    text_config = json.loads(metadata["gguf_sd.config"])["text"][0]
    assert text_config["bos_token_id"] == theirs.bos_token_id
    assert text_config["eos_token_id"] == theirs.eos_token_id
    assert text_config["pad_token_id"] == theirs.pad_token_id


def test_special_tokens_by_name(tiny_pipeline: Make, tmp_path: Path) -> None:
    """As strings or objects; the padding token may be any."""
    folder = tiny_pipeline() / "tokenizer"
    state = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "!"}}))
    found = read_tokenizer(tmp_path, 520)
    assert found.pad_token_id == state["model"]["vocab"]["!"]
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<start>"}))
    with pytest.raises(GgufSdError, match="<start>"):
        read_tokenizer(tmp_path, 520)


@pytest.fixture
def nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither open_clip nor a network."""
    monkeypatch.setattr(module, "_open_clip_vocabulary", lambda: None)
    monkeypatch.setattr(module, "_from_hub", lambda: None)


@pytest.mark.usefixtures("nowhere")
def test_none_to_be_found(single_file: Make, tmp_path: Path) -> None:
    original = single_file()
    path = original.save(tmp_path / "m.safetensors")
    with pytest.raises(GgufSdError, match=r"--tokenizer.*diffusers folder.*open-clip-torch.*online"):
        convert(path, tmp_path / "x.gguf", ConvertOptions(config=original.options["config"]))
    assert not (tmp_path / "x.gguf").exists()


@needs_merges
def test_open_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its vocabulary is found without importing it."""
    package = tmp_path / "open_clip"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "bpe_simple_vocab_16e6.txt.gz").write_bytes(MERGES.read_bytes())
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(module, "_from_hub", lambda: pytest.fail("asked the Hub"))
    assert find_tokenizer(None, None, TextConfig()).origin == str(package / "bpe_simple_vocab_16e6.txt.gz")


def test_hub_is_the_last_resort(tiny_pipeline: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def download(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(tiny_pipeline() / "tokenizer" / "tokenizer.json")

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *file: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    monkeypatch.setattr("gguf_sd.checkpoint.hub.hub_answers", lambda: True)
    monkeypatch.setattr(module, "_open_clip_vocabulary", lambda: None)
    assert find_tokenizer(None, None, TextConfig(vocab_size=520)).size == 520
    assert asked == [("openai/clip-vit-large-patch14", "tokenizer.json")]

    def offline(repository: str, name: str) -> str:
        raise OSError("offline")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    with pytest.raises(GgufSdError, match="no tokenizer was found"):
        find_tokenizer(None, None, TextConfig(vocab_size=520))


def test_what_the_user_names_comes_first(tiny_pipeline: Make, tmp_path: Path) -> None:
    folder = tiny_pipeline() / "tokenizer"
    (tmp_path / "mine").mkdir()
    for path in folder.iterdir():
        (tmp_path / "mine" / path.name).write_bytes(path.read_bytes())
    text = TextConfig(vocab_size=520)
    assert find_tokenizer(tmp_path / "mine", folder, text).origin == str(tmp_path / "mine")
    assert find_tokenizer(None, folder, text).origin == str(folder)


def test_bad_tokenizers(tiny_pipeline: Make, tmp_path: Path) -> None:
    text = TextConfig(vocab_size=520)
    (tmp_path / "empty").mkdir()
    (tmp_path / "words.txt").write_text("#version: 0.2\none two three\n")
    (tmp_path / "few.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "bad.json").write_text('{"model": 7}')
    (tmp_path / "bytes.gz").write_bytes(b"\x1f\x8b garbage")
    for name, match in [
        ("none", "does not exist"),
        ("empty", "cannot read the tokenizer"),
        ("words.txt", "two symbols"),
        ("few.txt", "holds 1 merges, a vocabulary of 520 tokens takes 6"),
        ("bad.json", "not of CLIP's kind"),
        ("bytes.gz", "cannot read the tokenizer"),
    ]:
        with pytest.raises(GgufSdError, match=match):
            find_tokenizer(tmp_path / name, None, text)
    with pytest.raises(GgufSdError, match="has 520 tokens, the text encoder 400"):
        find_tokenizer(None, tiny_pipeline() / "tokenizer", TextConfig(vocab_size=400))


@pytest.mark.parametrize("online", [True, False])
def test_the_hub_is_asked_where_it_answers(online: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline, its client would retry for long."""
    asked: list[tuple[str, int]] = []

    def connect(address: tuple[str, int], timeout: float) -> Any:
        asked.append(address)
        if not online:
            raise socket.gaierror("no such host")
        return SimpleNamespace(close=lambda: None)

    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr(hub.socket, "create_connection", connect)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *file: None)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *file: str(tmp_path / file[1]))
    assert module._from_hub() == (tmp_path / "tokenizer.json" if online else None)
    assert asked == [("huggingface.co", 443)]


def test_an_earlier_download_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *file: str(tmp_path / file[1]))
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *file: pytest.fail("asked the Hub"))
    assert module._from_hub() == tmp_path / "tokenizer.json"
