"""Rows for what is in no group: channels tied to fixed data, and weights that only unknown operations read."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import numpy as np

from intrafusion.graph import ChannelGroup, Member, Role
from intrafusion.trace.labels import FIRST, FIXED
from intrafusion.trace.relations import Key, Relations


def find_rows_left_over(
    relations: Relations, shapes: Mapping[str, tuple[int, ...]], groups: Iterable[ChannelGroup]
) -> list[ChannelGroup]:
    """Groups that cannot be reduced, so that every channel dimension of every weight is in the table."""
    groups = list(groups)
    first = 1 + max((g.family for g in groups), default=0)
    tied = _find_tied_rows(relations)
    known = {m.tensor for g in groups for m in g.members} | {m.tensor for members, _ in tied for m in members}
    rows = [*tied, *_find_pinned_rows(relations, shapes, known)]
    return [
        ChannelGroup("", len(members[0].positions), members, reason, family=first + k)
        for k, (members, reason) in enumerate(rows)
    ]


_Row = tuple[tuple[Member, ...], str]


def _find_tied_rows(relations: Relations) -> list[_Row]:
    """Channels that became one with fixed data; those that were the same before that are one row."""
    together: dict[bytes, list[Member]] = defaultdict(list)
    labels_of: dict[bytes, np.ndarray] = {}
    for key in relations.uses:
        positions, labels, roles = _list_tied(relations, key)
        if not len(labels):
            continue
        distinct, counts = np.unique(labels, return_counts=True)
        even = bool((counts == counts[0]).all())
        order = np.lexsort((positions, labels)) if even else np.arange(len(positions))
        laid = positions[order].reshape(len(distinct) if even else -1, counts[0] if even else 1)
        name = distinct.tobytes() + (b"" if even else repr(key).encode())
        together[name].append(Member(key[0], key[1], laid, roles, key[2]))
        labels_of[name] = distinct
    return [(tuple(members), _explain_tie(relations, labels_of[name])) for name, members in together.items()]


def _list_tied(relations: Relations, key: Key) -> tuple[np.ndarray, np.ndarray, frozenset[Role]]:
    """Indices of one dimension whose channel was named once and is fixed now, each with that name."""
    records = relations.uses[key]
    positions = np.concatenate([p for _, p, _ in records])
    labels = np.concatenate([c for _, _, c in records])
    keep = (labels >= FIRST) & (relations.roots(labels) == FIXED)
    if not keep.any():
        return positions[keep], labels[keep], frozenset()
    positions, index = np.unique(positions[keep], return_index=True)
    return positions, labels[keep][index], frozenset(role for role, *_ in records)


def _explain_tie(relations: Relations, labels: np.ndarray) -> str:
    where = next((where for met, where in relations.tied if np.isin(met, labels).any()), "")
    return "tied to the input of the network or to fixed data" + (f": {where}" if where else "")


def _find_pinned_rows(relations: Relations, shapes: Mapping[str, tuple[int, ...]], known: set[str]) -> list[_Row]:
    """Rows and columns of weights that are in no group at all, because no rule understood what reads them."""
    return [
        ((Member(tensor, dim, np.arange(shapes[tensor][dim])[:, None], frozenset()),), reason)
        for (tensor, dim), reason in relations.pins.items()
        if tensor not in known and dim < 2 <= len(shapes[tensor]) and shapes[tensor][dim] > 1
    ]
