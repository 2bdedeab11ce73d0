"""Metrics of trained networks, with random weights of the right form, against other libraries that take the same."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from gguf_sd.bench.learned import check_weights, clip_scores, fid, lpips_scores
from gguf_sd.bench.metrics import as_tensor
from gguf_sd.errors import GgufSdError


def pictures(count: int, edge: int = 64, noise: float = 12.0) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of coarse patches, and the same with noise."""
    rng = np.random.default_rng(edge)
    smooth = [np.kron(rng.integers(0, 255, (edge // 8, edge // 8, 3)), np.ones((8, 8, 1))) for _ in range(count)]
    noisy = [np.clip(x + rng.normal(0, noise, x.shape), 0, 255) for x in smooth]
    return tuple([Image.fromarray(x.astype(np.uint8)) for x in group] for group in (noisy, smooth))  # type: ignore


@pytest.fixture(scope="module")
def torchvision_models() -> object:
    """torchvision, where one is installed that goes with this torch."""
    try:
        import torchvision
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"no torchvision for this torch: {error}")
    return torchvision.models


@pytest.mark.parametrize(("net", "name"), [("alex", "alexnet"), ("squeeze", "squeezenet1_1"), ("vgg", "vgg16")])
@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_lpips_is_that_of_its_authors_package(
    net: str, name: str, suffix: str, torchvision_models: object, tmp_path: Path
) -> None:
    if (net, suffix) == ("vgg", ".safetensors"):
        pytest.skip("half a gigabyte, told apart as the others are")
    lpips = pytest.importorskip("lpips")
    from safetensors.torch import save_file

    torch.manual_seed(3)
    state = getattr(torchvision_models, name)(weights=None).features.state_dict()
    state = {f"features.{key}": value for key, value in state.items()}
    path = tmp_path / f"weights{suffix}"
    torch.save(state, path) if suffix == ".pth" else save_file(state, path)
    theirs = lpips.LPIPS(net=net, pnet_rand=True, verbose=False).eval()
    own = theirs.net.state_dict()
    theirs.net.load_state_dict({key: state[f"features.{key.partition('.')[2]}"] for key in own})
    noisy, smooth = pictures(2)
    got = lpips_scores(noisy, smooth, path)
    with torch.inference_mode():
        wanted = [
            float(theirs(as_tensor(a) / 127.5 - 1, as_tensor(b) / 127.5 - 1))
            for a, b in zip(noisy, smooth, strict=True)
        ]
    assert wanted[0] != pytest.approx(wanted[1], rel=1e-3)
    assert got == pytest.approx(wanted, rel=1e-4)
    assert lpips_scores(smooth, smooth, path) == pytest.approx([0.0, 0.0], abs=1e-7)


def test_lpips_refuses_other_weights(torchvision_models: object, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"features.0.weight": torch.zeros(3)}, path)
    with pytest.raises(GgufSdError, match="holds none of torchvision's backbones"):
        lpips_scores(*pictures(1), path)
    path.write_bytes(b"no weights")
    with pytest.raises(GgufSdError, match="cannot be used for LPIPS"):
        lpips_scores(*pictures(1), path)


def test_fid_is_torch_fidelitys(torchvision_models: object, tmp_path: Path) -> None:
    torch_fidelity = pytest.importorskip("torch_fidelity")
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Inception

    torch.manual_seed(4)
    empty = _without_weights(Inception)
    state = empty.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            spread = (2 / max(1, value[0].numel())) ** 0.5 if value.dim() > 1 else 0.0
            state[name] = torch.randn_like(value) * spread + (1.0 if name.endswith(("var", "bn.weight")) else 0.0)
    path = tmp_path / "inception.pth"
    torch.save(state, path)
    noisy, smooth = pictures(6)

    class Set(torch.utils.data.Dataset):  # type: ignore[type-arg]
        def __init__(self, group: list[Image.Image]):
            self.group = group

        def __len__(self) -> int:
            return len(self.group)

        def __getitem__(self, i: int) -> torch.Tensor:
            return as_tensor(self.group[i])[0].to(torch.uint8)

    wanted = torch_fidelity.calculate_metrics(
        input1=Set(noisy), input2=Set(smooth), fid=True, cuda=False, cache=False, verbose=False,
        feature_extractor_weights_path=str(path), save_cpu_ram=True,
    )["frechet_inception_distance"]  # fmt: skip
    assert fid(noisy, smooth, path) == pytest.approx(wanted, rel=1e-2)
    assert fid(smooth, smooth, path) == pytest.approx(0.0, abs=1e-2 * wanted)


def _without_weights(kind: type[torch.nn.Module]) -> torch.nn.Module:
    """torch-fidelity's Inception as it is before it loads a file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "load", lambda *args, **more: {})
        patch.setattr(kind, "load_state_dict", lambda *args, **more: None)
        return kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=__file__)


def test_fid_refuses_other_weights(torchvision_models: object, tmp_path: Path) -> None:
    pytest.importorskip("torch_fidelity")
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(3)}, path)
    with pytest.raises(GgufSdError, match="is no weights of torch-fidelity's Inception"):
        fid(*pictures(2), path)


def test_weights_that_are_not_there_are_told_before_any_work(tmp_path: Path) -> None:
    for given in (("", "none.pth", ""), ("", "", "none.pth"), (str(tmp_path), "", "")):
        with pytest.raises(GgufSdError, match=r"none\.pth does not exist|holds no CLIP model"):
            check_weights(*given)
    (tmp_path / "config.json").touch()
    check_weights(str(tmp_path), "", "")


def test_clip_score_is_the_cosine_of_transformers_features(
    tmp_path: Path, write_tokenizer_to: Callable[[Path], None]
) -> None:
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    write_tokenizer_to(tmp_path)
    tokenizer = CLIPTokenizer.from_pretrained(tmp_path)
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {
        **small,
        "vocab_size": len(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "max_position_embeddings": 77,
    }
    vision = small | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).eval()
    images = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(tmp_path)
    CLIPProcessor(images, tokenizer).save_pretrained(tmp_path)
    prompts = ["a red cat", "a dog"]
    both = pictures(1)[0] + pictures(1)[1]
    got = clip_scores(both, prompts, tmp_path)
    with torch.inference_mode():
        pixels = images(both, return_tensors="pt")["pixel_values"]
        seen = model.visual_projection(model.vision_model(pixels).pooler_output)
        for i, prompt in enumerate(prompts):
            said = model.text_projection(model.text_model(**tokenizer([prompt], return_tensors="pt")).pooler_output)
            cosine = float(torch.nn.functional.cosine_similarity(seen[i : i + 1], said))
            assert got[i] == pytest.approx(max(0.0, 100 * cosine), abs=1e-3)
