"""What both models that ship have to be like, for every type to take their weights."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

NOT_DIVISIBLE = {  # a convolution's 4 latent or 3 colour channels: no block of 32 fits in their place in the network
    "conv_in.weight",
    "encoder.conv_in.weight",
    "decoder.conv_in.weight",
    "quant_conv.weight",
    "post_quant_conv.weight",
}


def check_matrices(folder: Path, count: int) -> None:
    """``count`` files of finite weights in half precision, whose rows are whole blocks of 32."""
    files = list(folder.rglob("*.safetensors"))
    assert len(files) == count
    for path in files:
        for name, value in load_file(path).items():
            assert value.dtype == torch.float16, name
            assert bool(value.isfinite().all()), name
            if value.ndim > 1 and name not in NOT_DIVISIBLE:
                assert value[0].numel() % 32 == 0, (path, name)
                assert value.shape[1] % 32 == 0, (path, name)
