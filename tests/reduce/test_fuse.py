from __future__ import annotations

from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from scipy.spatial.distance import cdist
from torch import Tensor

from intrafusion.reduce import IntraFusion, ReductionProblem, intrafusion_map, most_important
from intrafusion.transport import MARGINALS

NORMALIZATIONS = ("source", "target", "function")


def random_problem(n: int, m: int, seed: int = 0) -> ReductionProblem:
    draw = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 11, generator=draw, dtype=torch.float64)
    return ReductionProblem(features, torch.rand(n, generator=draw, dtype=torch.float64), m)


def coupling_by_scipy(problem: ReductionProblem) -> Tensor:
    """The uniform plan between all channels and the kept ones, written down once more with SciPy only."""
    x = problem.features.numpy() / np.linalg.norm(problem.features.numpy(), axis=1, keepdims=True)
    n, m = len(x), problem.size
    kept = np.sort(np.argsort(-problem.importance.numpy(), kind="stable")[:m])
    equal = np.vstack([np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))])
    cost = cdist(x, x[kept], metric="cityblock")
    plan = linprog(cost.ravel(), A_eq=equal, b_eq=np.r_[np.full(n, 1 / n), np.full(m, 1 / m)]).x
    return torch.from_numpy(plan.reshape(n, m))


