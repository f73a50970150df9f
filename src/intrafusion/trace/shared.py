"""Entries of a parameter that serve several channels: what they mean is decided once all relations are known."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from intrafusion.graph import Role
from intrafusion.trace.channels import increasing
from intrafusion.trace.relations import Key, Relations

BlockParam = tuple[str, int, int, Role]
"""Tensor, dimension, index and role of one value that serves a whole block, such as the scale of a head."""


def settle_shared(relations: Relations) -> dict[int, list[BlockParam]]:
    """Decide what a per-channel entry that serves several channels means: tie them, or set them apart.

    Returns parameters with one value per block (a scale per head), by block label.
    """
    block_params: dict[int, list[BlockParam]] = defaultdict(list)
    for (tensor, dim), records in list(relations.shared.items()):
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
