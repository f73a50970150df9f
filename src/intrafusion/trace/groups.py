"""Relations -> ChannelGraph: channels with the same pattern of use are one group.

Every channel gets a fingerprint: a sum of random 128-bit numbers, one per (tensor, dimension, slots, roles) that uses
it. Channels with equal fingerprints, colours, blocks and fate form a group; nothing is compared channel by channel.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from intrafusion.graph import ChannelGraph, ChannelGroup, FoldableNorm, Member, Role
from intrafusion.trace.info import Origin
from intrafusion.trace.labels import FIRST, FIXED
from intrafusion.trace.relations import Cause, Key, Relations, UnionFind

ROLE_BITS = {role: 1 << i for i, role in enumerate(Role)}
SYMMETRIC = {Cause.SOFTMAX, Cause.STATISTICS, Cause.REDUCTION, Cause.PRODUCT}


def hashed(*what: object) -> np.uint64:
    return np.frombuffer(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), np.uint64)[0]


@dataclass(frozen=True, eq=False)
class Use:
    """One dimension of one tensor: which index belongs to which channel (labels are representatives)."""

    key: Key
    positions: np.ndarray
    labels: np.ndarray
    found: np.ndarray  # the labels as they were recorded, before they were united
    channels: np.ndarray  # distinct labels
    which: np.ndarray  # index into channels, for each position
    slots: np.ndarray  # number of positions of each channel
    roles: np.ndarray  # role bits of each channel


@dataclass(eq=False)
class Channels:
    """Everything the grouping needs, indexed by representative label."""

    uses: list[Use]
    slot: np.ndarray  # what each label, before it was united, is in its channel
    pattern: np.ndarray  # fingerprint of the uses
    family: np.ndarray  # the same, blind to how slots lie and to which slice of a grouped convolution is meant
    colour: np.ndarray
    arranged: np.ndarray  # what follows what in each channel, and where it lies in slices of grouped convolutions
    reason: np.ndarray  # index into reasons, 0 = none
    reasons: list[str]
    first: np.ndarray  # (use index, position) of the first use, packed
    used: np.ndarray


def build_graph(
    relations: Relations, shapes: dict[str, tuple[int, ...]], origins: list[Origin], warnings: tuple[str, ...]
) -> ChannelGraph:
    """Every group of interchangeable channels, in execution order."""
    block_params = settle_followers(relations)
    channels = describe(relations)
    cells = Cells(relations, channels)
    groups = [*channel_groups(relations, channels, cells), *cells.groups(channels, block_params)]
    return ChannelGraph(numbered(named(groups), channels.uses), foldable_norms(relations, origins), shapes, warnings)


# ---- followers ------------------------------------------------------------------------------------------------------


def settle_followers(relations: Relations) -> dict[int, list[tuple[str, int, int, Role]]]:
    """Decide what a per-channel entry that serves several channels means: tie them, or set them apart.

    Returns parameters with one value per block (a scale per head), by block label.
    """
    block_params: dict[int, list[tuple[str, int, int, Role]]] = defaultdict(list)
    for (tensor, dim), records in list(relations.followers.items()):
        key: Key = (tensor, dim, None)
        positions = np.concatenate([p for _, p, _ in records])
        labels = relations.roots(np.concatenate([c for _, _, c in records]))
        if key not in relations.tables and any(serves_several(p, relations.roots(c)) for _, p, c in records):
            membership = block_membership(relations)
            shared = entries(positions, labels)
            blocks = one_block_each(shared, membership)
            if blocks is not None:
                role = records[0][0]
                for position, block in blocks.items():
                    block_params[block].append((tensor, dim, position, role))
                continue
            if spread_over_blocks(relations, shared, membership):
                relations.colour(labels, positions)
                relations.note(labels, f"one entry of {tensor} serves several blocks")
                continue
        size = int(positions.max()) + 1
        table = relations.tables.get(key)
        for role, p, c in records:
            relations.use(key, size if table is None else len(table), role, p, c)
    return block_params


def serves_several(positions: np.ndarray, labels: np.ndarray) -> bool:
    if increasing(positions):
        return False
    pairs = np.unique(np.stack([positions, labels]), axis=1)
    return len(np.unique(pairs[0])) < pairs.shape[1]


def increasing(values: np.ndarray) -> bool:
    """Whether each is larger than the one before: sorted, and none twice. What most entries are, and quick to see."""
    return bool((values[1:] > values[:-1]).all())


def entries(positions: np.ndarray, labels: np.ndarray) -> dict[int, set[int]]:
    shared: dict[int, set[int]] = defaultdict(set)
    for position, label in zip(positions.tolist(), labels.tolist(), strict=True):
        shared[position].add(label)
    return shared


def block_membership(relations: Relations) -> dict[int, set[int]]:
    """Which blocks a channel is in, by representatives."""
    membership: dict[int, set[int]] = defaultdict(set)
    for labels, block, _ in (*relations.block_members, *relations.meetings):
        root = int(relations.roots(np.array([block]))[0])
        for label in np.unique(relations.roots(labels)).tolist():
            membership[label].add(root)
    return membership


def one_block_each(shared: dict[int, set[int]], membership: dict[int, set[int]]) -> dict[int, int] | None:
    """The block that each entry serves, if every entry serves exactly one of its own."""
    common = {p: set.intersection(*(membership[x] for x in labels)) for p, labels in shared.items()}
    blocks = {p: min(c) for p, c in common.items() if c}
    several = len(shared) > 1 and len(blocks) == len(shared)
    return blocks if several and len(set(blocks.values())) == len(blocks) else None


def spread_over_blocks(relations: Relations, shared: dict[int, set[int]], membership: dict[int, set[int]]) -> bool:
    several = [labels for labels in shared.values() if len(labels) > 1]
    return any(len({frozenset(membership[x]) for x in labels}) > 1 for labels in several) or any(
        relations.is_block[x] for labels in several for x in labels
    )


# ---- fingerprints ---------------------------------------------------------------------------------------------------


def describe(relations: Relations) -> Channels:
    count = relations.count
    uses = [gather(relations, key) for key in relations.uses]
    uses = [u for u in uses if len(u.channels)]
    slot = slot_names(relations, uses)
    pattern, family, colour, arranged = (np.zeros((count, 2), np.uint64) for _ in range(4))
    first = np.full(count, np.iinfo(np.int64).max)
    used = np.zeros(count, bool)
    for index, use in enumerate(uses):
        add_fingerprint(pattern, use, use.key, arrangement(use, slot))
        add_fingerprint(family, use, (*use.key[:2], use.key[2] is not None), use.slots.astype(np.uint64))
        add_fingerprint(arranged, use, use.key[:2], sequence(use, slot) if use.key[2] is None else placement(use))
        lowest = np.full(count, np.iinfo(np.int64).max)
        np.minimum.at(lowest, use.labels, index << 32 | use.positions)
        np.minimum(first, lowest, out=first)
        used[use.channels] = True
    for labels, values in relations.colours:
        roots = relations.roots(labels)
        nth = ranks(np.unique(roots, return_inverse=True)[1]).astype(np.uint64)
        for salt in (0, 1):
            np.add.at(colour[:, salt], roots, scrambled(scrambled(values, 0) + nth, salt))
    for labels, place in relations.passes:
        for salt in (0, 1):
            np.add.at(colour[:, salt], relations.roots(labels), scrambled(slot[labels] ^ hashed(place, salt), salt))
    reason, reasons = fates(relations, uses)
    return Channels(uses, slot, pattern, family, colour, arranged, reason, reasons, first, used)


def gather(relations: Relations, key: Key) -> Use:
    """All records of one key, each index once."""
    records = relations.uses[key]
    positions = np.concatenate([p for _, p, _ in records])
    found = np.concatenate([c for _, _, c in records])
    labels = relations.roots(found)
    bits = np.concatenate([np.full(len(p), ROLE_BITS[role]) for role, p, _ in records])
    keep = labels >= FIRST
    positions, labels, found, bits = positions[keep], labels[keep], found[keep], bits[keep]
    roles_at = np.zeros(int(positions.max(initial=0)) + 1, np.int64)
    np.bitwise_or.at(roles_at, positions, bits)
    if not increasing(positions):
        positions, index = np.unique(positions, return_index=True)
        labels, found = labels[index], found[index]
    channels, inverse, slots = classes(labels)
    roles = np.zeros(len(channels), np.int64)
    np.bitwise_or.at(roles, inverse, roles_at[positions])
    return Use(key, positions, labels, found, channels, inverse, slots, roles)


def classes(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different labels in order, which of them each is, and how often each comes."""
    if increasing(labels):
        return labels, np.arange(len(labels)), np.ones(len(labels), np.int64)
    return np.unique(labels, return_inverse=True, return_counts=True)


