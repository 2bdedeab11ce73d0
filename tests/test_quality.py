"""PSNR and SSIM against scikit-image's."""

from __future__ import annotations

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from gguf_sd.quality import psnr, ssim

RNG = np.random.default_rng(1)


def pictures(noise: float) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.mgrid[0:48, 0:40]
    clean = np.stack([rows * 5, columns * 6, (rows + columns) * 2], axis=-1) % 256
    noisy = np.clip(clean + RNG.normal(0, noise, clean.shape), 0, 255)
    return clean.astype(np.uint8), noisy.astype(np.uint8)


@pytest.mark.parametrize("noise", [2, 20, 90])
def test_equal_to_scikit_image(noise: float) -> None:
    clean, noisy = pictures(noise)
    assert psnr(noisy, clean) == pytest.approx(peak_signal_noise_ratio(clean, noisy), abs=1e-6)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    expected = structural_similarity(clean, noisy, channel_axis=-1, data_range=255, **settings)
    assert ssim(noisy, clean) == pytest.approx(expected, abs=1e-6)


def test_extremes() -> None:
    clean, _ = pictures(1)
    assert psnr(clean, clean) == float("inf")
    assert ssim(clean, clean) == pytest.approx(1)
    with pytest.raises(ValueError, match="differ in size"):
        psnr(clean, clean[:-1])
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(clean[:10], clean[:10])
