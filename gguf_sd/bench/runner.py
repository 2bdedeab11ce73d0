"""Runs a comparison: every round, every contestant in a process of its own, in turn."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from gguf_sd.bench.calls_file import PREDICTIONS, errors_by_timestep
from gguf_sd.bench.contestant import RESULT, Result, Task
from gguf_sd.bench.learned import clip_scores, fid, lpips_scores
from gguf_sd.bench.metrics import compare
from gguf_sd.bench.spec import Contestant, Spec
from gguf_sd.checkpoint.gguf_header import is_gguf
from gguf_sd.checkpoint.safetensors_header import is_safetensors, read_table
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.demo.models import share_correct
from gguf_sd.errors import GgufSdError

CALLS = "calls.safetensors"
TIMES = ("load_s", "first_step_s", "step_s", "vae_s", "picture_s")


@dataclass
class Row:
    """A contestant's line: medians; ``spread`` has the half distance of the quartiles of what has one."""

    name: str
    program: str
    file_bytes: int
    unet_bytes: int
    values: dict[str, float | None] = field(default_factory=dict)
    spread: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)  # of the UNet's output, by timestep
    facts: dict[str, str] = field(default_factory=dict)  # device, dtype, weights
    # Where pictures take several settings in turn, PSNR and the share that is right of those with each.
    by_settings: dict[str, dict[str, float]] = field(default_factory=dict)


def run(
    spec: Spec, folder: Path, resume: bool = False, progress: Callable[[str], object] = lambda name: None
) -> list[Row]:
    """Paints and measures all; ``folder`` gets runs/NAME-ROUND/ with pictures and times. With ``resume`` what an
    earlier, interrupted run of the same comparison has finished is kept. Raises GgufSdError where a contestant
    fails."""
    for number in range(spec.rounds):
        for i, contestant in enumerate(spec.contestants):
            pictures = spec.of_round(number)
            if not pictures:
                continue
            task = Task(
                model=contestant.model,
                program=contestant.program,
                pictures=[(p, *spec.job(p)) for p in pictures],
                folder=str(_folder(folder, contestant, number)),
                device=spec.device,
                dtype=spec.dtype,
                weights=spec.weights,
                calls=str(folder / CALLS) if spec.errors and not number and contestant.program == "gguf-sd" else None,
                record=i == 0,
                sdcpp=spec.sdcpp,
            )
            if not (resume and _finished(task)):
                _run(task, contestant)
            progress(contestant.name)
    return [_row(spec, folder, contestant) for contestant in spec.contestants]


def _folder(folder: Path, contestant: Contestant, number: int) -> Path:
    return folder / "runs" / f"{contestant.name}-{number}"


def _finished(task: Task) -> bool:
    """Whether the very same task was done: its result stands beside its text."""
    folder = Path(task.folder)
    try:
        return (folder / RESULT).is_file() and (folder / "task.json").read_text() == json.dumps(asdict(task))
    except OSError:
        return False


