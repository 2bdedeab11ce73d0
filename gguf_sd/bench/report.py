"""A comparison's report: report.json, .csv, .md and one .html with all pictures inside."""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops, ImageDraw, ImageFont

from gguf_sd.atomic_write import put_in_place, temporary_beside
from gguf_sd.bench import plots
from gguf_sd.bench.runner import Row, load_pictures
from gguf_sd.bench.spec import Spec

# Columns of the tables: key, title, digits, factor.
COLUMNS = (
    ("file_bytes", "file, MB", 2, 1e-6),
    ("unet_bytes", "UNet, MB", 2, 1e-6),
    ("load_s", "open, s", 3, 1),
    ("first_step_s", "to first step, s", 2, 1),
    ("step_s", "step, s", 4, 1),
    ("vae_s", "VAE, s", 3, 1),
    ("picture_s", "picture, s", 3, 1),
    ("peak_rss", "peak RSS, MB", 0, 1e-6),
    ("peak_vram", "peak VRAM, MB", 0, 1e-6),
    ("joules_picture", "J a picture", 1, 1),
    ("psnr", "PSNR, dB", 2, 1),
    ("psnr_mean", "mean PSNR", 2, 1),
    ("ssim", "SSIM", 4, 1),
    ("ms_ssim", "MS-SSIM", 4, 1),
    ("lpips", "LPIPS", 4, 1),
    ("weighted", "UNet error", 4, 1),
    ("clip", "CLIP score", 2, 1),
    ("fid", "FID", 2, 1),
    ("correct", "correct", 3, 1),
)
TIMED = {"load_s", "first_step_s", "step_s", "vae_s", "picture_s", "peak_rss", "peak_vram", "joules_picture"}
SHOWN = 6  # prompts on the contact sheet
CELL, GAP, LABEL, HEADER = 128, 8, 190, 46
AMPLIFIED = 8  # times, on difference maps
CAPTIONS = {
    "quality-size": "Quality against size",
    "time-memory": "Time against memory",
    "error-timestep": "Error of the UNet's output by timestep",
    "sheet": f"Pictures, and their differences from the first contestant's, {AMPLIFIED} times amplified",
}


def write_report(spec: Spec, rows: Sequence[Row], folder: Path, timed: bool = True) -> Path:
    """Writes all into ``folder``; returns the HTML file's path. Without ``timed``, times and memory are left out: of a
    machine that did other work meanwhile they would say nothing."""
    columns = _columns(rows, timed)
    images = {}
    if any("psnr" in row.values for row in rows):
        images["quality-size"] = plots.quality_against_size(rows)
    if timed:
        images["time-memory"] = plots.time_against_memory(rows)
    if any(row.errors for row in rows):
        images["error-timestep"] = plots.error_by_timestep(rows)
    buffer = io.BytesIO()
    contact_sheet(spec, folder).save(buffer, "PNG")
    images["sheet"] = buffer.getvalue()
    for name, data in images.items():
        _write(folder / f"{name}.png", data)
    plain = [_plain(row, timed) for row in rows]
    _write(folder / "report.json", json.dumps({"recorded": spec.recorded, "rows": plain}, indent=1).encode())
    _write(folder / "report.csv", _csv(rows, columns).encode())
    _write(folder / "report.md", _markdown(spec, rows, columns, list(images)).encode())
    _write(folder / "report.html", _html(spec, rows, columns, images).encode())
    _write(folder / "bench.toml", spec.to_toml(folder).encode())
    return folder / "report.html"


def in_columns(spec: Spec, rows: Sequence[Row], timed: bool, width: int) -> str:
    """Table and legend for a terminal: as many columns side by side as its ``width`` takes, the others below."""
    tables = filter(None, (_table(rows, _columns(rows, timed)), by_settings(rows)))
    parts = [part for table in tables for part in _in_parts(table, width)]
    return "\n\n".join([*parts, textwrap.fill(_legend(spec, rows), min(width, 100))])


