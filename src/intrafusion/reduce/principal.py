"""The best few directions of channels between which and their readers nothing but linear maps lies."""

from __future__ import annotations

import torch
from torch import Tensor

from intrafusion.errors import BudgetError
from intrafusion.network.gram import find_scale
from intrafusion.reduce.problem import Moments, ReductionMap

_NOTHING = 1e-10  # directions with less than this share of the largest variance hold nothing


def principal_map(moments: Moments, m: int) -> ReductionMap:
    r"""The map of rank m that changes least of what the readers give.

    With C the covariance of the channels h, mu their mean, and Q the sum of W_c^T W_c over the readers,

        min_{M, U}  tr Q (I - U M) C (I - U M)^T,     svd(Q^1/2 C^1/2) = E S V^T,

        M = V_m^T C^-1/2,   U = C^1/2 V_m,   s = mu - U M mu,

    and the error is the sum of the squares of the other S. Rows of M are scaled to the length 1, columns of U
    against it. For queries and keys, C is the second moment of the queries, Q that of the keys, and mu is zero.

    Args:
        m: directions to keep.
    Raises:
        BudgetError: m is not in 1..n.
    Reference: Eckart and Young 1936, with the weights of both sides.
    """
    n = len(moments.reader)
    if not 1 <= m <= n:
        raise BudgetError(f"cannot keep {m} of {n} channels; expected 1 <= m <= {n}.")
    mean, covariance = moments.overall
    root, inverse = _take_roots(covariance)
    reader, _ = _take_roots(moments.reader)
    _, _, directions = torch.linalg.svd(reader @ root)
    kept = directions[:m]
    merge, unmerge = kept @ inverse, root @ kept.T
    length = merge.norm(dim=1, keepdim=True)
    length = torch.where(length > 0, length, 1.0)
    merge, unmerge = merge / length, unmerge * length.T
    return ReductionMap(merge, unmerge.contiguous(), mean - unmerge @ (merge @ mean))


def list_losses(moments: Moments) -> Tensor:
    """The share of the readers' signal that is lost when the first k directions are kept, for k = 0..n; float64."""
    root, _ = _take_roots(moments.overall[1])
    reader, _ = _take_roots(moments.reader)
    squares = torch.linalg.svdvals(reader @ root).square()
    left = squares.sum() - torch.cat([squares.new_zeros(1), squares.cumsum(0)])
    return left.clamp(min=0) / squares.sum().clamp(min=1e-300)


def _take_roots(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A positive semi-definite matrix to the powers 1/2 and -1/2, the latter where it has anything."""
    unit = find_scale(matrix)
    values, vectors = torch.linalg.eigh(matrix.double() / unit)
    values = values.clamp(min=0)
    alive = values > _NOTHING * values.max()
    roots = values.sqrt()
    inverse = torch.where(alive, 1 / roots.clamp(min=1e-300), 0.0)
    size = float(unit) ** 0.5
    return (vectors * roots) @ vectors.T * size, (vectors * inverse) @ vectors.T / size
