"""A VAE of its own, in the place of the model's: TAESD, a full VAE, or the VAE of another model.

What a file is comes from its tensors; a diffusers ``config.json`` beside it adds what tensors do not show. Opening
reads headers only, so that a wrong file is found out before anything is painted.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gguf_sd.checkpoint.assign import Source, assign
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.metadata_keys import CONFIG
from gguf_sd.checkpoint.model_file import ModelFile
from gguf_sd.checkpoint.tensor_names import UNET, VAE, canonical_names, rename, vae_modules
from gguf_sd.checkpoint.tiny_family import tiny_family
from gguf_sd.config import SD15, VAEConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.field_checks import called, shown
from gguf_sd.imaging.preview import family
from gguf_sd.input_files import open_input
from gguf_sd.json_text import read_json_object
from gguf_sd.models.tiny_vae import TinyAutoencoder, tiny_config
from gguf_sd.models.vae import Autoencoder

FAMILY_NAMES = {"sd1": "Stable Diffusion 1.x", "sdxl": "SDXL"}
TINY_FILES = {"sd1": "TAESD", "sdxl": "TAESDXL"}
TAKES = "--vae takes TAESD or a full VAE as .safetensors, a diffusers folder of either, or a .gguf model or VAE"
DIFFUSERS_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
MODULES = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
WIDTHS = re.compile(r"encoder\.down(?:_blocks)?\.([0-9]{1,3})\.(?:block|resnets)\.([0-9]{1,3})\.conv1\.weight")
TINY_NAME = re.compile(
    r"(?:.*(?P<half>encoder|decoder)\.(?:layers\.)?)?(?P<index>[0-9]{1,3})\.(?P<leaf>(?:conv\.[0-9]\.)?\w+)"
)
# Settings of a config.json that do not show in the tensors, and the values that the engine runs.
TINY_FIXED: dict[str, tuple[Any, ...]] = {"act_fn": ("relu",), "upsample_fn": ("nearest",), "scaling_factor": (1,)}
FULL_FIXED: dict[str, tuple[Any, ...]] = {
    "act_fn": ("silu", "swish"),
    "shift_factor": (None,),
    "latents_mean": (None,),
    "latents_std": (None,),
}

Shapes = dict[str, tuple[int, ...]]
Places = dict[str, tuple[Path, str]]  # name in our module -> file, and name in that file


@dataclass(frozen=True)
class VAEFile:
    """An opened VAE; ``load`` reads it, to the dtype it is given."""

    path: Path
    config: VAEConfig
    load: Callable[[torch.dtype], Autoencoder | TinyAutoencoder]

    @classmethod
    def open(cls, path: Path | str, model: VAEConfig | None = None) -> VAEFile:
        """``path``: a .safetensors file (TAESD, its encoder or decoder, a full VAE under LDM's or diffusers' names,
        a whole checkpoint), a folder of TAESD's or of diffusers', or a GGUF file of a model or of a full VAE.

        ``model`` is the configuration of the VAE it stands in for: its scaling factor is taken where the file has
        none. Raises GgufSdError for what is no VAE, and for the VAE of another family where it tells.
        """
        path, expected = Path(path), model or SD15.vae
        opened = _open_folder(path, expected) if path.is_dir() else _open_file(path, expected)
        _check_family(opened, expected if model else opened.config)
        return opened


def load_vae_file(
    path: Path | str, dtype: torch.dtype, model: VAEConfig | None = None
) -> Autoencoder | TinyAutoencoder:
    """Opens and reads a VAE, see :meth:`VAEFile.open`; on the CPU, ready for inference."""
    return VAEFile.open(path, model).load(dtype)


def _open_folder(folder: Path, model: VAEConfig) -> VAEFile:
    if (folder / "vae" / "config.json").is_file():
        return _open_folder(folder / "vae", model)
    for name in DIFFUSERS_WEIGHTS:
        if (folder / name).is_file():
            return _open_file(folder / name, model)
    found = sorted(path for path in folder.glob("*.safetensors") if path.is_file())
    encoders = [path for path in found if "encoder" in path.name]  # each is found from its decoder, where there is one
    paired = [path for path in encoders if path.with_name(path.name.replace("encoder", "decoder")) in found]
    candidates = [path for path in found if path not in paired]
    if len(candidates) == 1:
        return _open_file(candidates[0], model)
    if not found:
        raise GgufSdError(f"the folder {folder} holds no .safetensors file; {TAKES}")
    names = ", ".join(path.name for path in candidates[:4]) + (", …" if len(candidates) > 4 else "")
    raise GgufSdError(f"the folder {folder} holds more than one file ({names}); give the path of the one to take")


def _open_file(path: Path, model: VAEConfig) -> VAEFile:
    try:
        with open_input(path) as file:
            head = file.read(9)
    except OSError as error:
        raise GgufSdError(f"cannot read the VAE {path}: {error.strerror}") from error
    if head[:4] == b"GGUF":
        return _open_gguf(path, model)
    if head[8:] != b"{":
        raise GgufSdError(f"{path} is neither a safetensors nor a GGUF file, or is damaged; {TAKES}")
    shapes = _shapes(path)
    tiny = _tiny_places(path, shapes)
    return _open_tiny(path, tiny, model) if tiny else _open_full(path, shapes, model)


def _open_gguf(path: Path, expected: VAEConfig) -> VAEFile:
    file = GGUFFile(path)
    if CONFIG in file.metadata or any(name.startswith(UNET) for name in canonical_names(file.tensors)):
        model = ModelFile.open(path)
        model.part(VAE)  # raises where there is none
        return VAEFile(path, model.config.vae, model.load_vae)
    names, config = full_vae(path, {name: file.shape(name) for name in file.tensors}, expected)
    sources: dict[str, Source] = {ours: partial(file.tensor, name) for ours, name in names.items()}
    return VAEFile(path, config, partial(_load_full, path, sources, config))


def _open_tiny(path: Path, places: Places, model: VAEConfig) -> VAEFile:
    """Half of TAESD is completed from the file of the same name beside it, if there is one."""
    _settings(path, "AutoencoderTiny", TINY_FIXED)
    halves = {name.partition(".")[0] for name in places}
    if len(halves) == 1:
        (have,), missing = halves, ({"encoder", "decoder"} - halves).pop()
        other = path.with_name(path.name.replace(have, missing))
        if other != path and other.is_file():
            added = _tiny_places(other, _shapes(other))
            places = places | {name: place for name, place in added.items() if name.startswith(missing)}
    if "decoder.1.weight" not in places:
        raise GgufSdError(
            f"{path} holds only the encoder of a tiny autoencoder; put taesd_decoder.safetensors of the same family "
            "beside it and give that as --vae"
        )
    file, name = places["decoder.1.weight"]
    shape = _shapes(file)[name]
    channels = shape[1] if len(shape) == 4 else model.latent_channels
    return VAEFile(path, tiny_config(channels), partial(_load_tiny, path, places, channels))


def _tiny_places(path: Path, shapes: Shapes) -> Places:
    """The tensors of TAESD in a file, by our names; nothing where it is something else.

    A half has no name in the published files: layer 0 is the encoder's first convolution, the decoder's has no
    weights. diffusers leaves that layer out, so its decoder counts from one less.
    """
    found = {name: TINY_NAME.fullmatch(name) for name in shapes}
    convolutions = all(len(shape) == 4 for name, shape in shapes.items() if name.endswith("weight"))
    if not shapes or not all(found.values()) or not convolutions:
        return {}
    bare = "encoder" if "0.weight" in shapes else "decoder"
    rows = [(m["half"] or bare, int(m["index"]), m["leaf"], name) for name, m in found.items() if m]
    shift = int(("decoder", 0, "weight") in {row[:3] for row in rows})
    return {
        f"{half}.{index + (shift if half == 'decoder' else 0)}.{leaf}": (path, name) for half, index, leaf, name in rows
    }


def _load_tiny(path: Path, places: Places, channels: int, dtype: torch.dtype) -> TinyAutoencoder:
    encodes = any(name.startswith("encoder.") for name in places)
    with torch.device("meta"):
        vae = TinyAutoencoder(channels, encodes, str(path))
    assign(vae, _sources(places), dtype, str(path))
    return vae.eval()


def _open_full(path: Path, shapes: Shapes, model: VAEConfig) -> VAEFile:
    names, config = full_vae(path, shapes, model)

    def load(dtype: torch.dtype) -> Autoencoder:
        return _load_full(path, _sources({ours: (path, name) for ours, name in names.items()}), config, dtype)

    return VAEFile(path, config, load)


def full_vae(path: Path, shapes: Shapes, model: VAEConfig) -> tuple[dict[str, str], VAEConfig]:
    """The tensors of a full VAE in a file of these shapes, original name without prefix -> name in the file, and its
    configuration; ``model`` says what tensors do not. Raises GgufSdError where there is none."""
    names = canonical_names(shapes)
    if not any(name.startswith(VAE) for name in names):  # a VAE alone; its attention may still have other names
        names = canonical_names(VAE + name for name in shapes)
        names = {ours: name.removeprefix(VAE) for ours, name in names.items()}
    vae = {ours.removeprefix(VAE): name for ours, name in names.items() if ours.startswith(VAE)}
    vae = {ours: name for ours, name in vae.items() if ours.startswith(MODULES)}  # without losses and averages
    settings = _settings(path, "AutoencoderKL", FULL_FIXED)
    config = _full_config(path, {ours: shapes[name] for ours, name in vae.items()}, settings, model)
    if "encoder.down_blocks.0.resnets.0.conv1.weight" in vae:
        modules = vae_modules(config)
        vae = {rename(ours, modules) or ours: name for ours, name in vae.items()}
    return vae, config


def _full_config(path: Path, shapes: Shapes, settings: Mapping[str, Any], model: VAEConfig) -> VAEConfig:
    """Widths and depths from the tensors, the rest from ``settings``, else the model's."""
    blocks = {(int(m[1]), int(m[2])): shapes[name] for name in shapes if (m := WIDTHS.fullmatch(name))}
    first, last = shapes.get("decoder.conv_in.weight", ()), shapes.get("decoder.conv_out.weight", ())
    if not blocks or {len(shape) for shape in (*blocks.values(), first, last)} != {4}:
        raise GgufSdError(f"{path} holds no VAE (no tensors encoder.down.* and decoder.conv_in.weight); {TAKES}")
    widths = {level: shape[0] for (level, _), shape in sorted(blocks.items())}
    layers = len(blocks) // len(widths)
    if set(blocks) != {(level, layer) for level in range(len(widths)) for layer in range(layers)}:
        raise GgufSdError(f"{path} lacks resnet blocks of its encoder, it has {len(blocks)}; download it again")
    groups = settings.get("norm_num_groups", 32)
    if type(groups) is not int or groups < 1 or any(not width or width % groups for width in widths.values()):
        raise GgufSdError(
            f"{path}: the VAE's widths {shown(list(widths.values()))} do not split into {shown(groups)} groups; "
            f"name it {DIFFUSERS_WEIGHTS[0]} and put its config.json beside it"
        )
    scale = settings.get("scaling_factor", model.scaling_factor)
    if not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise GgufSdError(f"{path}: scaling_factor in its config.json is {shown(scale)}; it must be a positive number")
    config = VAEConfig(
        in_channels=last[0],
        latent_channels=first[1],
        block_out_channels=tuple(widths.values()),
        layers_per_block=layers,
        norm_groups=groups,
        scaling_factor=float(scale),
        overflows_float16=model.overflows_float16 and bool(settings.get("force_upcast", True)),
    )
    try:
        return VAEConfig.from_dict(asdict(config))
    except ValueError as error:
        raise GgufSdError(f"{path} holds no VAE that can be: {error}") from error


