"""What a user may call a model that is not on the disk: names and links of the Hugging Face Hub.

Nothing is imported that is heavy, or asks the network.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown
from gguf_sd.input_files import is_there

FILES = (".gguf", ".safetensors", ".ckpt", ".pt", ".pth", ".bin")  # of weights
PART = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_-])?")  # of a repository's name, as the Hub has them
LINK = re.compile(r"https?:/+", re.IGNORECASE)  # a Path has lost one of the slashes
HOSTS = {"huggingface.co", "www.huggingface.co", "hf.co"}
MAX_NAME = 1000  # characters
EXAMPLE = "https://huggingface.co/org/repo/blob/main/file.gguf"


@dataclass(frozen=True)
class HubName:
    """``repo``: org/name; ``path``: a file or folder in it, empty for the whole; ``revision``: a branch, tag or commit
    that a link names."""

    repo: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}" if self.path else self.repo

    @property
    def is_file(self) -> bool:
        return self.path.lower().endswith(FILES)


def hub_name(text: str | os.PathLike[str]) -> HubName | None:
    """What a model is called on the Hub; None for what is there on the disk, or looks like a path. Raises GgufSdError
    for links that lead to no model."""
    name = os.fspath(text)
    if len(name) > MAX_NAME or is_there(Path(name)):
        return None
    if LINK.match(name):
        return _of_link(LINK.sub("https://", name))
    parts = name.split("/")
    if len(parts) < 2 or not all(PART.fullmatch(part) for part in parts[:2]) or not _clean(parts[2:]):
        return None
    path = "/".join(parts[2:])
    if (not path and name.lower().endswith(FILES)) or Path(parts[0]).is_dir():
        return None  # a file, or the folder of one, that is not there
    return HubName(f"{parts[0]}/{parts[1]}", path)


def _clean(parts: list[str]) -> bool:
    """Whether these lead to something below."""
    return all(part not in ("", ".", "..") and "\\" not in part for part in parts)


def _of_link(link: str) -> HubName:
    try:
        address = urlsplit(link)
    except ValueError:  # a bracket that belongs to no address
        raise GgufSdError(f"{shown(link)} is no link; give one such as {EXAMPLE}") from None
    own = urlsplit(os.environ.get("HF_ENDPOINT", "")).netloc
    if address.netloc.lower() not in HOSTS | ({own.lower()} if own else set()):
        raise GgufSdError(
            f"{shown(link)} is no link to the Hugging Face Hub; download the file, and give where it lies"
        )
    parts = [unquote(part) for part in address.path.split("/") if part]
    revision = None
    if len(parts) > 3 and parts[2] in ("blob", "resolve", "tree", "raw"):
        if parts[3] == "refs" and len(parts) > 5:  # refs/pr/1, which a link may leave unquoted
            parts[3:6] = ["/".join(parts[3:6])]
        revision, parts = parts[3], parts[:2] + parts[4:]
    if len(parts) < 2 or not all(PART.fullmatch(part) for part in parts[:2]) or not _clean(parts[2:]):
        raise GgufSdError(f"{shown(link)} is no link to a model; give one such as {EXAMPLE}")
    return HubName(f"{parts[0]}/{parts[1]}", "/".join(parts[2:]), revision)


def cached_repo(path: Path) -> str | None:
    """The repository, org/name, that a file or folder in the Hub's cache is of; None for what is none."""
    for folder in Path(os.path.abspath(path)).parents:
        if folder.name == "snapshots" and folder.parent.name.startswith("models--"):
            return "/".join(folder.parent.name.removeprefix("models--").split("--", 1))
    return None


def plain_name(path: Path) -> str:
    """What a file or folder is called; of a repository in the Hub's cache, whose folder is called by a commit, the
    repository's own name."""
    path = Path(os.path.abspath(path))
    if path.parent.name == "snapshots" and (repo := cached_repo(path)) is not None:
        return repo.rpartition("/")[2]
    return path.name