def test_the_three_normalizations_of_one_plan():
    problem = random_problem(7, 3)
    plan = coupling_by_scipy(problem)
    by_source, by_target = 7 * plan, 3 * plan
    expected = {
        "source": (by_source.T, by_source),
        "target": (by_target.T, by_target),
        "function": (by_target.T, by_source),
    }
    for name, (merge, unmerge) in expected.items():
        answer = IntraFusion(name)(problem)
        torch.testing.assert_close(answer.merge, merge, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(answer.unmerge, unmerge, rtol=1e-9, atol=1e-9)


def test_sums_of_the_maps():
    problem = random_problem(8, 3)
    ones = lambda k: torch.ones(k, dtype=torch.float64)  # noqa: E731
    source, target, function = (IntraFusion(name)(problem) for name in NORMALIZATIONS)
    torch.testing.assert_close(source.merge.sum(0), ones(8))
    torch.testing.assert_close(source.merge.sum(1), ones(3) * 8 / 3)
    torch.testing.assert_close(target.merge.sum(1), ones(3))
    torch.testing.assert_close(function.merge.sum(1), ones(3))
    torch.testing.assert_close(function.unmerge.sum(1), ones(8))


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("marginal", MARGINALS)
def test_keeping_all_channels_is_exactly_the_identity(normalization, marginal):
    problem = random_problem(6, 6)
    answer = IntraFusion(normalization, source_marginal=marginal)(problem)
    assert torch.equal(answer.merge, torch.eye(6).double())
    assert torch.equal(answer.unmerge, torch.eye(6).double())


def test_keeping_one_channel_pools_all():
    answer = IntraFusion("function")(random_problem(5, 1))
    torch.testing.assert_close(answer.merge, torch.full((1, 5), 0.2, dtype=torch.float64))
    torch.testing.assert_close(answer.unmerge, torch.ones(5, 1, dtype=torch.float64))


def twins() -> tuple[ReductionProblem, Tensor, Tensor]:
    """Three channels, each twice, with producer rows and consumer columns: n = 2 m."""
    draw = torch.Generator().manual_seed(5)
    produce = torch.randn(3, 4, generator=draw, dtype=torch.float64).repeat(2, 1)
    consume = torch.randn(3, 2, generator=draw, dtype=torch.float64).repeat(2, 1)
    importance = torch.tensor([9.0, 8.0, 7.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    return ReductionProblem(torch.cat([produce, consume], 1), importance, 3), produce, consume.T


@pytest.mark.parametrize(("normalization", "factor"), [("source", 2.0), ("target", 0.5), ("function", 1.0)])
def test_duplicates(normalization, factor):
    """On twins the whole map W_c U M W_p is that of "function"; "source" doubles it, "target" halves it."""
    problem, produce, consume = twins()
    answer = IntraFusion(normalization)(problem)
    product = consume @ answer.unmerge @ answer.merge @ produce
    torch.testing.assert_close(product, consume @ produce * factor, rtol=1e-9, atol=1e-9)


def test_function_is_exact_through_a_nonlinearity_on_duplicates():
    problem, produce, consume = twins()
    answer = IntraFusion("function")(problem)
    x = torch.randn(4, 9, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    fused = consume @ answer.unmerge @ torch.relu(answer.merge @ produce @ x)
    torch.testing.assert_close(fused, consume @ torch.relu(produce @ x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_relabelling_channels_permutes_the_maps(normalization):
    problem = random_problem(9, 4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(8))
    shuffled = ReductionProblem(problem.features[order], problem.importance[order], 4)
    a, b = IntraFusion(normalization)(problem), IntraFusion(normalization)(shuffled)
    product = lambda r: r.unmerge @ r.merge  # noqa: E731, the order of the new channels cancels
    torch.testing.assert_close(product(b), product(a)[order][:, order], rtol=1e-9, atol=1e-12)


def test_scaling_the_features_changes_nothing():
    problem = random_problem(6, 2)
    scaled = ReductionProblem(problem.features * torch.arange(1, 7)[:, None], problem.importance, 2)
    torch.testing.assert_close(IntraFusion()(scaled).merge, IntraFusion()(problem).merge)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("source", MARGINALS)
@pytest.mark.parametrize("target", MARGINALS)
def test_never_nan_even_without_importance_or_weights(normalization, source, target):
    features = random_problem(6, 3).features
    features[[0, 4]] = 0.0
    reducer = IntraFusion(normalization, source_marginal=source, target_marginal=target)
    for scores in ([0.0] * 6, [0.0, 0, 0, 0, 0, 1], [1e6, 0, 0, 1, 2, 3]):
        answer = reducer(ReductionProblem(features, torch.tensor(scores).double(), 3))
        assert bool(torch.isfinite(answer.merge).all())
        assert bool(torch.isfinite(answer.unmerge).all())
        if normalization == "source":
            torch.testing.assert_close(answer.merge.sum(0), torch.ones(6).double(), rtol=1e-6, atol=1e-6)


def test_marginals_decide_the_masses():
    problem = random_problem(6, 2)
    kept = most_important(problem.importance, 2)
    answer = IntraFusion("source", source_marginal="radical", target_marginal="importance")(problem)
    a = torch.ones(6).double()
    a[kept] = 3.0
    a /= a.sum()
    b = problem.importance[kept] / problem.importance[kept].sum()
    torch.testing.assert_close(answer.merge @ a, b)


def test_p_changes_the_plan():
    maps = [IntraFusion(p=p)(random_problem(40, 10)).merge for p in (1.0, 2.0, float("inf"))]
    assert not torch.allclose(maps[0], maps[2])
    assert not torch.allclose(maps[1], maps[2])


def test_targets_may_be_any_rows():
    features = torch.tensor([[1.0, 0.0], [2.0, 0.1], [0.0, 3.0], [0.1, 1.0]])
    a, b = torch.full((4,), 0.25), torch.full((2,), 0.5)
    answer = intrafusion_map(features, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), a, b, normalization="target")
    assert answer.merge.tolist() == [[0.0, 0.0, 0.5, 0.5], [0.5, 0.5, 0.0, 0.0]]


def test_biases_are_compared_unless_left_out():
    problem = random_problem(20, 8)
    biases = 10 * torch.randn(20, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    described = replace(problem, biases=biases)
    joined = replace(problem, features=torch.cat([problem.features, biases], 1))
    assert torch.equal(IntraFusion()(described).merge, IntraFusion()(joined).merge)
    assert torch.equal(IntraFusion(bias=False)(described).merge, IntraFusion()(problem).merge)
    assert not torch.equal(IntraFusion()(described).merge, IntraFusion()(problem).merge)


def test_cosine_plans_are_those_of_half_the_squared_distance():
    """Of unit rows 1 - cos is |x - y|^2 / 2; solved by SciPy."""
    problem = random_problem(8, 3)
    x = problem.features.numpy() / np.linalg.norm(problem.features.numpy(), axis=1, keepdims=True)
    kept = most_important(problem.importance, 3).numpy()
    equal = np.vstack([np.kron(np.eye(8), np.ones(3)), np.kron(np.ones(8), np.eye(3))])
    cost = cdist(x, x[kept], metric="sqeuclidean") / 2
    plan = linprog(cost.ravel(), A_eq=equal, b_eq=np.r_[np.full(8, 1 / 8), np.full(3, 1 / 3)]).x.reshape(8, 3)
    answer = IntraFusion("function", cost="cosine")(problem)
    torch.testing.assert_close(answer.unmerge, 8 * torch.from_numpy(plan), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalization", NORMALIZATIONS)
def test_entropic_maps_approach_the_exact_ones(normalization):
    problem = random_problem(30, 12)
    exact = IntraFusion(normalization)(problem)
    errors = []
    for epsilon in (0.3, 0.03, 0.003):
        answer = IntraFusion(normalization, solver="entropic", epsilon=epsilon)(problem)
        torch.testing.assert_close(answer.merge.sum(1), exact.merge.sum(1))
        torch.testing.assert_close(
            answer.unmerge.sum(1), exact.unmerge.sum(1) if normalization != "target" else answer.merge.sum(0)
        )
        errors.append(float((answer.merge - exact.merge).norm() / exact.merge.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.1


CENTRES = ("kmeans", "gaussian_mixture")


@pytest.mark.parametrize("target", CENTRES)
def test_centres_of_separate_clusters(target):
    """Four tight bunches: each becomes one channel, whatever is important."""
    draw = torch.Generator().manual_seed(4)
    centres = 5 * torch.randn(4, 11, generator=draw, dtype=torch.float64)
    bunch = torch.tensor([0, 1, 2, 3] * 3)
    rows = centres[bunch] + 0.01 * torch.randn(12, 11, generator=draw, dtype=torch.float64)
    answer = IntraFusion("function", target=target)(ReductionProblem(rows, torch.arange(12.0).double(), 4))
    same = (bunch[:, None] == bunch).double()
    torch.testing.assert_close(answer.unmerge @ answer.unmerge.T, same)
    torch.testing.assert_close(answer.unmerge @ answer.merge, same / 3)


@pytest.mark.parametrize("target", CENTRES)
def test_centres_are_as_important_as_their_channels_together(target):
    rows = torch.tensor([[1.0, 0.0], [1.1, 0.0], [0.0, 1.0]]).double()
    problem = ReductionProblem(rows, torch.tensor([1.0, 2.0, 6.0]).double(), 2)
    answer = IntraFusion("source", target=target, source_marginal="importance", target_marginal="importance")(problem)
    masses = (answer.merge @ (problem.importance / 9)).sort().values  # of the new channels
    torch.testing.assert_close(masses, torch.tensor([3 / 9, 6 / 9]).double())


@pytest.mark.parametrize("target", CENTRES)
def test_centres_do_not_depend_on_the_order_of_the_channels_and_do_on_the_seed(target):
    problem = random_problem(40, 9)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(8))
    shuffled = ReductionProblem(problem.features[order], problem.importance[order], 9)
    reducer = IntraFusion("function", target=target)
    product = lambda r: r.unmerge @ r.merge  # noqa: E731
    torch.testing.assert_close(product(reducer(shuffled)), product(reducer(problem))[order][:, order])
    assert torch.equal(reducer(problem).merge, reducer(problem).merge)
    others = [product(reducer(replace(problem, seed=seed))) for seed in range(1, 6)]
    assert any(not torch.allclose(product(reducer(problem)), other) for other in others)


@pytest.mark.parametrize("target", CENTRES)
@pytest.mark.parametrize("solver", ["exact", "entropic"])
def test_centres_never_nan_with_zero_and_equal_rows(target, solver):
    features = random_problem(8, 3).features
    features[[0, 4]] = 0.0
    features[[1, 2, 3]] = features[5].clone()
    for m in (1, 3, 5, 7):
        answer = IntraFusion("function", target=target, solver=solver)(
            ReductionProblem(features, torch.ones(8).double(), m)
        )
        assert answer.merge.shape == (m, 8)
        assert bool(torch.isfinite(answer.merge).all() and torch.isfinite(answer.unmerge).all())
        torch.testing.assert_close(answer.unmerge.sum(1), torch.ones(8).double())


def test_names_are_checked():
    with pytest.raises(ValueError, match="unknown normalization 'sorce'. Did you mean 'source'"):
        IntraFusion("sorce")
    with pytest.raises(ValueError, match="unknown source_marginal 'x'"):
        IntraFusion(source_marginal="x")
    with pytest.raises(ValueError, match="unknown target_marginal 'radicl'. Did you mean 'radical'"):
        IntraFusion(target_marginal="radicl")
    with pytest.raises(ValueError, match="unknown target 'centroid'"):
        IntraFusion(target="centroid")
    with pytest.raises(ValueError, match="unknown cost 'cosin'. Did you mean 'cosine'"):
        IntraFusion(cost="cosin")
    with pytest.raises(ValueError, match="unknown solver 'sinkhorn'"):
        IntraFusion(solver="sinkhorn")
    with pytest.raises(ValueError, match="n_init: expected at least 1 start"):
        IntraFusion(n_init=0)
    with pytest.raises(ValueError, match="unknown normalization 'x'"):
        intrafusion_map(torch.ones(2, 1), torch.ones(1, 1), torch.ones(2) / 2, torch.ones(1), normalization="x")


def test_hyper_parameters_are_the_fields():
    reducer = IntraFusion("function", p=2.0)
    assert IntraFusion(**asdict(reducer)) == reducer
    assert "mixes" not in asdict(reducer)
