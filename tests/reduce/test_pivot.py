"""Pivoting against brute force, the reducer on what it is given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import intrafusion
from intrafusion.errors import BudgetError
from intrafusion.observe.moments import measure_moments
from intrafusion.reduce import Moments, Pivot, ReductionProblem, Select
from intrafusion.reduce.pivot import pick_channels, pivot_order


def spd(n: int, rank: int | None = None) -> Tensor:
    factor = torch.randn(n, rank or n, dtype=torch.float64)
    return factor @ factor.T


def missing(covariance: Tensor, reader: Tensor, kept: list[int]) -> float:
    """tr(Q Cov(h | h_S)) / tr(Q C) by the Schur complement."""
    c, s = covariance.numpy(), np.array(kept)
    left = c - c[:, s] @ np.linalg.solve(c[np.ix_(s, s)], c[s]) if kept else c
    return float(np.trace(reader.numpy() @ left) / np.trace(reader.numpy() @ c))


@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("wide", [2, 3, 1024])
@pytest.mark.parametrize(("block", "span"), [(1, 32), (2, 32), (32, 32), (1, 2), (2, 2), (2, 4), (1, 1)])
def test_every_pick_is_the_best_next_one_and_its_error_is_right(
    block: int, span: int, wide: int, points: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intrafusion.reduce.sweep.WIDE", wide)
    monkeypatch.setattr("intrafusion.reduce.sweep.BLOCK", block)
    monkeypatch.setattr("intrafusion.reduce.sweep._SPAN", span)
    reader = spd(6)
    moments = Moments(torch.zeros(points, 6), torch.stack([10.0**i * spd(6) for i in range(points)]), reader)
    found = pivot_order(moments.covariances, reader, moments.shares, 6)
    lacks = lambda kept: sum(missing(c, reader, kept) for c in moments.covariances) / points  # noqa: E731
    for k in range(6):
        picked = found.order[:k].tolist()
        rest = [j for j in range(6) if j not in picked]
        assert int(found.order[k]) == min(rest, key=lambda j: lacks([*picked, j]))
        assert float(found.missing[k]) == pytest.approx(lacks(picked), abs=1e-9)
    assert float(found.missing[6]) == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("unit", [1.0, 1e-40, 1e40])
def test_points_weigh_the_same(unit: float) -> None:
    """A point whose channels are ten times as loud says no more, and a single one is what it is."""
    means, (a, b) = torch.randn(2, 5, dtype=torch.float64), (spd(5), spd(5))
    a, b, reader = a / a.trace(), b / b.trace(), torch.eye(5, dtype=torch.float64)
    loud = Moments(torch.stack([10 * means[0], means[1]]), torch.stack([100 * a, b]), unit * reader)
    torch.testing.assert_close(loud.shares * unit, torch.tensor([1 / 200, 1 / 2]).double())
    torch.testing.assert_close(loud.overall, ((means[0] / 10 + means[1]) / 1.01, (a + b) / 1.01))
    torch.testing.assert_close(Moments(means[:1], a[None], reader).overall, (means[0], a))


def test_a_point_where_nothing_varies_counts_nothing() -> None:
    """It would count infinitely much in float32, and every gain would be NaN."""
    covariance, reader = spd(5), spd(5)
    both = Moments(
        torch.zeros(2, 5, dtype=torch.float64), torch.stack([covariance, torch.zeros_like(covariance)]), reader
    )
    alone = Moments(torch.zeros(1, 5, dtype=torch.float64), covariance[None], reader)
    assert pick_channels(both).order.tolist() == pick_channels(alone).order.tolist()
    torch.testing.assert_close(both.overall[1], covariance)


def test_known_channels_are_picked_last() -> None:
    """Rank 3: after three picks nothing is missing, and what is left is picked once each."""
    found = pivot_order(spd(5, 3)[None], torch.eye(5, dtype=torch.float64), torch.ones(1, dtype=torch.float64), 5)
    assert float(found.missing[3]) == pytest.approx(0, abs=1e-9)
    assert sorted(found.order.tolist()) == list(range(5))


@pytest.mark.parametrize("m", [0, 6])
def test_sizes_are_checked(m: int) -> None:
    with pytest.raises(BudgetError, match=f"cannot keep {m} of 5"):
        pivot_order(spd(5)[None], spd(5), torch.ones(1, dtype=torch.float64), m)


def problem(size: int, moments: Moments | None) -> ReductionProblem:
    rows = torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return ReductionProblem(rows, rows.abs().sum(1), size, moments=moments)


def test_a_channel_that_is_the_sum_of_two_others_is_told_from_them() -> None:
    rows = torch.randn(400, 6, dtype=torch.float64) + 1
    rows[:, 4] = rows[:, 0] + rows[:, 1]
    rows[:, 5] = 2.0
    moments = Moments(rows.mean(0)[None], torch.cov(rows.T, correction=0)[None], torch.eye(6, dtype=torch.float64))
    found = Pivot(strength=0.0)(problem(4, moments))
    assert found.shift is not None
    told = (rows @ found.merge.T) @ found.unmerge.T + found.shift
    np.testing.assert_allclose(told, rows, atol=1e-8)
    selected = Pivot().selecting()(problem(4, moments))
    assert sorted(selected.unmerge.sum(1).tolist()) == [0, 0, 1, 1, 1, 1]


def test_without_moments_it_selects() -> None:
    for reducer in (Pivot(), Pivot(unmerge=False)):
        found, expected = reducer(problem(3, None)), Select()(problem(3, None))
        assert torch.equal(found.merge, expected.merge)
        assert torch.equal(found.unmerge, expected.unmerge)


def test_a_strength_below_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="strength: expected a number >= 0, got -1"):
        Pivot(strength=-1)


@pytest.mark.parametrize("unit", [1.0, 1e-44, 1e39])
def test_few_columns_are_multiplied_in_place_of_their_squares(monkeypatch: pytest.MonkeyPatch, unit: float) -> None:
    """Of many channels that few read: the picks, and what is missing after each, are those of the squares."""
    monkeypatch.setattr("intrafusion.observe.moments.WIDE", 8)
    first, second = torch.nn.Linear(5, 40), torch.nn.Linear(40, 3)
    model = torch.nn.Sequential(first, torch.nn.Tanh(), second).eval().double()
    second.weight.data *= unit
    inputs = torch.randn(200, 5).double()
    (few,) = measure_moments(model, intrafusion.inspect(model, inputs[:2]), inputs).values()
    assert few.columns is not None
    assert few.squares is None
    pick_channels(few)
    assert "reader" not in vars(few), "the squares were made"
    weight = second.weight.detach() / unit
    torch.testing.assert_close(few.reader / unit**2, weight.T @ weight, rtol=1e-5, atol=1e-7)
    one, other = pick_channels(few), pick_channels(replace(few, squares=few.reader, columns=None))
    assert one.order[:10].tolist() == other.order[:10].tolist()
    torch.testing.assert_close(one.missing, other.missing, rtol=1e-4, atol=1e-5)
