"""Restoration on images: exact where it can be, better with drift, and nothing but weights is touched."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracle import randomise_
from torch import Tensor, nn

import intrafusion
from intrafusion import IntraFusion, ModelError, Recipe, Select
from intrafusion.compressed import Compressed
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import Layer, find_layers
from intrafusion.network.tensors import named_tensors
from intrafusion.restore import LeastSquares
from intrafusion.restore.places import PlaceSampler
from intrafusion.restore.row_store import RowStore
from intrafusion.restore.shelf import Shelf
from intrafusion.restore.statistics import find_output_merge
from intrafusion.restore.targets import record_targets

EXACT = LeastSquares(strength=0.0, scarcity=0.0)


def branch(width: int, inner: int) -> nn.Sequential:
    first = (nn.Conv2d(width, inner, 3, padding=1), nn.ReLU())
    return nn.Sequential(*first, nn.Conv2d(inner, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))


class Plain(nn.Module):
    """conv bn relu conv bn relu pool linear."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)))
        return self.head(F.relu(self.norm2(self.second(x))).mean((2, 3)))


class Residual(nn.Module):
    """A grouped stem and two residual blocks; `late` computes the shortcut after the branch."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.stem = nn.Sequential(nn.Conv2d(3, 9, 3, padding=1, groups=3), nn.ReLU())
        self.a, self.b = branch(9, 24), branch(9, 24)
        self.head = nn.Linear(9, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for branch in (self.a, self.b):
            if self.late:
                y = branch(x)
                x = F.relu(y + x.clone())
            else:
                short = x.clone()
                x = F.relu(branch(x).add_(short))
        return self.head(x.mean((2, 3)))


def made(network: type[nn.Module], *args: object) -> nn.Module:
    return randomise_(network(*args)).eval()


def images(n: int = 24, size: int = 10) -> Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(5))


def shrunk(model: nn.Module, example: Tensor, **options: object) -> tuple[Compressed, intrafusion.ChannelGraph]:
    graph = intrafusion.inspect(model, example)
    plan = intrafusion.decide(model, graph, Recipe.of(**options))
    return intrafusion.apply(model, plan, example, graph=graph), graph


def first_ones(group: intrafusion.ChannelGroup, weights: object, observations: object) -> Tensor:
    """An importance that keeps the first m channels."""
    return -torch.arange(group.size).double()


def make_store(batches: list[Inputs]) -> RowStore:
    return RowStore(PlaceSampler(batches, 20_000, 0), Shelf(2**30))


def error(small: nn.Module, model: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((small(x) - model(x)).norm() / model(x).norm())


def duplicate_(model: Plain) -> None:
    """Channels 4..7 of the first layer become copies of 0..3, also for the layer that reads them."""
    model.second.weight.data[:, 4:] = model.second.weight.data[:, :4]
    for tensor in (model.first.weight, *named_tensors(model.norm1).values()):
        if tensor.dim():
            tensor.data[4:] = tensor.data[:4]


# ---- exact where it can be ------------------------------------------------------------------------------------------


def test_duplicates_that_pruning_lost_come_back() -> None:
    model = made(Plain)
    duplicate_(model)  # type: ignore[arg-type]
    small, graph = shrunk(model, images(1), keep=0.5, reducer=Select(), importance=first_ones, include="first")
    assert error(small.model, model, images()) > 0.05
    EXACT(small, model, graph, images())
    assert error(small.model, model, images()) < 1e-4
    assert error(small.model, model, torch.randn(9, 3, 10, 10)) < 1e-4


def test_what_is_right_already_is_not_touched() -> None:
    model = made(Plain)
    duplicate_(model)  # type: ignore[arg-type]
    fusion = IntraFusion(normalization="function")
    small, graph = shrunk(model, images(1), keep=0.5, reducer=fusion, importance=first_ones, include="first")
    before = copy.deepcopy(small.model.state_dict())
    assert error(small.model, model, images()) < 1e-5
    LeastSquares()(small, model, graph, images())
    assert all(torch.equal(value, before[name]) for name, value in small.model.state_dict().items())


def test_nothing_reduced_nothing_written() -> None:
    model = made(Residual)
    small, graph = shrunk(model, images(1), keep=1.0)
    LeastSquares()(small, model, graph, images())
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in small.model.state_dict().items())


@pytest.mark.parametrize("spoil", ["weight", "shift"])
def test_a_spoilt_layer_is_solved_for(spoil: str) -> None:
    """With more rows than unknowns and no ridge, the original weights are the one solution."""
    model = made(Plain)
    small, graph = shrunk(model, images(1), keep=1.0)
    second, norm = small.model.second, small.model.norm2
    target = second.weight if spoil == "weight" else norm.running_mean
    target.data.add_(torch.randn_like(target))
    EXACT(small, model, graph, images())
    torch.testing.assert_close(second.weight, model.second.weight, atol=1e-4, rtol=0)
    torch.testing.assert_close(norm.running_mean, model.norm2.running_mean, atol=1e-3, rtol=0)


def test_merged_outputs_are_the_target() -> None:
    """A layer that reads and produces reduced groups is solved for M y, in the space behind the norm."""
    model = made(Plain)
    small, graph = shrunk(model, images(1), keep=0.5, reducer=IntraFusion(), exclude="first")
    merge = small.plan.maps["second"].merge.float()
    x = images()
    with torch.no_grad():
        wanted = torch.einsum("mn,bnhw->bmhw", merge, model.norm2(model.second(F.relu(model.norm1(model.first(x))))))
    small.model.second.weight.data.mul_(0.5)
    replace(EXACT, steps=0)(small, model, graph, x)
    with torch.no_grad():
        got = small.model.norm2(small.model.second(F.relu(small.model.norm1(small.model.first(x)))))
    torch.testing.assert_close(got, wanted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("reducer", ["select", "intrafusion"])
def test_steps_lead_to_what_the_activation_function_gives(reducer: str) -> None:
    """Of what the next layer reads, M relu(y), less is missing with every further solution."""
    model, x, missing = made(Plain), images(60), []
    for steps in (0, 1, 4):
        small, graph = shrunk(model, images(1), keep=0.5, reducer=reducer)
        LeastSquares(steps=steps)(small, model, graph, x)
        with torch.no_grad():
            wanted = F.relu(model.norm1(model.first(x)))
            wanted = F.relu(model.norm2(model.second(wanted)))
            wanted = torch.einsum("mn,bnhw->bmhw", small.plan.maps["second"].merge.float(), wanted)
            got = F.relu(small.model.norm1(small.model.first(x)))
            got = F.relu(small.model.norm2(small.model.second(got)))
        missing.append(float((got - wanted).norm() / wanted.norm()))
    assert missing[0] > 1.01 * missing[1] > 1.02 * missing[2]


def test_output_merge_is_the_merge_along_the_produced_channels() -> None:
    model = made(Plain)
    small, graph = shrunk(model, images(1), keep=0.5, reducer=IntraFusion())
    found = find_output_merge(Layer("first", model.first), graph, small.plan.maps)
    assert found is not None
    torch.testing.assert_close(found, small.plan.maps["first"].merge)
    assert find_output_merge(Layer("head", model.head), graph, small.plan.maps) is None


# ---- better ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["shortcut first", "shortcut last"])
def test_drift_of_the_other_branch_is_made_up_for(late: bool) -> None:
    """The stem is off and left alone: only the branches can make up for what it adds."""
    model, unseen = made(Residual, late), torch.randn(40, 3, 10, 10)
    model.head = nn.Identity()
    errors = {}
    for drift in (True, False):
        small, graph = shrunk(model, images(1), keep=1.0)
        small.model.stem[0].weight.data.mul_(0.7)
        solver, x = LeastSquares(drift=drift).solver, [Inputs.of(images(60))]
        solver.solve_(small.model, small.plan.maps, model, graph, x, left=["stem.0"])
        errors[drift] = error(small.model, model, unseen)
    assert errors[True] < 0.5 * errors[False]


@pytest.mark.parametrize("late", [False, True], ids=["shortcut first", "shortcut last"])
def test_layers_that_write_one_stream_are_solved_in_the_order_of_the_forward_pass(late: bool) -> None:
    model = made(Residual, late)
    small, graph = shrunk(model, images(1), keep=0.5, reducer="select")
    solved = LeastSquares(strength=1e-3).solver.solve_(
        small.model, small.plan.maps, model, graph, [Inputs.of(images())]
    )
    assert list(solved.changes) == ["a.2", "b.0", "b.2", "head"]  # a.0 reads what was selected


def test_the_function_behind_a_sum_is_that_of_the_sum_only() -> None:
    model, x = made(Residual), Inputs.of(images())
    layers = find_layers(model, intrafusion.inspect(model, images(1)))
    last = {"a.2", "b.2"}
    for drift, expected in ((True, {"a.0", "b.0"} | last), (False, {"a.0", "b.0"})):
        targets = record_targets(model, layers, [x], make_store([x]), drift=drift)
        assert set(targets.activations) == expected
        assert targets.summed == (last if drift else set())


class Returned(Plain):
    """Gives what the second layer's norm gave beside its result."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        z = self.norm2(self.second(F.relu(self.norm1(self.first(x)))))
        return self.head(F.relu(z).mean((2, 3))), z


