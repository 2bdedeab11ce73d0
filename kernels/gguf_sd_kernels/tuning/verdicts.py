"""What was found about kernels on each device, and what follows: which of them are set aside.

A kernel met for the first time is checked at once, in this process. To have that done ahead, and where a kernel that
hangs or crashes harms nobody, see :mod:`gguf_sd_kernels.tuning.child`. ``GGUF_SD_SELF_CHECK=0`` trusts everything;
in Triton's interpreter that is so unless it is 1.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from gguf_sd_kernels.devices import recording
from gguf_sd_kernels.tuning.fingerprint import file_name, fingerprint
from gguf_sd_kernels.tuning.launch import Prepared
from gguf_sd_kernels.tuning.self_check import Subject, check, proof_of_life, reason_of
from gguf_sd_kernels.tuning.store import read_entries, say_once, update_entries

log = logging.getLogger(__name__)
SWITCH = "GGUF_SD_SELF_CHECK"
GOOD = ""  # the verdict on a kernel that agrees; others are the reason why it is set aside

Check = Callable[[Subject, torch.device], None]


def self_check_on(device: torch.device) -> bool:
    """Whether kernels are checked on ``device`` before their results are used."""
    return os.environ.get(SWITCH, "0" if device.type == "cpu" else "1") != "0"


class Verdicts:
    """What is known of the kernels on ``device``: kept in ``folder`` where one is given, else for this process."""

    def __init__(self, device: torch.device, folder: Path | None = None, check: Check = check):
        self.device, self.check = device, check
        self.path = None if folder is None else folder / "checks" / file_name(device)
        self.known: dict[Subject, str] = {}
        self._lock = threading.RLock()
        if self.path is not None:
            self.known = self._read(self.path)

    def trusted(self, subject: Subject) -> bool:
        """Whether the kernel's results can be used; checks it now if nothing is known."""
        if not self_check_on(self.device):
            return True
        with self._lock:
            if subject not in self.known:
                self._check(subject)
            return self.known[subject] == GOOD

    def _check(self, subject: Subject) -> None:
        if recording(self.device):
            raise RuntimeError(f"{subject} has to be checked before it becomes part of a graph")
        try:
            self.check(subject, self.device)
            self.note({subject: GOOD})
        except Exception as problem:
            lasting = not isinstance(problem, (torch.OutOfMemoryError, MemoryError))
            self.note({subject: reason_of(problem)}, lasting)
            try:
                proof_of_life(self.device)
            except Exception:
                raise RuntimeError(
                    f"the kernel {subject} has left the GPU unusable for this process; it will not be used again: "
                    "start the program anew"
                ) from problem

    def note(self, found: Mapping[Subject, str], lasting: bool = True) -> None:
        """Keeps verdicts; names what is set aside, once; writes them down unless the reason may pass."""
        with self._lock:
            for subject, reason in found.items():
                if reason != GOOD and self.known.get(subject, GOOD) == GOOD:
                    log.warning("the kernel %s is not used on this GPU: %s", subject, reason)
            if any(subject not in self.known or self.known[subject] != found[subject] for subject in found):
                self.known |= found
                Prepared.forget()  # what was decided before
                if lasting and self.path is not None:
                    update_entries(self.path, lambda entries: self._merged(entries, found))

    def _merged(self, entries: Mapping[str, Any], found: Mapping[Subject, str]) -> dict[str, Any]:
        merged = {**_parsed(entries.get("checks", ()), lambda problem: None), **found}
        checks = [{"subject": subject.to_json(), "reason": reason} for subject, reason in merged.items()]
        return {"device": fingerprint(self.device), "checks": checks}

    @staticmethod
    def _read(path: Path) -> dict[Subject, str]:
        """What the file holds. Entries that are none, damaged or of another version, are left out, and checked anew."""
        entries = read_entries(path).get("checks", [])
        return _parsed(entries, lambda problem: say_once(f"{path} is damaged ({problem}): checked anew"))


def _parsed(entries: object, tell: Callable[[str], None]) -> dict[Subject, str]:
    if not isinstance(entries, Iterable):
        tell("no list of checks")
        return {}
    found: dict[Subject, str] = {}
    for entry in entries:
        try:
            subject, reason = Subject.from_json(entry["subject"]), entry["reason"]
            if not isinstance(reason, str):
                raise TypeError("a reason is text")
            found[subject] = reason
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            tell(f"{type(error).__name__}: {error}")
    return found


_of: dict[torch.device, Verdicts] = {}


def _with_index(device: torch.device) -> torch.device:
    """As tensors name it: "cuda" is the current one of them."""
    if device.type == "cpu" or device.index is not None:
        return device
    return torch.device(device.type, torch.get_device_module(device).current_device())


def verdicts_of(device: torch.device) -> Verdicts:
    """What is known of the kernels on ``device``; of this process alone until :func:`keep_verdicts`."""
    device = _with_index(device)
    known = _of.get(device)
    if known is None:
        known = _of[device] = Verdicts(device)
    return known


def keep_verdicts(device: torch.device, folder: Path) -> Verdicts:
    """Has verdicts on ``device`` read from, and written below, ``folder`` from now on."""
    device = _with_index(device)
    known = _of.get(device)
    if known is None or known.path is None or known.path.parent.parent != folder:
        known = _of[device] = Verdicts(device, folder)
        Prepared.forget()
    return known


def trusted(subject: Subject, device: torch.device) -> bool:
    """:meth:`Verdicts.trusted` of that device."""
    return not self_check_on(device) or verdicts_of(device).trusted(subject)
