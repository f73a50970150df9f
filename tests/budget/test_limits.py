"""Several limits, memory, and what everything costs: against networks of these sizes, counted."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from gallery import CASES
from torch import Tensor, nn

import intrafusion
from intrafusion.budget import target as targets
from intrafusion.budget.allocate import allocate
from intrafusion.budget.cost import Cost
from intrafusion.budget.limits import describe_held
from intrafusion.budget.rounding import list_steps
from intrafusion.budget.target import build_with_sizes, find_believed_cost, find_believed_memory, sizes_to_test
from intrafusion.errors import ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of
from intrafusion.measure.memory import memory_mb
from intrafusion.measure.size import size_of
from intrafusion.network.inputs import Inputs
from intrafusion.plan import is_miss
from intrafusion.recipe import Recipe
from intrafusion.surgery.literals import Literals
from intrafusion.surgery.proof import Reference

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def chain(*widths: int) -> nn.Module:
    """Strides at the end, so that early layers take the memory and late ones the parameters."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for index, (a, b) in enumerate(itertools.pairwise(widths)):
        layers += [nn.Conv2d(a, b, 3, padding=1, stride=1 + index // 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)).eval()


def shares_of(small: Any, model: nn.Module, x: Any) -> dict[str, float]:
    return {
        "params": small.after.params / small.before.params,
        "macs": small.after.macs / small.before.macs,
        "memory_mb": memory_mb(small.model, x) / memory_mb(model, x),
    }


# ---- several limits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("params", "macs"), [(0.5, 0.5), (0.35, 0.6), (0.7, 0.3)])
def test_all_of_several_limits_are_met_and_one_exactly(params: float, macs: float) -> None:
    model, wanted = chain(3, 40, 48, 60), {"params": params, "macs": macs}
    small = intrafusion.compress(model, X, target=wanted, round_to=1, restore=None)
    reached = {kind: share / wanted[kind] for kind, share in shares_of(small, model, X).items() if kind in wanted}
    assert max(reached.values()) == pytest.approx(1, abs=0.02)
    assert not any(map(is_miss, small.warnings))


def test_limits_are_met_with_about_the_least_error_of_all_sizes() -> None:
    """All sizes are tried; the greedy ones lose at most one piece against the best that meet both."""
    sizes = {"a": 9, "b": 8, "c": 7}
    groups = [ChannelGroup(n, s, (), family=i) for i, (n, s) in enumerate(sizes.items())]
    falls = {n: np.sort(np.random.default_rng(i).random(s))[::-1] for i, (n, s) in enumerate(sizes.items())}
    curves = {n: torch.from_numpy(np.concatenate([[f.sum()], f.sum() - f.cumsum()]).copy()) for n, f in falls.items()}
    costs = [separable({"a": 1.0, "b": 5.0, "c": 2.0}, sizes), separable({"a": 6.0, "b": 1.0, "c": 2.0}, sizes)]
    budgets = [0.6 * cost({}) for cost in costs]
    error = lambda m: sum(float(curves[n][k]) for n, k in m.items())  # noqa: E731
    met = lambda m: all(cost(m) <= most for cost, most in zip(costs, budgets, strict=True))  # noqa: E731
    tried = [dict(zip(sizes, ms, strict=True)) for ms in itertools.product(*(range(1, s + 1) for s in sizes.values()))]
    found = allocate(groups, curves, costs, budgets, weights=[1 / cost({}) for cost in costs])
    assert met(found)
    assert error(found) <= min(error(m) for m in tried if met(m)) + max(float(f[0]) for f in falls.values())


def separable(prices: dict[str, float], sizes: dict[str, int]) -> Cost:
    return Cost(sizes, tuple((price, (sizes[n],), ((((n,), sizes[n]),),)) for n, price in prices.items()))


def test_a_limit_that_the_network_meets_as_it_is_limits_nothing_and_that_is_said() -> None:
    model = chain(3, 12, 12)
    alone = intrafusion.compress(model, X, target={"macs": 0.5}, restore=None)
    both = intrafusion.compress(model, X, target={"macs": 0.5, "params": 1e9}, restore=None)
    assert both.plan.sizes == alone.plan.sizes
    assert any("1 G parameters were asked for" in w and "limits nothing" in w for w in both.plan.warnings)


def test_of_limits_that_cannot_be_met_each_is_told_with_what_holds_it() -> None:
    model = chain(3, 12, 12)
    options: dict[str, Any] = {"target": {"params": 0.05, "macs": 0.04, "memory_mb": 1.0}, "min_channels": 6}
    with pytest.warns(intrafusion.IntrafusionWarning, match="target missed"):
        small = intrafusion.compress(model, X, exclude="0", restore=None, **options)
    assert small.plan.sizes == {"2": 6}
    missed = [w for w in small.warnings if is_miss(w)]
    assert len(missed) == 2
    assert all("that min_channels=6 and exclude allow, nothing comes closer" in w for w in missed)


def test_options_that_hold_sizes_are_named() -> None:
    assert describe_held(Recipe.of(target={"macs": 0.5})) == ""
    assert describe_held(Recipe.of(target={"macs": 0.5}, min_channels=4)) == "min_channels=4"
    found = describe_held(Recipe.of(target={"macs": 0.5}, min_channels=4, round_to=8, include="a", exclude="b"))
    assert found == "min_channels=4, round_to=8, include and exclude"


def test_a_latency_holds_beside_a_limit_of_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = lambda model, inputs: float(size_of(model, inputs).macs)  # noqa: E731
    monkeypatch.setattr(targets, "latencies_ms", lambda models, inputs, **_: [clock(m, inputs) for m in models])
    monkeypatch.setitem(targets._METERS, "latency_ms", clock)
    model = chain(3, 40, 48, 60)
    whole = size_of(model, X)
    for params, macs in ((0.3, 0.9), (0.9, 0.3)):
        target = {"latency_ms": macs * whole.macs, "params": params}
        small = intrafusion.compress(model, X, target=target, round_to=1, restore=None)
        assert small.after.params <= 1.01 * params * whole.params
        assert small.after.macs <= macs * whole.macs
        binding = max(small.after.params / whole.params / params, small.after.macs / whole.macs / macs)
        assert binding == pytest.approx(1, abs=0.05)


# ---- memory ---------------------------------------------------------------------------------------------------------

KINDS = ("residual", "dense", "depthwise", "grouped", "attention", "squeeze")


def shrinkable(model: nn.Module, graph: ChannelGraph, inputs: Inputs) -> tuple[list[ChannelGroup], Literals]:
    return targets._find_shrinkable(Reference(model, graph, inputs), [g for g in graph.reducible if g.is_channel])


@pytest.mark.parametrize("case", [c for c in CASES if any(k in c.name for k in KINDS)][::3], ids=lambda c: c.name)
def test_the_predicted_memory_is_that_of_a_network_of_these_sizes(case: Any) -> None:
    model, example = case.build()
    model, inputs = model.eval(), Inputs.of(example)
    graph = intrafusion.inspect(model, inputs)
    groups, literals = shrinkable(model, graph, inputs)
    costs, doubt = find_believed_memory(model, graph, groups, inputs, literals)
    assert max(cost({}) for cost in costs) == pytest.approx(memory_mb(model, inputs))
    for sizes in sizes_to_test(groups) if doubt is None else []:
        try:
            found = memory_mb(build_with_sizes(model, graph, sizes, literals), inputs)
        except ModelError:  # a single channel may be squeezed away
            continue
        assert max(cost(sizes) for cost in costs) == pytest.approx(found)


def test_a_limit_of_memory_is_met_where_it_is_spent() -> None:
    """The first layer's results are the largest; its parameters are few."""
    model = chain(3, 24, 16, 16)
    whole = memory_mb(model, X)
    small = intrafusion.compress(model, X, target={"memory_mb": 0.6 * whole}, reducer="select", restore=None)
    assert memory_mb(small.model, X) == pytest.approx(0.6 * whole, rel=0.04)
    [said] = [w for w in small.plan.warnings if "one call needs" in w]
    told = f"{whole:.3g} MB -> {memory_mb(small.model, X):.3g} MB"
    assert said == f"target: one call needs {told}, weights and results together."


# ---- attention that shares keys -------------------------------------------------------------------------------------


class Grouped(nn.Module):
    """A small Llama's layer: a stream, queries in heads, keys and values that two of these share, a gated MLP.

    Heads are counted from the widths, so that they may become fewer or narrower.
    """

    def __init__(self, stream: int = 24, head: int = 6, heads: int = 4, shared: int = 2, inner: int = 20) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.queries = nn.Parameter(torch.rand(shared) + 1), nn.Parameter(torch.rand(heads) + 1)
        self.norm, self.mlp_norm = nn.RMSNorm(stream), nn.RMSNorm(stream)
        self.enter, self.leave = nn.Linear(5, stream), nn.Linear(stream, 3)
        self.q, self.o = nn.Linear(stream, heads * head), nn.Linear(heads * head, stream)
        self.k, self.v = nn.Linear(stream, shared * head), nn.Linear(stream, shared * head)
        self.gate, self.up, self.down = nn.Linear(stream, inner), nn.Linear(stream, inner), nn.Linear(inner, stream)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        h = self.norm(x)
        k, v = (t.unflatten(-1, (len(self.shared), -1)) * self.shared[:, None] for t in (self.k(h), self.v(h)))
        q = self.q(h).unflatten(-1, (len(self.queries), -1)) * self.queries[:, None]
        q = q.unflatten(2, (len(self.shared), -1)).permute(0, 2, 3, 1, 4)
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        scores = (q @ k[:, :, None].mT / q.shape[-1] ** 0.5).softmax(-1)
        mixed = (scores @ v[:, :, None]).permute(0, 3, 1, 2, 4).flatten(2)
        x = x + self.o(mixed)
        h = self.mlp_norm(x)
        return self.leave(x + self.down(nn.functional.silu(self.gate(h)) * self.up(h)))


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_the_cost_of_attention_that_shares_keys_is_that_of_the_cut_network(kind: str) -> None:
    """Every family of groups alone, and all together: the stream, inside of heads, whole heads, the MLP."""
    model, inputs = Grouped().eval(), Inputs.of(torch.randn(2, 7, 5))
    graph = intrafusion.inspect(model, inputs)
    families = families_of(graph.reducible)
    assert len(families) >= 4
    assert {g.kind for twins in families for g in twins} == {"channel", "block"}
    runs = [twins for twins in families if _count(model, graph, inputs, kind, twins) is not None]
    assert {g.kind for twins in runs for g in twins} == {"channel", "block"}
    groups = [g for twins in runs for g in twins]
    cost, _ = find_believed_cost(model, graph, groups, inputs, kind)
    for twins in runs:
        assert cost(_halve(twins)) == pytest.approx(_count(model, graph, inputs, kind, twins))
    together = _count(model, graph, inputs, kind, groups)
    assert together is not None
    assert cost(_halve(groups)) == pytest.approx(together)


def _halve(groups: list[ChannelGroup]) -> dict[str, int]:
    return {g.name: (g.size + 1) // 2 for g in groups}


def _count(model: nn.Module, graph: ChannelGraph, inputs: Inputs, kind: str, groups: list[ChannelGroup]) -> int | None:
    """Of the network with these groups halved; None where it does not run so, as where a number of heads is fixed."""
    try:
        return getattr(size_of(build_with_sizes(model, graph, _halve(groups)), inputs), kind)
    except intrafusion.ModelError:
        return None


# ---- rounding -------------------------------------------------------------------------------------------------------


def test_with_a_target_wide_groups_are_rounded_and_it_is_said_how_they_are_not() -> None:
    model = chain(3, 24, 96, 128)
    small = intrafusion.compress(model, X, target={"macs": 0.5}, restore=None)
    widths = {"0": 24, "2": 96, "4": 128}
    assert all(small.plan.sizes.get(name, n) % 8 == 0 for name, n in widths.items() if n >= 32)
    [note] = [w for w in small.plan.warnings if "multiples of 8" in w]
    assert "round_to=1 allows any" in note
    free = intrafusion.compress(model, X, target={"macs": 0.5}, round_to=1, restore=None)
    assert not any("multiples of 8" in w for w in free.plan.warnings)
    assert any(m % 8 for m in free.plan.sizes.values())
    assert free.after.macs / free.before.macs == pytest.approx(0.5, rel=0.011)


def test_rounding_gives_way_where_rounded_sizes_would_miss_the_target() -> None:
    """Widths 32: eighths of them are steps of more than 2 % of the network."""
    small = intrafusion.compress(chain(3, 32), X, target={"params": 0.55}, restore=None)
    assert small.after.params / small.before.params == pytest.approx(0.55, rel=0.03)
    assert not any("multiples of 8" in w for w in small.plan.warnings)


def test_steps_are_those_asked_for_else_eights_of_wide_groups() -> None:
    groups = [ChannelGroup("wide", 32, (), family=1), ChannelGroup("narrow", 31, (), family=2)]
    groups.append(ChannelGroup("heads", 64, (), kind="block", family=3))
    assert list_steps(groups, None) == {"wide": 8, "narrow": 1, "heads": 1}
    assert list_steps(groups, 4) == {"wide": 4, "narrow": 4, "heads": 1}
    assert list_steps(groups, 1) == {"wide": 1, "narrow": 1, "heads": 1}


def test_a_keep_is_not_rounded_by_default() -> None:
    small = intrafusion.compress(chain(3, 64, 64), X, keep=0.55, restore=None)
    assert small.plan.sizes == {"0": 35, "2": 35}
