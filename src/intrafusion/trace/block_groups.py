"""Groups whose unit is a whole block: heads, groups of a convolution."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from intrafusion.graph import ChannelGroup, Member
from intrafusion.trace.arrays import split_runs
from intrafusion.trace.blocks import Blocks
from intrafusion.trace.channels import ChannelTable
from intrafusion.trace.shared import BlockEntry
from intrafusion.trace.uses import Use, decode_roles


class _Twin(NamedTuple):
    """One block: its channels, in an order that corresponds to that of its twins, and the values that serve it all."""

    labels: np.ndarray
    entries: list[BlockEntry]


def find_block_groups(blocks: Blocks, entries: dict[int, list[BlockEntry]]) -> list[ChannelGroup]:
    """Blocks that the network treats alike, channel by channel, are one group of interchangeable blocks."""
    by_unit = _entries_by_unit(blocks, entries)
    twins: dict[object, list[_Twin]] = defaultdict(list)
    for unit, labels in _list_units(blocks):
        if unit not in blocks.barred and not blocks.table.reasons.index[labels].any():
            found = _Twin(labels, sorted(by_unit.get(unit, [])))
            twins[_profile(blocks, unit, found)].append(found)
    groups = [_make_block_group(blocks, units) for units in twins.values() if len(units) > 1]
    return [group for group in groups if group.producers or not group.consumers]  # else its sources are unknown


def _list_units(blocks: Blocks) -> list[tuple[int, np.ndarray]]:
    """The used channels of each unit, sorted by what the network does with them, so that twins correspond."""
    table = blocks.table
    members = np.flatnonzero(table.used & (blocks.joined.parent[: len(table.used)] >= 0))
    members = members[np.isin(members, blocks.inside)]
    home = blocks.joined.find(members)
    keys = (table.first, *(sums[:, 0] for sums in (table.arranged, table.colour, table.family)))
    order = np.lexsort((*(key[members] for key in keys), home))
    return list(split_runs(home[order], members[order]))


def _profile(blocks: Blocks, unit: int, found: _Twin) -> object:
    """Everything that twins have in common."""
    table = blocks.table
    labels, pairs = blocks.find_structure(unit, found.labels)
    seen = (table.family[found.labels], table.arranged[found.labels], table.colour[labels], pairs, blocks.above[unit])
    return *(array.tobytes() for array in seen), tuple((e.tensor, e.dim) for e in found.entries)


def _entries_by_unit(blocks: Blocks, entries: dict[int, list[BlockEntry]]) -> dict[int, list[BlockEntry]]:
    found: dict[int, list[BlockEntry]] = defaultdict(list)
    for block, values in entries.items():
        found[int(blocks.joined.find(blocks.relations.roots(np.array([block])))[0])] += values
    return found


def _make_block_group(blocks: Blocks, units: list[_Twin]) -> ChannelGroup:
    members = [*_members_of_channels(blocks.table, units), *_members_of_entries(units)]
    # The blocks are numbered as they lie in the first member, like the channels of a layer.
    first = np.argsort(members[0].positions.min(1), kind="stable")
    members = [replace(m, positions=m.positions[first]) for m in members]
    notes = tuple(blocks.list_notes(int(units[0].labels[0])))
    return ChannelGroup("", len(units), tuple(members), None, notes, "its unit is a whole block", 0, "block")


def _members_of_channels(table: ChannelTable, units: list[_Twin]) -> list[Member]:
    rank = np.full(len(table.used), -1)
    for row, (labels, _) in enumerate(units):
        rank[labels] = row * len(labels) + np.arange(len(labels))
    # A grouped convolution is used whole and slice by slice; a block moves with the whole.
    whole = [use for use in table.uses if use.key[2] is None and (rank[use.labels] >= 0).any()]
    return [_member_of_use(use, rank, len(units)) for use in whole]


def _member_of_use(use: Use, rank: np.ndarray, units: int) -> Member:
    """The positions of each unit, slot by slot in corresponding order."""
    keep = rank[use.labels] >= 0
    order = np.lexsort((use.positions[keep], rank[use.labels[keep]]))
    roles = decode_roles(int(np.bitwise_or.reduce(use.roles[rank[use.channels] >= 0])))
    return Member(*use.key[:2], use.positions[keep][order].reshape(units, -1), roles)


def _members_of_entries(units: list[_Twin]) -> list[Member]:
    """One value per block, such as a scale per head: the j-th entry of every unit is one member."""
    return [
        Member(e.tensor, e.dim, np.array([[block.entries[j].position] for block in units]), frozenset([e.role]))
        for j, e in enumerate(units[0].entries)
    ]