def _load_full(path: Path, sources: Mapping[str, Source], config: VAEConfig, dtype: torch.dtype) -> Autoencoder:
    with torch.device("meta"):
        vae = Autoencoder(config)
    assign(vae, sources, dtype, str(path), keep_quantized=False)
    return vae.eval()


def _check_family(opened: VAEFile, model: VAEConfig) -> None:
    config = opened.config
    for what in ("latent_channels", "downscale"):
        got, takes = getattr(config, what), getattr(model, what)
        if got != takes:
            raise GgufSdError(
                f"{opened.path} is the VAE of another model family: its {what} is {got}, this model's {takes}; "
                "choose a VAE made for this model"
            )
    if config == tiny_config(config.latent_channels):
        _check_tiny_family(opened, model)
    elif not math.isclose(config.scaling_factor, model.scaling_factor, rel_tol=1e-3):
        raise GgufSdError(
            f"{opened.path} is the VAE of another model family: it scales latents by {config.scaling_factor:g}, "
            f"this model by {model.scaling_factor:g}; choose a VAE made for this model"
        )


def _check_tiny_family(opened: VAEFile, model: VAEConfig) -> None:
    """Its tensors have the same names and shapes in every family: what it makes of latents tells."""
    if (wanted := family(model)) is None:
        return
    decoder = opened.load(torch.float32)
    if isinstance(decoder, TinyAutoencoder) and (got := tiny_family(decoder)) not in (None, wanted):
        raise GgufSdError(
            f"{opened.path} is the tiny autoencoder of another model family: it is made for {FAMILY_NAMES[got]}, this "
            f"model is of {FAMILY_NAMES[wanted]}'s; choose {TINY_FILES[wanted]}"
        )


