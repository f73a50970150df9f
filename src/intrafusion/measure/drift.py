"""How far the outputs of a smaller network lie from those of the original."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

from intrafusion.arguments import Batch, Count, Vector, checked
from intrafusion.errors import ArgumentError, ModelError, show
from intrafusion.measure.accuracy import BATCH_SIZE, answer
from intrafusion.network.inputs import output_tensors
from intrafusion.network.state import preserve_state

_CONSTANT = 1e-12  # an output whose variance is a smaller share of its square is a constant


@checked
def output_rows(model: nn.Module, images: Batch, batch_size: Count = BATCH_SIZE) -> Tensor:
    """All that a network answers, one row per image: (n, k) float64.

    Runs in evaluation mode on the device and in the precision of the network, which is left as it was.

    Args:
        images: (n, ...).
    Raises:
        ArgumentError: no images.
        ModelError: the network gives no floating-point tensor, or one that has no row for each image.
    """
    if len(images) == 0:
        raise ArgumentError("outputs: expected at least one image, got none; give some.")
    with preserve_state(model):
        return torch.cat([_as_rows(answer(model, batch), len(batch)) for batch in images.split(batch_size)])


def _as_rows(output: object, count: int) -> Tensor:
    parts = [t.detach().double().cpu() for t in output_tensors(output) if t.is_floating_point()]
    wrong = [tuple(t.shape) for t in parts if t.dim() == 0 or len(t) != count]
    if not parts or wrong:
        got = f"shape {wrong[0]}" if wrong else f"no such tensor in a {type(output).__name__}"
        raise ModelError(f"outputs: expected floating-point tensors with {count} rows, one for each image, got {got}.")
    return torch.cat([t.reshape(count, -1) for t in parts], 1)


@checked
def drift(model: nn.Module, reference: nn.Module, images: Batch) -> Tensor:
    """Euclidean distance of the two networks' outputs, (n,) float64, in the unit of the outputs.

    Reference: Theus et al. 2024, Figures 5 and 8 to 14.
    """
    found, expected = output_rows(model, images), output_rows(reference, images)
    if found.shape != expected.shape:
        raise ModelError(
            f"drift: expected two networks with outputs of one shape, got {list(found.shape)} and "
            f"{list(expected.shape)} for {len(images)} images; compare a network with what it was made from."
        )
    return (found - expected).norm(dim=1)


@checked
def histogram(values: Vector, edges: Sequence[float]) -> list[int]:
    """How many values lie in each bin edges[i] <= v < edges[i + 1], and at or above the last edge: len(edges) counts.

    >>> histogram(torch.tensor([0.0, 0.5, 1.0, 7.0]), [0.0, 1.0, 2.0])
    [2, 1, 1]

    Raises:
        ArgumentError: a value lies below the first edge, or is not a number.
    """
    if len(edges) == 0 or list(edges) != sorted(edges):
        raise ArgumentError(f"histogram: expected edges in rising order, at least one, got {show(edges)}; sort them.")
    if bool((values < edges[0]).any()) or bool(values.isnan().any()):
        raise ArgumentError(f"histogram: expected numbers from {edges[0]} on, got {values.min()}.")
    bins = torch.bucketize(values, torch.tensor(edges, dtype=values.dtype), right=True) - 1
    return torch.bincount(bins, minlength=len(edges)).tolist()


@checked
def output_error(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Mean squared difference of outputs as a fraction of the variance of the expected ones, over all tensors.

    Infinite or NaN entries that both have (masked classes, undefined places) do not count; where one alone has them the
    share is infinite. The variance is over the rows; of a single one, or where none varies, it is the mean square.

    >>> output_error([torch.tensor([[1.0, 2.0]])], [torch.tensor([[1.0, 3.0]])])
    0.1
    """
    error = OutputError()
    error.add(found, expected)
    return error.value


class OutputError:
    """The same over several calls, whose outputs are seen one after another.

    Attributes:
        lost: the squared difference of each output, by its place.
    """

    def __init__(self) -> None:
        self.lost: dict[int, float] = {}
        self.spreads: dict[tuple[int, int, tuple[int, ...] | None], _Spread] = {}  # by output, part, shape of a row

    def add(self, found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
        """What another call gave, and what it should have given."""
        if len(found) != len(expected):
            raise ArgumentError(
                f"output_error: expected as many outputs as expected ones, got {len(found)} and {len(expected)}; "
                "compare the outputs of the same call."
            )
        for index, (a, b) in enumerate(zip(found, expected, strict=True)):
            for part, (x, y) in enumerate(_parts(a, b)):
                if x.shape == y.shape:
                    self.lost[index] = self.lost.get(index, 0.0) + _squared_difference(x, y)
                key = index, part, tuple(y.shape[1:]) if y.dim() else None
                self.spreads.setdefault(key, _Spread()).add(y)

    @property
    def value(self) -> float:
        """Over all outputs at once; beside their square, where none varies."""
        return sum(self.lost.values()) / _measure_scale(self.spreads.values())

    @property
    def each(self) -> dict[int, float]:
        """The same of each output beside its own variance, by its place; beside its square, where it does not vary."""
        own = {index: [spread for key, spread in self.spreads.items() if key[0] == index] for index in self.lost}
        return {index: lost / _measure_scale(own[index]) for index, lost in self.lost.items()}


def _measure_scale(spreads: Collection[_Spread]) -> float:
    total, size = sum(spread.total() for spread in spreads), sum(spread.size for spread in spreads)
    return max(total if total > _CONSTANT * size else size, 1e-300)


def _parts(a: Tensor, b: Tensor) -> list[tuple[Tensor, Tensor]]:
    """In float64; of complex numbers both parts."""
    if not a.is_complex():
        return [(a.double(), b.double())]
    return [(a.real.double(), b.real.double()), (a.imag.double(), b.imag.double())]


def _squared_difference(a: Tensor, b: Tensor) -> float:
    alike = (a == b) | (a.isnan() & b.isnan())
    return float(torch.where(alike, 0.0, a - b).square().sum())


class _Spread:
    """Sum of squares about the mean over all rows, 0 where that is not finite; of a single row about zero."""

    def __init__(self) -> None:
        self.rows = 0
        self.size = 0.0  # the sum of squares
        self.centre = self.moved = self.squares = torch.zeros(())  # the mean of the first rows, and sums about it

    def add(self, b: Tensor) -> None:
        self.size += float(b.square().nan_to_num(0.0, 0.0, 0.0).sum())
        if not b.dim():
            self.squares = self.squares.to(b) + b.square()
            return
        if not len(b):
            return
        if not self.rows:
            self.centre = b.mean(0)
        off = b - self.centre
        self.moved = self.moved + off.sum(0) if self.rows else torch.zeros_like(self.centre)
        self.squares = off.square().sum(0) + self.squares.to(off)
        self.rows += len(b)

    def total(self) -> float:
        found = self.squares - self.moved.square() / max(1, self.rows) if self.rows != 1 else self.centre.square()
        return float(found.nan_to_num(0.0, 0.0, 0.0).sum())
