"""Which layers are worth two thinner ones: what a lower rank costs the outputs, beside what fewer channels do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.budget.allocate import allocate
from intrafusion.budget.cost import Cost, add_up, join_costs
from intrafusion.budget.limits import Limit
from intrafusion.budget.sensitivity import Sensitivity, fit_curve
from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role
from intrafusion.measure.size import macs_by_weight, params_of, size_of
from intrafusion.network.batches import cast_like, double_first
from intrafusion.network.input_batches import read_input_batches
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import Layer, find_layers, watch_calls
from intrafusion.network.row_weights import RowWeights
from intrafusion.network.shares import Share, ShareSampler
from intrafusion.network.state import preserve_state
from intrafusion.network.tensors import named_tensors
from intrafusion.plan import name_rank_group
from intrafusion.surgery.lowrank import LowRank, count_sides, find_largest_rank

_ROWS = 2048  # of what a layer gives, of which its directions are found
_LESS = 0.95  # of a budget: what the last of it costs tells what it is worth
_AT_ONCE = 4  # of the layers that are not worth it, one in so many becomes one again before the others are looked at
_MACS = ("macs", "latency_ms")  # limits that go with the multiply-accumulates; the others with the parameters
_LEAST = 1e-9  # a saving, as a share of the limits, that is none

Sizes = dict[str, int]


def choose_layers(
    model: nn.Module,
    graph: ChannelGraph,
    groups: Sequence[ChannelGroup],
    names: Iterable[str],
    sensitivity: Sensitivity,
    limits: Sequence[Limit],
    inputs: Inputs,
    min_channels: int = 1,
) -> list[str]:
    """The layers, of these, whose rank is worth lowering to meet limits.

    All are tried at once: channels and ranks are cut where that adds the least error for what it saves. Then layers
    become one again whose error is more than what they save is worth, at the price that the last of the budget has, and
    the rest is shared out anew, until there are none but those without which the limits cannot be met, or more would be
    lost. Everything is predicted here; what is chosen is to be tried.

    Args:
        groups: of channels that may shrink.
    """
    layers = [layer for name, layer in find_layers(model, graph).items() if name in set(names)]
    budget = _Budget.of(model, graph, layers, limits, inputs)
    curves = draw_rank_curves([layer.name for layer in layers], sensitivity)
    curves |= sensitivity.list_curves(groups)[0] if groups else {}
    left, needed = [layer.name for layer in layers if name_rank_group(layer.name) in curves], set[str]()
    factorise = lambda split: _Factorised(budget, split, groups, curves, min_channels)  # noqa: E731
    now = factorise(left)
    while losing := [name for name in now.list_losing() if name not in needed]:
        for name in losing[: -(-len(losing) // _AT_ONCE)]:
            without = factorise([n for n in now.split if n != name])
            if (without.can_meet or not now.can_meet) and without.error <= now.error:
                now = without
            else:
                needed.add(name)
    return now.split


@dataclass(frozen=True, eq=False)
class _Price:
    """What a network costs whose layers are one or two, as a share of a limit.

    Attributes:
        whole, halves: what a layer costs as one, and as two, by its name.
        rest: what everything else costs.
    """

    whole: Mapping[str, Cost]
    halves: Mapping[str, Cost]
    rest: Cost

    __repr__ = show_briefly

    def of(self, split: Iterable[str]) -> Cost:
        """Of the network in which these layers are two."""
        names = set(split)
        layers = (self.halves[name] if name in names else cost for name, cost in self.whole.items())
        return join_costs([self.rest, *layers])

    def saved(self, name: str, sizes: Sizes) -> float:
        """What a layer costs less as two."""
        return self.whole[name](sizes) - self.halves[name](sizes)


@dataclass(frozen=True, eq=False)
class _Budget:
    """Prices of layers for each limit.

    Attributes:
        between: groups of the channels between the two halves, by layer.
    """

    between: Mapping[str, ChannelGroup]
    prices: Sequence[_Price]

    __repr__ = show_briefly

    @classmethod
    def of(
        cls, model: nn.Module, graph: ChannelGraph, layers: Sequence[Layer], limits: Sequence[Limit], inputs: Inputs
    ) -> _Budget:
        between = {layer.name: _make_between(layer, index) for index, layer in enumerate(layers)}
        split = replace(graph, groups=(*(_pass_halves(g, between) for g in graph.groups), *between.values()))
        shapes = {name: tuple(t.shape) for name, t in named_tensors(model).items()}
        prices = []
        for limit in limits:
            if limit.kind in _MACS:
                shares, total = macs_by_weight(model, inputs), float(size_of(model, inputs).macs)
            else:
                shares, total = {n: float(p.numel()) for n, p in model.named_parameters()}, float(params_of(model))
            unit = limit.whole / (limit.goal * total)  # for some limits, the same share of another kind stands
            priced = {name: (shapes[name], share * unit) for name, share in shares.items() if name in shapes}
            prices.append(_set_price(split, priced, layers, total * unit))
        return cls(between, prices)


@dataclass(frozen=True, eq=False)
class _Factorised:
    """A network in which some layers are two, cut to the limits as far as predictions go.

    Attributes:
        split: those layers.
        groups: of channels that may shrink beside the ranks.
        curves: predicted errors of both.
        least: no group becomes smaller than this.
    """

    budget: _Budget
    split: list[str]
    groups: Sequence[ChannelGroup]
    curves: Mapping[str, Tensor]
    least: int

    __repr__ = show_briefly

    @cached_property
    def units(self) -> list[ChannelGroup]:
        """All that is cut."""
        return [*self.groups, *(self.budget.between[name] for name in self.split)]

    @cached_property
    def costs(self) -> list[Cost]:
        return [price.of(self.split) for price in self.budget.prices]

    def cut(self, most: float) -> Sizes:
        """Sizes that cost at most this share of each limit, or the smallest."""
        limits, even = [most] * len(self.costs), [1.0] * len(self.costs)
        return allocate(self.units, self.curves, self.costs, limits, weights=even, min_channels=self.least)

    @cached_property
    def sizes(self) -> Sizes:
        return self.cut(1.0)

    @cached_property
    def can_meet(self) -> bool:
        """Whether the smallest sizes meet the limits."""
        return max(add_up(self.costs, self.cut(0.0))) <= 1

    @cached_property
    def error(self) -> float:
        return self._add_errors(self.sizes)

    def _add_errors(self, sizes: Sizes) -> float:
        return sum(float(self.curves[g.name][sizes[g.name]]) for g in self.units)

    def list_losing(self) -> list[str]:
        """Those of the layers that are two which had better be one, by how much, the worst first."""
        fewer = self.cut(_LESS)
        saved = sum(add_up(self.costs, self.sizes)) - sum(add_up(self.costs, fewer))
        worth = (self._add_errors(fewer) - self.error) / saved if saved > _LEAST else float("inf")
        gains = {name: self._find_gain(name, worth) for name in self.split}
        return sorted((name for name in self.split if gains[name] < 0), key=lambda name: gains[name])

    def _find_gain(self, name: str, worth: float) -> float:
        """What a layer saves as two, at what a share of the limits is worth, without the error of its rank."""
        saved = sum(price.saved(name, self.sizes) for price in self.budget.prices)
        between = self.budget.between[name].name
        return worth * saved - float(self.curves[between][self.sizes[between]]) if saved > _LEAST else -float("inf")


def _set_price(
    split: ChannelGraph, tensors: Mapping[str, tuple[tuple[int, ...], float]], layers: Sequence[Layer], total: float
) -> _Price:
    """
    Args:
        tensors: shape and cost of those that cost anything.
    """
    halves = dict[str, tuple[tuple[int, ...], float]]()
    for layer in layers:
        outputs, inputs = count_sides(layer.module)
        shape, share = tensors.get(layer.weight_name, (tuple(layer.module.weight.shape), 0.0))
        full, entry = min(outputs, inputs), share / (outputs * inputs)
        halves[f"{layer.name}.reduce.weight"] = (full, *shape[1:]), entry * full * inputs
        halves[f"{layer.name}.expand.weight"] = (outputs, full), entry * full * outputs
    each, pairs = Cost.of_each(split, tensors), Cost.of_each(split, halves)
    nothing = Cost({g.name: g.size for g in split.groups}, ())
    rest = replace(nothing, constant=total - sum(cost({}) for cost in each.values()))
    whole = {layer.name: each.pop(layer.weight_name, nothing) for layer in layers}
    two = {n: join_costs(pairs[f"{n}.{half}.weight"] for half in ("reduce", "expand")) for n in whole}
    return _Price(whole, two, join_costs([*each.values(), rest]))


def _make_between(layer: Layer, index: int) -> ChannelGroup:
    """The channels between the two halves that a layer may have."""
    full = min(count_sides(layer.module))
    positions = np.arange(full)[:, None]
    members = (
        Member(f"{layer.name}.reduce.weight", 0, positions, frozenset([Role.PRODUCES])),
        Member(f"{layer.name}.expand.weight", 1, positions, frozenset([Role.CONSUMES])),
    )
    return ChannelGroup(name_rank_group(layer.name), full, members, family=-1 - index, linear=True)


def _pass_halves(group: ChannelGroup, layers: Iterable[str]) -> ChannelGroup:
    """With members in the halves of layers beside those in the layers themselves."""
    half_of = {f"{name}.weight": name for name in layers}
    more = [
        replace(m, tensor=f"{half_of[m.tensor]}.{'reduce' if m.dim else 'expand'}.weight")
        for m in group.members
        if m.tensor in half_of
    ]
    return replace(group, members=(*group.members, *more))


# ---- errors ---------------------------------------------------------------------------------------------------------


def draw_rank_curves(names: Iterable[str], sensitivity: Sensitivity) -> dict[str, Tensor]:
    r"""Predicted errors when a layer alone has rank r, (full + 1,) for r = 0..full, by the group between its halves.

    The best layer of rank r for inputs x is P P' W, with P the first r principal directions of its outputs W x (the SVD
    of W, whitened by the covariance of x). The shape of the curve is the share of the outputs' variance that these
    leave out, its height the error of the network's outputs with the layer's outputs so projected, measured at the
    largest rank that saves weights and at half of it, on images from which no direction was learnt.
    """
    layers, wanted = find_layers(sensitivity.reference, sensitivity.graph), set(names)
    found = _find_directions([layer for name, layer in layers.items() if name in wanted], sensitivity)
    return {name_rank_group(name): _draw(layers[name], seen, sensitivity) for name, seen in found.items()}


@dataclass(frozen=True, eq=False)
class _Directions:
    """What a layer gives: its mean (c,), principal directions (c, k), and the variances (k,) along these, falling."""

    mean: Tensor
    directions: Tensor
    variances: Tensor

    __repr__ = show_briefly

    @classmethod
    def of(cls, rows: Tensor) -> _Directions:
        """Args: rows: what it gave, (rows, c)."""
        mean = rows.mean(0)
        _, values, turned = torch.linalg.svd(rows - mean, full_matrices=False)
        return cls(mean, turned.T, values.double().square())

    def project(self, rows: Tensor, rank: int) -> Tensor:
        """Outputs (..., c) as a layer of this rank would give them at best."""
        mean, kept = self.mean.to(rows), self.directions[:, :rank].to(rows)
        return mean + (rows - mean) @ kept @ kept.T


def _draw(layer: Layer, seen: _Directions, sensitivity: Sensitivity) -> Tensor:
    sides, heights = count_sides(layer.module), dict[int, float]()
    parts = torch.cat([seen.variances, seen.variances.new_zeros(min(sides))])[: min(sides)]
    left = torch.cat([parts.sum()[None], parts.sum() - parts.cumsum(0)]).clamp(min=0)
    left[-1], largest = 0.0, find_largest_rank(*sides)
    for rank in {largest, max(1, largest // 2)}:
        heights[rank] = sensitivity.measure_once(
            (sensitivity.graph, layer.name, rank), lambda r=rank: _measure_projected(layer, seen, r, sensitivity)
        )
        heights[rank] **= sensitivity.trust
    return fit_curve(left / left[0].clamp(min=1e-300), heights)


def _measure_projected(layer: Layer, seen: _Directions, rank: int, sensitivity: Sensitivity) -> float:
    """The error of the network's outputs with the outputs of a layer as one of this rank would give them at best."""

    def project(_: str, x: Tensor, output: Tensor) -> Tensor:
        return seen.project(output.movedim(layer.channel_dim, -1), rank).movedim(-1, layer.channel_dim)

    with watch_calls({layer.name: layer.module}, project):
        return sensitivity.change


