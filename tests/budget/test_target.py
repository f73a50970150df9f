"""Targets: what they count, how they are met, and what they never do. Oracles: counts of networks of these sizes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gallery import CASES
from torch import Tensor, nn

import intrafusion
from intrafusion.budget import target as targets
from intrafusion.budget.sensitivity import choose_teller
from intrafusion.budget.target import build_with_sizes, find_believed_cost, sizes_for_target, sizes_to_test
from intrafusion.errors import BudgetError, ModelError
from intrafusion.graph import ChannelGraph, ChannelGroup
from intrafusion.lab.zoo.networks import ViT
from intrafusion.measure.size import size_of
from intrafusion.network.inputs import Inputs
from intrafusion.plan import is_miss
from intrafusion.recipe import Recipe
from intrafusion.reduce import Eliminate, Moments, Pivot, ReductionProblem, Select
from intrafusion.reduce.eliminate import eliminate
from intrafusion.reduce.pivot import pick_channels
from intrafusion.surgery.proof import Reference

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


class PaddedByChild(nn.Conv2d):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.static_padding = nn.ZeroPad2d(1)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.static_padding(x))


def padded(*sizes: int) -> nn.Conv2d:
    return nn.Conv2d(*sizes, padding=1)  # type: ignore[misc]


def three(conv: Callable[..., nn.Module], *widths: int, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in zip((3, *widths), widths, strict=False):
        layers += [conv(a, b, 3), *([nn.BatchNorm2d(b)] if norm else []), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10)).eval()


@pytest.mark.parametrize("kind", ["params", "macs"])
def test_convolutions_with_a_child_module_get_the_sizes_of_plain_ones(kind: str) -> None:
    found = [
        intrafusion.compress(three(conv, 16, 24, 24), X, target={kind: 0.5}, restore=None)
        for conv in (PaddedByChild, padded)
    ]
    assert found[0].plan.sizes == found[1].plan.sizes
    assert (found[0].before, found[0].after) == (found[1].before, found[1].after)
    assert getattr(found[0].after, kind) / getattr(found[0].before, kind) == pytest.approx(0.5, rel=0.02)


class Functional(nn.Module):
    """Its weights are no layers'; the second is used twice, the last is a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.loop = (nn.Parameter(torch.randn(*s) / 4) for s in ((24, 6), (24, 24)))
        self.register_buffer("last", torch.randn(5, 24) / 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.first).relu()
        for _ in range(2):
            x = x + torch.einsum("bi,oi->bo", x, self.loop).relu()
        return F.linear(x, self.last)  # type: ignore[arg-type]


def test_weights_outside_of_layers_are_cut_for_a_target() -> None:
    """Width w: 24 -> w: parameters 6 w + w^2; multiply-accumulates 6 w + 2 w^2 + 5 w for one row."""
    x = torch.randn(1, 6)
    for kind, count in (("params", lambda w: 6 * w + w**2), ("macs", lambda w: 11 * w + 2 * w**2)):
        small = intrafusion.compress(Functional(), x, target={kind: 0.5}, restore=None)
        [width] = small.plan.sizes.values()
        assert getattr(small.after, kind) == count(width)
        assert width == min(range(1, 25), key=lambda w: abs(count(w) - 0.5 * count(24)))


# ---- cost -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["multi_query_attention", "non_local_block", "similarity_of_samples", "blur_pool"])
def test_products_that_no_weight_explains_are_predicted_too(name: str) -> None:
    model, example = next(c for c in CASES if c.name == name).build()
    model, inputs = model.eval(), Inputs.of(example)
    graph = intrafusion.inspect(model, inputs)
    groups, _ = targets._find_shrinkable(
        Reference(model, graph, inputs), [g for g in graph.reducible if g.kind == "channel"]
    )
    cost, doubt = find_believed_cost(model, graph, groups, inputs, "macs")
    assert doubt is None
    assert cost({}) == size_of(model, inputs).macs
    for sizes in ({g.name: max(1, g.size - 1) for g in groups}, *sizes_to_test(groups)):
        assert cost(sizes) == pytest.approx(size_of(build_with_sizes(model, graph, sizes), inputs).macs)