def _run(task: Task, contestant: Contestant) -> None:
    folder = Path(task.folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    if task.record and task.calls is not None:
        Path(task.calls).unlink(missing_ok=True)  # another comparison's, or half a file
    path = folder / "task.json"
    path.write_text(json.dumps(asdict(task)))
    command = [sys.executable, "-m", "gguf_sd.bench.contestant", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise GgufSdError(f"{contestant.name} ({contestant.program}) failed: {last}")


def load_pictures(spec: Spec, folder: Path, contestant: Contestant) -> list[Image.Image]:
    """A contestant's pictures in the order of the prompts."""
    pictures = []
    for i in range(len(spec.prompts)):
        with Image.open(_folder(folder, contestant, i % spec.rounds) / f"{i:05}.png") as picture:
            pictures.append(picture.convert("RGB"))
    return pictures


def _row(spec: Spec, folder: Path, contestant: Contestant) -> Row:
    rounds = [n for n in range(spec.rounds) if spec.of_round(n)]
    results = [Result(**json.loads((_folder(folder, contestant, n) / RESULT).read_text())) for n in rounds]
    row = Row(contestant.name, contestant.program, *_sizes(contestant))
    for name in TIMES:
        values: list[float] = []
        for result in results:
            value = getattr(result, name)
            values += value if isinstance(value, list) else [value]
        _put(row, name, values)
    for name in ("peak_rss", "peak_vram"):
        row.values[name] = max(getattr(result, name) for result in results)
    joules = [r.joules for r in results if r.joules is not None]
    row.values["joules_picture"] = sum(joules) / len(spec.prompts) if joules else None
    row.facts = {"device": results[0].device, "dtype": results[0].dtype, "weights": results[0].weights}
    _quality(spec, folder, contestant, row)
    return row


def _quality(spec: Spec, folder: Path, contestant: Contestant, row: Row) -> None:
    first = spec.contestants[0]
    pictures, found = load_pictures(spec, folder, contestant), list[dict[str, float]]()
    if contestant != first:
        references = load_pictures(spec, folder, first)
        found = [compare(a, b) for a, b in zip(pictures, references, strict=True)]
        for name in found[0]:
            _put(row, name, [one[name] for one in found])
        row.values["psnr_mean"] = statistics.mean(min(one["psnr"], 100.0) for one in found)
        if spec.lpips:
            _put(row, "lpips", lpips_scores(pictures, references, Path(spec.lpips)))
        if spec.fid:
            row.values["fid"] = fid(pictures, references, Path(spec.fid))
        paths = [_folder(folder, c, 0) for c in (contestant, first)]
        if all((path / PREDICTIONS).is_file() for path in paths):
            row.errors = errors_by_timestep(folder / CALLS, *paths)
    if spec.clip:
        _put(row, "clip", clip_scores(pictures, spec.prompts, Path(spec.clip)))
    if (share := share_correct(pictures, spec.prompts)) is not None:
        row.values["correct"] = share
    for settings in spec.settings if len(spec.settings) > 1 else ():
        own = [i for i in range(len(pictures)) if spec.job(i)[2] == settings]
        if not own:
            continue
        differing = {k: v for k, v in settings.items() if any(other.get(k) != v for other in spec.settings)}
        part = row.by_settings[_told(differing)] = dict[str, float]()
        if contestant != first:
            part["psnr"] = statistics.median(found[i]["psnr"] for i in own)
        share = share_correct([pictures[i] for i in own], [spec.prompts[i] for i in own])
        if share is not None:
            part["correct"] = share


def _told(settings: dict[str, Any]) -> str:
    """As "4 steps, guidance 0"."""
    words = [f"{key} {value}" for key, value in settings.items() if key != "steps"]
    if steps := settings.get("steps"):
        words.insert(0, f"{steps} step{'s' if steps > 1 else ''}")
    return ", ".join(words)


def _put(row: Row, name: str, values: list[float]) -> None:
    row.values[name] = statistics.median(values)
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        if high - low < float("inf"):  # and no difference of infinities
            row.spread[name] = (high - low) / 2


def _sizes(contestant: Contestant) -> tuple[int, int]:
    """Bytes of the model and of its UNet."""
    path = Path(contestant.model)
    if path.is_dir():
        files = [f for f in path.rglob("*") if f.suffix in (".safetensors", ".bin")]
        return sum(f.stat().st_size for f in files), sum(f.stat().st_size for f in files if f.parent.name == "unet")
    if is_safetensors(path):
        own = (t.nbytes for name, t in read_table(path).tensors.items() if name.startswith(UNET))
        return path.stat().st_size, sum(own)
    if not is_gguf(path):
        return path.stat().st_size, 0
    from gguf_sd.checkpoint.model_file import ModelFile
    from gguf_sd.cli.inspect import describe

    unet: dict[str, Any] = describe(ModelFile.open(path))["parts"]["unet"]
    return path.stat().st_size, sum(entry["bytes"] for entry in unet.values())


def fingerprint(path: Path) -> str:
    """The beginning of a model file's SHA-256; of a folder, of its files' names and sizes."""
    if not path.is_dir():
        with open(path, "rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    listed = [f"{f.relative_to(path)} {f.stat().st_size}\n" for f in sorted(path.rglob("*")) if f.is_file()]
    return hashlib.sha256("".join(listed).encode()).hexdigest()[:16]
