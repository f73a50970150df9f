"""Batches of as many images as there are positions: rows are those of the right image nevertheless."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from breadth import spread
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion.network.batches import cut_call
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import find_layers, is_solvable
from intrafusion.network.row_weights import RowWeights
from intrafusion.network.state import preserve_state
from intrafusion.observe.image_dims import find_image_dims
from intrafusion.observe.moments import MomentTaker
from intrafusion.reduce.problem import Moments
from intrafusion.restore.places import PlaceSampler
from intrafusion.restore.row_store import RowStore
from intrafusion.restore.shelf import Shelf
from intrafusion.restore.targets import Targets, record_targets

IMAGES = 7


class Attends(nn.Module):
    """Attention to itself and to the first positions, a product over windows, and one with a parameter."""

    def __init__(self, *, batch_first: bool = True, first: int = 3, fixed: bool = False) -> None:
        super().__init__()
        self.stem, self.batch_first, self.first, self.fixed = nn.Linear(5, 8), batch_first, first, fixed
        self.own, self.across = (nn.MultiheadAttention(8, 2, batch_first=batch_first) for _ in range(2))
        self.rows, self.columns = nn.Parameter(torch.randn(6, 8)), nn.Parameter(torch.randn(8, 4))

    def forward(self, x: Tensor) -> Tensor:
        if self.fixed and len(x) != IMAGES:
            raise RuntimeError("takes seven images")
        x = self.stem(x)
        turn = (lambda t: t) if self.batch_first else lambda t: t.transpose(0, 1)
        own = turn(x)
        x = x + turn(self.own(own, own, own, need_weights=False)[0])
        x = x + turn(self.across(turn(x), turn(x[:, : self.first]), turn(x[:, : self.first]))[0])
        windows = x.unflatten(1, (-1, IMAGES)).flatten(0, 1) if x.shape[1] % IMAGES == 0 else x
        return F.linear(x, self.rows).tanh().mean(1), (windows @ self.columns).tanh()


def make(length: int, **options: Any) -> tuple[nn.Module, intrafusion.ChannelGraph, Tensor]:
    """Images that differ much from each other, and little within."""
    torch.manual_seed(0)
    model = randomise_(Attends(**options)).eval()
    x = 0.1 * torch.randn(IMAGES, length, 5) + 3 * torch.randn(IMAGES, 1, 5)
    return model, intrafusion.inspect(model, x if options.get("fixed") else x[:2]), x


def record(model: nn.Module, graph: Any, batches: list[Inputs]) -> Targets:
    store = RowStore(PlaceSampler(batches, 20_000, 0), Shelf(2**30))
    return record_targets(model, find_layers(model, graph, is_solvable), batches, store, graph=graph)


@pytest.mark.parametrize(
    ("shape", "size"),
    spread([(n, first) for n in (5, IMAGES, 2 * IMAGES, 4) for first in (True, False)], [IMAGES, 4, 3]),
)
def test_rows_are_those_of_their_image(shape: tuple[int, bool], size: int) -> None:
    length, batch_first = shape
    model, graph, x = make(length, batch_first=batch_first)
    targets = record(model, graph, cut_call(Inputs.of(x), size))
    rows = {name: targets.store.take(name) for name in targets.layers if "proj_weight" in name or name[-1] == "]"}
    assert rows.keys() >= {"own.in_proj_weight[0]", "across.in_proj_weight[1]", "rows[0]", "columns[0]"}
    with torch.no_grad():
        alone = [record(model, graph, [Inputs.of(image[None])]) for image in x]
    for name, found in rows.items():
        for index, one in enumerate(alone):
            expected = one.store.take(name) if name in one.store.rows else None
            own = found[targets.store.images[name] == index]
            if expected is not None:
                torch.testing.assert_close(own, expected, atol=1e-4, rtol=1e-4, msg=lambda m: f"{name}: {m}")  # noqa: B023


def take_moments(model: nn.Module, graph: Any, batches: list[Inputs]) -> dict[str, Moments]:
    taker = MomentTaker(model, graph).look_at(batches)
    for call in batches:
        with preserve_state(model), taker:
            call.call(model)
    return taker.moments()


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("length", [IMAGES, 4])
def test_moments_of_queries_do_not_depend_on_how_images_are_cut(length: int, batch_first: bool) -> None:
    model, graph, x = make(length, batch_first=batch_first)
    assert any(g.with_role(intrafusion.graph.Role.MATCHES) for g in graph.reducible)
    found, expected = (take_moments(model, graph, cut_call(Inputs.of(x), size)) for size in (IMAGES, 1))
    for name, moments in expected.items():
        for field in fields(moments):
            if isinstance(value := getattr(moments, field.name), Tensor):
                other = getattr(found[name], field.name)
                torch.testing.assert_close(other, value, rtol=1e-4, atol=1e-4 * float(value.abs().max()) + 1e-9)


def test_rows_of_images_that_count_differently() -> None:
    """Whose number, with the one that stands there twice, is that of the positions."""
    model, graph, x = make(IMAGES + 1)
    counts = torch.tensor([1.0, 0, 2, 3, 0, 4, 5], dtype=torch.float64)[:, None]
    store = record(model, graph, [Inputs((x,), weights=RowWeights((counts,)))]).store
    for name in ("own.in_proj_weight[0]", "rows[0]"):
        expected = counts[:, 0][store.images[name]]
        weights = store.weights[name]
        assert weights is not None
        torch.testing.assert_close(weights[:, 0], expected / expected.mean())
        assert len(weights) == 5 * (IMAGES + 1)


def test_where_it_is_not_seen_layers_are_left_alone() -> None:
    model, graph, x = make(IMAGES, fixed=True)
    assert find_image_dims(model, graph, Inputs.of(x)) == {}
    targets = record(model, graph, [Inputs.of(x)])
    assert "which of 7 images is not seen" in targets.skipped["own.in_proj_weight[0]"]
    assert "stem" in targets.layers
    model, graph, x = make(5, fixed=True)
    assert "own.in_proj_weight[0]" in record(model, graph, [Inputs.of(x)]).layers
