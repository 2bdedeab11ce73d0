"""What argparse finds wrong with a command line, as one sentence that says what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence

KINDS = {"int": "a whole number", "float": "a number", "Path": "a path"}
ARGUMENT = re.compile(r"argument (?P<name>\S+): (?P<what>.*)", re.DOTALL)
INVALID = re.compile(r"invalid (?P<kind>.+?) value: (?P<value>.*)", re.DOTALL)
CHOICE = re.compile(r"invalid choice: (?P<value>.*?) \(choose from (?P<choices>.*)\)", re.DOTALL)


def sentence(message: str, program: str, commands: Sequence[str]) -> str:
    """``message`` is what argparse gives to ``ArgumentParser.error``, ``program`` the parser's ``prog``."""
    hint = f"see {program} --help"
    if found := ARGUMENT.fullmatch(message):
        return _argument(found["name"].split("/")[-1], found["what"], commands)
    if message.startswith("unrecognized arguments: "):
        return f"unknown argument {message.removeprefix('unrecognized arguments: ')}; {hint}"
    if message.startswith("the following arguments are required: "):
        missing = message.removeprefix("the following arguments are required: ").split(", ")
        names = [name.split("/")[-1] for name in missing]
        if names == ["COMMAND"]:
            return f"give a command: {', '.join(commands)}; {hint}"
        return f"{' and '.join(n if n.startswith('-') else n.upper() for n in names)} must be given; {hint}"
    return f"{message}; {hint}"


def _argument(name: str, what: str, commands: Sequence[str]) -> str:
    if found := CHOICE.fullmatch(what):
        value, choices = found["value"], found["choices"].replace("'", "")
        if name == "COMMAND":
            return f"no command {value}{_nearest(value.strip(chr(39)), commands)}; choose from {', '.join(commands)}"
        return f"{name} takes {' or '.join(choices.split(', '))}, got {value}"
    if found := INVALID.fullmatch(what):
        return f"{name} takes {KINDS.get(found['kind'], 'a ' + found['kind'])}, got {found['value']}"
    if what == "expected one argument":
        return f"{name} takes a value"
    return f"{name}: {what}"


def _nearest(value: str, commands: Sequence[str]) -> str:
    import difflib

    close = difflib.get_close_matches(value, commands, 1)
    return f", did you mean {close[0]}" if close else ""
