"""Per-channel parameters of which one entry serves several channels: what such an entry means is decided at the end.

The scale of a norm over 4 heads of 8 has 8 entries that 4 channels share each, or 4 that 8 share: only once all blocks
are known can one tell whether an entry belongs to a block, runs across blocks, or makes one channel of those it serves.
"""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

import numpy as np

from intrafusion.graph import Role, Slice
from intrafusion.trace.arrays import is_increasing
from intrafusion.trace.relations import Plane, Relations
from intrafusion.trace.units import list_memberships

_Records = list[tuple[Role, np.ndarray, np.ndarray]]


class BlockEntry(NamedTuple):
    """One value that serves a whole block, such as the scale of a head."""

    tensor: str
    dim: int
    position: int
    role: Role


def settle_shared(relations: Relations) -> dict[int, list[BlockEntry]]:
    """Decide what a per-channel entry that serves several channels means: tie them, or set them apart.

    Returns parameters with one value per block (a scale per head), by block label.
    """
    found: dict[int, list[BlockEntry]] = defaultdict(list)
    for (tensor, dim), records in list(relations.shared.items()):
        if not _settle_by_blocks(relations, tensor, dim, records, found):
            _use_by_channels(relations, tensor, dim, records)
    return found


def _settle_by_blocks(
    relations: Relations, tensor: str, dim: int, records: _Records, found: dict[int, list[BlockEntry]]
) -> bool:
    """Whether the entries belong to blocks, or run across them, and are settled with that."""
    if (tensor, dim, None) in relations.tables:  # a linear map says which index is which channel
        return False
    if not any(_serves_several(p, relations.roots(c)) for _, p, c in records):
        return False
    positions = np.concatenate([p for _, p, _ in records])
    labels = relations.roots(np.concatenate([c for _, _, c in records]))
    served, membership = _list_served(positions, labels), _list_memberships(relations, labels)
    owners = _find_owners(served, membership)
    if owners is not None:
        for position, block in owners.items():
            found[block].append(BlockEntry(tensor, dim, position, records[0][0]))
        return True
    if _settle_by_plane(relations, tensor, dim, len(records)):
        return True
    if not _runs_across_blocks(relations, served, membership) and not _are_gates(served):
        return False
    # One entry for the k-th channel of every head, or for a whole branch of channels that meet others elsewhere: it
    # cannot follow one channel, so it only sets channels apart.
    relations.colour(labels, positions)
    relations.note(labels, f"one entry of {tensor} serves several channels")
    return True


def _settle_by_plane(relations: Relations, tensor: str, dim: int, records: int) -> bool:
    """Whether every entry is one channel's own in its row along another dimension, and is settled with that.

    Along rows it then follows its channel: rows are like the slices of a grouped convolution, one a head, and must be
    of one layer's channels, as only twins stay equally long. Which row it is tells channels apart.
    """
    planes = relations.planes[tensor, dim]
    if len(planes) < records or not all(_is_one_to_one(relations, plane) for plane in planes):
        return False
    for plane in planes:
        if plane.across > dim:
            relations.colour(plane.labels, plane.positions)
        elif not _is_of_one_layer(relations, plane):
            return False
    for role, across, rows, positions, labels in planes if planes[0].across < dim else ():
        for row in np.unique(rows).tolist():
            own, key = rows == row, (tensor, dim, Slice(across, row, row + 1))
            relations.use(key, int(positions.max()) + 1, role, positions[own], labels[own])
    return True


def _is_one_to_one(relations: Relations, plane: Plane) -> bool:
    channels = relations.roots(plane.labels)
    entries = np.stack([plane.rows, plane.positions, channels])
    count = len(np.unique(entries, axis=1).T)
    return count == len(np.unique(entries[:2], axis=1).T) == len(np.unique(channels))


def _is_of_one_layer(relations: Relations, plane: Plane) -> bool:
    """Whether what the rows serve was made at once."""
    makers = relations.makers(plane.labels)
    return len({frozenset(makers[plane.rows == row].tolist()) for row in np.unique(plane.rows)}) == 1


def _use_by_channels(relations: Relations, tensor: str, dim: int, records: _Records) -> None:
    """One entry is one channel: all that it serves move together."""
    table = relations.tables.get((tensor, dim, None))
    size = max(int(p.max()) for _, p, _ in records) + 1 if table is None else len(table)
    relations.where = f"one entry of {tensor} serves them all"
    for role, positions, labels in records:
        relations.use((tensor, dim, None), size, role, positions, labels)


def _serves_several(positions: np.ndarray, labels: np.ndarray) -> bool:
    if is_increasing(positions):
        return False
    pairs = np.unique(np.stack([positions, labels]), axis=1)
    return len(np.unique(pairs[0])) < pairs.shape[1]


def _list_served(positions: np.ndarray, labels: np.ndarray) -> dict[int, set[int]]:
    """The channels that each entry serves."""
    served: dict[int, set[int]] = defaultdict(set)
    for position, label in zip(positions.tolist(), labels.tolist(), strict=True):
        served[position].add(label)
    return served


def _list_memberships(relations: Relations, channels: np.ndarray) -> dict[int, set[int]]:
    """Which blocks these are in, by representatives; a gate is like a block for the channels that it meets."""
    membership = list_memberships(relations, channels)
    for met in relations.gates:
        for member, gate in zip(
            relations.roots(met.members).tolist(), relations.roots(met.gates).tolist(), strict=True
        ):
            membership[member].add(gate)
    return membership


def _find_owners(served: dict[int, set[int]], membership: dict[int, set[int]]) -> dict[int, int] | None:
    """The block that each entry serves, if every entry serves exactly one of its own."""
    common = {p: set.intersection(*(membership[x] for x in labels)) for p, labels in served.items()}
    owners = {p: min(c) for p, c in common.items() if c}
    several = len(served) > 1 and len(owners) == len(served)
    return owners if several and len(set(owners.values())) == len(owners) else None


def _are_gates(served: dict[int, set[int]]) -> bool:
    """Whether all entries serve the same several channels, as the weights of branches that are summed do."""
    each = list(served.values())
    return len(each) > 1 and len(each[0]) > 1 and all(channels == each[0] for channels in each)


def _runs_across_blocks(relations: Relations, served: dict[int, set[int]], membership: dict[int, set[int]]) -> bool:
    """Whether an entry serves channels of different blocks, or blocks themselves."""
    several = [labels for labels in served.values() if len(labels) > 1]
    apart = any(len({frozenset(membership[x]) for x in labels}) > 1 for labels in several)
    return apart or any(relations.is_block[x] for labels in several for x in labels)
