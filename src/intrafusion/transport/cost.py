"""How far apart two channels are: the distance between the directions of their rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from intrafusion.arguments import Matrix, checked
from intrafusion.errors import ArgumentError

_BLOCK = 128
_LARGE = 2**36  # differences of two numbers; more are taken in float32
_TILE = 8, 64, 2048  # sources, targets and columns that stay in the cache


@checked
def unit_rows(x: Matrix) -> Tensor:
    """Rows scaled to unit l2 length; a zero row stays zero.

    >>> unit_rows(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6, 0.8], [0.0, 0.0]]
    """
    x = x.double()
    largest = x.abs().amax(dim=1, keepdim=True)
    x = x / torch.where(largest > 0, largest, 1.0)  # first to about 1, so that squares neither overflow nor vanish
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return x.div_(torch.where(length > 0, length, 1.0))


@checked
def direction_cost(x: Matrix, y: Matrix, *, p: float = 1.0) -> Tensor:
    r"""Distance between directions: C_ij = || x_i / |x_i|_2 - y_j / |y_j|_2 ||_p.

    Args:
        x: (n, d) source rows.
        y: (m, d) target rows.
        p: order of the distance, 1 <= p <= inf.
    Returns:
        (n, m) float64, finite for finite rows: the direction of a zero row is zero. Of order 1 and beyond 2^36
        differences (n m d) it is right to some 1e-6 of its largest entry, else to rounding.
    Raises:
        ArgumentError: p < 1, or the rows differ in length.
    Reference: Theus et al. 2024, section 3.2.
    """
    if not p >= 1:
        raise ArgumentError(f"p: expected 1 <= p <= inf, got {p}.")
    _check_lengths(x, y)
    x, y = unit_rows(x), unit_rows(y)
    if p == 1 and len(x) * y.numel() > _LARGE:
        return _add_differences(x, y)
    if p == 1:  # additive over columns: blocks that stay in the cache are twice as fast
        blocks = zip(x.split(_BLOCK, 1), y.split(_BLOCK, 1), strict=True)
        return sum((_distance(a, b, p) for a, b in blocks), x.new_zeros(len(x), len(y)))
    return _distance(x, y, p)


@checked
def cosine_cost(x: Matrix, y: Matrix) -> Tensor:
    r"""C_ij = 1 - <x_i, y_j> / (|x_i|_2 |y_j|_2), from 0 (one direction) to 2 (opposite); 1 for a zero row.

    Half the square of `direction_cost` with p = 2, so no metric: leaving a channel where it is need not be cheapest.

    Args:
        x: (n, d) source rows.
        y: (m, d) target rows.
    Returns:
        (n, m) float64, finite for finite rows.
    Raises:
        ArgumentError: the rows differ in length.
    """
    _check_lengths(x, y)
    return (1 - unit_rows(x) @ unit_rows(y).T).clamp(0, 2)


def _check_lengths(x: Tensor, y: Tensor) -> None:
    if x.shape[1] != y.shape[1]:
        raise ArgumentError(f"rows to compare differ in length: {x.shape[1]} and {y.shape[1]}; describe both alike.")


def _add_differences(x: Tensor, y: Tensor) -> Tensor:
    r"""sum_k |x_ik - y_jk| = 2 sum_k max(x_ik, y_jk) - sum_k (x_ik + y_jk), in float32: two passes over each tile."""
    rows, columns, depth = _TILE
    sums = x.sum(1)[:, None] + y.sum(1)
    x, y = x.float(), y.float()
    largest = x.new_zeros(len(x), len(y))
    tile = x.new_empty(rows * columns * depth)
    for start in range(0, x.shape[1], depth):
        for j in range(0, len(y), columns):
            for i in range(0, len(x), rows):
                a, b = x[i : i + rows, None, start : start + depth], y[j : j + columns, start : start + depth]
                shape = len(a), *b.shape
                found = torch.maximum(a, b, out=tile[: math.prod(shape)].view(shape))
                largest[i : i + rows, j : j + columns] += found.sum(2)
    return largest.double().mul_(2).sub_(sums).clamp_(min=0)


def _distance(x: Tensor, y: Tensor, p: float) -> Tensor:
    return torch.cdist(x.contiguous(), y.contiguous(), p=p, compute_mode="donot_use_mm_for_euclid_dist")
