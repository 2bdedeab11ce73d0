"""What stands before every request: who may ask, from which page, and how much they may send."""

from __future__ import annotations

import base64
import binascii
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gguf_sd.server.errors import ApiError, interface_of, response

OPEN = ("/", "/healthz", "/favicon.ico")  # paths that need no key; and those below
OPEN_BELOW = ("/static/", "/pictures/")  # the page's files; pictures, whose names are secrets
LOCAL = {"127.0.0.1", "localhost", "::1"}
HEADERS = {
    b"content-security-policy": b"default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    b"base-uri 'none'; frame-ancestors 'none'; form-action 'self'",
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
}


@dataclass(frozen=True)
class Rules:
    """``hosts``: names by which the server may be called, any where empty: with those of this machine alone, no page
    of a stranger's can reach a server that is not meant for the network by a name of its own."""

    key: str | None = None
    upload: int = 32 << 20
    hosts: frozenset[str] = frozenset()
    origins: Sequence[str] = ()  # of other pages that may ask


class Guard:
    """ASGI middleware; ``answered`` is told interface and status of every answer."""

    def __init__(self, app: ASGIApp, rules: Rules, answered: Callable[[str, int], object]):
        self.app, self.rules, self.answered = app, rules, answered

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        interface = interface_of(scope["path"])
        seen = 0

        async def bounded() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.rules.upload:
                raise self._too_large()
            return message

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.answered(interface, message["status"])
                present = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *((name, value) for name, value in HEADERS.items() if name not in present),
                ]
            await send(message)

        try:
            self._check(scope)
        except ApiError as error:
            await response(error, interface)(scope, receive, noted)
            return
        await self.app(scope, bounded, noted)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if self.rules.hosts and _name(host) not in self.rules.hosts:
            raise ApiError(421, "the server is not known by this name; see --allow-host", "unknown_host")
        origin = headers.get("origin")
        if origin is not None and _place(origin) != host and not self._allows(origin):
            raise ApiError(403, "pages of other origins may not ask; see --cors-origin", "cross_origin")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length[:20]) > self.rules.upload:
            raise self._too_large()
        path, key = scope["path"], self.rules.key
        if key is None or path in OPEN or path.startswith(OPEN_BELOW) or scope["method"] == "OPTIONS":
            return
        if not hmac.compare_digest(given_key(headers.get("authorization", "")).encode(), key.encode()):
            raise ApiError(
                401, "the API key is missing or wrong; send it as Authorization: Bearer KEY", "invalid_api_key"
            )

    def _allows(self, origin: str) -> bool:
        return origin in self.rules.origins or "*" in self.rules.origins

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the request has more than {self.rules.upload} bytes; send less", "too_large")


def _name(host: str) -> str:
    try:
        return (urlsplit(f"//{host}").hostname or "").lower()
    except ValueError:
        return ""


def _place(origin: str) -> str | None:
    """Name and port of an origin; None for what is none."""
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


def given_key(authorization: str) -> str:
    """The key of ``Bearer KEY``, or of ``Basic`` with any user and the key as password, as AUTOMATIC1111's clients
    send it; empty where there is none."""
    scheme, _, value = authorization.partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() != "basic":
        return ""
    try:
        return base64.b64decode(value, validate=True).decode().partition(":")[2]
    except (binascii.Error, ValueError):
        return ""
