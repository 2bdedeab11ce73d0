"""K-quants and IQ4_NL: gguf-py decodes them, and their error is below that of llama.cpp's own quantisers."""

from __future__ import annotations

import gguf
import pytest
import torch

from gguf_sd_convert.quantize.quantizers import quantize

# Relative RMS error of ggml's quantize_row_*_ref (IQ4_NL: of quantize_iq4_nl, which searches) of mid 2026, compiled
# and run on these very rows.
GAUSSIAN = {"Q4_K": 0.07142, "Q5_K": 0.03612, "Q6_K": 0.01778, "IQ4_NL": 0.07626}
LAPLACE = {"Q4_K": 0.08454, "Q5_K": 0.04272, "Q6_K": 0.02163, "IQ4_NL": 0.08794}
LEVELS = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 63, "IQ4_NL": 15}


def decode(blocks: torch.Tensor, qtype: str) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[qtype]))


def relative_rms(x: torch.Tensor, qtype: str) -> float:
    y = decode(quantize(x, qtype), qtype)
    return float((x.double() - y.double()).norm() / x.double().norm())


@pytest.mark.parametrize("qtype", GAUSSIAN)
def test_error_is_below_llama_cpps(qtype: str) -> None:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(256, 1280, generator=generator) * 0.02
    assert relative_rms(x, qtype) < 0.99 * GAUSSIAN[qtype]
    uniform = torch.rand(64, 1280, generator=generator)
    laplace = torch.randn(64, 1280, generator=generator).sign() * uniform.log()
    assert relative_rms(laplace, qtype) < 0.99 * LAPLACE[qtype]


@pytest.mark.parametrize("qtype", GAUSSIAN)
def test_blocks_that_are_easy_to_get_wrong(qtype: str) -> None:
    x = torch.zeros(8, 256)
    x[1] = 0.75
    x[2, 5] = -3.0
    x[3, :2] = torch.tensor([65000.0, -65000.0])
    x[4] = 2.0**-24 * torch.arange(256)  # scales below float16's smallest
    x[5] = torch.linspace(-1e-42, 1e-42, 256)
    x[6] = -torch.arange(256.0)
    x[7, :32], x[7, 32:] = 1e-3, 1.0  # groups of very different size
    decoded = decode(quantize(x, qtype), qtype)
    assert decoded.isfinite().all()
    assert (decoded[0] == 0).all()
    step = 2 * x.abs().amax(1, keepdim=True) / LEVELS[qtype]
    assert ((decoded - x).abs() <= step + 256 * 2.0**-24).all()
    assert torch.allclose(decoded[1], x[1], rtol=0.02)


def test_exact_where_the_format_is() -> None:
    """Values on the grid of a super-block come back unchanged."""
    generator = torch.Generator().manual_seed(3)
    q = torch.randint(0, 16, (20, 8, 32), generator=generator).float()
    q[:, :, 0], q[:, :, 1] = 0, 15
    scale = torch.randint(40, 64, (20, 8, 1), generator=generator)
    minimum = torch.randint(0, 64, (20, 8, 1), generator=generator)
    scale[:, 0], minimum[:, 1] = 63, 63
    x = (0.25 * scale * q - 0.5 * minimum).flatten(1)
    assert float((decode(quantize(x, "Q4_K"), "Q4_K") - x).norm() / x.norm()) < 2e-3


def test_refuses_what_is_only_read_and_rows_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="only read"):
        quantize(torch.zeros(2, 256), "Q2_K")
    with pytest.raises(ValueError, match="multiple of 256"):
        quantize(torch.zeros(2, 320), "Q4_K")
