"""Files that are no LoRA, not for this model, or damaged: one sentence each, from the header where it tells."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gguf_sd.adapters.lora import Lora
from gguf_sd.adapters.lora_file import LoraFile
from gguf_sd.adapters.read_lora import check_loras
from gguf_sd.cli.main import main
from gguf_sd.config import SD15, SDXL, ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.request import Request, checked
from tests.adapters.conftest import all_targets, kohya, peft, random_lora, save


def some_layers(config: ModelConfig, naming: Callable[..., Any] = kohya, **names: Any) -> dict[str, Tensor]:
    """A LoRA for two of a full-size model's layers."""
    ends = ("transformer_blocks.0.attn2.to_k", "transformer_blocks.0.attn1.to_q")
    chosen = [t for t in all_targets(config, ["unet"]) if t.module.startswith("input_blocks.4.1")]
    chosen = [target for target in chosen if target.module.endswith(ends)]
    state: dict[str, Tensor] = naming(random_lora(config, chosen), config, **names)
    return state


NAME = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
DOWN, UP = f"{NAME}.lora_down.weight", f"{NAME}.lora_up.weight"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({UP: torch.ones(640, 4)}, "up has rank 4 where the others have 3"),
    "no up": ({UP: None}, "is incomplete: beside .* it has only alpha, down of that layer"),
    "NaN": ({UP: torch.full((640, 3), torch.nan)}, "lora_up.weight holds NaN or infinity"),
    "infinity": ({DOWN: torch.full((3, 768), torch.inf)}, "lora_down.weight holds NaN or infinity"),
    "alpha of NaN": ({f"{NAME}.alpha": torch.tensor(torch.nan)}, "alpha holds NaN or infinity"),
    "huge alpha": ({f"{NAME}.alpha": torch.tensor(1e30)}, r"alpha is 1e\+30; alpha is at most"),
    "alphas": ({f"{NAME}.alpha": torch.ones(3)}, "alpha is one number"),
    "integers": ({UP: torch.ones(640, 3, dtype=torch.int32)}, "is I32; floating-point numbers are needed"),
    "dimensions": ({UP: torch.ones(640)}, r"up has shape \[640\]"),
    "empty": ({UP: torch.ones(640, 0), DOWN: torch.ones(0, 768)}, r"(up|down) has shape"),
    "DoRA": ({f"{NAME}.dora_scale": torch.ones(640, 1)}, r"is a DoRA \(.*dora_scale\); gguf-sd takes LoRA, LoHa"),
    "OFT": ({f"{NAME}.oft_blocks": torch.ones(4, 4, 4)}, r"is a OFT \(.*oft_blocks\); gguf-sd takes LoRA"),
    "biases": ({f"{NAME}.diff_b": torch.ones(640)}, r"is a LoRA that changes biases or norms \(.*diff_b\)"),
    "norms": ({f"{NAME}.w_norm": torch.ones(640)}, "is a LoRA that changes biases or norms"),
    "difference and LoRA": ({f"{NAME}.diff": torch.ones(640, 768)}, "is incomplete"),
    "difference of another shape": (
        {f"{NAME}.diff": torch.ones(640, 7), DOWN: None, UP: None, f"{NAME}.alpha": None},
        "another model",
    ),
    "two kinds": ({f"{NAME}.hada_w1_a": torch.ones(640, 3)}, "is incomplete"),
    "twice": ({f"{NAME.replace('attn2_to_k', 'attn2.processor.to_k')}_lora.up.weight": torch.ones(640, 3)}, "twice"),
}


def test_names_of_any_length_make_a_sentence(tmp_path: Path) -> None:
    for name, message in (("x" * 2000, "a name of 2,015 characters"), ("lora_unet_" + "\x1b[2J" * 50, "fits no layer")):
        path = save({f"{name}.lora_up.weight": torch.ones(2)}, tmp_path / "a.safetensors")
        with pytest.raises(GgufSdError, match=message) as refused:
            LoraFile.open(path, SD15)
        assert str(refused.value).isprintable()
        assert len(str(refused.value)) < 600


