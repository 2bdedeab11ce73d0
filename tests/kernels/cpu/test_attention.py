"""Attention against the formula in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels import ops
from gguf_sd_kernels.cpu import attention as attention_file
from gguf_sd_kernels.cpu import native, processor

TILES = processor.has_tiles()  # before a test says otherwise
SHAPES = [  # (B, H, N, M, D): self- and cross-attention, the head sizes of SD 1.5 and SDXL, odd lengths
    (2, 8, 300, 300, 40),
    (1, 3, 130, 77, 64),
    (2, 2, 65, 77, 160),
    (1, 1, 1, 1, 8),
    (2, 1, 1100, 1030, 80),
    (1, 6, 2100, 2100, 40),
    (1, 1, 257, 257, 512),
]


def exact(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def relative_error(got: Tensor, want: Tensor) -> float:
    return ((got.double() - want).norm() / want.norm()).item()


def inputs(shape: tuple[int, ...], dtype: torch.dtype, sharpness: float, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gaussian q, k as strided views, v contiguous; ``sharpness`` is the scores' standard deviation."""
    b, h, n, m, d = shape
    gen = torch.Generator().manual_seed(seed)
    q = (sharpness * torch.randn(b, n, h, d, generator=gen)).to(dtype).transpose(1, 2)
    k = torch.randn(b, m, h, d, generator=gen).to(dtype).transpose(1, 2)
    return q, k, torch.randn(b, h, m, d, generator=gen).to(dtype)


@pytest.fixture(params=["with tiles", "with tiles, without a compiler", "bfloat16 is fast", "bfloat16 is slow"])
def either_processor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each way, on whichever processor this is."""
    kind = str(request.param)
    monkeypatch.setattr(processor, "has_tiles", lambda: kind.startswith("with tiles"))
    monkeypatch.setattr(processor, "multiplies_bfloat16_fast", lambda: kind != "bfloat16 is slow")
    if kind == "with tiles, without a compiler":
        monkeypatch.setattr(native, "attends", lambda q, k, v: False)
    return kind


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 30.0])
def test_attention(shape: tuple[int, ...], sharpness: float, either_processor: str) -> None:
    if sharpness > 10 and TILES and either_processor == "bfloat16 is fast":
        pytest.skip(
            "torch.mm, asked for the largest scores, may leave a row of NaN in a process' first product in tiles"
        )
    q, k, v = inputs(shape, torch.bfloat16, sharpness, seed=shape[2])
    got, want = ops.attention(q, k, v), exact(q, k, v)
    assert got.dtype == torch.bfloat16
    assert got.shape == want.shape
    # q is rounded once more in bfloat16, after it was scaled: that is felt where scores are in the hundreds.
    assert relative_error(got, want) < 6e-3 * (3 if sharpness > 10 else 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3)])
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 30.0])
def test_attention_of_other_dtypes(
    shape: tuple[int, ...], dtype: torch.dtype, tolerance: float, sharpness: float
) -> None:
    q, k, v = inputs(shape, dtype, sharpness, seed=shape[2])
    got, want = ops.attention(q, k, v), exact(q, k, v)
    assert got.dtype == dtype
    assert got.shape == want.shape
    assert relative_error(got, want) < tolerance


@pytest.mark.parametrize("sharpness", [0.3, 1.0, 3.0, 10.0])
def test_bfloat16_error_is_near_sdpas(sharpness: float) -> None:
    q, k, v = inputs((1, 2, 700, 900, 40), torch.bfloat16, sharpness, seed=1)
    want = exact(q, k, v)
    ours = relative_error(attention_file._attention_bf16(q, k, v), want)
    assert ours < 4 * relative_error(F.scaled_dot_product_attention(q, k, v), want)


@pytest.mark.usefixtures("either_processor")
@pytest.mark.parametrize("offset", [-400.0, 400.0])
def test_scores_far_from_zero(offset: float) -> None:
    """A constant added to all scores changes nothing, even where every one is below or above exp's range."""
    q, k, v = inputs((1, 2, 600, 600, 64), torch.bfloat16, 1.0, seed=2)
    q, k = q.clone(), k.clone()
    q[..., 0], k[..., 0] = 8.0, offset
    assert relative_error(ops.attention(q, k, v), exact(q, k, v)) < 2e-2


@pytest.mark.usefixtures("either_processor")
def test_one_key_outweighs_all() -> None:
    """One key outweighs the rest by far more than an exponential can hold: no bound from norms will do."""
    q, k, v = inputs((1, 1, 520, 1024, 64), torch.bfloat16, 1.0, seed=3)
    q = q.abs() + 4
    k = k.clone()
    k[:, :, 513] = 16.0  # scores near 500 x log2 e, the others near 0
    torch.testing.assert_close(ops.attention(q, k, v), v[:, :, 513:514].expand_as(q), rtol=2**-7, atol=0)


@pytest.mark.skipif(not processor.has_tiles(), reason="this processor has no tiles of bfloat16")
def test_with_tiles_it_is_the_kernels() -> None:
    q, k, v = inputs((1, 2, 300, 300, 40), torch.bfloat16, 1.0, seed=5)
    if not native.attends(q, k, v):
        pytest.skip("no C++ compiler that knows them")
    got = ops.attention(q, k, v)
    assert torch.equal(got, native.attention(q, k, v))
    assert not torch.equal(got, F.scaled_dot_product_attention(q, k, v))


@pytest.mark.parametrize("tiles", [True, False])
def test_with_tiles_but_no_kernel_it_is_torchs_own(tiles: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processor, "has_tiles", lambda: tiles)
    monkeypatch.setattr(processor, "multiplies_bfloat16_fast", lambda: True)
    monkeypatch.setattr(native, "attends", lambda q, k, v: False)
    q, k, v = inputs((1, 2, 300, 300, 40), torch.bfloat16, 1.0, seed=5)
    assert torch.equal(ops.attention(q, k, v), F.scaled_dot_product_attention(q, k, v)) is tiles


def test_row_max_orders_negative_rows() -> None:
    scores = torch.randn(2, 50, 7, generator=torch.Generator().manual_seed(4)).bfloat16()
    scores[:, ::3] = -scores[:, ::3].abs()
    assert torch.equal(attention_file._row_max(scores), scores.amax(-1, keepdim=True))


def test_shapes_that_do_not_fit() -> None:
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match=r"q \[1, 2, 3, 8\], k \[1, 2, 5, 8\], v \[1, 2, 3, 8\]"):
        ops.attention(q, k, q)
