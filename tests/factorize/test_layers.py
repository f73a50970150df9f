"""Low rank: nearest products, exact at full rank, rules that meet budgets, saved and loaded."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch import Tensor, nn

import intrafusion
from intrafusion import ArgumentError, BudgetError, ModelError, PlanError
from intrafusion.factorize import Energy, Factorized, Global, Share, Smooth, Spectrum, factorize, spectra, spectrum
from intrafusion.factorize.svd import factorize_layer
from intrafusion.lab import zoo
from intrafusion.lab.zoo.networks import BasicBlock, ResNet
from intrafusion.measure.accuracy import accuracy
from intrafusion.surgery.lowrank import LowRank, split_layers_

LAYERS = [
    (nn.Linear(7, 5), (3, 7)),
    (nn.Linear(7, 5, bias=False), (2, 4, 7)),
    (nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 11, 11)),
    (nn.Conv2d(4, 6, (3, 1), padding="same", padding_mode="circular", bias=False), (2, 4, 7, 7)),
    (nn.Conv2d(4, 6, 3, padding=2, padding_mode="reflect", groups=2), (2, 4, 7, 7)),
    (nn.Conv1d(4, 8, 5, stride=3, padding=2, groups=4), (2, 4, 17)),
    (nn.Conv3d(2, 4, 2, padding=1, padding_mode="replicate"), (1, 2, 4, 4, 4)),
]


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: str(x)[:60])
def test_full_rank_is_the_same_function(layer: nn.Module, shape: tuple[int, ...]) -> None:
    layer, x = copy.deepcopy(layer).double(), torch.randn(*shape, dtype=torch.float64)
    full = spectrum("", layer).full
    torch.testing.assert_close(factorize_layer(layer, full)(x), layer(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("layer", "shape"), LAYERS, ids=lambda x: str(x)[:60])
def test_a_lower_rank_is_the_nearest_matrix_of_that_rank(layer: nn.Module, shape: tuple[int, ...]) -> None:
    """The oracle: NumPy's SVD, each group cut, written into a layer of the original kind."""
    layer, x = copy.deepcopy(layer).double(), torch.randn(*shape, dtype=torch.float64)
    cut, groups = copy.deepcopy(layer), getattr(layer, "groups", 1)
    parts = []
    for part in np.split(layer.weight.detach().numpy(), groups):
        u, s, vh = np.linalg.svd(part.reshape(len(part), -1), full_matrices=False)
        parts.append(((u[:, :1] * s[:1]) @ vh[:1]).reshape(part.shape))
    cut.weight.data = torch.from_numpy(np.concatenate(parts))
    split = factorize_layer(layer, 1)
    torch.testing.assert_close(split(x), cut(x), rtol=1e-10, atol=1e-10)
    assert split.rank == 1
    with torch.no_grad():
        assert oracle.relative_difference([split(x)], [layer(x)]) > 1e-3


def test_parameters_are_what_the_spectrum_says() -> None:
    for layer, _ in LAYERS:
        found, own = spectrum("x", layer), spectrum("x", layer)
        weights = lambda m: sum(p.numel() for n, p in m.named_parameters() if n.endswith("weight"))  # noqa: E731
        assert found.dense == weights(layer)
        assert weights(factorize_layer(layer, 1)) == found.step
        if own.largest:
            assert own.cost(own.largest) < own.dense
        assert own.cost(own.largest + 1) == own.dense
        assert (own.largest + 1) * own.step >= own.dense or own.largest == own.full


# ---- rules ----------------------------------------------------------------------------------------------------------


def table(name: str, values: list[float], outputs: int, inputs: int) -> Spectrum:
    return Spectrum(name, torch.tensor([values], dtype=torch.float64), outputs, inputs)


A, B = table("a", [5.0, 3.0, 1.0, 0.5], 4, 12), table("b", [4.0, 2.0, 0.1], 3, 9)


def test_share_gives_each_layer_the_same_fraction() -> None:
    assert Share(0.5)([A, B]) == {"a": 1, "b": 1}  # 24 / 16 and 13.5 / 12
    assert Share(0.7)([A, B]) == {"a": 2, "b": 1}  # 33.6 / 16 and 18.9 / 12


def test_energy_gives_each_layer_the_least_rank_that_holds_enough() -> None:
    assert Energy(0.7)([A, B]) == {"a": 1, "b": 1}  # 25 / 35.25 and 16 / 20.01
    assert Energy(0.9)([A, B]) == {"a": 2, "b": 2}
    assert Energy(1.0)([A, B]) == {"a": 4, "b": 3}


def best(layers: list[Spectrum], budget: float) -> float:
    """Most energy per parameter step that any ranks within the budget hold, by trying all."""
    options = [range(1, x.full + 1) for x in layers]
    fits = [r for r in itertools.product(*options) if sum(x.cost(k) for x, k in zip(layers, r, strict=True)) <= budget]
    return max(sum(float(x.energy[:k].sum()) for x, k in zip(layers, r, strict=True)) for r in fits)


