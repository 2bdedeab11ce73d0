"""Every field of every configuration with values that no model has: each file opens or is refused in one sentence, fast
and before anything is built."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.config import ModelConfig, SafetyConfig, SchedulerConfig, TextConfig, UNetConfig, VAEConfig
from gguf_sd.errors import GgufSdError

Make = Callable[..., Path]
DEEP: Any = []
for _ in range(500):
    DEEP = [DEEP]
NASTY = [None, True, -1, 0, 3000, 1 << 70, 0.5, math.nan, math.inf, 1e308, "x", "", [], [1], ["x"] * 4, [[1]], {}, DEEP]
SECONDS = 1.0  # of the processor that a refusal may take
CONFIG = ModelConfig(
    unet=UNetConfig(
        block_out_channels=(32,), layers_per_block=1, transformer_layers=(1,), num_heads=(2,), context_dim=32
    ),
    vae=VAEConfig(block_out_channels=(32,), layers_per_block=1),
    text=(TextConfig(vocab_size=600, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                     bos_token_id=598, eos_token_id=599, pad_token_id=599),),
    safety=SafetyConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                        image_size=28, resize=28, projection_dim=8),
)  # fmt: skip


def write(path: Path, config: str, extra: dict[str, np.ndarray] | None = None) -> Path:
    writer = gguf.GGUFWriter(path, "gguf_sd")
    writer.add_string(keys.CONFIG, config)
    for name, shape in inventory.tensors(CONFIG):
        writer.add_tensor(name, np.zeros(shape, dtype=np.float16))
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def mutations(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings with one of them, at any depth, made nasty; and what was done."""
    for key, value in values.items():
        for nasty in NASTY:
            yield f"{key} = {str(nasty)[:20]}", {**values, key: nasty}
        if isinstance(value, dict):
            for what, inner in mutations(value):
                yield f"{key}.{what}", {**values, key: inner}
        if isinstance(value, list) and value and isinstance(value[0], dict):
            for what, inner in mutations(value[0]):
                yield f"{key}[0].{what}", {**values, key: [inner, *value[1:]]}


def as_dict(config: Any) -> Any:
    if is_dataclass(config):
        return {field.name: as_dict(getattr(config, field.name)) for field in fields(config)}
    return [as_dict(item) for item in config] if isinstance(config, tuple) else config


def refused_or_fine(attempt: Callable[[], object], what: str) -> bool:
    """Whether it was fine; fails for any other exception, for more than a sentence, and for a long wait."""
    started, said = time.process_time(), ""
    try:
        attempt()
    except GgufSdError as error:
        said = str(error)
    except Exception as error:
        raise AssertionError(f"{what}: {type(error).__name__}: {error}") from error
    assert time.process_time() - started < SECONDS, what
    assert len(said) < 1000, what
    assert "\n" not in said, what
    return not said


def test_the_model_itself_is_fine(tmp_path: Path) -> None:
    assert ModelFile.open(write(tmp_path / "m.gguf", json.dumps(as_dict(CONFIG)))).config == CONFIG


def test_every_field_of_a_gguf(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", json.dumps(as_dict(CONFIG)))
    model = ModelFile.open(path)
    count = fine = 0
    for what, values in mutations(as_dict(CONFIG)):
        model.file.metadata[keys.CONFIG] = json.dumps(values)

        def attempt() -> None:
            from gguf_sd.checkpoint.check_tensors import check_tensors
            from gguf_sd.checkpoint.model_file import own_config

            shapes = {canonical: model.file.shape(name) for canonical, name in model.names.items()}
            check_tensors(own_config(model.file), shapes, str(path))

        fine += refused_or_fine(attempt, what)
        count += 1
    assert count > 900
    assert fine < count / 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unet": {"layers_per_block": 3000}}, "gguf_sd.config: unet.layers_per_block is 3000; it takes an integer"),
        ({"defaults": {"width": "x"}}, "defaults.width is 'x'; it takes an integer from"),
        ({"unet": {"transformer_layers": [1, 1]}}, "unet.transformer_layers is .* takes 1 values"),
        ({"vae": {"scaling_factor": math.nan}}, "vae.scaling_factor is nan; it takes a finite number"),
        ({"defaults": {"sampler": "fastest"}}, "defaults: unknown sampler 'fastest'"),
        ({"defaults": {"schedule": "steep"}}, "defaults: unknown schedule 'steep'"),
        ({"scheduler": {"beta_schedule": "round"}}, "scheduler.beta_schedule is 'round'; it takes a text out of"),
        ({"text": []}, "text is .*; it takes a list"),
        ({"unet": {"layers_per_block": 16}}, "lacks (at least )?[0-9]+ of .* tensors"),
        ({"unet": {"block_out_channels": [64]}}, r"has shape \[128, 32\] where the model takes \[256, 64\]"),
    ],
)
def test_what_is_said(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    values = as_dict(CONFIG)
    for part, new in change.items():
        values[part] = values[part] | new if isinstance(new, dict) else new
    path = write(tmp_path / "m.gguf", json.dumps(values))
    with pytest.raises(GgufSdError, match=f"m.gguf.*{message}"):
        ModelFile.open(path)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "7", "null", "{", '{"unet": ' + "9" * 10_000 + "}"])
def test_text_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    path = write(tmp_path / "m.gguf", text)
    assert not refused_or_fine(lambda: ModelFile.open(path), text[:10])


@pytest.mark.parametrize(
    "name",
    ["unet/config.json", "vae/config.json", "text_encoder/config.json", "safety_checker/config.json",
     "feature_extractor/preprocessor_config.json", "scheduler/scheduler_config.json", "model_index.json"],
)  # fmt: skip
def test_every_setting_of_a_folder(tiny_pipeline: Make, tmp_path: Path, name: str) -> None:
    from gguf_sd_convert.options import ConvertOptions
    from gguf_sd_convert.prepare import source_config

    folder = tmp_path / "model"
    shutil.copytree(tiny_pipeline(safety=True), folder)
    values = json.loads((folder / name).read_text())
    for what, changed in mutations(values):
        (folder / name).write_text(json.dumps(changed))
        refused_or_fine(lambda: source_config(folder, ConvertOptions()), f"{name}: {what}")
    for text in ("[" * 100_000, "{}", "[]", " " * (2 << 20)):
        (folder / name).write_text(text)
        refused_or_fine(lambda: source_config(folder, ConvertOptions()), f"{name}: {text[:5]}")


def test_schedulers_declare_what_they_take() -> None:
    with pytest.raises(ValueError, match="timestep_spacing is 'odd'"):
        SchedulerConfig.from_dict({"timestep_spacing": "odd"})
