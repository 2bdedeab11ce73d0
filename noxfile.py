"""Versions and supply by command: `pip install nox`, then `nox -s oldest`, `nox -s newest`, `nox -s audit`.

CI runs what constraints.txt pins; these are for before a release.
"""

from __future__ import annotations

import re
from pathlib import Path

import nox

nox.options.sessions = ["newest"]
# The oldest that pyproject.toml takes; CUDA builds of torch require a Triton of their own.
OLDEST = ("torch==2.11.0", "transformers==4.50.0", "numpy==2.0.0", "Pillow==10.3.0", "safetensors==0.5.0",
          "gguf==0.17.0", "huggingface_hub==0.34.0", "tqdm==4.60.0", "diffusers==0.35.0",
          "accelerate==1.0.0", "peft==0.17.0")  # fmt: skip


def _tests(session: nox.Session) -> None:
    session.run("python", "-m", "pytest", "-q", "-n", "auto", *session.posargs, env={"OMP_NUM_THREADS": "1"})


@nox.session
def oldest(session: nox.Session) -> None:
    """The tests on the oldest supported versions."""
    session.install("-e", ".[test]", *OLDEST)
    _tests(session)


@nox.session
def newest(session: nox.Session) -> None:
    """The tests on whatever is newest within pyproject.toml's bounds."""
    session.install("--upgrade", "-e", ".[test]")
    _tests(session)


@nox.session
def audit(session: nox.Session) -> None:
    """Known vulnerabilities of what is installed to run (not to test) gguf-sd; asks PyPI, and fails where PyPI's answer
    leaves a package out."""
    session.install(".", "-c", "constraints.txt", "pip-audit")
    listed = session.run("python", "-m", "pip", "list", "--format", "freeze", "--exclude", "gguf-sd", silent=True)
    pinned = Path(session.create_tmp()) / "installed.txt"
    pinned.write_text(re.sub(r"\+\w+$", "", str(listed), flags=re.MULTILINE))  # torch's "+cpu" is no version of PyPI's
    session.run("pip-audit", "--strict", "--disable-pip", "--no-deps", "-r", str(pinned), *session.posargs)
