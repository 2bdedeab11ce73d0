"""The one exception that a user is meant to read."""

from __future__ import annotations


class GgufSdError(Exception):
    """Bad input: one sentence saying what is wrong, where, and what to do. The CLI prints it, exit code 2."""
