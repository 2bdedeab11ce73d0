"""The command line: `gguf-sd COMMAND …`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

import gguf_sd
from gguf_sd.cli import convert, demo, generate, inspect
from gguf_sd.errors import GgufSdError

COMMANDS = (demo, convert, generate, inspect)
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    parser = argparse.ArgumentParser(prog="gguf-sd", description="Stable Diffusion in one quantised GGUF file.")
    parser.add_argument("--version", action="version", version=f"gguf-sd {gguf_sd.__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(subparsers)
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.captureWarnings(True)
    try:
        code: int = args.run(args)
        sys.stdout.flush()
    except GgufSdError as error:
        print(f"gguf-sd: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # the reader of our output has gone, `| head` for one
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        print("gguf-sd: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    return code


if __name__ == "__main__":
    sys.exit(main())
