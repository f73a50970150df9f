"""Greedy choice of channels one after another, each taken out of two matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from intrafusion.network.gram import WIDE

BLOCK = 32  # picks after which the matrices are brought up to date; twice as many where they are wide
_SPAN = 1024  # picks after which those that were picked are dropped from the matrices


def sweep(c: Tensor, r: Tensor, shares: Tensor, m: int, *, floor: float, least: bool = False) -> tuple[Tensor, Tensor]:
    r"""Pick m of n channels, each the one with the largest (or `least`) R_jj / C_jj, summed over the points.

    A pick j with u = C_:j / sqrt(C_jj) and v = R_:j / sqrt(C_jj) - R_jj / (2 C_jj) u turns

        C  into  C - u u^T    and    R  into  R - u v^T - v u^T.

    Their diagonals follow every pick; the matrices follow `BLOCK` picks at once, and a column needed in between is made
    up for those of its block. Of wide matrices, which are symmetric, the part below the blocks on the diagonal is left
    behind. Every `_SPAN` picks the matrices move together over what was picked. O(p n^2 m), in the precision of what is
    given. In place.

    Args:
        c: (p, n, n), one for each point, positive semi-definite.
        r: (p, n, n), positive semi-definite.
        shares: weights of the points (p,).
        floor: a channel with less than this fraction of its C_jj left counts 0 and takes nothing out.
    Returns:
        channels in the order of picking (m,), and the sums that they had (m,), float64.
    """
    values, gains = (matrix.diagonal(dim1=1, dim2=2).clone() for matrix in (c, r))
    # The diagonals alone decide a pick, O(p n) each; a channel whose variance is used up would divide noise by noise.
    known = (floor * values).clamp(min=torch.finfo(c.dtype).tiny)
    channels = torch.arange(c.shape[1], device=c.device)
    order, found = list[int](), list[float]()
    while True:
        picked, sums = _sweep_some(c, r, (values, gains, known), shares, min(m - len(order), _SPAN), least=least)
        order += channels[picked].tolist()
        found += sums
        if len(order) == m:
            return torch.tensor(order), torch.tensor(found, dtype=torch.float64)
        left = torch.ones_like(channels, dtype=torch.bool).index_fill_(0, torch.tensor(picked, device=c.device), 0)
        kept = left.nonzero()[:, 0]
        c, r, channels = _move_together(c, kept), _move_together(r, kept), channels[kept]
        values, gains, known = values[:, kept], gains[:, kept], known[:, kept]


def _sweep_some(
    c: Tensor, r: Tensor, diagonals: tuple[Tensor, Tensor, Tensor], shares: Tensor, m: int, *, least: bool
) -> tuple[list[int], list[float]]:
    """Some picks, and their sums; all that is given is as if they had been taken out, if m is `_SPAN`."""
    (values, gains, known), block = diagonals, min(BLOCK if c.shape[1] <= WIDE else 2 * BLOCK, _SPAN)
    order, found, taken = list[int](), list[float](), torch.zeros_like(values[0], dtype=torch.bool)
    us, vs = c.new_zeros(2, len(c), block, c.shape[1])
    for index in range(m):
        # Rounding may leave a gain below zero, where there is none.
        gain = shares @ torch.where(values > known, gains.clamp(min=0) / torch.maximum(values, known), 0.0)
        left = gain.masked_fill_(taken, torch.inf if least else -1.0)
        best = int(left.argmin() if least else left.argmax())
        taken[best] = True
        found.append(float(gain[best]))
        order.append(best)
        # Column `best` of C and R as they are now: the matrices as of the last whole block, less the picks since then.
        at = index % block
        u, v, value, floored = us[:, :at], vs[:, :at], values[:, best, None], known[:, best, None]
        scale = torch.where(value > floored, torch.maximum(value, floored).rsqrt(), 0.0)  # 0: nothing is learnt
        u_best, v_best = u[:, None, :, best], v[:, None, :, best]
        column = scale * (_take_column(c, best) - (u_best @ u)[:, 0])
        half = scale * (_take_column(r, best) - (v_best @ u + u_best @ v)[:, 0])
        half -= gains[:, best, None] / 2 * scale**2 * column
        us[:, at], vs[:, at] = column, half
        # The rank-one terms of the docstring, on the diagonal: (u u^T)_ii = u_i^2, (u v^T + v u^T)_ii = 2 u_i v_i.
        values -= column.square()
        gains -= 2 * column * half
        if at + 1 == block:  # many rank-one updates as one matrix product: memory is passed over once instead
            _subtract_(c, us, us)
            _subtract_(r, torch.cat([us, vs], dim=1), torch.cat([vs, us], dim=1))
    return order, found


def _subtract_(matrices: Tensor, x: Tensor, y: Tensor) -> None:
    """Take x^T y, which is symmetric, from matrices (p, n, n); of wide ones only from the diagonal blocks on.

    Args:
        x, y: (p, k, n).
    """
    for start in range(0, matrices.shape[1], WIDE):
        rows = slice(start, start + WIDE)
        matrices[:, rows, start:].baddbmm_(x[:, :, rows].mT, y[:, :, start:], alpha=-1)


def _take_column(matrices: Tensor, index: int) -> Tensor:
    """One column (p, n) of such matrices, by what is up to date of it."""
    start = index // WIDE * WIDE
    return torch.cat([matrices[:, :start, index], matrices[:, index, start:]], 1) if start else matrices[:, index]


def _move_together(matrices: Tensor, kept: Tensor) -> Tensor:
    """Rows and columns of such matrices that are kept (k,), ascending, as (p, k, k) in the same memory."""
    size = len(kept)
    flat = matrices.contiguous().view(-1)
    matrices, moved = flat.view(matrices.shape), flat[: len(matrices) * size**2].view(len(matrices), size, size)
    for index, matrix in enumerate(matrices):
        # A row never lands behind where it was, so none is written over that is needed.
        for start in range(0, size, WIDE):
            rows = slice(start, start + WIDE)
            block = matrix[kept[rows]][:, kept[start:]]
            own = block[:, : len(block)]  # in it rows of two blocks may meet; above its diagonal it is up to date
            own.copy_(own.triu() + own.triu(1).mT)
            moved[index, rows, start:] = block
    return moved
