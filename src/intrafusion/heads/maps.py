"""The arithmetic of merged heads: which go together, and what becomes of their rows and columns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from intrafusion.heads.find import Heads, KeyPart
from intrafusion.reduce.principal import principal_map
from intrafusion.reduce.problem import Moments

_EXHAUSTIVE = 8  # heads of which all pairings are tried: 105
_NOTHING = 1e-12  # of the largest energy


@dataclass(frozen=True, eq=False)
class Seen:
    """Second moments, float64, of what one attention computes.

    keys (a, a), queries (b, b): of all that their layers give. values (n, n w, n w): for each key head of the values of
    all heads as its query heads mix them over the tokens.
    reading: (n r w, n r w) of the output layer, W^T W, of its columns by key head, query head and channel.
    """

    keys: Tensor
    queries: Tensor
    values: Tensor
    reading: Tensor


@dataclass(frozen=True, eq=False)
class Union:
    """What f heads that become one turn into.

    merge (w, f w): the merged rows are merge @ theirs, head by head; unmerge (f, w, w): those of head g are about
    unmerge[g] @ the merged rows; lost, total: the energy that is not told of them, and all of it.
    """

    merge: Tensor
    unmerge: Tensor
    lost: float
    total: float


def merge_pair(keys: Tensor, energies: Tensor) -> Union:
    r"""Merge a rotary pair of f key heads into one by complex factors, which commute with the rotation.

    With k_g the pair of head g as a complex number, e_g the energy of the queries that meet it, and u the leading
    eigenvector of E[w w^H], w_g = sqrt(e_g) k_g,

        k = sum_g conj(u_g) sqrt(e_g) k_g,    k_g ~ u_g / sqrt(e_g) k,    q_g <- conj(u_g / sqrt(e_g)) q_g,

    as Re(q conj(a k)) = Re((q conj a) conj k). What is lost is the sum of the other eigenvalues. OURS.

    Args:
        keys: (2 f, 2 f) second moment of the pairs, real and imaginary part head by head.
        energies: e (f,).
    """
    floor = _NOTHING * energies.max().clamp(min=1e-300)
    roots = energies.clamp(min=float(floor)).sqrt()
    parts = keys.reshape(len(roots), 2, len(roots), 2)
    real, imaginary = parts[:, 0, :, 0] + parts[:, 1, :, 1], parts[:, 1, :, 0] - parts[:, 0, :, 1]
    second = torch.complex(real, imaginary) * roots[:, None] * roots
    values, vectors = torch.linalg.eigh((second + second.mH) / 2)
    u = vectors[:, -1]
    into, back = u.conj() * roots, u / roots
    length = into.abs().square().sum().sqrt()  # keys as long as before, and queries against it
    merge = torch.cat([as_matrix(c) for c in into / length], dim=1)
    unmerge = torch.stack([as_matrix(c) for c in back * length])
    return Union(merge, unmerge, float(values[:-1].clamp(min=0).sum()), float(values.clamp(min=0).sum()))


def as_matrix(factor: Tensor) -> Tensor:
    """Multiplication by a complex number as a real (2, 2) matrix."""
    return torch.stack([torch.stack([factor.real, -factor.imag]), torch.stack([factor.imag, factor.real])])


def merge_rows(rows: Tensor, readings: Sequence[Tensor]) -> Union:
    """Merge the channels of f heads into the best w directions for what reads them.

    Args:
        rows: (f w, f w) second moment of the channels, head by head.
        readings: for each head (w, w), how strongly each direction is read: W^T W, or the second moment of the queries.
    """
    w, reader = len(readings[0]), torch.block_diag(*readings)
    found = principal_map(Moments(rows.new_zeros(1, len(rows)), rows[None], reader), w)
    left = torch.eye(len(rows), dtype=rows.dtype) - found.unmerge @ found.merge
    lost = float(((left @ rows @ left.T) * reader).sum())
    return Union(found.merge, found.unmerge.reshape(-1, w, w), max(lost, 0.0), float((rows * reader).sum()))


class Merging:
    """What merging heads of one attention costs, and gives."""

    def __init__(self, heads: Heads, seen: Seen) -> None:
        self.heads, self.seen = heads, seen

    def merge_keys(self, part: KeyPart, chosen: Sequence[int]) -> Union:
        rows = torch.from_numpy(part.keys[list(chosen)].ravel())
        keys, met = self.seen.keys[rows][:, rows], [self._sum_queries(part.queries[head]) for head in chosen]
        if part.rotary:
            return merge_pair(keys, torch.stack([m.trace() for m in met]))
        return merge_rows(keys, met)

    def _sum_queries(self, rows: np.ndarray) -> Tensor:
        """Second moment of the queries (r, w) that meet one key head, summed over its query heads."""
        places = torch.from_numpy(rows)
        return self.seen.queries[places[:, :, None], places[:, None, :]].sum(0)

    def merge_values(self, chosen: Sequence[int]) -> Union:
        rows = torch.arange(self.heads.values.size).reshape(self.heads.values.shape)[list(chosen)].flatten()
        own = torch.arange(self.heads.columns.size).reshape(self.heads.columns.shape)[list(chosen)]
        readings = self.seen.reading[own[..., :, None], own[..., None, :]].sum(1)
        return merge_rows(self.seen.values[list(chosen)].sum(0)[rows][:, rows], list(readings))

    def cost(self, chosen: Sequence[int]) -> float:
        """The share of the keys' energy that is lost, and of the values', summed."""
        keys, values = [self.merge_keys(part, chosen) for part in self.heads.parts], self.merge_values(chosen)
        total = sum(u.total for u in keys)
        return sum(u.lost for u in keys) / max(total, 1e-300) + values.lost / max(values.total, 1e-300)

    def choose(self, m: int) -> list[tuple[int, ...]]:
        """The heads that become one, m lots of equally many, by pairing the cheapest again and again."""
        lots = [(head,) for head in range(self.heads.count)]
        while len(lots) > m:
            costs = {(i, j): self.cost(lots[i] + lots[j]) for j in range(len(lots)) for i in range(j)}
            pairs = pair_up(len(lots), costs)
            lots = [tuple(sorted(lots[i] + lots[j])) for i, j in pairs]
        return sorted(lots)


def pair_up(n: int, costs: Mapping[tuple[int, int], float]) -> list[tuple[int, int]]:
    """The pairs (i < j) of n things, an even number, that cost least together; of many things, the cheapest first."""
    if n <= _EXHAUSTIVE:
        return _try_all(tuple(range(n)), costs)[1]
    left, pairs = set(range(n)), []
    for i, j in sorted(costs, key=lambda pair: costs[pair]):
        if {i, j} <= left:
            left -= {i, j}
            pairs.append((i, j))
    return pairs


def _try_all(left: tuple[int, ...], costs: Mapping[tuple[int, int], float]) -> tuple[float, list[tuple[int, int]]]:
    if not left:
        return 0.0, []
    first, *rest = left
    found = []
    for other in rest:
        cost, pairs = _try_all(tuple(x for x in rest if x != other), costs)
        found.append((cost + costs[first, other], [(first, other), *pairs]))
    return min(found)
