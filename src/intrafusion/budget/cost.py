"""What a network costs, as a function of the sizes of its groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from intrafusion.graph import ChannelGraph

Along = tuple[tuple[str, int], ...]
"""The groups that run along one dimension, and how many of its indices each of their channels takes."""


@dataclass(frozen=True, eq=False)
class Cost:
    """Parameters, or multiply-accumulates, of a network whose groups have given sizes.

    Every tensor contributes in proportion to the number of its entries that are left.

    Attributes:
        sizes: channels of each group in the original network.
        parts: for each tensor its weight (cost per entry), its shape, and the groups along each dimension.
        constant: what depends on no group.
    """

    sizes: Mapping[str, int]
    parts: tuple[tuple[float, tuple[int, ...], tuple[Along, ...]], ...]
    constant: float = 0.0

    @classmethod
    def of(cls, graph: ChannelGraph, total: float, tensors: Mapping[str, tuple[tuple[int, ...], float]]) -> Cost:
        """Args: total cost of the original; for each tensor that contributes, its shape and its share of the total."""
        along: dict[str, dict[int, dict[object, list[tuple[str, int]]]]] = defaultdict(lambda: defaultdict(dict))
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


def _one_slice(slices: Mapping[object, list[tuple[str, int]]]) -> Along:
    """What runs along a dimension; of the slices of a grouped convolution, which are equally long, the first."""
    whole = slices.get(None, [])
    parts = [groups for within, groups in slices.items() if within is not None]
    return (*whole, *(parts[0] if parts else ()))
