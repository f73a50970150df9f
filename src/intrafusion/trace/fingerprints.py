"""Sets of facts as numbers: equal sums mean equal sets.

A fact is a well-mixed number; a set of facts is their sum, so that facts may be added in any order and whole arrays of
channels at once. Two sums with different salts make 128 bits: two of a million different sets have the same sums with
a probability of about 1e-27, and a false group would still have to pass the permutation check.
"""

from __future__ import annotations

import hashlib

import numpy as np


def hash_words(*what: object) -> np.uint64:
    """The same number for the same words in every process, unlike Python's own hash."""
    return np.frombuffer(hashlib.blake2b(repr(what).encode(), digest_size=8).digest(), np.uint64)[0]


def mix(x: np.ndarray, salt: int) -> np.ndarray:
    """A well-mixed 64-bit number for each integer (splitmix64)."""
    z = x.astype(np.uint64) + np.uint64((0x9E3779B97F4A7C15 * (salt + 1)) % 2**64)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def start_sums(count: int) -> np.ndarray:
    """The empty set, for each of `count` labels: (count, 2), one column per salt."""
    return np.zeros((count, 2), np.uint64)


def sum_facts(count: int, where: np.ndarray, what: np.ndarray) -> np.ndarray:
    """A fingerprint (count, 2) of the set of numbers what[i] that each label where[i] is paired with."""
    total = start_sums(count)
    for salt in (0, 1):
        np.add.at(total[:, salt], where, mix(what, salt))
    return total
