"""The two sides of a product of activations, such as queries and keys: which of two channels that are one does what.

What is multiplied and summed may be transformed on one side by any invertible matrix if the other is transformed by its
inverse, transposed. So queries make channels, and keys match them: those of the second side have the role MATCHES.
"""

from __future__ import annotations

from collections import defaultdict, deque

import numpy as np

from intrafusion.graph import Role
from intrafusion.trace.labels import FIRST
from intrafusion.trace.relations import Relations, UnionFind

_OPPOSITE = {Role.PRODUCES: Role.MATCHES, Role.SHIFTS: Role.MATCHES}


def find_second_sides(relations: Relations) -> np.ndarray:
    """For every label whether it is on the second side of all products that it is in, and on no first side.

    The side that was computed first is the first. Where a label is multiplied with its own side, as in a Gram matrix,
    nothing is said.
    """
    if not relations.products:
        return np.zeros(relations.count, bool)
    sides, met = UnionFind(relations.count), []
    for copies, origins, _ in relations.copies:
        sides.unite(copies, origins)
    for union in relations.unions:
        if union.sides:
            met.append(np.stack([union.x, union.y]))
        else:
            sides.unite(union.x, union.y)
    roots = sides.find(np.arange(relations.count))
    edges = np.concatenate([np.zeros((2, 0), np.int64), *met], axis=1)
    return np.isin(roots, _colour(np.unique(roots[edges[:, edges.min(0) >= FIRST]], axis=1)))


def _colour(edges: np.ndarray) -> list[int]:
    """Nodes of the second colour, of each part of a graph that can be painted in two; edges are (2, k)."""
    near: dict[int, set[int]] = defaultdict(set)
    for a, b in edges.T.tolist():
        near[a].add(b)
        near[b].add(a)
    colour: dict[int, bool] = {}
    second: list[int] = []
    for start in sorted(near):
        if start not in colour:
            part = _spread(start, near, colour)
            if all(colour[a] != colour[b] for a in part for b in near[a]):
                second += [node for node in part if colour[node]]
    return second


def _spread(start: int, near: dict[int, set[int]], colour: dict[int, bool]) -> list[int]:
    """Paint all that hangs together with a node, alternately; the nodes in the order they were reached."""
    colour[start] = False
    part, queue = [start], deque([start])
    while queue:
        node = queue.popleft()
        for other in sorted(near[node] - colour.keys()):
            colour[other] = not colour[node]
            part.append(other)
            queue.append(other)
    return part


def turn_roles(roles: frozenset[Role], second: bool) -> frozenset[Role]:
    """The roles of a tensor on that side."""
    return frozenset(_OPPOSITE.get(role, role) for role in roles) if second else roles
