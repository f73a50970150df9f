"""Streams: channels that norms see together, and linear maps otherwise; such may be rotated, as far as was seen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from intrafusion.graph import ChannelGroup, Member, Role, Rotation, StreamNorm, StreamScale
from intrafusion.trace.info import Tail, Writer
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
    written = _find_written(group, relations)
    why = next(_list_obstacles(group, relations, written), None)
    if why is not None:
        return replace(group, unmixable=f"{group.unmixable}; not rotated: {why}")
    readers: dict[Tail, list[tuple[str, int]]] = {}
    for member in group.with_role(Role.CONSUMES):
        for tail in filter(None, _find_tails(member, relations, written)):
            readers.setdefault(tail, []).append((member.tensor, member.dim))
    norms = tuple(StreamNorm(tail.scale, tail.shift, tuple(r), tail.offset) for tail, r in readers.items())
    scales = tuple(StreamScale(scale, *writer) for scale, writer in written.items())
    return replace(group, rotation=Rotation(norms, scales=scales))


def _find_written(group: ChannelGroup, relations: Relations) -> dict[str, Writer]:
    """Scales of a group that multiply what one linear map gives, and nothing else, and that linear map."""
    given = {(m.tensor, m.dim) for m in group.with_role(Role.PRODUCES) if Role.CONSUMES not in m.roles}
    found = {
        m.tensor: writer
        for m in group.with_role(Role.SCALES)
        if len(writers := relations.scaled.get(m.tensor, set())) == 1
        and (writer := next(iter(writers))) is not None
        and (writer.weight, writer.dim) in given
    }
    times = Counter(writer.weight for writer in found.values())
    return {scale: writer for scale, writer in found.items() if times[writer.weight] == 1}


def _find_tails(member: Member, relations: Relations, written: Mapping[str, Writer]) -> set[Tail | None]:
    """Behind what a weight reads; scales that go into what writes the channels are none."""
    found = relations.tails[member.tensor, member.dim]
    return {None if tail is not None and tail.scale in written else tail for tail in found}


def _list_obstacles(group: ChannelGroup, relations: Relations, written: Mapping[str, Writer]) -> Iterator[str]:
    """Why a group cannot be rotated, in words."""
    for member in group.members:
        if {Role.PRODUCES, Role.CONSUMES} <= member.roles:
            yield (
                f"the gain of a norm cannot go into one use of {member.tensor} alone; untie=True (--untie) gives "
                "the head a weight of its own"
            )
        if member.tensor in relations.reparametrised:
            yield f"{member.tensor} is used through {relations.reparametrised[member.tensor]}"
        if member.roles - _ROLES:
            yield f"the rotation would have to pass {member}"
    tails = set[Tail]()
    for member in group.with_role(Role.CONSUMES):
        found = _find_tails(member, relations, written)
        if len(found) > 1:
            yield f"{member.tensor} reads it behind several norms"
        tails |= {tail for tail in found if tail is not None}
    scales = [m.tensor for m in group.with_role(Role.SCALES) if m.tensor not in written]
    known = {name for tail in tails for name in (tail.scale, tail.shift)}
    for tail, where in relations.strays.items():
        if tail in tails or tail.scale in scales:
            yield f"what {tail.scale or tail.shift} gives goes elsewhere than into linear maps: {where}"
    for name in scales:
        if name not in known:
            yield f"{name} scales its channels one by one, and no linear map alone gives or reads that"
