"""The best directions against brute force: no other map of that rank loses less."""

from __future__ import annotations

import pytest
import torch
from reduce.test_pivot import spd

from intrafusion.errors import BudgetError
from intrafusion.reduce import Moments, Pivot, ReductionMap, ReductionProblem
from intrafusion.reduce.principal import list_losses, principal_map
from intrafusion.reduce.telling import least_squares_map


def lost(moments: Moments, reduction: ReductionMap) -> float:
    """tr Q (I - U M) C (I - U M)^T as a share of tr Q C."""
    rest = torch.eye(len(moments.reader), dtype=torch.float64) - reduction.unmerge @ reduction.merge
    signal = (moments.reader @ moments.covariances[0]).trace()
    return float((moments.reader @ rest @ moments.covariances[0] @ rest.T).trace() / signal)


def make_moments(n: int = 6, rank: int | None = None) -> Moments:
    return Moments(torch.randn(1, n, dtype=torch.float64), spd(n, rank)[None], spd(n))


@pytest.mark.parametrize("m", [1, 3, 5])
def test_no_other_directions_and_no_channels_lose_less(m: int) -> None:
    moments = make_moments()
    best = lost(moments, principal_map(moments, m))
    for kept in torch.combinations(torch.arange(6), m):
        assert best < lost(moments, least_squares_map(moments.means[0], moments.covariances[0], kept, 0.0))
    for _ in range(50):
        basis, _ = torch.linalg.qr(torch.randn(6, m, dtype=torch.float64))
        assert best <= lost(moments, ReductionMap(basis.T, basis))


def test_losses_are_what_the_maps_lose() -> None:
    moments = make_moments()
    losses = list_losses(moments)
    assert losses[0] == pytest.approx(1)
    for m in range(1, 7):
        assert losses[m] == pytest.approx(lost(moments, principal_map(moments, m)), abs=1e-9)


def test_the_shift_leaves_the_mean_as_it_was() -> None:
    moments = make_moments()
    found = principal_map(moments, 2)
    mean = moments.means[0]
    assert found.shift is not None
    torch.testing.assert_close(found.unmerge @ (found.merge @ mean) + found.shift, mean)


def test_channels_that_depend_on_others_cost_nothing() -> None:
    moments = make_moments(rank=3)
    found = principal_map(moments, 3)
    assert lost(moments, found) == pytest.approx(0, abs=1e-9)
    assert float(found.merge.norm(dim=1).max()) == pytest.approx(1)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_units_do_not_matter(size: float) -> None:
    moments = make_moments()
    large = Moments(moments.means, size * moments.covariances, moments.reader / size)
    plain, other = principal_map(moments, 3), principal_map(large, 3)
    torch.testing.assert_close(other.unmerge @ other.merge, plain.unmerge @ plain.merge)


def test_pivot_takes_directions_only_where_everything_is_linear() -> None:
    moments = make_moments()
    problem = lambda linear: ReductionProblem(torch.eye(6), torch.ones(6), 3, moments=moments, linear=linear)  # noqa: E731
    rows = lambda reduction: int((reduction.merge.abs() > 1e-12).sum())  # noqa: E731
    assert rows(Pivot()(problem(False))) == rows(Pivot(unmerge=False)(problem(True))) == 3
    torch.testing.assert_close(Pivot()(problem(True)).merge, principal_map(moments, 3).merge)


def test_sizes_that_cannot_be() -> None:
    with pytest.raises(BudgetError, match="cannot keep 7 of 6"):
        principal_map(make_moments(), 7)
