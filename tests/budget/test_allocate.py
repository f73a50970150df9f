"""The cost of sizes against real networks of these sizes; the allocation against exhaustive search."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from gallery import CASES
from torch import Tensor, nn

import intrafusion
from intrafusion.budget.allocate import allocate
from intrafusion.budget.cost import Cost
from intrafusion.budget.target import build_with_sizes, find_believed_cost
from intrafusion.errors import BudgetError
from intrafusion.graph import ChannelGroup
from intrafusion.lab.zoo.networks.padded_resnet import PaddedResNet
from intrafusion.measure.latency import latency_ms
from intrafusion.measure.size import size_of
from intrafusion.network.inputs import Inputs
from intrafusion.recipe import RecipeError

KINDS = ("residual", "dense", "depthwise", "grouped")
SHRINKABLE = [
    c
    for c in CASES
    if any(kind in c.name for kind in KINDS) and not any(n in c.name for n in ("padded", "unregistered"))
]


def chain(*widths: int) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(widths):
        layers += [nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 5)).eval()


X = torch.randn(1, 3, 8, 8)


@pytest.mark.parametrize("kind", ["params", "macs"])
@pytest.mark.parametrize("case", SHRINKABLE, ids=lambda c: c.name)
def test_the_predicted_cost_is_that_of_a_network_of_these_sizes(kind: str, case) -> None:  # type: ignore[no-untyped-def]
    model, example = case.build()
    model, inputs = model.eval(), Inputs.of(example)
    graph = intrafusion.inspect(model, inputs)
    groups = [g for g in graph.reducible if g.is_channel]
    assert groups
    sizes = {g.name: max(1, g.size // 2) for g in groups}
    small = build_with_sizes(model, graph, sizes)
    found, whole = size_of(small, inputs), size_of(model, inputs)
    predicted, _ = find_believed_cost(model, graph, groups, inputs, kind)
    assert predicted({}) == pytest.approx(getattr(whole, kind))
    if kind == "params" or not any("attention" in str(type(m)).lower() for m in model.modules()):
        assert predicted(sizes) == pytest.approx(getattr(found, kind), rel=1e-6)


def group(name: str, size: int, family: int) -> ChannelGroup:
    return ChannelGroup(name, size, (), family=family)


def separable(prices: dict[str, float], sizes: dict[str, int]) -> Cost:
    parts = tuple((price, (sizes[name],), ((((name,), sizes[name]),),)) for name, price in prices.items())
    return Cost(sizes, parts)


def convex(n: int, seed: int) -> Tensor:
    falls = np.sort(np.random.default_rng(seed).random(n))[::-1]
    return torch.from_numpy(np.concatenate([[falls.sum()], falls.sum() - falls.cumsum()]).copy())


@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_for_convex_curves_it_is_as_good_as_trying_all(share: float) -> None:
    sizes = {"a": 6, "b": 5, "c": 4}
    groups = [group(n, s, i) for i, (n, s) in enumerate(sizes.items())]
    curves = {n: convex(s, i) for i, (n, s) in enumerate(sizes.items())}
    cost = separable({"a": 1.0, "b": 1.0, "c": 1.0}, sizes)
    budget = round(share * cost({}))
    found = allocate(groups, curves, cost, budget)
    error = lambda m: sum(float(curves[n][k]) for n, k in m.items())  # noqa: E731
    tried = [dict(zip(sizes, ms, strict=True)) for ms in itertools.product(*(range(1, s + 1) for s in sizes.values()))]
    best = min(error(m) for m in tried if cost(m) <= budget)
    assert cost(found) <= budget
    assert error(found) == pytest.approx(best)


def test_it_cuts_where_it_costs_most_and_matters_least() -> None:
    sizes = {"dear": 40, "cheap": 40, "vital": 40}
    groups = [group(n, s, i) for i, (n, s) in enumerate(sizes.items())]
    line = torch.linspace(1, 0, 41)
    cost = separable({"dear": 10.0, "cheap": 1.0, "vital": 10.0}, sizes)
    found = allocate(groups, {"dear": line, "cheap": line, "vital": 100 * line}, cost, 0.7 * cost({}))
    assert found == {"dear": 14, "cheap": 40, "vital": 40}


def test_a_stream_goes_in_step_with_its_heads() -> None:
    """Eight channels of the stream go with two of each head, at the price and the error of both."""
    head, stream, other = (ChannelGroup(n, k, (), family=f, multiple=m) for n, k, f, m in
                           (("head", 10, 0, 1), ("stream", 40, 0, 4), ("other", 40, 1, 1)))  # fmt: skip
    sizes = {g.name: g.size for g in (stream, head, other)}
    line = {name: torch.linspace(1, 0, n + 1) for name, n in sizes.items()}
    cost = separable({"head": 1.0, "stream": 1.0, "other": 1.0}, sizes)
    found = allocate([stream, head, other], line, cost, 80)
    assert found == {"head": 10, "stream": 40, "other": 30}  # 2 in 50 against 1 in 40
    found = allocate([stream, head, other], {**line, "other": 10 * line["other"]}, cost, 70)
    assert found == {"head": 6, "stream": 24, "other": 40}
    found = allocate([stream, head], line, cost, 40, round_to=3)  # 40 belong to the other group
    assert found == {"head": 3, "stream": 12}


def test_twins_rounding_and_the_smallest_size() -> None:
    sizes = {"a": 40, "b": 40, "c": 30}
    groups = [group("a", 40, 0), group("b", 40, 0), group("c", 30, 1)]
    curves = {n: torch.linspace(1, 0, s + 1) for n, s in sizes.items()}
    cost = separable(dict.fromkeys(sizes, 1.0), sizes)
    found = allocate(groups, curves, cost, 0.5 * cost({}), round_to=8)
    assert found["a"] == found["b"]
    assert all(m % 8 == 0 or m == sizes[n] for n, m in found.items())
    least = allocate(groups, curves, cost, 0.0, min_channels=5)
    assert least == {"a": 5, "b": 5, "c": 5}
    assert allocate(groups, curves, cost, 0.0, min_channels=5, round_to=4) == {"a": 8, "b": 8, "c": 8}
    assert allocate(groups, curves, cost, 1e9) == sizes


@pytest.mark.parametrize(("kind", "wanted"), [("params", 0.6), ("macs", 0.3)])
def test_a_target_is_hit_within_two_percent(kind: str, wanted: float) -> None:
    model = chain(3, 32, 48, 64)
    small = intrafusion.compress(model, X, target={kind: wanted}, restore=None)
    reached = getattr(small.after, kind) / getattr(small.before, kind)
    assert reached == pytest.approx(wanted, rel=0.02)
    absolute = intrafusion.compress(model, X, target={kind: wanted * getattr(small.before, kind)}, restore=None)
    assert absolute.plan.sizes == small.plan.sizes


def test_a_latency_target_makes_it_faster() -> None:
    """So much faster that it is, also where a busy machine took long to measure `before`."""
    model, x = chain(3, 48, 48), torch.randn(2, 3, 32, 32)
    before = latency_ms(model, x)
    small = intrafusion.compress(model, x, target={"latency_ms": before / 12}, restore=None)
    assert small.after.macs < 0.7 * small.before.macs


def test_what_cannot_be_reduced_is_left_out_of_the_reckoning() -> None:
    """The streams of a padded ResNet lie beside literals of its forward."""
    model, x = PaddedResNet(8).eval(), torch.randn(1, 3, 16, 16)
    small = intrafusion.compress(model, x, target={"macs": 0.7}, restore=None)
    assert small.after.macs / small.before.macs == pytest.approx(0.7, rel=0.02)
    assert small.rolled_back == {}


def test_min_channels_and_excludes_hold_and_an_impossible_target_comes_as_close_as_it_can() -> None:
    options = {"target": {"params": 0.01}, "min_channels": 4, "exclude": "3", "restore": None}
    with pytest.warns(intrafusion.IntrafusionWarning, match="target missed: ") as seen:
        small = intrafusion.compress(chain(3, 16, 16), X, **options)  # type: ignore[arg-type]
    assert small.plan.sizes == {"0": 4}
    share = 100 * small.after.params / small.before.params
    said = f"target missed: {small.after.params:,} parameters ({share:.3g} %) instead of "
    (text,) = replace(small, comparison=None).warnings  # on a busy machine, the clock has something to say too
    assert text.startswith(said)
    assert "(1 %)" in text
    assert [str(w.message) for w in seen] == [text]
    assert seen[0].filename == __file__
    shown = " ".join(str(small).split())
    assert shown.count(f"warning: {text}") == 1
    assert f"warning: {text}" in " ".join(str(small.plan).split())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"target": {"params": 10**400}}, BudgetError, "expected a number above 0"),
        ({"target": {"parms": 0.5}}, BudgetError, "unknown measure 'parms'. Did you mean 'params'?"),
        ({"target": {"params": 0}}, BudgetError, "expected a number above 0, got 0"),
        ({"target": {}}, BudgetError, r"expected limits of params, macs, latency_ms, memory_mb, such as .*, got \{\}"),
        ({"target": {"params": 0.5, "mac": 0.5}}, BudgetError, "unknown measure 'mac'. Did you mean 'macs'?"),
        (
            {"target": {"params": 0.5, "memory_mb": -1}},
            BudgetError,
            r"target\['memory_mb'\]: expected a number above 0",
        ),
        ({"target": {"params": 0.5}, "keep": 0.5}, RecipeError, "expected keep or target, got both"),
        ({"target": {"params": 0.5}, "min_channels": 0}, BudgetError, "min_channels: expected a whole number >= 1"),
    ],
)
def test_bad_input(options: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        intrafusion.compress(chain(3, 8), X, restore=None, **options)
