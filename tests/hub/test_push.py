"""`gguf-sd push` to a server that speaks the Hub's API."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from gguf_sd.checkpoint.model_card import BEGIN, END, card, subject_of, updated
from gguf_sd.cli.main import main
from gguf_sd_convert.convert import ConvertOptions, convert
from tests.hub.hub_server import Hub
from tests.hub.test_fetch import fetch, hub, run  # noqa: F401


@pytest.fixture(scope="module")
def model(tiny_pipeline: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of a model in the Hub's cache."""
    folder = tmp_path_factory.mktemp("push")
    snapshot = folder / "models--org--tiny-sd" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    snapshot.symlink_to(tiny_pipeline())
    convert(snapshot, folder / "tiny-q4_0.gguf", ConvertOptions(type="q4_0"))
    return folder / "tiny-q4_0.gguf"


def test_upload_and_back(hub: Hub, model: Path, tmp_path: Path) -> None:  # noqa: F811
    hub.token = "hf_secret"
    push = ["push", str(model), "me/tiny-gguf", "--license", "openrail++", "--json"]
    done = run(hub, tmp_path, *push, HF_TOKEN="hf_secret")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["file"], facts["type"], facts["card"]) == ("me/tiny-gguf/tiny-q4_0.gguf", "q4_0", True)
    files = hub.repos["me/tiny-gguf"]["main"]
    assert files["tiny-q4_0.gguf"] == model.read_bytes()
    text = files["README.md"].decode()
    for expected in (
        "base_model: org/tiny-sd\n", "base_model_relation: quantized\n", "license: openrail++\n",
        "Stable Diffusion 1.x of [org/tiny-sd](https://huggingface.co/org/tiny-sd)",
        "| [tiny-q4_0.gguf](tiny-q4_0.gguf) | q4_0 | ",
        'gguf-sd generate me/tiny-gguf/tiny-q4_0.gguf -p "a lighthouse at dusk"',
    ):  # fmt: skip
        assert expected in text
    (path,) = fetch(hub, tmp_path / "other", "me/tiny-gguf")
    assert Path(path).read_bytes() == model.read_bytes()


def test_without_a_token(hub: Hub, model: Path, tmp_path: Path) -> None:  # noqa: F811
    hub.token = "hf_secret"
    nobody = run(hub, tmp_path, "push", str(model), "me/third")
    assert nobody.returncode == 2
    assert nobody.stderr.count("\n") == 1
    assert "log in with `hf auth login`, or set HF_TOKEN" in nobody.stderr
    assert "me/third" not in hub.repos


@pytest.mark.slow
def test_what_the_hub_or_its_owner_does_not_want(hub: Hub, model: Path, tmp_path: Path) -> None:  # noqa: F811
    hub.token = "hf_secret"
    push = ["push", str(model), "me/tiny-gguf"]
    assert run(hub, tmp_path, *push, HF_TOKEN="hf_secret").returncode == 0
    hub.repos["me/other"] = {"main": {"README.md": b"# mine"}}
    again = run(hub, tmp_path, *push, HF_TOKEN="hf_secret")
    assert again.returncode == 2
    assert "holds a file tiny-q4_0.gguf already; --force replaces it" in again.stderr
    kept = run(hub, tmp_path, "push", str(model), "me/other", "--name", "b.gguf", HF_TOKEN="hf_secret")
    assert kept.returncode == 0, kept.stderr
    assert "README.md there is not gguf-sd's and stays as it is" in kept.stderr
    assert hub.repos["me/other"]["main"]["README.md"] == b"# mine"
    bad = run(hub, tmp_path, "push", str(model), "me/bad", "--license", "nonsense", HF_TOKEN="hf_secret")
    assert bad.returncode == 2
    assert "the Hub refuses the model card: " in bad.stderr
    assert '"license" must be one of' in bad.stderr
    hub.full = True
    full = run(hub, tmp_path, "push", str(model), "me/full", HF_TOKEN="hf_secret")
    assert (full.returncode, full.stderr) == (2, "gguf-sd: the Hub answers 413 for me/full; try again later\n")


def test_the_cards_front_is_what_the_hub_reads(model: Path) -> None:
    from huggingface_hub import ModelCard

    data = ModelCard(card(subject_of(model), "me/tiny-gguf", license="openrail++")).data.to_dict()
    assert data["base_model"] == "org/tiny-sd"
    assert data["pipeline_tag"] == "text-to-image"
    assert {"gguf", "stable-diffusion"} <= set(data["tags"])
    assert (data["license"], data["library_name"]) == ("openrail++", "gguf-sd")


def test_a_card_gets_rows(model: Path) -> None:
    from dataclasses import replace

    subject = subject_of(model)
    first = card(subject, "me/tiny-gguf").replace("# tiny-gguf", "# tiny-gguf\n\nwhat I wrote")
    second = updated(first, replace(subject, name="tiny-q8_0.gguf", type="q8_0"))
    assert second is not None
    third = updated(second, replace(subject, nbytes=2_000_000_000))
    assert third is not None
    rows = third.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert [row.split(" | ")[1:3] for row in rows] == [["q4_0", "2.00 GB"], ["q8_0", second.split(" | ")[-2]]]
    assert "what I wrote" in third
    assert updated("# mine", subject) is None


def test_a_controlnets_card(tmp_path: Path) -> None:
    import diffusers

    diffusers.ControlNetModel(
        block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=32,
        attention_head_dim=4, norm_num_groups=8,
    ).save_pretrained(tmp_path / "canny")  # fmt: skip
    convert(tmp_path / "canny", tmp_path / "canny.gguf", ConvertOptions(type="q8_0"))
    text = card(subject_of(tmp_path / "canny.gguf"), "me/canny", "org/canny")
    assert "A ControlNet of [org/canny]" in text
    assert "--control me/canny/canny.gguf --control-image edges.png" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{model}", "only-a-name"], "REPO is 'only-a-name'; it takes a repository's name"),
        (["{model}", "a/b/c"], "REPO is 'a/b/c'"),
        (["{model}", "me/x", "--base-model", "x"], "--base-model is 'x'"),
        (["{model}", "me/x", "--license", "a: b"], "--license is 'a: b'"),
        (["{model}", "me/x", "--name", "x.bin"], "it takes one that ends in .gguf"),
        (["missing.gguf", "me/x"], "cannot read missing.gguf"),
        (["{readme}", "me/x"], "is not a GGUF file"),
    ],
)
def test_bad_input(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    (tmp_path / "x.gguf").write_text("# no GGUF file at all")
    assert main(["push", *(a.format(model=model, readme=tmp_path / "x.gguf") for a in arguments)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
