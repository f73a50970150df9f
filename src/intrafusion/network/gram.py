"""Products of many rows: with themselves, float32 in, sums in float64, half multiplied once; and group by group."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CHUNK = 2**20  # entries of the inputs that are multiplied at a time
WIDE = 1024  # columns beyond which matrices are worked on by so many rows at a time, to save memory and products


def find_scale(x: Tensor) -> float:
    """The power of two just above the largest entry of x; 1 where all are zero, or one is infinite or NaN.

    Dividing by it is exact, and squares of what is left neither overflow nor vanish in float32.
    """
    largest = max(abs(float(end)) for end in torch.aminmax(x)) if x.numel() else 0.0
    return math.ldexp(1.0, math.frexp(largest)[1]) if 0 < largest < math.inf else 1.0


def divide(x: Tensor, unit: float, dtype: torch.dtype) -> Tensor:
    """x (..., n, n) / unit in another precision, without a copy of all in its own."""
    found = torch.empty_like(x, dtype=dtype)
    for part, own in zip(found.split(WIDE, -2), x.split(WIDE, -2), strict=True):
        part.copy_(own / unit)
    return found


def square_rows(x: Tensor) -> Tensor:
    """x^T x, multiplied in its precision chunk by chunk, summed in float64.

    Of what is the same on both sides of the diagonal, half is multiplied once.
    """
    total = x.new_zeros(x.shape[1], x.shape[1], dtype=torch.float64)
    size = max(1, CHUNK // max(1, min(x.shape[1], WIDE)))
    for rows in x.split(size):
        add_square_(total, rows)
    return mirror_(total)


def add_square_(total: Tensor, x: Tensor) -> None:
    """Add x^T x to a float64 matrix, but for its lower left quarter, which `mirror_` fills in the end."""
    half = x.shape[1] // 2
    total[:half] += x[:, :half].T @ x
    total[half:, half:] += x[:, half:].T @ x[:, half:]


def mirror_(total: Tensor) -> Tensor:
    """The lower left quarter as the upper right one."""
    half = len(total) // 2
    total[half:, :half] = total[:half, half:].T
    return total


def square_transposed(x: Tensor) -> Tensor:
    """x x^T in its precision, of x (..., n, k); of wide ones half is multiplied once."""
    return x @ x.mT if x.shape[-2] <= WIDE else _multiply_symmetric(x, x.mT)


def square_columns(x: Tensor) -> Tensor:
    """x x^T of x (n, k), multiplied in float32 in units in which its entries fit; float64."""
    scale = find_scale(x)
    return square_transposed((x / scale).float()).double().mul_(scale**2)


def multiply_between(c: Tensor, q: Tensor) -> Tensor:
    """c q c (p, n, n) for symmetric c (p, n, n) and q (n, n); of wide ones half of the second product is made."""
    return c @ q @ c if len(q) <= WIDE else _multiply_symmetric(c @ q, c)


def _multiply_symmetric(x: Tensor, y: Tensor) -> Tensor:
    """x (..., n, k) @ y (..., k, n), known to be symmetric."""
    found = x.new_empty(*x.shape[:-1], x.shape[-2])
    for start in range(0, x.shape[-2], WIDE):
        rows = slice(start, start + WIDE)
        block = x[..., rows, :] @ y[..., start:]
        found[..., rows, start:], found[..., start:, rows] = block, block.mT
    return found


def multiply_by_group(rows: Tensor, matrix: Tensor) -> Tensor:
    """What each of g groups of outputs is made of the inputs of its own group: (k, c) of rows (g, k, d) and (c, d).

    Rows (k, d) are those of all outputs.
    """
    if rows.dim() < 3:
        return rows @ matrix.T
    own = matrix.unflatten(0, (len(rows), -1))
    return (rows @ own.mT).transpose(0, 1).flatten(1)
