"""What moves as one: blocks that turn out to be one channel each, and gates that meet one channel or many.

While the network runs, one cannot tell what follows: pieces of a maxout are a block that the next layer reads as one
channel, and the two branches of a selective kernel, which a softmax saw together, are added in the end. Here, once all
is seen, such blocks become channels, and what one channel for many others means is decided.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from intrafusion.graph import Role
from intrafusion.trace.labels import FIRST
from intrafusion.trace.relations import Cause, Gates, Relations

_SUMS = {Cause.REDUCTION, Cause.PRODUCT}


def settle_units(relations: Relations) -> None:
    """Unite what is one channel after all, until nothing changes; the gates that are left meet several channels."""
    while _dissolve_blocks(relations) or _unite_pieces(relations) or _settle_gates(relations):
        pass


# ---- blocks of one channel ------------------------------------------------------------------------------------------


def _dissolve_blocks(relations: Relations) -> bool:
    """A block of nothing but one channel, at several places, is that channel."""
    if not relations.block_members:
        return False
    tied, whole = _list_tied(relations), []
    for labels, block, call in relations.block_members:
        roots = np.unique(relations.roots(labels))
        if len(roots) > 1 or roots[0] < FIRST or relations.is_block[roots[0]] or block in tied:
            whole.append((labels, block, call))
            continue
        relations.is_block[block] = False
        relations.join(roots, np.array([block]))
        relations.dissolved.append((labels, block, call))
    changed = len(whole) < len(relations.block_members)
    relations.block_members = whole
    if changed:
        _gate_by_dissolved(relations)
    return changed


def _list_tied(relations: Relations) -> set[int]:
    """Blocks that move together with others, as copies do."""
    return set(np.concatenate([side for tie in relations.ties for side in tie]).tolist()) if relations.ties else set()


def _gate_by_dissolved(relations: Relations) -> None:
    """What met a block that is a channel now met a channel, for others to meet too."""
    met = [m for m in relations.meetings if not relations.is_block[m[1]]]
    relations.meetings = [m for m in relations.meetings if relations.is_block[m[1]]]
    for labels, block, call in met:
        where = relations.causes[block][1] if block in relations.causes else ""
        relations.gates.append(Gates(labels, np.full(len(labels), block), call, where))


def _unite_pieces(relations: Relations) -> bool:
    """Sums and maxima of as many channels each, of which every one is read as a channel: those make one channel each.

    Not where something reads the pieces too: those are channels of their own, which may be reduced in each sum.
    """
    changed = False
    for blocks in _list_sums(relations).values():
        pieces = [np.unique(relations.roots(labels)) for labels, _ in blocks]
        size = len(pieces[0])
        together = np.concatenate(pieces)
        if min(size, len(pieces)) < 2 or {len(p) for p in pieces} != {size} or len(np.unique(together)) < len(together):
            continue
        if together.min() < FIRST or relations.is_block[together].any() or _are_read(relations, together):
            continue
        relations.where = relations.causes[blocks[0][1]][1]
        for piece in pieces:
            relations.join(piece[:-1], piece[1:])
        changed = True
    return changed


def _list_sums(relations: Relations) -> dict[int, list[tuple[np.ndarray, int]]]:
    """The blocks of each reduction of which every result is read as one channel, and as nothing else.

    What only meets a channel counts as read unless it is a sum of products: scores meet the bias of their head.
    """
    found: dict[int, list[tuple[np.ndarray, int]]] = defaultdict(list)
    for labels, block, call in relations.block_members:
        if relations.causes[block][0] in _SUMS:
            found[call].append((labels, block))
    if not found:
        return {}
    consumed = set(_list_consumed(relations).tolist())
    barred = _list_tied(relations) | {x for labels, _ in relations.blocked for x in labels.tolist()}
    labels, blocks = _flatten(relations.meetings)
    _, distinct = np.unique(np.stack([relations.roots(labels), blocks]), axis=1)
    met = Counter(distinct.tolist())
    is_sum = lambda b: relations.causes[b][0] is Cause.REDUCTION  # noqa: E731
    is_read = lambda b: b not in barred and met[b] <= 1 and (b in consumed or (met[b] == 1 and is_sum(b)))  # noqa: E731
    return {call: blocks for call, blocks in found.items() if all(is_read(b) for _, b in blocks)}


def _list_consumed(relations: Relations) -> np.ndarray:
    """Labels that a weight reads along a dimension."""
    read = [found for uses in relations.uses.values() for role, _, found in uses if role is Role.CONSUMES]
    return np.unique(np.concatenate([np.zeros(0, np.int64), *read]))


def _are_read(relations: Relations, channels: np.ndarray) -> bool:
    """Whether weights read some of these channels."""
    return bool(np.isin(channels, relations.roots(_list_consumed(relations))).any())


# ---- gates ----------------------------------------------------------------------------------------------------------


def _settle_gates(relations: Relations) -> bool:
    """Unite gates with the one channel that they meet, or with the one that each meets in every block."""
    if not relations.gates:
        return False
    membership = list_memberships(relations, relations.roots(np.concatenate([met.members for met in relations.gates])))
    changed, left = False, []
    by_call: dict[int, list[Gates]] = defaultdict(list)
    for met in relations.gates:
        by_call[met.call].append(met)
    for found in by_call.values():
        changed |= _unite_pairs(relations, found)
        served = _list_served(relations, found)
        if served and _are_channels(membership, served):
            for met in found:
                relations.where = met.where
                relations.join(met.members, met.gates)
        elif served:
            left += found
            continue
        changed = True
    relations.gates = left
    return changed


def _unite_pairs(relations: Relations, found: list[Gates]) -> bool:
    """Unite a gate with the channel that it meets, where that is only one; whether there was such a gate."""
    alone = [(gate, *members) for gate, members in _list_served(relations, found).items() if len(members) == 1]
    relations.where = found[0].where
    for gate, member in alone:
        relations.join(np.array([gate]), np.array([member]))
    return bool(alone)


def _list_served(relations: Relations, found: list[Gates]) -> dict[int, set[int]]:
    """The channels that each gate meets."""
    served: dict[int, set[int]] = defaultdict(set)
    for met in found:
        for gate, member in zip(*map(np.ndarray.tolist, map(relations.roots, (met.gates, met.members))), strict=True):
            served[gate].add(member)
    return {gate: members for gate, members in served.items() if members != {gate}}


def _are_channels(membership: dict[int, set[int]], served: dict[int, set[int]]) -> bool:
    """Whether a gate and what it meets make one channel, as a key's does with those of the queries of several heads."""
    apart = [[frozenset(membership.get(x, ())) for x in members] for members in served.values()]
    return all(len(set(sets)) == len(sets) for sets in apart)


def list_memberships(relations: Relations, channels: np.ndarray) -> dict[int, set[int]]:
    """Which blocks each of these channels (representatives) is in or meets."""
    labels, blocks = _flatten([*relations.block_members, *relations.meetings])
    pairs = np.stack([relations.roots(labels), relations.roots(blocks)])
    found: dict[int, set[int]] = defaultdict(set)
    for label, block in np.unique(pairs[:, np.isin(pairs[0], channels)], axis=1).T.tolist():
        found[label].add(block)
    return found


def _flatten(found: Sequence[tuple[np.ndarray, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    """The labels of all blocks in a row, and the block of each."""
    none = np.zeros(0, np.int64)
    sizes = [len(labels) for labels, *_ in found]
    return np.concatenate([none, *(labels for labels, *_ in found)]), np.repeat([b for _, b, _ in found], sizes).astype(
        np.int64
    )
