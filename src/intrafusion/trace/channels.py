"""Relations -> what is known of every channel: fingerprints of its uses, its colour, and why it may not move.

Channels are interchangeable if everything that the network does with one it does with the other. What it does is a set
of facts, one per (tensor, dimension, slots, roles) that uses the channel; `fingerprints` makes numbers of such sets, so
that channels are compared by the thousand and never in pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from intrafusion.brief import show_briefly
from intrafusion.graph import Role
from intrafusion.trace.arrays import rank_within
from intrafusion.trace.fingerprints import hash_words, mix, start_sums
from intrafusion.trace.reasons import Reasons
from intrafusion.trace.relations import Relations
from intrafusion.trace.uses import ROLE_BITS, Use, list_uses

_NEVER = np.iinfo(np.int64).max


@dataclass(eq=False)
class ChannelTable:
    """Everything the grouping needs, indexed by representative label."""

    uses: list[Use]
    slot: np.ndarray  # what each label, before it was united, is in its channel
    pattern: np.ndarray  # fingerprint of the uses
    family: np.ndarray  # the same, blind to how slots lie and to which slice of a grouped convolution is meant
    colour: np.ndarray  # fingerprint of the constants that the channel meets and of the operations that it passes
    arranged: np.ndarray  # what follows what in each channel, and where it lies in slices of grouped convolutions
    reasons: Reasons
    first: np.ndarray  # (use index, position) of the first use, packed
    used: np.ndarray

    __repr__ = show_briefly


def describe_channels(relations: Relations) -> ChannelTable:
    """Fingerprints of everything that happened to each channel."""
    uses = list_uses(relations)
    slot = _name_slots(relations, uses)
    pattern, family, arranged = (start_sums(relations.count) for _ in range(3))
    used = np.zeros(relations.count, bool)
    for use in uses:
        _add_use(pattern, use, use.key, _arrangement(use, slot))
        # Twins, such as the groups of one grouped convolution, have their own slices and their slots in other places.
        _add_use(family, use, (*use.key[:2], use.key[2] is not None), use.slots.astype(np.uint64))
        _add_use(arranged, use, use.key[:2], _sequence(use, slot) if use.key[2] is None else _placement(use))
        used[use.channels] = True
    colour, first, reasons = _sum_colours(relations, slot), _find_first(relations, uses), Reasons(relations, uses)
    return ChannelTable(uses, slot, pattern, family, colour, arranged, reasons, first, used)


def _find_first(relations: Relations, uses: list[Use]) -> np.ndarray:
    """Where each channel is used first, as one number that sorts by use and then by position."""
    first = np.full(relations.count, _NEVER)
    for index, use in enumerate(uses):
        lowest = np.full(relations.count, _NEVER)
        np.minimum.at(lowest, use.labels, index << 32 | use.positions)
        np.minimum(first, lowest, out=first)
    return first


def _sum_colours(relations: Relations, slot: np.ndarray) -> np.ndarray:
    """What sets channels apart although the same weights use them: constants they meet, operations they pass."""
    colour = start_sums(relations.count)
    for labels, values in relations.colours:
        roots = relations.roots(labels)
        # The k-th slot of a channel meets the k-th value: which slot meets which matters, so both are mixed in.
        nth = rank_within(np.unique(roots, return_inverse=True)[1]).astype(np.uint64)
        for salt in (0, 1):
            np.add.at(colour[:, salt], roots, mix((mix(values, 0) + nth) ^ slot[labels], salt))
    for labels, place in relations.passes:
        for salt in (0, 1):
            np.add.at(colour[:, salt], relations.roots(labels), mix(slot[labels] ^ hash_words(place, salt), salt))
    return colour


# ---- slots ----------------------------------------------------------------------------------------------------------


def _name_slots(relations: Relations, uses: list[Use]) -> np.ndarray:
    """A number for what each label is in its channel: the same for the k-th rows of a weight in all its channels.

    United labels are one channel, yet not one thing: where the halves of a layer are multiplied, row i and row n + i
    make channel i, one as the gate and one as what is gated. Two channels may only change places slot by slot.
    """
    names = np.zeros(relations.count, np.uint64)
    for use in uses:
        if (use.roles & ROLE_BITS[Role.PRODUCES]).any():
            rank = rank_within(use.which)
            new = names[use.found] == 0
            names[use.found[new]] = mix(rank[new], 0) ^ hash_words(use.key[:2])
    for copies, origins, places in relations.copies:
        names[copies] = mix(names[origins] + places.astype(np.uint64), 1)
    for labels, result, call in relations.dissolved:  # what something made of several places of a channel
        names[result] = mix(names[labels].sum(keepdims=True) + np.array([call]).astype(np.uint64), 2)[0]
    return names


def _arrangement(use: Use, slot: np.ndarray) -> np.ndarray:
    """How the positions of each channel lie relative to its first, and what lies there."""
    first = np.full(len(use.channels), _NEVER)
    np.minimum.at(first, use.which, use.positions)
    return _sum_positions(use, mix(use.positions - first[use.which], 0) ^ slot[use.found])


def _sequence(use: Use, slot: np.ndarray) -> np.ndarray:
    """What lies at the positions of each channel, in order."""
    return _sum_positions(use, mix(rank_within(use.which), 0) + slot[use.found])


def _placement(use: Use) -> np.ndarray:
    """Where the positions of each channel lie."""
    return _sum_positions(use, use.positions)


def _sum_positions(use: Use, values: np.ndarray) -> np.ndarray:
    """The sum over the positions of each channel of well-mixed values."""
    total = np.zeros(len(use.channels), np.uint64)
    np.add.at(total, use.which, mix(values, 0))
    return total


def _add_use(target: np.ndarray, use: Use, key: object, slots: np.ndarray) -> None:
    """One fact for each channel of a use: the key, what its slots are, and its roles (seven bits, so 256 hold them)."""
    for salt in (0, 1):
        code = slots * np.uint64(256) + use.roles.astype(np.uint64)
        target[use.channels, salt] += mix(code ^ hash_words(key, salt), salt)
