"""The keys of a GGUF file's metadata, for who writes them and who reads them."""

from __future__ import annotations

FORMAT_VERSION = 1  # of what this program writes, and the newest that it reads

# General keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
NAME = "general.name"
ARCHITECTURE = "general.architecture"  # written by gguf-py from what it is given
FILE_TYPE = "general.file_type"
QUANTIZATION_VERSION = "general.quantization_version"
BASE_COUNT = "general.base_model.count"
BASE_NAME = "general.base_model.0.name"
BASE_ORGANIZATION = "general.base_model.0.organization"
BASE_URL = "general.base_model.0.repo_url"
TOKENIZER = "tokenizer.huggingface.json"

# Our own.
FORMAT = "gguf_sd.format_version"
CONFIG = "gguf_sd.config"  # a ModelConfig as JSON
CONTROL = "gguf_sd.control"  # in place of it, of a ControlNet: a ControlConfig as JSON
LAYOUT = "gguf_sd.layout"
TYPE = "gguf_sd.type"
SHAPES = "gguf_sd.shapes"  # of tap-major convolutions: a JSON object, tensor name -> shape in torch order
LORAS = "gguf_sd.loras"  # merged into the weights: JSON, a list of name, weight and beginning of the hash
CALIBRATION = "gguf_sd.calibration"  # what the weights were rounded for: a JSON object
SOURCE_NAME = "gguf_sd.source.name"
SOURCE_HASH = "gguf_sd.source.sha256"

# ComfyUI-GGUF's: behind it a tensor's name; an array of INT32, the shape in torch order.
COMFY_SHAPE = "comfy.gguf.orig_shape."
