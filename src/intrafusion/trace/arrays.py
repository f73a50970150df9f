"""Questions about arrays of labels that several steps of the grouping ask."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np


def is_increasing(values: np.ndarray) -> bool:
    """Whether each is larger than the one before: sorted, and none twice. What most entries are, and quick to see."""
    return bool((values[1:] > values[:-1]).all())


def classify(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different labels in order, which of them each is, and how often each comes."""
    if is_increasing(labels):
        return labels, np.arange(len(labels)), np.ones(len(labels), np.int64)
    return np.unique(labels, return_inverse=True, return_counts=True)


def rank_within(which: np.ndarray) -> np.ndarray:
    """How many elements of the same class precede each element."""
    if is_increasing(which):
        return np.zeros(len(which), np.int64)
    order = np.argsort(which, kind="stable")
    sizes = np.bincount(which)
    rank = np.empty(len(which), np.int64)
    rank[order] = np.arange(len(which)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return rank


def split_runs(keys: np.ndarray, values: np.ndarray) -> Iterable[tuple[int, np.ndarray]]:
    """Runs of equal keys of a sorted array, with their values."""
    if not len(keys):
        return []
    starts = np.flatnonzero(np.diff(keys, prepend=keys[0] - 1))
    return zip(keys[starts].tolist(), np.split(values, starts[1:]), strict=True)
