"""Choosing one type for each layer so that the sum of their errors is least within a number of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Choice(NamedTuple):
    """One way to store a layer."""

    nbytes: int
    error: float


def solve(layers: Sequence[Sequence[Choice]], budget: int) -> list[int]:
    """The index of each layer's choice; the multiple-choice knapsack by its Lagrangian relaxation.

    All layers begin with their smallest choice. Those that follow on the lower convex hull of (bytes, error) are taken
    in the order of error saved per byte; one that does not fit any more is passed over. The result is at most one
    layer's step away from the optimum. Raises ValueError where not even the smallest choices fit.
    """
    hulls = [_hull(choices) for choices in layers]
    chosen = [hull[0] for hull in hulls]
    left = budget - sum(choices[i].nbytes for choices, i in zip(layers, chosen, strict=True))
    if left < 0:
        raise ValueError(f"the smallest choices take {-left} bytes more than there are")
    steps = []
    for layer, (choices, hull) in enumerate(zip(layers, hulls, strict=True)):
        for place, (a, b) in enumerate(pairwise(hull)):
            saved, cost = choices[a].error - choices[b].error, choices[b].nbytes - choices[a].nbytes
            steps.append((-saved / cost, layer, place))
    blocked = set()  # layers of which a step did not fit: the next would not follow it
    for _, layer, place in sorted(steps):
        hull, choices = hulls[layer], layers[layer]
        cost = choices[hull[place + 1]].nbytes - choices[hull[place]].nbytes
        if layer in blocked or cost > left:
            blocked.add(layer)
            continue
        chosen[layer], left = hull[place + 1], left - cost
    return chosen


def _hull(choices: Sequence[Choice]) -> list[int]:
    """Choices on the lower convex hull by growing bytes and falling error."""
    hull: list[int] = []
    for i in sorted(range(len(choices)), key=lambda i: (choices[i].nbytes, choices[i].error)):
        if hull and choices[i].error >= choices[hull[-1]].error:
            continue
        while len(hull) > 1 and _above(choices[hull[-2]], choices[hull[-1]], choices[i]):
            hull.pop()
        hull.append(i)
    return hull


def _above(a: Choice, b: Choice, c: Choice) -> bool:
    """Whether b lies on or above the line from a to c."""
    return (b.error - a.error) * (c.nbytes - a.nbytes) >= (c.error - a.error) * (b.nbytes - a.nbytes)
