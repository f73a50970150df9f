"""What a lower rank is predicted to cost. Oracles: NumPy's whitened SVD, networks built by hand, counted costs."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn

import intrafusion
from intrafusion.budget.limits import Limit
from intrafusion.budget.rank_curves import (
    _Budget,
    _Directions,
    choose_layers,
    draw_rank_curves,
    list_unsaving,
    share_ranks,
)
from intrafusion.budget.sensitivity import Sensitivity
from intrafusion.budget.target import build_with_sizes
from intrafusion.graph import ChannelGraph
from intrafusion.measure.drift import OutputError
from intrafusion.measure.size import size_of
from intrafusion.network.inputs import Inputs
from intrafusion.network.layers import find_layers
from intrafusion.plan import name_rank_group
from intrafusion.restore import calibrate
from intrafusion.surgery.lowrank import LowRank, split_exactly

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def network(rank: int | None = None) -> nn.Sequential:
    """Three convolutions and a head; the second and the third of this rank."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 24, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(24, 24, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(96, 10)),
    )
    for place in (2, 4) if rank else ():
        weight = net.get_parameter(f"{place}.weight")
        u, s, vh = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
        weight.data = ((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(weight.shape)
    return net.eval()


def judge(model: nn.Module) -> tuple[ChannelGraph, Sensitivity]:
    graph = intrafusion.inspect(model, X)
    calibration = calibrate(model, Inputs.of(X), "images", IMAGES)
    scores = {g.name: torch.ones(g.size, dtype=torch.float64) for g in graph.reducible}
    return graph, Sensitivity(model, graph, scores, calibration.moments_of(graph), calibration, Inputs.of(X))


def test_projected_outputs_are_those_of_the_whitened_svd() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    weight = torch.randn(5, 6, generator=generator)
    rows, centred = x @ weight.T, (x - x.mean(0)).double().numpy()
    root = np.linalg.cholesky(centred.T @ centred + 1e-12 * np.eye(6)).T  # C = root' root
    u, s, vh = np.linalg.svd(weight.double().numpy() @ root.T, full_matrices=False)
    for rank in (1, 3, 5):
        best = (u[:, :rank] * s[:rank]) @ vh[:rank] @ np.linalg.inv(root.T)
        wanted = centred @ best.T + rows.double().mean(0).numpy()
        found = _Directions.of(rows).project(rows, rank)
        np.testing.assert_allclose(found.numpy(), wanted, atol=1e-4)


def test_the_height_of_a_curve_is_the_error_of_a_network_with_that_layer() -> None:
    model = network()
    _, known = judge(model)
    curves = draw_rank_curves(["2", "4"], known)
    assert curves.keys() == {"2.reduce", "4.reduce"}
    curve, largest = curves["2.reduce"], 20  # 144 * 24 / (144 + 24)
    assert len(curve) == 25
    assert bool((curve.diff() <= 1e-12).all())
    assert curve[24] == 0
    rows = model[:3](known.learnt_on.join().tensors()[0]).movedim(1, -1).flatten(0, -2)  # type: ignore[union-attr]
    rows = rows.detach().double()
    _, _, vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
    small = copy.deepcopy(model).double()
    p = vh[:largest].T @ vh[:largest]
    weight, bias = small.get_parameter("2.weight"), small.get_parameter("2.bias")
    weight.data = (p @ weight.data.flatten(1)).reshape(weight.shape)
    bias.data = rows.mean(0) + p @ (bias.data - rows.mean(0))
    error = OutputError()
    for call, expected in known._probe.heights:
        error.add([small(call.tensors()[0].double()).detach().float()], expected)
    assert float(curve[largest]) == pytest.approx(error.value, rel=0.1)  # of which the rows are a sample


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_the_price_of_layers_as_two_is_what_such_networks_cost(kind: str) -> None:
    model = network()
    graph, whole = intrafusion.inspect(model, X), size_of(model, X)
    limit = Limit(kind, getattr(whole, kind) / 2, getattr(whole, kind))
    layers = [layer for name, layer in find_layers(model, graph).items() if name in ("0", "2", "4")]
    budget = _Budget.of(model, graph, layers, [limit], Inputs.of(X))
    widths = {"0": 11, "2": 13, "4": 20}
    for split in ([], ["2"], ["0", "2", "4"]):
        ranks = {name_rank_group(n): 5 for n in split}
        price = budget.prices[0].of(split)({**widths, **ranks}) * limit.goal
        core = split_exactly(model, split)
        own = intrafusion.inspect(core, X)
        named = {f"{n}.expand" if n in split else n: m for n, m in widths.items()}
        small = build_with_sizes(core, own, {**named, **ranks})
        assert price == pytest.approx(getattr(size_of(small, X), kind))


def test_layers_of_low_rank_are_chosen_and_others_are_not() -> None:
    chosen = {}
    for rank in (None, 3):
        model = network(rank)
        graph, known = judge(model)
        whole = size_of(model, X)
        groups = [g for g in graph.reducible if g.is_channel]
        limit = Limit("macs", 0.6 * whole.macs, whole.macs)
        chosen[rank] = choose_layers(model, graph, groups, ["0", "2", "4"], known, [limit], Inputs.of(X))
    assert "4" in chosen[3]
    assert "0" not in chosen[3]
    assert len(chosen[None]) <= len(chosen[3])


def test_layers_without_which_a_limit_cannot_be_met_stay_two() -> None:
    model = network(3)
    graph, known = judge(model)
    whole = size_of(model, X)
    for share in (0.5, 0.2):
        limit = Limit("macs", share * whole.macs, whole.macs)
        chosen = choose_layers(model, graph, [], ["0", "2", "4"], known, [limit], Inputs.of(X))
        core = split_exactly(model, chosen)
        least = build_with_sizes(core, intrafusion.inspect(core, X), {f"{name}.reduce": 1 for name in chosen})
        assert size_of(least, X).macs <= limit.goal


def test_layers_that_save_nothing_as_two_are_found() -> None:
    model = split_exactly(network(), ["2", "4"])
    assert list_unsaving(model, ["0", "2", "4"]) == ["2", "4"]
    graph = intrafusion.inspect(model, X)
    small = build_with_sizes(model, graph, {"2.reduce": 20, "4.reduce": 22})
    assert list_unsaving(small, ["2", "4"]) == ["4"]  # 144 * 24 / 168 = 20.6, 216 * 24 / 240 = 21.6


def test_the_same_share_of_weights_is_that_of_the_narrowed_layers() -> None:
    model = split_exactly(network(), ["2", "4"])
    graph = intrafusion.inspect(model, X)
    narrowed = build_with_sizes(model, graph, {"2.expand": 12})
    ranks = share_ranks(narrowed, {"2": 24, "4": 24}, 0.5)
    assert ranks == {"2": int(0.5 * 144 * 12 / (144 + 12)), "4": int(0.5 * 108 * 24 / (108 + 24))}
    for name, rank in ranks.items():
        pair = build_with_sizes(narrowed, intrafusion.inspect(narrowed, X), {f"{name}.reduce": rank}).get_submodule(
            name
        )
        assert isinstance(pair, LowRank)
        weights = sum(t.numel() for n, t in pair.named_parameters() if n.endswith("weight"))
        outputs = len(pair.expand.weight)  # type: ignore[arg-type]
        dense = outputs * pair.reduce.weight[0].numel()  # type: ignore[index]
        assert weights <= 0.5 * dense < weights + dense / rank


def test_the_tail_of_a_layer_without_variance_costs_nothing() -> None:
    rows = torch.tensor([[1.0, 2.0], [2.0, 4.0], [3.0, 6.0]])
    torch.testing.assert_close(_Directions.of(rows).project(rows, 1), rows)
