"""What a comparison is made of: contestants, prompts, sampling settings. Written to, and read from, ``bench.toml``."""

from __future__ import annotations

import json
import re
import tomllib
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from gguf_sd.bench.peers import PEERS
from gguf_sd.bench.prompts import MAX_PROMPTS
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called, shown
from gguf_sd.input_files import open_input

# Settings of sampling: what each preset asks for, picture by picture.
PRESETS: dict[str, list[dict[str, Any]]] = {
    "quick": [{"steps": 8}],
    "model": [{}],
    "sd15-card": [{"steps": 50, "sampler": "pndm", "guidance": g} for g in (1.5, 2, 3, 4, 5, 6, 7, 8)],
    "turbo": [{"steps": n, "guidance": 0} for n in (1, 2, 4)],
}
SETTINGS = {"steps": (1, 1000), "guidance": (0, 100), "width": (8, 1 << 14), "height": (8, 1 << 14)}
KINDS: dict[str, type] = {"seed": int, "rounds": int, "errors": bool} | dict.fromkeys(
    ("device", "dtype", "weights", "clip", "lpips", "fid", "sdcpp"), str
)  # of what is not a list
MAX_BYTES = 1 << 22
MAX_MARKS = 60_000  # brackets, commas and equals signs outside of strings
MAX_PARTS = 9
DOTTED = re.compile(rf"""(?:\.["\w \t-]*){{{MAX_PARTS}}}""")
# Strings, ended or not, and comments; what is matched once is not given up again.
STRINGS = re.compile(
    r'''"""(?:[^"\\]|\\.|"{1,2}(?!"))*+"{0,5}'''
    r"""|'{3}(?:[^']|'{1,2}(?!'))*+'{0,5}"""
    r"""|"(?:[^"\\\n]|\\.)*+"?"""
    r"""|'[^'\n]*+'?|\#[^\n]*+""",
    re.DOTALL,
)
TAKES: dict[type, str] = {int: "a whole number", bool: "true or false", str: "texts", dict: "tables"}
NAME = re.compile(r"[\w.+@-]{1,80}")


@dataclass(frozen=True)
class Contestant:
    """A model and the program that paints with it: ``gguf-sd``, or one of PEERS. ``source`` and ``way``: what the
    model was converted from, as the command named it, and how, so that it can be made again."""

    name: str
    model: str  # path
    program: str = "gguf-sd"
    source: str = ""
    way: str = ""  # a word of --types


@dataclass(frozen=True)
class Spec:
    """A whole comparison. The first contestant's pictures are what the others are compared with."""

    contestants: tuple[Contestant, ...]
    prompts: tuple[str, ...]
    settings: tuple[dict[str, Any], ...] = ({},)  # pictures take them in turn
    seed: int = 0  # of the first picture; each next has one more
    rounds: int = 3
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "auto"
    errors: bool = True  # of the UNet's output by timestep, on recorded calls
    clip: str = ""  # folder of a CLIP model, for CLIP scores
    lpips: str = ""  # file of a backbone, for LPIPS
    fid: str = ""  # file of an Inception, for FID
    sdcpp: str = ""  # stable-diffusion.cpp's program
    recorded: dict[str, Any] = field(default_factory=dict)  # versions, device, command

    def __post_init__(self) -> None:
        names = [c.name for c in self.contestants]
        if not names:
            raise GgufSdError("a comparison takes at least one contestant")
        if twice := [name for i, name in enumerate(names) if name in names[:i]]:
            raise GgufSdError(f"two contestants are called {shown(twice[0])}; a comparison takes different ones")
        if bad := [name for name in names if not NAME.fullmatch(name)]:
            raise GgufSdError(f"{shown(bad[0])} is no name for a contestant; it takes letters, digits and . + @ - _")
        if programs := {c.program for c in self.contestants} - {"gguf-sd", *PEERS}:
            raise GgufSdError(f"no peer {shown(min(programs))}; choose from {', '.join(PEERS)}")
        if not self.prompts:
            raise GgufSdError("a comparison takes at least one prompt")
        if not 1 <= self.rounds <= 100:
            raise GgufSdError(f"rounds is {shown(self.rounds)}; it takes 1 … 100")
        if not 0 <= self.seed < 1 << 63:
            raise GgufSdError(f"seed is {shown(self.seed)}; it takes 0 … 2^63 - 1")
        for settings in self.settings:
            _check_settings(settings)

    def job(self, i: int) -> tuple[str, int, dict[str, Any]]:
        """Prompt, seed and settings of picture ``i``."""
        return self.prompts[i], self.seed + i, self.settings[i % len(self.settings)]

    def of_round(self, number: int) -> list[int]:
        """The pictures that are painted in a round: every ``rounds``-th."""
        return list(range(len(self.prompts)))[number :: self.rounds]

    def to_toml(self, folder: Path | None = None) -> str:
        """The text of ``bench.toml``; models inside ``folder`` are named from there, so that it can
        be moved, others as the command named them."""
        plain = asdict(self)
        for contestant in plain["contestants"]:
            path = Path(contestant["model"])
            if folder is not None and path.is_relative_to(folder.resolve()):
                contestant["model"] = path.relative_to(folder.resolve()).as_posix()
            elif contestant["source"] and not contestant["way"]:
                contestant["model"] = contestant["source"]
        lines = ["# gguf-sd bench FILE makes this comparison again.", ""]
        for name in KINDS:
            lines.append(f"{name} = {_value(plain[name])}")
        lines += ["prompts = [", *(f"  {_value(prompt)}," for prompt in self.prompts), "]"]
        lines += ["settings = [", *(f"  {_value(settings)}," for settings in self.settings), "]", ""]
        for contestant in plain["contestants"]:
            lines += ["[[contestants]]", *(f"{key} = {_value(value)}" for key, value in contestant.items()), ""]
        lines += ["[recorded]", *(f"{key} = {_value(value)}" for key, value in self.recorded.items())]
        return "\n".join(lines) + "\n"

    @classmethod
    def from_toml(cls, path: Path) -> Spec:
        """Raises GgufSdError for a file that is none, or names and values that are unknown."""
        table = _table(path)
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(table) - known):
            raise GgufSdError(f"{path}: unknown key {shown(unknown[0])}; it takes {', '.join(sorted(known))}")
        try:
            contestants = tuple(Contestant(**_strings(c)) for c in _list(table, "contestants", dict))
            prompts, settings = _list(table, "prompts", str), _list(table, "settings", dict)
            for name, kind in (KINDS | {"recorded": dict}).items():
                if name in table and type(table[name]) is not kind:
                    raise TypeError(f"{name} is {shown(table[name])}; it takes {TAKES[kind]}")
            if bad := next(
                (x for x in table.get("recorded", {}).values() if not isinstance(x, str | int | float)), None
            ):
                raise TypeError(f"recorded holds {shown(bad)}; it takes texts and numbers")
            return cls(contestants, tuple(prompts), tuple(settings) or ({},), **table)
        except (TypeError, GgufSdError) as error:
            raise GgufSdError(f"{path}: {called(str(error))}") from error


