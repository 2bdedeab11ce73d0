"""The demo model's own tokenizer: CLIP's byte-pair encoding, with merges that make each word of the world one
token and every other text a string of bytes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path

from gguf_sd.demo.world import BACKGROUNDS, COLOURS, RELATIONS, SHAPES

LENGTH = 24  # tokens of an encoded prompt; the longest caption takes 14
START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = sorted({"a", "on", "background", *COLOURS, *BACKGROUNDS, *SHAPES, *" ".join(RELATIONS).split()})


def byte_symbols() -> list[str]:
    """CLIP's printable stand-ins for the 256 bytes, in CLIP's order."""
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [b for b in range(256) if b not in shown]
    return [chr(b) for b in shown] + [chr(256 + i) for i in range(len(hidden))]


def learn_merges(joined: Sequence[str] = WORDS) -> list[tuple[str, str]]:
    """Byte-pair merges that join each of the words into one token; the commonest pair first."""
    words = [[*w[:-1], w[-1] + "</w>"] for w in joined]
    merges = []
    while any(len(w) > 1 for w in words):
        counts: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in pairwise(word):
                counts[pair] = counts.get(pair, 0) + 1
        best = max(counts, key=lambda pair: (counts[pair], pair))
        merges.append(best)
        words = [_merged(word, best) for word in words]
    return merges


def _merged(word: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for symbol in word:
        if result and (result[-1], symbol) == pair:
            result[-1] += symbol
        else:
            result.append(symbol)
    return result


def vocabulary(merges: list[tuple[str, str]]) -> dict[str, int]:
    """Token -> id, in CLIP's order: bytes, bytes that end a word, merges, start, end."""
    symbols = byte_symbols()
    tokens = [*symbols, *(s + "</w>" for s in symbols), *(a + b for a, b in merges), START, END]
    return {token: i for i, token in enumerate(tokens)}


def write_tokenizer(folder: Path, words: Sequence[str] = WORDS, length: int = LENGTH, pad: str = END) -> None:
    """Writes the files from which transformers' CLIPTokenizer loads."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(words)
    (folder / "vocab.json").write_text(json.dumps(vocabulary(merges), ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")
    config = special | {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "do_lower_case": True,
        "errors": "replace",
        "add_prefix_space": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def token_ids(
    captions: list[str], words: Sequence[str] = WORDS, length: int = LENGTH, pad: str = END
) -> list[list[int]]:
    """Ids of captions, START ... END and the padding up to ``length``: [B][length]. Captions are words in lower case
    and short enough; a word of another world falls into pieces."""
    merges = learn_merges(words)
    ids = vocabulary(merges)
    told = {word for caption in captions for word in caption.split()}
    pieces = {word: [ids[piece] for piece in _pieces(word, merges)] for word in told}
    rows = [[ids[START], *chain(*(pieces[word] for word in caption.split())), ids[END]] for caption in captions]
    return [row + [ids[pad]] * (length - len(row)) for row in rows]


def _pieces(word: str, merges: list[tuple[str, str]]) -> list[str]:
    """Each merge in turn: what a merge joins, only later ones take up."""
    symbols = [*word[:-1], word[-1] + "</w>"]
    for pair in merges:
        symbols = _merged(symbols, pair)
    return symbols