@pytest.mark.parametrize("case", WRONG)
def test_tensors_that_do_not_go_together(case: str, tmp_path: Path) -> None:
    changes, sentence = WRONG[case]
    state = {name: x for name, x in (some_layers(SD15) | changes).items() if x is not None}
    path = save(state, tmp_path / "wrong.safetensors")
    with pytest.raises(GgufSdError, match=sentence):
        check_loras([Lora(path)], SD15)


@pytest.mark.parametrize(
    ("made_for", "naming", "names", "model", "sentence"),
    [
        (SD15, kohya, {}, SDXL, r"another model than this one \(SDXL\), but Stable Diffusion 1.x: .*attn2_to_k"),
        (SDXL, kohya, {"original": True}, SD15, r"another model than this one \(Stable Diffusion 1.x\), but SDXL"),
        (SDXL, peft, {}, SD15, r"another model than this one \(Stable Diffusion 1.x\), but SDXL: unet.down_blocks"),
    ],
)
def test_other_architectures(
    made_for: ModelConfig, naming: Any, names: dict, model: ModelConfig, sentence: str, tmp_path: Path
) -> None:
    path = save(some_layers(made_for, naming, **names), tmp_path / "other.safetensors")
    assert len(LoraFile.open(path, made_for).changes) == 2
    with pytest.raises(GgufSdError, match=sentence):
        LoraFile.open(path, model)


def test_other_models(tmp_path: Path) -> None:
    flux = {f"lora_transformer_single_blocks_0_linear1.lora_{x}.weight": torch.ones(4, 4) for x in ("up", "down")}
    path = save(flux, tmp_path / "flux.safetensors")
    with pytest.raises(GgufSdError, match=r"fits no layer of this model .*but a transformer model such as Flux"):
        LoraFile.open(path, SD15)


def test_what_is_no_lora_is_found_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save({"decoder.conv_in.weight": torch.ones(4)}, tmp_path / "vae.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    good = save(some_layers(SD15), tmp_path / "good.safetensors")
    (tmp_path / "short.safetensors").write_bytes(good.read_bytes()[:-100])
    for name, sentence in (
        ("vae", "is no LoRA but a VAE alone"),
        ("text", "is no safetensors file; a LoRA is taken as .safetensors alone"),
        ("short", "is truncated"),
        ("nothing", "does not exist"),
    ):
        with pytest.raises(GgufSdError, match=sentence):
            checked(Request("x", loras=str(tmp_path / f"{name}.safetensors")))
        assert main(["generate", "-p", "x", "--lora", str(tmp_path / f"{name}.safetensors")]) == 2
        assert sentence in capsys.readouterr().err


def test_names_of_every_trainer(tmp_path: Path) -> None:
    """Kohya's with diffusers' and original paths, peft's, and diffusers' of old give the same layers."""
    for config in (SD15, SDXL):
        first = save(some_layers(config), tmp_path / "first.safetensors")
        wanted = {change.target for change in LoraFile.open(first, config).changes}
        theirs = some_layers(config, peft)

        def renamed(*pairs: tuple[str, str], state: dict[str, Tensor] = theirs) -> dict[str, Tensor]:
            result = state
            for before, after in pairs:
                result = {key.replace(before, after): value for key, value in result.items()}
            return result

        old = renamed(
            ("to_k.lora_A.", "processor.to_k_lora.down."),
            ("to_k.lora_B.", "processor.to_k_lora.up."),
            ("to_q.lora_A.", "to_q.lora.down."),
            ("to_q.lora_B.", "to_q.lora.up."),
        )
        named = renamed(("lora_A.", "lora_A.default."), ("lora_B.", "lora_B.default."))
        bare = renamed(("unet.", "base_model.model."))
        for index, state in enumerate([some_layers(config, kohya, original=True), theirs, old, named, bare]):
            file = LoraFile.open(save(state, tmp_path / f"{index}.safetensors"), config)
            assert ({change.target for change in file.changes}, file.unmatched) == (wanted, ())
