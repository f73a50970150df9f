"""Relations -> ChannelGraph: channels with the same pattern of use are one group.

Channels with equal fingerprints, colours, blocks and reasons form a group; nothing is compared channel by channel.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from intrafusion.graph import ChannelGraph, ChannelGroup, Member, Role, Slice
from intrafusion.names import advise_to_fold
from intrafusion.trace.arrays import split_runs
from intrafusion.trace.block_groups import find_block_groups
from intrafusion.trace.blocks import Blocks
from intrafusion.trace.channels import describe_channels
from intrafusion.trace.foldable import find_foldable_norms
from intrafusion.trace.info import Origin
from intrafusion.trace.left_over import find_rows_left_over
from intrafusion.trace.relations import Cause, Relations
from intrafusion.trace.shared import settle_shared
from intrafusion.trace.sides import find_second_sides, turn_roles
from intrafusion.trace.singles import Singles
from intrafusion.trace.streams import find_rotation
from intrafusion.trace.units import settle_units
from intrafusion.trace.uses import Use, decode_roles

# Channels that these see together may change places, but two equal ones are more than one: a softmax, a norm or a
# product counts them. A grouped convolution is not among these: its groups read their channels by a linear map.
_COUNTS_CHANNELS = {Cause.SOFTMAX, Cause.STATISTICS, Cause.REDUCTION, Cause.PRODUCT}


def build_graph(
    relations: Relations,
    shapes: dict[str, tuple[int, ...]],
    origins: list[Origin],
    warnings: tuple[str, ...],
    as_wide: Iterable[Collection[str]] = (),
) -> ChannelGraph:
    """Every group of interchangeable channels, in execution order.

    Args:
        as_wide: weights that one module needs to have equally many columns: what runs along these are twins.
    """
    settle_units(relations)  # first: these unite channels, and everything below goes by representatives
    entries = settle_shared(relations)
    settle_units(relations)
    table = describe_channels(relations)
    blocks = Blocks(relations, table)
    found = _find_channel_groups(blocks)
    for weights in as_wide:
        found = _make_twins(found, weights)
    found = _hold_uneven_slices(found)
    first = max((group.family for group in found), default=-1) + 1
    found += [replace(group, family=first + group.family) for group in find_block_groups(blocks, entries)]
    groups = _name([*found, *find_rows_left_over(relations, shapes, found)])
    return ChannelGraph(
        _count_depths(groups, table.uses),
        find_foldable_norms(relations, origins),
        shapes,
        warnings,
        tuple(relations.weight_norms.values()),
        dict(relations.reparametrised),
        tuple(relations.factors),
    )


def _make_twins(groups: list[ChannelGroup], weights: Collection[str]) -> list[ChannelGroup]:
    """The same, but groups along the columns of these weights are of one family, where each weight has one group."""
    along = [[g for g in groups if any(m.tensor == name and m.dim == 1 for m in g.members)] for name in weights]
    families = {g.family for each in along for g in each}
    if len(families) < 2 or any(len(each) != 1 for each in along) or len({each[0].size for each in along}) > 1:
        return groups
    return _share_reasons([replace(g, family=min(families)) if g.family in families else g for g in groups])


def _hold_uneven_slices(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """The same, but what runs along slices of a tensor of which others hold other kinds of channels is left alone.

    Slices must stay equally long, and only twins are cut alike.
    """
    slices: dict[tuple[str, int], dict[Slice, Counter[tuple[int, bool]]]] = defaultdict(lambda: defaultdict(Counter))
    for group in groups:
        for member in group.members:
            if member.within is not None:
                slices[member.tensor, member.dim][member.within][group.family, group.reducible] += group.size
    is_even = lambda each: all(kinds == next(iter(each.values())) for kinds in each.values())  # noqa: E731
    uneven = {side for side, each in slices.items() if not is_even(each)}
    held = [replace(g, reason=_explain_uneven(g, uneven)) if g.reducible else g for g in groups]
    return groups if all(a.reason == b.reason for a, b in zip(groups, held, strict=True)) else _hold_uneven_slices(held)


def _explain_uneven(group: ChannelGroup, uneven: set[tuple[str, int]]) -> str | None:
    found = next((m for m in group.members if m.within is not None and (m.tensor, m.dim) in uneven), None)
    return found and f"slices of {found.tensor} hold channels of different kinds, and must stay equally long"


@dataclass(frozen=True, eq=False)
class _Buckets:
    """Labels sorted into groups-to-be, in order of first use within each."""

    labels: np.ndarray  # all that are sorted, bucket by bucket
    numbers: np.ndarray  # the bucket of each of them
    home: np.ndarray  # the bucket of any label, -1: none
    rank: np.ndarray  # the place of any label in its bucket

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        """Each bucket with its labels."""
        return iter(split_runs(self.numbers, self.labels))


def _find_channel_groups(blocks: Blocks) -> list[ChannelGroup]:
    table = blocks.table
    bent = _find_bent(blocks.relations)
    labels = np.flatnonzero(table.used & ~blocks.relations.is_block[: len(table.used)])
    if not len(labels):
        return []
    buckets = _sort_into_buckets(blocks, labels)
    second = find_second_sides(blocks.relations)
    members, notes = _collect_members(table.uses, buckets, second), _collect_notes(blocks.relations, buckets)
    families, singles = dict[object, int](), Singles(blocks.relations, table)
    found: list[tuple[int, ChannelGroup]] = []
    for index, rows in buckets:
        family = families.setdefault((table.family[rows[0]].tobytes(), len(rows)), len(families))
        group = _make_group(blocks, singles, rows, members[index], notes[index], family)
        group = replace(group, linear=group.reducible and group.unmixable is None and not bent[rows].any())
        group = find_rotation(group, blocks.list_causes(int(rows[0])), blocks.relations)
        found.append((int(table.first[rows].min()), group))
    return _share_reasons([group for _, group in sorted(found, key=lambda item: item[0])])


def _sort_into_buckets(blocks: Blocks, labels: np.ndarray) -> _Buckets:
    table, count = blocks.table, blocks.relations.count
    reason = table.reasons.index[labels, None].astype(np.uint64)
    keys = np.concatenate([table.pattern[labels], table.colour[labels], blocks.key[labels], reason], axis=1)
    _, bucket = np.unique(keys, axis=0, return_inverse=True)
    bucket = bucket.reshape(-1)
    order = np.lexsort((table.first[labels], bucket))
    labels, bucket = labels[order], bucket[order]
    home, rank = np.full(count, -1), np.zeros(count, np.int64)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    home[labels] = bucket
    rank[labels] = np.arange(len(labels)) - np.repeat(starts, np.diff(np.append(starts, len(labels))))
    return _Buckets(labels, bucket, home, rank)


def _collect_members(uses: list[Use], buckets: _Buckets, second: np.ndarray) -> dict[int, list[Member]]:
    """The members of each bucket, in execution order."""
    members: dict[int, list[Member]] = defaultdict(list)
    for use in uses:
        for index, member in _split_use(use, buckets, second):
            members[index].append(member)
    return members


def _split_use(use: Use, buckets: _Buckets, second: np.ndarray) -> Iterator[tuple[int, Member]]:
    """One tensor dimension, as a member of each bucket that it holds channels of, and of each side of a product."""
    placed = buckets.home[use.labels] >= 0
    for side in (False, True):
        keep = placed & (second[use.found] == side)
        if not keep.any():
            continue
        which, positions = use.which[keep], use.positions[keep]
        labels = use.channels[which]
        home = buckets.home[labels]
        order = np.lexsort((positions, buckets.rank[labels], home))
        pairs = np.stack([positions[order], which[order]], axis=1)
        for index, rows in split_runs(home[order], pairs):
            count = 1 + np.count_nonzero(np.diff(rows[:, 1]))  # the positions of a channel lie next to each other
            roles = decode_roles(int(use.roles[rows[0, 1]]))  # equal patterns: what the first does, all do
            places = rows[:, 0].reshape(count, -1)
            yield index, Member(*use.key[:2], places, turn_roles(roles, side), use.key[2])


def _collect_notes(relations: Relations, buckets: _Buckets) -> dict[int, list[str]]:
    notes: dict[int, list[str]] = defaultdict(list)
    for labels, text in relations.notes:
        for index in np.unique(buckets.home[relations.roots(labels)]).tolist():
            if index >= 0 and text not in notes[index]:
                notes[index].append(text)
    return notes


def _make_group(
    blocks: Blocks, singles: Singles, labels: np.ndarray, members: list[Member], notes: list[str], family: int
) -> ChannelGroup:
    one = int(labels[0])  # the channels of a bucket have all in common, so one speaks for them
    notes = list(dict.fromkeys([*blocks.list_notes(one), *notes]))
    reason = blocks.table.reasons.text_of(one)
    if reason is None and len(labels) == 1:
        reason = _explain_seen_whole(blocks.relations, members) or singles.explain(one, notes)
    unmixable = _explain_unmixable(blocks.relations, members, blocks.list_causes(one))
    seen = blocks.explain_together(one)
    return ChannelGroup("", len(labels), tuple(members), reason, tuple(notes), unmixable, family, together=seen)


def _explain_seen_whole(relations: Relations, members: list[Member]) -> str:
    """Which weight was taken as one matrix, by vectors beside it, as a spectral norm does; empty for none."""
    beside = {_find_parametrised(m.tensor) for m in members if m.tensor not in relations.reparametrised} - {""}
    read = [m.tensor for m in members if Role.CONSUMES in m.roles and len(m.positions) == 1 < m.positions.size]
    for tensor in read:
        through = relations.reparametrised.get(tensor)
        if through is not None and _find_parametrised(tensor) in beside:
            return f"{tensor} is seen as one matrix: {through}{advise_to_fold(tensor)}"
    return ""


def _find_parametrised(tensor: str) -> str:
    """The module and name of what a parametrization computes from this tensor, or by it."""
    module, found, rest = tensor.rpartition("parametrizations.")
    return f"{module}{rest.partition('.')[0]}" if found else ""


_LINEAR = frozenset([Role.PRODUCES, Role.CONSUMES, Role.SHIFTS])
"""What is transformed as the channels are, and not averaged over those that become one."""


def _explain_unmixable(relations: Relations, members: list[Member], causes: list[tuple[Cause, str]]) -> str | None:
    """Why merging two identical channels would change the output, if it would."""
    for member in members:
        if {Role.PRODUCES, Role.CONSUMES} <= member.roles:
            return f"{member.tensor} both produces and consumes them along one dimension (tied weights)"
        if member.roles & _LINEAR and member.tensor in relations.reparametrised:
            return f"{member.tensor} is not used as it is but through {relations.reparametrised[member.tensor]}"
    matched = any(Role.MATCHES in member.roles for member in members)
    counting = _COUNTS_CHANNELS - ({Cause.PRODUCT} if matched else set())
    return next((f"{cause}: {where}" for cause, where in causes if cause in counting), None)


def _find_bent(relations: Relations) -> np.ndarray:
    """For every label whether something that is not linear is done to its channel, as far as was seen."""
    bent = np.zeros(relations.count, bool)
    if relations.bent:
        bent[relations.roots(np.concatenate(relations.bent))] = True
    return bent


def _share_reasons(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Twins that cannot all be reduced are not reduced."""
    blocked = {g.family: g.reason for g in groups if g.reason}
    return [replace(g, reason=blocked[g.family]) if g.family in blocked and not g.reason else g for g in groups]


