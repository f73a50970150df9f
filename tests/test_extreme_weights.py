"""Weights at the ends of what numbers hold: an error of the library or a finite result, and the original as it was."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import ChannelGraph, Compressed, IntrafusionError, ModelError, Recipe, compress
from intrafusion.network.tensors import named_tensors
from intrafusion.pipeline import follow

METHODS: dict[str, dict[str, Any]] = {
    **{reducer: {"reducer": reducer, "restore": None} for reducer in ("pivot", "intrafusion", "fold", "select")},
    **{restore: {"restore": restore} for restore in ("noise", "images", "closed_form", "reestimate", "repair")},
    "synthetic": {"restore": "synthetic"},
}


class Net(nn.Module):
    """Two convolutions with a norm behind the first, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 8, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(x)).relu()).relu().mean((2, 3)))


def scaled(factor: float, dtype: torch.dtype) -> nn.Module:
    """A network whose weights are as large, or as small, as the factor."""
    model = Net().to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(factor)
    return model


def broken(dtype: torch.dtype) -> nn.Module:
    model = scaled(1.0, dtype)
    with torch.no_grad():
        model.get_parameter("second.weight")[0, 0, 0, 0] = float("inf")
    return model


MAKERS: dict[str, Callable[[torch.dtype], nn.Module]] = {
    "1e15": lambda dtype: scaled(1e15, dtype),
    "1e30": lambda dtype: scaled(1e30, dtype),
    "denormal": lambda dtype: scaled(1e-40, dtype),
    "zero": lambda dtype: scaled(0.0, dtype),
    "one infinity": broken,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("kind", MAKERS)
def test_an_error_or_a_finite_result(kind: str, dtype: torch.dtype) -> None:
    model, images = MAKERS[kind](dtype), torch.randn(40, 2, 7, 7).to(dtype)
    before = copy.deepcopy(model.state_dict())
    for name, found in compressed_or_refused(model, images):
        if isinstance(found, Compressed):
            not_finite = [n for n, t in named_tensors(found.model).items() if not bool(t.isfinite().all())]
            assert not not_finite, f"{name}: {not_finite} are not finite"
        else:
            assert "NaN or infinity" in str(found), name
            assert (kind, dtype) not in SMALL, f"{name}: what is small is no reason to refuse"
        assert all(torch.equal(model.state_dict()[n], t) for n, t in before.items()), f"{name}: writes to the original"


SMALL = [("denormal", torch.float64), ("zero", torch.float64)]


def compressed_or_refused(model: nn.Module, images: Tensor) -> Iterator[tuple[str, Compressed | IntrafusionError]]:
    """As `compress` does, with the network inspected once."""
    graph: ChannelGraph | None = None
    for name, options in METHODS.items():
        given = None if options["restore"] in ("noise", "synthetic") else images
        try:
            graph = intrafusion.inspect(model, images[:2]) if graph is None else graph
            yield name, follow(Recipe.of(keep=0.5, **options), model, graph, images[:2], given)
        except IntrafusionError as error:
            yield name, error


def test_one_infinity_is_called_by_the_name_of_its_tensor() -> None:
    with pytest.raises(ModelError, match="second.weight: expected finite weights, got NaN or infinity"):
        compress(broken(torch.float64), torch.randn(2, 2, 7, 7).double(), 0.5)
