"""Finding the CLIP tokenizer that goes into the file, and reading it, from whatever it is kept in."""

from __future__ import annotations

import gzip
import importlib.util
import io
import zlib
from dataclasses import dataclass
from pathlib import Path

from gguf_sd.config import TextConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.input_files import open_input
from gguf_sd.json_text import MAX_TABLE, read_json_object
from gguf_sd.prompt.clip_bpe import END, START, ClipBPE, Merges, build, checked, read_clip_bpe, token_id

OPEN_CLIP_FILE = "bpe_simple_vocab_16e6.txt.gz"
HUB_REPOSITORY = "openai/clip-vit-large-patch14"
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
        settings, what = _special_tokens(path), f"the tokenizer {path}"
        if (path / "tokenizer.json").is_file():
            return _describe(read_clip_bpe(_text(path / "tokenizer.json"), what), path, settings)
        vocabulary = read_json_object(path / "vocab.json", MAX_TABLE)
        bpe = checked(vocabulary, _merges(_text(path / "merges.txt"), what), what)
        return _describe(bpe, path, settings)
    except OSError as error:
        raise GgufSdError(f"cannot read the tokenizer {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zlib.error) as error:  # no UTF-8, or no whole gzip
        raise GgufSdError(f"cannot read the tokenizer {path}: {error}") from error


def tokenizer_in_file(text: str, path: Path, encoder: TextConfig) -> ClipTokenizer:
    """The tokenizer that a GGUF file carries as ``text``, with the token ids of its text encoder; raises
    GgufSdError."""
    what = f"the tokenizer in {path}"
    bpe = read_clip_bpe(text, what)
    ids = encoder.bos_token_id, encoder.eos_token_id, encoder.pad_token_id
    if bpe.size > encoder.vocab_size:
        raise GgufSdError(f"{what} has {bpe.size} tokens, the text encoder {encoder.vocab_size}")
    return ClipTokenizer(build(bpe, START, END, what).to_str(), f"of {path}", bpe.size, *ids)


def _text(path: Path) -> str:
    """A file's text, packed by gzip or not. Raises GgufSdError for more than a vocabulary has."""
    with open_input(path) as file:
        data = file.read(MAX_TABLE + 1)
    if data[:2] == b"\x1f\x8b":
        with gzip.open(io.BytesIO(data)) as packed:
            data = packed.read(MAX_TABLE + 1)
    if len(data) > MAX_TABLE:
        raise GgufSdError(f"{path} has more than {MAX_TABLE:,} bytes, too many for a tokenizer")
    return data.decode("utf-8")


def _read_file(path: Path, vocab_size: int) -> ClipTokenizer:
    text, what = _text(path), f"the tokenizer {path}"
    settings = {"bos_token": START, "eos_token": END, "pad_token": END}
    if text.lstrip().startswith("{"):
        return _describe(read_clip_bpe(text, what), path, settings)
    merges = _merges(text, what)
    wanted = vocab_size - 514
    if not 0 <= wanted <= len(merges):
        raise GgufSdError(f"{path} holds {len(merges)} merges, a vocabulary of {vocab_size} tokens takes {wanted}")
    merges = merges[:wanted]
    # OpenAI's order: printable bytes first, then the others, both again as the end of a word, then the merges.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    symbols = [chr(b) for b in printable] + [chr(256 + i) for i in range(256 - len(printable))]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    return _describe(checked({token: i for i, token in enumerate(tokens)}, merges, what), path, settings)


def _merges(text: str, what: str) -> Merges:
    lines = [line.split() for line in text.splitlines() if "#version" not in line]
    pairs = [(line[0], line[1]) for line in lines if len(line) == 2]
    if len(pairs) != sum(map(bool, lines)):
        raise GgufSdError(f"{what}: its merges are no lines of two symbols")
    return pairs


def _special_tokens(folder: Path) -> dict[str, str]:
    tokens = {"bos_token": START, "eos_token": END}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (path := folder / name).is_file():
            values = read_json_object(path)
            for key in ("bos_token", "eos_token", "pad_token"):
                if (value := values.get(key)) is not None:
                    tokens[key] = str(value.get("content") if isinstance(value, dict) else value)
    return {"pad_token": tokens["eos_token"]} | tokens


def _describe(bpe: ClipBPE, origin: Path, settings: dict[str, str]) -> ClipTokenizer:
    what = f"the tokenizer {origin}"
    ids = {key: token_id(bpe, token, what) for key, token in settings.items()}
    tokenizer = build(bpe, settings["bos_token"], settings["eos_token"], what)
    return ClipTokenizer(
        tokenizer.to_str(), str(origin), bpe.size, ids["bos_token"], ids["eos_token"], ids["pad_token"]
    )


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

        from gguf_sd.checkpoint.hub import hub_answers

        cached = try_to_load_from_cache(HUB_REPOSITORY, "tokenizer.json")
        if isinstance(cached, str):
            return Path(cached)
        return Path(hf_hub_download(HUB_REPOSITORY, "tokenizer.json")) if hub_answers() else None
    except Exception:  # offline, a proxy, no such file: for the caller all the same, and one error names the ways out
        return None