# ---- names and depths -----------------------------------------------------------------------------------------------


def _name(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Give every group the name of its first producer, with `#k` where one module has several groups.

    Those of whole blocks are called `name:blocks`, say: what they were called so far is put behind.
    """
    base = [(g.producers or (g.members[0].module,))[0] or g.members[0].tensor for g in groups]
    base = [f"{name}{group.name}" for group, name in zip(groups, base, strict=True)]
    total, seen, result = Counter(base), Counter[str](), []
    for group, name in zip(groups, base, strict=True):
        result.append(replace(group, name=f"{name}#{seen[name]}" if total[name] > 1 else name))
        seen[name] += 1
    return result


def _count_depths(groups: list[ChannelGroup], uses: list[Use]) -> tuple[ChannelGroup, ...]:
    """Number the reducible groups from the output backwards, by the last layer that produces each."""
    index = {use.key: i for i, use in enumerate(uses)}

    def find_last(group: ChannelGroup) -> int:
        return max((index.get(m.key(), -1) for m in group.with_role(Role.PRODUCES)), default=-1)

    countable = sorted((g for g in groups if g.reducible and g.is_channel), key=find_last, reverse=True)
    depth = {g.name: i for i, g in enumerate(countable)}
    return tuple(replace(g, depth=depth.get(g.name)) for g in groups)
