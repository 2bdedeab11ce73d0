"""Kernels in C++ against the formulas in float64, and when they are chosen."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from gguf_sd_kernels import ops
from gguf_sd_kernels.cpu import int8, native, processor

EPS = 1e-5
LOWEST_SILU = 0.2785  # below zero
NORMS = [  # (H, W, C, groups): groups narrower than a vector, wider, and across two
    (1, 1, 64, 32),
    (3, 5, 48, 3),
    (7, 9, 320, 32),
    (40, 41, 96, 32),
]
NOT_FINITE = [math.nan, math.inf, -math.inf]


@pytest.fixture(autouse=True, scope="module")
def kernels() -> None:
    if not native.is_there():
        pytest.skip("no C++ compiler, or a processor without AVX-512")


@pytest.fixture
def tiles() -> None:
    library = native._library()
    assert library is not None
    if not processor.has_tiles() or not hasattr(library, "attention") or library.tiles_allowed():
        pytest.skip("this processor, compiler or system has no tiles of bfloat16")
    assert native._has_tiles(), "attention is there, but wrong"


@pytest.fixture
def set_threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest, set_threads: Callable[[int], None]) -> None:
    set_threads(request.param)


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the kernels that were called."""
    names: list[str] = []
    run = native._call

    def note(name: str, *arguments: object) -> None:
        names.append(name)
        run(name, *arguments)

    monkeypatch.setattr(native, "_call", note)
    return names


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = q.double(), k.double(), v.double()
    return (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v


def heads(queries: int, keys: int, dim: int, sharpness: float = 1.0) -> list[Tensor]:
    """Gaussian bfloat16 q, k and v, split from [2, N, 3 * D]; ``sharpness`` is the scores' standard deviation."""
    flat = (random(2, n, 3 * dim, seed=seed) for seed, n in enumerate((queries, keys, keys)))
    q, k, v = (x.unflatten(2, (3, dim)).transpose(1, 2) for x in flat)
    return [x.bfloat16() for x in (sharpness * q, k, v)]


def relative_error(got: Tensor, want: Tensor) -> float:
    assert got.shape == want.shape
    return ((got.double() - want).norm() / want.norm()).item()


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("sharpness", [0.3, 1.0, 30.0])
@pytest.mark.parametrize("dim", [8, 24, 40, 64, 80, 160, 256])
@pytest.mark.parametrize("keys", [1, 31, 32, 77, 300, 1030])
@pytest.mark.parametrize("queries", [1, 31, 33, 300])
def test_attention(queries: int, keys: int, dim: int, sharpness: float) -> None:
    q, k, v = heads(queries, keys, dim, sharpness)
    got = native.attention(q, k, v)
    assert got.dtype == torch.bfloat16
    assert relative_error(got, softmax_attention(q, k, v)) < 6e-3 * (3 if sharpness > 10 else 1)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("transposed", [False, True], ids=["gaps between rows", "gaps between values"])
def test_attention_of_other_layouts(transposed: bool) -> None:
    q, k, v = (torch.cat([x, 100 + x], 3)[..., :40] for x in heads(33, 77, 40))
    if transposed:
        q, k, v = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v))
    assert relative_error(native.attention(q, k, v), softmax_attention(q, k, v)) < 6e-3


@pytest.mark.usefixtures("tiles")
def test_heads_join_without_a_copy() -> None:
    out = native.attention(*heads(33, 77, 40))
    assert out.transpose(1, 2).flatten(2).data_ptr() == out.data_ptr()


@pytest.mark.usefixtures("tiles")
def test_attention_is_the_same_on_several_threads(set_threads: Callable[[int], None]) -> None:
    operands = heads(300, 300, 40)
    set_threads(1)
    want = native.attention(*operands)
    set_threads(3)
    assert torch.equal(native.attention(*operands), want)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("offset", [-400.0, 400.0])
