"""A tokenizer out of a file: its tables are taken, its program is not, and what is wrong with it is one sentence."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from gguf_sd.config import TextConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.prompt import find_tokenizer
from gguf_sd.prompt.clip_bpe import rust_errors
from gguf_sd.prompt.find_tokenizer import read_tokenizer
from gguf_sd.prompt.tokenizer import Tokenizer

TEXTS = ("Cat red  dog", "été 😀 !", "x" * 300, "<|endoftext|> cat", "")


@pytest.fixture(scope="module")
def state(tiny_pipeline: Callable[..., Path]) -> dict[str, Any]:
    """A tokenizer.json of transformers'."""
    values: dict[str, Any] = json.loads((tiny_pipeline() / "tokenizer" / "tokenizer.json").read_text())
    return values


def config_of(state: dict[str, Any]) -> TextConfig:
    return TextConfig(vocab_size=1024, bos_token_id=0, eos_token_id=1, pad_token_id=1)


def ids(state: dict[str, Any], text: str) -> list[int]:
    tokens = Tokenizer(json.dumps(state), "m.gguf").encode(text, config_of(state))
    room = [row[1 : row.index(1, 1)] if 1 in row[1:] else row[1:] for row in tokens.ids.tolist()]
    return [token for row in room for token in row]


def test_the_same_ids_as_the_file_s_own_program(state: dict[str, Any]) -> None:
    theirs = tokenizers.Tokenizer.from_str(json.dumps(state))
    for text in TEXTS:
        assert ids(state, text) == theirs.encode(text, add_special_tokens=False).ids, text


REPLACE = {"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 10}
PROGRAMS: dict[str, dict[str, Any]] = {
    "replacing": {"normalizer": {"type": "Sequence", "normalizers": [REPLACE] * 12}},
    "prepending": {"normalizer": {"type": "Prepend", "prepend": "cat " * 1000}},
    "dropping": {"pre_tokenizer": {"type": "Split", "pattern": {"Regex": "(x+x+)+y"}, "behavior": "Removed",
                                   "invert": False}},
    "surrounding": {"post_processor": {"type": "BertProcessing", "sep": ["!", 0], "cls": ["!", 0]}},
    "padding": {"padding": {"strategy": {"Fixed": 1 << 40}, "direction": "Right", "pad_to_multiple_of": None,
                            "pad_id": 0, "pad_type_id": 0, "pad_token": "!"}},
    "unknown": {"normalizer": {"type": "Nothing"}, "pre_tokenizer": 7, "version": [], "decoder": None},
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
def test_no_program_of_the_file_s_is_run(state: dict[str, Any], tmp_path: Path, name: str) -> None:
    changed = state | PROGRAMS[name]
    started = time.process_time()
    for text in TEXTS:
        assert ids(changed, text) == ids(state, text)
    (tmp_path / "tokenizer.json").write_text(json.dumps(changed))
    found = read_tokenizer(tmp_path / "tokenizer.json", 1024)
    assert ids(json.loads(found.json), "aa cat") == ids(state, "aa cat")
    assert time.process_time() - started < 2


def in_model(state: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return state | {"model": state["model"] | changes}


def damaged(state: dict[str, Any]) -> dict[str, tuple[object, str]]:
    vocabulary, merges = state["model"]["vocab"], state["model"]["merges"]
    return {
        "no object": ([], "no JSON object"),
        "deep": ({"model": json.loads("[" * 100 + "]" * 100)}, "nested deeper"),
        "another kind": (in_model(state, type="WordPiece"), "not of CLIP's kind"),
        "another suffix": (in_model(state, end_of_word_suffix=None), "not of CLIP's kind"),
        "no vocabulary": (in_model(state, vocab=[1]), "has the vocabulary"),
        "empty": (in_model(state, vocab={}) | {"added_tokens": []}, "has 0 tokens"),
        "no number": (in_model(state, vocab=vocabulary | {"x": "y"}), "has the token 'x' with the number 'y'"),
        "negative": (in_model(state, vocab=vocabulary | {"x": -1}), "has the token 'x' with the number -1"),
        "huge": (in_model(state, vocab=vocabulary | {"x": 1 << 70}), "has the token 'x' with the number"),
        "long": (in_model(state, vocab=vocabulary | {"x" * 5000: 700}), "has the token 'xxx"),
        "twice": (in_model(state, vocab=vocabulary | {"xx": 3}), "two tokens the same number"),
        "no merges": (in_model(state, merges=7), "the merges 7"),
        "merge of three": (in_model(state, merges=[*merges, ["a", "b", "c"]]), "has the merge"),
        "merge of numbers": (in_model(state, merges=[[1, 2]]), "has the merge"),
        "merge of strangers": (in_model(state, merges=["a nothing"]), "are no tokens"),
        "added by the million": (state | {"added_tokens": [{"content": "x", "id": 0}] * 5000}, "added tokens"),
        "added without name": (state | {"added_tokens": [{"id": 0}]}, "adds the token None"),
        "added elsewhere": (state | {"added_tokens": [{"content": "cat</w>", "id": 9999}]}, "adds the token"),
        "no end": (in_model(state, vocab={"a": 0}, merges=[]) | {"added_tokens": []}, "no CLIP tokenizer"),
    }


def test_damaged_tables(state: dict[str, Any]) -> None:
    for name, (changed, message) in damaged(state).items():
        with pytest.raises(GgufSdError, match=message) as caught:
            Tokenizer(json.dumps(changed), "m.gguf")
        assert str(caught.value).startswith("m.gguf carries a tokenizer"), name
        assert len(str(caught.value)) < 400


def test_merges_as_texts_and_as_pairs(state: dict[str, Any]) -> None:
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in state["model"]["merges"]]
    joined = in_model(state, merges=[" ".join(pair) for pair in pairs])
    assert ids(joined, "cat red dog") == ids(in_model(state, merges=pairs), "cat red dog")


def test_words_with_a_token_of_their_own(state: dict[str, Any]) -> None:
    """Those of textual inversion; a plain "!" that a file pads with stays a word."""
    word = {"content": "<my-cat>", "id": 600, "special": False, "normalized": True}
    padding = {"content": "!", "id": state["model"]["vocab"]["!"], "special": True, "normalized": False}
    changed = state | {"added_tokens": [*state["added_tokens"], word, padding]}
    assert 600 in ids(changed, "a <MY-cat> here")
    assert ids(changed, "cat!") == ids(state, "cat!")


def test_a_panic_of_rust_is_a_sentence() -> None:
    panic = type("PanicException", (BaseException,), {})
    with (
        pytest.raises(GgufSdError, match=r"m cannot be used: the tokenizers library gave up \(index"),
        rust_errors("m"),
    ):
        raise panic("index out of bounds")
    with pytest.raises(KeyboardInterrupt), rust_errors("m"):
        raise KeyboardInterrupt
    with pytest.raises(GgufSdError, match="m cannot be used: something"), rust_errors("m"):
        raise Exception("something")


def test_packed_merges_are_not_unpacked_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(find_tokenizer, "MAX_TABLE", 100_000)
    (tmp_path / "bpe.txt.gz").write_bytes(gzip.compress(b"a b\n" * (1 << 18)))
    with pytest.raises(GgufSdError, match="too many for a tokenizer"):
        read_tokenizer(tmp_path / "bpe.txt.gz", 49408)
