"""The search from the side of what must be left out: few tries, the same groups, and each failure remembered."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gallery.core import Wired
from torch import Tensor, nn

import intrafusion
from intrafusion.graph import ChannelGraph, ChannelGroup, families_of
from intrafusion.network import double
from intrafusion.network.inputs import Inputs
from intrafusion.reduce import ReductionMap, selection_map
from intrafusion.surgery import memory, operate, proof
from intrafusion.surgery.forecast import Forecast
from intrafusion.surgery.search import Failure, leave_out_suspects, take_back, take_back_by_kind
from intrafusion.surgery.write import weights_written


def block(kind: str) -> nn.Module:
    """Twelve channels in a residual block, which a literal holds, or halves that shrink together, or nothing."""

    def forward(n: Any, x: Tensor) -> Tensor:
        h = n.i(x).relu()
        if kind == "literal":
            h = h.view(-1, 12, 8, 8)
        elif kind == "halves":
            a, b = h.chunk(2, 1)
            h = torch.cat([a, n.k(b).tanh()], 1)
        return x + n.o(h)

    conv = nn.Conv2d
    return Wired(forward, i=conv(8, 12, 1), k=conv(6, 6, 1), o=conv(12, 8, 3, padding=1))


def blocks(*kinds: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 1), *map(block, kinds), nn.Conv2d(8, 4, 1)).eval()


X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def select(graph: ChannelGraph, keep: float = 0.5) -> dict[str, ReductionMap]:
    groups = [g for g in graph.reducible if g.is_channel]
    return {g.name: selection_map(torch.arange(max(1, int(g.size * keep))), g.size) for g in groups}


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each network that surgery traces."""
    seen: list[str] = []
    real = operate.trace_private

    def counted(*args: Any, **kwargs: Any) -> ChannelGraph:
        seen.append("trace")
        return real(*args, **kwargs)

    monkeypatch.setattr(operate, "trace_private", counted)
    return seen


# ---- what a cut network shows ---------------------------------------------------------------------------------------


def test_a_forecast_names_the_group_that_a_literal_holds() -> None:
    net = blocks("plain", "literal")
    graph = intrafusion.inspect(net, X)
    sizes = {name: len(m.merge) for name, m in select(graph).items()}
    forecast = Forecast(net, graph, Inputs.of(X))
    stopped = forecast.run(sizes)
    assert stopped.error is not None
    assert stopped.suspects[0] == ("2.i",)
    passed = forecast.run({name: m for name, m in sizes.items() if name != "2.i"})
    assert passed.error is None
    assert passed.place == (len(forecast.steps),) * 2
    assert passed.suspects == ()


def test_a_forecast_names_what_is_padded_with() -> None:
    pad = nn.functional.pad
    net = Wired(
        lambda n, x: n.head(n.b(n.a(x).relu()).relu() + pad(n.c(x).relu(), (1, 1))),
        a=nn.Linear(5, 8), b=nn.Linear(8, 6), c=nn.Linear(5, 4), head=nn.Linear(6, 2),
    ).eval()  # fmt: skip
    x = torch.randn(4, 5)
    graph = intrafusion.inspect(net, x)
    sizes = {name: len(m.merge) for name, m in select(graph).items()}
    stopped = Forecast(net, graph, Inputs.of(x)).run(sizes)
    seen = [graph[name].producers for name in stopped.suspects[0]]
    assert seen == [("b",), ("b", "c")], "the shape differs at the pad, which reads only what c gives"


def test_a_forecast_leaves_the_network_as_it_was() -> None:
    net = blocks("literal", "halves")
    before = {n: t.clone() for n, t in net.state_dict().items()}
    graph = intrafusion.inspect(net, X)
    sizes = {name: len(m.merge) for name, m in select(graph).items()}
    Forecast(net, graph, Inputs.of(X)).run(sizes)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert net[1].i.out_channels == 12


def test_weights_that_were_written_are_taken_back_with_the_attributes() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    before, ids = {n: t.clone() for n, t in net.state_dict().items()}, [id(p) for p in net.parameters()]
    cut = {"0.weight": torch.zeros(2, 3), "0.bias": torch.zeros(2), "1.weight": torch.ones(2), "1.bias": torch.ones(2)}
    with pytest.raises(RuntimeError), weights_written(net, {**cut, "2.weight": torch.ones(2, 2)}):
        assert (net[0].out_features, net[1].normalized_shape) == (2, (2,))
        assert net(torch.ones(1, 3)).shape == (1, 2)
        raise RuntimeError
    assert (net[0].out_features, net[1].normalized_shape, net[2].in_features) == (4, (4,), 4)
    assert all(torch.equal(t, before[n]) for n, t in net.state_dict().items())
    assert [id(p) for p in net.parameters()] == ids


