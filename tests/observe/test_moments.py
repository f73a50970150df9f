"""Moments of what is read of channels, on rows that are few."""

from __future__ import annotations

import pytest
import torch
from sklearn.covariance import oas
from torch import nn

import intrafusion
from intrafusion.observe.moments import shrink
from intrafusion.reduce.pivot import pivot_order


def covariance_of(rows: torch.Tensor) -> torch.Tensor:
    return torch.cov(rows.T, correction=0)


@pytest.mark.parametrize("k", [60, 150, 2000])
def test_correlations_shrink_as_the_oracle_approximation_says(k: int) -> None:
    """scikit-learn leaves out 2 / n, which is small here."""
    rows = torch.randn(k, 20, dtype=torch.float64) @ torch.randn(20, 100, dtype=torch.float64)
    rows = rows + 3 * torch.randn(k, 100, dtype=torch.float64)
    standard = (rows - rows.mean(0)) / rows.std(0, correction=0)
    _, intensity = oas(standard.numpy())
    sample = covariance_of(rows)
    found = shrink(sample, k)
    torch.testing.assert_close(found.diagonal(), sample.diagonal())
    off = ~torch.eye(100, dtype=torch.bool)
    assert 1 - float((found / sample)[off].mean()) == pytest.approx(intensity, rel=0.05)


def test_channels_that_do_not_vary_change_nothing() -> None:
    rows = torch.randn(40, 8, dtype=torch.float64) @ torch.randn(8, 8, dtype=torch.float64)
    sample = covariance_of(rows)
    more = torch.zeros(10, 10, dtype=torch.float64)
    more[:8, :8] = sample
    torch.testing.assert_close(shrink(more, 40)[:8, :8], shrink(sample, 40))
    assert torch.equal(shrink(torch.zeros(3, 3, dtype=torch.float64), 5), torch.zeros(3, 3, dtype=torch.float64))
    one = torch.ones(1, 1, dtype=torch.float64)
    assert torch.equal(shrink(one, 5), one)


def test_few_rows_do_not_tell_independent_channels_from_one_another() -> None:
    sample = covariance_of(torch.randn(30, 60, dtype=torch.float64))
    identity, shares = torch.eye(60, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    lacks = [
        float(pivot_order(c[None], identity, shares / c.trace(), 30).missing[-1]) for c in (sample, shrink(sample, 30))
    ]
    assert lacks[0] < 1e-3
    assert lacks[1] > 0.4


@pytest.mark.parametrize("width", [8, 40])
def test_a_bottleneck_of_low_rank_loses_nothing_once_more_rows_than_channels_were_seen(width: int) -> None:
    """Shrinking gives something to every direction, also to those in which nothing varies."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, width), nn.Linear(width, 6))
    with torch.no_grad():
        rank_three = torch.randn(width, 3) @ torch.randn(3, width) / width
        model[0].weight.copy_(rank_three @ model[0].weight)
    images, unseen = torch.randn(60, 6), torch.randn(9, 6)
    small = intrafusion.compress(model, images[:2], keep=4 / width, restore=None, inputs=images).model
    assert small.get_submodule("0").out_features == 4
    torch.testing.assert_close(small(unseen), model(unseen), atol=1e-5, rtol=1e-4)