class Moody(nn.Module):
    """Works harder where it is wide."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(4, 32), nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        outputs = [self.last(h) for _ in range(1 + 3 * (h.shape[1] > 20))]
        return outputs[0]


def test_a_cost_that_cannot_be_predicted_is_measured_and_said() -> None:
    """4 w + 4 w up to 20 channels, 4 w + 16 w above: 640 at 32."""
    small = intrafusion.compress(Moody(), torch.randn(1, 4), target={"macs": 160}, restore=None, round_to=1)
    assert small.plan.sizes == {"first": 20}
    assert small.after.macs == 160
    assert "target: predicted macs are off by up to" in str(small)


# ---- the same share of every group ----------------------------------------------------------------------------------


class Judge:
    """Stands for measured sensitivity: curves that praise cutting the last group, and errors as a function of sizes."""

    def __init__(self, error: Callable[[Mapping[str, int]], float], groups: Sequence[ChannelGroup] = ()) -> None:
        self.error = error

    def compare(self, *candidates: Mapping[str, int]) -> list[float]:
        return [self.error(sizes) for sizes in candidates]

    def list_curves(self, groups: Sequence[ChannelGroup]) -> list[dict[str, Tensor]]:
        weights = {g.name: 1e-9 if g is groups[-1] else 1.0 for g in groups}
        return [{g.name: weights[g.name] * torch.linspace(1, 0, g.size + 1) for g in groups}]


def find(
    model: nn.Module, judge: Any, x: Any = X, **options: Any
) -> tuple[dict[str, int], tuple[str, ...], ChannelGraph]:
    graph = intrafusion.inspect(model, x)
    groups = [g for g in graph.reducible if g.kind == "channel"]
    sizes, notes = sizes_for_target(model, graph, groups, judge, Recipe.of(**options), x)
    return sizes, notes, graph


def spread(sizes: Mapping[str, int], graph: ChannelGraph) -> float:
    shares = [sizes[g.name] / g.size for g in graph.groups if g.name in sizes]
    return max(shares) - min(shares)


@pytest.mark.parametrize("wanted", [0.9, 0.002])
def test_the_same_share_of_every_group_is_taken_where_it_changes_the_output_less(wanted: float) -> None:
    """With every group at its smallest more than 0.002 is left: the target is missed, and that is said."""
    model = three(padded, 20, 20, 20)
    graph = intrafusion.inspect(model, X)
    even = Judge(lambda sizes: spread(sizes, graph))
    sizes, notes, _ = find(model, even, target={"macs": wanted})
    assert spread(sizes, graph) < 0.051  # one channel of 20
    whole = size_of(model, X).macs
    reached = size_of(build_with_sizes(model, graph, sizes), X).macs
    if wanted == 0.9:
        assert reached <= 1.01 * wanted * whole
        assert any("every group keeps about the same share" in note for note in notes)
    else:
        assert any(is_miss(note) and f"{reached:,} MACs (" in note and "(0.2 %)" in note for note in notes)
    sizes, notes, _ = find(model, Judge(lambda sizes: -spread(sizes, graph)), target={"macs": 0.9})
    assert not any("same share" in note for note in notes)


class Pairs(nn.Module):
    """What `first` and `second` give is stacked, and so equally wide, which nothing in their channels says."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(6, 16)
        self.one, self.two = nn.Linear(16, 3), nn.Linear(16, 3)
        nn.init.normal_(self.second.weight, std=0.01)

    def forward(self, x: Tensor) -> Tensor:
        pair = torch.stack([self.first(x), self.second(x)]).relu()
        return self.one(pair[0]) + self.two(pair[1])


def test_a_network_that_does_not_run_in_the_sizes_of_least_error_gets_the_same_share() -> None:
    """It was left whole: what does not run costs infinitely much, and the same share might cost as much."""
    torch.manual_seed(0)
    model, inputs = Pairs(), torch.randn(64, 6)
    small = intrafusion.compress(model, inputs[:2], target={"macs": 0.5}, inputs=inputs, restore=None)
    assert {d.group: d.m for d in small.plan.decisions} == {"first": 8, "second": 8, "one": 3}
    assert small.after.macs * 2 == small.before.macs
    assert not any(is_miss(note) for note in small.warnings)


@pytest.mark.parametrize("kind", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_of_one_module_are_cut_alike_for_a_target(kind: Callable[..., nn.RNNBase]) -> None:
    torch.manual_seed(0)
    model = three_recurrent(kind)
    x = torch.randn(64, 5, 6)
    small = intrafusion.compress(model, x[:2], target={"macs": 0.5}, inputs=x, restore=None)
    sizes = [d.m for d in small.plan.decisions if d.group.startswith("rnn")]
    assert len(sizes) == 3
    assert len(set(sizes)) == 1
    assert sizes[0] < 24
    assert abs(small.after.macs / small.before.macs - 0.5) < 0.05


def three_recurrent(kind: Callable[..., nn.RNNBase]) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = kind(6, 24, 3, batch_first=True), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.rnn(x)[0])

    return Net()