def _find_directions(layers: Sequence[Layer], sensitivity: Sensitivity) -> dict[str, _Directions]:
    """Of layers that run, from one pass."""
    rows, model = {layer.name: list[Tensor]() for layer in layers}, sensitivity.reference
    sampler, own = ShareSampler(_ROWS, 0), {layer.name: layer for layer in layers}
    for batch, share in read_input_batches(sensitivity.learnt_on, model).shared():
        call = double_first(batch)

        def called(
            name: str, x: Tensor, output: Tensor, share: Share = share, weights: RowWeights | None = call.weights
        ) -> None:
            counts = own[name].weigh_rows(output, weights)
            places, _ = sampler.draw(name, own[name].shape_places(output), share, counts)
            rows[name].append(own[name].take_outputs(output, places.to(output.device)))

        with preserve_state(model), watch_calls({n: layer.module for n, layer in own.items()}, called):
            cast_like(call, model).call(model)
    return {name: _Directions.of(torch.cat(found)) for name, found in rows.items() if found}


# ---- the same share of every layer ----------------------------------------------------------------------------------


def share_ranks(model: nn.Module, split: Mapping[str, int], share: float) -> dict[str, int]:
    """The rank with which each of these layers, two of full rank here, keeps about a share of its weights as one.

    Args:
        model: of the widths that it will have.
    """
    sides = {name: _count_sides(model, name) for name in split}
    return {n: max(1, min(split[n], *sides[n], int(share * math.prod(sides[n]) / sum(sides[n])))) for n in split}


def list_unsaving(model: nn.Module, split: Iterable[str]) -> list[str]:
    """Layers that are two here and have as many weights as if they were one, or more."""
    pairs = {name: pair for name in split if isinstance(pair := model.get_submodule(name), LowRank)}
    return [name for name, pair in pairs.items() if pair.rank > find_largest_rank(*_count_sides(model, name))]


def _count_sides(model: nn.Module, name: str) -> tuple[int, int]:
    """Outputs and inputs of a layer that is two."""
    return count_sides(model.get_submodule(f"{name}.expand"))[0], count_sides(model.get_submodule(f"{name}.reduce"))[1]
