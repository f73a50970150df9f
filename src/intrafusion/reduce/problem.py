"""What a reducer is asked, and what it answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ReductionProblem:
    """Reduce n channels to m. Knows no network.

    Attributes:
        features: (n, d) float64, one row per channel: producer rows and consumer columns.
        importance: (n,) float64, finite, larger = more important.
        size: m, with 1 <= m <= n.
        seed: for reducers that draw random numbers.
        biases: (n, k) float64, what is added to the channels.
    """

    features: Tensor
    importance: Tensor
    size: int
    seed: int = 0
    biases: Tensor | None = None


@dataclass(frozen=True, eq=False)
class ReductionMap:
    """Two small matrices that reduce a group, float64.

    merge (m, n): producers W <- merge W; unmerge (n, m): consumers W <- W unmerge.
    """

    merge: Tensor
    unmerge: Tensor


@runtime_checkable
class Reducer(Protocol):
    """A frozen dataclass whose fields are its hyper-parameters.

    `mixes`: whether a new channel may combine several old ones. A reducer that only selects also works on groups
    whose channels must not be mixed.
    """

    mixes: bool

    def __call__(self, problem: ReductionProblem) -> ReductionMap: ...
