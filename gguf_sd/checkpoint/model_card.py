"""A repository's README.md for GGUF files: what they are, how large, and how they run."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from math import prod
from pathlib import Path

from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.what_is_it import CONTROLNET, what_is

BEGIN, END = "<!-- gguf-sd: files -->", "<!-- gguf-sd: end of files -->"  # around the rows of the table
ROW = re.compile(r"^\| \[(?P<name>[^\]]+)\]")
HEAD = "| file | type | size | weights by type |\n|---|---|---|---|"
MODELS = {"sd1": "Stable Diffusion 1.x", "sdxl": "Stable Diffusion XL"}
HUB = "https://huggingface.co/"


@dataclass(frozen=True)
class CardSubject:
    """What a card says of a GGUF file. ``kind``: Stable Diffusion 1.x, …, or what else it is; ``base``: org/repo of the
    model it was made from, where that is known; ``runs``: how to say MODEL on a command line."""

    name: str
    kind: str
    type: str
    nbytes: int
    weights: str
    base: str
    control: bool = False

    @property
    def row(self) -> str:
        return f"| [{self.name}]({self.name}) | {self.type} | {_size(self.nbytes)} | {self.weights} |"


def subject_of(path: Path) -> CardSubject:
    """From the file's header alone. Raises GgufSdError for what is no GGUF file with a model, part or ControlNet of
    Stable Diffusion."""
    file = GGUFFile(path)
    shapes = {name: file.shape(name) for name in file.tensors}
    kind = what_is(shapes)
    counts: Counter[str] = Counter()
    for info in file.tensors.values():
        counts[info.type.name] += prod(info.shape)
    total = sum(counts.values()) or 1
    weights = ", ".join(f"{name} {count / total:.0%}" for name, count in counts.most_common() if count / total >= 0.005)
    said = str(file.metadata.get(keys.TYPE, "")) or counts.most_common(1)[0][0].lower()
    return CardSubject(
        path.name,
        kind.name if kind is not None else _model(path),
        said,
        file.size,
        weights,
        str(file.metadata.get(keys.BASE_URL, "")).removeprefix(HUB),
        kind is CONTROLNET,
    )


def _model(path: Path) -> str:
    from gguf_sd.checkpoint.model_file import ModelFile

    return MODELS[ModelFile.open(path).config.name]


def card(subject: CardSubject, repo: str, base: str = "", license: str = "") -> str:
    """A new README.md."""
    base = base or subject.base
    front = ["---", "library_name: gguf-sd", "pipeline_tag: text-to-image", "tags:", "- gguf", "- stable-diffusion"]
    front += ["- controlnet"] * subject.control
    front += [f"base_model: {base}", "base_model_relation: quantized"] if base else []
    front += [f"license: {license}"] if license else []
    origin = f" of [{base}]({HUB}{base})" if base else ""
    what = subject.kind[:1].upper() + subject.kind[1:]
    run = f'gguf-sd generate {repo}/{subject.name} -p "a lighthouse at dusk" -o lighthouse.png'
    if subject.control:
        run = f'gguf-sd generate MODEL --control {repo}/{subject.name} --control-image edges.png -p "a lighthouse"'
    return f"""{chr(10).join(front)}
---

# {repo.rpartition("/")[2]}

{what}{origin} in GGUF files, quantised by gguf-sd, convolutions included.

{HEAD}
{BEGIN}
{subject.row}
{END}

```
pip install gguf-sd
{run}
```
"""


def updated(text: str, subject: CardSubject) -> str | None:
    """A card of ours with the file's row new or in place of its old one; None for a text that is no such card."""
    before, begin, rest = text.partition(BEGIN)
    rows, end, after = rest.partition(END)
    if not begin or not end:
        return None
    known = [row for row in rows.strip().splitlines() if (m := ROW.match(row)) and m["name"] != subject.name]
    return "\n".join([f"{before}{begin}", *sorted([*known, subject.row]), f"{end}{after}"])


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
