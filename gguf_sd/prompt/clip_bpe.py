"""CLIP's byte-pair encoding, built from a vocabulary and merges and from nothing else.

A tokenizer.json is a program: its normalizers and pre-tokenizers replace, split and prepend what they like, and a few
lines of them turn a word into gigabytes. From a stranger's file only the tables are taken, checked, and CLIP's own
steps (https://github.com/openai/CLIP, ``clip/simple_tokenizer.py``) are put around them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.json_text import MAX_TABLE, json_object

START, END = "<|startoftext|>", "<|endoftext|>"
WORD_END = "</w>"
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
MAX_TOKENS = 1 << 20
MAX_TOKEN = 1024  # characters
MAX_ADDED = 4096  # whole words that have a token of their own, of textual inversion for one

Merges = list[tuple[str, str]]


@dataclass(frozen=True)
class ClipBPE:
    """Checked tables. ``added`` tokens are found in the text before it is split into words, in lower case and with
    single spaces where they say True."""

    vocabulary: dict[str, int]
    merges: Merges
    added: dict[str, bool]

    @property
    def size(self) -> int:
        """How many rows an embedding needs for them."""
        return max(self.vocabulary.values()) + 1


def read_clip_bpe(text: str, what: str) -> ClipBPE:
    """The tables of a tokenizer.json (``tokenizers.Tokenizer.to_str``). ``what`` begins the GgufSdError that is raised
    for a tokenizer that is damaged, or not of CLIP's kind."""
    values = json_object(text, what, MAX_TABLE)
    model = values.get("model")
    if not isinstance(model, dict) or model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix") != WORD_END:
        raise GgufSdError(f"{what} is not of CLIP's kind: byte pairs with {WORD_END} at the end of words")
    vocabulary = model.get("vocab")
    if not isinstance(vocabulary, dict):
        raise GgufSdError(f"{what} has the vocabulary {shown(vocabulary)}; it takes an object of tokens and numbers")
    numbers, added = _added(values.get("added_tokens", []), vocabulary, what)
    return checked(vocabulary | numbers, model.get("merges"), what, added)


def checked(vocabulary: Mapping[str, Any], merges: Any, what: str, added: Mapping[str, bool] | None = None) -> ClipBPE:
    """The tables, where their types and sizes are those of a tokenizer; raises GgufSdError otherwise."""
    if not 1 <= len(vocabulary) <= MAX_TOKENS or not isinstance(merges, list) or len(merges) > MAX_TOKENS:
        raise GgufSdError(
            f"{what} has {len(vocabulary)} tokens and the merges {shown(merges)}; it takes up to {MAX_TOKENS:,} of each"
        )
    for token, number in vocabulary.items():
        if type(number) is not int or not 0 <= number < MAX_TOKENS or len(token) > MAX_TOKEN:
            raise GgufSdError(f"{what} has the token {shown(token)} with the number {shown(number)}")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise GgufSdError(f"{what} gives two tokens the same number")
    return ClipBPE(dict(vocabulary), [_pair(merge, vocabulary, what) for merge in merges], dict(added or {}))


def _pair(merge: Any, vocabulary: Mapping[str, Any], what: str) -> tuple[str, str]:
    """Two tokens whose union is one, too; older files write them as one text."""
    pair = tuple(merge.split(" ")) if isinstance(merge, str) else merge
    if not isinstance(pair, tuple | list) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise GgufSdError(f"{what} has the merge {shown(merge)}; it takes two tokens")
    first, second = pair
    if not (first in vocabulary and second in vocabulary and first + second in vocabulary):
        raise GgufSdError(f"{what} merges {shown(first)} and {shown(second)}, but they or their union are no tokens")
    return first, second


def _added(rows: Any, vocabulary: Mapping[str, Any], what: str) -> tuple[dict[str, Any], dict[str, bool]]:
    """Numbers of the tokens with a meaning of their own, and ``ClipBPE.added``. Plain symbols that a file declares as
    such (SDXL's second tokenizer: "!", with which it pads) stay plain."""
    if not isinstance(rows, list) or len(rows) > MAX_ADDED or not all(isinstance(row, dict) for row in rows):
        raise GgufSdError(f"{what} has the added tokens {shown(rows)}; it takes a list of up to {MAX_ADDED} objects")
    numbers, added = {}, {}
    for row in rows:
        content, number = row.get("content"), row.get("id")
        if not isinstance(content, str) or not content or vocabulary.get(content, number) != number:
            raise GgufSdError(f"{what} adds the token {shown(content)} with the number {shown(number)}")
        if len(content) > 1:
            numbers[content] = number
            added[content] = row.get("normalized") is True and row.get("special") is not True
    return numbers, added


def build(bpe: ClipBPE, start: str, end: str, what: str) -> Tokenizer:
    """CLIP's tokenizer over the tables: NFC, lower case, single spaces, words, bytes, BPE; ``start`` and ``end`` go
    around a text. Raises GgufSdError where they are no tokens."""
    with rust_errors(what):
        model = models.BPE(
            bpe.vocabulary, bpe.merges, continuing_subword_prefix="", end_of_word_suffix=WORD_END, unk_token=end
        )
        tokenizer = Tokenizer(model)
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
        )
        words = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        tokenizer.decoder = decoders.ByteLevel()
        added = {start: False, end: False} | {t: n for t, n in bpe.added.items() if t not in (start, end)}
        tokenizer.add_special_tokens([AddedToken(token, normalized=n) for token, n in added.items()])
        tokenizer.post_processor = processors.RobertaProcessing(
            (end, token_id(bpe, end, what)),
            (start, token_id(bpe, start, what)),
            trim_offsets=False,
            add_prefix_space=False,
        )
    return tokenizer


def token_id(bpe: ClipBPE, token: str, what: str) -> int:
    """Raises GgufSdError for what is no token."""
    if (number := bpe.vocabulary.get(token)) is None:
        raise GgufSdError(f"{what}, without its token {token!r}, is no CLIP tokenizer")
    return number


@contextlib.contextmanager
def rust_errors(what: str) -> Iterator[None]:
    """What the tokenizers library raises (bare exceptions, and for a panic of its Rust code a BaseException) as
    GgufSdError."""
    try:
        yield
    except GgufSdError:
        raise
    except Exception as error:
        raise GgufSdError(f"{what} cannot be used: {error}") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise GgufSdError(f"{what} cannot be used: the tokenizers library gave up ({error})") from None
