"""Where finished pictures go: to numbered files that were free, or to the name asked for, never over what is a
stranger's or an input."""

from __future__ import annotations

import logging
import os
import re
import secrets
from collections.abc import Iterable, Sequence
from pathlib import Path

from PIL import Image

from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.images import open_image
from gguf_sd.imaging.png_metadata import PARAMETERS, text_of, written_by_us
from gguf_sd.imaging.save_png import save_png
from gguf_sd_kernels.writers import remove_stale, temporary_name

STEM = "out"
NUMBERED = re.compile(rf"{STEM}-([0-9]{{4,9}})(?:\.preview)?\.png", re.IGNORECASE)

log = logging.getLogger(__name__)


class Outputs:
    """The files of one run.

    Without a name, pictures take the numbers after the highest in the current folder, ``out-0001.png`` and on. A name
    is taken as it is for one picture, with ``-1``, ``-2``, … for several; a file that exists there is replaced where
    we wrote it, or with ``force``. ``inputs`` are the files and folders that the run reads: nothing is written onto
    them, by whatever path they are reached.
    """

    def __init__(self, output: Path | None, count: int = 1, inputs: Sequence[Path] = (), force: bool = False):
        """Raises GgufSdError where the pictures cannot be written, so that it is found before they are painted."""
        self.inputs, self.force, self.numbered = inputs, force, output is None
        if output is None:
            self._next = _free_number(Path())
            output = Path(f"{STEM}-{self._next:04d}.png")
        elif output.suffix.lower() != ".png":
            raise GgufSdError(f"the output {output} must end in .png: the settings are kept in PNG text")
        self.output, self.count = output, count
        _check_folder(output)
        self.preview = output.with_suffix(".preview.png")
        for index in range(0 if self.numbered else count):
            self._check(self.named(index))

    def finished(self, index: int) -> str | None:
        """The settings in picture ``index``, where an earlier run has left it there whole. Raises GgufSdError for a run
        without a name."""
        if self.numbered:
            raise GgufSdError("--resume goes on with the pictures of --output; give that of the earlier run")
        path = self.named(index)
        if not written_by_us(path):
            return None
        try:
            return text_of(open_image(path))
        except GgufSdError:  # damaged: it is painted again
            return None

    def check_preview(self) -> None:
        """Raises GgufSdError where previews would replace a file that is not ours."""
        self._check(self.preview)

    def save_preview(self, image: Image.Image, text: str) -> None:
        """Replaces the last preview of this run."""
        self._check(self.preview)
        save_png(image, self.preview, {PARAMETERS: text})

    def save(self, image: Image.Image, index: int, text: str) -> Path:
        """Writes picture ``index`` of the run with its settings; the path that it got."""
        if self.numbered:
            return self._save_numbered(image, text)
        path = self.named(index)
        try:
            self._check(path)
            save_png(image, path, {PARAMETERS: text}, replace=os.path.lexists(path))
            return path
        except (GgufSdError, FileExistsError):
            if not os.path.lexists(path):
                raise
        # Somebody has put a file there meanwhile; the picture is not lost for that.
        other = path.with_name(f"{path.stem}-{secrets.token_hex(4)}{path.suffix}")
        save_png(image, other, {PARAMETERS: text}, replace=False)
        log.warning("%s has appeared while the picture was painted, it was saved as %s", path, other)
        return other

    def _save_numbered(self, image: Image.Image, text: str) -> Path:
        while True:
            path = self.output.with_name(f"{STEM}-{self._next:04d}.png")
            self._next += 1
            try:
                save_png(image, path, {PARAMETERS: text}, replace=False)
                return path
            except FileExistsError:  # another process was faster
                continue

    def named(self, index: int) -> Path:
        """Where picture ``index`` of a run goes that has a name."""
        path = self.output
        return path if self.count == 1 else path.with_name(f"{path.stem}-{index + 1}{path.suffix}")

    def _check(self, path: Path) -> None:
        if path.is_dir():
            raise GgufSdError(f"the output {path} is a folder; give a file name in it")
        if not os.path.lexists(path):
            return
        if (used := _same(path, self.inputs)) is not None:
            raise GgufSdError(f"the output {path} is an input of this run ({used}); choose another --output")
        if not self.force and not written_by_us(path):
            raise GgufSdError(
                f"the output {path} exists and is no picture of gguf-sd's; choose another --output, or --force"
            )


def _same(path: Path, inputs: Iterable[Path]) -> Path | None:
    """The input that ``path`` is, by another name or not, or that is a folder which holds it."""
    for given in inputs:
        try:
            if os.path.samefile(path, given) or (given.is_dir() and path.resolve().is_relative_to(given.resolve())):
                return given
        except OSError:  # either is absent: they are not the same
            continue
    return None


def _free_number(folder: Path) -> int:
    """One more than the highest number in use, for a picture or its preview."""
    try:
        found = [int(match[1]) for name in os.listdir(folder) if (match := NUMBERED.fullmatch(name))]
    except OSError as error:
        raise GgufSdError(f"cannot read the current folder: {error.strerror}; choose an --output") from error
    return max(found, default=0) + 1


def _check_folder(path: Path) -> None:
    if not path.parent.is_dir():
        raise GgufSdError(f"the output's folder {path.parent} does not exist; create it first")
    remove_stale(path.parent)
    probe = temporary_name(path)
    try:
        os.close(os.open(probe, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        probe.unlink()
    except OSError as error:
        raise GgufSdError(f"cannot write to {path.parent}: {error.strerror}; choose another --output") from error
