"""What a network costs, as a function of the sizes of its groups."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass

from intrafusion.brief import show_briefly
from intrafusion.graph import ChannelGraph
from intrafusion.measure.memory import Live

Along = tuple[tuple[tuple[str, ...], float], ...]
"""How many indices of one dimension are channels of a group, or of several at once, as of a head and inside it."""


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
        parts = tuple(part for cost in cls.of_each(graph, tensors).values() for part in cost.parts)
        own = sum(weight * math.prod(shape) for weight, shape, _ in parts)
        return cls({g.name: g.size for g in graph.groups}, parts, total - own)

    @classmethod
    def of_each(cls, graph: ChannelGraph, tensors: Mapping[str, tuple[tuple[int, ...], float]]) -> dict[str, Cost]:
        """The cost of each of these tensors, given its shape and what it costs in the original, by its name."""
        along: dict[str, dict[int, dict[object, _Holders]]] = defaultdict(lambda: defaultdict(dict))
        for group in graph.groups:
            for member in group.members:
                holders = along[member.tensor][member.dim].setdefault(member.within, defaultdict(list))
                for index in member.positions.reshape(-1).tolist():
                    holders[index].append(group.name)
        sizes, found = {g.name: g.size for g in graph.groups}, dict[str, Cost]()
        for name, (shape, share) in tensors.items():
            dims = tuple(_one_slice(along[name][d]) if d in along[name] else () for d in range(len(shape)))
            if share and math.prod(shape) and any(dims):
                found[name] = cls(sizes, ((share / math.prod(shape), shape, dims),))
            else:
                found[name] = cls(sizes, (), share)
        return found

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
        products = _find_changes(graph, whole, tried)
        return None if products is None else cls.of_changes(graph, products)

    @classmethod
    def of_changes(cls, graph: ChannelGraph, products: Sequence[_Product]) -> Cost:
        """Of products whose factors are known to change with groups; equal ones become one part."""
        count: dict[_Product, int] = defaultdict(int)
        for product in products:
            count[product] += 1
        parts = tuple((float(n), shape, dims) for (shape, dims), n in count.items() if any(dims))
        total = sum(math.prod(shape) for shape, _ in products)
        own = sum(weight * math.prod(shape) for weight, shape, _ in parts)
        return cls({g.name: g.size for g in graph.groups}, parts, total - own)

    def __call__(self, sizes: Mapping[str, int]) -> float:
        """The cost when these groups have these sizes; the others are whole."""
        return self.constant + sum(self.part(i, sizes) for i in range(len(self.parts)))

    def part(self, index: int, sizes: Mapping[str, int]) -> float:
        weight, shape, dims = self.parts[index]
        for length, along in zip(shape, dims, strict=True):
            gone = sum(count * (1 - self._share(groups, sizes)) for groups, count in along)
            weight *= length - gone
        return weight

    def _share(self, groups: Iterable[str], sizes: Mapping[str, int]) -> float:
        """What is left of indices that are channels of all of these groups."""
        return math.prod(sizes.get(g, self.sizes[g]) / self.sizes[g] for g in groups)

    def scaled(self, factor: float) -> Cost:
        """In another unit."""
        parts = tuple((weight * factor, shape, dims) for weight, shape, dims in self.parts)
        return Cost(self.sizes, parts, self.constant * factor)

    def is_touched(self, index: int, groups: Container[str]) -> bool:
        """Whether a part depends on any of these groups."""
        _, _, dims = self.parts[index]
        return any(g in groups for along in dims for names, _ in along for g in names)


def join_costs(costs: Iterable[Cost]) -> Cost:
    """The sum of several costs of one network."""
    costs = list(costs)
    sizes = {name: n for cost in costs for name, n in cost.sizes.items()}
    return Cost(sizes, tuple(part for cost in costs for part in cost.parts), sum(cost.constant for cost in costs))


def find_distinct(costs: Iterable[Cost]) -> dict[int, tuple[Cost, int]]:
    """Where every part of several costs of one network is, by its identity; one that they share is there once."""
    return {id(part): (cost, index) for cost in costs for index, part in enumerate(cost.parts)}


def add_up(costs: Sequence[Cost], sizes: Mapping[str, int]) -> list[float]:
    """What each of several costs of one network is when groups have these sizes; shared parts are computed once."""
    values = {key: cost.part(index, sizes) for key, (cost, index) in find_distinct(costs).items()}
    return [cost.constant + sum(values[id(part)] for part in cost.parts) for cost in costs]


def costs_of_results(
    graph: ChannelGraph, weights: Cost, whole: Live, tried: Mapping[str, tuple[int, Live]], unit: float
) -> tuple[Cost, ...] | None:
    """Bytes of weights and results at every moment of a call, from calls in which one family of groups was smaller.

    Args:
        weights: bytes of all weights.
        tried: by the first group of the family its smaller size and the results then.
        unit: what a byte is.
    Returns:
        None where other results were made, or lived together, than in the original. The parts of the weights, which are
        there at every moment, are the same objects in all of them.
    """
    if any(small.moments != whole.moments for _, small in tried.values()):
        return None
    results = _find_changes(graph, whole.results, {name: (m, live.results) for name, (m, live) in tried.items()})
    if results is None:
        return None
    costs, shared = [], weights.scaled(unit).parts
    for moment in map(sorted, whole.moments):
        own = Cost.of_changes(graph, [results[index] for index in moment])
        parts = *own.scaled(unit).parts, *shared
        costs.append(Cost(own.sizes, parts, (own.constant + weights.constant) * unit))
    return tuple(costs)


_Product = tuple[tuple[int, ...], tuple[Along, ...]]
"""The factors of a product, and the groups along each of them."""


def _find_changes(
    graph: ChannelGraph, whole: Sequence[tuple[int, ...]], tried: Mapping[str, tuple[int, Sequence[tuple[int, ...]]]]
) -> list[_Product] | None:
    """Which groups each factor was seen to change with, see `Cost.of_products`."""
    sizes, nested = {g.name: g.size for g in graph.groups}, _find_nested(graph)
    if any([len(f) for f in factors] != [len(f) for f in whole] for _, factors in tried.values()):
        return None
    products = []
    for index, shape in enumerate(whole):
        dims = tuple(
            _join_nested(
                {
                    name: (length - factors[index][dim]) / (sizes[name] - m) * sizes[name]
                    for name, (m, factors) in tried.items()
                    if factors[index][dim] != length
                },
                nested,
            )
            for dim, length in enumerate(shape)
        )
        products.append((shape, dims))
    return products


_Holders = dict[int, list[str]]
"""The groups that an index is a channel of."""


def _one_slice(slices: Mapping[object, _Holders]) -> Along:
    """What runs along a dimension; of the slices of a grouped convolution, which are equally long, the first."""
    parts = [holders for within, holders in slices.items() if within is not None]
    count: dict[tuple[str, ...], float] = defaultdict(float)
    for holders in (*([slices[None]] if None in slices else []), *parts[:1]):
        for groups in holders.values():
            count[tuple(groups)] += 1.0
    return tuple(count.items())


def _find_nested(graph: ChannelGraph) -> set[frozenset[str]]:
    """Pairs of groups that hold the same indices somewhere, as heads and what is inside them."""
    found: set[frozenset[str]] = set()
    holders: dict[tuple[str, int], dict[str, set[int]]] = defaultdict(dict)
    for group in graph.groups:
        for member in group.members:
            own = holders[member.tensor, member.dim].setdefault(group.name, set())
            own.update(member.positions.reshape(-1).tolist())
    for groups in holders.values():
        names = list(groups)
        found |= {frozenset((a, b)) for k, a in enumerate(names) for b in names[:k] if groups[a] & groups[b]}
    return found


def _join_nested(counts: Mapping[str, float], nested: Container[frozenset[str]]) -> Along:
    """The groups along a dimension with their indices; of two that are nested, the ones that they share come together.

    >>> _join_nested({"heads": 32.0, "inside": 32.0, "other": 4.0}, {frozenset(("heads", "inside"))})
    ((('heads', 'inside'), 32.0), (('other',), 4.0))
    """
    left, along = dict(counts), list[tuple[tuple[str, ...], float]]()
    for name in counts:
        inside = [other for other in counts if left[other] > 0 and frozenset((name, other)) in nested]
        for other in inside:
            shared = min(left[name], left[other])
            if shared > 0:
                along.append(((name, other), shared))
                left[name], left[other] = left[name] - shared, left[other] - shared
        if left[name] > 0:
            along.append(((name,), left[name]))
            left[name] = 0.0
    return tuple(along)
