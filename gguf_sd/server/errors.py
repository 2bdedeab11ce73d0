"""Errors as each interface words them."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import JSONResponse

from gguf_sd.errors import GgufSdError
from gguf_sd.server.tickets import QueueFullError, ShuttingDownError


@dataclass
class ApiError(Exception):
    """An answer that is no success: one sentence."""

    status: int
    message: str
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None


def interface_of(path: str) -> str:
    """Which interface a path belongs to."""
    if path.startswith("/v1/"):
        return "openai"
    return "a1111" if path.startswith("/sdapi/") else "page"


def as_api_error(error: Exception, interface: str) -> ApiError:
    """What the caller is told of an exception; what is none of the project's own tells nothing."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), "queue_full", retry_after=error.retry_after)
    if isinstance(error, ShuttingDownError):
        return ApiError(503, str(error), "shutting_down", retry_after=10)
    if isinstance(error, GgufSdError):
        return ApiError(422 if interface == "a1111" else 400, str(error), "invalid_value")
    return ApiError(500, "something failed inside the server; its log says what", "internal_error")


def response(error: ApiError, interface: str) -> JSONResponse:
    """In the form of the interface: OpenAI's ``{"error": {…}}``, AUTOMATIC1111's ``{"error", "detail", …}``, or
    ``{"detail"}``."""
    message, param = _unicode(error.message), error.param and _unicode(error.param)
    if interface == "openai":
        kind = "invalid_request_error" if error.status < 500 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(error.status, kind)
        body: dict[str, object] = {"error": {"message": message, "type": kind, "param": param, "code": error.code}}
    elif interface == "a1111":
        body = {"error": "HTTPException", "detail": message, "body": "", "errors": message}
    else:
        body = {"detail": message}
    headers = {"Retry-After": str(error.retry_after)} if error.retry_after else {}
    if error.status == 401:
        headers["WWW-Authenticate"] = "Basic" if interface == "a1111" else "Bearer"
    return JSONResponse(body, error.status, headers)


def _unicode(text: str) -> str:
    """Without halves of surrogate pairs, which JSON can name and UTF-8 has not."""
    return text.encode("utf-8", "backslashreplace").decode()