def test_global_takes_the_largest_values_within_the_budget() -> None:
    ranks = Global(0.65)([A, B])  # 28 for rank 1 in both; a's 9 / 16 beats b's 4 / 12; 48.75 of 75 in all
    assert ranks == {"a": 2, "b": 1}
    held = sum(float(x.energy[: ranks[x.name]].sum()) for x in (A, B))
    assert held == pytest.approx(best([A, B], 0.65 * 75))
    with pytest.raises(BudgetError, match="rank 1 in every layer takes 28"):
        Global(0.3)([A, B])
    assert Global(1.0)([A, B]) == {"a": 4, "b": 3}


@pytest.mark.parametrize("rule", [Share, Global, Energy])
@pytest.mark.parametrize("value", [0.0, 1.1, float("nan")])
def test_a_fraction_outside_of_0_to_1_is_refused(rule, value: float) -> None:
    with pytest.raises(ArgumentError, match=r"\(0, 1\]"):
        rule(value)


@pytest.mark.parametrize("fraction", [0.3, 0.5, 0.8])
def test_the_budget_is_met_on_a_network(fraction: float) -> None:
    model = zoo.build("digits_resnet").eval()
    layers = spectra(model)
    small = factorize(model, zoo.example_input("digits_resnet"), Global(fraction))
    weights = {x.name: sum(p.numel() for p in small.model.get_submodule(x.name).parameters()) for x in layers}
    weights["fc"] -= 10  # its bias
    budget = fraction * sum(x.dense for x in layers)
    assert budget - max(x.step for x in layers) < sum(weights.values()) <= budget


# ---- networks -------------------------------------------------------------------------------------------------------


@pytest.fixture
def network() -> tuple[nn.Module, Tensor]:
    model = oracle.randomise_(ResNet(BasicBlock, [1, 1], [8, 12], channels=2)).double().eval()
    return model, torch.randn(3, 2, 6, 6, dtype=torch.float64)


def test_layers_that_would_grow_stay_as_they_are(network) -> None:
    model, x = network
    small = factorize(model, x, Energy(1.0))
    assert small.ranks == {}
    assert oracle.relative_difference(oracle.outputs_of(small.model, x), oracle.outputs_of(model, x)) == 0


def test_the_network_itself_is_left_alone_and_the_smaller_one_is_smaller(network) -> None:
    model, x = network
    before = copy.deepcopy(model.state_dict())
    small = factorize(model, x, Share(0.5))
    assert isinstance(small, Factorized)
    assert small.after.params < 0.6 * small.before.params == 0.6 * sum(p.numel() for p in model.parameters())
    assert all(torch.equal(t, before[k]) for k, t in model.state_dict().items())
    assert {n for n, m in small.model.named_modules() if isinstance(m, LowRank)} == set(small.ranks)
    assert "rank" in str(small)


def test_ranks_by_name_and_selectors(network) -> None:
    model, x = network
    assert factorize(model, x, {"layer1.0.conv1": 2}).ranks == {"layer1.0.conv1": (2, 8)}
    assert set(factorize(model, x, "share", include="layer1.*").ranks) == {"layer1.0.conv1", "layer1.0.conv2"}
    assert "layer1.0.conv1" not in factorize(model, x, "share", exclude="layer1").ranks
    with pytest.raises(ModelError, match="'bn1' is no layer that can be split"):
        factorize(model, x, {"bn1": 2})
    with pytest.raises(BudgetError, match="unknown layer"):
        factorize(model, x, include="layr1")


def test_tied_and_reparametrised_layers_stay_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    torch.nn.utils.parametrizations.orthogonal(model[2])
    with pytest.raises(ModelError, match="no convolution or linear layer with a weight of its own"):
        factorize(model, torch.randn(2, 8))
    attention = nn.MultiheadAttention(8, 2)
    assert [x.name for x in spectra(nn.Sequential(nn.Linear(8, 8), attention))] == ["0"]


# ---- with channel reduction, saved and loaded -----------------------------------------------------------------------


def reduced(model: nn.Module, x: Tensor) -> intrafusion.Compressed:
    graph = intrafusion.inspect(model, x)
    return intrafusion.apply(model, intrafusion.decide(model, graph, intrafusion.Recipe.of(keep=0.75)), x, graph=graph)


def case(order: str, model: nn.Module, x: Tensor) -> intrafusion.Compressed:
    if order == "factorised":
        return factorize(model, x, Share(0.5))
    if order == "reduced, then factorised":
        return factorize(reduced(model, x), x, Share(0.5))
    return reduced(factorize(model, x, Share(0.5)).model, x)


