"""Whole blocks, such as heads, as what their readers see of them: every slot a channel, block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from weakref import WeakKeyDictionary

from intrafusion.graph import ChannelGraph, ChannelGroup, Role

_FLAT: WeakKeyDictionary[ChannelGraph, dict[tuple[str, ...], ChannelGraph]] = WeakKeyDictionary()


def flatten_blocks(graph: ChannelGraph, blocks: Sequence[ChannelGroup]) -> ChannelGraph:
    """The graph of the readers of these blocks, in which every slot of a block is a channel, block by block.

    Blocks are not in it that several layers read as different numbers of channels. The same blocks of one graph give
    the same object, by which a calibration remembers what it saw.
    """
    known, names = _FLAT.setdefault(graph, {}), tuple(block.name for block in blocks)
    if names not in known:
        known[names] = replace(graph, groups=tuple(_list_readable(blocks)))
    return known[names]


def _list_readable(blocks: Sequence[ChannelGroup]) -> list[ChannelGroup]:
    groups = []
    for block in blocks:
        read = [replace(m, positions=m.positions.reshape(-1, 1)) for m in block.with_role(Role.CONSUMES)]
        if len({len(m.positions) for m in read}) == 1:
            groups.append(replace(block, size=len(read[0].positions), members=tuple(read), kind="channel"))
    return groups
