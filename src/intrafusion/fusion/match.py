"""Which channel group of one network is which of another, or the first thing in which the two differ."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from intrafusion.brief import show_briefly
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Slice


@dataclass(frozen=True, eq=False)
class GroupPair:
    """A group of a network, the same group of the anchor, and their members one by one."""

    own: ChannelGroup
    anchor: ChannelGroup
    members: tuple[tuple[Member, Member], ...]

    __repr__ = show_briefly

    @property
    def name(self) -> str:
        return self.anchor.name


def match_groups(own: ChannelGraph, anchor: ChannelGraph, name: str) -> tuple[GroupPair, ...]:
    """The groups whose channels may be moved, in execution order.

    Widths may differ; names and ranks of tensors, the groups and all other sizes may not. A group that cannot be
    reduced in one of the networks stays as it is.

    Args:
        name: what messages call the network.
    Raises:
        ModelError: the first difference in depth, in structure, or in a size that must be the same.
    """
    _check_tensors(own, anchor, name)
    found = [_make_pair(a, b, name) for a, b in _zip_groups(own, anchor, name)]
    pairs = tuple(p for p in found if p.own.reducible and p.anchor.reducible)
    _check_sizes(own, anchor, pairs, name)
    return pairs


def _check_tensors(own: ChannelGraph, anchor: ChannelGraph, name: str) -> None:
    for tensor in [*anchor.shapes, *own.shapes]:
        if (tensor in own.shapes) != (tensor in anchor.shapes):
            lacking = "the anchor" if tensor in own.shapes else name
            raise ModelError(
                f"fuse: {lacking} has no {tensor!r}; only networks of one depth and structure can be fused."
            )
        a, b = own.shapes[tensor], anchor.shapes[tensor]
        if len(a) != len(b):
            raise ModelError(f"fuse: {tensor!r} is {list(a)} in {name} and {list(b)} in the anchor.")


def _zip_groups(own: ChannelGraph, anchor: ChannelGraph, name: str) -> Iterator[tuple[ChannelGroup, ChannelGroup]]:
    mine, theirs = (_group_by_members(graph) for graph in (own, anchor))
    for key in [*theirs, *mine]:
        if key not in mine or key not in theirs:
            group = (theirs.get(key) or mine.get(key) or [])[0]
            where = name if key in mine else "the anchor"
            raise ModelError(
                f"fuse: only {where} has the group {group.name!r} of channels that run through "
                f"{', '.join(sorted({m.tensor for m in group.members})[:4])}; the layers are connected in another way."
            )
        if len(mine[key]) != len(theirs[key]):
            raise ModelError(
                f"fuse: {theirs[key][0].name!r} has {len(mine[key])} groups of channels in {name} and "
                f"{len(theirs[key])} in the anchor; the numbers of heads or of convolution groups must be the same."
            )
    for key in theirs:
        yield from zip(mine[key], theirs[key], strict=True)


def _group_by_members(graph: ChannelGraph) -> dict[tuple[object, ...], list[ChannelGroup]]:
    """Groups by what they run through; several where twins cannot be told apart by that, in order."""
    found: dict[tuple[object, ...], list[ChannelGroup]] = defaultdict(list)
    for group in graph.groups:
        if group.is_channel:
            found[tuple(_describe_member(m) for m in _sort_members(group))].append(group)
    return dict(found)


def _sort_members(group: ChannelGroup) -> list[Member]:
    return sorted(group.members, key=lambda m: (m.tensor, m.dim, -1 if m.within is None else m.within.start))


def _describe_member(member: Member) -> tuple[object, ...]:
    """What does not depend on widths."""
    return member.tensor, member.dim, member.within is None, member.positions.shape[1], tuple(sorted(member.roles))


def _make_pair(own: ChannelGroup, anchor: ChannelGroup, name: str) -> GroupPair:
    reason = own.reason or anchor.reason or (None if own.size == anchor.size else own.unmixable or anchor.unmixable)
    if reason is not None and own.size != anchor.size:
        raise ModelError(
            f"fuse: {anchor.name!r} has {own.size} channels in {name} and {anchor.size} in the anchor, "
            f"and they must stay as they are ({reason})."
        )
    return GroupPair(own, anchor, tuple(zip(_sort_members(own), _sort_members(anchor), strict=True)))


def _check_sizes(own: ChannelGraph, anchor: ChannelGraph, pairs: Sequence[GroupPair], name: str) -> None:
    """What belongs to no group that may be moved must have the same size."""
    moved = (
        _count_indices(m for p in pairs for m, _ in p.members),
        _count_indices(m for p in pairs for _, m in p.members),
    )
    for tensor, shape in anchor.shapes.items():
        for dim, size in enumerate(shape):
            mine, theirs = own.shapes[tensor][dim] - moved[0][tensor, dim], size - moved[1][tensor, dim]
            if mine != theirs:
                raise ModelError(
                    f"fuse: {tensor!r} is {list(own.shapes[tensor])} in {name} and {list(shape)} in the anchor; "
                    "inputs and outputs must be the same, only the channels in between may differ in number."
                )


def _count_indices(members: Iterable[Member]) -> Counter[tuple[str, int]]:
    """How many indices of each dimension these members hold; slices of a grouped convolution count once."""
    parts: Counter[tuple[str, int, Slice | None]] = Counter()
    for member in members:
        parts[member.key()] += member.positions.size
    found: Counter[tuple[str, int]] = Counter()
    for (tensor, dim, _), count in parts.items():
        found[tensor, dim] = max(found[tensor, dim], count)
    return found