def slot_names(relations: Relations, uses: list[Use]) -> np.ndarray:
    """A number for what each label is in its channel: the same for the k-th rows of a weight in all its channels."""
    names = np.zeros(relations.count, np.uint64)
    for use in uses:
        if (use.roles & ROLE_BITS[Role.PRODUCES]).any():
            rank = ranks(use.which)
            new = names[use.found] == 0
            names[use.found[new]] = scrambled(rank[new], 0) ^ hashed(use.key[:2])
    for copies, origins, places in relations.copies:
        names[copies] = scrambled(names[origins] + places.astype(np.uint64), 1)
    return names


def ranks(which: np.ndarray) -> np.ndarray:
    """How many elements of the same class precede each element."""
    if increasing(which):
        return np.zeros(len(which), np.int64)
    order = np.argsort(which, kind="stable")
    sizes = np.bincount(which)
    rank = np.empty(len(which), np.int64)
    rank[order] = np.arange(len(which)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank


def arrangement(use: Use, slot: np.ndarray) -> np.ndarray:
    """How the positions of each channel lie relative to its first, and what lies there."""
    first = np.full(len(use.channels), np.iinfo(np.int64).max)
    np.minimum.at(first, use.which, use.positions)
    return summed(use, scrambled(use.positions - first[use.which], 0) ^ slot[use.found])


def sequence(use: Use, slot: np.ndarray) -> np.ndarray:
    """What lies at the positions of each channel, in order."""
    return summed(use, scrambled(ranks(use.which), 0) + slot[use.found])


def placement(use: Use) -> np.ndarray:
    """Where the positions of each channel lie."""
    return summed(use, use.positions)


def summed(use: Use, values: np.ndarray) -> np.ndarray:
    """The sum over the positions of each channel of well-mixed values."""
    total = np.zeros(len(use.channels), np.uint64)
    np.add.at(total, use.which, scrambled(values, 0))
    return total


def add_fingerprint(target: np.ndarray, use: Use, key: object, slots: np.ndarray) -> None:
    for salt in (0, 1):
        code = slots * np.uint64(256) + use.roles.astype(np.uint64)
        target[use.channels, salt] += scrambled(code ^ hashed(key, salt), salt)


def scrambled(x: np.ndarray, salt: int) -> np.ndarray:
    """A well-mixed 64-bit number for each integer (splitmix64)."""
    z = x.astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def fates(relations: Relations, uses: list[Use]) -> tuple[np.ndarray, list[str]]:
    """Why each channel is blocked, as an index into a list of reasons (0: it is not)."""
    reasons: list[str] = [""]
    fate = np.zeros(relations.count, np.int64)

    def set_fate(labels: np.ndarray, reason: str) -> None:
        roots = relations.roots(labels)
        roots = roots[fate[roots] == 0]
        if len(roots):
            if reasons[-1] != reason:
                reasons.append(reason)
            fate[roots] = len(reasons) - 1

    for labels, reason in relations.blocked:
        set_fate(labels, reason)
    for use in uses:
        pinned = relations.pins.get(use.key[:2])
        if pinned:
            set_fate(use.channels, f"{use.key[0]}, dimension {use.key[1]}: {pinned}")
    set_fate(np.array([FIXED]), "tied to the input of the network or to fixed data")
    set_fate(unread(relations, uses), "nothing was seen to read these channels")
    return fate, reasons


def unread(relations: Relations, uses: list[Use]) -> np.ndarray:
    """Channels that no weight consumes and no reduction sees: unused, or read where tracing cannot follow."""
    produced, seen = np.zeros(relations.count, bool), np.zeros(relations.count, bool)
    for use in uses:
        produced[use.channels] = True
        seen[use.channels[use.roles & ROLE_BITS[Role.CONSUMES] > 0]] = True
    for labels, *_ in relations.block_members:
        seen[relations.roots(labels)] = True
    return np.flatnonzero(produced & ~seen & ~relations.is_block[: relations.count])


# ---- blocks ---------------------------------------------------------------------------------------------------------


class Cells:
    """Blocks of channels that were seen together, joined where they share channels."""

    def __init__(self, relations: Relations, channels: Channels) -> None:
        self.relations = relations
        self.content = edges(relations, channels.slot, relations.block_members)  # a channel, a block that it is in
        self.met = edges(relations, channels.slot, relations.meetings)  # a channel, a block that it meets
        both = np.concatenate([self.content, self.met])
        self.key = sums(relations.count, both[:, 0], scrambled(both[:, 1], 0) ^ both[:, 2].view(np.uint64))
        above = self._of_blocks()
        joins = np.concatenate([self.content[~above], self.met, ties(relations)])
        self.inside = np.unique(joins[:, :2])
        self.joined = UnionFind(relations.count)
        self.joined.unite(joins[:, 0], joins[:, 1])
        home = self.joined.find(joins[:, 0])
        order = np.argsort(home, kind="stable")
        self.joins = dict(split_by(home[order], joins[order]))
        blocks, seen_by = self.content[above, :2].T
        self.above = sums(relations.count, self.joined.find(blocks), seen_by)  # of what sees several blocks at once
        barred = np.flatnonzero(relations.is_block[: relations.count] & (channels.reason > 0))
        self.barred = set(self.joined.find(barred).tolist())

    def _of_blocks(self) -> np.ndarray:
        """Which pairs belong to a block of blocks only, such as a mean over heads: it does not join them."""
        names_channel = np.zeros(self.relations.count, bool)
        members, blocks = self.content[:, :2].T
        names_channel[blocks[~self.relations.is_block[members]]] = True
        return ~names_channel[blocks]

    def structure(self, block: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """All labels of a joined block, those of members first, and its edges between them by number."""
        joins = self.joins[block].copy()
        labels = np.concatenate([rows, np.setdiff1d(joins[:, :2], rows)])
        order = np.argsort(labels)
        joins[:, :2] = order[np.searchsorted(labels, joins[:, :2], sorter=order)]
        return labels, joins[np.lexsort(joins.T)]

    def causes(self, channel: int) -> list[tuple[Cause, str]]:
        """What saw this channel together with others."""
        return self._causes(self.content, channel)

    def notes(self, channel: int) -> list[str]:
        """What saw this channel, or computed what it met, in words."""
        found = [*self._causes(self.content, channel), *self._causes(self.met, channel)]
        return list(dict.fromkeys(f"{cause}: {where}" for cause, where in sorted(found)))

    def _causes(self, pairs: np.ndarray, channel: int) -> list[tuple[Cause, str]]:
        blocks = pairs[pairs[:, 0] == channel, 1].tolist()
        return sorted({self.relations.causes[b] for b in blocks if b in self.relations.causes})

    def groups(
        self, channels: Channels, block_params: dict[int, list[tuple[str, int, int, Role]]]
    ) -> list[ChannelGroup]:
        """Groups whose unit is a whole block: heads, groups of a convolution."""
        members = np.flatnonzero(channels.used & (self.joined.parent[: len(channels.used)] >= 0))
        members = members[np.isin(members, self.inside)]
        home = self.joined.find(members)
        keys = (channels.first, *(a[:, 0] for a in (channels.arranged, channels.colour, channels.family)))
        order = np.lexsort((*(key[members] for key in keys), home))
        members, home = members[order], home[order]
        extras = self._extras(block_params)
        profiles: dict[object, list[tuple[np.ndarray, list[tuple[str, int, int, Role]]]]] = defaultdict(list)
        for block, rows in split_by(home, members):
            if block not in self.barred and not channels.reason[rows].any():
                extra = sorted(extras.get(int(block), []))
                labels, edges = self.structure(block, rows)
                seen = [
                    channels.family[rows],
                    channels.arranged[rows],
                    channels.colour[labels],
                    edges,
                    self.above[block],
                ]
                profile = (*(a.tobytes() for a in seen), tuple((e[0], e[1]) for e in extra))
                profiles[profile].append((rows, extra))
        found = [block_group(self, channels, twins) for twins in profiles.values() if len(twins) > 1]
        return [group for group in found if group.producers or not group.consumers]  # else its sources are unknown

    def _extras(
        self, block_params: dict[int, list[tuple[str, int, int, Role]]]
    ) -> dict[int, list[tuple[str, int, int, Role]]]:
        extras: dict[int, list[tuple[str, int, int, Role]]] = defaultdict(list)
        for block, params in block_params.items():
            extras[int(self.joined.find(self.relations.roots(np.array([block])))[0])] += params
        return extras


def edges(relations: Relations, slot: np.ndarray, found: list[tuple[np.ndarray, int, int]]) -> np.ndarray:
    """Distinct rows: a channel, a block, and a number for where and as what the channel is in it or meets it."""
    if not found:
        return np.zeros((0, 3), np.int64)
    sizes = [len(labels) for labels, *_ in found]
    labels = np.concatenate([labels for labels, *_ in found])
    blocks, calls = (np.repeat(numbers, sizes) for numbers in ([f[1] for f in found], [f[2] for f in found]))
    what = (scrambled(calls, 0) ^ slot[labels]).view(np.int64)
    return np.unique(np.stack([relations.roots(labels), blocks, what], axis=1), axis=0)


def ties(relations: Relations) -> np.ndarray:
    """The same rows for blocks that move together."""
    if not relations.ties:
        return np.zeros((0, 3), np.int64)
    left, right = (np.concatenate(side) for side in zip(*relations.ties, strict=True))
    return np.stack([left, right, np.zeros_like(left)], axis=1)


def sums(count: int, where: np.ndarray, what: np.ndarray) -> np.ndarray:
    """A fingerprint of the set of numbers that each label is paired with."""
    total = np.zeros((count, 2), np.uint64)
    for salt in (0, 1):
        np.add.at(total[:, salt], where, scrambled(what, salt))
    return total


def split_by(keys: np.ndarray, values: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    """Runs of equal keys of a sorted array, with their values."""
    if not len(keys):
        return []
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    return zip(keys[starts].tolist(), np.split(values, starts[1:]), strict=True)


def block_group(
    cells: Cells, channels: Channels, twins: list[tuple[np.ndarray, list[tuple[str, int, int, Role]]]]
) -> ChannelGroup:
    rank = np.full(len(channels.used), -1)
    for row, (labels, _) in enumerate(twins):
        rank[labels] = row * len(labels) + np.arange(len(labels))
    members = []
    for use in channels.uses:
        keep = rank[use.labels] >= 0
        if use.key[2] is None and keep.any():
            order = np.lexsort((use.positions[keep], rank[use.labels[keep]]))
            roles = roles_from(int(np.bitwise_or.reduce(use.roles[rank[use.channels] >= 0])))
            members.append(Member(*use.key[:2], use.positions[keep][order].reshape(len(twins), -1), roles))
    for j, (tensor, dim, _, role) in enumerate(twins[0][1]):
        entry = np.array([[extra[j][2]] for _, extra in twins])
        members.append(Member(tensor, dim, entry, frozenset([role])))
    first = np.argsort(members[0].positions.min(1), kind="stable")
    members = [replace(m, positions=m.positions[first]) for m in members]
    notes = tuple(cells.notes(int(twins[0][0][0])))
    return ChannelGroup("", len(twins), tuple(members), None, notes, "its unit is a whole block", 0, "block")


# ---- groups ---------------------------------------------------------------------------------------------------------


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


def roles_from(bits: int) -> frozenset[Role]:
    return frozenset(role for role, bit in ROLE_BITS.items() if bits & bit)


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
    countable = sorted((g for g in groups if g.reason is None and g.kind == "channel"), key=last, reverse=True)
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