# ---- the search -----------------------------------------------------------------------------------------------------


def groups_named(*names: str) -> list[ChannelGroup]:
    return [ChannelGroup(name, 2, (), family=i) for i, name in enumerate(names)]


def fails_in_order(bad: list[str], tries: list[int]) -> Callable[[list[ChannelGroup]], Failure | None]:
    """The first bad one of those that are tried stops it; its neighbour is suspected too."""

    def failure(some: list[ChannelGroup]) -> Failure | None:
        tries.append(len(some))
        first = next((g for g in some if g.name in bad), None)
        if first is None:
            return None
        place = bad.index(first.name)
        return Failure(f"bad {first.name}", (place, place), (("neighbour", first.name),))

    return failure


def test_each_suspect_costs_few_tries_and_the_innocent_come_back() -> None:
    names = [f"b{chr(97 + i)}" for i in range(12)]
    groups, bad, tries = groups_named("neighbour", *names), [names[3], names[7]], list[int]()
    failure = fails_in_order(bad, tries)
    found = failure(groups)
    assert found is not None
    rest, out, last = leave_out_suspects(groups, found, failure, guilty := set())
    assert last is None
    assert {g.name for g in rest} == {"neighbour", *names} - set(bad)
    assert [(o.family[0].name, o.failure.why) for o in out] == [(n, f"bad {n}") for n in bad]
    assert guilty == set(bad)
    assert len(tries) <= 6


def test_a_kind_that_fails_everywhere_is_left_out_at_once_and_its_innocent_members_are_taken_back() -> None:
    groups, tries = groups_named(*(f"blocks.{i}.attn" for i in range(30))), list[int]()
    bad = [f"blocks.{i}.attn" for i in (4, 9, 20)]
    failure = fails_in_order(bad, tries)
    found = failure(groups)
    assert found is not None
    rest, out, last = leave_out_suspects(groups, found, failure, set())
    assert last is None
    doubtful = [o.family for o in out if not o.sure]
    assert len(doubtful) == 28, "all of this kind are left out once a third one is suspected"
    likewise = lambda g, f: Failure(f"like {g.name}: {f.why}")  # noqa: E731
    for take in (take_back, take_back_by_kind):
        passed, failed = take(doubtful, list(rest), failure, likewise)
        assert {g.name for g, _ in failed} == {"blocks.20.attn"}
        assert len(passed) == 27
    assert len(tries) <= 45


def test_one_kind_is_known_by_two_that_fail() -> None:
    groups, tries = groups_named(*(f"blocks.{i}.attn" for i in range(30))), list[int]()
    failure = fails_in_order([g.name for g in groups], tries)
    likewise = lambda g, f: Failure(f"like {g.name}: {f.why}")  # noqa: E731
    passed, failed = take_back_by_kind(families_of(groups), [], failure, likewise)
    assert (passed, len(failed), len(tries)) == ([], 30, 3)
    assert failed[-1][1].why == "like blocks.0.attn: bad blocks.0.attn"


def test_networks_with_what_cannot_be_cut_take_few_traces(traces: list[str]) -> None:
    net = blocks("literal", "halves", "plain", "literal", "halves", "literal", "literal")
    graph = intrafusion.inspect(net, X)
    surgery = operate.operate(net, graph, select(graph), Inputs.of(X))
    assert set(surgery.rolled_back) == {"1.i", "4.i", "6.i", "7.i"}
    assert all("does not run" in why for why in surgery.rolled_back.values())
    assert [surgery.model[k].i.out_channels for k in range(1, 8)] == [12, 6, 6, 12, 6, 12, 12]
    assert len(traces) <= 3
    assert surgery.model(X).shape == (1, 4, 8, 8)


