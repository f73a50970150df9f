"""Centres of the channels' rows: k-means and Gaussian mixtures. Only this file imports scikit-learn."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from intrafusion.errors import BudgetError
from intrafusion.reduce.kernel_means import cluster_by_products

WIDE = 1024  # different points; more are clustered by their inner products


def k_means(points: Tensor, m: int, *, seed: int = 0, n_init: int = 4) -> Tensor:
    """Which of m clusters each point belongs to; no cluster is empty.

    Points that are equal stay together where m allows it: then, and if there are at most m different ones, nothing is
    lost. The order of the points does not matter.

    Args:
        points: (n, d), compared by Euclidean distance.
        m: clusters, 1 <= m <= n.
        seed: of the k-means++ starts.
        n_init: starts, of which the best is taken.
    Returns:
        (n,) numbers 0..m-1, in the order in which the clusters first appear.
    Raises:
        BudgetError: m is not in 1..n.
    Reference: Lloyd 1982; Arthur and Vassilvitskii 2007 (k-means++); scikit-learn's KMeans, and beyond `WIDE` different
        points the same algorithm on their inner products, see `cluster_by_products`.
    """
    _check_cluster_count(points, m)
    distinct, owner, times = torch.unique(points.double(), dim=0, return_inverse=True, return_counts=True)
    if len(distinct) > max(m, WIDE):
        owner = cluster_by_products(distinct, times, m, seed=seed, n_init=n_init)[owner]
    elif len(distinct) > m:
        from sklearn.cluster import KMeans

        method = KMeans(n_clusters=m, n_init=n_init, random_state=seed)  # pyright: ignore[reportArgumentType]
        found = method.fit(coordinates(distinct).cpu().numpy(), sample_weight=times.cpu().numpy())
        owner = torch.as_tensor(found.labels_, dtype=torch.long, device=points.device)[owner]
    return _number_clusters(_fill_empty(points.double(), owner, m))


def gaussian_mixture(points: Tensor, m: int, *, seed: int = 0, n_init: int = 1) -> tuple[Tensor, Tensor]:
    """Which of m spherical Gaussians each point most likely came from, and their means; none is without points.

    Args:
        points: (n, d).
        m: components, 1 <= m <= n.
        seed: of the k-means start of the expectation maximisation.
        n_init: starts, of which the best is taken.
    Returns:
        (n,) numbers 0..m-1 in the order in which they first appear, and means (m, d), float64.
    Raises:
        BudgetError: m is not in 1..n.
    Reference: scikit-learn's GaussianMixture; Theus et al. 2024, Algorithm 2 (cluster centroids).
    """
    _check_cluster_count(points, m)
    points = points.double()
    distinct, owner = torch.unique(points, dim=0, return_inverse=True)
    shares = None
    if len(distinct) > m:
        from sklearn.exceptions import ConvergenceWarning
        from sklearn.mixture import GaussianMixture

        order = torch.argsort(owner, stable=True)  # the same for any order of the points
        at = coordinates(points[order])
        at = (at / at.square().mean().sqrt().clamp(min=1e-300)).cpu().numpy()
        method = GaussianMixture(m, covariance_type="spherical", n_init=n_init, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # centres need not be the likeliest
            sorted_shares = torch.as_tensor(method.fit(at).predict_proba(at), dtype=torch.float64).to(points.device)
        shares = torch.empty_like(sorted_shares)
        shares[order] = sorted_shares
        owner = shares.argmax(1)
    labels = _fill_empty(points, owner, m)
    own = torch.nn.functional.one_hot(labels, m).double()
    if shares is not None:  # a component that no point was likeliest from is the mean of what it was filled with
        present = torch.bincount(owner, minlength=m) > 0
        own = torch.where(present, shares, own)
    means = own.T @ points / own.sum(0)[:, None]
    order = _first_appearance(labels)
    return _number_clusters(labels), means[order]


def _check_cluster_count(points: Tensor, m: int) -> None:
    if not 1 <= m <= len(points):
        raise BudgetError(f"cannot make {m} clusters of {len(points)} channels; expected 1 <= m <= {len(points)}.")


def coordinates(points: Tensor) -> Tensor:
    """The same distances in at most as many dimensions as there are points."""
    centred = points - points.mean(0)
    if centred.shape[1] <= len(centred):
        return centred
    values, vectors = torch.linalg.eigh(centred @ centred.T)
    return vectors * values.clamp(min=0).sqrt()


def _fill_empty(points: Tensor, labels: Tensor, m: int) -> Tensor:
    """Every empty cluster gets the point that lies farthest from the centre of its own, of those that are not alone."""
    labels = labels.clone()
    sizes = torch.bincount(labels, minlength=m)
    for empty in (sizes == 0).nonzero().flatten().tolist():
        member = torch.nn.functional.one_hot(labels, m).double()
        sizes = member.sum(0)
        centres = member.T @ points / sizes.clamp(min=1)[:, None]
        distance = (points - centres[labels]).square().sum(1)
        labels[torch.where(sizes[labels] > 1, distance, -1.0).argmax()] = empty
    return labels


def _first_appearance(labels: Tensor) -> Tensor:
    """Numbers of the clusters in the order in which they first appear."""
    return torch.tensor(list(dict.fromkeys(labels.tolist())), dtype=torch.long, device=labels.device)


def _number_clusters(labels: Tensor) -> Tensor:
    return torch.argsort(_first_appearance(labels))[labels]
