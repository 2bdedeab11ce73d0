"""Prompts and settings of pictures as people, programs and pranksters write them."""

from __future__ import annotations

import random

PIECES = (
    "a red circle", "(", ")", "[", "]", ":", "1.3", ":1.3)", ":-0.5)", ":1e9)", "\\", "\\(", "BREAK", " ", "\n", ",",
    '"',
    "<lora:x:1>", "[a:b:0.5]", "{x|y}", "(x:\x1d1.2)", "(x:\u2003\u0662)",
    "Negative prompt: ", "Steps: 20", ", Sampler: Euler a", "Size: 64x64",
    "Size: x", "CFG scale: nan", "Seed: 99999999999999999999", "Steps: -1", "\0", "\x1b[31m", "é", "日本",
    "👩‍🚀", "\ud800",
    "\u202e", "a" * 3000, "((" * 800, "[" * 2000, ":" * 3000, "\\" * 3001, '"' * 999, ", " * 2000, "x: y, " * 500,
    "Schedule type: Karras", "Clip skip: 2", "Denoising strength: 0.5", "Model hash: 1234567890", "Crop: 1x2",
    'Version: "a, b"', "Hires upscale: 2", "Template: \"Negative prompt: x\\nSteps: 3\"",
)  # fmt: skip
SHORT = [piece for piece in PIECES if len(piece) < 100]
LONG = 0.03  # of the texts: a hundred times as slow as the others, they find what is not linear


def mutated_text(rng: random.Random) -> str:
    """Up to a dozen pieces, in some texts long ones and hundreds of times."""
    if rng.random() < LONG:
        pieces = [rng.choice(PIECES) * rng.choice((1, 1, 1, 1, 1, 1, 2, 300)) for _ in range(rng.randrange(1, 12))]
    else:
        pieces = [rng.choice(SHORT) * rng.choice((1, 1, 1, 1, 1, 1, 2, 30)) for _ in range(rng.randrange(1, 12))]
    return "".join(pieces)[:200_000]


def mutated_settings(rng: random.Random) -> str:
    """Text as in a picture's ``parameters``."""
    return f"{mutated_text(rng)}\nNegative prompt: {mutated_text(rng)}\nSteps: 20, {mutated_text(rng)}"