def _settings(path: Path, kind: str, fixed: Mapping[str, tuple[Any, ...]]) -> dict[str, Any]:
    """The config.json beside diffusers' weights, checked; empty where there is none."""
    source = path.with_name("config.json")
    if path.name not in DIFFUSERS_WEIGHTS or not source.is_file():
        return {}
    try:
        values = read_json_object(source)
    except OSError as error:
        raise GgufSdError(f"cannot read {source}, which belongs to the VAE: {error.strerror}") from error
    for key, allowed in {"_class_name": (kind,), **fixed}.items():
        if key in values and values[key] not in allowed:
            takes = " or ".join(map(repr, allowed))
            raise GgufSdError(f"{source}: {key} is {shown(values[key])}; gguf-sd takes {takes} with these tensors")
    return values


def _open_safetensors(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise GgufSdError(
            f"{path} is damaged or no safetensors file: {called(str(error))}; download it again"
        ) from error


def _shapes(path: Path) -> Shapes:
    file = _open_safetensors(path)
    return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118


def _sources(places: Places) -> dict[str, Source]:
    """Readers that keep the files open no longer than they live themselves."""
    files = {path: _open_safetensors(path) for path in {path for path, _ in places.values()}}
    return {ours: partial(_read, files[path], path, name) for ours, (path, name) in places.items()}


def _read(file: Any, path: Path, name: str) -> Tensor:
    try:
        return file.get_tensor(name).clone()  # its own memory: what safetensors returns is the mapped file
    except (SafetensorError, AttributeError, RuntimeError) as error:
        raise GgufSdError(
            f"{path}: cannot read tensor {called(name)}: {called(str(error))}; get the VAE in float16 or float32"
        ) from error
