"""The principal directions of a stream of channels that only norms and linear maps see."""

from __future__ import annotations

import torch
from torch import Tensor

from intrafusion.errors import BudgetError
from intrafusion.network.gram import find_scale
from intrafusion.reduce.problem import Moments, ReductionMap

_ROUNDING = 1e-10  # of the largest energy: what rounding in float32 leaves in directions that hold nothing


def rotation_map(moments: Moments, m: int, *, centred: bool) -> ReductionMap:
    r"""Rotate n channels and keep the directions in which what is read of them is largest.

    With S the mean over the readers of E[h h^T] / E[h^T h], h what a norm gives before its gain, or what a reader
    without a norm reads, and P its r leading eigenvectors, V = P and r = m where the norms are RMS norms. A LayerNorm
    takes off the mean: with 1 the vectors of ones, of length 1, S is centred, r = m - 1, and V = E P + 1_m 1_n^T, E an
    isometry into the vectors of R^m with sum zero. With s = tr(P S P^T) / tr(S), over the norms alone, the share of
    the energy that is kept,

        M = c V,    U = V^T / c,    c^2 = m / (n s),

    so that a norm over m channels divides by what that over n channels divided by, its eps included. Directions in
    which S has nothing but rounding are filled up with fixed ones, so that they are no matter of rounding.

    Args:
        moments: of what the norms give, see `Moments.bare`.
        centred: whether there is a LayerNorm.
    Raises:
        BudgetError: m is not in 1..n.
    Reference: Ashkboos et al. 2024 (SliceGPT); one rotation for all layers, the constant c, and LayerNorms that stay
        such are OURS.
    """
    n = len(moments.reader)
    if not 1 <= m <= n:
        raise BudgetError(f"cannot keep {m} of {n} channels; expected 1 <= m <= {n}.")
    second = _take_second(moments, centred=centred)
    _, vectors = _find_directions(second, centred=centred)
    r = m - 1 if centred else m
    kept = vectors[:, :r].T
    seen = second[: len(second) - moments.plain].mean(0)
    share = float((kept @ seen * kept).sum() / seen.trace().clamp(min=1e-300))
    if centred:
        ones = kept.new_full((m, 1), m**-0.5)
        kept = torch.linalg.svd(ones.T)[2][1:].T @ kept + ones * n**-0.5
    c = (m / (n * share)) ** 0.5 if share > 0 else 1.0
    return ReductionMap(c * kept, (kept.T / c).contiguous())


def list_rotation_losses(moments: Moments, *, centred: bool) -> Tensor:
    """The share of the readers' signal that is lost where k channels are kept, for k = 0..n; float64."""
    values, vectors = _find_directions(_take_second(moments, centred=centred), centred=centred)
    signal = values * ((vectors.T @ moments.reader / find_scale(moments.reader)) * vectors.T).sum(1)
    left = signal.flip(0).cumsum(0).flip(0)
    left = torch.cat([left[:1], left]) if centred else torch.cat([left, left.new_zeros(1)])
    return left / left[0].clamp(min=1e-300)


def _take_second(moments: Moments, *, centred: bool) -> Tensor:
    """Second moments at each point (p, n, n), of trace 1 or 0, without the mean over the channels if `centred`."""
    second = moments.covariances + moments.means[:, :, None] * moments.means[:, None, :]
    if centred:
        second = second - second.mean(1, keepdim=True)
        second = second - second.mean(2, keepdim=True)
    total = second.diagonal(dim1=1, dim2=2).sum(1)
    total = torch.where(total > 0, total, 1.0)
    return second / total[:, None, None]


def _find_directions(second: Tensor, *, centred: bool) -> tuple[Tensor, Tensor]:
    """Energies in descending order, and the directions, as columns; the last one is that of the mean if `centred`.

    Args:
        second: (p, n, n), see `_take_second`.
    """
    mean, n = second.mean(0), second.shape[-1]
    if centred:  # below all others
        mean = mean - torch.full_like(mean, 1 / n)
    values, vectors = torch.linalg.eigh((mean + mean.T) / 2)
    values, vectors = values.flip(0), vectors.flip(1)
    alive = int((values > _ROUNDING * values[0].clamp(min=0)).sum())
    rest = _fill_up(vectors[:, :alive], n - centred - alive, vectors[:, n - centred :])
    vectors = torch.cat([vectors[:, :alive], rest, vectors[:, n - centred :]], 1)
    return torch.where(torch.arange(n, device=values.device) < alive, values, 0.0), vectors


def _fill_up(held: Tensor, count: int, last: Tensor) -> Tensor:
    """Directions (n, count) at right angles to these: always the same but for rounding."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(len(held), count, generator=generator, dtype=torch.float64).to(held)
    both = torch.cat([held, last], 1)
    for _ in range(2):  # once more, as what is left may be small beside what is taken off
        drawn = torch.linalg.qr(drawn - both @ (both.T @ drawn))[0]
    return drawn
