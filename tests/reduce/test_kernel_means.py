"""k-means on inner products: the distances are those of the points, the clusters as good as scikit-learn's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from intrafusion.reduce import kernel_means, targets
from intrafusion.reduce.kernel_means import cluster_by_products, multiply_all
from intrafusion.reduce.targets import k_means


def points(n: int, d: int, kind: str = "random", seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    if kind == "random":
        return draw(n, d)
    if kind == "low rank":
        return draw(n, 6) @ draw(6, d) + 0.3 * draw(n, d)
    return draw(n // 3, d)[torch.randint(n // 3, (n,), generator=generator)] + 0.4 * draw(n, d)


def scatter(x: Tensor, labels: Tensor, weights: Tensor | None = None) -> float:
    """Sum of squared distances to the means of the clusters."""
    weights = torch.ones(len(x)).double() if weights is None else weights
    total = 0.0
    for c in labels.unique():
        own, mass = x[labels == c], weights[labels == c][:, None]
        total += float((mass * (own - (mass * own).sum(0) / mass.sum()).square()).sum())
    return total


@pytest.mark.parametrize("kind", ["random", "low rank", "clusters"])
def test_the_inertia_is_within_a_percent_of_scikit_learns(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, expected = 0.0, 0.0
    for seed in range(3):
        x = points(400, 24, kind, seed)
        monkeypatch.setattr(targets, "WIDE", 1024)
        expected += scatter(x, k_means(x, 200, n_init=10, seed=seed))
        monkeypatch.setattr(targets, "WIDE", 100)
        found += scatter(x, k_means(x, 200, n_init=10, seed=seed))
    assert found <= 1.01 * expected


def test_distances_and_nearest_centres_are_those_of_the_points() -> None:
    x, m = points(60, 9) + 5, 12
    weights = torch.arange(1.0, 61).double()
    labels = torch.arange(60) % m
    found, nearest = kernel_means._measure(multiply_all(x, weights), weights, labels, m)
    centres = torch.stack([(weights[labels == c, None] * x[labels == c]).sum(0) for c in range(m)])
    centres = centres / torch.stack([weights[labels == c].sum() for c in range(m)])[:, None]
    squares = torch.cdist(x, centres).square()
    size = (x - weights @ x / weights.sum()).abs().max().square()  # the points are scaled
    torch.testing.assert_close(found.double() * size, squares[torch.arange(60), labels], rtol=1e-4, atol=1e-4)
    assert torch.equal(nearest, squares.argmin(1))


@pytest.mark.parametrize("m", [1, 2, 20, 39, 40])
@pytest.mark.parametrize("n_init", [1, 3])
def test_no_cluster_is_empty(m: int, n_init: int) -> None:
    for x in (points(40, 3), points(40, 90), 1e-6 * points(40, 2), points(40, 2) + 1e6):
        labels = cluster_by_products(x, torch.ones(40), m, seed=0, n_init=n_init)
        assert torch.bincount(labels, minlength=m).min() >= 1
        assert len(torch.bincount(labels)) == m


def test_few_points_find_the_best_clusters() -> None:
    x = 10 * points(5, 4)[torch.arange(30) % 5] + 0.1 * points(30, 4, seed=1)
    labels = cluster_by_products(x, torch.ones(30), 5, seed=0, n_init=3)
    assert all(len(labels[torch.arange(30) % 5 == c].unique()) == 1 for c in range(5))


def test_weights_count_as_copies_do() -> None:
    x, times = torch.tensor([[0.0], [1.0], [2.1]]).double(), torch.tensor([1, 1, 50])
    labels = cluster_by_products(x, times, 2, seed=0, n_init=3)
    assert labels[0] == labels[1] != labels[2]


def test_the_order_of_the_points_and_copies_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(targets, "WIDE", 10)
    x = points(30, 4).repeat(2, 1)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    together = lambda labels: labels[:, None] == labels  # noqa: E731
    expected = together(k_means(x, 12))
    assert expected[:30, 30:].diagonal().all()
    assert torch.equal(together(k_means(x[order], 12)), expected[order][:, order])


@pytest.mark.parametrize(("n", "starts"), [(30, 10), (60, 10), (120, 5), (800, 1)])
def test_more_points_take_fewer_starts(n: int, starts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_means, "_ALL_STARTS", 60)
    seen: list[int] = []
    own = kernel_means._start

    def start(*given: object) -> Tensor:
        seen.append(1)
        return own(*given)  # type: ignore[arg-type]

    monkeypatch.setattr(kernel_means, "_start", start)
    cluster_by_products(points(n, 3), torch.ones(n), 4, seed=0, n_init=10)
    assert len(seen) == starts
