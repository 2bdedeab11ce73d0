"""A UNet's blocks in pieces that run one after another, each once its predecessors' results stand.

A transformer of ten blocks, as SDXL has them, that ran anew for each of its layers would run sixty times; and the
attention between an SD 1.5's 4096 pixels is most of what one run takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from gguf_sd.models.unet_blocks import ResBlock, SpatialTransformer, Stage, TransformerBlock, feature_map, tokens
from gguf_sd_kernels.normed import Measured


@dataclass(frozen=True)
class Inputs:
    """What a block is given: features x [B, C, H, W], embeddings, the prompts' keys and values, and the size that it
    enlarges to."""

    x: Tensor
    emb: Tensor
    projected: Tensor
    size: tuple[int, int]


# Of the whole block (or a copy of it), its inputs and what the piece before made: what this one makes.
Piece = Callable[[nn.Module, Inputs, Tensor], Tensor]


def pieces(block: nn.Module) -> Iterator[tuple[tuple[str, ...], Piece]]:
    """The pieces of a block, with the beginnings of the names of the modules that are in each; the first one's last
    argument is of no account. What the last makes is what the block makes."""
    if isinstance(block, ResBlock):
        yield ("in_layers", "emb_layers"), _enter
        yield ("out_layers", "skip_connection"), _finish
    elif isinstance(block, SpatialTransformer):
        yield ("proj_in",), lambda module, given, _: module.proj_in.measured(tokens(module.norm(given.x))).rows  # type: ignore
        for i in range(len(block.transformer_blocks)):
            for leaf, piece in (("attn1", _attend), ("attn2", _cross_attend), ("ff", _feed_forward)):
                yield (f"transformer_blocks.{i}.{leaf}",), _inside(i, piece)
        yield ("proj_out",), _leave
    else:
        yield ("",), lambda module, given, _: Stage([module])(given.x, given.emb, given.projected, given.size)


def _enter(module: nn.Module, given: Inputs, before: Tensor) -> Tensor:
    assert isinstance(module, ResBlock)
    norm, _, conv = module.in_layers
    return conv.normed(norm, given.x, emb=module.emb_layers(given.emb))  # type: ignore[operator]


def _finish(module: nn.Module, given: Inputs, h: Tensor) -> Tensor:
    assert isinstance(module, ResBlock)
    norm, _, _, conv = module.out_layers
    return conv.normed(norm, h, residual=module.skip_connection(given.x))  # type: ignore[operator]


def _inside(i: int, piece: Callable[[TransformerBlock, Inputs, Tensor], Tensor]) -> Piece:
    return lambda module, given, rows: piece(module.transformer_blocks[i], given, rows)  # type: ignore


def _attend(block: TransformerBlock, given: Inputs, rows: Tensor) -> Tensor:
    return block.attn1(block.norm1, Measured(rows, None)).rows


def _cross_attend(block: TransformerBlock, given: Inputs, rows: Tensor) -> Tensor:
    return block.attn2(block.norm2, Measured(rows, None), given.projected).rows


def _feed_forward(block: TransformerBlock, given: Inputs, rows: Tensor) -> Tensor:
    return block.ff(block.norm3, Measured(rows, None), last=True).rows


def _leave(module: nn.Module, given: Inputs, rows: Tensor) -> Tensor:
    assert isinstance(module, SpatialTransformer)
    height, width = given.x.shape[2:]
    return feature_map(module.proj_out(rows, tokens(given.x)), height, width)
