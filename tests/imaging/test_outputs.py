"""Where pictures are saved: never over what is not ours."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
from PIL import Image

from gguf_sd.errors import GgufSdError
from gguf_sd.imaging.outputs import Outputs
from gguf_sd.imaging.save_png import save_png

OURS = "a cat\nSteps: 2, Version: gguf-sd 0.1.0"
RED = Image.new("RGB", (8, 8), "red")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_numbers_go_on_from_the_highest(folder: Path) -> None:
    (folder / "out-0003.png").write_bytes(b"mine")
    (folder / "out-0007.preview.png").write_bytes(b"mine too")
    outputs = Outputs(None, count=2)
    assert [outputs.save(RED, i, OURS).name for i in range(2)] == ["out-0008.png", "out-0009.png"]
    assert outputs.preview.name == "out-0008.preview.png"
    assert (folder / "out-0003.png").read_bytes() == b"mine"


@pytest.mark.parametrize("links", [True, False])
def test_many_at_once_lose_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch, links: bool) -> None:
    if not links:  # as on a memory card

        def refuse(*_: object) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    runs = [Outputs(None, count=4) for _ in range(4)]
    saved: list[str] = []
    threads = [
        threading.Thread(target=lambda run=run: saved.extend(run.save(RED.copy(), i, OURS).name for i in range(4)))
        for run in runs
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(saved)) == 16
    assert names(folder) == sorted(saved) == [f"out-{i:04d}.png" for i in range(1, 17)]
    assert all(Image.open(folder / name).size == (8, 8) for name in saved)


def test_our_pictures_are_replaced_and_others_not(folder: Path) -> None:
    save_png(RED, folder / "ours.png", {"parameters": OURS})
    assert Outputs(Path("ours.png")).save(Image.new("RGB", (9, 9)), 0, OURS) == Path("ours.png")
    assert Image.open("ours.png").size == (9, 9)
    theirs = {"parameters": "gguf-sd, a cat\nSteps: 2, Version: v1.9.0"}
    save_png(RED, folder / "theirs.png", theirs)
    (folder / "text.png").write_text("no picture")
    (folder / "lost.png").symlink_to("nowhere")
    for name in ("theirs.png", "text.png", "lost.png"):
        with pytest.raises(GgufSdError, match=rf"{name} exists and is no picture of gguf-sd's; .* or --force"):
            Outputs(Path(name))
        Outputs(Path(name), force=True)
    save_png(RED, folder / "many-2.png", theirs)
    with pytest.raises(GgufSdError, match=r"many-2.png exists"):
        Outputs(Path("many.png"), count=3)
    save_png(RED, folder / "new.preview.png", theirs)
    with pytest.raises(GgufSdError, match=r"new.preview.png exists"):
        Outputs(Path("new.png")).check_preview()


def test_inputs_are_never_written_onto(folder: Path) -> None:
    save_png(RED, folder / "input.png", {"parameters": OURS})
    os.link("input.png", "hard.png")
    (folder / "soft.png").symlink_to("input.png")
    (folder / "model").mkdir()
    save_png(RED, folder / "model" / "card.png", {"parameters": OURS})
    for name in ("input.png", "./model/../input.png", "hard.png", "soft.png", "model/card.png"):
        with pytest.raises(GgufSdError, match="is an input of this run"):
            Outputs(Path(name), inputs=[Path("input.png"), Path("model")], force=True)
    Outputs(Path("model/new.png"), inputs=[Path("model")])


def test_a_file_that_appears_meanwhile_stays(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    outputs = Outputs(Path("cat.png"))
    (folder / "cat.png").write_text("came later")
    saved = outputs.save(RED, 0, OURS)
    assert saved.name != "cat.png"
    assert Image.open(saved).size == (8, 8)
    assert (folder / "cat.png").read_text() == "came later"
    assert "has appeared" in caplog.text
