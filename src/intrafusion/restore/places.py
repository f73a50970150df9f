"""Which places of what layers give are looked at, over all batches, and which image each is of."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from intrafusion.brief import show_briefly
from intrafusion.network.batches import count_images
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import sample_places, unravel

_SPARE = 2  # times as many as are wanted are picked where it is estimated how many come


@dataclass(eq=False)
class PlaceSampler:
    """Chooses up to `limit` places of each layer over all batches, one batch after another.

    Of batches that differ in nothing but their number of images, these are the places that all images in one call would
    have had: they are drawn from all at once, and each batch has its part. Where rows count differently, or shapes do
    differ, a random number is drawn for each place as it comes, and those with the lowest remain in the end.
    """

    inputs: Iterable[Inputs]
    limit: int
    seed: int
    limits: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, tuple[int, tuple[int, ...]]] = field(default_factory=dict)
    drawn: dict[str, Tensor] = field(default_factory=dict)
    picked: dict[str, list[Tensor]] = field(default_factory=dict)
    bounds: dict[str, float] = field(default_factory=dict)
    generators: dict[str, torch.Generator] = field(default_factory=dict)  # that go on from batch to batch

    __repr__ = show_briefly

    def __post_init__(self) -> None:
        seen = [_look_at(call) for call in self.inputs]
        self.counts, self.amounts = [count for count, _, _ in seen], [amount for _, amount, _ in seen]
        self.is_even = len({shapes for _, _, shapes in seen}) == 1 and seen[0][2] is not None

    def choose(
        self, name: str, batch: int, shape: tuple[int, ...], counts: Tensor | None = None, limit: int | None = None
    ) -> Tensor | None:
        """Places (k, dims) of a batch, in order; None where they are not as many as the first batch foretold.

        Args:
            shape: of what a layer gives, without channels.
            counts: how much each place counts, of that shape; those that do not are left out. None for all alike.
            limit: of this layer, where it has one of its own.
        """
        self.limits[name] = limit or self.limit
        if len(self.counts) == 1:
            return sample_places(name, shape, self.limits[name], self.seed, counts)
        counted = None if counts is None else counts.flatten().nonzero()[:, 0].cpu()
        size = math.prod(shape) if counted is None else len(counted)
        if batch == 0:
            self._begin(name, size, shape)
        chosen = self._draw(name, batch, size, shape) if name in self.drawn else self._pick(name, size)
        if chosen is None:
            return None
        flat = chosen if counted is None else counted[chosen]
        return unravel(flat, shape)

    def list_kept(self, name: str) -> list[Tensor] | None:
        """Of the places that were chosen in each batch, which remain; None for all."""
        ranks = self.picked.get(name)
        if ranks is None or sum(map(len, ranks)) <= self.limits[name]:
            return None
        bound = torch.cat(ranks).kthvalue(self.limits[name]).values
        return [one <= bound for one in ranks]

    def _begin(self, name: str, size: int, shape: tuple[int, ...]) -> None:
        """What a layer gives on the first batch tells how many places there are in all."""
        self.sizes[name] = size, shape
        total, left = divmod(size * sum(self.counts), self.counts[0])
        if self.is_even and not left:
            self.drawn[name] = sample_places(name, (total,), self.limits[name], self.seed)[:, 0]
        else:
            self.picked[name] = []
            self.bounds[name] = _SPARE * self.limits[name] / max(1.0, self._estimate(size))
            self.generators[name] = torch.Generator().manual_seed(zlib.crc32(f"{self.seed} {name}".encode()))

    def _estimate(self, size: int) -> float:
        """Places in all, of which there are so many in the first batch: by images, or by what counts of each."""
        amounts = self.counts if size <= self.counts[0] else self.amounts
        return size * sum(amounts) / max(1, amounts[0])

    def _draw(self, name: str, batch: int, size: int, shape: tuple[int, ...]) -> Tensor | None:
        first, like = self.sizes[name]
        if size * self.counts[0] != first * self.counts[batch]:
            return torch.empty(0, dtype=torch.long) if shape == like else None  # what no image enters is seen once
        start, drawn = first * sum(self.counts[:batch]) // self.counts[0], self.drawn[name]
        return drawn[(drawn >= start) & (drawn < start + size)] - start

    def _pick(self, name: str, size: int) -> Tensor:
        ranks, bound = self.picked[name], self.bounds[name]
        found = torch.rand(size, generator=self.generators[name], dtype=torch.float64)
        chosen = (found <= bound).nonzero()[:, 0]
        ranks.append(found[chosen])
        if sum(map(len, ranks)) > self.limits[name]:
            self.bounds[name] = float(torch.cat(ranks).kthvalue(self.limits[name]).values)
        return chosen


def _look_at(call: Inputs) -> tuple[int, int, tuple[torch.Size, ...] | None]:
    """Images of a batch; how many positions count, or numbers its first tensor holds; shapes but for the images.

    No shapes where rows count differently.
    """
    tensors = call.tensors()
    if call.weights is not None and call.weights.tables:
        return count_images(call), int((call.weights.tables[0] > 0).sum()), None
    return count_images(call), max((t.numel() for t in tensors[:1]), default=1), tuple(t.shape[1:] for t in tensors)


def find_images(places: Tensor, shape: Sequence[int], count: int) -> Tensor | None:
    """Which of `count` images places (k, dims) in a shape belong to, (k,) int64.

    The images run along the first dimension of that length or, where there is none, along the first that is a multiple
    of it, as windows of images do; None where there is none either.

    >>> find_images(torch.tensor([[0, 3], [5, 0], [7, 1]]), (8, 4), 2)
    tensor([0, 1, 1])
    """
    fitting = [d for d, size in enumerate(shape) if size == count]
    fitting += [d for d, size in enumerate(shape) if size and size % count == 0]
    return places[:, fitting[0]] // (shape[fitting[0]] // count) if fitting else None
