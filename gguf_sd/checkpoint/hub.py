"""Models of the Hugging Face Hub, fetched into its usual cache: only the files that are needed, resumed where an
earlier download was cut short."""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from gguf_sd.checkpoint.hub_files import listed, wanted_files
from gguf_sd.checkpoint.hub_names import HubName, hub_name
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import shown

SECONDS = 5.0  # until a Hub that does not take connections counts as out of reach
MAIN = "main"
REVISION = re.compile(r"[\w.][\w./+-]{0,250}")
HTTP_LIBRARIES = ("httpx", "httpx2", "httpcore", "requests", "urllib3")  # that the client uses, one version or another
# What the client raises for answers that are none.
NONSENSE = (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)
ETAG = re.compile(r"[\w+-][\w.+-]{0,199}", re.ASCII)
T = TypeVar("T")


def fetched(model: str | os.PathLike[str], revision: str | None = None, quiet: bool = False) -> Path:
    """Where a model lies on the disk: what is there already, else ``org/repo``, ``org/repo/path/file.gguf`` or a link
    of the Hub, fetched now, with a bar on stderr where that is a terminal, unless ``quiet``.

    ``revision``: a branch, tag or commit. Offline (HF_HUB_OFFLINE), and where the Hub cannot be reached, the cache
    serves. Raises GgufSdError for what is not to be had."""
    name = hub_name(model)
    if name is None:
        return Path(model)
    if revision and name.revision and revision != name.revision:
        raise GgufSdError(f"the link names the revision {name.revision}, --revision {revision}; leave one out")
    revision = revision or name.revision or MAIN
    if not REVISION.fullmatch(revision) or ".." in revision:
        raise GgufSdError(f"{shown(revision)} is no revision; give a branch, tag or commit")
    with bars(quiet):
        return _Repository(name, revision).fetch()


class _Repository:
    """A model's name at a revision, and the ways to its files."""

    def __init__(self, name: HubName, revision: str):
        from huggingface_hub import constants

        self.name, self.revision = name, revision
        self.online = not constants.HF_HUB_OFFLINE and hub_answers()
        self.why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"

    def fetch(self) -> Path:
        if self.name.is_file:
            return self._file(self.name.path)
        folder = f"{self.name.path}/" if self.name.path else ""
        held = self._asking(self._listed) if self.online else self._cached()
        inside = [path.removeprefix(folder) for path in held if path.startswith(folder)]
        if not inside:
            if not held:
                raise GgufSdError(f"{self.name.repo} holds no files")
            raise GgufSdError(f"{self.name.repo} holds no {self.name.path}; it holds {listed(sorted(held))}")
        wanted, model = wanted_files(inside, str(self.name))
        paths = [self._file(folder + path) for path in wanted]
        depth = wanted[0].count("/")
        return paths[wanted.index(model)] if model else paths[0].parents[depth]

    def _file(self, path: str) -> Path:
        from huggingface_hub import hf_hub_download

        def download() -> str:
            guard_cache()
            return hf_hub_download(
                self.name.repo, path, revision=self.revision, local_files_only=not self.online, library_name="gguf-sd"
            )

        return Path(self._asking(download, path))

    def _listed(self) -> list[str]:
        from huggingface_hub import HfApi

        siblings = HfApi(library_name="gguf-sd").model_info(self.name.repo, revision=self.revision).siblings or []
        names = [sibling.rfilename for sibling in siblings]
        return [name for name in names if ".." not in name.split("/") and not name.startswith("/")]

    def _cached(self) -> list[str]:
        """What the cache has of the revision. Raises GgufSdError where that is nothing."""
        from huggingface_hub import constants

        root = Path(constants.HF_HUB_CACHE) / "--".join(["models", *self.name.repo.split("/")])
        reference = root / "refs" / self.revision
        commit = reference.read_text().strip() if reference.is_file() else self.revision
        snapshot = root / "snapshots" / commit
        files = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
        if not files:
            raise GgufSdError(f"{self.name} is neither here nor in the Hub's cache, and {self.why}")
        return files

    def _asking(self, ask: Callable[[], T], path: str = "") -> T:
        """As :func:`asking`; what the cache lacks and what a repository lacks is told with what there is."""
        from huggingface_hub import errors

        repo = self.name.repo
        try:
            return asking(repo, ask, self.revision)
        except GgufSdError as refused:
            if isinstance(refused.__cause__, errors.LocalEntryNotFoundError):
                why = self.why if not self.online else "the Hub cannot be reached"
                raise GgufSdError(f"{repo}/{path} is neither here nor in the Hub's cache, and {why}") from None
            if isinstance(refused.__cause__, errors.EntryNotFoundError):
                held = f"; it holds {listed(sorted(self._listed()))}" if self.online else ""
                at = f" at {self.revision}" if self.revision != MAIN else ""
                raise GgufSdError(f"{repo}{at} holds no {path}{held}") from None
            raise


