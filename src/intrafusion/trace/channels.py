"""Relations -> what is known of every channel: fingerprints of its uses, its colour, and why it may not move.

Channels are interchangeable if everything that the network does with one it does with the other. What it does is a set
of facts, one per (tensor, dimension, slots, roles) that uses the channel; `fingerprints` makes numbers of such sets, so
that channels are compared by the thousand and never in pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    slot, found = _name_slots(relations, uses), _Together(uses)
    keys = [use.key for use in uses]
    pattern = found.sum_up(relations.count, keys, _arrange(found, slot))
    # Twins, such as the groups of one grouped convolution, have their own slices and their slots in other places.
    twins = [(*key[:2], key[2] is not None) for key in keys]
    family = found.sum_up(relations.count, twins, found.slots.astype(np.uint64))
    arranged = found.sum_up(relations.count, [key[:2] for key in keys], _place(found, slot))
    used, first = np.zeros(relations.count, bool), np.full(relations.count, _NEVER)
    used[found.channels] = True
    np.minimum.at(first, found.channels[found.which], found.use[found.which] << 32 | found.positions)
    return ChannelTable(
        uses, slot, pattern, family, _sum_colours(relations, slot), arranged, Reasons(relations, uses), first, used
    )


class _Together:
    """All uses at once: one channel of one use is one entry of `channels`, and each position says which it is of."""

    def __init__(self, uses: list[Use]) -> None:
        join = lambda arrays: np.concatenate([np.zeros(0, np.int64), *arrays])  # noqa: E731
        self.channels, self.slots, self.roles = (
            join(use.channels for use in uses), join(use.slots for use in uses), join(use.roles for use in uses)
        )  # fmt: skip
        self.positions, self.found = join(use.positions for use in uses), join(use.found for use in uses)
        sizes = [len(use.channels) for use in uses]
        self.use = np.repeat(np.arange(len(uses)), sizes)
        self.which = join(use.which + start for use, start in zip(uses, np.cumsum([0, *sizes]), strict=False))
        self.is_whole = np.array([use.key[2] is None for use in uses], bool)[self.use]

    def sum_positions(self, values: np.ndarray) -> np.ndarray:
        """The sum over the positions of each entry of well-mixed values."""
        total = np.zeros(len(self.channels), np.uint64)
        np.add.at(total, self.which, mix(values, 0))
        return total

    def sum_up(self, count: int, keys: Sequence[object], slots: np.ndarray) -> np.ndarray:
        """One fact for each entry: the key of its use, what its slots are, and its roles (seven bits; 256 hold them).

        Returns:
            (count, 2), by channel.
        """
        total, code = start_sums(count), slots * np.uint64(256) + self.roles.astype(np.uint64)
        for salt in (0, 1):
            hashes = np.array([hash_words(key, salt) for key in keys], np.uint64)
            np.add.at(total[:, salt], self.channels, mix(code ^ hashes[self.use], salt))
        return total


def _sum_colours(relations: Relations, slot: np.ndarray) -> np.ndarray:
    """What sets channels apart although the same weights use them: constants they meet, operations they pass."""
    colour = start_sums(relations.count)
    for labels, values in relations.colours:
        roots = relations.roots(labels)
        # The k-th slot of a channel meets the k-th value: which slot meets which matters, so both are mixed in.
        nth = rank_within(np.unique(roots, return_inverse=True)[1]).astype(np.uint64)
        for salt in (0, 1):
            np.add.at(colour[:, salt], roots, mix((mix(values, 0) + nth) ^ slot[labels], salt))
    labels = np.concatenate([np.zeros(0, np.int64), *(labels for labels, _ in relations.passes)])
    roots, sizes = relations.roots(labels), [len(labels) for labels, _ in relations.passes]
    for salt in (0, 1):
        places = np.array([hash_words(place, salt) for _, place in relations.passes], np.uint64)
        np.add.at(colour[:, salt], roots, mix(slot[labels] ^ np.repeat(places, sizes), salt))
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


def _arrange(found: _Together, slot: np.ndarray) -> np.ndarray:
    """How the positions of each entry lie relative to its first, and what lies there."""
    first = np.full(len(found.channels), _NEVER)
    np.minimum.at(first, found.which, found.positions)
    return found.sum_positions(mix(found.positions - first[found.which], 0) ^ slot[found.found])


def _place(found: _Together, slot: np.ndarray) -> np.ndarray:
    """What lies at the positions of each entry, in order; of slices, where they lie."""
    sequence = mix(rank_within(found.which), 0) + slot[found.found]
    return found.sum_positions(np.where(found.is_whole[found.which], sequence, found.positions.astype(np.uint64)))
