"""Variance-based pruning and FLAP: by hand, and in a network whose dropped units are constants."""

from __future__ import annotations

import pytest
import torch
from gallery.core import chain
from torch import nn

import intrafusion
from intrafusion.reduce import Flap, Moments, ReductionProblem, VarianceBased


def problem() -> ReductionProblem:
    means = torch.tensor([[1.0, 2.0, 3.0, 4.0]]).double()
    covariance, reader = (torch.diag(torch.tensor(x)).double() for x in ([4.0, 1.0, 3.0, 2.0], [1.0, 9.0, 1.0, 4.0]))
    moments = Moments(means, covariance[None], reader)
    return ReductionProblem(torch.zeros(4, 2).double(), torch.ones(4).double(), 2, moments=moments)


@pytest.mark.parametrize(("reducer", "kept"), [(VarianceBased(), [0, 2]), (Flap(), [1, 3])])
def test_the_score_chooses_and_means_are_told(reducer: VarianceBased, kept: list[int]) -> None:
    found = reducer(problem())
    assert found.merge.argmax(1).tolist() == kept
    assert torch.equal(found.unmerge, found.merge.T)
    gone = [j for j in range(4) if j not in kept]
    assert found.shift is not None
    assert found.shift[gone].tolist() == [float(j + 1) for j in gone]
    assert found.shift[kept].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ["variance", "flap"])
def test_units_that_do_not_vary_go_without_loss(name: str) -> None:
    torch.manual_seed(0)
    model = chain(a=nn.Linear(4, 6), r=nn.ReLU(), b=nn.Linear(6, 3)).eval()
    with torch.no_grad():
        model.a.weight[[1, 4]] = 0
        model.a.bias[[1, 4]] = torch.tensor([2.0, 3.0])
        model.b.weight *= torch.tensor([1.0, 50, 1, 1, 50, 1])  # large weights do not keep a constant
    x = torch.randn(64, 4)
    small = intrafusion.compress(model, x[:2], 4 / 6, reducer=name, restore=None, inputs=x)
    torch.testing.assert_close(small.model(x), model(x), rtol=1e-4, atol=1e-4)


def test_where_nothing_was_seen_importance_chooses() -> None:
    blind = ReductionProblem(torch.zeros(3, 2).double(), torch.tensor([1.0, 3.0, 2.0]).double(), 2)
    assert VarianceBased()(blind).merge.argmax(1).tolist() == [1, 2]
    assert VarianceBased()(blind).shift is None
