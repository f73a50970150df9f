"""Weights and activations of any size: channels are picked as at size one, or an error says what is too large."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import ModelError
from intrafusion.reduce import Pivot, ReductionProblem
from intrafusion.reduce.problem import Moments

X = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))


def network(scale: float = 1.0) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))
    with torch.no_grad():
        for layer in (model[0], model[2], model[4]):
            layer.get_parameter("weight").mul_(scale)
            layer.get_parameter("bias").mul_(0)
    return model


def solve(covariance: Tensor, reader: Tensor) -> Tensor:
    moments = Moments(torch.zeros(1, 6).double(), covariance[None], reader)
    return Pivot()(ReductionProblem(torch.zeros(6, 1).double(), torch.ones(6).double(), 3, moments=moments)).unmerge


@pytest.mark.parametrize("exponent", [-100, -40, 40, 100])
def test_the_map_knows_no_units(exponent: int) -> None:
    rows = torch.randn(9, 6, generator=torch.Generator().manual_seed(3)).double()
    covariance, reader = rows.T @ rows, torch.diag(torch.arange(1.0, 7)).double()
    unit = 2.0**exponent
    assert torch.equal(solve(covariance * unit, reader / unit), solve(covariance, reader))
    assert torch.equal(solve(covariance * unit, reader * unit), solve(covariance, reader))


@pytest.mark.parametrize("exponent", [-60, -30, 50, 80])
def test_images_of_any_size_give_the_same_network(exponent: int) -> None:
    plain = intrafusion.compress(network(), X, 0.5, images=X, restore=None)
    scaled = intrafusion.compress(network(), X, 0.5, images=X * 2.0**exponent, restore=None)
    for name, tensor in plain.model.state_dict().items():
        if name.endswith("weight"):
            torch.testing.assert_close(scaled.model.state_dict()[name], tensor)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e15, 1e19, 1e30])
@pytest.mark.parametrize("where", ["all", "one channel"])
def test_weights_of_any_size_end_finite_or_in_an_error(scale: float, where: str) -> None:
    model = network(scale if where == "all" else 1.0)
    if where == "one channel":
        with torch.no_grad():
            model.get_parameter("0.weight")[0].mul_(scale)
    try:
        small = intrafusion.compress(model, X, 0.5, images=X, restore=None)
    except intrafusion.IntrafusionError:
        assert scale > 1
    else:
        assert all(bool(torch.isfinite(t).all()) for t in small.model.state_dict().values())


def test_a_reducer_that_gives_no_finite_map_is_named() -> None:
    class Broken:
        mixes = False

        def __call__(self, problem: ReductionProblem) -> intrafusion.reduce.ReductionMap:  # type: ignore[name-defined]
            found = Pivot()(problem)
            return type(found)(found.merge * torch.nan, found.unmerge)

    with pytest.raises(ModelError, match=r"group '0': expected a finite map from the reducer, got NaN or infinity"):
        intrafusion.compress(network(), X, 0.5, reducer=Broken(), restore=None)


def test_a_sum_too_large_for_half_precision_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 2, bias=False), nn.Linear(2, 3, bias=False)).half()
    with torch.no_grad():
        model.get_parameter("0.weight").fill_(1.0)
        model.get_parameter("1.weight").fill_(6e4)  # exact duplicates: their readers are added, 120,000
    with pytest.raises(ModelError, match=r"1\.weight: the reduced weights are too large for torch\.float16"):
        intrafusion.compress(model, X[:, :4].half() * 1e-3, 0.5, reducer="intrafusion", restore=None)
