"""Quality of pictures against a reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from gguf_sd import quality
from gguf_sd.errors import GgufSdError

# Weights of MS-SSIM's five scales (Wang, Simoncelli & Bovik 2003); pictures too small for the 11x11 window at the last
# scales do with the first, their weights summing to 1.
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
WINDOW = 11


def as_tensor(picture: Image.Image) -> Tensor:
    """float32 [1, 3, H, W], 0 … 255."""
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)[None].float()


def compare(picture: Image.Image, reference: Image.Image) -> dict[str, float]:
    """PSNR in dB (infinite for equal pictures), SSIM and MS-SSIM of two 8-bit pictures of one size.

    PSNR and SSIM are this package's own, which equal scikit-image's; torchmetrics' SSIM also counts places where the
    window hangs over the border, mirrored, and on small pictures differs from Wang's by hundredths."""
    if picture.size != reference.size:
        raise GgufSdError(f"pictures of {picture.size} and {reference.size} pixels cannot be compared")
    found = {"psnr": quality.psnr(picture, reference)}
    edge = min(picture.size)
    if edge >= WINDOW:
        found["ssim"] = quality.ssim(picture, reference)
    if betas := scale_weights(edge):
        a, b, metrics = as_tensor(picture), as_tensor(reference), _torchmetrics()
        found["ms_ssim"] = float(
            metrics.multiscale_structural_similarity_index_measure(a, b, data_range=255.0, betas=betas)
        )
    return found


def scale_weights(edge: int) -> tuple[float, ...]:
    """The weights of the scales of MS-SSIM that torchmetrics takes for pictures of this shorter edge."""
    count = max((n for n in range(1, len(SCALES) + 1) if edge // max(1, n - 1) ** 2 >= WINDOW), default=0)
    total = sum(SCALES[:count])
    return tuple(weight / total for weight in SCALES[:count])


def _torchmetrics() -> Any:
    try:
        import torchmetrics.functional.image as metrics
    except ImportError as error:
        raise GgufSdError('comparisons need torchmetrics: pip install "gguf-sd[bench]"') from error
    return metrics
