"""Streams: channels that norms see together, and linear maps otherwise; such may be rotated, as far as was seen."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from intrafusion.graph import ChannelGroup, Role, Rotation, StreamNorm
from intrafusion.trace.info import Tail
from intrafusion.trace.relations import Cause, Relations

_NORMS = {Cause.STATISTICS, Cause.REDUCTION}  # an RMS norm may be a mean of squares, written out
_ROLES = frozenset([Role.PRODUCES, Role.CONSUMES, Role.SHIFTS, Role.SCALES])


def find_rotation(group: ChannelGroup, causes: Sequence[tuple[Cause, str]], relations: Relations) -> ChannelGroup:
    """The group with the rotation that a proof is to be tried of, or with the reason against it among others.

    Args:
        causes: what saw its channels together.
    """
    seen = {cause for cause, _ in causes}
    if not (group.reducible and group.unmixable and group.size > 1 and seen and seen <= _NORMS):
        return group
    why = next(_list_obstacles(group, relations), None)
    if why is not None:
        return replace(group, unmixable=f"{group.unmixable}; not rotated: {why}")
    readers: dict[Tail, list[tuple[str, int]]] = {}
    for member in group.with_role(Role.CONSUMES):
        for tail in filter(None, relations.tails[member.tensor, member.dim]):
            readers.setdefault(tail, []).append((member.tensor, member.dim))
    return replace(group, rotation=Rotation(tuple(StreamNorm(*tail, tuple(r)) for tail, r in readers.items())))


def _list_obstacles(group: ChannelGroup, relations: Relations) -> Iterator[str]:
    """Why a group cannot be rotated, in words."""
    for member in group.members:
        if {Role.PRODUCES, Role.CONSUMES} <= member.roles:
            yield (
                f"the gain of a norm cannot go into one use of {member.tensor} alone; untie it (head.weight = "
                "nn.Parameter(head.weight.clone()), and tie_word_embeddings = False in a config)"
            )
        if member.tensor in relations.reparametrised:
            yield f"{member.tensor} is used through {relations.reparametrised[member.tensor]}"
        if member.roles - _ROLES:
            yield f"the rotation would have to pass {member}"
    tails = set[Tail]()
    for member in group.with_role(Role.CONSUMES):
        found = relations.tails[member.tensor, member.dim]
        if len(found) > 1:
            yield f"{member.tensor} reads it behind several norms"
        tails |= {tail for tail in found if tail is not None}
    scales = [m.tensor for m in group.with_role(Role.SCALES)]
    known = {name for tail in tails for name in tail}
    for tail, where in relations.strays.items():
        if tail in tails or tail.scale in scales:
            yield f"what {tail.scale or tail.shift} gives goes elsewhere than into linear maps: {where}"
    for name in scales:
        if name not in known:
            yield f"{name} scales its channels one by one, and no linear map alone reads that"
