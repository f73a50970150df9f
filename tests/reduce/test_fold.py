"""Folding: means in, sums out, exact on duplicates."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor

from intrafusion.reduce import Fold, ReductionProblem, cluster_map, get_reducer
from intrafusion.reduce.targets import k_means


def problem(features: Tensor, m: int, **options: object) -> ReductionProblem:
    return ReductionProblem(features.double(), torch.ones(len(features)).double(), m, **options)  # type: ignore[arg-type]


def points(n: int, d: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_means_in_and_sums_out() -> None:
    answer = cluster_map(torch.tensor([0, 1, 0, 2, 0]))
    third = 1 / 3
    expected = torch.tensor([[third, 0, third, 0, third], [0, 1, 0, 0, 0], [0, 0, 0, 1, 0]]).double()
    torch.testing.assert_close(answer.merge, expected)
    assert answer.unmerge.tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1], [1, 0, 0]]
    torch.testing.assert_close(answer.merge @ answer.unmerge, torch.eye(3).double())


@pytest.mark.parametrize("features", ["rows", "directions"])
def test_exact_through_a_nonlinearity_on_duplicates_of_any_number(features: str) -> None:
    produce, consume, times = points(4, 3), points(4, 2, seed=1), torch.tensor([1, 5, 2, 3])
    owner = torch.arange(4).repeat_interleave(times)[torch.randperm(11, generator=torch.Generator().manual_seed(2))]
    produce, consume = produce[owner], consume[owner].T
    answer = Fold(features)(problem(torch.cat([produce, consume.T], 1), 4))
    x = points(3, 9, seed=3)
    fused = consume @ answer.unmerge @ torch.relu(answer.merge @ produce @ x)
    torch.testing.assert_close(fused, consume @ torch.relu(produce @ x))


def test_options_choose_what_is_compared() -> None:
    rows, biases = points(20), 5 * points(20, 2, seed=9)
    given = problem(rows, 7, biases=biases)
    product = lambda labels: cluster_map(labels).unmerge  # noqa: E731
    assert torch.equal(Fold()(given).unmerge, product(k_means(rows, 7, n_init=10)))
    assert torch.equal(Fold(bias=True)(given).unmerge, product(k_means(torch.cat([rows, biases], 1), 7, n_init=10)))
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert torch.equal(Fold("directions")(given).unmerge, product(k_means(unit, 7, n_init=10)))
    lengths = torch.logspace(-2, 2, 20).double()[:, None]
    assert torch.equal(Fold("directions")(problem(rows * lengths, 7)).unmerge, Fold("directions")(given).unmerge)
    assert not torch.equal(Fold()(problem(rows * lengths, 7)).unmerge, Fold()(given).unmerge)


def test_importance_plays_no_part_and_the_seed_does() -> None:
    given = problem(points(60), 20)
    other = replace(given, importance=points(60, 1).squeeze(1))
    assert torch.equal(Fold()(given).merge, Fold()(other).merge)
    seeds = [Fold(n_init=1)(replace(given, seed=seed)).unmerge for seed in range(5)]
    assert any(not torch.equal(seeds[0] @ seeds[0].T, u @ u.T) for u in seeds[1:])


def test_relabelling_channels_permutes_the_maps() -> None:
    rows, order = points(30), torch.randperm(30, generator=torch.Generator().manual_seed(8))
    a, b = Fold()(problem(rows, 8)), Fold()(problem(rows[order], 8))
    torch.testing.assert_close(b.unmerge @ b.merge, (a.unmerge @ a.merge)[order][:, order])


def test_keeping_every_channel_is_the_identity() -> None:
    for rows in (points(6), torch.zeros(6, 2)):
        answer = Fold()(problem(rows, 6))
        assert torch.equal(answer.merge, torch.eye(6).double())
        assert torch.equal(answer.unmerge, torch.eye(6).double())


def test_registry_and_hyper_parameters() -> None:
    assert get_reducer("fold") == Fold() == Fold(**asdict(Fold()))
    assert Fold.mixes
    assert Fold.absorbs_duplicates
    with pytest.raises(ValueError, match="unknown features 'row'. Did you mean 'rows'"):
        Fold("row")
    with pytest.raises(ValueError, match="n_init: expected at least 1 start"):
        Fold(n_init=0)
