"""Seeing what the layers of a module are given while it runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gguf_sd.models.layers import Conv2d, Linear


@dataclass(frozen=True)
class Seen:
    """What a layer was given: its input, and what its product is added to, per place and per picture."""

    x: Tensor
    residual: Tensor | None = None
    emb: Tensor | None = None


Note = Callable[[str, Seen], None]


class _AllSeenError(Exception):
    """Ends a run that has shown all that it was to show."""


@contextmanager
def _watching(module: nn.Module, names: Collection[str], note: Note) -> Iterator[None]:
    """``note`` is called before each of the layers of these names runs."""
    with ExitStack() as undo:
        for name in names:
            layer = module.get_submodule(name)

            def before(layer: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                own = args[1] if len(args) > 1 and not isinstance(layer, Conv2d) else None
                note(name, Seen(args[0], kwargs.get("residual", own), kwargs.get("emb")))

            undo.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            if isinstance(layer, Linear):  # whose other way to run is no call of the module
                undo.callback(layer.__dict__.pop, "geglu")
                layer.geglu = _noting_geglu(layer, name, note)  # type: ignore[assignment,method-assign]
        yield


def _noting_geglu(layer: Linear, name: str, note: Note) -> Callable[[Tensor], Tensor]:
    def geglu(x: Tensor) -> Tensor:
        note(name, Seen(x))
        return type(layer).geglu(layer, x)

    return geglu


def watch(module: nn.Module, names: Sequence[str], run: Callable[[], object]) -> dict[str, Seen]:
    """Calls ``run``, which runs the module, until the layers of these names have got their inputs."""
    seen: dict[str, Seen] = {}

    def note(name: str, what: Seen) -> None:
        seen[name] = what
        if len(seen) == len(names):
            raise _AllSeenError

    with _watching(module, names, note), suppress(_AllSeenError):
        run()
    return seen


def in_order(module: nn.Module, names: Collection[str], run: Callable[[], object]) -> list[list[str]]:
    """The layers of these names in the order in which they run; those of a group are given the same tensor."""
    seen: list[tuple[str, Tensor]] = []
    with _watching(module, names, lambda name, what: seen.append((name, what.x))):
        run()
    groups: list[list[str]] = []
    for i, (name, x) in enumerate(seen):
        if i and seen[i - 1][1].data_ptr() == x.data_ptr() and seen[i - 1][1].shape == x.shape:
            groups[-1].append(name)
        else:
            groups.append([name])
    return groups
