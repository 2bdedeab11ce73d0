"""Types by layer: the knapsack against an exhaustive search, the sensitivities against what they predict."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch

from gguf_sd.bench.calls import Samples
from gguf_sd.errors import GgufSdError
from gguf_sd_convert.calibrate.knapsack import Choice, solve
from gguf_sd_convert.calibrate.options import Calibration
from gguf_sd_convert.calibrate.sensitivity import groups, measured_calls, usable_types
from gguf_sd_convert.convert import ConvertOptions, convert


@pytest.mark.parametrize("seed", range(20))
def test_knapsack_is_within_one_step_of_the_optimum(seed: int) -> None:
    rng = random.Random(seed)
    layers = []
    for _ in range(6):
        size, error = rng.randint(5, 60), rng.uniform(1, 50)
        layers.append(
            [Choice(round(size * b), error * 2 ** (-2 * b) * rng.uniform(0.8, 1.2)) for b in (4.5, 5, 6, 8.5)]
        )
    least = sum(min(c.nbytes for c in choices) for choices in layers)
    budget = round(least * rng.uniform(1, 1.8))

    def total(picked: tuple[int, ...]) -> tuple[int, float]:
        chosen = [choices[i] for choices, i in zip(layers, picked, strict=True)]
        return sum(c.nbytes for c in chosen), sum(c.error for c in chosen)

    every = (total(picked) for picked in itertools.product(range(4), repeat=6))
    best = min(error for nbytes, error in every if nbytes <= budget)
    nbytes, error = total(tuple(solve(layers, budget)))
    steps = [abs(a.error - b.error) for choices in layers for a, b in itertools.pairwise(choices)]
    assert nbytes <= budget
    assert best <= error * (1 + 1e-9)
    assert error <= best + max(steps)


def test_knapsack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="3 bytes more"):
        solve([[Choice(10, 1.0), Choice(20, 0.5)], [Choice(5, 1.0)]], 12)


def test_layers_that_are_stacked_share_a_type() -> None:
    names = ["a.attn1.to_q", "a.attn1.to_k", "a.attn1.to_v", "a.attn2.to_q", "x.emb_layers.1", "y.emb_layers.1"]
    assert groups(names) == [tuple(names[:3]), ("a.attn2.to_q",), tuple(names[4:])]
    assert usable_types(["Q8_0", "Q4_K"], [512, 320]) == ["Q8_0"]


@pytest.mark.parametrize(("edge", "count"), [(4, 64), (32, 16), (64, 4), (128, 4)])
def test_few_large_pictures_are_measured_evenly_by_timestep(edge: int, count: int) -> None:
    n = 100
    timesteps = torch.arange(n).flip(0) * 10
    latents = torch.zeros(1, 1, 1, 1).expand(n, 1, edge, edge)
    made = Samples(latents, timesteps, torch.zeros(n, dtype=torch.long), torch.ones(n), torch.zeros(1, 1, 1))
    chosen = measured_calls(made)
    gaps = chosen.timesteps.diff()
    assert len(chosen) == count
    assert bool((gaps > 0).all())
    assert int(gaps.max() - gaps.min()) <= 10
    assert 0 <= float(chosen.timesteps[0]) <= 1000 / count


@pytest.mark.slow
def test_mixed_beats_uniform_at_its_size(tiny_pipeline: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny_pipeline(unet={"sample_size": 8})
    uniform = convert(model, tmp_path / "q4_1.gguf", ConvertOptions(type="q4_1"))
    target = f"{uniform.nbytes}B"
    mixed = convert(
        model,
        tmp_path / "mixed.gguf",
        ConvertOptions(type="mixed", calibration=Calibration(compensate=False, target=target, samples=16)),
    )
    assert 0.98 * uniform.nbytes < mixed.nbytes <= uniform.nbytes
    types = {t.name: t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "mixed.gguf").tensors}
    assert len({kind for name, kind in types.items() if name.startswith("model.") and name.endswith("weight")}) > 3
    attention = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_"
    assert len({types[f"{attention}{leaf}.weight"] for leaf in "qkv"}) == 1
    with pytest.raises(GgufSdError, match="out of reach: Q4_0 throughout takes"):
        convert(
            model,
            tmp_path / "small.gguf",
            ConvertOptions(type="mixed", calibration=Calibration(compensate=False, target="100kB", samples=16)),
        )