def _in_parts(table: list[list[str]], width: int) -> list[str]:
    first, *others = ([line[i] for line in table] for i in range(len(table[0])))
    first = [cell.ljust(max(map(len, first))) for cell in first]
    parts: list[list[str]] = []
    lines = first
    for column in others:
        wide = max(map(len, column))
        if lines != first and len(lines[0]) + 2 + wide > width:
            parts, lines = [*parts, lines], first
        lines = [f"{line}  {cell.rjust(wide)}" for line, cell in zip(lines, column, strict=True)]
    return ["\n".join(part) for part in (*parts, lines)]


def _columns(rows: Sequence[Row], timed: bool) -> list[tuple[str, str, int, float]]:
    """Those that some row has a value of."""
    return [c for c in COLUMNS if (timed or c[0] not in TIMED) and any(_cell(row, c[0]) is not None for row in rows)]


def _write(path: Path, data: bytes) -> None:
    with temporary_beside(path) as temporary:
        temporary.write_bytes(data)
        put_in_place(temporary, path)


def _plain(row: Row, timed: bool) -> dict[str, Any]:
    """JSON knows no infinity: equal pictures have a PSNR of null and "equal"."""
    plain = asdict(row)
    for part in (plain["values"], plain["spread"], *plain["by_settings"].values()):
        for name, value in list(part.items()):
            if name in TIMED and not timed:
                del part[name]
            elif value == math.inf:
                part[name] = "equal"
    return plain


def _cell(row: Row, key: str) -> float | None:
    if key in ("file_bytes", "unet_bytes"):
        return float(getattr(row, key))
    if key == "weighted":
        return row.errors.get(key)
    value = row.values.get(key)
    return None if key in ("peak_vram", "joules_picture") and not value else value


def _text(row: Row, key: str, digits: int, factor: float) -> str:
    value = _cell(row, key)
    if value is None:
        return ""
    if math.isinf(value):
        return "equal"
    spread = row.spread.get(key)
    return f"{value * factor:.{digits}f}" + (f" ± {spread * factor:.{digits}f}" if spread else "")


def _table(rows: Sequence[Row], columns: Sequence[tuple[str, str, int, float]]) -> list[list[str]]:
    head = ["contestant", *(title for _, title, _, _ in columns)]
    return [head, *([row.name, *(_text(row, k, d, f) for k, _, d, f in columns)] for row in rows)]


def by_settings(rows: Sequence[Row]) -> list[list[str]]:
    """PSNR and what is right by settings, where pictures have several in turn; else nothing."""
    heads = list(rows[0].by_settings)
    if not heads:
        return []
    return [["contestant", *heads], *([row.name, *map(_both, row.by_settings.values())] for row in rows)]


def _both(part: dict[str, float]) -> str:
    """As "38.1 dB, 95.0 % correct"."""
    psnr, correct = part.get("psnr"), part.get("correct")
    words = [] if psnr is None else ["equal" if psnr == math.inf else f"{psnr:.1f} dB"]
    return ", ".join(words if correct is None else [*words, f"{correct:.1%} correct"])


def _csv(rows: Sequence[Row], columns: Sequence[tuple[str, str, int, float]]) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    bins = sorted(
        {name for row in rows for name in row.errors if "-" in name}, key=lambda name: int(name.split("-")[0])
    )
    writer.writerow(["contestant", *(key for key, *_ in columns), *(f"error_{name}" for name in bins)])
    for row in rows:
        cells = ["" if (v := _cell(row, key)) is None else v for key, *_ in columns]
        writer.writerow([row.name, *cells, *(row.errors.get(name, "") for name in bins)])
    return buffer.getvalue()


