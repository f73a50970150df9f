"""What elimination loses, against readers that are solved anew for every choice of units."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from intrafusion.errors import RecipeError
from intrafusion.reduce import Eliminate, Moments, ReductionProblem, Select
from intrafusion.reduce.eliminate import eliminate

N, SIZE, OUT = 5, 3, 7


def make(seed: int) -> tuple[Tensor, Tensor]:
    """Covariance (d, d) of N units of SIZE channels that can partly be told from each other, and a reader (OUT, d)."""
    generator = torch.Generator().manual_seed(seed)
    d = N * SIZE
    mixed = torch.randn(d, d, generator=generator, dtype=torch.float64) * torch.logspace(0, -1.5, d)
    return mixed @ mixed.T, torch.randn(OUT, d, generator=generator, dtype=torch.float64)


def lost(covariance: Tensor, reader: Tensor, units: tuple[int, ...]) -> float:
    """The error of the reader of these units alone that is solved for what the whole reader gives, with the ridge."""
    c = covariance + 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
    kept = torch.tensor([u * SIZE + k for u in units for k in range(SIZE)], dtype=torch.long)
    told = c[:, kept] @ torch.linalg.inv(c[kept][:, kept]) @ c[kept]
    return float((reader @ (c - told) @ reader.T).trace() / (reader @ covariance @ reader.T).trace())


@pytest.mark.parametrize("seed", range(4))
def test_losses_are_those_of_readers_that_are_solved_anew(seed: int) -> None:
    covariance, reader = make(seed)
    found = eliminate(Moments(torch.zeros_like(covariance[:1]), covariance[None], reader.T @ reader), SIZE)
    assert sorted(found.order.tolist()) == list(range(N))
    for m in range(N + 1):
        kept = tuple(found.kept(m).tolist())
        assert len(kept) == m
        assert float(found.losses[m]) == pytest.approx(lost(covariance, reader, kept), rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_the_first_to_go_is_the_one_without_which_least_is_lost(seed: int) -> None:
    covariance, reader = make(seed)
    found = eliminate(Moments(torch.zeros_like(covariance[:1]), covariance[None], reader.T @ reader), SIZE)
    errors = {kept: lost(covariance, reader, kept) for kept in itertools.combinations(range(N), N - 1)}
    assert tuple(found.kept(N - 1).tolist()) == min(errors, key=errors.__getitem__)


def test_a_unit_that_others_tell_goes_first_however_large_it_is() -> None:
    covariance = torch.eye(4, dtype=torch.float64)
    covariance[2:, 2:] = 100 * (covariance[2:, 2:] + 1) / 2
    covariance[2, 3] = covariance[3, 2] = 99.9
    found = eliminate(Moments(torch.zeros_like(covariance[:1]), covariance[None], torch.eye(4).double()), 1)
    assert int(found.order[0]) in (2, 3)


def test_channels_that_never_vary_are_spared_first() -> None:
    covariance = torch.diag(torch.tensor([1.0, 0.0, 2.0, 0.0], dtype=torch.float64))
    found = eliminate(Moments(torch.zeros_like(covariance[:1]), covariance[None], torch.eye(4).double()), 1)
    assert set(found.order[:2].tolist()) == {1, 3}


# ---- single channels ------------------------------------------------------------------------------------------------


def make_moments(seed: int, points: int, n: int = 6) -> Moments:
    draw = torch.Generator().manual_seed(seed)
    mixed = torch.randn(points, n, n, generator=draw, dtype=torch.float64) * torch.logspace(0, -1, n)
    covariances = mixed @ mixed.mT * torch.tensor([1.0, 100.0, 0.1][:points], dtype=torch.float64)[:, None, None]
    reader = torch.randn(OUT, n, generator=draw, dtype=torch.float64)
    return Moments(torch.randn(points, n, generator=draw, dtype=torch.float64), covariances, reader.T @ reader)


def ridge_error(moments: Moments, kept: tuple[int, ...], strength: float) -> float:
    """Mean over the points of the least ridge error of readers of these channels, as shares of each point's signal.

    The ridge is written as rows of data: W is regressed on C^1/2 as observations, by ordinary least squares.
    """
    root = torch.linalg.cholesky(moments.reader + 1e-14 * torch.eye(len(moments.reader), dtype=torch.float64)).T
    total = 0.0
    for covariance in moments.covariances:
        c = covariance + strength * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=torch.float64)
        rows = torch.linalg.cholesky(c).T
        wanted = rows @ root.T
        left = wanted
        if kept:
            read = rows[:, list(kept)]
            left = wanted - read @ torch.linalg.lstsq(read, wanted).solution
        total += float(left.square().sum() / (moments.reader * covariance).sum())
    return total / len(moments.covariances)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("points", [1, 3])
@pytest.mark.parametrize("block", [1, 2, 32])
def test_every_channel_that_goes_adds_least_to_the_ridge_error_and_the_sum_is_that_error(
    block: int, points: int, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("intrafusion.reduce.sweep.BLOCK", block)
    moments = make_moments(seed, points)
    found = eliminate(moments, strength=1e-2)
    left = set(range(6))
    for m in range(6, 0, -1):
        errors = {j: ridge_error(moments, tuple(sorted(left - {j})), 1e-2) for j in left}
        gone = int(found.order[6 - m])
        assert gone == min(errors, key=errors.__getitem__)
        left.remove(gone)
        assert float(found.losses[m - 1]) == pytest.approx(errors[gone], rel=1e-6)
    assert float(found.losses[6]) == 0


def test_units_of_one_channel_are_eliminated_as_blocks_are() -> None:
    moments = make_moments(5, 3)
    twice = lambda x: torch.stack([x, x * 0], -1).flatten(-2)  # noqa: E731  # beside each channel one that says nothing
    wide = twice(twice(moments.covariances).mT).mT
    padded = Moments(twice(moments.means), wide, twice(twice(moments.reader).mT).mT)
    one, blocks = eliminate(moments, strength=1e-3), eliminate(padded, 2, strength=2e-3)  # of half the mean variance
    assert one.order.tolist() == blocks.order.tolist()
    torch.testing.assert_close(one.losses, blocks.losses)


def problem(moments: Moments | None, size: int, **options: bool) -> ReductionProblem:
    scores = torch.arange(6.0, dtype=torch.float64)
    return ReductionProblem(scores[:, None], scores, size, moments=moments, **options)


def test_the_map_has_the_error_that_the_curve_says_and_its_unmerge_is_the_ridge_regression() -> None:
    moments = make_moments(1, 1)
    found = Eliminate(strength=1e-2)(problem(moments, 3))
    kept = found.merge.argmax(1)
    assert kept.tolist() == eliminate(moments, strength=1e-2).kept(3).tolist()
    (mean,), (covariance,) = moments.means, moments.covariances
    c = covariance + 1e-2 * covariance.diagonal().mean() * torch.eye(6, dtype=torch.float64)
    rows = torch.linalg.cholesky(c).T
    told = torch.linalg.lstsq(rows[:, kept], rows).solution.T
    torch.testing.assert_close(found.unmerge, told, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.shift, mean - told @ mean[kept], rtol=1e-8, atol=1e-8)
    left = torch.eye(6, dtype=torch.float64) - found.unmerge @ found.merge
    error = float((moments.reader * (left @ c @ left.T)).sum() / (moments.reader * covariance).sum())
    assert error == pytest.approx(float(eliminate(moments, strength=1e-2).losses[3]), rel=1e-6)


def test_without_moments_and_in_its_selecting_form_it_selects() -> None:
    found, expected = Eliminate()(problem(None, 3)), Select()(problem(None, 3))
    assert torch.equal(found.merge, expected.merge)
    moments = make_moments(2, 1)
    selected = Eliminate().selecting()(problem(moments, 3))
    assert torch.equal(selected.unmerge, selected.merge.T)
    assert selected.merge.argmax(1).tolist() == eliminate(moments).kept(3).tolist()


@pytest.mark.parametrize("strength", [0.0, -1.0, 1e-12])
def test_a_ridge_that_cannot_be_inverted_is_refused(strength: float) -> None:
    with pytest.raises(RecipeError, match="strength: expected a number >= 1e-09"):
        Eliminate(strength=strength)
