"""The weight that a layer's tensors in a LoRA make up, told from their shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import NamedTuple

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]


class Made(NamedTuple):
    """A weight. ``kernel`` is (kh, kw), or empty where the tensors leave open how ``inputs`` divide."""

    out: int
    inputs: int  # input channels times kernel size
    kernel: Shape

    def fits(self, weight: Shape) -> bool:
        """Whether this is a weight of this shape, [out, in] or [out, in, kh, kw]."""
        kernel = weight[2:] or (1, 1)
        same = not self.kernel or self.kernel == kernel
        return same and (self.out, self.inputs) == (weight[0], prod(weight[1:]))

    def __str__(self) -> str:
        return f"[{self.out}, {self.inputs}]" if len(self.kernel) < 2 else f"[{self.out}, {self.inputs}], flattened"


def made(kind: str, shapes: Shapes) -> Made:
    """Raises ValueError, naming the leaf and what it should be, where the tensors do not go together."""
    for leaf, shape in shapes.items():
        if leaf != "alpha" and (len(shape) not in (2, 4) or 0 in shape):
            raise ValueError(f"{leaf} has shape {list(shape)}")
    return MAKERS[kind](shapes)


def held_values(kind: str, shapes: Shapes, weight: Shape) -> int:
    """How many values lie beside a layer for its change, see :mod:`gguf_sd.adapters.factors`."""
    out, inputs = weight[0], prod(weight[1:])
    if kind == "full":
        return out * inputs
    if kind == "LoRA":
        return shapes["up"][1] * (out + inputs)
    if kind == "LoHa":
        rank = shapes["hada_w1_b"][0] * shapes["hada_w2_b"][0]
        return out * inputs if set(shapes) & {"hada_t1", "hada_t2"} else min(rank * (out + inputs), out * inputs)
    left = shapes.get("lokr_w1") or (shapes["lokr_w1_a"][0], shapes["lokr_w1_b"][1])
    return prod(left) + out * inputs // prod(left)


def _lora(shapes: Shapes) -> Made:
    down, up, mid = shapes["down"], shapes["up"], shapes.get("mid")
    _same("up", up[2:] or (1, 1), (1, 1), "kernel")
    if mid is None:
        _same("up", up[1], down[0], "rank")
        return Made(up[0], prod(down[1:]), down[2:] or (1, 1))
    if len(mid) != 4:
        raise ValueError(f"mid has shape {list(mid)}")
    _same("down", down[2:] or (1, 1), (1, 1), "kernel")
    _same("mid", mid[:2], (up[1], down[0]), "rank")
    return Made(up[0], down[1] * prod(mid[2:]), mid[2:])


def _product(shapes: Shapes, a: str, b: str, core: str) -> Made:
    """[out, r] times [r, in]; or with a Tucker core [r, r, kh, kw] between [r, out] and [r, in]."""
    first, second, middle = shapes[a], shapes[b], shapes.get(core)
    for leaf in (a, b):
        _same(leaf, len(shapes[leaf]), 2, "number of dimensions")
    if middle is None:
        _same(b, second[0], first[1], "rank")
        return Made(first[0], second[1], ())
    _same(core, middle, (first[0], second[0], *middle[2:4]), "shape")
    return Made(first[1], second[1] * prod(middle[2:]), middle[2:])


def _loha(shapes: Shapes) -> Made:
    first = _product(shapes, "hada_w1_a", "hada_w1_b", "hada_t1")
    second = _product(shapes, "hada_w2_a", "hada_w2_b", "hada_t2")
    _same("hada_w2", second, first, "shape")
    return first


def _lokr(shapes: Shapes) -> Made:
    if "lokr_w1" in shapes:
        _same("lokr_w1", len(shapes["lokr_w1"]), 2, "number of dimensions")
        left, width = shapes["lokr_w1"]
    else:
        left, width, _ = _product(shapes, "lokr_w1_a", "lokr_w1_b", "")
    if "lokr_w2" in shapes:
        whole = shapes["lokr_w2"]
        right = Made(whole[0], prod(whole[1:]), whole[2:] or (1, 1))
    else:
        right = _product(shapes, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
    return Made(left * right.out, width * right.inputs, right.kernel)


def _same(leaf: str, got: object, wanted: object, what: str) -> None:
    if got != wanted:
        shown = [list(x) if isinstance(x, tuple) else x for x in (got, wanted)]
        raise ValueError(f"{leaf} has {what} {shown[0]} where the others have {shown[1]}")


def _full(shapes: Shapes) -> Made:
    diff = shapes["diff"]
    return Made(diff[0], prod(diff[1:]), diff[2:] or (1, 1))


MAKERS: dict[str, Callable[[Shapes], Made]] = {"LoRA": _lora, "LoHa": _loha, "LoKr": _lokr, "full": _full}
