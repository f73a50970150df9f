"""Folding: means in, sums out, exact on duplicates."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch import Tensor, nn

from intrafusion import Recipe, decide, inspect
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


def test_by_default_it_compares_weights_scales_and_shifts_as_they_are() -> None:
    """The authors' features: k-means of [w, gamma, beta, reading columns], statistics and folding left out."""
    torch.manual_seed(0)
    conv, norm, reader = nn.Conv2d(3, 12, 3, bias=False), nn.BatchNorm2d(12), nn.Conv2d(12, 4, 1)
    model = nn.Sequential(conv, norm, nn.ReLU(), reader).eval().double().requires_grad_(False)
    for tensor in norm.state_dict().values():
        if tensor.dim():
            nn.init.uniform_(tensor, 0.1, 3)
    columns, variance = reader.weight.transpose(0, 1).flatten(1), norm.state_dict()["running_var"]
    scale = norm.weight / (variance + norm.eps).sqrt()
    graph = inspect(model, torch.randn(1, 3, 6, 6).double())
    recipe = lambda **how: Recipe.of(keep=0.5, reducer={"name": "fold", **how})  # noqa: E731
    unmerge = lambda **how: decide(model, graph, recipe(**how)).maps["0"].unmerge  # noqa: E731
    expected = lambda *parts: cluster_map(k_means(torch.cat(parts, 1), 6, n_init=10)).unmerge  # noqa: E731
    rows = conv.weight.flatten(1)
    assert torch.equal(unmerge(), expected(rows, norm.weight[:, None], norm.bias[:, None], columns))
    assert torch.equal(unmerge(raw=False), expected(scale[:, None] * rows, columns))
    assert not torch.equal(unmerge(), unmerge(raw=False))
    assert not torch.equal(unmerge(), unmerge(balanced=True))


def test_registry_and_hyper_parameters() -> None:
    assert get_reducer("fold") == Fold() == Fold(**asdict(Fold()))
    assert Fold.mixes
    assert Fold.absorbs_duplicates
    with pytest.raises(ValueError, match="unknown features 'row'. Did you mean 'rows'"):
        Fold("row")
    with pytest.raises(ValueError, match="n_init: expected at least 1 start"):
        Fold(n_init=0)