def test_scores_far_from_zero(offset: float) -> None:
    """A constant added to all scores changes nothing."""
    q, k, v = heads(65, 600, 64)
    q, k = q.clone(), k.clone()
    q[..., 0], k[..., 0] = 8.0, offset
    assert relative_error(native.attention(q, k, v), softmax_attention(q, k, v)) < 6e-3


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("where", [0, 31, 32, 127, 128, 200, 511, 599])
def test_one_key_outweighs_all(where: int) -> None:
    """By far more than an exponential holds, wherever it comes."""
    q, k, v = heads(65, 600, 64)
    q, k = q.abs() + 4, k.clone()
    k[:, :, where] = 16.0  # scores near 600, the others' within 30
    want = v[:, :, where : where + 1].expand_as(q)
    torch.testing.assert_close(native.attention(q, k, v), want, rtol=2**-7, atol=0)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("late", [70, 100, 130, 300, 599])
@pytest.mark.parametrize("early", [33, 65, 97])
def test_what_came_before_a_larger_score_counts_on(early: int, late: int) -> None:
    """A weight of e^39 is within what is held relative to the first keys, one of e^42 is not: e^-3 of it is left."""
    q, k, v = heads(65, 600, 64)
    q, k = 0.1 * q, k.clone()
    q[..., 0], k[..., 0] = 8.0, 0.0
    q[:, :, 1::3, 0] = 4.0  # these queries' scores are half as large
    k[:, :, early, 0], k[:, :, late, 0] = 39.0, 42.0
    assert relative_error(native.attention(q, k, v), softmax_attention(q, k, v)) < 6e-3


@pytest.mark.usefixtures("tiles")
def test_scores_that_grow_in_steps() -> None:
    q, k, v = heads(65, 600, 64)
    q, k = 0.1 * q, k.clone()
    q[..., 0], k[..., 0] = 8.0, 0.0
    for key, score in {40: 50, 70: 110, 140: 112, 150: 170, 290: 250, 410: 400, 590: 398}.items():
        k[:, :, key, 0] = score
    assert relative_error(native.attention(q, k, v), softmax_attention(q, k, v)) < 6e-3


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("row", [0, 40, 150, 299])
@pytest.mark.parametrize("operand", [0, 1, 2], ids=["q", "k", "v"])
def test_what_is_not_finite_spreads_as_torchs_does(operand: int, row: int, value: float) -> None:
    operands = [x.clone() for x in heads(300, 300, 40)]
    operands[operand][1, 2, row, 3] = value
    want = F.scaled_dot_product_attention(*(x.float() for x in operands)).isfinite()
    assert not want.all()
    assert torch.equal(native.attention(*operands).isfinite(), want)


@pytest.mark.usefixtures("tiles")
def test_no_weight_for_all_of_the_first_keys() -> None:
    q, k, v = (x.clone() for x in heads(33, 100, 40))
    q[..., 3] = q[..., 3].abs() + 0.1
    k[:, :, :32, 3] = -math.inf
    assert relative_error(native.attention(q, k, v), softmax_attention(q, k, v)) < 6e-3


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_operands_of_different_dtypes(dtype: torch.dtype) -> None:
    q, k, v = heads(33, 77, 40)
    with pytest.raises(RuntimeError, match="dtype"):
        ops.attention(q, k.to(dtype), v.to(dtype))


@pytest.mark.parametrize(
    ("keys", "dim", "dtype"), [(77, 264, torch.bfloat16), (0, 40, torch.bfloat16), (77, 40, torch.float32)]
)
def test_attention_that_is_left_to_torch(keys: int, dim: int, dtype: torch.dtype) -> None:
    q, k = (torch.empty(1, 2, n, dim, dtype=dtype) for n in (33, keys))
    assert not native.attends(q, k, k)


@pytest.mark.usefixtures("tiles")
def test_attention_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(native, "attention", lambda q, k, v: 1.1 * F.scaled_dot_product_attention(q, k, v))
    with caplog.at_level(logging.WARNING):
        assert not native._has_tiles.__wrapped__()
    assert "attention as built by this machine's compiler is wrong" in caplog.text


