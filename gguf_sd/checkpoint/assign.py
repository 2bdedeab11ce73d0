"""Filling a model that was built on the meta device: the stored type of each weight chooses its layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from gguf_sd.checkpoint.check_tensors import warn_of_strays
from gguf_sd.checkpoint.finite import cast, check_blocks
from gguf_sd.checkpoint.quant_tensor import QuantTensor
from gguf_sd.errors import GgufSdError
from gguf_sd.models.layers import quantized

Source = Callable[[], Tensor | QuantTensor]  # reads the tensor when it is called


@dataclass
class Deferred:
    """A weight that stays in its file and is read whenever it is used. ``name`` and ``where`` are for errors."""

    source: Source
    shape: tuple[int, ...]
    name: str
    where: str

    def stored(self) -> Tensor | QuantTensor:
        """The tensor as the file has it, in the shape that the model takes. Raises GgufSdError for another shape."""
        return _shaped(self.name, self.shape, self.source(), self.where)


def assign(
    model: nn.Module,
    sources: Mapping[str, Source],
    dtype: torch.dtype,
    where: str,
    keep_quantized: bool = True,
    prefix: str = "",
    deferred: dict[str, Deferred] | None = None,
) -> None:
    """Gives every parameter of ``model`` its tensor: quantised linears and convolutions become quantised layers
    (unless ``keep_quantized`` is false), everything else becomes ``dtype``.

    Raises GgufSdError, naming the tensor (behind ``prefix``) and the file (``where``), for tensors that are missing,
    wrongly shaped, or hold what is no number in ``dtype``. Tensors that the model does not have are left out with one
    warning that names them.

    With ``deferred``, the weights of linears, convolutions and embeddings of tokens are not read but noted there, by
    the name of their module: parameters stay on the meta device, and nobody has looked at the blocks of quantised
    layers yet.
    """
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    _check_names(expected, sources, where, prefix)
    for name, shape in expected.items():
        owner_name, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner_name)
        product = isinstance(owner, nn.Linear | nn.Conv2d)
        waits = deferred is not None and leaf == "weight" and (product or getattr(owner, "by_row", False))
        if deferred is not None and waits:
            deferred[owner_name] = Deferred(sources[name], shape, prefix + name, where)
        if waits and not keep_quantized:
            continue
        stored = _shaped(prefix + name, shape, sources[name](), where)
        if isinstance(stored, QuantTensor) and keep_quantized and isinstance(owner, nn.Linear | nn.Conv2d):
            if not waits:
                check_blocks(stored, prefix + name, where)
            model.set_submodule(owner_name, quantized(owner, stored))
        elif not waits:
            full = _plain(stored, dtype, prefix + name, where)
            if deferred is not None and full.device.type == "cpu":
                full = full.clone()  # not in the mapped file, whose pages come and go
            owner._parameters[leaf] = nn.Parameter(full, requires_grad=False)


def _plain(stored: Tensor | QuantTensor, dtype: torch.dtype, name: str, where: str) -> Tensor:
    full = cast(stored, dtype, name, where)
    # Convolutions run channels-last; a weight that lies so already need not be reordered at every call.
    return full.contiguous(memory_format=torch.channels_last) if full.dim() == 4 else full


def _check_names(expected: Mapping[str, object], sources: Mapping[str, Source], where: str, prefix: str) -> None:
    if missing := [name for name in expected if name not in sources]:
        raise GgufSdError(
            f"{where} lacks {len(missing)} of {len(expected)} tensors, the first is {prefix}{missing[0]}; "
            "it is incomplete: download or convert it again"
        )
    warn_of_strays([prefix + name for name in sources if name not in expected], where)


def _shaped(name: str, shape: tuple[int, ...], stored: Tensor | QuantTensor, where: str) -> Tensor | QuantTensor:
    """The tensor in the shape that the model takes: 1x1 convolutions may be stored as such, they run as linears."""
    got = tuple(stored.shape)
    if got == shape:
        return stored
    if len(shape) != 2 or got != (*shape, 1, 1):
        raise GgufSdError(f"{where}: tensor {name} has shape {list(got)} where the model takes {list(shape)}")
    if isinstance(stored, QuantTensor):
        return replace(stored, shape=shape, tap_major=False)
    return stored.reshape(shape)