def test_what_the_network_returns_must_be_right_itself() -> None:
    for network, expected in ((Plain, {"first", "second"}), (Returned, {"first"})):
        model = made(network)
        layers = find_layers(model, intrafusion.inspect(model, images(1)))
        x = Inputs.of(images())
        assert set(record_targets(model, layers, [x], make_store([x])).activations) == expected


def test_both_orders_of_a_sum_give_the_same() -> None:
    found = []
    for late in (False, True):
        model = made(Residual, late)
        small, graph = shrunk(model, images(1), keep=0.5, reducer="select")
        LeastSquares()(small, model, graph, images())
        found.append(small.model.state_dict())
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], atol=1e-5, rtol=1e-4)


class Tokens(nn.Module):
    """A small MLP block on token sequences between layer norms."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(6, 12), nn.LayerNorm(12)
        self.up, self.down, self.head = nn.Linear(12, 32), nn.Linear(32, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + F.dropout(self.down(F.gelu(self.up(self.norm(x)))), 0.1, self.training)
        return self.head(x.mean(1))


class Keywords(Plain):
    """Calls its layers by keyword."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(input=x)))
        return self.head(input=F.relu(self.norm2(self.second(input=x))).mean((2, 3)))


def test_layers_called_by_keyword() -> None:
    found = []
    for network in (Plain, Keywords):
        model = made(network)
        found.append(intrafusion.compress(model, images(1), 0.5, images=images()).model.state_dict())
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_linear_layers_on_tokens() -> None:
    model, x = made(Tokens), torch.randn(64, 7, 6)
    small, graph = shrunk(model, x[:1], keep=0.5, reducer="select", include="up")
    before = error(small.model, model, x)
    LeastSquares()(small, model, graph, x)
    assert error(small.model, model, torch.randn(30, 7, 6)) < 0.6 * before