def asking(repo: str, ask: Callable[[], T], revision: str = MAIN) -> T:
    """What the Hub's client returns. Raises GgufSdError, a sentence on why it does not."""
    from huggingface_hub import errors

    try:
        return ask()
    except Exception as error:
        sentence = _refusal(error, repo, revision)
        if sentence is None:
            raise
        if isinstance(error, errors.HFValidationError):
            raise GgufSdError(sentence) from None
        raise GgufSdError(sentence) from error


def _refusal(error: Exception, repo: str, revision: str) -> str | None:
    """The sentence for what the client raises; None for what is no refusal."""
    from huggingface_hub import errors

    login = "log in with `hf auth login`, or set HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is gated: accept its terms on https://huggingface.co/{repo} and {login}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"there is no {repo} here, and no such model on the Hub; check the name or, for a private one, {login}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision}; give a branch, tag or commit"
    if isinstance(error, errors.EntryNotFoundError):
        return f"{repo} lacks a file that was asked for"
    if isinstance(error, errors.LocalTokenNotFoundError):
        return f"the Hub wants to know who you are; {login}"
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", 0)
        advice = {401: login, 403: f"the token must be allowed to write to {repo}"}.get(status, "try again later")
        return f"the Hub answers {status} for {repo}; {advice}"
    if isinstance(error, errors.HFValidationError):
        return f"{repo} is no name that the Hub knows: {error}"
    if isinstance(error, errors.OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it to reach the Hub"
    if type(error).__module__.split(".")[0] in HTTP_LIBRARIES and not isinstance(error, json.JSONDecodeError):
        return f"the connection to the Hub broke off ({type(error).__name__}); try again, what was fetched is kept"
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):  # of a file among several
        return _refusal(error.__cause__, repo, revision)
    if isinstance(error, NONSENSE):  # before OSError: requests' JSON error is one
        return f"the Hub's answer for {repo} makes no sense ({type(error).__name__}); is there another program between?"
    if isinstance(error, OSError):
        return f"cannot fetch from or write to {repo}: {error.strerror or ' '.join(str(error).split())}"
    return None


def guard_cache() -> None:
    """The client names files of its cache by the ETag that it is told. One that leads out of the cache is refused."""
    from huggingface_hub import file_download

    known = getattr(file_download, "_normalize_etag", None)
    if known is None or getattr(known, "guards", False):
        return

    @wraps(known)
    def checked(etag: str | None) -> str | None:
        plain: str | None = known(etag)
        if plain is not None and not ETAG.fullmatch(plain):
            raise ValueError(f"the ETag {shown(plain)}")
        return plain

    checked.guards = True  # type: ignore[attr-defined]
    file_download._normalize_etag = checked


def hub_answers() -> bool:
    """Whether the Hub takes connections: its client retries for long where it does not. Behind a proxy only trying
    tells."""
    from huggingface_hub.constants import ENDPOINT

    address = urlsplit(ENDPOINT)
    if address.scheme in urllib.request.getproxies() or address.hostname is None:
        return True
    try:
        port = address.port or (80 if address.scheme == "http" else 443)
        socket.create_connection((address.hostname, port), timeout=SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def bars(quiet: bool) -> Iterator[None]:
    """The client's own bars, for terminals alone."""
    from huggingface_hub import utils

    silent = quiet or not sys.stderr.isatty()
    if not silent or utils.are_progress_bars_disabled():
        yield
        return
    utils.disable_progress_bars()
    try:
        yield
    finally:
        utils.enable_progress_bars()
