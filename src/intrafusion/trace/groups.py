"""Relations -> ChannelGraph: channels with the same pattern of use are one group.

Channels with equal fingerprints, colours, blocks and fate form a group; nothing is compared channel by channel.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np

from intrafusion.graph import ChannelGraph, ChannelGroup, FoldableNorm, Member, Role
from intrafusion.trace.blocks import Cells, split_by
from intrafusion.trace.channels import Channels, Use, describe, roles_from
from intrafusion.trace.info import Origin
from intrafusion.trace.relations import Cause, Relations
from intrafusion.trace.shared import settle_shared

SYMMETRIC = {Cause.SOFTMAX, Cause.STATISTICS, Cause.REDUCTION, Cause.PRODUCT}


def build_graph(
    relations: Relations, shapes: dict[str, tuple[int, ...]], origins: list[Origin], warnings: tuple[str, ...]
) -> ChannelGraph:
    """Every group of interchangeable channels, in execution order."""
    block_params = settle_shared(relations)
    channels = describe(relations)
    cells = Cells(relations, channels)
    groups = [*channel_groups(relations, channels, cells), *cells.groups(channels, block_params)]
    return ChannelGraph(numbered(named(groups), channels.uses), foldable_norms(relations, origins), shapes, warnings)


def channel_groups(relations: Relations, channels: Channels, cells: Cells) -> list[ChannelGroup]:
    labels = np.flatnonzero(channels.used & ~relations.is_block[: len(channels.used)])
    if not len(labels):
        return []
    keys = np.concatenate(
        [
            channels.pattern[labels],
            channels.colour[labels],
            cells.key[labels],
            channels.reason[labels, None].astype(np.uint64),
        ],
        axis=1,
    )
    _, bucket = np.unique(keys, axis=0, return_inverse=True)
    bucket = bucket.reshape(-1)
    order = np.lexsort((channels.first[labels], bucket))
    labels, bucket = labels[order], bucket[order]
    home = np.full(relations.count, -1)
    home[labels] = bucket
    rank = np.zeros(relations.count, np.int64)
    starts = np.flatnonzero(np.diff(bucket, prepend=-1))
    rank[labels] = np.arange(len(labels)) - np.repeat(starts, np.diff(np.append(starts, len(labels))))
    members = members_by_bucket(channels.uses, home, rank)
    notes = notes_by_bucket(relations, home)
    families: dict[object, int] = {}
    found = []
    for index, rows in split_by(bucket, labels):
        twin = (channels.family[rows[0]].tobytes(), len(rows))
        family = families.setdefault(twin, len(families))
        found.append(
            (
                int(channels.first[rows].min()),
                make_group(relations, channels, cells, rows, members[index], notes[index], family),
            )
        )
    return with_fates([g for _, g in sorted(found, key=lambda item: item[0])])


def members_by_bucket(uses: list[Use], home: np.ndarray, rank: np.ndarray) -> dict[int, list[Member]]:
    members: dict[int, list[Member]] = defaultdict(list)
    for use in uses:
        where = home[use.labels]
        keep = where >= 0
        where, labels, positions = where[keep], use.labels[keep], use.positions[keep]
        order = np.lexsort((positions, rank[labels], where))
        role_of = dict(zip(use.channels.tolist(), use.roles.tolist(), strict=True))
        for (index, rows), (_, owners) in zip(
            split_by(where[order], positions[order]), split_by(where[order], labels[order]), strict=True
        ):
            count = len(np.unique(owners))
            roles = roles_from(role_of[int(owners[0])])
            members[index].append(Member(*use.key[:2], rows.reshape(count, -1), roles, use.key[2]))
    return members


def notes_by_bucket(relations: Relations, home: np.ndarray) -> dict[int, list[str]]:
    notes: dict[int, list[str]] = defaultdict(list)
    for labels, text in relations.notes:
        for index in np.unique(home[relations.roots(labels)]).tolist():
            if index >= 0 and text not in notes[index]:
                notes[index].append(text)
    return notes


def make_group(
    relations: Relations,
    channels: Channels,
    cells: Cells,
    labels: np.ndarray,
    members: list[Member],
    notes: list[str],
    family: int,
) -> ChannelGroup:
    notes = list(dict.fromkeys([*cells.notes(int(labels[0])), *notes]))
    reason = channels.reasons[channels.reason[labels[0]]] or None
    if reason is None and len(labels) == 1:
        reason = "a single channel" + (f" ({notes[-1]})" if notes else "")
    return ChannelGroup(
        "",
        len(labels),
        tuple(members),
        reason,
        tuple(notes),
        unmixable(relations, members, cells.causes(int(labels[0]))),
        family,
    )


def unmixable(relations: Relations, members: list[Member], causes: list[tuple[Cause, str]]) -> str | None:
    """Why merging two identical channels would change the output, if it would."""
    for member in members:
        if {Role.PRODUCES, Role.CONSUMES} <= member.roles:
            return f"{member.tensor} both produces and consumes them along one dimension (tied weights)"
        if member.roles & {Role.PRODUCES, Role.CONSUMES} and member.tensor in relations.reparametrised:
            return f"{member.tensor} is not used as it is but through {relations.reparametrised[member.tensor]}"
    symmetric = next(((cause, where) for cause, where in causes if cause in SYMMETRIC), None)
    return f"{symmetric[0]}: {symmetric[1]}" if symmetric else None


def with_fates(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Twins that cannot all be reduced are not reduced; heads wait for the module's own head count to be reducible."""
    family_size = Counter(g.family for g in groups)
    blocked = {g.family: g.reason for g in groups if g.reason}
    product = str(Cause.PRODUCT)
    result = []
    for group in groups:
        reason = group.reason or blocked.get(group.family)
        heads = next((n for n in group.notes if n.startswith(product)), None)
        if reason is None and heads and family_size[group.family] > 1:
            reason = f"attention heads cannot be reduced yet ({heads})"
        result.append(replace(group, reason=reason))
    return result


