"""Textual inversion against diffusers: every form of file, several vectors, both prompts, weights and long prompts."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gguf_sd.adapters.embedding_files import as_embeddings
from gguf_sd.adapters.embeddings import load_embeddings
from gguf_sd.errors import GgufSdError
from gguf_sd.pipeline import Pipeline
from gguf_sd.request import Request, checked
from tests.adapters.conftest import config_of
from tests.convert.sources.test_torch_file import HOSTILE, archive
from tests.test_pipeline import oracle

WIDTH = 32  # of the tiny encoders


def vectors(count: int, width: int = WIDTH, seed: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def written(path: Path, tensor: Tensor, key: str = "emb_params") -> Path:
    save_file({key: tensor}, path)
    return path


def states(pipeline: Pipeline, **request: Any) -> tuple[Tensor, Tensor]:
    conditioning = pipeline.encode(pipeline.prepare(Request(**request, guidance=4.0)))
    assert conditioning.negative is not None
    return conditioning.positive.context, conditioning.negative.context


@pytest.mark.parametrize("count", [1, 3])
def test_states_equal_diffusers(
    tiny_file: Callable[..., Path], tiny_pipeline: Callable[..., Path], tmp_path: Path, count: int
) -> None:
    model, table = tiny_file(), vectors(count)
    reference = oracle(tiny_pipeline(), model)
    reference.load_textual_inversion({"<toy>": table}, token="<toy>")
    prompt, negative = "a <toy> cat", "dog, <toy>"
    expected = reference.encode_prompt(prompt, "cpu", 1, True, negative)
    pipeline = Pipeline.load(model, "cpu", "float32")
    file = written(tmp_path / "any.safetensors", table, "<toy>")
    got = states(pipeline, prompt=prompt, negative_prompt=negative, embeddings=file)
    plain = states(pipeline, prompt=prompt, negative_prompt=negative)
    for mine, theirs, without in zip(got, expected, plain, strict=True):
        assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()
        assert (mine - without).abs().max() > 0.1


def test_states_of_sdxl_equal_diffusers(
    tiny_file: Callable[..., Path], tiny_pipeline: Callable[..., Path], tmp_path: Path
) -> None:
    fields = {"xl": True, "scheduler": "EulerDiscreteScheduler"}
    model, first, second = tiny_file(**fields), vectors(2), vectors(2, seed=6)
    reference = oracle(tiny_pipeline(**fields), model)
    for table, index in ((first, ""), (second, "_2")):
        parts = {"text_encoder": getattr(reference, f"text_encoder{index}")}
        parts["tokenizer"] = getattr(reference, f"tokenizer{index}")
        if not index or reference.tokenizer is not reference.tokenizer_2:
            reference.load_textual_inversion({"toy": table}, token="toy", **parts)
    expected, without, pooled, _ = reference.encode_prompt(
        "a toy cat", negative_prompt="toy", do_classifier_free_guidance=True
    )
    save_file({"clip_l": first, "clip_g": second}, tmp_path / "toy.safetensors")
    pipeline = Pipeline.load(model, "cpu", "float32")
    request = Request("a toy cat", "toy", guidance=4.0, embeddings=[str(tmp_path / "toy.safetensors")])
    got = pipeline.encode(pipeline.prepare(request))
    assert got.negative is not None
    assert got.positive.vector is not None
    for mine, theirs in ((got.positive.context, expected), (got.negative.context, without)):
        assert (mine - theirs).abs().max() < 1e-4 * theirs.abs().max()
    assert (got.positive.vector[:, : pooled.shape[1]] - pooled).abs().max() < 1e-4 * pooled.abs().max()


def test_every_form_is_the_same(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    model, table = tiny_file(), vectors(2)
    pipeline = Pipeline.load(model, "cpu", "float32")
    content: dict[str, Any] = {"string_to_token": {"*": 265}, "name": "x", "step": 5, "sd_checkpoint": None}
    torch.save(content | {"string_to_param": {"*": table}}, tmp_path / "a.pt")
    torch.save(content | {"string_to_param": torch.nn.ParameterDict({"*": table})}, tmp_path / "b.pt")
    torch.save({"<toy>": table}, tmp_path / "c.bin")
    torch.save({"<toy>": table}, tmp_path / "d.bin", _use_new_zipfile_serialization=False)
    files = [tmp_path / name for name in ("a.pt", "b.pt", "c.bin", "d.bin")]
    files.append(written(tmp_path / "e.safetensors", table))
    files.append(written(tmp_path / "f.safetensors", table, "clip_l"))
    first = None
    for file in files:
        named = states(pipeline, prompt=f"the {file.stem} cat", embeddings=file)[0]
        renamed = states(pipeline, prompt="the My-Toy cat", embeddings=f"my-toy={file}")[0]
        first = named if first is None else first
        assert torch.equal(named, first)
        assert torch.equal(renamed, first)
    for file in files[2:4]:
        assert torch.equal(states(pipeline, prompt="the <toy> cat", embeddings=file)[0], first)


def test_weights_and_chunks(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    """A weight counts for every vector; vectors of one embedding are not torn apart at the end of a chunk; a longer
    word is another word."""
    pipeline = Pipeline.load(tiny_file(), "cpu", "float32")
    config = pipeline.model.config
    files = [written(tmp_path / "toy.safetensors", vectors(3)), written(tmp_path / "b.safetensors", vectors(2))]
    embeddings = load_embeddings(as_embeddings(files), config)
    vocabulary = config.text[0].vocab_size

    def own(prompt: str) -> list[list[tuple[int, float]]]:
        ids, weights = pipeline._encoder.tokenizer.encode(prompt, config.text[0], embeddings)
        rows = [zip(*row, strict=True) for row in zip(ids.tolist(), weights.tolist(), strict=True)]
        return [[(i - vocabulary, round(w, 3)) for i, w in row if i >= vocabulary] for row in rows]

    assert own("a (toy:1.2) b") == [[(0, 1.2), (1, 1.2), (2, 1.2), (3, 1), (4, 1)]]
    assert own("toys atoy toy_") == [[]]
    assert own("toy,TOY") == [[(0, 1), (1, 1), (2, 1)] * 2]
    assert own(f"{'! ' * 73}toy") == [[], [(0, 1), (1, 1), (2, 1)]]
    assert own(f"{'! ' * 72}toy") == [[(0, 1), (1, 1), (2, 1)]]
    got = states(pipeline, prompt=f"toy {'red ' * 80} (toy:1.3)", embeddings=files)[0]
    assert got.shape[1] == 2 * 77
    assert got.isfinite().all()


def test_pictures_record_what_they_use(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    pipeline = Pipeline.load(tiny_file(), "cpu", "float32")
    files = [written(tmp_path / "toy.safetensors", vectors(1)), written(tmp_path / "unused.safetensors", vectors(1))]
    settings = {"steps": 1, "width": 32, "height": 32, "safety": "off", "seed": 1}
    (image,) = pipeline("a toy", embeddings=files, **settings)
    assert 'TI hashes: "toy: ' in image.info["parameters"]
    assert "unused" not in image.info["parameters"]
    (plain,) = pipeline("a toy", **settings)
    assert "TI hashes" not in plain.info["parameters"]
    assert image.tobytes() != plain.tobytes()


class Evil:
    def __reduce__(self) -> Any:
        return print, ("executed",)


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"emb_params": vectors(2, 48)}, r"shape \[2, 48\], the model's text encoder takes \[n, 32\]"),
        ({"clip_l": vectors(1), "clip_g": vectors(1)}, "this model takes vectors for one encoder"),
        ({"emb_params": vectors(1) * torch.nan}, "holds NaN or infinity"),
        ({"emb_params": vectors(76)}, "76 vectors; a chunk of a prompt has room for 75"),
        ({"emb_params": torch.ones(1, 32, dtype=torch.int64)}, "is no embedding"),
        ({}, "is no embedding"),
        (Evil(), r"holds Python code \(print\) and is refused"),
        (b"nonsense", "is no embedding, or a damaged one"),
        (b"PK\x03\x04nonsense", "is no embedding, or a damaged one"),
    ],
)
def test_bad_files(
    tiny_file: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str], content: Any, sentence: str
) -> None:
    path = tmp_path / "bad.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif isinstance(content, dict):
        path = path.with_suffix(".safetensors")
        save_file(content, path)
    else:
        torch.save(content, path)
    with pytest.raises(GgufSdError, match=sentence):
        load_embeddings(as_embeddings(path), config_of(tiny_file()))
    assert "executed" not in capfd.readouterr().out


@pytest.mark.parametrize("name", ["exponential key", "long claim", "large number", "numpy array", "storage"])
def test_pickles_that_would_hang_or_fill_memory(tiny_file: Callable[..., Path], tmp_path: Path, name: str) -> None:
    path = archive(tmp_path / "bad.pt", {"data.pkl": HOSTILE[name]})
    began = time.process_time()
    with pytest.raises(GgufSdError, match=r"bad\.pt (is no embedding|holds Python code)"):
        load_embeddings(as_embeddings(path), config_of(tiny_file()))
    assert time.process_time() - began < 1


@pytest.mark.parametrize(
    ("tensor", "what"),
    [(torch.empty(1, 32, device="meta"), "without data"), (torch.eye(32).to_sparse(), "sparse")],
)
def test_tensors_that_are_no_plain_values(
    tiny_file: Callable[..., Path], tmp_path: Path, tensor: Tensor, what: str
) -> None:
    for number, content in enumerate(({"*": tensor}, {"string_to_param": {"*": tensor}}, tensor)):
        torch.save(content, tmp_path / f"{number}.pt")
        with pytest.raises(GgufSdError, match=f"is {what}"):
            load_embeddings(as_embeddings(tmp_path / f"{number}.pt"), config_of(tiny_file()))


def test_bad_names(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    """Found before a model is looked at."""
    good = written(tmp_path / "toy.safetensors", vectors(1))
    odd = written(tmp_path / "toy (1).safetensors", vectors(1))
    for files, sentence in (
        (odd, "give it another name, NAME=FILE"),
        ([good, f"TOY={odd}"], "two embeddings are called 'TOY'"),
        (tmp_path / "nothing.pt", "does not exist"),
        (tmp_path, "is a folder"),
    ):
        with pytest.raises(GgufSdError, match=sentence):
            checked(Request("x", embeddings=files))
    for value in (5, [5], [("a", 5)]):
        with pytest.raises(GgufSdError, match="embeddings must be a file"):
            checked(Request("x", embeddings=value))


def test_sdxl_takes_pairs(tiny_file: Callable[..., Path], tmp_path: Path) -> None:
    config = config_of(tiny_file(xl=True, scheduler="EulerDiscreteScheduler"))
    with pytest.raises(GgufSdError, match="this model takes pairs of vectors for two text encoders"):
        load_embeddings(as_embeddings(written(tmp_path / "a.safetensors", vectors(1))), config)
    save_file({"clip_l": vectors(1), "clip_g": vectors(2)}, tmp_path / "b.safetensors")
    with pytest.raises(GgufSdError, match="1 and 2 vectors"):
        load_embeddings(as_embeddings(tmp_path / "b.safetensors"), config)