def shuffled(width: int) -> nn.Module:
    """Channels are split, one half is worked on, and both are shuffled, three times: all shrink together or not."""

    def forward(n: Any, x: Tensor) -> Tensor:
        h = n.i(x)
        for layer in (n.a, n.b, n.c):
            one, two = h.chunk(2, 1)
            h = torch.cat([one, layer(two).relu()], 1)
            h = h.unflatten(1, (2, h.shape[1] // 2)).transpose(1, 2).flatten(1, 2)
        return n.o(h)

    half, conv = width // 2, nn.Conv2d
    parts = {name: conv(half, half, 1) for name in "abc"}
    return Wired(forward, i=conv(4, width, 1), o=conv(width, 4, 1), **parts)


def test_a_stage_that_shrinks_as_a_whole_does_beside_one_that_cannot() -> None:
    """Halves of 12 channels become 6, 3 and then not the same number; those of 32 do."""
    torch.manual_seed(0)
    net, x = nn.Sequential(shuffled(12), shuffled(32)).eval(), torch.randn(1, 4, 5, 5)
    both = intrafusion.compress(net, x, 0.5, reducer="select", restore=None)
    alone = intrafusion.compress(net, x, 0.5, reducer="select", restore=None, exclude=["0.*"])
    second = lambda sizes: {n: m for n, m in sizes.items() if n.startswith("1.")}  # noqa: E731
    assert second(both.plan.sizes) == second(alone.plan.sizes)
    assert both.model[1].a.out_channels == 8
    assert any(name.startswith("0.") for name in both.rolled_back)


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_what_did_not_run_is_not_tried_again(traces: list[str]) -> None:
    net = blocks("literal", "halves", "literal")
    graph = intrafusion.inspect(net, X)
    plan = intrafusion.decide(net, graph, intrafusion.Recipe.of(keep=0.5, reducer="select", restore=None), X)
    first = intrafusion.apply(net, plan, X, graph=graph)
    traces.clear()
    again = intrafusion.apply(net, plan, X, graph=graph)
    assert len(traces) == 1
    assert again.plan == first.plan
    assert again.rolled_back == first.rolled_back
    fresh = intrafusion.apply(net, plan, X)
    assert fresh.rolled_back == first.rolled_back


def test_what_fails_at_one_size_only_is_tried_at_others() -> None:
    """A literal of 6 holds where 6 channels are kept."""
    net = Wired(lambda n, x: n.o(n.a(x).relu().reshape(x.shape[0], -1, 6)[:, 0]), a=nn.Linear(5, 6), o=nn.Linear(6, 2))
    stack = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 5), net).eval()
    x = torch.randn(4, 3)
    graph = intrafusion.inspect(stack, x)
    half = operate.operate(stack, graph, select(graph, 0.5), Inputs.of(x))
    assert set(half.rolled_back) == {"3.a"}
    others = {name: m for name, m in select(graph, 0.25).items() if name != "3.a"}
    assert operate.operate(stack, graph, others, Inputs.of(x)).rolled_back == {}


def test_a_memory_belongs_to_one_graph_and_leaves_no_trace_in_it() -> None:
    net = blocks("literal")
    graph = intrafusion.inspect(net, X)
    before = repr(graph)
    operate.operate(net, graph, select(graph), Inputs.of(X))
    assert repr(graph) == before
    assert memory.recall(graph).guilty == {"1.i"}
    other = copy.deepcopy(graph)
    assert memory.recall(other).guilty == set()
    memory.hand_on(graph, other)
    assert memory.recall(other).guilty == {"1.i"}
    kept = len(memory._FINDINGS)
    del graph, other
    gc.collect()
    assert len(memory._FINDINGS) <= kept - 2


# ---- one copy in float64 --------------------------------------------------------------------------------------------


def test_a_target_is_searched_with_one_copy_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    net = blocks("literal", "halves", "plain")
    graph = intrafusion.inspect(net, X)
    made: list[nn.Module] = []

    def counted(model: nn.Module) -> nn.Module:
        made.append(model)
        return double.copy_as_double(model)

    monkeypatch.setattr(proof, "copy_as_double", counted)
    recipe = intrafusion.Recipe.of(target={"params": 0.6}, reducer="select", restore=None)
    plan = intrafusion.decide(net, graph, recipe, X)
    assert len(made) == 1
    assert "1.i" not in plan.sizes


def test_a_check_leaves_its_reference_as_it_was() -> None:
    net = blocks("halves", "plain")
    graph = intrafusion.inspect(net, X)
    reference = proof.Reference(net, graph, Inputs.of(X))
    before = {n: t.clone() for n, t in reference.double.state_dict().items()}
    check = proof.FunctionCheck(reference)
    assert check.error(select(graph)) <= 1e-10
    assert all(torch.equal(t, before[n]) for n, t in reference.double.state_dict().items())
    assert reference.double[1].i.out_channels == 12
