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
from intrafusion.surgery.expect import find_confusion, find_disagreement, find_siblings, shrink_graph
from intrafusion.surgery.maps import reduce_weights
from intrafusion.surgery.search import find_largest_passing
from intrafusion.surgery.write import Repair, write_weights_
from intrafusion.trace import trace

_ROUNDING = 2.0**-52  # of float64


_ROUNDINGS = 100  # that add up


_CEILING = 1e-3  # a larger difference is none of rounding


Maps = dict[str, ReductionMap]


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


def copy_reduced(model: nn.Module, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> nn.Module:
    """A copy after the maps, as it comes: neither run nor traced."""
    small = copy_model(model)
    write_weights_(small, reduce_weights({n: t.detach() for n, t in named_tensors(model).items()}, graph, maps))
    return small


@dataclass(frozen=True, eq=False)
class Surgery:
    """The smaller network, what had to follow, and the groups that had to be left alone with the reason.

    maps: as they were carried out, for every group that is reduced.
    """

    model: nn.Module
    repairs: tuple[Repair, ...]
    rolled_back: dict[str, str]
    maps: Maps

    __repr__ = show_briefly


class Prove(Protocol):
    """A further check of the smaller network, on which groups may be left alone too; see `proof.FunctionCheck`.

    revision: how often it has found that the maps of a group must be scaled.
    """

    revision: int

    def settled(self, maps: Maps) -> Maps:
        """The same maps, scaled as was found so far."""
        ...

    def __call__(self, maps: Maps, found: ChannelGraph) -> str | None:
        """Why the network that these maps make, in which `found` was traced, is wrong; None if it is right."""
        ...


def operate(model: nn.Module, graph: ChannelGraph, maps: Maps, inputs: Inputs, prove: Prove | None = None) -> Surgery:
    """Reduce a copy of the network; groups after which it does not run, or shows other groups, are rolled back.

    Args:
        prove: what must hold of it besides.
    """
    weights = {n: t.detach() for n, t in named_tensors(model).items()}

    attempts: dict[frozenset[str], tuple[nn.Module, tuple[Repair, ...]]] = {}

    def settled(groups: Sequence[ChannelGroup]) -> Maps:
        chosen = {g.name: maps[g.name] for g in groups}
        return chosen if prove is None else prove.settled(chosen)

    def attempt(groups: Sequence[ChannelGroup]) -> nn.Module:
        chosen = settled(groups)
        small = copy_model(model)
        repairs = write_weights_(small, reduce_weights(weights, graph, chosen))
        attempts.clear()
        attempts[frozenset(chosen)] = small, repairs
        return small

    def failure(groups: Sequence[ChannelGroup]) -> str | None:
        try:
            found = trace(attempt(groups), inputs, calls=graph.calls)
        except Exception as error:  # anything that goes wrong is a reason to leave these groups alone
            return f"the smaller network does not run ({_shorten_error(error)})"
        expected = shrink_graph(graph, {g.name: len(maps[g.name].merge) for g in groups})
        why = find_disagreement(expected, found) or find_confusion(expected, found, find_siblings(graph))
        if why is None and prove is not None:
            revision = prove.revision
            why = prove(settled(groups), found)
            if prove.revision > revision:
                attempts.clear()  # they were written without the scale that was found
        return why

    groups = [g for g in graph.groups if g.name in maps]
    like = lambda g, why: f"like {g.name}: {why}"  # noqa: E731
    passed, failed = find_largest_passing(families_of(groups), failure, like, coupled=True)
    names = frozenset(g.name for g in passed)
    if names not in attempts:
        attempt(passed)
    small, repairs = attempts[names]
    return Surgery(small, repairs, {g.name: why for g, why in failed}, settled(passed))


def _shorten_error(error: Exception) -> str:
    cause = error.__cause__
    text = f"{type(cause).__name__}: {cause}" if cause else str(error)
    return " ".join(text.split())[:200]
