"""Parts of a model that lie in files of their own: text encoders and autoencoder beside a UNet.

What a file holds is told from its tensors, whatever stands before their names: transformers' and OpenCLIP's text
encoders (alone, inside a whole CLIP, or inside a checkpoint), autoencoders under their original or diffusers' names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.check_tensors import TEXT_LEVEL, XL_TEXTS, squeezed
from gguf_sd.checkpoint.gguf_file import GGUFFile
from gguf_sd.checkpoint.gguf_header import is_gguf
from gguf_sd.checkpoint.mapped_file import JoinedFile, MappedFile, SafetensorsFile
from gguf_sd.checkpoint.safetensors_header import is_safetensors
from gguf_sd.checkpoint.tensor_names import TEXT, VAE, XL_TEXT
from gguf_sd.config import ModelConfig, TextConfig
from gguf_sd.errors import GgufSdError

# Each part, how sentences call it, and the option of generate and pack that gives it.
PARTS = {
    "clip_l": ("text encoder CLIP-L", "--clip-l"),
    "clip_g": ("text encoder CLIP-G (OpenCLIP ViT-bigG)", "--clip-g"),
    "vae": ("autoencoder", "--vae"),
}
TEXTS = ("clip_l", "clip_g")  # in the order of ModelConfig.text
TOKENS = "embeddings.token_embedding.weight"  # of transformers' text encoders
OPENCLIP_TOKENS, OPENCLIP_POSITIONS = "token_embedding.weight", "positional_embedding"
PROJECTION = "text_projection.weight"

Shapes = Mapping[str, tuple[int, ...]]
Places = dict[str, tuple[MappedFile, str]]  # canonical name -> file, and name in that file


@dataclass(frozen=True)
class PartPaths:
    """Files to take parts from, in the place of the model's own or for a model that lacks them: .gguf or .safetensors,
    of the part or of more than it, or a folder with one such file."""

    clip_l: Path | None = None
    clip_g: Path | None = None
    vae: Path | None = None

    @property
    def given(self) -> dict[str, Path]:
        return {part: path for part in PARTS if (path := getattr(self, part)) is not None}


def missing_parts(config: ModelConfig, names: Iterable[str]) -> list[str]:
    """Keys of PARTS of which canonical ``names`` have no tensor."""
    names = list(names)
    prefixes = {"clip_l": TEXT} if len(config.text) == 1 else dict(zip(TEXTS, XL_TEXTS, strict=True))
    prefixes |= {"vae": VAE}
    return [part for part, prefix in prefixes.items() if not any(name.startswith(prefix) for name in names)]


def missing_sentence(path: Path, config: ModelConfig, missing: Iterable[str]) -> str:
    """What a file lacks, and which options give it."""
    missing = list(missing)
    alone = len(missing) == len(config.text) + 1
    listed = [f"its {PARTS[part][0]} with {PARTS[part][1]}" for part in missing]
    wanted = ", ".join(listed[:-1]) + (" and " if listed[:-1] else "") + listed[-1]
    lacks = " and no ".join(PARTS[part][0] for part in missing)
    holds = "a UNet alone" if alone else f"no {lacks}"
    return f"{path} holds {holds}; give {wanted}, or join them by `gguf-sd pack`"


def open_part(path: Path, option: str) -> MappedFile:
    """A GGUF or safetensors file, told by content, or the one that a folder holds. Raises GgufSdError."""
    if not path.exists():
        raise GgufSdError(f"{option}: {path} does not exist")
    if path.is_dir():
        found = sorted(file for end in ("*.safetensors", "*.gguf") for file in path.glob(end) if file.is_file())
        usual = [file for file in found if ".fp16" not in file.name] or found
        if len(usual) != 1:
            names = ", ".join(file.name for file in usual[:4]) or "none"
            raise GgufSdError(f"{option}: the folder {path} should hold one .safetensors or .gguf file, it has {names}")
        path = usual[0]
    if is_gguf(path):
        return GGUFFile(path)
    if is_safetensors(path) or path.suffix == ".safetensors":
        return SafetensorsFile(path)
    raise GgufSdError(f"{option}: {path} is neither a .gguf nor a .safetensors file, or is damaged")


def joined(main: MappedFile, names: Mapping[str, str], config: ModelConfig, parts: PartPaths) -> JoinedFile:
    """``main``'s tensors, ``names`` being canonical name -> its own, with those of ``parts`` in the place of its own.

    The tokenizer of a text encoder's file is taken where ``main`` has none. Raises GgufSdError for a file without the
    part, or with that of another model."""
    places: Places = {canonical: (main, name) for canonical, name in names.items()}
    metadata = {}
    for index, part in enumerate(TEXTS):
        if (path := getattr(parts, part)) is None:
            continue
        option = PARTS[part][1]
        if index >= len(config.text):
            raise GgufSdError(f"{main.path} is {config.name}, which has one text encoder: leave {option} {path} out")
        file = open_part(path, option)
        prefix = TEXT if len(config.text) == 1 else XL_TEXTS[index]
        places = {name: place for name, place in places.items() if not name.startswith(prefix)}
        places |= {new: (file, own) for new, own in text_part(file, config, index).items()}
        if keys.TOKENIZER in file.metadata and keys.TOKENIZER not in main.metadata:
            metadata[keys.TOKENIZER] = file.metadata[keys.TOKENIZER]
    return JoinedFile(main, places, metadata)


def text_part(file: MappedFile, config: ModelConfig, index: int) -> dict[str, str]:
    """Canonical names of text encoder ``index`` of a model -> names in ``file``. What else the file has is left out: a
    projection that the model does not use, CLIP's vision half, other parts. Raises GgufSdError where no encoder in it
    is the model's."""
    wanted, (what, option) = config.text[index], PARTS[TEXTS[index]]
    found = _text_encoders(file)
    if not found:
        raise GgufSdError(
            f"{option}: {file.path} holds no text encoder of CLIP's (no tensor {TOKENS}); give the {what}"
        )
    complaints = []
    for prefix, openclip in found:
        names = _openclip_names(file, prefix) if openclip else _clip_names(file, prefix)
        expected = dict(inventory.openclip_text(wanted)) if openclip else _bare(inventory.clip_text(wanted))
        complaint = _unfit(file, names, expected, wanted)
        if complaint is None and openclip and index == 0:
            complaint = "has OpenCLIP's names, which are read of --clip-g alone"
        if complaint is None:
            return {_canonical(local, len(config.text), index, openclip): names[local] for local in expected}
        complaints.append(complaint)
    raise GgufSdError(f"{option}: {file.path} {complaints[0]}; give the {what}")