def assert_stands_for(coded: native.Coded, want: Tensor, silu: bool = False) -> None:
    """Each value within half a step of what is wanted, over a range hardly wider than its own."""
    values, scale, zero = coded
    assert values.dtype == torch.uint8
    assert values.shape == want.shape
    assert (scale * (values.double() - zero) - want).abs().max() <= 0.51 * scale
    low, high = min(want.min().item(), 0.0), max(want.max().item(), 0.0)
    assert 255 * scale <= 1.001 * (high - low) + silu * LOWEST_SILU


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x.double(), (x.shape[-1],), weight.double(), bias.double(), EPS)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, silu: bool = False) -> Tensor:
    """Of x [H, W, C]."""
    y = F.group_norm(x.double().permute(2, 0, 1)[None], groups, weight.double(), bias.double(), EPS)
    return (F.silu(y) if silu else y)[0].permute(1, 2, 0)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("shape", [(1,), (5,), (16,), (3, 17), (2, 5, 6, 7), (1000, 101), (3001, 32)])
def test_quantize(shape: tuple[int, ...], silu: bool) -> None:
    x = (3 * random(*shape) + 1).bfloat16()
    want = F.silu(x.double()) if silu else x.double()
    assert_stands_for(native.quantize(x, silu), want, silu)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize("shape", [(1, 16), (3, 48), (2, 77, 320), (60, 1280)])
def test_layer_norm(shape: tuple[int, ...], mean: float) -> None:
    x = (random(*shape) + mean).bfloat16()
    affine = random(shape[-1], seed=1), random(shape[-1], seed=2)
    assert_stands_for(native.layer_norm_quantize(x, *affine, EPS), layer_norm(x, *affine))


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("mean", [0.0, 100.0])
@pytest.mark.parametrize(("height", "width", "channels", "groups"), NORMS)
def test_group_norm(height: int, width: int, channels: int, groups: int, mean: float, silu: bool) -> None:
    x = (random(height, width, channels) + mean).bfloat16()
    affine = random(channels, seed=1), random(channels, seed=2)
    got = native.group_norm_quantize(x, groups, *affine, EPS, silu)
    assert_stands_for(got, group_norm(x, groups, *affine, silu), silu)


def test_layer_norm_of_rows_that_differ_in_size() -> None:
    x = (random(40, 64) * torch.logspace(-3, 3, 40)[:, None]).bfloat16()
    affine = random(64, seed=1), random(64, seed=2)
    assert_stands_for(native.layer_norm_quantize(x, *affine, EPS), layer_norm(x, *affine))


def test_layer_norm_of_rows_that_start_far_out() -> None:
    x = random(40, 640)
    x[:, 0] = 300
    affine = torch.ones(640), torch.zeros(640)
    assert_stands_for(native.layer_norm_quantize(x.bfloat16(), *affine, EPS), layer_norm(x.bfloat16(), *affine))


@pytest.mark.parametrize("far", [100.0, 300.0])
def test_group_norm_of_a_picture_that_starts_far_out(far: float) -> None:
    x = random(256, 256, 32)
    x[0, 0] = far
    affine = torch.ones(32), torch.zeros(32)
    got = native.group_norm_quantize(x.bfloat16(), 32, *affine, EPS, silu=False)
    assert_stands_for(got, group_norm(x.bfloat16(), 32, *affine))


def test_zeros() -> None:
    values, scale, zero = native.quantize(torch.zeros(4, 40).bfloat16(), silu=False)
    assert math.isfinite(scale)
    assert (values == zero).all()


@pytest.mark.parametrize("value", [-2.0, 3.0])
def test_a_constant(value: float) -> None:
    values, scale, zero = native.quantize(torch.full((4, 40), value).bfloat16(), silu=False)
    assert scale * (values.double() - zero).unique().item() == pytest.approx(value, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 3.0])
def test_norms_of_constants_are_their_biases(value: float) -> None:
    x = torch.full((6, 8, 64), value).bfloat16()
    affine = random(64, seed=1), random(64, seed=2)
    want = affine[1].double().expand(x.shape)
    assert_stands_for(native.layer_norm_quantize(x, *affine, EPS), want)
    assert_stands_for(native.group_norm_quantize(x, 32, *affine, EPS, silu=False), want)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("value", NOT_FINITE)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("kernel", ["quantize", "layer_norm", "group_norm"])
