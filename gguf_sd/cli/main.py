"""The command line: `gguf-sd COMMAND …`. Only the command that is asked for is imported."""

from __future__ import annotations

import argparse
import importlib
import logging
import signal
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from gguf_sd.cli.parse_errors import sentence
from gguf_sd.cli.terminal import complain, discard_output, of_the_system, open_streams, printable
from gguf_sd.errors import GgufSdError

# The module gguf_sd.cli.NAME of each command, and what its parser calls itself.
COMMANDS = {
    "demo": "convert a built-in model to four types and compare them",
    "convert": "make a GGUF file from a checkpoint",
    "pack": "join a UNet and its other parts into one file",
    "generate": "paint pictures from a prompt",
    "batch": "paint a file of prompts",
    "serve": "serve models by HTTP and on a page",
    "inspect": "show what a model file or folder holds",
    "push": "upload a GGUF file to the Hugging Face Hub",
    "bench": "compare models: pictures, times, memory",
    "tune": "measure the GPU kernels for a model",
    "cache": "list or clear the models that generate has converted",
}
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141  # as a shell reports a program that SIGPIPE ended


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except GgufSdError as error:
        complain(str(error))
        return EXIT_BAD_INPUT
    except BrokenPipeError:  # the reader of our output has gone, `| head` for one
        discard_output()
        return EXIT_BROKEN_PIPE
    except OSError as error:  # of files that are no part of the job: our own output on a full disk
        complain(of_the_system(error))
        discard_output()
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        complain("interrupted")
        return EXIT_INTERRUPTED
    return code


def run() -> NoReturn:
    """`gguf-sd` as a program: once a command has ended, an interruption cannot turn its exit code into a traceback."""
    open_streams()
    code = main()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def _run(arguments: Sequence[str]) -> int:
    try:
        args = _parser(arguments).parse_args(arguments)
    except SystemExit as done:  # --help and --version have printed what was asked for
        return int(done.code or 0)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Printable("%(levelname)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    code: int = args.run(args)
    return code


def _parser(arguments: Sequence[str]) -> argparse.ArgumentParser:
    """With the arguments of the command that is asked for, and no more than the names of the others."""
    parser = _Parser(prog="gguf-sd", description="Stable Diffusion in one quantised GGUF file.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the program's version and exit")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    wanted = next((argument for argument in arguments if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        if name == wanted:
            parser.command = name
            importlib.import_module(f"gguf_sd.cli.{name}").add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser


class _Parser(argparse.ArgumentParser):
    """Bad arguments are bad input as any other: one sentence, no usage."""

    command = ""  # that is asked for: argparse lets the topmost parser complain of what its command does not know

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse's own keeps silent about a disk that is full."""
        (file or sys.stderr).write(message)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        """What an abbreviation may mean; argparse's own takes two names of one option, as --init-img and --init-image,
        for two options."""
        found: list[Any] = super()._get_option_tuples(option_string)
        return found[:1] if len({(action.dest, action.const) for action, *_ in found}) == 1 else found

    def error(self, message: str) -> NoReturn:
        program = f"{self.prog} {self.command}" if self.command else self.prog
        raise GgufSdError(sentence(message, program, list(COMMANDS)))


class _Version(argparse.Action):
    """Looks the version up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *args: object) -> NoReturn:
        import gguf_sd

        print(f"gguf-sd {gguf_sd.__version__}")
        parser.exit()


class _Printable(logging.Formatter):
    """What warnings quote from files cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


if __name__ == "__main__":
    run()
