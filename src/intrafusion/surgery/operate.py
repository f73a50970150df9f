"""Surgery on a copy of the network, run and traced again; what it does not bear out is left alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from intrafusion.brief import show_briefly
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of
from intrafusion.network.double import TOLERANCE, output_difference
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.surgery.blame import explain_crash
from intrafusion.surgery.expect import find_confusion, find_disagreement, find_siblings, shrink_graph
from intrafusion.surgery.literals import Failure, Literals
from intrafusion.surgery.maps import reduce_weights
from intrafusion.surgery.numbers import explain_state
from intrafusion.surgery.search import find_largest_passing
from intrafusion.surgery.write import Repair, make_repairs_, write_weights_
from intrafusion.trace import trace

_ROUNDING = 2.0**-52  # of float64


_ROUNDINGS = 100  # that add up


_CEILING = 1e-3  # a larger difference is none of rounding


Maps = dict[str, ReductionMap]


RepairsOf = Callable[[Maps], tuple[Repair, ...] | None]
"""Numbers in attributes that must follow in the network that these maps make; None: there are none that make it run."""


def tolerance_of(
    double: nn.Module,
    outputs: Callable[[nn.Module], list[Tensor]],
    expected: list[Tensor],
    least: float = TOLERANCE,
) -> float:
    """How far two float64 computations of one output may differ: `least`, or more.

    A network that amplifies rounding shows it in what a change of every weight by about one rounding does; sums are
    rounded many times.
    """
    weights = {n: p.detach() for n, p in double.named_parameters() if p.dtype == torch.float64}
    generator = torch.Generator().manual_seed(0)
    noise = lambda w: (2 * torch.rand(w.shape, generator=generator, dtype=torch.float64) - 1).to(w.device)  # noqa: E731
    write_weights_(double, {n: w * (1 + _ROUNDING * noise(w)) for n, w in weights.items()})
    changed = output_difference(outputs(double), expected)
    write_weights_(double, weights)
    return min(max(least, _ROUNDINGS * changed), _CEILING)


def copy_reduced(
    model: nn.Module, graph: ChannelGraph, maps: Mapping[str, ReductionMap], literals: Literals | None = None
) -> nn.Module:
    """A copy after the maps, as it comes: not traced, and run only where numbers in attributes may have to follow.

    Args:
        literals: which had to follow in other smaller networks of this one, see `Surgery`.
    """
    small = copy_model(model)
    write_weights_(small, reduce_weights({n: t.detach() for n, t in named_tensors(model).items()}, graph, maps))
    if literals is not None:
        literals.fit_(small, {name: len(reduction.merge) for name, reduction in maps.items()})
    return small


@dataclass(frozen=True, eq=False)
class Surgery:
    """The smaller network, what had to follow, and the groups that had to be left alone with the reason.

    maps: as they were carried out, for every group that is reduced.
    literals: which numbers in attributes had to follow.
    """

    model: nn.Module
    repairs: tuple[Repair, ...]
    rolled_back: dict[str, str]
    maps: Maps
    literals: Literals

    __repr__ = show_briefly


class Prove(Protocol):
    """A further check of the smaller network, on which groups may be left alone too; see `proof.FunctionCheck`.

    revision: how often it has found that the maps of a group must be scaled.
    """

    revision: int

    def settled(self, maps: Maps) -> Maps:
        """The same maps, scaled as was found so far."""
        ...

    def __call__(self, maps: Maps, found: ChannelGraph, repairs_of: RepairsOf = ...) -> str | None:
        """Why the network that these maps make, in which `found` was traced, is wrong; None if it is right.

        Args:
            repairs_of: numbers in attributes that must follow in the network that some of these maps make.
        """
        ...


def operate(model: nn.Module, graph: ChannelGraph, maps: Maps, inputs: Inputs, prove: Prove | None = None) -> Surgery:
    """Reduce a copy of the network; groups after which it does not run, or shows other groups, are rolled back.

    Numbers in attributes that are sizes follow where the network does not bear it out without, see `literals`.

    Args:
        prove: what must hold of it besides.
    """
    attempts = _Attempts(model, graph, maps, inputs, prove)
    groups = [g for g in graph.groups if g.name in maps]
    like = lambda g, why: f"like {g.name}: {why}"  # noqa: E731
    passed, failed = find_largest_passing(families_of(groups), attempts.failure, like, coupled=True)
    small, repairs = attempts.network(passed)
    return Surgery(small, repairs, {g.name: why for g, why in failed}, attempts.settled(passed), attempts.literals)


@dataclass(eq=False)
class _Attempts:
    """Smaller networks of one original, each made by the maps of some groups."""

    model: nn.Module
    graph: ChannelGraph
    maps: Maps
    inputs: Inputs
    prove: Prove | None

    def __post_init__(self) -> None:
        self.weights = {n: t.detach() for n, t in named_tensors(self.model).items()}
        self.literals = Literals(self.model, self.graph, self.inputs)
        self.numbers: dict[frozenset[str], tuple[Repair, ...]] = {}  # that had to follow, by the names of the groups
        self.parts: dict[frozenset[str], tuple[Repair, ...] | None] = {}  # the same where only some are to be compared
        self.last: tuple[frozenset[str], nn.Module, tuple[Repair, ...]] | None = None

    def settled(self, groups: Sequence[ChannelGroup]) -> Maps:
        chosen = {g.name: self.maps[g.name] for g in groups}
        return chosen if self.prove is None else self.prove.settled(chosen)

    def network(self, groups: Sequence[ChannelGroup]) -> tuple[nn.Module, tuple[Repair, ...]]:
        """The smaller network with all that had to follow; the last one that was tried, where it is that."""
        names = frozenset(g.name for g in groups)
        if self.last is None or self.last[0] != names:
            self.build(groups)
        assert self.last is not None
        _, small, repairs = self.last
        numbers = self.numbers.get(names, ())
        make_repairs_(small, numbers)
        return small, (*repairs, *numbers)

    def build(self, groups: Sequence[ChannelGroup]) -> nn.Module:
        chosen = self.settled(groups)
        small = copy_model(self.model)
        repairs = write_weights_(small, reduce_weights(self.weights, self.graph, chosen))
        self.last = frozenset(chosen), small, repairs
        return small

    def failure(self, groups: Sequence[ChannelGroup]) -> str | None:
        """Why these groups cannot be reduced together; None if they can."""
        names, sizes = frozenset(g.name for g in groups), {g.name: len(self.maps[g.name].merge) for g in groups}
        small = self.build(groups)
        why = self.check(groups, small, ())
        if why is None:
            return None
        found = self.literals.search(small, sizes, why, lambda net, numbers: self.check(groups, net, numbers))
        if found is None:
            return why.why
        self.numbers[names] = self.literals.repairs(found)
        return None

    def check(self, groups: Sequence[ChannelGroup], small: nn.Module, numbers: tuple[Repair, ...]) -> Failure | None:
        """What is wrong with a smaller network that has these numbers; None if nothing is."""
        sizes = {g.name: len(self.maps[g.name].merge) for g in groups}
        try:
            found = trace(small, self.inputs, calls=self.graph.calls)
        except Exception as error:  # anything that goes wrong is a reason to leave these groups alone
            old = self.literals.find_old_sizes(small, sizes)
            why = explain_crash(error, old) + explain_state(self.model, old)
            return Failure.of(f"the smaller network does not run ({why})", error, small)
        expected = shrink_graph(self.graph, sizes)
        why = find_disagreement(expected, found) or find_confusion(expected, found, find_siblings(self.graph))
        if why is None and self.prove is not None:
            revision, chosen = self.prove.revision, self.settled(groups)
            wrong = self.prove(chosen, found, lambda maps: self.repairs_of(maps, frozenset(chosen), numbers))
            if self.prove.revision > revision:
                self.last = None  # it was written without the scale that was found
            return None if wrong is None else Failure(wrong, final=True)
        return None if why is None else Failure(why)

    def repairs_of(self, maps: Maps, names: frozenset[str], numbers: tuple[Repair, ...]) -> tuple[Repair, ...] | None:
        """The numbers that must follow where only these maps are carried out, of those that do where all are."""
        part = frozenset(maps)
        if part == names or not numbers:
            return numbers
        if part not in self.parts:
            small = copy_reduced(self.model, self.graph, maps)
            whole = {(r.module, r.attribute): int(r.new) for r in numbers if not isinstance(r.new, tuple)}
            found = self.literals.search_part(small, {n: len(m.merge) for n, m in maps.items()}, whole)
            self.parts[part] = None if found is None else self.literals.repairs(found)
        return self.parts[part]
