"""Each figure against a library that is not the one it is made with."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image

from gguf_sd.bench.metrics import as_tensor, compare, scale_weights


def pictures(edge: int = 64) -> tuple[Image.Image, Image.Image]:
    rng = np.random.default_rng(edge)
    smooth = np.kron(rng.integers(0, 255, (edge // 8, edge // 8, 3)), np.ones((8, 8, 1)))
    noisy = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255)
    return tuple(Image.fromarray(x.astype(np.uint8)) for x in (noisy, smooth))  # type: ignore[return-value]


def test_psnr_and_ssim_are_scikit_images() -> None:
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    a, b = pictures()
    found = compare(a, b)
    assert found["psnr"] == pytest.approx(peak_signal_noise_ratio(np.array(b), np.array(a)), rel=1e-5)
    theirs = structural_similarity(
        np.array(a), np.array(b), gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=-1
    )
    assert found["ssim"] == pytest.approx(theirs, rel=1e-6)
    assert compare(a, a)["psnr"] == math.inf


def test_ms_ssim_is_torchmetrics_and_takes_all_scales_that_fit() -> None:
    from torchmetrics.functional.image import multiscale_structural_similarity_index_measure as ms_ssim

    for edge in (16, 64, 128, 176, 512):
        weights = scale_weights(edge)
        x = torch.rand(1, 3, edge, edge)
        assert sum(weights) == pytest.approx(1)
        assert float(ms_ssim(x, x, data_range=1.0, betas=weights)) == pytest.approx(1)
        if len(weights) < 5:
            more = tuple([0.2] * (len(weights) + 1))
            with pytest.raises(ValueError, match="betas"):
                ms_ssim(x, x, data_range=1.0, betas=more)
    a, b = pictures(32)
    assert len(scale_weights(176)) == 5
    one_scale = float(ms_ssim(as_tensor(a), as_tensor(b), data_range=255.0, betas=scale_weights(32)))
    assert compare(a, b)["ms_ssim"] == pytest.approx(one_scale)


def test_pictures_of_two_sizes_are_refused() -> None:
    with pytest.raises(Exception, match="cannot be compared"):
        compare(pictures(64)[0], pictures(32)[0])
    assert as_tensor(pictures(32)[0]).shape == (1, 3, 32, 32)