def test_the_same_share_comes_as_close_as_single_steps_take_it() -> None:
    """A share for all goes in steps of six hundredths of the MACs here; it was left there, as nothing came closer."""
    model = three(padded, 16, 16, 32)
    graph = intrafusion.inspect(model, X)
    whole = size_of(model, X).macs
    for wanted in (0.45, 0.5, 0.55, 0.6):
        even = Judge(lambda sizes: spread(sizes, graph))
        sizes, notes, _ = find(model, even, target={"macs": wanted}, round_to=1)
        reached = size_of(build_with_sizes(model, graph, sizes), X).macs / whole
        assert spread(sizes, graph) < 2 / 16
        assert reached == pytest.approx(wanted, rel=0.02) or any("no such share of every group" in n for n in notes)
        assert not any("nothing comes closer" in note for note in notes)


def test_the_same_share_obeys_rounding_and_the_smallest_size() -> None:
    model = three(padded, 16, 16, 32)
    graph = intrafusion.inspect(model, X)
    options = {"target": {"params": 0.4}, "round_to": 4, "min_channels": 6}
    sizes, _, _ = find(model, Judge(lambda sizes: spread(sizes, graph)), **options)
    assert all(m % 4 == 0 and m >= 8 for m in sizes.values())


# ---- latency --------------------------------------------------------------------------------------------------------


class Clock:
    """Stands for a clock: milliseconds as a function of multiply-accumulates, off by some factors in turn."""

    def __init__(self, ms: Callable[[int], float], factors: Sequence[float] = (1.0,)) -> None:
        self.ms, self.factors, self.reads = ms, factors, 0

    def __call__(self, models: Sequence[nn.Module], inputs: Inputs, *, repeats: int = 15, **_: Any) -> list[float]:
        self.reads += 1
        slow = self.factors[self.reads % len(self.factors)]  # of the machine: the same for all that take turns
        return [slow * self.ms(size_of(m, inputs).macs) for m in models]


def timed(monkeypatch: pytest.MonkeyPatch, clock: Clock) -> None:
    monkeypatch.setattr(targets, "latencies_ms", clock)
    monkeypatch.setitem(targets._METERS, "latency_ms", lambda model, inputs: clock.ms(size_of(model, inputs).macs))


