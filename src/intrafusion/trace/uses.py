"""Which index of which tensor belongs to which channel: the records of one dimension of one tensor, put together."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from intrafusion.brief import show_briefly
from intrafusion.graph import Role
from intrafusion.trace.arrays import classify, is_increasing
from intrafusion.trace.labels import FIRST
from intrafusion.trace.relations import Key, Relations

ROLE_BITS = {role: 1 << i for i, role in enumerate(Role)}


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

    __repr__ = show_briefly


def list_uses(relations: Relations) -> list[Use]:
    """Every use of every tensor, in execution order, without those that name no channel."""
    uses = [_gather(relations, key) for key in relations.uses]
    return [use for use in uses if len(use.channels)]


@functools.cache
def decode_roles(bits: int) -> frozenset[Role]:
    return frozenset(role for role, bit in ROLE_BITS.items() if bits & bit)


def _gather(relations: Relations, key: Key) -> Use:
    """All records of one key, each index once."""
    records = relations.uses[key]
    positions = np.concatenate([p for _, p, _ in records])
    found = np.concatenate([c for _, _, c in records])
    labels = relations.roots(found)
    bits = np.concatenate([np.full(len(p), ROLE_BITS[role]) for role, p, _ in records])
    keep = labels >= FIRST
    positions, labels, found, bits = positions[keep], labels[keep], found[keep], bits[keep]
    # A layer that runs twice is recorded twice: its roles add up index by index, then channel by channel.
    roles_at = np.zeros(int(positions.max(initial=0)) + 1, np.int64)
    np.bitwise_or.at(roles_at, positions, bits)
    if not is_increasing(positions):
        positions, index = np.unique(positions, return_index=True)
        labels, found = labels[index], found[index]
    channels, which, slots = classify(labels)
    roles = np.zeros(len(channels), np.int64)
    np.bitwise_or.at(roles, which, roles_at[positions])
    return Use(key, positions, labels, found, channels, which, slots, roles)
