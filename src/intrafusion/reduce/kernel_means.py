"""k-means that looks at inner products only: an iteration costs O(n^2), however long the rows are."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from intrafusion.network.gram import square_transposed

_ALL_STARTS = 2048  # points up to which every start is made
_MOST = 300  # iterations, as scikit-learn's
_ROWS = 1024  # points that are looked at at a time


def cluster_by_products(points: Tensor, weights: Tensor, m: int, *, seed: int, n_init: int) -> Tensor:
    r"""Which of m clusters each of n different points belongs to; no cluster is empty.

    With G the inner products of the centred points, a cluster k of points of the weights w and the sum W_k of them, and
    c_k its centre,

        |x_i - c_k|^2 = G_ii - 2 s_ki + sum_(j in k) w_j s_kj / W_k,    s_ki = sum_(j in k) w_j G_ji / W_k,

    so G, O(n^2 d) once, is all that starts (greedy k-means++) and iterations (Lloyd's) need: O(n m log m) and O(n^2)
    each, where they would take O(n m d log m) and O(n m d). G is float32: squared distances are off by some 1e-6 of the
    squared length of the points, and so is the inertia.

    Args:
        points: (n, d), all different.
        weights: (n,) > 0.
        m: clusters, 1 <= m <= n.
        n_init: starts, of which the best is taken; beyond 2,048 points fewer, n_init * 2048 / n, as the inertia of one
            start varies by less and less.
    Returns:
        (n,) numbers 0..m-1.
    Reference: Dhillon, Guan and Kulis 2004 (kernel k-means); Arthur and Vassilvitskii 2007.
    """
    products, weights = multiply_all(points, weights).cpu(), weights.double().cpu()
    generator = np.random.default_rng(seed)
    best, least = torch.arange(len(points)) % m, math.inf
    for _ in range(max(1, min(n_init, n_init * _ALL_STARTS // len(points)))):
        found, inertia = _iterate(products, weights, _start(products, weights, m, generator), m)
        if inertia < least:
            best, least = found, inertia
    return best.to(points.device)


def multiply_all(points: Tensor, weights: Tensor) -> Tensor:
    """Inner products of the points less their mean, (n, n) float32."""
    points = points.double()
    mean = weights.double() @ points / weights.sum()
    centred = torch.empty_like(points, dtype=torch.float32)
    for rows, own in zip(centred.split(_ROWS), points.split(_ROWS), strict=True):
        rows.copy_(own - mean)  # no second copy of all in float64
    centred /= centred.abs().max().clamp(min=1e-30)
    return square_transposed(centred)


def _start(products: Tensor, weights: Tensor, m: int, generator: np.random.Generator) -> Tensor:
    """Labels (n,) by the nearest of m points, each the best of a few that are drawn by distance from the others.

    By NumPy: the operations are small and many, and waiting for a second thread would cost more than they do.
    """
    inner, counts, tries = products.numpy(), weights.numpy(), 2 + int(math.log(m))
    lengths, at = inner.diagonal(), generator.choice(len(counts), 1, p=counts / counts.sum())
    nearest, seeds = np.full(len(counts), np.inf, np.float32), list[int]()
    while True:
        left = lengths + lengths[at, None] - 2 * inner[at]
        left = np.maximum(np.minimum(left, nearest), 0)
        best = int((left * counts).sum(1).argmin())
        nearest = left[best]
        nearest[at[best]] = 0
        seeds.append(int(at[best]))
        if len(seeds) == m:
            return _find_nearest(products, torch.tensor(seeds))
        mass = np.cumsum(nearest * counts)
        drawn = generator.random(tries) * mass[-1]
        at = np.searchsorted(mass, drawn, side="right").clip(max=len(mass) - 1)


def _find_nearest(products: Tensor, seeds: Tensor) -> Tensor:
    """Which seed is nearest to each point; a seed that is drawn twice leaves a cluster empty."""
    lengths = products.diagonal()[seeds]
    labels = torch.cat([(lengths - 2 * rows[:, seeds]).argmin(1) for rows in products.split(_ROWS)])
    return labels.index_copy_(0, seeds, torch.arange(len(seeds)))


def _iterate(products: Tensor, weights: Tensor, labels: Tensor, m: int) -> tuple[Tensor, float]:
    """Labels that an iteration makes no better, and their inertia."""
    labels, best, least = _fill(labels, torch.zeros(len(labels)), m), labels, math.inf
    for _ in range(_MOST):
        distances, nearest = _measure(products, weights, labels, m)
        inertia = float(distances.double() @ weights)
        if not inertia < least:
            break
        best, least = labels, inertia
        labels = _fill(nearest, distances, m)
    return best, least


def _measure(products: Tensor, weights: Tensor, labels: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Squared distances of the points from their own centres (n,), and which centre is nearest to each."""
    each, ones = torch.arange(len(labels)), torch.zeros(m, dtype=torch.float64)
    shares = weights / ones.index_add(0, labels, weights)[labels]
    places = torch.stack([labels, each])
    means = torch.sparse_coo_tensor(places, shares.float(), (m, len(labels)), check_invariants=False)
    sums = torch.sparse.mm(means, products)  # s of the docstring, (m, n)
    own = sums[labels, each].double()
    squares = ones.index_add(0, labels, shares * own)
    distances = products.diagonal() - 2 * own + squares[labels]
    return distances.clamp(min=0), sums.mul_(-2).add_(squares[:, None]).argmin(0)


def _fill(labels: Tensor, distances: Tensor, m: int) -> Tensor:
    """Every empty cluster gets the point that lies farthest from the centre of its own, of those that are not alone."""
    labels, sizes = labels.clone(), torch.bincount(labels, minlength=m)
    for empty in (sizes == 0).nonzero().flatten().tolist():
        at = int(torch.where(sizes[labels] > 1, distances, -1.0).argmax())
        sizes[labels[at]] -= 1
        labels[at], sizes[empty] = empty, 1
    return labels
