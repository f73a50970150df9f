"""What is in no group, so that all of a network is accounted for: inputs of the network, layers of one channel."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from intrafusion.graph import ChannelGraph, FixedSide, Role
from intrafusion.trace.labels import FIXED
from intrafusion.trace.ledger import Ledger

_UNUSED = "not used on the example input"
_INPUT = "read from the input of the network, or from fixed data"
_ONE = "one channel only"
_TOGETHER = "reads what several channels make together"
_NONE = "no channels run along it"
_NOWHERE = np.zeros(0, np.int64)


def find_fixed_sides(ledger: Ledger, graph: ChannelGraph) -> tuple[FixedSide, ...]:
    """Of the sides of every weight (rows and columns), and of every vector, what no group has a place in."""
    places = _list_places(graph)
    return tuple(
        FixedSide(tensor, dim, left, _explain(ledger, tensor, dim, size))
        for tensor, shape in graph.shapes.items()
        for dim, size in enumerate(shape[:2])
        if not (dim == size == 1 and _is_depthwise(ledger, tensor))
        if (left := size - len(np.unique(np.concatenate([_NOWHERE, *places[tensor, dim]])))) > 0
    )


def _is_depthwise(ledger: Ledger, tensor: str) -> bool:
    """Whether each kernel follows a channel of its own, so that its one column is no side of its own."""
    return any(role is Role.SCALES for role, *_ in ledger.relations.shared.get((tensor, 0), ()))


def _list_places(graph: ChannelGraph) -> dict[tuple[str, int], list[np.ndarray]]:
    """The indices along each dimension that are in a group, member by member."""
    places: dict[tuple[str, int], list[np.ndarray]] = defaultdict(list)
    for group in graph.groups:
        for member in group.members:
            places[member.tensor, member.dim].append(member.positions.ravel())
    return places


def _explain(ledger: Ledger, tensor: str, dim: int, size: int) -> str:
    relations = ledger.relations
    if tensor not in ledger.reached:
        return _UNUSED
    if (tensor, dim) in relations.pins:
        return relations.pins[tensor, dim]
    if size == 1:
        return _ONE
    records = [*relations.shared.get((tensor, dim), ())]
    records += [record for key in relations.uses if key[:2] == (tensor, dim) for record in relations.uses[key]]
    labels = np.concatenate([_NOWHERE, *(labels for *_, labels in records)])
    if relations.is_block[labels].any():
        return _TOGETHER
    return _INPUT if (relations.roots(labels) == FIXED).any() else _NONE
