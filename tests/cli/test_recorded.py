"""What a stranger's picture names is looked for, however it is called."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from gguf_sd.cli.main import main
from gguf_sd.demo import model_folder
from gguf_sd.imaging.save_png import save_png

LONG = "9" * 5000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (f'ControlNet 0: "Model: {LONG} [0123]"', "was painted with the ControlNet '999"),
        (f"Sampler: {LONG}", "unknown sampler '999"),
        (f"Sampler: Euler, Schedule type: {LONG}", "unknown schedule '999"),
        (f"VAE: {LONG}", "unknown device 'bogus'"),
        (f'TI hashes: "{LONG}: 0123", Steps: 0', "steps must be at least 1"),
        ("VAE: a\0b", "unknown device 'bogus'"),
    ],
)
def test_names_of_any_length(
    setting: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_png(Image.new("RGB", (8, 8)), Path("a.png"), {"parameters": f"a <lora:{LONG}:1>\nSteps: 1, {setting}"})
    assert main(["generate", str(model_folder()), "--from", "a.png", "-p", "a cat", "--device", "bogus"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert len(said) < 2000
