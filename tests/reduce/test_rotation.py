"""The rotation of streams against brute force: no other directions hold more, and losses are what the maps lose."""

from __future__ import annotations

import pytest
import torch
from reduce.test_pivot import spd

from intrafusion.errors import BudgetError
from intrafusion.graph import Rotation
from intrafusion.reduce import Moments, Pivot, ReductionProblem
from intrafusion.reduce.rotation import list_rotation_losses, rotation_map

N = 7


def make_moments() -> Moments:
    means = torch.randn(2, N, dtype=torch.float64)
    return Moments(means, torch.stack([spd(N), 9 * spd(N)]), spd(N))


def average(moments: Moments, *, centred: bool) -> torch.Tensor:
    """The mean over the readers of E[h h^T], each of trace one."""
    centre = torch.eye(N, dtype=torch.float64) - (1 / N if centred else 0.0)
    parts = [centre @ (c + torch.outer(m, m)) @ centre for m, c in zip(moments.means, moments.covariances, strict=True)]
    return sum((p / p.trace() for p in parts), torch.zeros(N, N, dtype=torch.float64)) / len(parts)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("m", [2, 4, N])
def test_kept_directions_are_orthogonal_hold_most_and_are_scaled_by_what_they_hold(m: int, centred: bool) -> None:
    moments = make_moments()
    second, found = average(moments, centred=centred), rotation_map(moments, m, centred=centred)
    c = float(found.merge.norm() / m**0.5)
    kept = found.merge / c
    torch.testing.assert_close(kept @ kept.T, torch.eye(m, dtype=torch.float64))
    torch.testing.assert_close(found.unmerge @ found.merge, kept.T @ kept)
    share = float((kept @ second @ kept.T).trace())
    assert c**2 == pytest.approx(m / (N * share))
    if centred:  # the mean of the channels stays the mean of the channels, up to the scale
        ones = torch.ones(N, dtype=torch.float64) / N**0.5
        torch.testing.assert_close(kept @ ones, torch.full((m,), m**-0.5, dtype=torch.float64))
    for _ in range(50):
        basis = torch.randn(N, m - centred, dtype=torch.float64)
        basis = torch.linalg.qr(basis - centred * basis.mean(0))[0]
        assert float((basis.T @ second @ basis).trace()) <= share + 1e-12


@pytest.mark.parametrize("centred", [False, True])
def test_losses_are_what_readers_lose(centred: bool) -> None:
    moments = make_moments()
    second, losses = average(moments, centred=centred), list_rotation_losses(moments, centred=centred)
    assert len(losses) == N + 1
    assert losses[0] == pytest.approx(1)
    assert losses[N] == pytest.approx(0, abs=1e-12)
    for m in range(1, N + 1):
        found = rotation_map(moments, m, centred=centred)
        rest = torch.eye(N, dtype=torch.float64) - found.unmerge @ found.merge
        lost = (moments.reader @ rest @ second @ rest.T).trace() / (moments.reader @ second).trace()
        assert losses[m] == pytest.approx(float(lost), abs=1e-10)


@pytest.mark.parametrize("centred", [False, True])
def test_directions_of_rounding_alone_are_the_same_whatever_the_rounding(centred: bool) -> None:
    """Norms see two directions; which others are kept must not be a matter of noise."""
    low = torch.randn(N, 2, dtype=torch.float64)
    found = []
    for _ in range(2):
        noise = 1e-7 * torch.randn(N, N, dtype=torch.float64)
        covariance = low @ low.T + noise @ noise.T
        found.append(rotation_map(Moments(torch.zeros(1, N).double(), covariance[None], spd(N)), 5, centred=centred))
    projections = [reduction.unmerge @ reduction.merge for reduction in found]
    torch.testing.assert_close(*projections, rtol=0, atol=1e-5)
    centre = torch.eye(N, dtype=torch.float64) - (1 / N if centred else 0.0)
    torch.testing.assert_close(projections[0] @ centre @ low, centre @ low, rtol=0, atol=1e-5)
    losses = list_rotation_losses(Moments(torch.zeros(1, N).double(), (low @ low.T)[None], spd(N)), centred=centred)
    assert bool((losses[2 + centred :] == 0).all())


@pytest.mark.parametrize("centred", [False, True])
def test_readers_without_a_norm_fill_what_norms_leave_and_do_not_change_the_scale(centred: bool) -> None:
    centre = torch.eye(N, dtype=torch.float64) - (1 / N if centred else 0.0)
    low, other = (centre @ torch.randn(N, 2, dtype=torch.float64) for _ in range(2))
    covariances = torch.stack([low @ low.T, other @ other.T])
    moments = Moments(torch.zeros(2, N).double(), covariances, spd(N), plain=1)
    m = 4 + centred
    found = rotation_map(moments, m, centred=centred)
    for seen in (low, other):  # nothing is lost of either
        torch.testing.assert_close(found.unmerge @ found.merge @ seen, seen)
    assert float(found.merge.norm() ** 2 / m) == pytest.approx(m / N)  # all of what the norm sees is kept
    fewer = rotation_map(moments, 2 + centred, centred=centred)
    kept = fewer.merge / fewer.merge.norm() * (2 + centred) ** 0.5
    share = float((kept @ covariances[0] @ kept.T).trace() / covariances[0].trace())
    assert float(fewer.merge.norm() ** 2 / (2 + centred)) == pytest.approx((2 + centred) / (N * share))


@pytest.mark.parametrize("m", [0, N + 1])
def test_sizes_that_are_none_are_refused(m: int) -> None:
    with pytest.raises(BudgetError, match=rf"cannot keep {m} of {N} channels; expected 1 <= m <= {N}"):
        rotation_map(make_moments(), m, centred=False)


def test_without_what_norms_give_channels_are_kept() -> None:
    moments = make_moments()
    problem = ReductionProblem(
        torch.eye(N, dtype=torch.float64), torch.ones(N, dtype=torch.float64), 3, 0, None, moments
    )
    turning = ReductionProblem(*list(vars(problem).values())[:-1], Rotation(()))
    picked = Pivot()(turning).merge
    assert bool(((picked != 0).sum(1) == 1).all())
    assert torch.equal(picked, Pivot()(problem).merge)
