from __future__ import annotations

import pytest
import torch
from torch import nn

import intrafusion
from intrafusion import ModelError, Recipe
from intrafusion.errors import RecipeError
from intrafusion.restore import RESTORERS, LeastSquares, Restorer, get_restorer


def test_registry() -> None:
    assert get_restorer("least_squares") == LeastSquares()
    mine = LeastSquares(rows=10)
    assert get_restorer(mine) is mine
    assert all(isinstance(make(), Restorer) for make in RESTORERS.values())
    with pytest.raises(ValueError, match="unknown restorer 'least_square'. Did you mean 'least_squares'"):
        get_restorer("least_square")
    with pytest.raises(RecipeError, match="expected a name, a mapping with a name or an object with `needs_data`"):
        get_restorer(LeastSquares)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, make in RESTORERS.items() if make().needs_data])
def test_without_images_those_that_need_them_say_so_and_write_nothing(name: str) -> None:
    model = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 3)).eval()
    example = torch.zeros(1, 1, 8, 8)
    graph = intrafusion.inspect(model, example)
    plan = intrafusion.decide(model, graph, Recipe.of(keep=0.5))
    small = intrafusion.apply(model, plan, example, graph=graph)
    before = {n: t.clone() for n, t in small.model.state_dict().items()}
    with pytest.raises(
        ModelError, match=f"{type(get_restorer(name)).__name__} needs images: .* got none; give images="
    ):
        get_restorer(name)(small, model, graph, None)
    assert all(torch.equal(t, before[n]) for n, t in small.model.state_dict().items())
