"""Pictures that wait in memory to be fetched by their address."""

from __future__ import annotations

import secrets
import threading
import time
from collections import OrderedDict

from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

from gguf_sd.server.errors import ApiError

SECONDS = 3600.0
MAX_BYTES = 256 << 20


class Store:
    """The newest pictures, each for an hour at most, under names that nobody can guess."""

    def __init__(self, most: int = MAX_BYTES, seconds: float = SECONDS):
        self.most, self.seconds, self.nbytes = most, seconds, 0
        self._kept: OrderedDict[str, tuple[float, bytes, str]] = OrderedDict()
        self._lock = threading.Lock()

    def keep(self, content: bytes, kind: str) -> str:
        """Its name; ``kind`` is the content type."""
        name = secrets.token_urlsafe(24)
        with self._lock:
            self._kept[name] = (time.monotonic() + self.seconds, content, kind)
            self.nbytes += len(content)
            while self._kept and (self.nbytes > self.most or next(iter(self._kept.values()))[0] < time.monotonic()):
                _, (_, old, _) = self._kept.popitem(last=False)
                self.nbytes -= len(old)
        return name

    def get(self, name: str) -> tuple[bytes, str] | None:
        with self._lock:
            found = self._kept.get(name)
        return None if found is None or found[0] < time.monotonic() else found[1:]

    def routes(self) -> list[Route]:
        return [Route("/pictures/{name}", self._fetch, methods=["GET"])]

    async def _fetch(self, http: HttpRequest) -> Response:
        if (found := self.get(http.path_params["name"])) is None:
            raise ApiError(404, "there is no such picture; they are kept for an hour at most")
        return Response(found[0], media_type=found[1])
