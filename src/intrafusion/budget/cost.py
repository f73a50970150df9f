"""What a network costs, as a function of the sizes of its groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from intrafusion.brief import show_briefly
from intrafusion.graph import ChannelGraph

Along = tuple[tuple[str, float], ...]
"""The groups that run along one dimension, and how many of its indices each of their channels takes."""


@dataclass(frozen=True, eq=False)
class Cost:
    """Parameters, or multiply-accumulates, of a network whose groups have given sizes.

    Every tensor, or product, contributes in proportion to what is left of each of its dimensions.

    Attributes:
        sizes: channels of each group in the original network.
        parts: for each tensor, or product, its weight (cost per entry), its shape, the groups along each dimension.
        constant: what depends on no group.
    """

    sizes: Mapping[str, int]
    parts: tuple[tuple[float, tuple[int, ...], tuple[Along, ...]], ...]
    constant: float = 0.0

    __repr__ = show_briefly

    @classmethod
    def of(cls, graph: ChannelGraph, total: float, tensors: Mapping[str, tuple[tuple[int, ...], float]]) -> Cost:
        """Args: total cost of the original; for each tensor that contributes, its shape and its share of the total."""
        along: dict[str, dict[int, dict[object, list[tuple[str, float]]]]] = defaultdict(lambda: defaultdict(dict))
        for group in graph.groups:
            for member in group.members if group.is_channel else ():
                slices = along[member.tensor][member.dim].setdefault(member.within, [])
                slices.append((group.name, member.positions.shape[1]))
        parts = []
        for name, (shape, share) in tensors.items():
            dims = tuple(_one_slice(along[name][d]) for d in range(len(shape)))
            if share and math.prod(shape) and any(dims):
                parts.append((share / math.prod(shape), shape, dims))
        own = sum(weight * math.prod(shape) for weight, shape, _ in parts)
        return cls({g.name: g.size for g in graph.groups}, tuple(parts), total - own)

    @classmethod
    def of_products(
        cls,
        graph: ChannelGraph,
        whole: Sequence[tuple[int, ...]],
        tried: Mapping[str, tuple[int, Sequence[tuple[int, ...]]]],
    ) -> Cost | None:
        """What was seen to change, product by product, in networks in which one family of groups was smaller.

        Args:
            whole: the factors of every product of the original; see `factors_of_products`.
            tried: by the first group of the family its smaller size and the factors then.
        Returns:
            None where a network had other products than the original.
        """
        sizes = {g.name: g.size for g in graph.groups}
        if any([len(f) for f in factors] != [len(f) for f in whole] for _, factors in tried.values()):
            return None
        count: dict[tuple[tuple[int, ...], tuple[Along, ...]], int] = defaultdict(int)
        for index, shape in enumerate(whole):
            dims = tuple(
                tuple(
                    (name, (length - factors[index][dim]) / (sizes[name] - m))
                    for name, (m, factors) in tried.items()
                    if factors[index][dim] != length
                )
                for dim, length in enumerate(shape)
            )
            count[shape, dims] += 1
        parts = tuple((float(n), shape, dims) for (shape, dims), n in count.items() if any(dims))
        total = sum(math.prod(shape) for shape in whole)
        return cls(sizes, parts, total - sum(weight * math.prod(shape) for weight, shape, _ in parts))

    def __call__(self, sizes: Mapping[str, int]) -> float:
        """The cost when these groups have these sizes; the others are whole."""
        return self.constant + sum(self.part(i, sizes) for i in range(len(self.parts)))

    def part(self, index: int, sizes: Mapping[str, int]) -> float:
        weight, shape, dims = self.parts[index]
        for length, groups in zip(shape, dims, strict=True):
            gone = sum((self.sizes[g] - sizes.get(g, self.sizes[g])) * slots for g, slots in groups)
            weight *= length - gone
        return weight

    def touched(self, groups: Iterable[str]) -> list[int]:
        """The parts that depend on any of these groups."""
        wanted = set(groups)
        return [i for i, (_, _, dims) in enumerate(self.parts) if any(g in wanted for d in dims for g, _ in d)]


def _one_slice(slices: Mapping[object, list[tuple[str, float]]]) -> Along:
    """What runs along a dimension; of the slices of a grouped convolution, which are equally long, the first."""
    whole = slices.get(None, [])
    parts = [groups for within, groups in slices.items() if within is not None]
    return (*whole, *(parts[0] if parts else ()))
