"""Layers to which values send rows are solved on the rows that the original network sends there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery.core import Wired
from torch import Tensor, nn

import intrafusion
from intrafusion.network.inputs import Inputs
from intrafusion.restore.least_squares import LeastSquares


def route(net: Any, x: Tensor, to: Tensor | None = None) -> tuple[Tensor, Tensor]:
    h = F.relu(net.stem(x))
    scores = net.gate(h)
    to = scores.topk(1).indices[:, 0] if to is None else to
    y = torch.zeros_like(h)
    for k, expert in enumerate(net.e):
        rows = torch.where(to == k)[0]
        if len(rows):
            y.index_add_(0, rows, expert(h[rows]))
    return net.head(h + y), scores


def parts() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16)) for _ in range(3)]
    return {"stem": nn.Linear(6, 16), "e": nn.ModuleList(experts), "gate": nn.Linear(16, 3), "head": nn.Linear(16, 4)}


def solve(net: nn.Module, calls: list[Inputs]) -> intrafusion.Compressed:
    small = intrafusion.compress(net, calls[0], 0.5, reducer="select", restore=None)
    graph = intrafusion.inspect(net, calls[0])
    LeastSquares(strength=0.01)(small, net, graph, calls[0].args[0] if len(calls[0].args) == 1 else calls)
    return small


X = torch.randn(90, 6, generator=torch.Generator().manual_seed(5))


def test_experts_are_solved_as_if_their_rows_were_given() -> None:
    own, given = Wired(route, **parts()).eval(), Wired(route, **parts()).eval()
    given.load_state_dict(own.state_dict())
    with torch.no_grad():
        to = own.gate(F.relu(own.stem(X))).argmax(1)
    a, b = solve(own, [Inputs.of(X)]), solve(given, [Inputs.of((X, to))])
    with torch.no_grad():
        again = a.model.gate(F.relu(a.model.stem(X))).argmax(1)
    assert not torch.equal(again, to), "the smaller network must route otherwise, else this shows nothing"
    for name, weight in b.model.named_parameters():
        torch.testing.assert_close(dict(a.model.named_parameters())[name], weight, rtol=1e-3, atol=1e-4)
    before = intrafusion.compress(own, X, 0.5, reducer="select", restore=None)
    assert not torch.equal(a.model.e[0][2].weight, before.model.e[0][2].weight)


@pytest.mark.parametrize("how", ["one batch", "batches"])
def test_given_inputs_route_otherwise_than_the_example(how: str) -> None:
    net = Wired(route, **parts()).eval()
    inputs = X if how == "one batch" else list(X.split(30))
    small = intrafusion.compress(net, X[:1], 0.5, inputs=inputs)
    (step,) = small.restored
    assert step.error_after is not None
    assert step.error_before is not None
    assert step.error_after < step.error_before


def test_a_list_of_experts_is_followed_row_by_row() -> None:
    def wiring(net: Any, x: Tensor) -> Tensor:
        h = F.relu(net.stem(x))
        return net.head(torch.stack([net.e[k](row) for row, k in zip(h, net.gate(x).argmax(1).tolist(), strict=True)]))

    net = Wired(wiring, **{**parts(), "gate": nn.Linear(6, 3)}).eval()
    small = intrafusion.compress(net, X[:2], 0.5, inputs=X)
    assert small.model(X).shape == (90, 4)


def test_rows_that_cannot_be_paired_leave_their_layer_as_it_is() -> None:
    """An array is read, so that nothing says how the original network decided."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        h = F.relu(net.stem(x))
        to = torch.from_numpy(net.gate(h).numpy()).argmax(1)
        rows = torch.tensor([k for k, own in enumerate(to) if int(own) == 0])
        return net.head(h.index_add(0, rows, net.e[0](h[rows])))

    layers = {name: part for name, part in parts().items() if name != "e"}
    expert = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 16))
    net = Wired(wiring, **layers, e=nn.ModuleList([expert])).eval()
    small = intrafusion.compress(net, X, 0.5, reducer="select", importance="l1", restore=None)
    with torch.no_grad():
        small.model.get_parameter("gate.bias")[0] -= 2  # fewer rows come to the expert
    graph = replace(intrafusion.inspect(net, X), ways=())
    before = small.model.get_parameter("e.0.2.weight").detach().clone()
    solved = LeastSquares(strength=0.01).solver.solve_(small.model, small.plan.maps, net, graph, [Inputs.of(X)])
    assert "other rows reach it in the smaller network" in solved.skipped["e.0.2"]
    assert torch.equal(small.model.get_parameter("e.0.2.weight"), before)


def test_layers_along_whose_rows_channels_lie_that_are_fewer() -> None:
    """A layer over time, behind channels: its rows are channels, half of which are not in the smaller network."""

    def wiring(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.time(F.relu(net.stem(x)))[..., 0]))

    torch.manual_seed(0)
    net = Wired(wiring, stem=nn.Conv1d(3, 12, 5, padding=2), time=nn.Linear(20, 1), head=nn.Linear(12, 4)).eval()
    x = torch.randn(64, 3, 20)
    small = intrafusion.compress(net, x[:4], 0.5, inputs=x)
    assert small.plan.sizes == {"stem": 6}
    assert torch.equal(small.model.get_parameter("time.weight"), net.get_parameter("time.weight"))
    fresh = intrafusion.compress(net, x[:4], 0.5, reducer="select", restore=None)
    graph = intrafusion.inspect(net, x[:4])
    solved = LeastSquares(strength=0.01).solver.solve_(fresh.model, fresh.plan.maps, net, graph, [Inputs.of(x)])
    assert "channels that are fewer lie along them" in solved.skipped["time"]
    assert "head" not in solved.skipped