# ---- names and norms ------------------------------------------------------------------------------------------------


def named(groups: list[ChannelGroup]) -> list[ChannelGroup]:
    """Give every group the name of its first producer, with `#k` where one module has several groups."""
    base = [(g.producers or (g.members[0].module,))[0] or g.members[0].tensor for g in groups]
    total, seen, result = Counter(base), Counter[str](), []
    for group, name in zip(groups, base, strict=True):
        result.append(replace(group, name=f"{name}#{seen[name]}" if total[name] > 1 else name))
        seen[name] += 1
    return result


def numbered(groups: list[ChannelGroup], uses: list[Use]) -> tuple[ChannelGroup, ...]:
    """Count the reducible groups from the output backwards, by the last layer that produces each."""
    index = {use.key: i for i, use in enumerate(uses)}
    last = lambda g: max((index.get(m.key(), -1) for m in g.with_role(Role.PRODUCES)), default=-1)  # noqa: E731
    countable = sorted((g for g in groups if g.reducible and g.is_channel), key=last, reverse=True)
    depth = {g.name: i for i, g in enumerate(countable)}
    return tuple(replace(g, depth=depth.get(g.name)) for g in groups)


def foldable_norms(relations: Relations, origins: list[Origin]) -> tuple[FoldableNorm, ...]:
    """Batch norms that always and alone read one linear map's output."""
    by_weight: dict[str, list[Origin]] = defaultdict(list)
    for origin in origins:
        by_weight[origin.weight].append(origin)
    norms = []
    for weight, runs in by_weight.items():
        first = runs[0]
        if first.norm is None or any((o.norm, o.reads, o.bias) != (first.norm, 1, first.bias) for o in runs):
            continue
        gain, bias, mean, variance = first.norm
        if mean is None or variance is None or relations.norm_calls[mean] != len(runs) or bias is None:
            continue
        norms.append(FoldableNorm(weight, first.dim, first.bias, gain, bias, mean, variance, first.eps))
    return tuple(norms)
