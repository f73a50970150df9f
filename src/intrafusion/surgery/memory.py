"""What surgery on a network found out about its groups, for the next surgery on the same graph."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

from intrafusion.graph import ChannelGraph
from intrafusion.network.inputs import Inputs

_FINDINGS: WeakKeyDictionary[ChannelGraph, Findings] = WeakKeyDictionary()  # by identity; no part of the graph


@dataclass(eq=False)
class Findings:
    """What is known of one graph.

    Attributes:
        guilty: names of groups that had to be left alone at some sizes: tried first where a search needs suspects.
        left_alone: groups without which a network of certain sizes did not run or showed other groups, and why. That
            depends on the sizes and the kind of inputs alone, not on weights or maps.
    """

    guilty: set[str] = field(default_factory=set)
    left_alone: dict[Hashable, dict[str, str]] = field(default_factory=dict)

    def find_left_alone(self, sizes: Mapping[str, int], inputs: Inputs) -> dict[str, str]:
        return self.left_alone.get(_make_key(sizes, inputs), {})

    def keep(self, sizes: Mapping[str, int], inputs: Inputs, reasons: dict[str, str]) -> dict[str, str]:
        if reasons:
            self.left_alone[_make_key(sizes, inputs)] = reasons
        return reasons


def _make_key(sizes: Mapping[str, int], inputs: Inputs) -> Hashable:
    return frozenset(sizes.items()), str(inputs)


def recall(graph: ChannelGraph) -> Findings:
    """What was found out about this graph so far; to be added to."""
    return _FINDINGS.setdefault(graph, Findings())


def hand_on(graph: ChannelGraph, smaller: ChannelGraph) -> None:
    """What was at fault in a network is suspected in the smaller one that was made from it."""
    recall(smaller).guilty |= recall(graph).guilty & {g.name for g in smaller.groups}
