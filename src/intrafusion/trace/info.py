"""What the tracer knows about one tensor: an activation's labels, or where a weight's elements come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor

from intrafusion.brief import show_briefly
from intrafusion.trace.labels import FIXED, compact, fill, find_varying, narrow


@dataclass(eq=False)
class Origin:
    """The linear map that computed an activation, and how often that activation was read."""

    weight: str
    dim: int
    bias: str | None
    reads: int = 0
    norm: tuple[str | None, ...] | None = None
    eps: float = 0.0

    __repr__ = show_briefly


class Axis(NamedTuple):
    """For each element of a tensor, its index along dimension `dim` of parameter `tensor` (-1: from elsewhere)."""

    tensor: str
    dim: int
    coordinates: Tensor

    @property
    def varies(self) -> set[int]:
        return find_varying(self.coordinates)


class Tail(NamedTuple):
    """What channels were last multiplied with and then shifted by, one entry each, before they were read.

    Names of whole parameters, as those of a norm; None: by nothing. Movements in between do not count.
    """

    scale: str | None = None
    shift: str | None = None
    offset: float = 0.0  # what is added to the scale before, as in (1 + weight) * x


class Writer(NamedTuple):
    """The linear map that just gave channels; movements behind it do not count."""

    weight: str
    dim: int
    bias: str | None


class LabelledTensor:
    """A tensor computed from the input; labels name the channel of each element.

    `indices_of`: the channels whose positions this tensor holds, as after an argmax; whoever reads it sees their order.
    `tail`: by what each channel was just multiplied and shifted, if by anything.
    `writer`: the linear map that gave it, if nothing was done to it since.
    """

    __slots__ = ("indices_of", "labels", "origin", "tail", "writer")

    def __init__(
        self,
        labels: Tensor,
        origin: Origin | None = None,
        indices_of: np.ndarray | None = None,
        tail: Tail | None = None,
        writer: Writer | None = None,
    ) -> None:
        self.labels = labels
        self.origin = origin
        self.indices_of = indices_of
        self.tail = tail
        self.writer = writer

    @classmethod
    def fixed(cls, shape: tuple[int, ...]) -> LabelledTensor:
        """An input, or anything else whose channels must stay as they are."""
        return cls(fill(FIXED, shape))

    @property
    def is_uniform(self) -> bool:
        """Whether it is a constant, or the same for all channels, everywhere: padding."""
        return not narrow(self.labels).any()

    def map(self, move: Callable[[Tensor], Tensor]) -> LabelledTensor:
        return LabelledTensor(compact(move(self.labels)), tail=self.tail, writer=self.writer)


class Weight:
    """A parameter or buffer, or a tensor made from such by moving and combining elements.

    `transposed` tells `F.linear(query, weight)` from a product of two weights; `nonlinear` says how the tensor was
    derived where that was not by linear operations alone; `offset` is the number that was added to a whole parameter,
    where that is all that was.
    """

    __slots__ = ("axes", "nonlinear", "offset", "transposed")

    def __init__(
        self, axes: list[Axis], *, transposed: bool = False, nonlinear: str | None = None, offset: float | None = None
    ) -> None:
        self.axes = axes
        self.transposed = transposed
        self.nonlinear = nonlinear
        self.offset = offset

    def map(self, move: Callable[[Tensor], Tensor]) -> Weight:
        moved = [Axis(a.tensor, a.dim, compact(move(a.coordinates))) for a in self.axes]
        return Weight(moved, nonlinear=self.nonlinear, offset=self.offset)

    def broadcast_to(self, shape: tuple[int, ...]) -> Weight:
        return self.map(lambda c: c.broadcast_to(shape))

    @property
    def single(self) -> str | None:
        """Name of the parameter if this is one whole parameter, untouched or only transposed."""
        return self.owner if self.nonlinear is None else None

    @property
    def owner(self) -> str | None:
        """Name of the parameter if this is one whole parameter, or such a one plus a number, see `offset`."""
        names = {a.tensor for a in self.axes}
        plain = self.nonlinear is None or self.offset is not None
        return next(iter(names)) if len(names) == 1 and plain else None


Info = LabelledTensor | Weight
Outcome = Info | Sequence[Info | None] | None  # of a rule: about the one output, or about each
