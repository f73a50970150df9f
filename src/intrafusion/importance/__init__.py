"""How much does each channel matter? One criterion per file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from intrafusion.errors import unknown_name
from intrafusion.graph import ChannelGroup
from intrafusion.importance.magnitude import Magnitude
from intrafusion.importance.random import Random


@runtime_checkable
class Importance(Protocol):
    """(group, weights, observations) -> (n,) finite scores; larger = more important.

    `weights` are tensors by name with norms folded; `observations` is what was seen of the group on images, if any.
    """

    def __call__(self, group: ChannelGroup, weights: Mapping[str, Tensor], observations: object = None) -> Tensor: ...


IMPORTANCES: dict[str, Importance] = {
    "l1": Magnitude(p=1.0),
    "l2": Magnitude(p=2.0),
    "linf": Magnitude(p=math.inf),
    "random": Random(),
}


def get(importance: str | Importance) -> Importance:
    """The criterion of this name; a criterion passes through.

    Raises:
        ValueError: unknown name.
        TypeError: neither a name nor callable.
    """
    if isinstance(importance, str):
        if importance not in IMPORTANCES:
            raise ValueError(unknown_name("importance", importance, IMPORTANCES))
        return IMPORTANCES[importance]
    if isinstance(importance, type) or not callable(importance):
        raise TypeError(
            f"importance: expected a name or a callable (group, weights, observations) -> (n,), got {importance!r}."
        )
    return importance


__all__ = ["IMPORTANCES", "Importance", "Magnitude", "Random", "get"]
