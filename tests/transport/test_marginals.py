from __future__ import annotations

import math

import pytest
import torch

from intrafusion.transport import MARGINALS, marginal

SCORES = torch.tensor([1.0, 2.0, 5.0, 0.0])
KEPT = torch.tensor([1, 2])


def test_values():
    exponentials = [math.exp(x) for x in SCORES.tolist()]
    expected = {
        "uniform": [0.25] * 4,
        "importance": [1 / 8, 2 / 8, 5 / 8, 0.0],
        "softmax": [e / sum(exponentials) for e in exponentials],
        "radical": [1 / 6, 2 / 6, 2 / 6, 1 / 6],
    }
    assert set(expected) == set(MARGINALS)
    for name, values in expected.items():
        torch.testing.assert_close(
            marginal(name, SCORES, KEPT), torch.tensor(values, dtype=torch.float64), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("name", MARGINALS)
@pytest.mark.parametrize(
    "scores", [[0.0, 0.0, 0.0], [1e300, 1.0, 0.0], [1e-320, 0.0, 0.0], [3.0, 3.0, 3.0], [0.0, 800.0, 1e4]]
)
def test_masses_are_positive_and_sum_to_one(name, scores):
    mass = marginal(name, torch.tensor(scores, dtype=torch.float64), torch.tensor([1]))
    assert (mass > 1e-8).all()
    assert abs(mass.sum().item() - 1) < 1e-12


def test_proportions_hold_for_scores_whose_sum_overflows():
    mass = marginal("importance", torch.tensor([1e308, 1e308, 5e307], dtype=torch.float64), KEPT)
    torch.testing.assert_close(mass, torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64))


def test_equal_scores_give_equal_masses():
    for name in ("uniform", "importance", "softmax"):
        torch.testing.assert_close(marginal(name, torch.full((4,), 3.0), KEPT), torch.full((4,), 0.25).double())


def test_all_kept_is_uniform_for_radical():
    assert marginal("radical", SCORES, torch.arange(4)).tolist() == [0.25] * 4


def test_errors():
    with pytest.raises(ValueError, match="unknown marginal 'softmx'. Did you mean 'softmax'"):
        marginal("softmx", SCORES, KEPT)
    with pytest.raises(ValueError, match="expected scores >= 0, got -1; use 'softmax'"):
        marginal("importance", SCORES - 1, KEPT)