def _table(path: Path) -> dict[str, Any]:
    try:
        with open_input(path) as file:
            raw = file.read(MAX_BYTES + 1)
        if len(raw) > MAX_BYTES:
            raise GgufSdError(f"{path} has more than {MAX_BYTES} bytes; give a bench.toml")
        text = raw.decode()
        _check_structure(path, text)
        return tomllib.loads(text)
    except OSError as error:
        raise GgufSdError(f"cannot read {path}: {error.strerror}") from error
    except RecursionError:
        raise GgufSdError(f"{path} is no TOML that can be read: it is nested too deeply") from None
    except ValueError as error:  # no UTF-8, no TOML, or a number of more digits than Python reads
        raise GgufSdError(f"{path} is no TOML: {called(str(error))}") from error


def _check_structure(path: Path, text: str) -> None:
    """Names of thousands of parts take Python's parser hours, millions of values take it long."""
    rest = STRINGS.sub('""', text)
    if DOTTED.search(rest):
        raise GgufSdError(f"{path} is no bench.toml: a name in it has more than {MAX_PARTS} parts")
    if sum(rest.count(mark) for mark in "=,[{") > MAX_MARKS:
        raise GgufSdError(f"{path} is no bench.toml: it holds more than {MAX_MARKS:,} values")


def _check_settings(settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        if key in ("sampler", "schedule"):
            if not isinstance(value, str):
                raise GgufSdError(f"{key} is {shown(value)}; it takes a name")
        elif key not in SETTINGS:
            raise GgufSdError(
                f"unknown setting {shown(key)}; choose from {', '.join([*SETTINGS, 'sampler', 'schedule'])}"
            )
        elif isinstance(value, bool) or not isinstance(value, int | float):
            raise GgufSdError(f"{key} is {shown(value)}; it takes a number")
        elif not SETTINGS[key][0] <= value <= SETTINGS[key][1]:
            raise GgufSdError(f"{key} is {shown(value)}; it takes {SETTINGS[key][0]} … {SETTINGS[key][1]}")


def _list(table: dict[str, Any], name: str, kind: type) -> list[Any]:
    """Takes a list out of a table. Raises TypeError for what is none, or holds anything but ``kind``."""
    values = table.pop(name, [])
    if not isinstance(values, list) or len(values) > MAX_PROMPTS:
        raise TypeError(f"{name} is {shown(values)}; it takes a list of up to {MAX_PROMPTS}")
    if (bad := next((value for value in values if not isinstance(value, kind)), None)) is not None:
        raise TypeError(f"{name} holds {shown(bad)}; it takes {TAKES[kind]}")
    return values


def _strings(table: dict[str, Any]) -> dict[str, str]:
    for key, value in table.items():
        if not isinstance(value, str):
            raise TypeError(f"{called(key)} of a contestant is {shown(value)}; it takes a text")
    return table


def _value(value: Any) -> str:
    """A value as TOML: JSON's strings, numbers and booleans are TOML's too."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_value(item)}" for key, item in value.items()) + " }" if value else "{}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    return json.dumps(value).replace("\x7f", "\\u007f")
