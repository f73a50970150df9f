"""Layers that run more than once: solved for all their calls together, also where they read what they gave."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion import Recipe
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import find_layers
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.restore import LeastSquares
from intrafusion.restore.solver import _SolvingPasses, record_targets

EXACT = LeastSquares(strength=0.0, scarcity=0.0, steps=0)


class Levels(nn.Module):
    """One head on two levels, as in detectors."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(6, 6, 3, stride=2)
        self.a, self.b, self.last = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 4, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.first(x))
        heads = [self.b(F.relu(self.a(level))).mean((2, 3)) for level in (fine, F.relu(self.second(fine)))]
        return self.last(torch.cat(heads, 1))


class Loop(nn.Module):
    """One residual block applied five times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up, self.down, self.last = nn.Linear(5, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        for _ in range(5):
            h = torch.tanh(h + self.down(F.relu(self.up(h))))
        return self.last(h)


class Remembering(Levels):
    """Keeps what it gave for its next call."""

    kept: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


def error(small: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - model(x)).square().mean() / model(x).var())


def test_the_rows_of_all_calls_are_one_system() -> None:
    model, x = randomise_(Levels()).eval(), torch.randn(20, 3, 9, 9)
    small = copy_model(model)
    small.first.weight.data.add_(0.1 * torch.randn_like(small.first.weight))
    others = {"first", "second", "b", "last"}
    EXACT.solver.solve_(small, {}, model, intrafusion.inspect(model, x[:1]), Inputs.of(x), left=others)
    rows, wanted = [], []
    with torch.no_grad():
        for net, found in ((model, wanted), (small, rows)):
            fine = F.relu(net.first(x))
            for level in (fine, F.relu(net.second(fine))):
                patches = F.unfold(level, 3, padding=1).transpose(1, 2).flatten(0, 1)
                outputs = net.a(level).flatten(2).transpose(1, 2).flatten(0, 1)
                found.append(patches if net is small else outputs)
    inputs = torch.cat([torch.cat(rows), torch.ones(sum(map(len, rows)), 1)], 1).double()
    expected = torch.linalg.lstsq(inputs, torch.cat(wanted).double(), driver="gelsd").solution.T
    torch.testing.assert_close(small.a.weight.double().flatten(1), expected[:, :-1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(small.a.bias.double(), expected[:, -1], atol=1e-4, rtol=1e-4)


def test_spoilt_layers_in_a_row_are_solved_in_the_order_of_their_first_calls() -> None:
    """The one behind reads what the one before gives once that is solved, and the last layer what both give."""
    model, x = randomise_(Levels()).eval(), torch.randn(40, 3, 9, 9)
    small = copy_model(model)
    for layer in (small.first, small.a, small.b, small.last):
        layer.weight.data.add_(torch.randn_like(layer.weight))
    EXACT.solver.solve_(small, {}, model, intrafusion.inspect(model, x[:1]), Inputs.of(x))
    for name, tensor in named_tensors(model).items():
        torch.testing.assert_close(named_tensors(small)[name], tensor, atol=2e-3, rtol=1e-3)


def looped(keep: float) -> tuple[intrafusion.Compressed, nn.Module, intrafusion.ChannelGraph, Tensor]:
    model, x = randomise_(Loop()).eval(), torch.randn(200, 5)
    graph = intrafusion.inspect(model, x[:1])
    looked = intrafusion.restore.calibrate(model, x[:1], images=x)
    plan = intrafusion.decide(model, graph, Recipe.of(keep=keep), x[:1], calibration=looked)
    return intrafusion.apply(model, plan, x[:1], graph=graph), model, graph, x


def test_a_loop_comes_nearer_to_the_original_on_unseen_inputs() -> None:
    small, model, graph, x = looped(0.75)
    unseen = torch.randn(400, 5)
    left = copy.deepcopy(small.model)
    LeastSquares().solver.solve_(left, small.plan.maps, model, graph, Inputs.of(x), left=["up", "down"])
    LeastSquares()(small, model, graph, x)
    assert error(small.model, model, unseen) < 0.9 * error(left, model, unseen)
    assert small.model.up.weight.shape == (12, 6)


def test_a_loop_that_comes_out_worse_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    small, model, graph, x = looped(0.75)

    def spoil(self: _SolvingPasses, name: str, read: list[Tensor]) -> bool:
        self.layers[name].module.weight.data.mul_(100)
        self.changes[name] = (torch.zeros(1), torch.zeros(1))
        return True

    before = {n: getattr(small.model, n).weight.detach().clone() for n in ("up", "down")}
    monkeypatch.setattr(_SolvingPasses, "solve_calls_", spoil)
    solved = LeastSquares().solver.solve_(small.model, small.plan.maps, model, graph, Inputs.of(x))
    assert all(torch.equal(getattr(small.model, name).weight, weight) for name, weight in before.items())
    assert not solved.changes.keys() & before.keys()
    assert "last" in solved.changes


def test_a_right_loop_is_not_touched() -> None:
    small, model, graph, x = looped(1.0)
    before = copy.deepcopy(small.model.state_dict())
    LeastSquares()(small, model, graph, x)
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())


def test_repeated_layers_of_networks_that_keep_a_state_are_left_alone() -> None:
    """There is no second pass that sees the same."""
    found = []
    for network in (Levels, Remembering):
        model, x = randomise_(network()).eval(), torch.randn(20, 3, 9, 9)
        graph, small = intrafusion.inspect(model, x[:1]), copy_model(model)
        small.first.weight.data.mul_(0.5)
        solver = LeastSquares().solver
        found.append(solver.solve_(small, {}, model, graph, Inputs.of(x), left=["first"]).changes.keys())
    assert found == [{"second", "a", "b", "last"}, {"second", "last"}]


def test_rows_of_many_calls_are_no_more_than_of_one() -> None:
    model, x = randomise_(Loop()).eval(), torch.randn(200, 5)
    layers = find_layers(model, intrafusion.inspect(model, x[:1]))
    solver = LeastSquares(rows=150).solver
    targets = record_targets(model, layers, Inputs.of(x), solver)
    assert targets.repeated == ["up", "down"]
    assert [len(places) for places in targets.places["up"]] == [30] * 5
    assert len(targets.rows["up"]) == 150
    assert len(targets.rows["last"]) == 150