@pytest.mark.parametrize("order", ["factorised", "reduced, then factorised", "factorised, then reduced"])
def test_saved_and_loaded_onto_the_original_it_is_the_same(order: str, network, tmp_path: Path) -> None:
    model, x = network
    small = case(order, model, x)
    small.save(tmp_path / "small")
    if order == "factorised, then reduced":
        assert small.model.get_submodule("layer1.0.conv1").reduce.in_channels == 6
        assert small.model.get_submodule("fc").rank == 1  # the channels between the two layers are a group as well
        assert small.plan.shapes["fc.reduce.weight"][0] == 2
    loaded = intrafusion.load(tmp_path / "small", copy.deepcopy(model))
    assert oracle.relative_difference(oracle.outputs_of(loaded, x), oracle.outputs_of(small.model, x)) == 0
    assert {n: str(m) for n, m in loaded.named_modules()} == {n: str(m) for n, m in small.model.named_modules()}
    assert intrafusion.inspect(loaded, x).reducible


def test_another_network_is_refused_and_left_as_it_was(network, tmp_path: Path) -> None:
    model, x = network
    factorize(model, x, Share(0.5)).save(tmp_path / "small")
    other = ResNet(BasicBlock, [1, 1], [8, 10], channels=2).double().eval()
    shapes = {k: t.shape for k, t in other.state_dict().items()}
    with pytest.raises(PlanError, match="another network"):
        intrafusion.load(tmp_path / "small", other)
    assert {k: t.shape for k, t in other.state_dict().items()} == shapes


def test_a_damaged_table_of_ranks_is_refused(network) -> None:
    model, _ = network
    for ranks, match in (({"bn1": 2}, "no convolution"), ({"conv1": 0}, "at least 1"), ({"conv1": "2"}, "at least 1")):
        with pytest.raises(PlanError, match=match):
            split_layers_(model, ranks)
    assert not any(isinstance(m, LowRank) for m in model.modules())


# ---- penalties ------------------------------------------------------------------------------------------------------


def test_penalties_are_what_they_say() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 3))
    weights = [model[0].weight.detach().flatten(1).numpy(), model[3].weight.detach().numpy()]
    nuclear = sum(np.linalg.svd(w, compute_uv=False).sum() for w in weights)
    first = sum(np.linalg.norm(w[1:] - w[:-1], axis=1).sum() for w in weights)
    second = sum(np.linalg.norm(w[2:] - 2 * w[1:-1] + w[:-2], axis=1).sum() for w in weights)
    value = lambda penalty: float(penalty(model).detach())  # noqa: E731
    assert value(Smooth(nuclear=2.0)) == pytest.approx(2 * nuclear, rel=1e-5)
    assert value(Smooth(first=3.0)) == pytest.approx(3 * first, rel=1e-5)
    assert value(Smooth(second=0.5)) == pytest.approx(0.5 * second, rel=1e-5)
    assert value(Smooth(1.0, 1.0, 1.0)) == pytest.approx(nuclear + first + second, rel=1e-5)
    assert value(Smooth()) == 0


def test_equal_filters_have_a_gradient_of_zero_not_of_nan() -> None:
    layer = nn.Linear(3, 4, bias=False)
    layer.weight.data = torch.ones(4, 3)
    Smooth(first=1.0, second=1.0)(layer).backward()
    assert layer.weight.grad is not None
    assert torch.equal(layer.weight.grad, torch.zeros(4, 3))


def test_digits_keep_their_accuracy_at_sixty_percent_of_the_parameters(digits_network: nn.Module) -> None:
    """Shared out by the singular values of all layers, not where each layer keeps the same fraction."""
    test, model = zoo.load_data("digits", "test"), digits_network
    right = lambda m: accuracy(m, test.images, test.labels)  # noqa: E731
    x = zoo.example_input("digits_resnet")
    shared, uniform = (factorize(model, x, rule(0.6)) for rule in (Global, Share))
    assert shared.after.params < 0.61 * shared.before.params
    assert right(shared.model) > right(model) - 0.04
    assert right(uniform.model) < 0.5


def test_printed_it_says_which_layers_became_two_and_nothing_of_another_network() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(20, 30), nn.ReLU(), nn.Linear(30, 20)), torch.randn(2, 20)
    whole = factorize(model, x, {"0": 3})
    lines = str(whole).splitlines()
    assert lines[0] == "Sequential: 1 layer of low rank, in two thinner parts each"
    assert lines[1].split()[1:4] == ["1,250", "->", "800"]  # 30 * 21 + 20 * 31; 3 * 50 + 30 + 20 * 31
    assert lines[-1].split() == ["0", "20", "3"]
    assert "channel group" not in str(whole)
    narrow = intrafusion.compress(model, x, 0.5, restore=None)
    assert narrow.comparison is not None
    both = factorize(narrow, x, {"2": 2})
    assert both.comparison is None  # that of the network before is not of this one
    assert "1 layer of low rank, in two thinner parts each; 1 of 2 channel groups are smaller" in " ".join(
        str(both).split()
    )
    assert f"1,250 -> {sum(p.numel() for p in both.model.parameters()):,} " in str(both)
    assert str(narrow.plan) in str(both)
