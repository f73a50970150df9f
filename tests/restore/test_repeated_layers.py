"""Layers that run more than once: solved for all their calls together, also where they read what they gave."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion import Recipe
from intrafusion.network.batches import cut_call
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import find_layers
from intrafusion.network.tensors import copy_model, named_tensors
from intrafusion.restore import LeastSquares
from intrafusion.restore.places import PlaceSampler
from intrafusion.restore.row_store import RowStore
from intrafusion.restore.shelf import Shelf
from intrafusion.restore.solver import _Solving
from intrafusion.restore.targets import record_targets

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
    EXACT.solver.solve_(small, {}, model, intrafusion.inspect(model, x[:1]), [Inputs.of(x)], left=others)
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
    EXACT.solver.solve_(small, {}, model, intrafusion.inspect(model, x[:1]), [Inputs.of(x)])
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
    LeastSquares().solver.solve_(left, small.plan.maps, model, graph, [Inputs.of(x)], left=["up", "down"])
    LeastSquares()(small, model, graph, x)
    assert error(small.model, model, unseen) < 0.9 * error(left, model, unseen)
    assert small.model.up.weight.shape == (12, 6)


@pytest.mark.parametrize("falls", [0.5, 0.995, 1.0])
def test_a_loop_is_solved_until_its_error_falls_no_longer_and_else_that_is_told(
    falls: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fall by less than one hundredth is none; two layers, of which solving each once must have led no further."""
    small, model, graph, x = looped(0.75)
    solved: list[str] = []
    error = itertools.count()
    monkeypatch.setattr(_Solving, "measure", lambda self, name, read: falls ** (next(error) // 2))
    monkeypatch.setattr(_Solving, "solve_calls_", lambda self, name, read: solved.append(name))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        LeastSquares().solver.solve_(small.model, small.plan.maps, model, graph, [Inputs.of(x)])
    told = [str(w.message) for w in caught if "still got better by 1% or more" in str(w.message)]
    assert solved[:2] == ["up", "down"]
    if falls == 0.5:
        assert solved == ["up", "down"] * 4
        assert "down, up, which read what they gave" in told[0]
    else:
        assert not told
        rest = solved[3:]  # of none better, the first calls are tried alone
        assert rest == ([] if falls < 1 else ["up", "down"] * 4)


def test_a_loop_that_comes_out_worse_stays_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    small, model, graph, x = looped(0.75)

    def spoil(self: _Solving, name: str, read: list[Tensor]) -> bool:
        self.layers[name].module.weight.data.mul_(100)
        self.changes[name] = (torch.zeros(1), torch.zeros(1))
        return True

    before = {n: getattr(small.model, n).weight.detach().clone() for n in ("up", "down")}
    monkeypatch.setattr(_Solving, "solve_calls_", spoil)
    solved = LeastSquares().solver.solve_(small.model, small.plan.maps, model, graph, [Inputs.of(x)])
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
        solver = LeastSquares(strength=1e-3).solver
        found.append(solver.solve_(small, {}, model, graph, [Inputs.of(x)], left=["first"]).changes.keys())
    assert found == [{"second", "a", "b", "last"}, {"second", "last"}]


def test_rows_of_many_calls_are_no_more_than_of_one() -> None:
    model, x = randomise_(Loop()).eval(), torch.randn(200, 5)
    layers = find_layers(model, intrafusion.inspect(model, x[:1]))
    places = []
    for batches in ([Inputs.of(x)], cut_call(Inputs.of(x), 50)):
        store = RowStore(PlaceSampler(batches, 150, 0), Shelf(2**30))
        targets = record_targets(model, layers, batches, store)
        assert targets.repeated == ["up", "down"]
        assert targets.calls["up"] == ["up", "up@2", "up@3", "up@4", "up@5"]
        places.append({key: torch.cat([p + 50 * b for b, p in enumerate(own)]) for key, own in store.places.items()})
        assert [len(places[-1][key]) for key in (*targets.calls["up"], "last")] == [30] * 5 + [150]
        assert [len(store.take(key)) for key in ("up", "up@5", "last")] == [30, 30, 150]
    assert all(torch.equal(own, places[1][key]) for key, own in places[0].items())


@pytest.mark.parametrize("network", [Levels, Loop])
@pytest.mark.parametrize("rows", [20_000, 100], ids=["all places", "sampled"])
def test_batches_give_what_one_call_gives(network: type[nn.Module], rows: int) -> None:
    model, x = randomise_(network()).eval(), torch.randn(*((24, 5) if network is Loop else (20, 3, 9, 9)))
    graph, made = intrafusion.inspect(model, x[:1]), intrafusion.compress(model, x[:1], 0.75, restore=None)
    found = []
    for batches in ([Inputs.of(x)], cut_call(Inputs.of(x), 16), cut_call(Inputs.of(x), 1)):
        small = copy_model(made.model)
        solved = LeastSquares(rows=rows).solver.solve_(small, made.plan.maps, model, graph, batches)
        found.append((solved.changes.keys(), named_tensors(small)))
    assert found[0][0] & {"a", "b", "up", "down"}
    for names, tensors in found[1:]:
        assert names == found[0][0]
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, found[0][1][name], atol=1e-4, rtol=1e-3)


class Counting(Levels):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return super().forward(x) + self.count


def test_each_pass_begins_with_the_buffers_as_they_were() -> None:
    found = []
    for network in (Levels, Counting):
        torch.manual_seed(0)
        model, x = randomise_(network()).eval(), torch.randn(20, 3, 9, 9)
        graph, small = intrafusion.inspect(model, x[:1]), copy_model(model)
        small.first.weight.data.mul_(0.5)
        EXACT.solver.solve_(small, {}, model, graph, [Inputs.of(x)], left=["first"])
        found.append(small.last.bias.detach())
    torch.testing.assert_close(*found)


class Changing(Levels):
    """Behind the same layer, another function at each level."""

    def forward(self, x: Tensor) -> Tensor:
        fine = F.relu(self.first(x))
        heads = [self.b(f(self.a(level))).mean((2, 3)) for f, level in ((F.relu, fine), (F.silu, self.second(fine)))]
        return self.last(torch.cat(heads, 1))


@pytest.mark.parametrize(("network", "expected"), [(Levels, {"first", "second", "a"}), (Changing, {"first"})])
def test_the_function_behind_a_layer_is_the_same_at_all_its_calls(network: type[nn.Module], expected: set[str]) -> None:
    model, x = randomise_(network()).eval(), torch.randn(20, 3, 9, 9)
    layers, batches = find_layers(model, intrafusion.inspect(model, x[:1])), [Inputs.of(x)]
    store = RowStore(PlaceSampler(batches, 150, 0), Shelf(2**30))
    assert record_targets(model, layers, batches, store).activations.keys() == expected


def test_a_loop_that_enters_sums_has_no_function_behind_it() -> None:
    """That of the sum is not its own."""
    model, x = randomise_(Loop()).eval(), torch.randn(20, 5)
    layers, batches = find_layers(model, intrafusion.inspect(model, x[:1])), [Inputs.of(x)]
    targets = record_targets(model, layers, batches, RowStore(PlaceSampler(batches, 150, 0), Shelf(2**30)))
    assert targets.activations.keys() == {"first", "up"}
    assert not targets.summed


def test_what_a_file_holds_between_passes_comes_back_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = randomise_(Levels()).eval(), torch.randn(24, 3, 33, 33)
    graph, made = intrafusion.inspect(model, x[:1]), intrafusion.compress(model, x[:1], 0.75, restore=None)
    found, away, put_away = [], [], Shelf._put_away
    monkeypatch.setattr(Shelf, "_put_away", lambda self, *args: (put_away(self, *args), away.append(args)))
    for memory in (None, 800_000):
        small = copy_model(made.model)
        solver, batches = LeastSquares(rows=2_000).solver, cut_call(Inputs.of(x), 8)
        solver.solve_(small, made.plan.maps, model, graph, batches, memory=memory)
        found.append(named_tensors(small))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
    assert len(away) > 10
