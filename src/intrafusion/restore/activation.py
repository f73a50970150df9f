"""Activation functions as a forward pass calls them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from intrafusion.brief import show_briefly

_NAMES = frozenset(
    (
        *("celu", "clamp", "clamp_max", "clamp_min", "elu", "gelu", "hardsigmoid", "hardswish", "hardtanh"),
        *("leaky_relu", "mish", "relu", "relu6", "selu", "sigmoid", "silu", "softplus", "tanh", "threshold"),
    )
)
"""Functions of one tensor, entry by entry, that grow with it but for a dip at most; as `aten` calls them."""

_GRID = torch.linspace(-8, 8, 4001, dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Activation:
    """A function of each entry."""

    function: Callable[[Tensor], Tensor]

    __repr__ = show_briefly

    @classmethod
    def of(cls, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Activation | None:
        """The activation function that this call of an operation is, or None."""
        name = func._schema.name.removeprefix("aten::").rstrip("_")
        if name not in _NAMES or any(isinstance(a, Tensor) for a in (*args[1:], *kwargs.values())):
            return None
        rest, options = tuple(args[1:]), dict(kwargs)
        return cls(lambda x: func(x.clone(), *rest, **options))

    def __call__(self, x: Tensor) -> Tensor:
        return self.function(x)

    def is_same(self, other: Activation) -> bool:
        """As another one, where inputs usually lie."""
        return self is other or torch.equal(self(_GRID), other(_GRID))

    @cached_property
    def slope(self) -> float:
        """The largest, where inputs usually lie; infinite if it is flat there."""
        return float((self(_GRID).diff() / _GRID.diff()).max()) or math.inf
