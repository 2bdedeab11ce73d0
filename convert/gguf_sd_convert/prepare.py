"""From a source and options to a job: what is read, what of it is written, and the configuration that goes with it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from gguf_sd.checkpoint import inventory
from gguf_sd.checkpoint import metadata_keys as keys
from gguf_sd.checkpoint.part_files import missing_parts
from gguf_sd.checkpoint.tensor_names import UNET
from gguf_sd.config import SD15, SDXL_TURBO, ModelConfig
from gguf_sd.errors import GgufSdError
from gguf_sd.prompt.find_tokenizer import ClipTokenizer, find_tokenizer, read_tokenizer, tokenizer_in_file
from gguf_sd_convert.control import ControlJob, control_job
from gguf_sd_convert.merge_lora import merged
from gguf_sd_convert.options import PRESETS, ConvertOptions, check_options
from gguf_sd_convert.quantize.policy import LAYOUTS, SAME, TYPES
from gguf_sd_convert.quantize.requantize import AUTO, own_layout
from gguf_sd_convert.sources.diffusers_config import checked_config, read_model_config
from gguf_sd_convert.sources.entries import Entry
from gguf_sd_convert.sources.source import Source, fitted, open_source


@dataclass(frozen=True)
class Job:
    """``tensors`` by canonical name, in the order of the file; ``unused``: the source's that are left over."""

    source: Source
    config: ModelConfig
    tokenizer: ClipTokenizer | None  # None: of a UNet alone
    tensors: dict[str, Entry]
    unused: list[str]
    options: ConvertOptions
    control: ControlJob | None = None  # what the source is, in place of a model


def source_config(path: Path, options: ConvertOptions) -> ModelConfig:
    """The configuration that the conversion of ``path`` will carry, but for token ids: headers are read, no weights.
    Raises GgufSdError where ``path`` is no model that can be converted."""
    return _source(path, check_options(options)).config


def _source(path: Path, options: ConvertOptions) -> Source:
    config = options.config
    if isinstance(config, Path):
        if path.is_dir():
            raise GgufSdError(f"--config is for single files; the folder {path} has a configuration")
        config, _ = read_model_config(config, options.safety)
        config = replace(config, safety=None)  # of which a single file has no weights
    return _preset(open_source(path, options.ema, config, options.safety), options.preset)


def prepare(path: Path, options: ConvertOptions) -> Job:
    if (control := control_job(path, options)) is not None:
        none = ClipTokenizer("", "none: a ControlNet", 0, 0, 0, 0)
        source = Source(path, SD15, control.tensors, control.files, (), ())
        config = replace(SD15, name=control.config.name)
        native = replace(options, layout="native")
        return Job(source, config, none, control.tensors, control.unused, native, control)
    source = _source(path, options)
    if options.type == SAME and source.metadata is None:
        raise GgufSdError(f"{path} is no GGUF file, which --type same is for; choose from {', '.join(TYPES)}")
    if options.layout == AUTO:
        options = replace(options, layout=auto_layout(source, options))
    if options.unet_only:
        source = _unet_of(source)
        tokenizer, config = None, source.config
        tensors, unused = fitted(source, inventory.unet_tensors(config))
    else:
        if source.metadata is not None and (missing := missing_parts(source.config, source.tensors)):
            what = "a UNet alone" if "clip_l" in missing else "no autoencoder"
            raise GgufSdError(
                f"{path} holds {what}; convert its UNet with --unet-only, or complete it by `gguf-sd pack` first"
            )
        tokenizer, config = _tokenizer(source, options)
        config = checked_config(config, path)
        tensors, unused = fitted(source, inventory.tensors(config))
    if options.loras:
        tensors, notes = merged(tensors, options.loras, config)
        files = (*source.files, *(lora.path for lora in options.loras))  # what the weights come from, for the hash
        source = replace(source, files=files, notes=(*source.notes, *notes))
    return Job(source, config, tokenizer, tensors, unused, options)


def auto_layout(source: Source, options: ConvertOptions) -> str:
    """The layout of a GGUF source's blocks, else the smallest that those can read who are meant."""
    found = source.said.get(keys.LAYOUT)
    if source.metadata is not None and (own := own_layout(source.tensors.values())):
        return own
    if options.unet_only:
        return "linear" if found == "linear" else "comfy"
    if isinstance(found, str) and found in LAYOUTS:
        return found
    return "linear" if options.type == SAME else "native"


def _unet_of(source: Source) -> Source:
    """The source without its other parts."""
    tensors = {name: entry for name, entry in source.tensors.items() if name.startswith(UNET)}
    return replace(source, config=replace(source.config, safety=None), tensors=tensors)


def _preset(source: Source, preset: str | None) -> Source:
    """The source with the schedule and the defaults of a preset; a name that speaks of Turbo is a hint, no more."""
    config = source.config
    if preset is None:
        settled = config.name != "sdxl" or config.defaults.steps == SDXL_TURBO.defaults.steps
        if settled or "turbo" not in source.path.resolve().name.lower():
            return source
        hint = "its name speaks of Turbo, nothing else does: --preset sdxl-turbo gives the file 1 step without guidance"
        return replace(source, notes=(*source.notes, hint))
    chosen = PRESETS[preset]
    if chosen.name != config.name:
        raise GgufSdError(f"preset {preset} is for {chosen.name} models; {source.path} is {config.name}")
    return replace(source, config=replace(config, scheduler=chosen.scheduler, defaults=chosen.defaults))


def _tokenizer(source: Source, options: ConvertOptions) -> tuple[ClipTokenizer, ModelConfig]:
    """The tokenizer, and the config with the token ids that go with it."""
    texts = source.config.text
    if options.tokenizer is None and isinstance(own := source.said.get(keys.TOKENIZER), str):
        return tokenizer_in_file(own, source.path, texts[0]), source.config
    first = find_tokenizer(options.tokenizer, source.tokenizers[0] if source.tokenizers else None, texts[0])
    bos, eos = first.bos_token_id, first.eos_token_id
    new = [replace(text, bos_token_id=bos, eos_token_id=eos) for text in texts]
    new[0] = replace(new[0], pad_token_id=first.pad_token_id)
    if len(texts) == 2:
        new[1] = replace(new[1], pad_token_id=0)  # OpenCLIP's
    if len(source.tokenizers) == 2 and options.tokenizer is None:
        second = read_tokenizer(source.tokenizers[1], texts[1].vocab_size)
        if (second.size, second.bos_token_id, second.eos_token_id) != (first.size, bos, eos):
            raise GgufSdError(f"{source.path}: tokenizer and tokenizer_2 differ; gguf-sd takes one vocabulary for both")
        new[1] = replace(new[1], pad_token_id=second.pad_token_id)
    return first, replace(source.config, text=tuple(new))
