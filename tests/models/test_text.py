"""Our text encoder against transformers', same weights, float32."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers

from gguf_sd.config import TextConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.models.text import TextEncoder

BASE = {"vocab_size": 99, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
IDS = {"bos_token_id": 97, "eos_token_id": 98, "pad_token_id": 0}
CONFIGS: dict[str, dict[str, Any]] = {
    "CLIP-L of SD 1.x": {"hidden_act": "quick_gelu"},
    "CLIP-L of SDXL": {"hidden_act": "quick_gelu", "num_hidden_layers": 4},
    "OpenCLIP-G of SDXL": {"hidden_act": "gelu", "projection_dim": 24, "num_attention_heads": 2},
    "one head, a short window": {"num_attention_heads": 1, "max_position_embeddings": 16, "projection_dim": 32},
}


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    assert got.shape == expected.shape
    return float((got.double() - expected).abs().max() / expected.abs().max())


def pair(case: str, dtype: torch.dtype = torch.float32) -> tuple[TextEncoder, Any]:
    """An encoder of ours and transformers' with the same random weights."""
    config = TextConfig(**(BASE | IDS | CONFIGS[case]))
    kind = transformers.CLIPTextModelWithProjection if config.projection_dim else transformers.CLIPTextModel
    theirs = kind(transformers.CLIPTextConfig(**(vars(config) | {"projection_dim": config.projection_dim or 32})))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            fan_in = parameter.shape[-1] if parameter.dim() > 1 and "embedding" not in name else 1
            parameter.copy_(noise * fan_in**-0.5 + ("norm" in name and name.endswith("weight")))
    tensors = {name: partial(lambda v: v, value) for name, value in theirs.state_dict().items() if "_ids" not in name}
    return TextEncoder.load(config, tensors, dtype, "the oracle"), theirs.eval()


def token_ids(config: TextConfig) -> torch.Tensor:
    """Texts that end early, in the middle and in the last place, padded with zeros or with the end token."""
    length = config.max_position_embeddings
    ids = torch.randint(1, 97, (3, length), generator=torch.Generator().manual_seed(4))
    ids[:, 0] = config.bos_token_id
    for row, end, padding in ((0, 1, 0), (1, length // 2, config.eos_token_id), (2, length - 1, 0)):
        ids[row, end:] = padding
        ids[row, end] = config.eos_token_id
    return ids


@pytest.mark.parametrize("case", CONFIGS)
@torch.inference_mode()
def test_equals_transformers(case: str) -> None:
    ours, theirs = pair(case)
    ids = token_ids(ours.config)
    expected = theirs(input_ids=ids, output_hidden_states=True)
    text_model = getattr(theirs, "text_model", theirs)  # transformers 5 dropped the level in CLIPTextModel
    for clip_skip in range(1, ours.config.num_hidden_layers + 1):
        states = expected.hidden_states[-clip_skip]
        got = ours.encode(ids, clip_skip, normalise=False)
        assert relative_error(got.states, states) < 1e-4
        normalised = ours.encode(ids, clip_skip, normalise=True).states
        assert relative_error(normalised, text_model.final_layer_norm(states)) < 1e-4
        if ours.config.projection_dim:
            assert got.pooled is not None
            assert relative_error(got.pooled, expected.text_embeds) < 1e-4
        else:
            assert got.pooled is None
    assert relative_error(ours.encode(ids, 1, normalise=True).states, expected.last_hidden_state) < 1e-4


@torch.inference_mode()
def test_later_tokens_change_nothing_before_them() -> None:
    ours, _ = pair("CLIP-L of SD 1.x")
    ids = token_ids(ours.config)[2:]
    changed = ids.clone()
    changed[0, 40] = (changed[0, 40] + 1) % 97
    before, after = (ours.encode(i, 1, normalise=True).states[0] for i in (ids, changed))
    assert torch.equal(before[:40], after[:40])
    assert not torch.equal(before[40:], after[40:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_runs_in_16_bits(dtype: torch.dtype) -> None:
    ours, theirs = pair("OpenCLIP-G of SDXL", dtype)
    ids = token_ids(ours.config)
    expected = theirs(input_ids=ids, output_hidden_states=True)
    encoded = ours.encode(ids, 2, normalise=False)
    assert encoded.states.dtype == dtype
    assert encoded.pooled is not None
    assert relative_error(encoded.states, expected.hidden_states[-2]) < 0.05
    assert relative_error(encoded.pooled, expected.text_embeds) < 0.05


def test_holds_weights_alone() -> None:
    ours, theirs = pair("CLIP-L of SD 1.x")
    assert not list(ours.buffers())
    weights = sum(parameter.numel() for parameter in theirs.parameters())
    assert sum(parameter.numel() for parameter in ours.parameters()) == weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_act": "relu"}, "no text encoder with activation 'relu'; there are quick_gelu, gelu"),
        ({"num_attention_heads": 5}, "width 32 does not split into 5 heads"),
    ],
)
def test_other_transformers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(GgufSdError, match=message):
        TextEncoder(TextConfig(**(BASE | changes)))
