"""The one exception that a user is meant to read."""

from __future__ import annotations


class GgufSdError(Exception):
    """Bad input: one sentence that says what is wrong, where, and what to do. The CLI prints it and exits 2."""
