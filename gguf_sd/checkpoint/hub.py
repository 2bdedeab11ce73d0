"""Models of the Hugging Face Hub, fetched into its usual cache: only the files that are needed, resumed where an
earlier download was cut short."""

from __future__ import annotations

import os
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

from gguf_sd.checkpoint.hub_files import listed, wanted_files
from gguf_sd.checkpoint.hub_names import HubName, hub_name
from gguf_sd.errors import GgufSdError

SECONDS = 5.0  # until a Hub that does not take connections counts as out of reach
MAIN = "main"
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
    with _bars(quiet):
        return _Repository(name, revision or name.revision or MAIN).fetch()


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
            raise GgufSdError(f"{self.name.repo} holds no {self.name.path}; it holds {listed(sorted(held))}")
        wanted, model = wanted_files(inside, str(self.name))
        paths = [self._file(folder + path) for path in wanted]
        depth = wanted[0].count("/")
        return paths[wanted.index(model)] if model else paths[0].parents[depth]

    def _file(self, path: str) -> Path:
        from huggingface_hub import hf_hub_download

        def download() -> str:
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
        """What the Hub says, or a sentence on why it does not."""
        from huggingface_hub import errors

        repo, at = self.name.repo, f" at {self.revision}" if self.revision != MAIN else ""
        try:
            return ask()
        except errors.GatedRepoError as error:
            raise GgufSdError(
                f"{repo} is gated: accept its terms on https://huggingface.co/{repo} and log in with `hf auth login`, "
                "or set HF_TOKEN"
            ) from error
        except errors.RepositoryNotFoundError as error:
            raise GgufSdError(
                f"there is no {self.name} here, and no model {repo} on the Hub; check the name or, for a private one, "
                "log in with `hf auth login`"
            ) from error
        except errors.RevisionNotFoundError as error:
            raise GgufSdError(f"{repo} has no revision {self.revision}; give a branch, tag or commit") from error
        except errors.LocalEntryNotFoundError as error:
            why = self.why if not self.online else "the Hub cannot be reached"
            raise GgufSdError(f"{repo}/{path} is neither here nor in the Hub's cache, and {why}") from error
        except errors.EntryNotFoundError as error:
            held = f"; it holds {listed(sorted(self._listed()))}" if self.online else ""
            raise GgufSdError(f"{repo}{at} holds no {path}{held}") from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", "no status")
            raise GgufSdError(f"the Hub answers {status} for {repo}{at}; try again later") from error
        except errors.HFValidationError as error:
            raise GgufSdError(f"{self.name} is no name that the Hub knows: {error}") from error
        except OSError as error:
            raise GgufSdError(f"cannot fetch {self.name}: {error.strerror or error}") from error
        except Exception as error:  # of the HTTP library, which changes with the client's version
            if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "requests", "urllib3"):
                raise
            raise GgufSdError(
                f"the connection to the Hub broke off ({type(error).__name__}); try again, what was fetched is kept"
            ) from error


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
def _bars(quiet: bool) -> Iterator[None]:
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
