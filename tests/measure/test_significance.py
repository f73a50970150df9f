"""Kruskal and Wallis, against the formula worked out by hand."""

from __future__ import annotations

import math

import pytest

from intrafusion.measure.significance import kruskal_wallis


def test_statistic_and_probability_of_three_separate_samples():
    # ranks 1..9 in three blocks: H = 12 / 90 * (6^2 + 15^2 + 24^2) / 3 - 30 = 7.2, p = exp(-H / 2) at 2 degrees
    statistic, p = kruskal_wallis([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.7, 0.8, 0.9]])
    assert statistic == pytest.approx(7.2)
    assert p == pytest.approx(math.exp(-3.6))


def test_interleaved_samples_do_not_differ():
    assert kruskal_wallis([[1, 4, 5, 8], [2, 3, 6, 7]])[1] == pytest.approx(1.0)


def test_equal_values_throughout():
    assert kruskal_wallis([[0.5, 0.5], [0.5]]) == (0.0, 1.0)


@pytest.mark.parametrize("samples", [[[1.0]], [[1.0], []]])
def test_too_little_is_refused(samples):
    with pytest.raises(ValueError, match="two or more samples"):
        kruskal_wallis(samples)