def test_what_is_not_finite_leaves_no_scale(kernel: str, silu: bool, value: float) -> None:
    x = random(40, 41, 64).bfloat16()
    affine = torch.ones(64), torch.zeros(64)
    run: dict[str, Callable[[], native.Coded]] = {
        "quantize": lambda: native.quantize(x, silu),
        "layer_norm": lambda: native.layer_norm_quantize(x, *affine, EPS),
        "group_norm": lambda: native.group_norm_quantize(x, 32, *affine, EPS, silu),
    }
    assert math.isfinite(run[kernel]().scale)
    for place in ((0, 0, 0), (20, 7, 33), (39, 40, 63)):
        kept, x[place] = x[place].clone(), value
        assert math.isnan(run[kernel]().scale)
        x[place] = kept


def test_codes_are_the_same_on_several_threads(set_threads: Callable[[int], None]) -> None:
    x = random(40, 41, 96).bfloat16()
    affine = random(96, seed=1), random(96, seed=2)

    def codes(threads: int) -> tuple[native.Coded, ...]:
        set_threads(threads)
        return (
            native.quantize(x, silu=True),
            native.layer_norm_quantize(x, *affine, EPS),
            native.group_norm_quantize(x, 32, *affine, EPS, silu=True),
        )

    (plain, layer, group), (other_plain, other_layer, other_group) = codes(1), codes(3)
    assert torch.equal(plain.values, other_plain.values)
    assert torch.equal(layer.values, other_layer.values)
    # Sums of a group's values are taken in another order, which may tip what is halfway between two codes.
    assert differ(group, other_group) <= 1


def differ(a: Any, b: Any) -> int:
    """By how many steps codes do at most."""
    assert a.zero == pytest.approx(b.zero, abs=1)
    assert a.scale == pytest.approx(b.scale, rel=2**-7)
    return int((a.values.int() - b.values.int()).abs().max())


