"""What is asked for of a calibration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Calibration:
    """``prompts``: a text file (None: some that come with the program); ``samples``: calls of the
    UNet that are kept (0: by the model's size); ``imatrix``: calibration data to take instead of recording;
    ``save``: where to write them."""

    compensate: bool = True  # rounds for the calls; False: they serve to choose types alone
    prompts: Path | None = None
    samples: int = 0
    imatrix: Path | None = None
    save: Path | None = None
    target: str | None = None  # bytes of the whole file, of --type mixed: "600MB"
    bpw: float | None = None  # or bits a quantised weight of the UNet
