"""What a LoRA adds to a weight, kept in the small factors that it comes in.

LoRA (Hu et al. 2021, arXiv:2106.09685) adds ``up @ down``; for convolutions ``down`` has the kernel. LoHa (FedPara,
arXiv:2108.06098) adds the elementwise product of two such, which is one of rank r * r: rows and columns of its factors
are products of theirs. LoKr adds a Kronecker product. Both as in LyCORIS (arXiv:2309.14859), as is the difference in
full.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Shape = tuple[int, ...]


class LowRank(NamedTuple):
    """``up @ down``."""

    down: Tensor  # [r, in] or [r, in, kh, kw]
    up: Tensor  # [out, r]

    def delta(self, shape: Shape) -> Tensor:
        return (self.up @ self.down.flatten(1)).view(shape)

    def scaled(self, by: float) -> LowRank:
        return LowRank(self.down, self.up * by)


class Kronecker(NamedTuple):
    """Every value of ``left`` times all of ``right``."""

    left: Tensor  # [out1, in1]
    right: Tensor  # [out2, in2] or [out2, in2, kh, kw]

    def delta(self, shape: Shape) -> Tensor:
        return torch.kron(self.left[(...,) + (None,) * (self.right.dim() - 2)], self.right).view(shape)

    def scaled(self, by: float) -> Kronecker:
        return Kronecker(self.left * by, self.right)


class Dense(NamedTuple):
    """The difference itself, where no factors are smaller."""

    value: Tensor  # as the weight

    def delta(self, shape: Shape) -> Tensor:
        return self.value.view(shape)

    def scaled(self, by: float) -> Dense:
        return Dense(self.value * by)


Factors = LowRank | Kronecker | Dense


def factors(kind: str, tensors: Mapping[str, Tensor], shape: Shape, scale: float) -> Factors:
    """What the tensors of a layer, by leaf and in float32, add to a weight of ``shape``; ``scale`` is alpha / rank
    where no alpha is among them."""
    make = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr, "full": _full}[kind]
    made, rank = make(tensors, shape)
    if rank and "alpha" in tensors:
        scale = tensors["alpha"].item() / rank
    return made.scaled(scale)


def _lora(tensors: Mapping[str, Tensor], shape: Shape) -> tuple[Factors, int]:
    down, up = tensors["down"], tensors["up"].flatten(1)
    rank = len(down)
    if "mid" in tensors:
        down = torch.einsum("nmkl,mi->nikl", tensors["mid"], down.flatten(1))
    return LowRank(down.reshape(len(down), *shape[1:]), up), rank


def _loha(tensors: Mapping[str, Tensor], shape: Shape) -> tuple[Factors, int]:
    a1, b1, a2, b2 = (tensors[f"hada_w{i}_{x}"] for i in "12" for x in "ab")
    if "hada_t1" in tensors or "hada_t2" in tensors:
        first, second = (_tucker(tensors, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in "12")
        return Dense(first.reshape(shape) * second.reshape(shape)), len(b1)
    rank, (out, inner) = len(b1) * len(b2), (shape[0], prod(shape[1:]))
    if rank * (out + inner) >= out * inner:
        return Dense(((a1 @ b1) * (a2 @ b2)).view(shape)), len(b1)
    down = (b1[:, None] * b2[None]).view(rank, *shape[1:])
    return LowRank(down, (a1[:, :, None] * a2[:, None]).view(out, rank)), len(b1)


def _lokr(tensors: Mapping[str, Tensor], shape: Shape) -> tuple[Factors, int]:
    """Whole matrices have no rank to divide alpha by."""
    rank = next((len(tensors[leaf]) for leaf in ("lokr_w2_b", "lokr_w1_b") if leaf in tensors), 0)
    left = tensors["lokr_w1"] if "lokr_w1" in tensors else tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    right = tensors["lokr_w2"] if "lokr_w2" in tensors else _tucker(tensors, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    kernel = shape[2:]
    return Kronecker(left, right.reshape(len(right), shape[1] // left.shape[1], *kernel)), rank


def _full(tensors: Mapping[str, Tensor], shape: Shape) -> tuple[Factors, int]:
    return Dense(tensors["diff"].reshape(shape)), 0


def _tucker(tensors: Mapping[str, Tensor], a: str, b: str, core: str) -> Tensor:
    """``a @ b``, or with a core between them [out, in, kh, kw]."""
    if core not in tensors:
        return tensors[a] @ tensors[b]
    return torch.einsum("ijkl,jr,ip->prkl", tensors[core], tensors[b], tensors[a])
