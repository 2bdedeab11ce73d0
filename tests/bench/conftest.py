from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def write_tokenizer_to() -> Callable[[Path], None]:
    """A function that writes a small CLIP tokenizer into a folder."""
    import json

    import tokenizers

    def write(folder: Path) -> None:
        symbols = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        start, end = "<|startoftext|>", "<|endoftext|>"
        vocabulary = [*symbols, *(s + "</w>" for s in symbols), start, end]
        (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        (folder / "merges.txt").write_text("#version: 0.2\n")
        config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77}
        config |= {"bos_token": start, "eos_token": end, "unk_token": end, "pad_token": end}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))

    return write
