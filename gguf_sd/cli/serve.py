"""`gguf-sd serve`: models for many people, by HTTP and on a page."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.cli.generate_options import add_engine
from gguf_sd.cli.hub_models import local_model
from gguf_sd.cli.preflight import check_model, check_type
from gguf_sd.errors import GgufSdError
from gguf_sd.loading import LoadOptions
from gguf_sd.memory_size import parse_memory

if TYPE_CHECKING:
    from gguf_sd.server.app import Settings

KEY = "GGUF_SD_API_KEY"  # environment variable
LOCAL = ("127.0.0.1", "localhost", "::1")


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "serve",
        help="serve models by HTTP and on a page",
        description="Serves models: a page at /, OpenAI's interface below /v1, AUTOMATIC1111's below /sdapi/v1, "
        "/healthz and /metrics. Needs gguf-sd[serve].",
    )
    add = parser.add_argument
    add("models", nargs="*", type=Path, metavar="MODEL", help=".gguf files; or checkpoints or diffusers folders, "
        "converted into the cache first; or org/repo, org/repo/file.gguf of the Hugging Face Hub (default: the "
        "built-in demo model)")  # fmt: skip
    add("--host", default="127.0.0.1", help="address to listen on (127.0.0.1: this machine alone)")
    add("--port", type=int, default=7860, help="port to listen on, 0 for any (7860)")
    add("--api-key", metavar="KEY", help=f"what callers must send (default: {KEY}, else none)")
    add("--queue", type=int, default=32, help="requests that may wait; more are refused with 429 (32)")
    add("--batch", type=int, default=4, help="pictures of equal shape painted at once (4)")
    add("--max-size", type=int, default=2048, metavar="PIXELS", help="along a side (2048)")
    add("--max-steps", type=int, default=150, help="sampling steps of a request (150)")
    add("--max-count", type=int, default=16, help="pictures of a request (16)")
    add("--max-upload", default="32MB", metavar="SIZE", help="bytes of a request (32MB)")
    add("--lora-dir", type=Path, help="folder of the LoRAs that prompts may name")
    add("--cors-origin", action="append", metavar="ORIGIN", help="let pages of this origin ask, such as "
        "https://chat.example; may be given several times (none)")  # fmt: skip
    add("--allow-host", action="append", metavar="NAME", help="serve under this name, too, where --host is this "
        "machine alone; may be given several times")  # fmt: skip
    add_engine(parser)
    add("--ray", nargs="?", const="local", metavar="ADDRESS", help="paint on replicas of Ray Serve, on a cluster that "
        "is started here or at ADDRESS (needs gguf-sd[ray])")  # fmt: skip
    add("--replicas", type=int, default=2, help="with --ray: how many (2)")
    add("--ray-cores", type=int, default=1, metavar="N", help="with --ray: CPU cores of each (1); on a GPU each takes "
        "a GPU besides")  # fmt: skip
    add("--quiet", action="store_true", help="no progress bars, and no address")
    for action in parser._actions:
        if action.dest == "type":  # several, to compare
            action.help = f"{action.help}; several, as in q8_0,q4_0, are served beside each other"
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """What can be wrong with the arguments is found out before anything is converted."""
    sources = list(_sources(args))
    options = LoadOptions.of(args)
    options.check()
    parse_memory(args.max_memory)
    _check_installed()
    settings = _settings(args)

    from gguf_sd.server.app import Server, serve
    from gguf_sd.server.shelf import Shelf

    shelf = Shelf(_models(sources, args), options, args.quiet)
    if args.host not in LOCAL and settings.rules.key is None and not args.quiet:
        print("anybody who reaches this machine may paint: --api-key asks for a key", file=sys.stderr)
    tell = "" if args.quiet else f"gguf-sd serves {', '.join(shelf.models)}"
    if args.ray is None:
        serve(Server(shelf, settings), args.host, args.port, tell)
        return 0
    from gguf_sd.server.on_ray import Replicas

    with Replicas(shelf, options, args.ray, args.replicas, args.ray_cores) as painters:
        serve(Server(shelf, settings, painters), args.host, args.port, tell)
    return 0


def _sources(args: argparse.Namespace) -> Iterator[tuple[Path, str | None]]:
    """Models with the type that each is converted to, None for GGUF files."""
    from gguf_sd.cli.cache import is_gguf
    from gguf_sd.demo import model_folder

    kinds: list[str | None] = [*args.type.split(",")] if args.type else [None]
    for kind in kinds:
        check_type(kind)
    args.models = [local_model(model, None, args.quiet) for model in args.models]
    for model in args.models:
        check_model(model)
    for model in args.models or [model_folder()]:
        for kind in [None] if is_gguf(model) else kinds:
            yield model, kind


def _models(sources: list[tuple[Path, str | None]], args: argparse.Namespace) -> dict[str, Path]:
    """Files by the names that callers use: those of the sources, with the type where it is one of several."""
    from gguf_sd.checkpoint.hub_names import plain_name
    from gguf_sd.cli.cache import model_path
    from gguf_sd.demo import model_folder

    found: dict[str, Path] = {}
    for source, kind in sources:
        stem = "demo" if source == model_folder() else Path(plain_name(source)).stem
        several = sum(other == source for other, _ in sources) > 1
        name = f"{stem}-{kind}" if several else stem
        if name in found:
            raise GgufSdError(f"two models are called {name}; rename one of the files")
        found[name] = model_path(source, kind, args.tokenizer, quiet=args.quiet)
    return found


def _settings(args: argparse.Namespace) -> Settings:
    from gguf_sd.server.app import Settings
    from gguf_sd.server.guard import Rules
    from gguf_sd.server.limits import Limits

    for name in ("queue", "batch", "max_size", "max_steps", "max_count", "replicas", "ray_cores"):
        if getattr(args, name) < 1:
            raise GgufSdError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it takes a whole number from 1")
    if not 0 <= args.port <= 65535:
        raise GgufSdError(f"--port is {args.port}; it takes a number from 0 to 65535")
    if args.lora_dir is not None and not args.lora_dir.is_dir():
        raise GgufSdError(f"the folder of LoRAs {args.lora_dir} does not exist")
    key = args.api_key if args.api_key is not None else os.environ.get(KEY)
    if key == "" or (key is not None and not key.isascii()):
        raise GgufSdError("the API key is empty or not ASCII; give another one, or leave --api-key out")
    upload = parse_memory(args.max_upload, "--max-upload") or 0
    hosts = frozenset([*LOCAL, *(args.allow_host or [])]) if args.host in LOCAL else frozenset()
    limits = Limits(size=args.max_size, steps=args.max_steps, count=args.max_count, upload=upload)
    rules = Rules(key, upload, hosts, tuple(args.cors_origin or ()))
    return Settings(args.queue, args.batch, limits, rules, args.lora_dir)


def _check_installed() -> None:
    try:
        import fastapi  # noqa: F401
        import prometheus_client  # noqa: F401
        import python_multipart  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        raise GgufSdError(f"serve needs {error.name}: pip install 'gguf-sd[serve]'") from None
