"""`gguf-sd batch`: a file of prompts to a folder of pictures."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.cli.generate_options import add_adapters, add_engine, add_sampling
from gguf_sd.cli.hub_models import add_revision, local_model
from gguf_sd.cli.preflight import check_model, check_type
from gguf_sd.errors import GgufSdError
from gguf_sd.loading import LoadOptions
from gguf_sd.memory_size import parse_memory

if TYPE_CHECKING:
    from gguf_sd.batch.items import Item
    from gguf_sd.batch.manifest import Manifest
    from gguf_sd.batch.painter import Result

EXIT_SOME_FAILED = 1
DEFAULT_BATCH = 4  # pictures painted at once
OF_THE_RUN = ("lora_dir", "embeddings")  # settings that no row has


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "batch",
        help="paint a file of prompts",
        description="Paints a picture for each row of a file: a prompt a line (.txt), a table whose columns are "
        "settings (.csv), or a JSON object of settings a line (.jsonl). The options below hold for rows that do not "
        "say otherwise. Pictures are named after the row, or its name column; a manifest tells what was painted.",
    )
    add = parser.add_argument
    add("prompts", type=Path, help="file of prompts: .txt, .csv or .jsonl")
    add("-m", "--model", type=Path, help="a .gguf file; or a checkpoint or diffusers folder, converted into the cache "
        "first; or org/repo, org/repo/file.gguf or a link of the Hugging Face Hub (default: the built-in demo "
        "model)")  # fmt: skip
    add_revision(parser)
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="folder for the pictures and manifest.jsonl")
    add("--resume", action="store_true", help="go on where an earlier run stopped: paint what is not there and whole")
    add("-n", "--negative-prompt", help="what to keep away from; needs guidance above 1")
    add_adapters(parser)
    add_sampling(parser)
    add("--safety", help="what happens to pictures that the model's safety checker flags: blur, warn or off (blur)")
    add_engine(parser)
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help="paint on a Ray cluster, by default one that is "
        "started here (needs gguf-sd[ray])")  # fmt: skip
    add("--ray-cores", type=int, default=1, metavar="N", help="CPU cores of each of Ray's painters (1); on a GPU each "
        "takes a GPU besides")  # fmt: skip
    add("--quiet", action="store_true", help="no progress bar and no summary")
    add("--json", action="store_true", help="print the summary as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """0 where every row was painted, 1 where some failed (the manifest says why). Raises GgufSdError."""
    from gguf_sd.batch.items import make_items
    from gguf_sd.batch.rows import read_rows
    from gguf_sd.cli.cache import model_path
    from gguf_sd.demo import model_folder

    rows = read_rows(args.prompts)
    check_type(args.type)
    if args.model is not None:
        args.model = local_model(args.model, args.revision, args.quiet)
        check_model(args.model)
    parse_memory(args.max_memory)
    size = _at_least_one("--batch", DEFAULT_BATCH if args.batch is None else args.batch)
    _at_least_one("--ray-cores", args.ray_cores)
    defaults, shared = _settings(args)
    items = make_items(rows, defaults, max(args.seed or 0, 0))
    options = LoadOptions.of(args)
    options.check()
    try:
        args.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise GgufSdError(f"cannot create {args.output}: {error.strerror}; choose another --output") from error
    model = model_path(args.model or model_folder(), args.type, args.tokenizer, quiet=args.quiet)
    return _run(args, items, size, model, options, shared)


def _at_least_one(name: str, value: int) -> int:
    if value < 1:
        raise GgufSdError(f"{name} is {value}; it takes a whole number from 1")
    return value


def _settings(args: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the command line: those that a row may override, and those of the run."""
    from gguf_sd.adapters.embedding_files import as_embeddings
    from gguf_sd.request import Request, checked

    names = {field.name for field in fields(Request)} - {"seed", "batch"}
    given = {name: value for name in names if (value := getattr(args, name, None)) is not None}
    checked(Request(**given))  # so that a wrong option is no failure of every row
    shared = {name: given.pop(name) for name in OF_THE_RUN if name in given}
    if "lora_dir" in shared:
        shared["lora_dir"] = shared["lora_dir"].resolve()
    if "embeddings" in shared:
        files = as_embeddings(shared["embeddings"])
        shared["embeddings"] = [replace(file, path=file.path.resolve()) for file in files]
    return given, shared


def _run(
    args: argparse.Namespace,
    items: list[Item],
    size: int,
    model: Path,
    options: LoadOptions,
    shared: dict[str, Any],
) -> int:
    from gguf_sd.batch.items import make_groups, refused
    from gguf_sd.batch.manifest import Manifest
    from gguf_sd.batch.painter import Result
    from gguf_sd.checkpoint.model_file import ModelFile
    from gguf_sd.cli.progress import progress_bar

    opened = ModelFile.open(model)
    how = {name: str(value) for name, value in asdict(options).items() if name in ("dtype", "vae", "weights")}
    identity = json.dumps([opened.path.name, opened.source_hash, how, {k: str(v) for k, v in shared.items()}])
    manifest = Manifest(args.output, items, identity)
    started = time.perf_counter()
    with manifest.open(args.resume):
        there = len(manifest.lines)
        # A group is painted whole or not at all: in other company a GPU may round differently.
        groups = [group for group in make_groups(items, size) if not all(map(manifest.done, group))]
        for item in refused(items):
            manifest.add(Result(item, error=item.error))
        with progress_bar(sum(map(len, groups)), args.quiet, unit="picture") as bar:
            for result in _painted(args, groups, size, model, options, shared):
                manifest.add(result)
                bar.update()
    return _summary(args, manifest, there, time.perf_counter() - started)


def _painted(
    args: argparse.Namespace,
    groups: list[list[Item]],
    size: int,
    model: Path,
    options: LoadOptions,
    shared: dict[str, Any],
) -> Iterable[Result]:
    if not groups:
        return ()
    if args.ray is not None:
        from gguf_sd.batch.on_ray import RayRun, paint_on_ray

        run = RayRun(model.resolve(), options.resolved(), size, shared, args.ray, args.ray_cores)
        return paint_on_ray(groups, run)
    return _here(groups, size, model, options, shared)


def _here(
    groups: list[list[Item]], size: int, model: Path, options: LoadOptions, shared: dict[str, Any]
) -> Iterator[Result]:
    from gguf_sd.batch.painter import Painter

    painter = Painter(model, options, size, shared)
    for group in groups:
        yield from painter.paint(group)


def _summary(args: argparse.Namespace, manifest: Manifest, there: int, seconds: float) -> int:
    failed = manifest.failed
    painted = len(manifest.lines) - len(failed) - there
    if args.json:
        facts = {"manifest": str(manifest.path), "painted": painted, "skipped": there, "failed": len(failed)}
        print(json.dumps(facts | {"seconds": round(seconds, 3)}, indent=2))
    elif not args.quiet:
        skipped = f", {there} there already" if there else ""
        print(f"{painted} painted{skipped}, {len(failed)} failed: {manifest.path}")
    for line in failed[:3]:
        print(f"row {line['row']}: {line['error']}", file=sys.stderr)
    if len(failed) > 3:
        print(f"and {len(failed) - 3} more, see {manifest.path}", file=sys.stderr)
    return EXIT_SOME_FAILED if failed else 0
