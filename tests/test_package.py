"""The source archive makes the wheel, and the wheel runs from outside the checkout."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    every = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | environment
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, cwd=cwd, env=every)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("hatchling") is None, reason="needs hatchling, which builds the package")
def test_archive_and_wheel(tmp_path: Path) -> None:
    run(sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", tmp_path / "sdist", cwd=ROOT)
    (sdist,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    (source,) = (tmp_path / "source").iterdir()
    run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path / "wheel", cwd=source)
    (wheel,) = (tmp_path / "wheel").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if "dist-info" not in name} == {
        "gguf_sd", "gguf_sd_kernels", "gguf_sd_convert"
    }  # fmt: skip
    sources = {name.rpartition("/")[2] for name in names if "/cpu/native/" in name}
    assert {path.name for path in (ROOT / "kernels/gguf_sd_kernels/cpu/native").glob("*.*")} == sources
    installed = tmp_path / "installed"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "-t", installed, wheel, cwd=tmp_path)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {"PYTHONPATH": str(installed), "GGUF_SD_CACHE": str(tmp_path / "cache")}
    where = "import gguf_sd, gguf_sd_kernels, gguf_sd_convert as c; print(gguf_sd.__file__, c.__file__)"
    found = run(sys.executable, "-P", "-c", where, cwd=elsewhere, **environment).split()
    assert all(str(installed) in path for path in found)
    assert run(installed / "bin" / "gguf-sd", "--version", cwd=elsewhere, **environment).startswith("gguf-sd ")
    run(sys.executable, "-P", "-m", "gguf_sd", "generate", "-p", "a red circle", "--steps", "1", "--device", "cpu",
        cwd=elsewhere, **environment)  # fmt: skip
    assert [path.name for path in elsewhere.iterdir()] == ["out-0001.png"]


def test_the_lock_of_the_demo_holds_what_is_required() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [line for line in (ROOT / "demo.lock").read_text().splitlines() if not line.startswith("#")]
    locked = dict(line.split("==") for line in lines)
    for requirement in map(Requirement, project["dependencies"]):
        assert requirement.specifier.contains(locked[requirement.name.lower().replace("_", "-")]), requirement