# ---- nothing else is touched ----------------------------------------------------------------------------------------


class Depthwise(nn.Module):
    """pointwise, depthwise, grouped, pointwise; the last layer has no place for a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.point = nn.Conv2d(3, 8, 1)
        self.depth = nn.Conv2d(8, 8, 3, groups=8)
        self.mix = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 8, 3, groups=2)
        self.twice = nn.Conv2d(8, 8, 1)
        self.last = nn.Conv2d(8, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.relu(self.mix(F.relu(self.depth(F.relu(self.point(x))))))))
        return self.last(F.relu(self.twice(F.relu(self.twice(x)))))


def test_what_reads_something_new_is_solved_and_nothing_else() -> None:
    model = made(Depthwise)
    small, graph = shrunk(model, images(1), keep=0.5, reducer="select", include="point")
    before = {n: t.clone() for n, t in named_tensors(small.model).items()}
    LeastSquares(strength=1e-3)(small, model, graph, images())
    changed = {n for n, t in named_tensors(small.model).items() if not torch.equal(t, before[n])}
    behind = {f"{name}.{part}" for name in ("mix", "grouped", "twice") for part in ("weight", "bias")}
    assert changed == behind | {"last.weight"}  # the depthwise layer reads what was selected


class SamePad(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(F.pad(input, (0, 1, 0, 1)))


class Positive(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, F.softplus(self.weight), self.bias)


@pytest.mark.parametrize(("convolution", "solved"), [(SamePad, {"2.weight", "2.bias"}), (Positive, set())])
def test_of_subclasses_that_do_more_than_a_product_those_are_solved_that_use_the_weight_as_it_is(
    convolution: type[nn.Conv2d], solved: set[str]
) -> None:
    layers = (
        nn.Conv2d(3, 8, 1),
        nn.ReLU(),
        convolution(8, 8, 3, stride=2),
        nn.ReLU(),
        nn.Conv2d(8, 4, 1),
        nn.Flatten(),
    )
    model = made(nn.Sequential, *layers)  # type: ignore[arg-type]
    small, graph = shrunk(model, images(1), keep=0.5, reducer="select", include="0")
    before = {n: t.clone() for n, t in named_tensors(small.model).items()}
    LeastSquares(strength=1e-3)(small, model, graph, images())
    changed = {n for n, t in named_tensors(small.model).items() if not torch.equal(t, before[n])}
    assert changed == {"4.weight", "4.bias"} | solved


def test_structure_modes_hooks_and_gradients_survive(tmp_path: Path) -> None:
    model = made(Plain)
    model.train()
    model.norm1.eval()
    small, graph = shrunk(model, images(1), keep=0.5, reducer="select")
    small.model.requires_grad_(False)
    parameters = dict(small.model.named_parameters())
    seen: list[int] = []
    handle = small.model.second.register_forward_hook(lambda *_: seen.append(1))
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    LeastSquares()(small, model, graph, images())
    handle.remove()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    for network in (model, small.model):
        assert [m.training for m in network.modules()] == [True, True, False, True, True, True]
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert all(p is parameters[n] and not p.requires_grad for n, p in small.model.named_parameters())
    small.save(tmp_path / "small")
    loaded = intrafusion.load(tmp_path / "small", Plain).eval()
    small.model.eval()
    assert error(loaded, small.model, images()) == 0.0


class Failing(Plain):
    """Fails on images of more than 30 channels-last entries below its second layer, in the smaller network only."""

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.first(x)))
        x = F.relu(self.norm2(self.second(x)))
        if len(x) > 1 and x.shape[1] < 6:
            raise RuntimeError("no more")
        return self.head(x.mean((2, 3)))


def test_an_error_half_way_changes_nothing() -> None:
    model = made(Failing)
    small, graph = shrunk(model, images(1), keep=0.5, reducer="select")
    before = copy.deepcopy(small.model.state_dict())
    with pytest.raises(ModelError, match="no more"):
        LeastSquares()(small, model, graph, images())
    with pytest.raises(ModelError, match="first: the original network gives NaN"):
        LeastSquares()(small, model, graph, images() * float("nan"))
    assert all(torch.equal(v, before[n]) for n, v in small.model.state_dict().items())
    assert not any(m._forward_hooks for network in (model, small.model) for m in network.modules())


def test_an_overflow_in_the_smaller_network_is_an_error_that_names_the_layer() -> None:
    model = made(Plain)
    small, graph = shrunk(model, images(1), keep=0.5, reducer="select")
    with torch.no_grad():
        small.model.first.weight.mul_(1e38)
        small.model.norm1.weight.mul_(1e38)
    before = copy.deepcopy(small.model.state_dict())
    with pytest.raises(ModelError, match=r"first: restoring gives NaN or infinity, as the smaller network does"):
        LeastSquares()(small, model, graph, images())
    assert all(torch.equal(v, before[n]) for n, v in small.model.state_dict().items())


def test_same_seed_same_bytes_other_seed_other_rows() -> None:
    model = made(Plain)
    found = []
    for seed in (0, 0, 1):
        small, graph = shrunk(model, images(1), keep=0.5, reducer="select")
        LeastSquares(seed=seed, rows=200)(small, model, graph, images())
        found.append(small.model.second.weight.detach().clone())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_half_precision_stays_half() -> None:
    model = made(Plain).bfloat16()
    small, graph = shrunk(model, images(1).bfloat16(), keep=0.5, reducer="select")
    before = error(small.model.float(), copy.deepcopy(model).float(), images())
    small.model.bfloat16()
    LeastSquares()(small, model, graph, images())
    assert {p.dtype for p in small.model.parameters()} == {torch.bfloat16}
    assert error(small.model.float(), copy.deepcopy(model).float(), images()) < 0.8 * before


@pytest.mark.parametrize(
    ("options", "message"),
    [({"strength": -1.0}, "strength: expected a number >= 0"), ({"rows": 1}, "rows: expected at least 2")],
)
def test_hyper_parameters_are_checked(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LeastSquares(**options)  # type: ignore[arg-type]


# ---- real images ----------------------------------------------------------------------------------------------------


def test_half_of_a_real_network(data_dir: Path) -> None:
    from intrafusion.lab import zoo
    from intrafusion.measure.accuracy import accuracy

    name = "cifar10_resnet20_pad"
    model, example = zoo.build(name, pretrained=True), zoo.example_input(name)
    calibration, test = zoo.load_data(name, "train", limit=256), zoo.load_data(name, "test", limit=500)
    graph = intrafusion.inspect(model, example)
    inner = [g.producers[0] for g in graph.reducible if len(g.producers) == 1]
    plan = intrafusion.decide(model, graph, Recipe.of(keep=0.5, reducer="select", include=inner))
    small = intrafusion.apply(model, plan, example, graph=graph)
    assert accuracy(small.model, test.images, test.labels) < 0.4
    LeastSquares()(small, model, graph, calibration.images)
    assert accuracy(small.model, test.images, test.labels) >= 0.77