def _markdown(
    spec: Spec, rows: Sequence[Row], columns: Sequence[tuple[str, str, int, float]], images: Sequence[str]
) -> str:
    lines = ["# Comparison", ""]
    for head, *body in filter(None, (_table(rows, columns), by_settings(rows))):
        lines += [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [*(f"| {' | '.join(cells)} |" for cells in body), ""]
    lines += [_legend(spec, rows), ""]
    lines += [f"![{CAPTIONS[name]}]({name}.png)\n" for name in images]
    return "\n".join([*lines, *(f"- {key}: {value}" for key, value in spec.recorded.items())]) + "\n"


def _legend(spec: Spec, rows: Sequence[Row]) -> str:
    count, rounds = len(spec.prompts), spec.rounds
    seeds = f"seed {spec.seed}" if count == 1 else f"seeds {spec.seed} … {spec.seed + count - 1}"
    processes = "a fresh process for every contestant" if rounds == 1 else (
        f"{rounds} rounds, every contestant in a fresh process each round"
    )  # fmt: skip
    error = "; the UNet's error is relative, on the same recorded calls, as it matters for the finished picture"
    return (
        f"{count} prompt{'s' * (count > 1)}, {seeds}, {processes}. Medians ± half the distance of the quartiles. "
        f"Quality is against the picture of {spec.contestants[0].name} with the same seed"
        f"{error if any(row.errors for row in rows) else ''}."
    )


def _html(
    spec: Spec, rows: Sequence[Row], columns: Sequence[tuple[str, str, int, float]], images: dict[str, bytes]
) -> str:
    tables = "".join(map(_html_table, filter(None, (_table(rows, columns), by_settings(rows)))))
    shown = "".join(
        f"<h2>{CAPTIONS[name]}</h2>"
        f'<img alt="{CAPTIONS[name]}" src="data:image/png;base64,{base64.b64encode(data).decode()}">'
        for name, data in images.items()
    )
    facts = "".join(f"<li>{html.escape(str(k))}: {html.escape(str(v))}</li>" for k, v in spec.recorded.items())
    style = (
        "body{font:15px system-ui;margin:2em;max-width:80em}table{border-collapse:collapse}h2{font-size:1.1em}"
        "td,th{padding:.3em .7em;border-bottom:1px solid #ccc;text-align:right;white-space:nowrap}"
        "tr>:first-child{text-align:left}div{overflow-x:auto}img{max-width:100%}li{overflow-wrap:anywhere}"
    )
    legend = html.escape(_legend(spec, rows))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>Comparison</title><style>{style}</style>"
        f"<h1>Comparison</h1>{tables}<p>{legend}</p>{shown}"
        f"<ul>{facts}</ul></html>\n"
    )


def _html_table(table: list[list[str]]) -> str:
    head, *body = table
    cells = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in line) + "</tr>" for line in body)
    return f"<div><table><tr>{cells}</tr>{lines}</table></div>"


def contact_sheet(spec: Spec, folder: Path) -> Image.Image:
    """Prompts down, contestants across; below each picture its difference from the first contestant's, amplified."""
    count = min(SHOWN, len(spec.prompts))
    pictures = [load_pictures(spec, folder, c)[:count] for c in spec.contestants]
    width = LABEL + len(pictures) * (CELL + GAP)
    sheet = Image.new("RGB", (width, HEADER + count * (2 * CELL + 2 * GAP)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for column, contestant in enumerate(spec.contestants):
        title = "\n".join(textwrap.wrap(contestant.name, 16)[:2])
        draw.multiline_text((LABEL + column * (CELL + GAP), 6), title, "black", font)
    for row in range(count):
        y = HEADER + row * (2 * CELL + 2 * GAP)
        text = "\n".join(textwrap.wrap(spec.prompts[row], 24)[:5])
        draw.multiline_text((GAP, y), text, "black", font)
        draw.text((GAP, y + CELL + GAP), f"difference x {AMPLIFIED}", "dimgrey", font)
        for column, own in enumerate(pictures):
            x = LABEL + column * (CELL + GAP)
            sheet.paste(_cell_of(own[row]), (x, y))
            if column:
                difference = ImageChops.difference(own[row], pictures[0][row]).point(lambda v: min(255, v * AMPLIFIED))
                sheet.paste(_cell_of(difference), (x, y + CELL + GAP))
    return sheet


def _cell_of(picture: Image.Image) -> Image.Image:
    return picture.resize((CELL, CELL), Image.Resampling.NEAREST if picture.width <= CELL else Image.Resampling.LANCZOS)
