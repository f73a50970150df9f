"""Surgery on a copy of the network, run and traced again; what it does not bear out is left alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from intrafusion.graph import ChannelGraph, ChannelGroup, families_of
from intrafusion.network.inputs import Inputs
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.reduce.problem import ReductionMap
from intrafusion.surgery.expect import find_confusion, find_disagreement, find_siblings, shrink_graph
from intrafusion.surgery.maps import reduce_weights
from intrafusion.surgery.search import find_largest_passing
from intrafusion.surgery.write import Repair, write_weights_
from intrafusion.trace import trace

Maps = dict[str, ReductionMap]


def copy_reduced(model: nn.Module, graph: ChannelGraph, maps: Mapping[str, ReductionMap]) -> nn.Module:
    """A copy after the maps, as it comes: neither run nor traced."""
    small = copy_model(model)
    write_weights_(small, reduce_weights({n: t.detach() for n, t in named_tensors(model).items()}, graph, maps))
    return small


@dataclass(frozen=True, eq=False)
class Surgery:
    """The smaller network, what had to follow, and the groups that had to be left alone with the reason."""

    model: nn.Module
    repairs: tuple[Repair, ...]
    rolled_back: dict[str, str]


def operate(model: nn.Module, graph: ChannelGraph, maps: Maps, inputs: Inputs) -> Surgery:
    """Reduce a copy of the network; groups after which it does not run, or shows other groups, are rolled back."""
    weights = {n: t.detach() for n, t in named_tensors(model).items()}

    attempts: dict[frozenset[str], tuple[nn.Module, tuple[Repair, ...]]] = {}

    def attempt(groups: Sequence[ChannelGroup]) -> nn.Module:
        chosen = {g.name: maps[g.name] for g in groups}
        small = copy_model(model)
        repairs = write_weights_(small, reduce_weights(weights, graph, chosen))
        attempts.clear()
        attempts[frozenset(chosen)] = small, repairs
        return small

    def failure(groups: Sequence[ChannelGroup]) -> str | None:
        try:
            found = trace(attempt(groups), inputs)
        except Exception as error:  # anything that goes wrong is a reason to leave these groups alone
            return f"the smaller network does not run ({_shorten_error(error)})"
        expected = shrink_graph(graph, {g.name: len(maps[g.name].merge) for g in groups})
        return find_disagreement(expected, found) or find_confusion(expected, found, find_siblings(graph))

    groups = [g for g in graph.groups if g.name in maps]
    like = lambda g, why: f"like {g.name}: {why}"  # noqa: E731
    passed, failed = find_largest_passing(families_of(groups), failure, like, coupled=True)
    names = frozenset(g.name for g in passed)
    if names not in attempts:
        attempt(passed)
    small, repairs = attempts[names]
    return Surgery(small, repairs, {g.name: why for g, why in failed})


def _shorten_error(error: Exception) -> str:
    cause = error.__cause__
    text = f"{type(cause).__name__}: {cause}" if cause else str(error)
    return " ".join(text.split())[:200]
