"""Which model of the Hub a file was made from, as GGUF's metadata and model cards say it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.hub_names import cached_repo

HUB = "https://huggingface.co/"


def base_model_keys(source: Path) -> dict[str, Any]:
    """Nothing for a source that is not in the Hub's cache."""
    if (repo := cached_repo(source)) is None:
        return {}
    organization, _, name = repo.rpartition("/")
    values = {keys.BASE_COUNT: 1, keys.BASE_NAME: name, keys.BASE_URL: HUB + repo}
    return values | ({keys.BASE_ORGANIZATION: organization} if organization else {})
