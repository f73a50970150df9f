"""Products of many rows: with themselves, float32 in, sums in float64, half multiplied once; and group by group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 2**20  # entries of the inputs that are multiplied at a time


def find_scale(x: Tensor) -> float:
    """The power of two just above the largest entry of x; 1 where all are zero, or one is infinite or NaN.

    Dividing by it is exact, and squares of what is left neither overflow nor vanish in float32.
    """
    largest = float(x.abs().max()) if x.numel() else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1]) if 0 < largest < math.inf else 1.0


def multiply_rows(x: Tensor, y: Tensor) -> Tensor:
    """x^T y for rows of both, multiplied in their precision chunk by chunk, summed in float64."""
    size = max(1, CHUNK // max(1, x.shape[1]))
    total = x.new_zeros(x.shape[1], y.shape[1], dtype=torch.float64)
    for left, right in zip(x.split(size), y.split(size), strict=True):
        total += left.T @ right
    return total


def square_rows(x: Tensor) -> Tensor:
    """x^T x likewise; of what is the same on both sides of the diagonal, half is multiplied once."""
    half = x.shape[1] // 2
    upper, lower = multiply_rows(x[:, :half], x), multiply_rows(x[:, half:], x[:, half:])
    return torch.cat([upper, torch.cat([upper[:, half:].T, lower], dim=1)])


def multiply_by_group(rows: Tensor, matrix: Tensor) -> Tensor:
    """What each of g groups of outputs is made of the inputs of its own group: (k, c) of rows (g, k, d) and (c, d)."""
    own = matrix.unflatten(0, (len(rows), -1))
    return (rows @ own.mT).transpose(0, 1).flatten(1)
