"""Clusters: as good as an exhaustive search finds, never empty, the same for any order."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from intrafusion.errors import BudgetError
from intrafusion.reduce.targets import coordinates, gaussian_mixture, k_means


def points(n: int, d: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scatter(x: Tensor, labels: Tensor) -> float:
    """Sum of squared distances to the means of the clusters."""
    return sum(float((x[labels == c] - x[labels == c].mean(0)).square().sum()) for c in labels.unique())


@pytest.mark.parametrize(("n", "m"), [(7, 2), (7, 3), (6, 4)])
def test_k_means_finds_the_best_of_all_partitions(n: int, m: int) -> None:
    x = points(n)
    every = (torch.tensor(p) for p in itertools.product(range(m), repeat=n))
    best = min(scatter(x, p) for p in every if len(p.unique()) == m)
    labels = k_means(x, m, n_init=20)
    assert scatter(x, labels) == pytest.approx(best)
    assert labels[0] == 0
    assert list(dict.fromkeys(labels.tolist())) == list(range(m))


@pytest.mark.parametrize("m", [1, 2, 4, 6, 9, 10])
@pytest.mark.parametrize("method", [k_means, lambda x, m: gaussian_mixture(x, m)[0]])
def test_no_cluster_is_ever_empty(m: int, method) -> None:
    for x in (points(10), torch.zeros(10, 2), points(10).round(), points(3).repeat(4, 1)[:10], points(10, 40) * 1e-9):
        labels = method(x, m)
        assert torch.bincount(labels, minlength=m).min() >= 1
        assert len(labels) == 10
        assert int(labels.max()) == m - 1


@pytest.mark.parametrize("method", [k_means, lambda x, m, **o: gaussian_mixture(x, m, **o)[0]])
def test_equal_points_stay_together(method) -> None:
    x = points(6).repeat(3, 1)
    for seed in range(5):
        labels = method(x, 6, seed=seed).reshape(3, 6)
        assert torch.equal(labels, labels[:1].expand(3, 6))
        assert sorted(labels[0].tolist()) == list(range(6))


def test_more_equal_points_weigh_more() -> None:
    x = torch.tensor([0.0, 1.0, 1.9])[[0] * 50 + [1] * 2 + [2] * 2][:, None]
    assert k_means(x, 2).unique_consecutive().tolist() == [0, 1]
    x = torch.tensor([0.0, 1.0, 2.1])[[0] + [1] + [2] * 50][:, None]
    assert k_means(x, 2).unique_consecutive().tolist() == [0, 1]
    x = torch.tensor([0.0, 1.0, 2.1])[[0] * 9 + [1] * 50 + [2]][:, None]
    labels = k_means(x, 2)
    assert labels[0] != labels[9] == labels[-1]


def test_means_of_a_mixture_are_those_of_its_points() -> None:
    centres = 20 * points(4, 5, seed=2)
    owner = torch.arange(4).repeat(6)
    x = centres[owner] + 0.1 * points(24, 5)
    labels, means = gaussian_mixture(x, 4)
    assert labels.tolist() == owner.tolist()
    torch.testing.assert_close(means, torch.stack([x[owner == c].mean(0) for c in range(4)]))


def test_scale_does_not_matter_to_a_mixture() -> None:
    x = points(30, 6)
    assert torch.equal(gaussian_mixture(x * 1e-6, 5)[0], gaussian_mixture(x, 5)[0])


@pytest.mark.parametrize(("n", "d"), [(5, 40), (40, 5), (6, 6)])
def test_coordinates_keep_the_distances(n: int, d: int) -> None:
    x = points(n, d)
    found = coordinates(x)
    assert found.shape[1] <= min(n, d)
    torch.testing.assert_close(torch.cdist(found, found), torch.cdist(x, x), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("m", [0, 4])
def test_impossible_sizes(m: int) -> None:
    for method in (k_means, gaussian_mixture):
        with pytest.raises(BudgetError, match=f"cannot make {m} clusters of 3 channels"):
            method(points(3), m)


def test_importing_does_not_import_scikit_learn() -> None:
    code = "import sys, intrafusion.reduce; assert 'sklearn' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
