"""Finding the CLIP tokenizer that goes into the file, and building it.

CLIP's byte-pair encoding: https://github.com/openai/CLIP, ``clip/simple_tokenizer.py``.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import socket
import urllib.parse
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gguf_sd.config import TextConfig
from gguf_sd.errors import GgufSdError

START, END = "<|startoftext|>", "<|endoftext|>"
OPEN_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
HUB_REPOSITORY = "openai/clip-vit-large-patch14"
HUB_SECONDS = 5  # to take a connection
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
WAYS = (
    "give --tokenizer with a diffusers tokenizer folder, a tokenizer.json or CLIP's bpe_simple_vocab_16e6.txt.gz; "
    "or convert a diffusers folder that has a tokenizer; or pip install open-clip-torch; "
    f"or go online, so that {HUB_REPOSITORY} can be asked"
)


@dataclass(frozen=True)
class ClipTokenizer:
    """``json`` is ``tokenizers.Tokenizer.to_str()``, neither truncating nor padding; ``origin`` where it was found."""

    json: str
    origin: str
    size: int
    bos_token_id: int
    eos_token_id: int
    pad_token_id: int


def find_tokenizer(chosen: Path | None, folder: Path | None, text: TextConfig) -> ClipTokenizer:
    """The tokenizer for a text encoder of ``text.vocab_size`` tokens.

    ``chosen`` is what the user named, ``folder`` the tokenizer of the diffusers source. Without either,
    open-clip-torch's vocabulary is taken, then the Hub's. Raises GgufSdError where none is found or it does not fit.
    """
    if chosen is not None:
        if not chosen.exists():
            raise GgufSdError(f"--tokenizer {chosen} does not exist")
        found = read_tokenizer(chosen, text.vocab_size)
    elif folder is not None:
        found = read_tokenizer(folder, text.vocab_size)
    elif (path := _open_clip_vocabulary()) is not None or (path := _from_hub()) is not None:
        found = read_tokenizer(path, text.vocab_size)
    else:
        raise GgufSdError(f"no tokenizer was found; {WAYS}")
    if found.size > text.vocab_size:
        raise GgufSdError(
            f"the tokenizer {found.origin} has {found.size} tokens, the text encoder {text.vocab_size}; {WAYS}"
        )
    return found


def read_tokenizer(path: Path, vocab_size: int) -> ClipTokenizer:
    """Reads a folder that transformers saved, a tokenizer.json, or a BPE merges file (plain or gzipped), from which
    the first ``vocab_size - 514`` merges are taken. Raises GgufSdError."""
    try:
        if not path.is_dir():
            return _read_file(path, vocab_size)
        settings = _special_tokens(path)
        if (path / "tokenizer.json").is_file():
            return _describe(Tokenizer.from_file(str(path / "tokenizer.json")), str(path), settings)
        vocabulary = json.loads((path / "vocab.json").read_text(encoding="utf-8"))
        merges = _merges((path / "merges.txt").read_text(encoding="utf-8"))
        return _describe(build(vocabulary, merges, settings["bos_token"], settings["eos_token"]), str(path), settings)
    except GgufSdError:
        raise
    except Exception as error:  # the tokenizers library raises bare Exceptions
        raise GgufSdError(f"cannot read the tokenizer {path}: {error}") from error


def _read_file(path: Path, vocab_size: int) -> ClipTokenizer:
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        data = gzip.decompress(data)
    text, settings = data.decode("utf-8"), {"bos_token": START, "eos_token": END, "pad_token": END}
    if text.lstrip().startswith("{"):
        return _describe(Tokenizer.from_str(text), str(path), settings)
    merges = _merges(text)
    wanted = vocab_size - 514
    if not 0 <= wanted <= len(merges):
        raise GgufSdError(f"{path} holds {len(merges)} merges, a vocabulary of {vocab_size} tokens takes {wanted}")
    merges = merges[:wanted]
    # OpenAI's order: printable bytes first, then the others, both again as the end of a word, then the merges.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    return _describe(build({token: i for i, token in enumerate(tokens)}, merges, START, END), str(path), settings)


def _merges(text: str) -> list[tuple[str, str]]:
    lines = [line.split() for line in text.splitlines() if "#version" not in line]
    pairs = [(line[0], line[1]) for line in lines if len(line) == 2]
    if len(pairs) != sum(map(bool, lines)):
        raise GgufSdError("its merges are no lines of two symbols")
    return pairs


def _special_tokens(folder: Path) -> dict[str, str]:
    tokens = {"bos_token": START, "eos_token": END}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path := folder / name).is_file():
            values = json.loads(path.read_text(encoding="utf-8"))
            for key in ("bos_token", "eos_token", "pad_token"):
                if (value := values.get(key)) is not None:
                    tokens[key] = str(value["content"] if isinstance(value, dict) else value)
    return {"pad_token": tokens["eos_token"]} | tokens


def build(vocabulary: dict[str, int], merges: list[tuple[str, str]], start: str, end: str) -> Tokenizer:
    """CLIP's tokenizer over a vocabulary and its merges: NFC, lower case, single spaces, words, bytes, BPE."""
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=end)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([start, end])
    tokenizer.post_processor = processors.RobertaProcessing(
        (end, _id(tokenizer, end)), (start, _id(tokenizer, start)), trim_offsets=False, add_prefix_space=False
    )
    return tokenizer


def _describe(tokenizer: Tokenizer, origin: str, settings: dict[str, str]) -> ClipTokenizer:
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = {key: _id(tokenizer, token) for key, token in settings.items()}
    return ClipTokenizer(
        tokenizer.to_str(),
        origin,
        tokenizer.get_vocab_size(),
        ids["bos_token"],
        ids["eos_token"],
        ids["pad_token"],
    )


def _id(tokenizer: Tokenizer, token: str) -> int:
    if (number := tokenizer.token_to_id(token)) is None:
        raise GgufSdError(f"a tokenizer without its token {token!r} is no CLIP tokenizer")
    return number


def _open_clip_vocabulary() -> Path | None:
    """The vocabulary file of an installed open-clip-torch, found without importing it."""
    try:
        spec = importlib.util.find_spec("open_clip")
    except (ImportError, ValueError):
        return None
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (path := Path(place) / OPEN_CLIP_FILE).is_file():
            return path
    return None


def _from_hub() -> Path | None:
    """The Hub's tokenizer, or the copy that an earlier download left."""
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache

        cached = try_to_load_from_cache(HUB_REPOSITORY, "tokenizer.json")
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(HUB_REPOSITORY, "tokenizer.json")) if _hub_answers() else None
    except Exception:  # offline, a proxy, no such file: for the caller all the same, and one error names the ways out
        return None


def _hub_answers() -> bool:
    """Whether the Hub takes connections: its client retries for long where it does not. Behind a proxy only
    trying tells."""
    from huggingface_hub.constants import ENDPOINT

    address = urllib.parse.urlsplit(ENDPOINT)
    if address.scheme in urllib.request.getproxies() or address.hostname is None:
        return True
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout=HUB_SECONDS).close()
    except OSError:
        return False
    return True