def _text_encoders(file: MappedFile) -> list[tuple[str, bool]]:
    """What stands before the names of each text encoder, and whether those are OpenCLIP's."""
    found = [(name.removesuffix(TOKENS), False) for name in file.tensors if name.endswith(TOKENS)]
    for name in file.tensors:
        prefix = name.removesuffix(OPENCLIP_TOKENS)
        if prefix != name and not name.endswith(TOKENS) and prefix + OPENCLIP_POSITIONS in file.tensors:
            found.append((prefix, True))
    return found


def _clip_names(file: MappedFile, prefix: str) -> dict[str, str]:
    """Names as transformers has them, without ``text_model.`` -> names in the file. The projection lies beside that
    level, not in it."""
    names = {name.removeprefix(prefix): name for name in file.tensors if name.startswith(prefix)}
    beside = prefix.removesuffix(TEXT_LEVEL) + PROJECTION
    return names | ({PROJECTION: beside} if beside in file.tensors else {})


def _openclip_names(file: MappedFile, prefix: str) -> dict[str, str]:
    return {name.removeprefix(prefix): name for name in file.tensors if name.startswith(prefix)}


def _bare(expected: inventory.Tensors) -> dict[str, tuple[int, ...]]:
    return {name.removeprefix(TEXT_LEVEL): shape for name, shape in expected}


def _unfit(file: MappedFile, names: Mapping[str, str], expected: Shapes, wanted: TextConfig) -> str | None:
    """Why an encoder is not the one that is wanted, as what follows the file's name; None where it is."""
    tokens = next(name for name in (TOKENS, OPENCLIP_TOKENS) if name in names)
    width = (file.shape(names[tokens]) or (1,))[-1]
    layers = (name.split(".") for name in names if name.startswith(("encoder.layers.", "transformer.resblocks.")))
    depth = len({levels[2] for levels in layers})
    if (width, depth) != (wanted.hidden_size, wanted.num_hidden_layers):
        return (
            f"holds a text encoder of width {width} with {depth} layers, the model takes one of width "
            f"{wanted.hidden_size} with {wanted.num_hidden_layers}"
        )
    if missing := [name for name in expected if name not in names]:
        return f"lacks {len(missing)} of {len(expected)} tensors of the text encoder, the first is {missing[0]}"
    for name, shape in expected.items():
        if squeezed(got := file.shape(names[name])) != squeezed(shape):
            return f"has tensor {names[name]} of shape {list(got)} where the model takes {list(shape)}"
    return None


def _canonical(local: str, texts: int, index: int, openclip: bool) -> str:
    if texts == 1:
        return f"{TEXT}{TEXT_LEVEL}{local}"
    if index == 0:
        return f"{XL_TEXT[0]}{TEXT_LEVEL}{local}"
    if openclip:
        return XL_TEXT[1] + local
    return f"{XL_TEXTS[1]}transformer.{'' if local == PROJECTION else TEXT_LEVEL}{local}"
