"""Single cases of every kind of input from outside: a seed makes one, and it ends in success or in GgufSdError."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

from gguf_sd.errors import GgufSdError
from tests.fuzz.file_cases import FileCases
from tests.fuzz.request_cases import RequestCases
from tests.fuzz.text_cases import TextCases

LONGEST = 2000  # characters of a sentence


@dataclass(frozen=True)
class Outcome:
    """``seconds`` of the processor; ``refused`` is the sentence, empty where all went well."""

    kind: str
    seed: int
    seconds: float
    refused: str


class Cases:
    """The kinds of cases, over files that are made once in ``work`` from a tiny diffusers folder with its checker."""

    def __init__(self, source: Path, work: Path):
        files = FileCases(source, work)
        self.parts, self.whole = files.parts, files.whole
        self.kinds = files.kinds | TextCases(files.whole, work).kinds | RequestCases(files.whole).kinds

    def run(self, kind: str, seed: int) -> Outcome:
        """Anything but GgufSdError escapes: it is what is looked for."""
        started, refused = time.process_time(), ""
        try:
            self.kinds[kind](random.Random(seed))
        except GgufSdError as error:
            refused = str(error)
            if len(refused) > LONGEST or "\n" in refused:
                raise AssertionError(f"no sentence: {refused[:3000]!r}") from error
        return Outcome(kind, seed, time.process_time() - started, refused)