def picture(channels: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return random(batch, channels, 9, 11).to(dtype).contiguous(memory_format=torch.channels_last)


def activations(channels: int, dtype: torch.dtype = torch.bfloat16, batch: int = 1) -> dict[str, int8.Activation]:
    """What each of the three functions makes of random values."""
    x, rows = picture(channels, batch, dtype), random(2, 77, channels, seed=3).to(dtype)
    affine = random(channels, seed=1), random(channels, seed=2)
    weight, bias = (x.to(dtype) for x in affine)  # of x's dtype, as torch's layer norm takes them
    return {
        "quantize": int8.quantize(x, silu=True),
        "layer_norm_quantize": int8.quantize_layer_norm(rows, weight, bias, EPS),
        "group_norm_quantize": int8.quantize_group_norm(x, channels // 4, *affine, EPS, silu=True),
    }


@pytest.mark.parametrize(
    ("channels", "dtype", "batch", "chosen"),
    [
        (64, torch.bfloat16, 1, ["quantize", "layer_norm_quantize", "group_norm_quantize"]),
        (64, torch.float32, 1, []),
        (64, torch.bfloat16, 2, ["quantize", "layer_norm_quantize", "quantize"]),  # a group norm of two pictures
        (40, torch.bfloat16, 1, ["quantize"] * 3),  # no whole vectors
    ],
)
def test_choice(channels: int, dtype: torch.dtype, batch: int, chosen: list[str], called: list[str]) -> None:
    activations(channels, dtype, batch)
    assert called == chosen


@pytest.mark.parametrize(
    ("kernel", "limit"),
    # torch rounds what a norm gives to bfloat16 first.
    [("quantize", 1), ("layer_norm_quantize", 2), ("group_norm_quantize", 2)],
)
def test_torch_agrees(kernel: str, limit: int, called: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    ours = activations(64)[kernel]
    called.clear()
    monkeypatch.setattr(native, "is_there", lambda: False)
    torchs = activations(64)[kernel]
    assert not called
    assert differ(ours, torchs) <= limit
    if ours.values.dim() == 4:
        assert ours.values.is_contiguous(memory_format=torch.channels_last)


@pytest.fixture
def switched_off(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("GGUF_SD_NATIVE", "0")
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.mark.usefixtures("switched_off")
def test_switched_off(called: list[str]) -> None:
    assert all(math.isfinite(coded.scale) for coded in activations(64).values())
    assert not called
    assert not native._has_tiles.__wrapped__()


def test_not_while_torch_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(33, 77, 40)
    monkeypatch.setattr(native, "is_compiling", lambda: True)
    assert not native.is_there()
    assert not native.quantizes(q)
    assert not native.attends(q, k, v)


@pytest.mark.parametrize(("groups", "parameters"), [(5, 48), (3, 40)])
def test_group_norms_that_do_not_fit(groups: int, parameters: int) -> None:
    weight = torch.ones(parameters)
    with pytest.raises(ValueError, match=r"group norm of \[1, 48, 9, 11\]"):
        int8.quantize_group_norm(picture(48), groups, weight, weight, EPS)


def test_parameters_with_gaps() -> None:
    x, weight = random(5, 64).bfloat16(), random(128, seed=1)[::2]
    got = int8.quantize_layer_norm(x, weight, weight, EPS)
    assert_stands_for(native.Coded(*got[:3]), layer_norm(x, weight, weight))


@pytest.mark.skipif(not native.is_there(), reason="no kernels in C++ here")
@pytest.mark.parametrize("qtype", sorted(native.ENCODED))
@pytest.mark.parametrize(("rows", "columns"), [(1, 32), (7, 320), (40, 1152)])
def test_blocks_in_8_bits(qtype: str, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within half a step of what gguf-py decodes, each row over its own range; and the same as through torch."""
    weight = np.random.default_rng(0).normal(size=(rows, columns)).astype(np.float32)
    weight *= np.geomspace(1e-3, 10, rows, dtype=np.float32)[:, None]
    if rows > 1:
        weight[1] = 0
    kind = gguf.GGMLQuantizationType[qtype]
    packed = gguf.quants.quantize(weight, kind)
    blocks, exact = torch.from_numpy(packed.copy()), torch.from_numpy(gguf.quants.dequantize(packed, kind)).double()
    assert native.encodes(blocks, qtype)
    codes = int8.Codes.of_blocks(blocks, qtype, (rows, columns))
    steps = codes.scales.double()[:, None]
    largest = exact.abs().amax(1, keepdim=True)
    torch.testing.assert_close(steps, torch.where(largest > 0, largest / 127, 1.0), rtol=1e-6, atol=0)
    assert ((codes.values.double() * steps - exact).abs() <= 0.5001 * steps).all()
    monkeypatch.setattr(native, "encodes", lambda *_: False)
    plain = int8.Codes.of_blocks(blocks, qtype, (rows, columns))
    assert torch.equal(codes.scales, plain.scales)
    assert torch.equal(codes.values, plain.values)


def test_blocks_that_are_left_to_torch() -> None:
    blocks = torch.zeros(4, 36, dtype=torch.uint8)
    assert not native.encodes(blocks, "Q6_K")
    assert not native.encodes(blocks[:, ::2], "Q4_0")  # with gaps
    assert not native.encodes(blocks, "Q8_0")  # no whole blocks
    assert native.encodes(blocks, "Q4_0") is native.is_there()


@pytest.mark.usefixtures("tiles")
def test_scores_far_apart_cost_no_more() -> None:
    """Weights below 2^-126 are taken for zero; otherwise they take many times as long. And numbers
    so small are what they were behind it."""
    near, far = heads(256, 1024, 40), heads(256, 1024, 40, sharpness=30.0)
    seconds = {"near": math.inf, "far": math.inf}
    for _ in range(7):
        for name, operands in (("near", near), ("far", far)):
            started = time.perf_counter()
            native.attention(*operands)
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    assert seconds["far"] < 5 * seconds["near"]
    tiny = torch.full((1 << 16,), 1e-40)
    assert (tiny * 1.5 > 0).all()
