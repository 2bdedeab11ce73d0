"""`gguf-sd batch` as a user runs it."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from gguf_sd.adapters.lora import MAX_LORAS
from gguf_sd.batch.manifest import Manifest
from gguf_sd.batch.rows import read_rows
from gguf_sd.cli.main import main
from gguf_sd.pipeline import Pipeline
from tests.batch.conftest import FAST, Batch

TABLE = "prompt,seed,name,count,width\na cat,7,,,\n\na dog,3,dogs,2,\nred,,,,64\na red cat,,,,\n"


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_pictures_are_those_of_generate(batch: Batch, tiny_model: Path, tmp_path: Path) -> None:
    assert batch("p.csv", TABLE, "out") == 0
    found = lines(tmp_path / "out")
    assert [(x["row"], x["file"], x["seed"]) for x in found] == [
        (1, "00001.png", 7),
        (2, "dogs-1.png", 3),
        (2, "dogs-2.png", 4),
        (3, "00003.png", 3),
        (4, "00004.png", 4),
    ]
    for line in found:
        data = (tmp_path / "out" / line["file"]).read_bytes()
        assert (hashlib.sha256(data).hexdigest(), len(data)) == (line["sha256"], line["bytes"])
        size = ["--width", str(line["settings"]["width"])]
        settings = ["-p", line["prompt"], "--seed", str(line["seed"]), "-o", str(tmp_path / "one.png")]
        assert main(["generate", str(tiny_model), *settings, *FAST, *size]) == 0
        assert (tmp_path / "one.png").read_bytes() == data


def test_three_forms_say_the_same(batch: Batch, tmp_path: Path) -> None:
    assert batch("p.txt", "a cat\n\n  a dog \n", "txt", "--seed", "5") == 0
    assert batch("p.csv", '"prompt"\r\n"a cat"\r\n"a dog"\r\n', "csv", "--seed", "5") == 0
    assert batch("p.jsonl", '{"prompt": "a cat"}\n{"prompt": "a dog", "seed": 6}\n', "jsonl", "--seed", "5") == 0
    pictures = [{k: v for k, v in contents(tmp_path / x).items() if k[-3:] == "png"} for x in ("txt", "csv", "jsonl")]
    assert pictures[0] == pictures[1] == pictures[2]
    assert len(set(pictures[0].values())) == 2


def test_equal_shapes_go_together(batch: Batch, monkeypatch: pytest.MonkeyPatch) -> None:
    painted: list[int] = []
    paint = Pipeline._paint

    def counted(self: Pipeline, tasks: Any, *rest: Any) -> Any:
        painted.append(len(tasks))
        return paint(self, tasks, *rest)

    monkeypatch.setattr(Pipeline, "_paint", counted)
    assert batch("p.csv", TABLE, "out", "--batch", "3") == 0
    assert sorted(painted) == [1, 1, 3]  # one of another width, four of one shape


def test_failures_are_recorded_and_stop_nothing(
    batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": "a cat"},
        {"prompt": 5},
        {"prompt": "a cat", "sampler": "nonsense"},
        {"prompt": "a cat", "stepz": 2},
        {"prompt": "a cat", "width": 33},
        {"prompt": "a cat", "image": "absent.png"},
        {"prompt": "a cat", "name": "../up"},
        {"prompt": "a cat", "count": 0},
        {"prompt": "a dog"},
    ]
    text = "\n".join(map(json.dumps, rows)) + '\n{"prompt": \n[1]\n'
    assert batch("p.jsonl", text, "out") == 1
    errors = {x["row"]: x.get("error", "") for x in lines(tmp_path / "out")}
    assert [row for row, error in errors.items() if not error] == [1, 9]
    expected = ["must be a text", "unknown sampler", "did you mean steps", "no multiple of 8", "does not exist"]
    expected += ["name is '../up'", "count is 0", "", "no JSON object", "no JSON object"]
    for error, words in zip(list(errors.values())[1:], expected, strict=True):
        assert words in error
    assert "and 6 more, see" in capsys.readouterr().err
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["00001.png", "00009.png"]


def test_what_went_wrong_in_company_is_painted_alone(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paint = Pipeline.paint

    def fails(self: Pipeline, jobs: Any, *rest: Any) -> Any:
        if any(job.prompt == "a dog" for job in (jobs if isinstance(jobs, list) else [jobs])):
            raise RuntimeError("broken\nthing")
        return paint(self, jobs, *rest)

    monkeypatch.setattr(Pipeline, "paint", fails)
    assert batch("p.txt", "a cat\na dog\nred\n", "out") == 1
    assert [x.get("error") for x in lines(tmp_path / "out")] == [None, "RuntimeError: broken thing", None]


class Stop(BaseException):
    pass


def test_resume_ends_where_an_uninterrupted_run_does(
    batch: Batch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert batch("p.csv", TABLE, "whole") == 0
    add = Manifest.add

    def stops(self: Manifest, result: Any) -> bool:
        if len(self.lines) == 3:
            raise Stop
        return add(self, result)

    with monkeypatch.context() as patch:
        patch.setattr(Manifest, "add", stops)
        with pytest.raises(Stop):
            batch("p.csv", TABLE, "out")
    out, kept = tmp_path / "out", lines(tmp_path / "out")
    assert len(kept) == 3
    with open(out / "manifest.jsonl", "a") as file:
        file.write('{"row": 4, "picture": 1, "fi')  # a line that was cut short
    damaged = out / kept[1]["file"]
    damaged.write_bytes(damaged.read_bytes()[:-5])
    untouched = (out / kept[0]["file"]).stat().st_mtime_ns
    assert batch("p.csv", TABLE, "out", "--resume") == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert (out / kept[0]["file"]).stat().st_mtime_ns == untouched
    with monkeypatch.context() as patch:
        patch.setattr(Pipeline, "paint", lambda *a: pytest.fail("painted again"))
        assert batch("p.csv", TABLE, "out", "--resume") == 0
    assert batch("p.csv", TABLE.replace("a cat,7", "a dog,7"), "out", "--resume") == 0
    assert lines(out)[0]["prompt"] == "a dog"
    assert Image.open(out / "00001.png").tobytes() != Image.open(tmp_path / "whole" / "00001.png").tobytes()


def test_pictures_to_start_from(batch: Batch, tmp_path: Path) -> None:
    Image.new("RGB", (32, 32), "orange").save(tmp_path / "start.png")
    assert batch("p.csv", "prompt,image,strength,count\na cat,start.png,0.5,2\n", "out") == 0
    assert lines(tmp_path / "out")[1]["settings"]["strength"] == 0.5
    Image.new("RGB", (32, 32), "blue").save(tmp_path / "start.png")
    before = contents(tmp_path / "out")
    assert batch("p.csv", "prompt,image,strength,count\na cat,start.png,0.5,2\n", "out", "--resume") == 0
    assert contents(tmp_path / "out")["00001-1.png"] != before["00001-1.png"], "another picture lies there now"


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("p.csv", "prompt,stepz\na,1\n", "did you mean steps"),
        ("p.csv", "prompt,prompt\na,1\n", "stands there twice"),
        ("p.csv", 'prompt\n"a', "is no CSV"),
        ("p.txt", "\n \n", "holds no prompts"),
        ("p.doc", "a", "ends in .txt"),
    ],
)
def test_files_that_make_no_sense(
    batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, text: str, words: str
) -> None:
    assert batch(name, text, "out") == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_no_more_loras_than_a_request_takes_are_looked_for(tmp_path: Path) -> None:
    table = tmp_path / "p.jsonl"
    table.write_text("\n".join(json.dumps({"loras": ["a"] * n}) for n in (MAX_LORAS, MAX_LORAS + 1)))
    fine, refused = read_rows(table)
    assert len(fine.values["loras"]) == MAX_LORAS
    assert refused.error == "101 LoRAs are given; at most 100 are taken"


def test_nothing_is_overwritten_unasked(batch: Batch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Image.new("RGB", (8, 8)).save(out / "00001.png")
    before = (out / "00001.png").read_bytes()
    assert batch("p.txt", "a cat\n", "out") == 2
    assert "no picture of gguf-sd's" in capsys.readouterr().err
    assert (out / "00001.png").read_bytes() == before
    assert batch("q.csv", "prompt,name\na cat,x\na dog,X\n", "other") == 1
    assert "taken by row 1" in lines(tmp_path / "other")[1]["error"]
    assert batch("p.txt", "a cat\n", "other") == 2
    assert "--resume" in capsys.readouterr().err
