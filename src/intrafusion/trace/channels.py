"""Relations -> what is known of every channel: a fingerprint of its uses, and whether it is blocked.

A fingerprint is a sum of random 128-bit numbers, one per (tensor, dimension, slots, roles) that uses the channel.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from intrafusion.graph import Role
from intrafusion.trace.labels import FIRST, FIXED
from intrafusion.trace.relations import Key, Relations

ROLE_BITS = {role: 1 << i for i, role in enumerate(Role)}


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


def roles_from(bits: int) -> frozenset[Role]:
    return frozenset(role for role, bit in ROLE_BITS.items() if bits & bit)


def increasing(values: np.ndarray) -> bool:
    """Whether each is larger than the one before: sorted, and none twice. What most entries are, and quick to see."""
    return bool((values[1:] > values[:-1]).all())