@pytest.mark.parametrize("factors", [(1.0,), (1.0, 1.7, 0.6)], ids=["quiet", "busy"])
def test_a_latency_is_met_by_the_largest_network_that_meets_it(
    monkeypatch: pytest.MonkeyPatch, factors: tuple[float, ...]
) -> None:
    model, steps = three(padded, 32, 32, 32), 40_000
    timed(monkeypatch, Clock(lambda macs: float(-(-macs // steps)), factors))  # a staircase, as of a GPU
    whole = size_of(model, X).macs
    goal = (whole // steps // 2) * (1 + 1e-9)  # exactly the height of a step
    judge = Judge(lambda sizes: -spread(sizes, graph_of(model)))
    sizes, notes, graph = find(model, judge, target={"latency_ms": goal}, round_to=1)
    reached = size_of(build_with_sizes(model, graph, sizes), X).macs
    assert notes == ()
    assert goal * steps - 0.02 * whole <= reached <= goal * steps


def graph_of(model: nn.Module) -> ChannelGraph:
    return intrafusion.inspect(model, X)


def test_a_network_that_is_fast_enough_is_left_whole_and_a_hopeless_one_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = three(padded, 8, 8)
    timed(monkeypatch, Clock(lambda macs: 1.0 + macs * 1e-9))
    flat = Judge(lambda sizes: 0.0)
    sizes, notes, _ = find(model, flat, target={"latency_ms": 5.0})
    assert (sizes, len(notes)) == ({}, 1)
    assert notes[0] == "target: up to 5 ms were asked for; the network has 1 ms as it is, and stays so."
    sizes, notes, _ = find(model, flat, target={"latency_ms": 0.5})
    assert sizes == {"0": 1, "2": 1}
    assert "target missed: 1 ms instead of 0.5 ms; " in notes[-1]


# ---- neighbours -----------------------------------------------------------------------------------------------------


def test_a_target_of_the_whole_cuts_nothing_and_says_so() -> None:
    small = intrafusion.compress(three(padded, 8, 8), X, target={"macs": 1.0}, restore=None)
    assert small.plan.sizes == {}
    assert small.after == small.before
    assert small.plan.warnings == ("target {'macs': 1.0}: no group becomes smaller.",)


def test_a_count_above_what_the_network_has_is_said() -> None:
    model = three(padded, 8, 8)
    count = sum(p.numel() for p in model.parameters())
    small = intrafusion.compress(model, X, target={"params": 10 * count}, restore=None)
    assert small.plan.sizes == {}
    assert f"the network has {count:,} parameters as it is" in " ".join(str(small).split())


def test_a_count_is_met_from_counts_by_hand() -> None:
    """Widths a, b: 27 a + a + 9 a b + b + 10 b + 10 parameters."""
    small = intrafusion.compress(three(padded, 12, 12), X, target={"params": 900}, restore=None)
    a, b = (small.plan.sizes.get(name, 12) for name in ("0", "2"))
    assert small.after.params == 28 * a + 9 * a * b + 11 * b + 10
    assert small.after.params == pytest.approx(900, rel=0.02)


class InFours(nn.Module):
    """Its hidden width must be a multiple of four, as half of it is; the other layer's need not."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(8, 24), nn.Linear(24, 24), nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        if h.shape[1] % 4:
            raise ValueError("not in fours")
        return self.last(self.second(h).relu())


@pytest.mark.parametrize("round_to", [None, 4])
def test_a_group_that_shrinks_to_some_sizes_only_does_not_make_the_target_miss_silently(round_to: int | None) -> None:
    small = intrafusion.compress(InFours(), torch.randn(2, 8), target={"params": 0.6}, round_to=round_to, restore=None)
    off = abs(small.after.params / small.before.params - 0.6)
    assert small.rolled_back == {}
    assert off < 0.02 * 0.6 or any(map(is_miss, small.warnings))
    assert small.plan.sizes.get("first", 24) % 4 == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": {"params": 50}}, r"target\['params'\]: 50 was asked for, and the smallest network .* has"),
        ({"target": {"macs": float("inf")}}, "expected a number above 0, got inf"),
        ({"target": {"macs": float("nan")}}, "expected a number above 0, got nan"),
        ({"target": {"macs": True}}, "expected a number above 0, got True"),
        ({"target": {"macs": 0.5}, "round_to": 0}, "round_to: expected a whole number >= 1, got 0"),
    ],
)
def test_what_means_nothing_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(BudgetError, match=message):
        intrafusion.compress(three(padded, 8, 8), X, restore=None, **options)


def test_a_network_without_products_has_no_macs_to_save() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.scale = nn.Embedding(5, 8), nn.Parameter(torch.ones(8))

        def forward(self, x: Tensor) -> Tensor:
            return (self.table(x) * self.scale).sum(-1)

    with pytest.raises((BudgetError, ModelError)):
        intrafusion.compress(Scaled(), torch.zeros(1, 3, dtype=torch.long), target={"macs": 0.5}, restore=None)


def test_heads_of_which_half_the_width_fits_as_half_the_heads_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four heads of 8 at half their width are two heads of 8 to a forward that takes their number from the width."""
    torch.manual_seed(0)
    model = ViT(image=8, patch=4, width=32, depth=2, heads=4, hidden=16).eval()
    split = lambda attn, x: x.unflatten(-1, (-1, attn.head_dim)).transpose(1, 2)  # noqa: E731
    monkeypatch.setattr(type(model.encoder.layers[0].attn), "_split", split)
    for layer in model.encoder.layers:
        layer.attn.head_dim, layer.attn.heads = 8, None
    x = torch.randn(2, 3, 8, 8)
    graph = intrafusion.inspect(model, x)
    groups = [g for g in graph.reducible if g.is_channel]
    left, _ = targets._find_shrinkable(Reference(model, graph, Inputs.of(x)), groups)
    assert {g.name for g in left} == {g.name for g in groups}
    assert sum("attn" in g.name for g in left) == 16


def test_a_target_goes_by_the_curve_of_the_reducer() -> None:
    draw = torch.randn(1, 6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    moments = Moments(torch.zeros(1, 6).double(), draw @ draw.mT, torch.eye(6).double())
    scores = torch.arange(6.0).double()
    problem = ReductionProblem(scores[:, None], scores, 6, moments=moments)
    for reducer, expected in (
        (Eliminate(unmerge=False), eliminate(moments).losses),
        (Pivot(), pick_channels(moments).missing),
        (Select(), pick_channels(moments).missing),
    ):
        found = choose_teller(reducer).list_losses(problem)
        assert found is not None
        assert torch.equal(found, expected)
