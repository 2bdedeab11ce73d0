"""`gguf-sd push`: a GGUF file to the Hugging Face Hub, with a model card."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gguf_sd.checkpoint.hub_names import PART
from gguf_sd.errors import GgufSdError

if TYPE_CHECKING:
    from gguf_sd.checkpoint.model_card import CardSubject

CARD = "README.md"
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,60}")


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "push",
        help="upload a GGUF file to the Hugging Face Hub",
        description="Uploads a GGUF file with a model card that says what it is. The repository is created where it is "
        "not there; a card that is there gets a row for the file, if it is one of ours, and stays as it is otherwise. "
        "The token is that of `hf auth login`, or HF_TOKEN.",
    )
    add = parser.add_argument
    add("file", type=Path, help="the .gguf file")
    add("repo", help="org/repo, or user/repo")
    add("--name", help="what the file is called there (as here)")
    add("--base-model", metavar="ORG/REPO", help="the model that it was made from (what the file says)")
    add("--license", help="license of the model, as the Hub calls it: openrail++, creativeml-openrail-m, …")
    add("--private", action="store_true", help="a repository that is created is private")
    add("--force", action="store_true", help="replace a file of this name in the repository")
    add("--quiet", action="store_true", help="no progress bars")
    add("--json", action="store_true", help="print what was uploaded as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from gguf_sd.checkpoint.model_card import subject_of

    for what, name in (("REPO", args.repo), ("--base-model", args.base_model)):
        if name is not None and not all(PART.fullmatch(part) for part in _two(name)):
            raise GgufSdError(f"{what} is {name!r}; it takes a repository's name, org/repo")
    if args.license is not None and not LICENSE.fullmatch(args.license.replace("+", "")):
        raise GgufSdError(f"--license is {args.license!r}; it takes a license as the Hub calls it, such as openrail++")
    name = args.name or args.file.name
    if "/" in name or not name.endswith(".gguf"):
        raise GgufSdError(f"the file's name there is {name!r}; it takes one that ends in .gguf, without folders")
    subject = replace(subject_of(args.file), name=name)
    facts = _push(args, subject)
    if args.json:
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{facts['file']}  {facts['bytes'] / 1e6:,.1f} MB")
    if not facts["card"] and not args.quiet:
        print(f"the {CARD} there is not gguf-sd's and stays as it is", file=sys.stderr)
    return 0


def _two(name: str) -> list[str]:
    parts = name.split("/")
    return parts if len(parts) == 2 else [""]


def _push(args: argparse.Namespace, subject: CardSubject) -> dict[str, Any]:
    """Uploads file and card in one commit. Raises GgufSdError for what the Hub refuses."""
    from huggingface_hub import CommitOperationAdd, HfApi

    from gguf_sd.checkpoint.hub import asking, bars

    api, repo = HfApi(library_name="gguf-sd"), args.repo
    with bars(args.quiet or args.json):
        asking(repo, lambda: api.create_repo(repo, private=args.private or None, exist_ok=True))
        held = [s.rfilename for s in asking(repo, lambda: api.model_info(repo)).siblings or []]
        if subject.name in held and not args.force:
            raise GgufSdError(f"{repo} holds a file {subject.name} already; --force replaces it, --name takes another")
        text = _card(args, subject, held)
        operations = [CommitOperationAdd(subject.name, str(args.file))]
        operations += [] if text is None else [CommitOperationAdd(CARD, text.encode())]
        message = f"Upload {subject.name} with gguf-sd"
        try:
            done = asking(repo, lambda: api.create_commit(repo, operations, commit_message=message))
        except ValueError as error:  # what it says of the card, a line each
            lines = [line.strip(" -") for line in str(error).splitlines() if line.strip()]
            raise GgufSdError(f"the Hub refuses the model card: {'; '.join(lines)}") from error
    return {
        "repo": repo,
        "file": f"{repo}/{subject.name}",
        "bytes": subject.nbytes,
        "type": subject.type,
        "card": text is not None,
        "commit": done.commit_url,
    }


def _card(args: argparse.Namespace, subject: CardSubject, held: list[str]) -> str | None:
    """A new card, ours with the file in it, or None where there is one that is not ours."""
    from huggingface_hub import hf_hub_download

    from gguf_sd.checkpoint.hub import asking, guard_cache
    from gguf_sd.checkpoint.model_card import card, updated

    if CARD not in held:
        return card(subject, args.repo, args.base_model or "", args.license or "")
    guard_cache()
    path = asking(args.repo, lambda: hf_hub_download(args.repo, CARD, library_name="gguf-sd"))
    return updated(Path(path).read_text(encoding="utf-8", errors="replace"), subject)
