"""Metrics that look with trained networks, whose weights are given as local paths: nothing is ever fetched."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from gguf_sd.bench.metrics import as_tensor
from gguf_sd.errors import GgufSdError

BACKBONES = {"alex": "AlexNet", "vgg": "VGG16", "squeeze": "SqueezeNet 1.1"}
SLICE = re.compile(r"^slices?\.?\d+\.")  # of torchmetrics' copies, the same layers in slices


def check_weights(clip: str, lpips: str, fid: str) -> None:
    """Raises GgufSdError for paths that cannot be weights, and for packages that are not there, before any work."""
    if clip and not (Path(clip) / "config.json").is_file():
        raise GgufSdError(f"{clip} holds no CLIP model: give a transformers folder with config.json and weights")
    for path, metric in ((lpips, "LPIPS"), (fid, "FID")):
        if path and not Path(path).is_file():
            raise GgufSdError(f"{path} does not exist; {metric} takes a file of weights")
    for wanted, needed in ((lpips, ("torchmetrics", "torchvision")), (fid, ("torchmetrics", "torch_fidelity"))):
        if wanted and (missing := [name for name in needed if find_spec(name) is None]):
            raise GgufSdError(f'{missing[0]} is not installed: pip install "gguf-sd[bench]"')


@torch.inference_mode()
def clip_scores(pictures: Sequence[Image.Image], prompts: Sequence[str], folder: Path) -> list[float]:
    """100 x the cosine between each picture's and its prompt's embedding (Hessel et al. 2021), by the CLIP model in a
    transformers folder: torchmetrics' own takes a few models by name and fails with transformers 5."""
    from transformers import CLIPModel, CLIPProcessor

    model = CLIPModel.from_pretrained(folder, local_files_only=True).eval()
    processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
    scores = []
    for picture, prompt in zip(pictures, prompts, strict=True):
        inputs = processor(
            text=[prompt], images=[picture.convert("RGB")], return_tensors="pt", padding=True, truncation=True
        )
        out = model(**inputs)
        scores.append(max(0.0, 100 * float((out.image_embeds * out.text_embeds).sum())))
    return scores


@torch.inference_mode()
def lpips_scores(pictures: Sequence[Image.Image], references: Sequence[Image.Image], weights: Path) -> list[float]:
    """LPIPS (Zhang et al. 2018) of pairs of pictures, 0 for equal ones, by torchmetrics; ``weights``: a backbone as
    torchvision stores it (AlexNet, VGG16 or SqueezeNet 1.1), .pth or .safetensors. Raises GgufSdError for others."""
    net = _lpips_net(weights)
    pairs = zip(pictures, references, strict=True)
    return [float(net(as_tensor(a) / 127.5 - 1, as_tensor(b) / 127.5 - 1)) for a, b in pairs]


@torch.inference_mode()
def fid(pictures: Sequence[Image.Image], references: Sequence[Image.Image], weights: Path) -> float:
    """Fréchet inception distance (Heusel et al. 2017) of two sets of at least two pictures, by torchmetrics over
    torch-fidelity's Inception of TensorFlow's weights and resizing; ``weights``: its file. Raises GgufSdError for
    others."""
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance

        metric = FrechetInceptionDistance(feature_extractor_weights_path=str(weights), antialias=False)
    except Exception as error:  # whatever torch.load and load_state_dict make of a strange file
        raise GgufSdError(f"{weights} is no weights of torch-fidelity's Inception: {_first_line(error)}") from error
    for group, real in ((references, True), (pictures, False)):
        for picture in group:
            metric.update(as_tensor(picture).to(torch.uint8), real=real)
    return float(metric.compute())


def _lpips_net(weights: Path) -> Any:
    """torchmetrics' network; the weights of its last layers come with that package."""
    try:
        from torchmetrics.functional.image.lpips import _NoTrainLpips

        stored = _read(weights)
        for net in BACKBONES:
            model = _NoTrainLpips(net=net, pnet_rand=True)
            own = model.net.state_dict()
            found = {name: stored.get(SLICE.sub("features.", name)) for name in own}
            if all(x is not None and x.shape == own[name].shape for name, x in found.items()):
                model.net.load_state_dict(found)
                return model
    except Exception as error:  # as above
        raise GgufSdError(f"{weights} cannot be used for LPIPS: {_first_line(error)}") from error
    raise GgufSdError(f"{weights} holds none of torchvision's backbones of LPIPS: {', '.join(BACKBONES.values())}")


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return {k: v for k, v in loaded.items() if isinstance(v, Tensor)} if isinstance(loaded, dict) else {}


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
