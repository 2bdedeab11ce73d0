"""The contact sheet: prompts down, types across, every picture labelled by its row and column."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

CELL = 128  # pixels a picture is shown at
MARGIN = 12
LABEL_WIDTH = 190  # for the prompts
HEADER = 64  # for the types
FONT_SIZE = 14
LINE = 18
CHARACTERS = 24  # of a prompt, a line


def contact_sheet(
    prompts: Sequence[str], columns: Sequence[tuple[str, str]], pictures: Sequence[Sequence[Image.Image]]
) -> Image.Image:
    """``columns`` holds a title and a subtitle each; ``pictures[column][row]`` belongs to ``prompts[row]``."""
    width = LABEL_WIDTH + len(columns) * (CELL + MARGIN) + MARGIN
    height = HEADER + len(prompts) * (CELL + MARGIN)
    sheet = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(FONT_SIZE)
    for column, (title, subtitle) in enumerate(columns):
        x = LABEL_WIDTH + column * (CELL + MARGIN)
        draw.text((x, 10), title, "black", font)
        draw.text((x, 10 + LINE), subtitle, "dimgrey", font)
    for row, prompt in enumerate(prompts):
        y = HEADER + row * (CELL + MARGIN)
        draw.multiline_text((MARGIN, y), "\n".join(textwrap.wrap(prompt, CHARACTERS)), "black", font)
        for column in range(len(columns)):
            picture = pictures[column][row].resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(picture, (LABEL_WIDTH + column * (CELL + MARGIN), y))
    return sheet
