"""bench.toml: what is written is read back, and what is wrong is told in one sentence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gguf_sd.bench.spec import PRESETS, Contestant, Spec
from gguf_sd.cli.main import main
from gguf_sd.errors import GgufSdError

SPEC = Spec(
    contestants=(
        Contestant("a", "/m/a.gguf"),
        Contestant("b+c@4.8", "/m/ö\\b", "diffusers"),
        Contestant("c", "c.gguf", source="../m", way="mixed@4.8+calibrated"),
    ),
    prompts=('a "quoted" cat', "tab\tand \\ é"),
    settings=({"steps": 4, "guidance": 1.5, "sampler": "euler"}, {}),
    seed=7,
    rounds=2,
    recorded={"torch": "2.13", "threads": 1, "models": '{"a": "b"}'},
)


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "bench.toml"
    path.write_text(SPEC.to_toml())
    assert Spec.from_toml(path) == SPEC
    moved = Spec((Contestant("a", str(tmp_path / "models" / "a.gguf")),), ("p",))
    assert 'model = "models/a.gguf"' in moved.to_toml(tmp_path)


def test_every_picture_is_painted_once_and_has_its_own_seed() -> None:
    spec = Spec(SPEC.contestants, tuple(f"p{i}" for i in range(7)), tuple(PRESETS["turbo"]), seed=5, rounds=3)
    assert sorted(i for n in range(3) for i in spec.of_round(n)) == list(range(7))
    assert spec.job(4) == ("p4", 9, {"steps": 2, "guidance": 0})


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("prompts = [1]", "prompts holds 1; it takes texts"),
        ("nonsense = 1", "unknown key 'nonsense'"),
        ("= 3", "is no TOML"),
        ('prompts = ["x"]', "at least one contestant"),
        ('prompts = ["x"]\nseed = "x"\n[[contestants]]\nname="a"\nmodel="m"', "seed is 'x'"),
        ('prompts = ["x"]\nrounds = 0\n[[contestants]]\nname="a"\nmodel="m"', "rounds is 0"),
        ('prompts = ["x"]\n[[contestants]]\nname="../a"\nmodel="m"', "is no name"),
        ('prompts = ["x"]\n[[contestants]]\nname="a"\nmodel="m"\nprogram="rm"', "no peer 'rm'"),
        ('prompts = ["x"]\nsettings=[{steps=0}]\n[[contestants]]\nname="a"\nmodel="m"', "steps is 0"),
        ('prompts = ["x"]\nsettings=[{dance=1}]\n[[contestants]]\nname="a"\nmodel="m"', "unknown setting 'dance'"),
        ("seed = " + "9" * 5000, "is no TOML"),
        ("x = " + "[" * 5000, "nested too deeply"),
        ("contestants = 'abc'", "contestants is 'abc'; it takes a list"),
        ("contestants = [3]", "contestants holds 3; it takes tables"),
        ("settings = [[1]]", r"settings holds \[1\]; it takes tables"),
        ('prompts = ["x"]\nrounds = [' + "0, " * 900 + "]", r"rounds is \[0, 0"),
        ("[recorded]\ntorch = 1979-05-27", "recorded holds datetime.date"),
    ],
)
def test_what_is_wrong_is_told(text: str, complaint: str, tmp_path: Path) -> None:
    path = tmp_path / "bench.toml"
    path.write_text(text)
    with pytest.raises(GgufSdError, match=complaint):
        Spec.from_toml(path)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["missing.gguf"], "missing.gguf does not exist"),
        (["missing.toml"], "cannot read missing.toml"),
        ([".", "--preset", "slow"], "no preset 'slow'"),
        ([".", "--peers", "comfy"], "no peer 'comfy'"),
        ([".", "--types", "f16,q9"], "no type 'q9'"),
        ([".", "--types", "mixed"], "bits a weight go with mixed"),
        ([".", "--count", "0"], "--count is 0"),
        ([__file__, "--peers", "diffusers"], "diffusers reads diffusers folders"),
        (["layers"], "takes one MODEL"),
    ],
)
def test_bad_arguments(
    arguments: list[str], complaint: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *arguments, "-o", "out"]) == 2
    assert complaint in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
